"""Comparing an exported file with PyTorch on real images: the same boxes kept, differences measured, ties named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import refinedet
from refinedet.boxes import iou
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import read_image
from refinedet.model.network import Predictions, evaluation_view
from refinedet.model.postprocess import PaddedDetections, postprocess
from refinedet.pixels import Pixels
from refinedet.preprocess import normalize
from refinedet.runtime import Runtime
from refinedet.sources import find_images

BATCHES = (1, 2, 5)
"""Sizes of batches that every file is verified at."""
BOX_TOLERANCE = 0.05
"""Largest difference of a corner, in pixels of the network input."""
FAR_TOLERANCE = 1e-5
"""Or this share of the largest coordinate, if that is more: of those beyond 5,000 pixels."""
SCORE_TOLERANCE = 1e-4
"""Largest difference of a score; decisions by a margin smaller than this are ties."""
OVERLAP_TOLERANCE = 1e-4
"""Overlaps nearer to the threshold of suppression than this are ties."""
CONFIDENT = 0.1
"""In files of lower precision, detections that score at least this must be found again on the other side: a box of the
same class with an IoU of at least 0.5 and a score within 0.2."""
AGREEMENT = {"fp16": 0.98, "int8": 0.9}
"""The share of them that must be found, by precision."""


@dataclass
class Verification:
    """Differences between an exported file and PyTorch over all images and batch sizes."""

    images: int = 0
    """Images compared."""
    batches: tuple[int, ...] = BATCHES
    """Batch sizes at which each was compared."""
    detections: int = 0
    """Detections that both have; of a raw file, the anchors whose outputs were compared."""
    missed: int = 0
    """Of a file of lower precision, the confident detections that only one side has."""
    precision: str = "fp32"
    """Of the file."""
    compared: str = "detections"
    """What ``detections`` counts, in a word."""
    box_difference: float = 0.0
    """Largest difference of a corner, in pixels of the network input."""
    score_difference: float = 0.0
    """Largest difference of a score."""
    ties: list[str] = field(default_factory=list)
    """Detections that only one side keeps because a decision was closer than rounding, one line each."""
    faults: list[str] = field(default_factory=list)
    """Differences that rounding does not explain, one line each."""

    def summary(self) -> str:
        """One line."""
        sizes = ", ".join(map(str, self.batches))
        if self.precision != "fp32":
            return (
                f"{self.precision}, verified on {self.images} images at batch {sizes}: {100 * self.agreement:.1f} % of "
                f"{self.detections + self.missed} detections that score {CONFIDENT} or more are found by both the file "
                "and PyTorch"
            )
        return (
            f"verified on {self.images} images at batch {sizes}: {self.detections} {self.compared} equal, boxes within "
            f"{self.box_difference:.2g} px, scores within {self.score_difference:.2g}, ties: {len(self.ties)}"
        )

    @property
    def agreement(self) -> float:
        """The share of detections that both have."""
        return self.detections / max(1, self.detections + self.missed)


def verification_images(images: Sequence[Pixels] | str | Path | None) -> list[Pixels]:
    """The images of a folder, or the example photos and crowded scenes made of them.

    Raises:
        UsageError: the folder has no image.
    """
    if images is None:
        photos = [read_image(file) for file in example_photos()]
        return [*photos, *(crowded_scene(photos, seed) for seed in range(4)), blank_image()]
    if isinstance(images, (str, Path)):
        return [read_image(file) for file in find_images([images]).files]
    if not images:
        raise UsageError("an exported file is verified on images, and none were given")
    return list(images)


def example_photos() -> list[Path]:
    """The photos that come with the package, or in a checkout with the repository."""
    installed = Path(refinedet.__file__).parent / "examples"
    folder = installed if installed.is_dir() else Path(refinedet.__file__).parents[2] / "examples"
    photos = sorted(folder.glob("*.jpg"))
    if not photos:
        raise UsageError(f"{folder}: the example photos are missing; name images to verify on with --verify")
    return photos


def crowded_scene(photos: Sequence[Pixels], seed: int, *, count: int = 40, side: int = 640) -> Pixels:
    """A canvas full of shrunken copies of photos that overlap each other, so that suppression has much to do."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    canvas = Image.new("RGB", (side, side), (128, 128, 128))
    for _ in range(count):
        photo = Image.fromarray(photos[int(rng.integers(len(photos)))])
        height = int(rng.integers(side // 10, side // 2))
        small = photo.resize((max(1, photo.width * height // photo.height), height))
        left, top = (int(value) for value in rng.integers(-height // 2, side - height // 2, 2))
        canvas.paste(small, (left, top))
    return np.asarray(canvas)


def blank_image() -> Pixels:
    """A narrow gray image on which nothing is found."""
    return np.full((300, 1, 3), 127, dtype=np.uint8)


def verify(
    model: RefineDet, exported: Runtime, images: Sequence[Pixels], batches: tuple[int, ...] = BATCHES
) -> Verification:
    """Compare an exported file with the detector that it was made of.

    Both get the same resized pixels. PyTorch keeps boxes by ``model.postprocess`` on the CPU, which is another program
    than the rounds of the graph.

    Args:
        model: the detector in PyTorch.
        exported: the file.
        images: (H, W, 3) uint8 RGB; each is compared at every batch size.
        batches: the batch sizes.

    Raises:
        RefineDetError: a difference that rounding does not explain; of a file of lower precision, too few detections
            that agree.
    """
    result = Verification(
        images=len(images),
        batches=batches,
        compared="anchors" if exported.raw else "detections",
        precision=exported.precision,
    )
    references = [] if exported.raw else [_reference(model, exported, image) for image in images]
    for size in batches:
        for first in range(0, len(images), size):
            # The last batch is filled up from the front, so that every batch has its full size.
            chosen = [(first + offset) % len(images) for offset in range(size)]
            batch = exported.inputs([images[index] for index in chosen])
            if exported.raw:
                _compare_raw(model, exported, batch, result)
                continue
            outputs = exported.run(batch)
            for row, index in enumerate(chosen):
                where = f"image {index + 1} at batch {size}"
                if not outputs.finite[row]:
                    result.faults.append(f"{where}: the network's outputs are not finite")
                    continue
                if not outputs.settled[row]:
                    result.faults.append(f"{where}: more rounds of suppression are needed than the graph has")
                    continue
                count = int(outputs.num_detections[row])
                answer = Boxes(outputs.boxes[row, :count], outputs.scores[row, :count], outputs.labels[row, :count])
                if exported.precision == "fp32":
                    _compare(references[index], answer, model, where, result)
                else:
                    _compare_loosely(references[index].kept, answer, result)
    if exported.precision != "fp32" and not result.faults:
        _check_agreement(result)
    if result.faults:
        raise RefineDetError(
            f"the exported file gives other detections than PyTorch ({len(result.faults)} differences, the first: "
            f"{result.faults[0]})"
        )
    return result


class Boxes(NamedTuple):
    """Detections or candidates of an image, in pixels of the network input."""

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


class _Reference(NamedTuple):
    """What PyTorch makes of an image."""

    kept: Boxes
    candidates: Boxes
    """Before suppression."""


def _normalized(model: RefineDet, inputs: npt.NDArray[Any]) -> torch.Tensor:
    """The network's input for resized pixels."""
    return torch.from_numpy(np.stack([normalize(image, model.config) for image in inputs]))


def _reference(model: RefineDet, exported: Runtime, image: Pixels) -> _Reference:
    config = model.config
    with torch.inference_mode():
        predictions = evaluation_view(model.network)(_normalized(model, exported.inputs([image])))
        limit = config.inference.candidates * (1 if config.inference.candidates_per == "image" else config.num_classes)
        all_kept = replace(config, inference=replace(config.inference, nms_iou=1.0, max_detections=limit))
        kept, candidates = (postprocess(predictions, settings) for settings in (config, all_kept))
    return _Reference(*(_first_image(padded) for padded in (kept, candidates)))


def _first_image(padded: PaddedDetections) -> Boxes:
    count = int(padded.counts[0])
    return Boxes(*(values[0, :count].numpy() for values in (padded.boxes, padded.scores, padded.labels)))


def _compare_raw(model: RefineDet, exported: Runtime, inputs: npt.NDArray[Any], result: Verification) -> None:
    """Raw outputs, one by one."""
    with torch.inference_mode():
        expected = evaluation_view(model.network)(_normalized(model, inputs))
    for name, ours, theirs in zip(Predictions._fields, expected, exported.run_raw(inputs), strict=True):
        difference = float(np.abs(ours.numpy() - theirs).max())
        result.score_difference = max(result.score_difference, difference)
        if not difference <= 1e-3 * max(1.0, float(ours.abs().max())):
            result.faults.append(f"{name} differs by {difference:.2g}")
    result.detections += len(inputs) * int(expected.anchors.shape[0])


def _compare(reference: _Reference, answer: Boxes, model: RefineDet, where: str, result: Verification) -> None:
    """Pair equal detections of an image; name the others as ties or faults."""
    expected = reference.kept
    free = np.ones(len(answer.scores), dtype=np.bool_)
    lonely: list[tuple[str, Boxes, int]] = []
    for row in range(len(expected.scores)):
        distance, gap, same = _near(expected, row, answer)
        same &= free
        if not same.any():
            lonely.append(("PyTorch", expected, row))
            continue
        best = int(np.flatnonzero(same)[np.argmin(distance[same])])
        free[best] = False
        result.detections += 1
        result.box_difference = max(result.box_difference, float(distance[best]))
        result.score_difference = max(result.score_difference, float(gap[best]))
    lonely += [("the file", answer, int(row)) for row in np.flatnonzero(free)]
    for side, detections, row in lonely:
        name, score = model.class_names[int(detections.labels[row])], float(detections.scores[row])
        reason = _tie(reference, detections, row, model)
        line = f"{where}: only {side} keeps a {name} of score {score:.4f} ({reason or 'rounding does not explain it'})"
        (result.ties if reason else result.faults).append(line)


def _compare_loosely(expected: Boxes, answer: Boxes, result: Verification) -> None:
    """Count the confident detections of each side that the other has, and those that it lacks."""
    for one, other in ((expected, answer), (answer, expected)):
        sure = one.scores >= CONFIDENT
        overlap = iou(torch.from_numpy(one.boxes[sure]), torch.from_numpy(other.boxes)).numpy()
        same = one.labels[sure, None] == other.labels
        near = np.abs(one.scores[sure, None] - other.scores) <= 0.2
        found = int(((overlap >= 0.5) & same & near).any(axis=1).sum())
        result.detections += found
        result.missed += int(sure.sum()) - found


def _check_agreement(result: Verification) -> None:
    if not result.detections + result.missed:
        raise RefineDetError(
            f"nothing scores {CONFIDENT} or more on the {result.images} images to verify on; name others with --verify"
        )
    if result.agreement < AGREEMENT[result.precision]:
        raise RefineDetError(
            f"only {100 * result.agreement:.1f} % of the detections of the {result.precision} file agree with PyTorch, "
            f"and {100 * AGREEMENT[result.precision]:.0f} % must; "
            + ("give more or other images to calibrate on" if result.precision == "int8" else "use fp32")
        )


def _near(one: Boxes, row: int, others: Boxes) -> tuple[Any, Any, Any]:
    """Distances of a box from others in pixels and in score, and which of them are the same within the tolerances."""
    distance = np.abs(others.boxes - one.boxes[row]).max(axis=1, initial=0.0)
    gap = np.abs(others.scores - one.scores[row])
    # Beyond any image rounding grows with the coordinates: an untrained network may make boxes 40,000 pixels wide.
    allowed = max(BOX_TOLERANCE, FAR_TOLERANCE * float(np.abs(one.boxes[row]).max()))
    same = (others.labels == one.labels[row]) & (distance <= allowed) & (gap <= SCORE_TOLERANCE)
    return distance, gap, same


def _tie(reference: _Reference, detections: Boxes, row: int, model: RefineDet) -> str:
    """Why rounding alone may decide about a detection; empty if it may not."""
    settings, score = model.config.inference, float(detections.scores[row])
    candidates = reference.candidates
    if score - settings.score_threshold <= SCORE_TOLERANCE:
        return "its score is that of the threshold"
    _, _, same = _near(detections, row, candidates)
    if not same.any():
        full = settings.candidates_per == "image" and len(candidates.scores) >= settings.candidates
        if full and score - float(candidates.scores.min()) <= SCORE_TOLERANCE:
            return "its score is that of the last candidate"
        return ""
    kept = reference.kept.scores
    if len(kept) >= settings.max_detections and score - float(kept.min()) <= SCORE_TOLERANCE:
        return "its score is that of the last detection kept"
    rivals = np.flatnonzero((candidates.labels == detections.labels[row]) & ~same)
    box = torch.from_numpy(detections.boxes[row : row + 1])
    overlap = iou(box, torch.from_numpy(candidates.boxes[rivals]))[0].numpy()
    if (np.abs(overlap - settings.nms_iou) <= OVERLAP_TOLERANCE).any():
        return "its overlap with another box is that of the suppression"
    if ((np.abs(candidates.scores[rivals] - score) <= SCORE_TOLERANCE) & (overlap > settings.nms_iou)).any():
        return "a box of the same score overlaps it"
    return ""
