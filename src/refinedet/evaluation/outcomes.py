"""Detections matched with objects, once: what each detection turns out to be, and which object it is about.

Average precision (``metrics``), the kinds of error, the confusion matrix and the effect of repairs (``diagnosis``) all
follow from this matching. The rules are those of the VOC devkit: a detection looks at the object of its class that it
overlaps most, a hit is an IoU above the threshold, and of several hits of one object the best scored one is right.
What is wrong is told apart in the spirit of Hoiem et al., "Diagnosing Error in Object Detectors" (ECCV 2012), and Bolya
et al., "TIDE" (ECCV 2020).

Which outcome a detection has depends on better scored ones only, so a score threshold takes detections away without
changing the outcomes of those that stay. Pure functions of numpy arrays; no torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

HIT_IOU = 0.5
"""An overlap above this is a hit."""
NEAR_IOU = 0.1
"""An overlap of at least this, and no hit, is a box in the wrong place rather than one on the background."""
_PAIRS_AT_ONCE = 1_000_000
"""Pairs of a detection and an object that are compared in one go; bounds the memory, not the result."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_Array = npt.NDArray[Any]


class ScoredBoxes(Protocol):
    """The detections of one image: D boxes (xyxy pixels) with scores and labels 0..C-1."""

    @property
    def boxes(self) -> _Array:
        """(D, 4) xyxy."""

    @property
    def scores(self) -> _Array:
        """(D,)."""

    @property
    def labels(self) -> _Array:
        """(D,) integers in 0..C-1."""


class Targets(Protocol):
    """The objects of one image: G boxes (xyxy pixels) with labels, flags and areas."""

    @property
    def boxes(self) -> _Array:
        """(G, 4) xyxy."""

    @property
    def labels(self) -> _Array:
        """(G,) integers in 0..C-1."""

    @property
    def difficult(self) -> _Array:
        """(G,) bool: PASCAL's flag."""

    @property
    def crowd(self) -> _Array:
        """(G,) bool: COCO's iscrowd."""

    @property
    def areas(self) -> _Array:
        """(G,) square pixels (in COCO's own files the area of the mask, not of the box)."""


class Outcome(IntEnum):
    """What a detection turns out to be; the first that applies, in this order."""

    TRUE_POSITIVE = 0
    """Hits an object of its class that no better scored detection has hit."""
    IGNORED = 1
    """Hits a difficult or crowd object of its class: neither right nor wrong."""
    DUPLICATE = 2
    """Hits an object of its class that a better scored detection has hit already."""
    LOCALIZATION = 3
    """Right class, wrong place: no hit, but an IoU of at least 0.1 with an object of its class."""
    CLASSIFICATION = 4
    """Right place, wrong class: an IoU above 0.5 with an object of another class."""
    BOTH = 5
    """Wrong class and wrong place: an IoU of at least 0.1 with an object of another class."""
    BACKGROUND = 6
    """An IoU below 0.1 with every object."""


ERRORS = (Outcome.LOCALIZATION, Outcome.CLASSIFICATION, Outcome.BOTH, Outcome.DUPLICATE, Outcome.BACKGROUND)
"""The outcomes that are false positives."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Detections and objects of all images end to end, matched; made by ``match_objects``.

    N images, D detections and G objects of all images together, C classes.
    """

    num_classes: int
    """C."""
    labels: Integers
    """(D,) class of each detection."""
    scores: Floats
    """(D,) score of each detection."""
    areas: Floats
    """(D,) area of each detection's box in square pixels."""
    outcomes: Integers
    """(D,) values of ``Outcome``."""
    objects: Integers
    """(D,) the object that a detection hits or, if it is no hit, comes close to; -1 for ``BACKGROUND``."""
    detection_bounds: Integers
    """(N + 1,) the detections of image n are those from bound n to bound n + 1."""
    object_labels: Integers
    """(G,) class of each object."""
    object_areas: Floats
    """(G,) area of each object in square pixels."""
    object_ignored: Flags
    """(G,) whether it is difficult or a crowd, so that it does not count."""
    object_bounds: Integers
    """(N + 1,) as ``detection_bounds``, for objects."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.detection_bounds) - 1

    @property
    def right(self) -> Flags:
        """(D,) true positives."""
        result: Flags = self.outcomes == Outcome.TRUE_POSITIVE
        return result

    @property
    def counts(self) -> Flags:
        """(D,) detections that are right or wrong; the others are on objects that do not count."""
        result: Flags = self.outcomes != Outcome.IGNORED
        return result

    @property
    def positives(self) -> Integers:
        """(C,) objects that count."""
        return self.count_objects(~self.object_ignored)

    def count_objects(self, chosen: Flags) -> Integers:
        """(G,) bool to (C,): how many of the chosen objects each class has."""
        return np.bincount(self.object_labels[chosen], minlength=self.num_classes)

    def found_objects(self, chosen: Flags) -> Flags:
        """(D,) bool to (G,) bool: the objects of which one of the chosen detections is the true positive."""
        result = np.zeros(len(self.object_labels), dtype=bool)
        result[self.objects[chosen & self.right]] = True
        return result

    def reach(self, threshold: float) -> Flags:
        """(D,) detections that score at least ``threshold``."""
        # Compared as float32, the type of the scores of Detections and of their filter: 0.7 as float32 lies below 0.7.
        result: Flags = self.scores.astype(np.float32) >= np.float32(threshold)
        return result


def match_objects(
    detections: Sequence[ScoredBoxes],
    targets: Sequence[Targets],
    num_classes: int,
    *,
    iou_threshold: float = HIT_IOU,
    crowd_swallows: bool = False,
) -> Outcomes:
    """Match the detections of all images with their objects.

    Args:
        detections: one entry per image: boxes (D, 4) xyxy pixels, scores (D,), labels (D,) in 0..C-1.
        targets: one entry per image, in the same order: boxes (G, 4), labels, difficult, crowd and areas, each (G,).
        num_classes: C.
        iou_threshold: an overlap must be strictly above it to be a hit, as in the widespread Python evaluators (the
            Matlab devkit accepts equality).
        crowd_swallows: COCO's rule for crowd regions: a detection that is no true positive and lies with at least
            half of its area in a difficult or crowd object of its class is ignored, whatever the IoU.

    Raises:
        ValueError: the numbers of images differ, a label is out of range, or a score is nan.
    """
    check_lengths(detections, targets)
    boxes, labels, bounds = join_boxes(detections, num_classes, "detections")
    scores = join_scores(detections, len(boxes))
    object_boxes, object_labels, object_bounds = join_boxes(targets, num_classes, "targets")
    ignored = ignored_objects(targets)

    outcomes = np.full(len(labels), int(Outcome.BACKGROUND), dtype=np.int64)
    objects = np.full(len(labels), -1, dtype=np.int64)
    region = np.full(len(labels), -1, dtype=np.int64)
    for first, last in _image_groups(bounds, object_bounds):
        part = slice(int(bounds[first]), int(bounds[last]))
        pairs = _Pairs(boxes[part], np.diff(bounds[first : last + 1]), object_boxes, object_bounds[first : last + 1])
        same = labels[part][pairs.row] == object_labels[pairs.column]
        own, own_iou = pairs.peaks(np.where(same, pairs.iou, 0.0))
        other, other_iou = pairs.peaks(np.where(same, 0.0, pairs.iou))
        # From the weakest claim to the strongest, each overwriting the one before.
        for kind, claim, nearest in (
            (Outcome.BOTH, other_iou >= NEAR_IOU, other),
            (Outcome.CLASSIFICATION, other_iou > iou_threshold, other),
            (Outcome.LOCALIZATION, own_iou >= NEAR_IOU, own),
            (Outcome.DUPLICATE, own_iou > iou_threshold, own),
        ):
            outcomes[part][claim] = kind
            objects[part][claim] = nearest[claim]
        if crowd_swallows:
            inside, share = pairs.peaks(np.where(same & ignored[pairs.column], pairs.share_inside, 0.0))
            region[part] = np.where(share >= 0.5, inside, -1)
    hits = np.flatnonzero(outcomes == Outcome.DUPLICATE)
    outcomes[hits[ignored[objects[hits]]]] = Outcome.IGNORED
    # A stable sort: of equal scores the earlier image, then the earlier detection, is the better one.
    best_first = np.argsort(-scores, kind="stable")
    candidates = best_first[outcomes[best_first] == Outcome.DUPLICATE]
    outcomes[candidates[np.unique(objects[candidates], return_index=True)[1]]] = Outcome.TRUE_POSITIVE
    swallowed = (region >= 0) & (outcomes != Outcome.TRUE_POSITIVE)
    outcomes[swallowed] = Outcome.IGNORED
    objects[swallowed] = region[swallowed]
    return Outcomes(
        num_classes=num_classes,
        labels=labels,
        scores=scores,
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        outcomes=outcomes,
        objects=objects,
        detection_bounds=bounds,
        object_labels=object_labels,
        object_areas=concatenate([item.areas for item in targets], np.float64),
        object_ignored=ignored,
        object_bounds=object_bounds,
    )


def _image_groups(bounds: Integers, object_bounds: Integers) -> Iterator[tuple[int, int]]:
    """(first, last + 1) image of groups that have ``_PAIRS_AT_ONCE`` pairs to compare, or one image."""
    pairs = np.diff(bounds) * np.diff(object_bounds)
    total = np.concatenate([[0], np.cumsum(pairs)])
    first = 0
    while first < len(pairs):
        last = int(np.searchsorted(total, total[first] + _PAIRS_AT_ONCE, side="right")) - 1
        last = max(first + 1, last)
        yield first, last
        first = last


class _Pairs:
    """Every detection of some images beside every object of its image; P pairs, the objects of a detection in a row."""

    def __init__(self, boxes: Floats, detections_of_image: Integers, object_boxes: Floats, bounds: Integers) -> None:
        self.count = np.repeat(np.diff(bounds), detections_of_image)
        self.end = np.cumsum(self.count)
        self.row = np.repeat(np.arange(len(boxes)), self.count)
        """(P,) index of the detection."""
        first_object = np.repeat(bounds[:-1], detections_of_image)
        self.column = np.arange(len(self.row)) + np.repeat(first_object - (self.end - self.count), self.count)
        """(P,) index of the object."""
        a, b = boxes[self.row], object_boxes[self.column]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        shared = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0.0)
        areas = (a[:, 2:] - a[:, :2]).prod(axis=1)
        union = areas + (b[:, 2:] - b[:, :2]).prod(axis=1) - shared
        self.iou = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
        """(P,) intersection over union."""
        self.share_inside = np.divide(shared, areas, out=np.zeros_like(shared), where=shared > 0)
        """(P,) share of the detection's area that lies in the object."""

    def peaks(self, values: Floats) -> tuple[Integers, Floats]:
        """(P,) values to the object of each detection with the largest value, the first of equals, and that value.

        A detection in an image without objects has the value 0 and an object that means nothing.
        """
        largest = np.zeros(len(self.count))
        nearest = np.zeros(len(self.count), dtype=np.int64)
        some = self.count > 0
        if some.any():
            largest[some] = np.maximum.reduceat(values, (self.end - self.count)[some])
            at_peak = np.flatnonzero(values == largest[self.row])
            rows = self.row[at_peak]
            # The first of equal peaks, as the devkit's loop keeps it.
            first = np.concatenate([[True], rows[1:] != rows[:-1]])
            nearest[rows[first]] = self.column[at_peak[first]]
        return nearest, largest


# All images end to end.


def join_boxes(
    items: Sequence[ScoredBoxes] | Sequence[Targets], num_classes: int, what: str
) -> tuple[Floats, Integers, Integers]:
    """Boxes (D, 4) and labels (D,) of all images end to end, and the (N + 1,) bounds of the images.

    Raises:
        ValueError: lengths differ or a label is out of range; ``what`` is named.
    """
    boxes: Floats = concatenate([np.reshape(item.boxes, (-1, 4)) for item in items], np.float64).reshape(-1, 4)
    labels: Integers = concatenate([item.labels for item in items], np.int64)
    bounds = np.cumsum([0, *(len(item.labels) for item in items)]).astype(np.int64)
    if len(boxes) != len(labels):
        raise ValueError(f"{what}: {len(boxes)} boxes but {len(labels)} labels")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"{what}: label {wrong} is not in 0..{num_classes - 1}")
    return boxes, labels, bounds


def join_scores(detections: Sequence[ScoredBoxes], count: int) -> Floats:
    """The (D,) scores of all images end to end.

    Raises:
        ValueError: there are not ``count`` of them, or one is nan.
    """
    scores: Floats = concatenate([item.scores for item in detections], np.float64)
    if len(scores) != count:
        raise ValueError(f"detections: {count} boxes but {len(scores)} scores")
    if np.isnan(scores).any():
        raise ValueError("detections: a score is nan")
    return scores


def ignored_objects(targets: Sequence[Targets]) -> Flags:
    """Of all images end to end, the objects that are difficult or a crowd."""
    difficult = concatenate([item.difficult for item in targets], np.bool_)
    crowd = concatenate([item.crowd for item in targets], np.bool_)
    result: Flags = difficult | crowd
    return result


def concatenate(arrays: Sequence[_Array], dtype: type[np.generic]) -> _Array:
    """The arrays of all images end to end; empty where there are no images."""
    if not arrays:
        return np.zeros(0, dtype=dtype)
    return np.concatenate([np.asarray(array, dtype=dtype) for array in arrays])


def check_lengths(detections: Sequence[ScoredBoxes], targets: Sequence[Targets]) -> None:
    """Raise ValueError if the numbers of images differ."""
    if len(detections) != len(targets):
        raise ValueError(f"detections of {len(detections)} images but targets of {len(targets)}")
