"""How RefineDet arrives at its boxes: the anchors that pass the ARM, where it moves them, what the ODM makes of them.

One image goes through the network once. Every box of a later step is traced back to its anchor, so that an object has
one colour in all steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from refinedet import boxes as box_ops
from refinedet.detections import Detections
from refinedet.draw import class_color, draw_boxes, write_image
from refinedet.files import check_output, user_path
from refinedet.fonts import load_font, pick_face
from refinedet.images import ImageSource, read_image
from refinedet.model.anchors import STRIDES
from refinedet.model.network import Predictions, evaluation_view, passes_negative_filter, starting_boxes
from refinedet.model.padded import PaddedArrays, unpad
from refinedet.model.postprocess import postprocess
from refinedet.preprocess import preprocess
from refinedet.text import printable

if TYPE_CHECKING:
    from refinedet.detector import RefineDet

STEPS_SIGNATURE = "steps drawn by refinedet"
STAGES = ("preprocess", "backbone", "ARM", "TCB", "ODM", "post-process")
"""What is timed, in the order in which it happens."""
_LEVEL_COLORS = ((255, 200, 20), (60, 200, 120), (66, 133, 244), (200, 90, 220))
"""Anchors of the four levels, from the finest to the coarsest."""
_PANEL_SIDE = 640
_SHOWN = 60
"""Anchors whose boxes are drawn; more would hide each other and the image."""
_DIMMED = 0.55
"""Brightness of the image below the boxes."""

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Explanation:
    """The steps of one prediction; P anchors pass the ARM, D objects are detected. Boxes are xyxy image pixels."""

    pixels: Pixels
    """(H, W, 3) uint8 RGB: the image."""
    tiled: tuple[int, ...]
    """Anchors tiled on each level, from stride 8 to 64."""
    negative_threshold: float
    """Theta: an anchor passes if the ARM's background score does not exceed it."""
    anchors: Floats
    """(P, 4) anchors that pass, not clipped to the image."""
    levels: Integers
    """(P,) level of each, 0..3."""
    objectness: Floats
    """(P,) the ARM's score of "some object"."""
    refined: Floats
    """(P, 4) where the ARM moved them."""
    final: Floats
    """(P, 4) where the ODM moved the refined anchors."""
    scores: Floats
    """(P,) the ODM's best class score of each."""
    labels: Integers
    """(P,) the class of that score."""
    detections: Detections
    """What is left after suppression, with a score of at least ``threshold``."""
    origins: Integers
    """(D,) row of the anchor that became each detection."""
    threshold: float
    """Lowest score of a detection."""
    milliseconds: dict[str, float]
    """Time of each of ``STAGES``."""

    def at(self, threshold: float) -> Explanation:
        """The same steps with the detections that score at least ``threshold``, which is no lower than before."""
        kept = self.detections.scores >= np.float32(threshold)
        found, origins = self.detections[kept], self.origins[kept]
        return replace(self, threshold=threshold, detections=found, origins=origins)

    def table(self) -> str:
        """Aligned text: what each step keeps, and the time of each stage."""
        above = int((self.scores >= self.threshold).sum())
        moved = np.abs(self._centres(self.refined) - self._centres(self.anchors)).max(axis=1, initial=0)
        lines = [
            f"{sum(self.tiled):>7,} anchors tiled ({' + '.join(f'{n:,}' for n in self.tiled)})",
            f"{len(self.anchors):>7,} pass the ARM (background score of at most {self.negative_threshold:g}), moved by "
            f"{np.median(moved) if len(moved) else 0:.1f} pixels at the median",
            f"{above:>7,} get a class score of {self.threshold:g} or more from the ODM",
            f"{len(self.detections):>7,} are left after suppression",
            "",
            f"{'stage':<14}{'ms':>8}",
            *(f"{stage:<14}{self.milliseconds[stage]:>8.1f}" for stage in STAGES),
            f"{'total':<14}{sum(self.milliseconds.values()):>8.1f}",
        ]
        return "\n".join(lines)

    @staticmethod
    def _centres(boxes: Floats) -> Floats:
        centres: Floats = (boxes[:, :2] + boxes[:, 2:]) / np.float32(2)
        return centres

    def draw(self) -> Pixels:
        """Four panels in one image: tiled anchors that passed, refined anchors, the ODM's boxes, detections.

        Of the anchors, every centre is a dot, the brighter the surer the ARM is of an object, and the 60 surest are
        drawn as boxes in the colour of their level. The boxes that became detections have the colour of their class in
        all panels.

        Returns:
            (H', W', 3) uint8 RGB.
        """
        surest = np.argsort(-self.objectness, kind="stable")[:_SHOWN]
        above = np.flatnonzero(self.scores >= self.threshold)
        by_level = [_LEVEL_COLORS[level % len(_LEVEL_COLORS)] for level in self.levels.tolist()]
        by_class = [class_color(label) for label in self.labels.tolist()]
        levels = ", ".join(f"stride {stride}: {int((self.levels == n).sum())}" for n, stride in enumerate(STRIDES))
        shown = f"the {len(surest)} surest as boxes" if len(surest) < len(self.anchors) else "all as boxes"
        count = len(self.detections)
        panels = [
            self._panel(
                (f"1  {len(self.anchors):,} of {sum(self.tiled):,} anchors pass the ARM", f"{shown}; {levels}"),
                self.anchors, surest, by_level,
            ),
            self._panel(
                ("2  the ARM moves and scales them", "lines lead from the centre of the anchor to where it is now"),
                self.refined, surest, by_level,
            ),
            self._panel(
                (
                    "3  the ODM classifies them and moves them again",
                    f"the {len(above):,} that score {self.threshold:g} or more, before suppression",
                ),
                self.final, above, by_class,
            ),
            self._result(f"4  {count} detection{'s' * (count != 1)} after suppression", self._times()),
        ]  # fmt: skip
        rows = (np.concatenate(panels[:2], axis=1), np.concatenate(panels[2:], axis=1))
        return np.concatenate(rows, axis=0)

    def _times(self) -> str:
        return ", ".join(f"{stage} {self.milliseconds[stage]:.0f}" for stage in STAGES) + " ms"

    def save(self, path: str | Path) -> Path:
        """Write ``draw()`` to a .jpg or .png file.

        Raises:
            UsageError: the file exists and was not drawn by this function, or has another ending.
            RefineDetError: it cannot be written.
        """
        target = check_output(user_path(path), ours=STEPS_SIGNATURE)
        write_image(target, self.draw(), STEPS_SIGNATURE)
        return target

    def _scaled(self) -> tuple[Image.Image, float]:
        image = Image.fromarray(self.pixels)
        factor = _PANEL_SIDE / max(image.size)
        return image.resize(tuple(max(1, round(side * factor)) for side in image.size)), factor  # type: ignore[arg-type]

    def _panel(
        self, texts: tuple[str, str], boxes: Floats, chosen: Integers, colors: Sequence[tuple[int, int, int]]
    ) -> Pixels:
        """The darkened image with the chosen of (P, 4) boxes, and thicker those that became detections."""
        image, factor = self._scaled()
        canvas = image.point(lambda value: value * _DIMMED)
        draw = ImageDraw.Draw(canvas, "RGBA")
        if boxes is self.anchors:
            alphas = (40 + 215 * self.objectness / max(1e-6, float(self.objectness.max(initial=0)))).astype(int)
            centres = (self._centres(boxes) * factor).tolist()
            for (x, y), color, alpha in zip(centres, colors, alphas.tolist(), strict=True):
                draw.rectangle((x, y, x + 1, y + 1), fill=(*color, alpha))
        for row in chosen[::-1].tolist():
            self._line(draw, boxes, row, factor, (*colors[row], 170))
        for label, row in reversed(list(zip(self.detections.labels.tolist(), self.origins.tolist(), strict=True))):
            self._line(draw, boxes, row, factor, class_color(label), width=3)
        return _titled(canvas, *texts)

    def _line(
        self, draw: ImageDraw.ImageDraw, boxes: Floats, row: int, factor: float, color: Any, width: int = 1
    ) -> None:
        """A box and, where it is a refined anchor, a line from the centre of the anchor to its own."""
        left, top, right, bottom = (boxes[row].astype(np.float64) * factor).clip(-(10**5), 10**5).tolist()
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=width)
        if boxes is self.refined:
            ends = np.stack([self._centres(self.anchors[row : row + 1]), self._centres(boxes[row : row + 1])])
            draw.line([tuple(point) for point in (ends[:, 0] * factor).tolist()], fill=color, width=width)

    def _result(self, title: str, note: str) -> Pixels:
        image, factor = self._scaled()
        found = self.detections
        drawn = draw_boxes(np.asarray(image), found.boxes * factor, found.labels, found.class_names, found.scores)
        return _titled(Image.fromarray(drawn), title, note)


def _titled(image: Image.Image, title: str, note: str) -> Pixels:
    """The image with two lines of text above it."""
    face = pick_face(title + note, None)
    canvas = Image.new("RGB", (max(image.width, 320) + 8, image.height + 56), (24, 24, 24))
    canvas.paste(image, (4, 52))
    draw = ImageDraw.Draw(canvas)
    for text, height, size, color in ((title, 4, 18, (255, 255, 255)), (note, 28, 13, (180, 180, 180))):
        while size > 8 and draw.textlength(text, font=load_font(face, size)) > canvas.width - 12:
            size -= 1
        draw.text((6, height), printable(text), font=load_font(face, size), fill=color)
    return np.asarray(canvas)


@torch.no_grad()
def explain(model: RefineDet, source: ImageSource, *, threshold: float) -> Explanation:
    """Run a model on one image and keep every step.

    Args:
        model: the detector.
        source: an image of any kind that ``RefineDet.predict`` takes.
        threshold: lowest score of a detection, 0..1.

    Raises:
        UsageError: something that is no image.
        RefineDetError: the image cannot be read.
    """
    pixels = read_image(source)
    config, device = model.config, model.device
    clock = _Clock(device)
    with clock.time("preprocess"):
        inputs = torch.from_numpy(preprocess(pixels, config))[None].to(device, model.dtype)
    network = evaluation_view(model.network)
    clock.watch(network)
    outputs = network(inputs)
    with clock.time("post-process"):
        padded = PaddedArrays(*(part.cpu().numpy() for part in postprocess(outputs, config)[:4]))
    detections = unpad(padded, [pixels], config.image_size, model.class_names, config.inference)[0]
    outputs = Predictions(*(part.float().cpu() for part in outputs))
    std = torch.tensor(config.offset_std)
    passed = passes_negative_filter(outputs.arm_logits[0], config.negative_threshold)
    refined = starting_boxes(outputs.arm_offsets, outputs.anchors, std, config)[0][passed]
    final = box_ops.decode(outputs.odm_offsets[0][passed], refined, std)
    scores, labels = outputs.odm_logits[0][passed].softmax(dim=-1)[:, :-1].max(dim=-1)
    sizes = clock.anchors_per_level
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows, columns = pixels.shape[:2]
    height, width = config.image_size
    factor = torch.tensor([columns / width, rows / height] * 2)
    found = detections.filter(threshold=threshold)
    return Explanation(
        pixels=pixels,
        tiled=tuple(sizes),
        negative_threshold=config.negative_threshold,
        anchors=(outputs.anchors[passed] * factor).numpy(),
        levels=levels[passed].numpy(),
        objectness=outputs.arm_logits[0][passed].softmax(dim=-1)[:, 0].numpy(),
        refined=(refined * factor).numpy(),
        final=(final * factor).numpy(),
        scores=scores.numpy(),
        labels=labels.numpy(),
        detections=found,
        origins=_origins(found, final * factor, outputs.odm_logits[0][passed].softmax(dim=-1)),
        threshold=threshold,
        milliseconds=clock.milliseconds,
    )


def _origins(found: Detections, boxes: Tensor, scores: Tensor) -> Integers:
    """The row of (P, 4) ``boxes`` and (P, C + 1) ``scores`` from which each detection comes."""
    columns, rows = found.image_size
    clipped = box_ops.clip(boxes, rows, columns)
    distance = (clipped[None] - torch.from_numpy(found.boxes)[:, None]).abs().sum(dim=-1)
    # Clipped boxes may coincide: of equal ones the score decides.
    difference = (scores.T[torch.from_numpy(found.labels)] - torch.from_numpy(found.scores)[:, None]).abs()
    return (distance + difference).argmin(dim=1).numpy() if len(found) else np.zeros(0, np.int64)


class _Clock:
    """Times stages; on a GPU it waits for the device before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.milliseconds = dict.fromkeys(STAGES, 0.0)
        self.anchors_per_level: list[int] = []
        self._device = device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes."""
        began = self._now()
        yield
        self.milliseconds[stage] += 1000 * (self._now() - began)

    def watch(self, network: nn.Module) -> None:
        """Add the time of each part of a network, which must be a view of its own, whenever it runs."""
        parts: list[tuple[str, Any]] = [("backbone", network.backbone)]
        for stage, name in (("ARM", "arm"), ("TCB", "tcb"), ("ODM", "odm")):
            parts += [(stage, part) for part in getattr(network, name)]
        for stage, part in parts:
            part.forward = self._timed(stage, part.forward)

    def _timed(self, stage: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*inputs: Any) -> Any:
            with self.time(stage):
                result = forward(*inputs)
            if stage == "ODM":
                self.anchors_per_level.append(result[0].shape[1])
            return result

        return timed
