"""Multi-scale testing, the rows with a "+" of the paper's tables: which passes, and how their boxes are merged.

The paper names the strategy (section 5.1), the official code says what it is (test/lib/fast_rcnn/test.py): the image
goes through the same network at several sizes, as it is and mirrored; of the small sizes only large boxes count, of the
large sizes only small ones; what all passes found is merged class by class by box voting. Anchors keep their pixel
sizes at every input size, so a larger input means smaller objects.

Box sizes are in pixels of the original image. The official code counts inclusive pixels, ``x2 - x1 + 1``; with
pixel edges that number is ``x2 - x1`` (docs/conventions.md), so neither sizes nor overlaps have a +1 here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from refinedet.config import ModelConfig
from refinedet.detections import Detections
from refinedet.errors import UsageError

if TYPE_CHECKING:
    from refinedet.detector import RefineDet
    from refinedet.runtime import Runtime

Form = Literal["voc", "coco"]

VOTE_IOU = 0.45
"""Boxes of a class that overlap the best one by at least this are merged with it (official code: bbox_vote)."""

_Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pass:
    """One run of the network over an image."""

    long: int
    """The longer side of the network input in pixels, laid along the image's longer side."""
    short: int
    """The shorter side; equal to ``long`` for a square."""
    flip: bool = False
    """Mirror the image left to right first."""
    longest_above: float | None = None
    """Keep boxes whose longer side is more than this many pixels of the original image."""
    shortest_below: float | None = None
    """Keep boxes whose shorter side is less than this many pixels of the original image."""

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the network input for an image of that (width, height).

        An image that is as high as wide counts as upright, as in the official code.
        """
        width, height = image_size
        return (self.short, self.long) if height < width else (self.long, self.short)

    def counts(self, boxes: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
        """Which of (D, 4) xyxy boxes, in pixels of the original image, this pass may contribute."""
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = np.ones(len(boxes), dtype=np.bool_)
        if self.longest_above is not None:
            keep &= sides.max(axis=1) > self.longest_above
        if self.shortest_below is not None:
            keep &= sides.min(axis=1) < self.shortest_below
        return keep

    def __str__(self) -> str:
        """Such as ``320x192 flipped``."""
        return f"{self.long}x{self.short}" + (" flipped" if self.flip else "")


# (long, short, longest_above, shortest_below), in the official order.
_PASSES_320: tuple[tuple[int, int, float | None, float | None], ...] = (
    (320, 320, None, None),
    (320, 192, None, None),
    (192, 192, 32, None),
    (384, 384, None, 160),
    (448, 448, None, 128),
    (512, 512, None, 96),
    (576, 576, None, 64),
    (704, 704, None, 32),
)
_MORE_320_FOR_COCO: tuple[tuple[int, int, float | None, float | None], ...] = ((640, 640, None, 48),)
_PASSES_512: tuple[tuple[int, int, float | None, float | None], ...] = (
    (512, 512, None, None),
    (512, 384, None, None),
    (256, 256, None, None),
    (384, 384, None, None),
    (896, 896, None, 128),
    (768, 768, None, 192),
)
_MORE_512_FOR_COCO: tuple[tuple[int, int, float | None, float | None], ...] = (
    (640, 640, None, 224),
    (1024, 1024, None, 96),
    (1152, 1152, None, 64),
)


def passes(image_size: tuple[int, int], form: Form) -> list[Pass]:
    """The official passes, each followed by its mirrored twin.

    Args:
        image_size: height and width of the model's own input: 320 or 512 pixels square.
        form: "voc" (16 passes at 320, 12 at 512) or "coco" (18 at either).

    Raises:
        UsageError: a model of another size, for which no passes are defined.
    """
    tables = {
        (320, 320): (_PASSES_320, _MORE_320_FOR_COCO),
        (512, 512): (_PASSES_512, _MORE_512_FOR_COCO),
    }
    if tuple(image_size) not in tables:
        height, width = image_size
        raise UsageError(
            f"multi-scale testing is defined for models of 320x320 and 512x512 pixels, not {width}x{height}; "
            "evaluate this one at its own size"
        )
    base, more = tables[image_size]
    return [
        Pass(long, short, flip, longest_above, shortest_below)
        for long, short, longest_above, shortest_below in (base + more if form == "coco" else base)
        for flip in (False, True)
    ]


def vote(
    boxes: npt.NDArray[np.floating],
    scores: npt.NDArray[np.floating],
    *,
    iou: float = VOTE_IOU,
    soft_threshold: float | None = None,
) -> tuple[_Floats, _Floats]:
    """Merge the boxes of one class that several passes found (official code: bbox_vote and soft_bbox_vote).

    The best box and all that overlap it by ``iou`` or more become one: the mean of their corners, weighted by score,
    with the best score. Then the best of the rest, and so on. With ``soft_threshold`` the members of a cluster also
    stay, with their score times one minus their overlap with the best, as long as that reaches the threshold; this is
    done once, the survivors are not merged again.

    Args:
        boxes: (D, 4) xyxy.
        scores: (D,), any order; of equal ones the earlier counts as better.
        iou: least overlap within a cluster.
        soft_threshold: None is VOC's form, a score COCO's.

    Returns:
        (E, 4) boxes and (E,) scores, best first; E may exceed D only by the softened copies.
    """
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    left: _Doubles = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[order]
    weights: _Doubles = np.asarray(scores, dtype=np.float64)[order]
    merged_boxes: list[_Doubles] = []
    merged_scores: list[_Doubles] = []
    while len(weights):
        overlap = _overlap(left[0], left)
        members = overlap >= iou
        members[0] = True  # a box without area overlaps nothing, not even itself
        cluster, cluster_scores = left[members], weights[members]
        if len(cluster) == 1:
            merged_boxes.append(cluster)
            merged_scores.append(cluster_scores)
        else:
            if soft_threshold is not None:
                softened = cluster_scores * (1.0 - overlap[members])
                # The best overlaps itself by 1: it ends at 0 and is no detection even if the threshold is 0.
                stays = (softened >= soft_threshold) & (np.arange(len(softened)) > 0)
                merged_boxes.append(cluster[stays])
                merged_scores.append(softened[stays])
            merged_boxes.append((cluster_scores[:, None] * cluster).sum(axis=0, keepdims=True) / cluster_scores.sum())
            merged_scores.append(cluster_scores[:1])
        left, weights = left[~members], weights[~members]
    if not merged_scores:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    all_boxes, all_scores = np.concatenate(merged_boxes), np.concatenate(merged_scores)
    best_first = np.argsort(-all_scores, kind="stable")
    return all_boxes[best_first].astype(np.float32), all_scores[best_first].astype(np.float32)


def _overlap(box: _Doubles, boxes: _Doubles) -> _Doubles:
    """(4,) and (D, 4) xyxy to (D,) IoU; 0 where there is no area."""
    size = np.maximum(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0.0)
    inner = size[:, 0] * size[:, 1]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + area - inner
    result: _Doubles = np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
    return result


class MultiScale:
    """A model under multi-scale testing, in the shape of a detector: hand it to whatever takes one.

    Runs of the network are batched over images and mirrored twins of equal input size. No run has more input pixels
    than ``batch_size`` images at the model's own size, so memory does not grow with the passes.

    Args:
        model: a ``RefineDet`` of 320x320 or 512x512, or a file of one that was exported with ``dynamic_size``.
        form: "voc" or "coco": the passes and the vote.
        batch_size: images of the model's own size that go through the network at once.

    Each pass uses the model's own post-processing, without its Soft-NMS if it has one: the vote takes its place.

    Raises:
        UsageError: a model of another size.
    """

    def __init__(self, model: RefineDet | Runtime, form: Form, *, batch_size: int = 8) -> None:
        self.model = model
        # The same network; its post-processing follows from the config.
        self._without_soft_nms = copy.copy(model)
        self._without_soft_nms.config = replace(
            model.config, inference=replace(model.config.inference, soft_nms_iou=None)
        )
        self.form: Form = form
        self.passes = passes(model.config.image_size, form)
        self._pixels = batch_size * model.config.image_size[0] * model.config.image_size[1]

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The model's."""
        return self.model.class_names

    def predict_arrays(
        self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        """All passes over every image, merged.

        Args:
            images: (H, W, 3) uint8 RGB each, sizes may differ.
            threshold: lowest score returned, applied after the vote; None returns everything.

        Returns:
            Detections in pixels of each image, best first. There is no limit on their number.
        """
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        runs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, size in enumerate(sizes):
            for number, run in enumerate(self.passes):
                runs.setdefault(run.size(size), []).append((row, number))
        detections: dict[tuple[int, int], Detections] = {}
        for (height, width), jobs in runs.items():
            at_once = max(1, self._pixels // (height * width))
            for first in range(0, len(jobs), at_once):
                part = jobs[first : first + at_once]
                inputs = [
                    np.ascontiguousarray(images[row][:, ::-1]) if self.passes[number].flip else images[row]
                    for row, number in part
                ]
                answers = self._without_soft_nms.predict_arrays(inputs, size=(height, width))
                for (row, number), answer in zip(part, answers, strict=True):
                    detections[row, number] = _counting(answer, self.passes[number])
        merged = [
            self._merge([detections[row, k] for k in range(len(self.passes))], sizes[row]) for row in range(len(sizes))
        ]
        return merged if threshold is None else [image.filter(threshold=threshold) for image in merged]

    def _merge(self, detections: Sequence[Detections], image_size: tuple[int, int]) -> Detections:
        boxes = np.concatenate([part.boxes for part in detections])
        scores = np.concatenate([part.scores for part in detections])
        labels = np.concatenate([part.labels for part in detections])
        soft_threshold = self.config.inference.score_threshold if self.form == "coco" else None
        parts = []
        for label in np.unique(labels).tolist():
            of_class = labels == label
            voted, best = vote(boxes[of_class], scores[of_class], soft_threshold=soft_threshold)
            parts.append((voted, best, np.full(len(best), label, dtype=np.int64)))
        if not parts:
            return Detections.empty(self.class_names, image_size)
        all_boxes, all_scores, all_labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(-all_scores, kind="stable")
        return Detections(
            boxes=all_boxes[order],
            scores=all_scores[order],
            labels=all_labels[order],
            class_names=self.class_names,
            image_size=image_size,
        )


def _counting(detections: Detections, run: Pass) -> Detections:
    """What a pass may contribute, on the image as it was before it was mirrored."""
    boxes = detections.boxes
    if run.flip:
        width = np.float32(detections.image_size[0])
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    keep = run.counts(boxes)
    return Detections(
        boxes=boxes[keep],
        scores=detections.scores[keep],
        labels=detections.labels[keep],
        class_names=detections.class_names,
        image_size=detections.image_size,
    )
