"""What goes wrong when a detector is wrong: each detection gets one of seven outcomes, each object is found or missed.

Pure functions of numpy arrays; no torch, no files, no drawing. The rules are those of the VOC devkit at IoU 0.5 (see
``metrics.voc_average_precision``): a detection looks at the object of its class that it overlaps most, a hit is an IoU
above 0.5, and of several hits of one object that of the best score is right. What is wrong is told apart in the spirit
of Hoiem et al., "Diagnosing Error in Object Detectors" (ECCV 2012), and Bolya et al., "TIDE" (ECCV 2020).

Which outcome a detection has depends on better scored ones only, so a score threshold takes detections away without
changing the outcomes of those that stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from refinedet.evaluation.metrics import (
    ScoredBoxes,
    TargetsWithAreas,
    VocMethod,
    average_precision_of_hits,
    check_lengths,
    concatenate,
    ignored_objects,
    mean_of_defined,
)

HIT_IOU = 0.5
"""An overlap above this is a hit."""
NEAR_IOU = 0.1
"""An overlap of at least this, and no hit, is a box in the wrong place rather than one on the background."""
SCORE_THRESHOLD = 0.4
"""Errors are counted among detections that score at least this, the default of ``refinedet predict``."""

SIZES = ("small", "medium", "large")
"""COCO's sizes of objects, by their area: below 32 x 32 pixels, below 96 x 96, and above."""
_SIZE_LIMITS = (0.0, 32.0**2, 96.0**2, np.inf)

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]


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
class ImageDiagnosis:
    """The outcomes of one image, in the order of its detections and objects."""

    outcomes: _Ints
    """(D,) values of ``Outcome``, for every detection whatever its score."""
    objects: _Ints
    """(D,) which object a detection hits or, if it is no hit, comes close to; -1 for ``BACKGROUND``."""
    kept: _Flags
    """(D,) whether it scores at least the threshold."""
    missed: _Flags
    """(G,) objects that count and that no kept detection is right about."""

    @property
    def wrong(self) -> _Flags:
        """(D,) kept detections that are errors."""
        return self.kept & np.isin(self.outcomes, ERRORS)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The errors of a detector; made by ``diagnose``."""

    score_threshold: float
    """Detections that score less are not counted in ``outcomes``, ``missed``, ``confusion`` and ``found_by_size``."""
    images: list[ImageDiagnosis]
    """One entry per image."""
    objects: _Ints
    """(C,) objects that count, that is neither difficult nor crowd."""
    missed: _Ints
    """(C,) those without a true positive."""
    outcomes: _Ints
    """(C, 7) kept detections by their label and ``Outcome``."""
    confusion: _Ints
    """(C + 1, C + 1). Row t, column p: objects of class t taken for class p; row t, column C: objects of class t that
    are missed; row C, column p: detections of class p without an object. Each object that counts stands once in its
    row: under its own class if it is found, else under that of the best scored ``CLASSIFICATION`` error on it. So rows
    sum to objects and columns to kept detections that are not ignored."""
    mean_ap: float
    """The mean of the classes' AP at IoU 0.5, from all detections; nan without objects."""
    repaired: dict[Outcome, float]
    """The same mean if all errors of one kind were repaired. Duplicates, ``BOTH`` and background errors are taken
    away. A wrong place or a wrong class is set right: the best scored of them becomes the true positive of its object;
    those whose object is found already, or does not count, are taken away."""
    repaired_missed: float
    """The same mean if objects without a true positive at any score did not count, which is as if they were found as
    well as the others are. A class of which nothing is found stays at 0."""
    objects_by_size: _Ints
    """(3,) objects that count, by ``SIZES``."""
    found_by_size: _Ints
    """(3,) those with a true positive among the kept detections."""
    ap_by_size: _Floats
    """(3,) mean AP at IoU 0.5 over the classes that have objects of that size, nan if none has. Objects of other sizes
    count as difficult ones do; a wrong detection counts if its own box has the size, as in COCO's evaluation."""

    @property
    def right(self) -> int:
        """Kept detections that are true positives, which is also the number of objects found."""
        return int(self.outcomes[:, Outcome.TRUE_POSITIVE].sum())

    @property
    def wrong(self) -> int:
        """Kept detections that are errors."""
        return int(self.outcomes[:, list(ERRORS)].sum())


def diagnose(
    detections: Sequence[ScoredBoxes],
    targets: Sequence[TargetsWithAreas],
    num_classes: int,
    *,
    score_threshold: float = SCORE_THRESHOLD,
    method: VocMethod = "11-point",
    crowd_swallows: bool = False,
) -> Diagnosis:
    """Tell right from wrong, and the kinds of wrong from each other.

    Args:
        detections: one entry per image: boxes (D, 4) xyxy pixels, scores (D,), labels (D,) in 0..C-1.
        targets: one entry per image, in the same order: boxes (G, 4), labels, difficult, crowd and areas, each (G,).
        num_classes: C.
        score_threshold: errors are counted among detections that score at least this. AP, and what repairs would make
            of it, comes from all detections.
        method: how AP is measured: "11-point" or "area".
        crowd_swallows: COCO's rule for crowd regions: a detection that is no true positive and lies with at least
            half of its area in a difficult or crowd object of its class is ignored, whatever the IoU.

    Raises:
        ValueError: the numbers of images differ.
    """
    check_lengths(detections, targets)
    images = [
        _diagnose_image(found, objects, score_threshold, crowd_swallows)
        for found, objects in zip(detections, targets, strict=True)
    ]
    every = _Joined(detections, targets, images, num_classes)
    mean_ap = mean_of_defined(every.average_precision(method))
    sizes = [every.within(low, high).average_precision(method) for low, high in itertools.pairwise(_SIZE_LIMITS)]
    size_of_object = np.digitize(every.object_areas, _SIZE_LIMITS[1:-1])
    counted = ~every.object_ignored
    return Diagnosis(
        score_threshold=score_threshold,
        images=images,
        objects=every.positives,
        missed=np.bincount(every.object_labels[every.object_missed], minlength=num_classes),
        outcomes=_table(every.labels[every.kept], every.outcomes[every.kept], (num_classes, len(Outcome))),
        confusion=_confusion(every, num_classes),
        mean_ap=mean_ap,
        repaired={kind: mean_of_defined(every.repaired(kind).average_precision(method)) for kind in ERRORS},
        repaired_missed=mean_of_defined(every.without_missed().average_precision(method)),
        objects_by_size=np.bincount(size_of_object[counted], minlength=len(SIZES)),
        found_by_size=np.bincount(size_of_object[counted & ~every.object_missed], minlength=len(SIZES)),
        ap_by_size=np.array([mean_of_defined(one) for one in sizes]),
    )


def _diagnose_image(
    found: ScoredBoxes, targets: TargetsWithAreas, score_threshold: float, crowd_swallows: bool
) -> ImageDiagnosis:
    labels = np.asarray(found.labels, dtype=np.int64)
    scores = np.asarray(found.scores)
    ignored = np.asarray(targets.difficult, dtype=bool) | np.asarray(targets.crowd, dtype=bool)
    kept = _reach(scores, score_threshold)
    outcomes = np.full(len(labels), int(Outcome.BACKGROUND), dtype=np.int64)
    objects = np.full(len(labels), -1, dtype=np.int64)
    if len(labels) == 0 or len(ignored) == 0:
        return ImageDiagnosis(outcomes, objects, kept, ~ignored)

    shared, areas, target_areas = _intersections(found.boxes, targets.boxes)
    union = areas[:, None] + target_areas[None, :] - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    same = labels[:, None] == np.asarray(targets.labels)[None, :]
    own, own_iou = _peak(np.where(same, iou, 0.0))
    other, other_iou = _peak(np.where(same, 0.0, iou))

    # From the weakest claim to the strongest, each overwriting the one before.
    for kind, claim, nearest in (
        (Outcome.BOTH, other_iou >= NEAR_IOU, other),
        (Outcome.CLASSIFICATION, other_iou > HIT_IOU, other),
        (Outcome.LOCALIZATION, own_iou >= NEAR_IOU, own),
        (Outcome.DUPLICATE, own_iou > HIT_IOU, own),
    ):
        outcomes[claim] = kind
        objects[claim] = nearest[claim]
    hit = outcomes == Outcome.DUPLICATE
    outcomes[hit & ignored[own]] = Outcome.IGNORED
    best_first = np.argsort(-scores, kind="stable")
    candidates = best_first[outcomes[best_first] == Outcome.DUPLICATE]
    outcomes[candidates[np.unique(own[candidates], return_index=True)[1]]] = Outcome.TRUE_POSITIVE
    if crowd_swallows:
        share = np.divide(shared, areas[:, None], out=np.zeros_like(shared), where=shared > 0)
        region, inside = _peak(np.where(same & ignored[None, :], share, 0.0))
        swallowed = (inside >= HIT_IOU) & (outcomes != Outcome.TRUE_POSITIVE)
        outcomes[swallowed] = Outcome.IGNORED
        objects[swallowed] = region[swallowed]
    missed = ~ignored
    missed[objects[kept & (outcomes == Outcome.TRUE_POSITIVE)]] = False
    return ImageDiagnosis(outcomes, objects, kept, missed)


def _reach(scores: npt.NDArray[Any], threshold: float) -> _Flags:
    # Compared in the scores' own precision, as Detections.filter does: 0.7 in float32 lies below 0.7.
    limit = scores.dtype.type(threshold) if np.issubdtype(scores.dtype, np.floating) else threshold
    result: _Flags = scores >= limit
    return result


def _intersections(boxes: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[_Floats, _Floats, _Floats]:
    """Shared areas (D, G), and the areas of the boxes (D,) and of the targets (G,)."""
    a = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    b = np.asarray(targets, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.where((sides > 0).all(axis=2), sides.prod(axis=2), 0.0)
    return shared, (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)


def _peak(values: _Floats) -> tuple[_Ints, _Floats]:
    """Index and value of each row's largest entry, the first of equals."""
    index = values.argmax(axis=1)
    return index, values[np.arange(len(values)), index]


class _Scored:
    """Detections of all images by label, score and whether they are right, and the objects there are to find."""

    def __init__(self, labels: _Ints, scores: _Floats, right: _Flags, positives: _Ints) -> None:
        self.labels, self.scores, self.right, self.positives = labels, scores, right, positives

    def average_precision(self, method: VocMethod) -> _Floats:
        """(C,) nan for a class without objects."""
        best_first = np.argsort(-self.scores, kind="stable")
        result = np.full(len(self.positives), np.nan)
        for label in np.flatnonzero(self.positives):
            chosen = best_first[self.labels[best_first] == label]
            result[label] = average_precision_of_hits(np.cumsum(self.right[chosen]), int(self.positives[label]), method)
        return result


class _Joined:
    """All images end to end; ``objects`` then are indices into the objects of all images."""

    def __init__(
        self,
        detections: Sequence[ScoredBoxes],
        targets: Sequence[TargetsWithAreas],
        images: Sequence[ImageDiagnosis],
        num_classes: int,
    ) -> None:
        self.labels: _Ints = concatenate([item.labels for item in detections], np.int64)
        self.scores: _Floats = concatenate([item.scores for item in detections], np.float64)
        boxes: _Floats = concatenate([np.reshape(item.boxes, (-1, 4)) for item in detections], np.float64)
        sides = boxes.reshape(-1, 4)[:, 2:] - boxes.reshape(-1, 4)[:, :2]
        self.areas: _Floats = sides.prod(axis=1)
        self.outcomes: _Ints = concatenate([image.outcomes for image in images], np.int64)
        self.kept: _Flags = concatenate([image.kept for image in images], np.bool_)
        start = np.cumsum([0, *(len(item.labels) for item in targets)])
        self.objects: _Ints = concatenate(
            [
                np.where(image.objects < 0, -1, image.objects + first)
                for image, first in zip(images, start, strict=False)
            ],
            np.int64,
        )
        self.object_labels: _Ints = concatenate([item.labels for item in targets], np.int64)
        self.object_areas: _Floats = concatenate([item.areas for item in targets], np.float64)
        self.object_missed: _Flags = concatenate([image.missed for image in images], np.bool_)
        self.object_ignored: _Flags = ignored_objects(targets)
        self.num_classes = num_classes
        self.right: _Flags = self.outcomes == Outcome.TRUE_POSITIVE
        self.counts: _Flags = self.outcomes != Outcome.IGNORED
        self.positives: _Ints = self._count(~self.object_ignored)
        self.hit_at_any_score: _Flags = np.zeros(len(self.object_labels), dtype=bool)
        self.hit_at_any_score[self.objects[self.right]] = True

    def _count(self, chosen: _Flags) -> _Ints:
        return np.bincount(self.object_labels[chosen], minlength=self.num_classes)

    def average_precision(self, method: VocMethod) -> _Floats:
        """(C,) as things are."""
        counts = self.counts
        return _Scored(self.labels[counts], self.scores[counts], self.right[counts], self.positives).average_precision(
            method
        )

    def within(self, low: float, high: float) -> _Scored:
        """Only objects of that area, and detections that hit them or have that area themselves."""
        of_size = ~self.object_ignored & (self.object_areas >= low) & (self.object_areas < high)
        own_size = (self.areas >= low) & (self.areas < high)
        counts = self.counts & np.where(self.right, of_size[self.objects] if len(of_size) else False, own_size)
        # A second hit of an object of another size is ignored with the object, whatever its own size.
        second = self.outcomes == Outcome.DUPLICATE
        counts[second] &= of_size[self.objects[second]]
        return _Scored(self.labels[counts], self.scores[counts], self.right[counts], self._count(of_size))

    def repaired(self, kind: Outcome) -> _Scored:
        """Without the errors of one kind."""
        labels, right, counts = self.labels.copy(), self.right.copy(), self.counts.copy()
        mine = np.flatnonzero(self.outcomes == kind)
        counts[mine] = False
        if kind in (Outcome.LOCALIZATION, Outcome.CLASSIFICATION):
            free = ~self.hit_at_any_score & ~self.object_ignored
            able = mine[free[self.objects[mine]]]
            able = able[np.argsort(-self.scores[able], kind="stable")]
            chosen = able[np.unique(self.objects[able], return_index=True)[1]]
            labels[chosen] = self.object_labels[self.objects[chosen]]
            right[chosen] = counts[chosen] = True
        return _Scored(labels[counts], self.scores[counts], right[counts], self.positives)

    def without_missed(self) -> _Scored:
        """Without the objects that have no true positive, except in classes that have no other."""
        found, counts = self._count(self.hit_at_any_score), self.counts
        positives = np.where(found > 0, found, self.positives)
        return _Scored(self.labels[counts], self.scores[counts], self.right[counts], positives)


def _confusion(every: _Joined, num_classes: int) -> _Ints:
    taken_for = np.where(every.object_missed, num_classes, every.object_labels)
    without_object = every.kept & every.counts & ~every.right
    mistaken = np.flatnonzero(every.kept & (every.outcomes == Outcome.CLASSIFICATION))
    mistaken = mistaken[every.object_missed[every.objects[mistaken]]]
    mistaken = mistaken[np.argsort(-every.scores[mistaken], kind="stable")]
    # Objects are counted once: the best scored of the detections that mistake one stands for all.
    mistaken = mistaken[np.unique(every.objects[mistaken], return_index=True)[1]]
    taken_for[every.objects[mistaken]] = every.labels[mistaken]
    without_object[mistaken] = False
    counted = ~every.object_ignored
    rows = np.concatenate([every.object_labels[counted], np.full(int(without_object.sum()), num_classes)])
    columns = np.concatenate([taken_for[counted], every.labels[without_object]])
    return _table(rows, columns, (num_classes + 1, num_classes + 1))


def _table(rows: _Ints, columns: _Ints, shape: tuple[int, int]) -> _Ints:
    """How often each pair occurs."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)
