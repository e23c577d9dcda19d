"""What goes wrong when a detector is wrong: kinds of error, confusion, and what repairs would bring.

Pure functions of ``outcomes.Outcomes``, the detections as they are matched with the objects; no torch, no files, no
drawing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from refinedet.evaluation.metrics import VocMethod, average_precision_of_hits, mean_of_defined
from refinedet.evaluation.outcomes import ERRORS, Flags, Floats, Integers, Outcome, Outcomes

SCORE_THRESHOLD = 0.4
"""Errors are counted among detections that score at least this, the default of ``refinedet predict``."""

SIZES = ("small", "medium", "large")
"""COCO's sizes of objects, by their area: below 32 x 32 pixels, below 96 x 96, and above."""
_SIZE_LIMITS = (0.0, 32.0**2, 96.0**2, np.inf)


@dataclass(frozen=True, eq=False)
class ImageDiagnosis:
    """The outcomes of one image, in the order of its detections and objects."""

    outcomes: Integers
    """(D,) values of ``Outcome``, for every detection whatever its score."""
    objects: Integers
    """(D,) which object a detection hits or, if it is no hit, comes close to; -1 for ``BACKGROUND``."""
    kept: Flags
    """(D,) whether it scores at least the threshold."""
    missed: Flags
    """(G,) objects that count and that no kept detection is right about."""

    @property
    def wrong(self) -> Flags:
        """(D,) kept detections that are errors."""
        return self.kept & np.isin(self.outcomes, ERRORS)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The errors of a detector; made by ``diagnose``."""

    score_threshold: float
    """Detections that score less are not counted in ``outcomes``, ``missed``, ``confusion`` and ``found_by_size``."""
    images: list[ImageDiagnosis]
    """One entry per image."""
    objects: Integers
    """(C,) objects that count, that is neither difficult nor crowd."""
    missed: Integers
    """(C,) those without a true positive."""
    outcomes: Integers
    """(C, 7) kept detections by their label and ``Outcome``."""
    confusion: Integers
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
    objects_by_size: Integers
    """(3,) objects that count, by ``SIZES``."""
    found_by_size: Integers
    """(3,) those with a true positive among the kept detections."""
    ap_by_size: Floats
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
    outcomes: Outcomes,
    *,
    score_threshold: float = SCORE_THRESHOLD,
    method: VocMethod = "11-point",
) -> Diagnosis:
    """Tell right from wrong, and the kinds of wrong from each other.

    Args:
        outcomes: what ``outcomes.match_objects`` returned.
        score_threshold: errors are counted among detections that score at least this. AP, and what repairs would make
            of it, comes from all detections.
        method: how AP is measured: "11-point" or "area".
    """
    kept = outcomes.reach(score_threshold)
    missed = ~outcomes.object_ignored & ~outcomes.found_objects(kept)
    size_of_object = np.digitize(outcomes.object_areas, _SIZE_LIMITS[1:-1])
    counted = ~outcomes.object_ignored
    every = _Ranking.of(outcomes)
    sizes = [_within(outcomes, low, high) for low, high in itertools.pairwise(_SIZE_LIMITS)]
    return Diagnosis(
        score_threshold=score_threshold,
        images=_image_diagnoses(outcomes, kept, missed),
        objects=outcomes.positives,
        missed=outcomes.count_objects(missed),
        outcomes=_table(outcomes.labels[kept], outcomes.outcomes[kept], (outcomes.num_classes, len(Outcome))),
        confusion=_confusion(outcomes, kept, missed),
        mean_ap=every.mean_average_precision(method),
        repaired={kind: _repaired(outcomes, kind).mean_average_precision(method) for kind in ERRORS},
        repaired_missed=_without_missed(outcomes).mean_average_precision(method),
        objects_by_size=np.bincount(size_of_object[counted], minlength=len(SIZES)),
        found_by_size=np.bincount(size_of_object[counted & ~missed], minlength=len(SIZES)),
        ap_by_size=np.array([ranking.mean_average_precision(method) for ranking in sizes]),
    )


def best_f1(outcomes: Outcomes) -> tuple[Floats, Floats]:
    """The score threshold of each class at which precision and recall are best balanced.

    Returns:
        (C,) thresholds and (C,) the F1 there, the harmonic mean of precision and recall; of equal ones the highest
        threshold. Both are nan for a class without objects; the threshold is nan where nothing is right.
    """
    thresholds, best = np.full(outcomes.num_classes, np.nan), np.full(outcomes.num_classes, np.nan)
    best_first = np.argsort(-outcomes.scores, kind="stable")
    best_first = best_first[outcomes.counts[best_first]]
    for label in np.flatnonzero(outcomes.positives):
        ranked = best_first[outcomes.labels[best_first] == label]
        hits = np.cumsum(outcomes.right[ranked])
        f1 = 2.0 * hits / (np.arange(1, len(hits) + 1) + outcomes.positives[label])
        # A threshold takes all detections of equal score or none of them.
        scores = outcomes.scores[ranked]
        f1[:-1][scores[:-1] == scores[1:]] = 0.0
        best[label] = f1.max(initial=0.0)
        if best[label] > 0:
            thresholds[label] = scores[f1.argmax()]
    return thresholds, best


def _image_diagnoses(outcomes: Outcomes, kept: Flags, missed: Flags) -> list[ImageDiagnosis]:
    images = []
    for image in range(outcomes.num_images):
        own = slice(*outcomes.detection_bounds[image : image + 2].tolist())
        first, last = outcomes.object_bounds[image : image + 2].tolist()
        objects = outcomes.objects[own]
        objects = np.where(objects < 0, -1, objects - first)
        images.append(ImageDiagnosis(outcomes.outcomes[own], objects, kept[own], missed[first:last]))
    return images


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Detections of all images by label, score and whether they are right, and the objects there are to find."""

    labels: Integers
    scores: Floats
    right: Flags
    positives: Integers

    @classmethod
    def of(cls, outcomes: Outcomes) -> _Ranking:
        """The detections that count, as they are."""
        counts = outcomes.counts
        return cls(outcomes.labels[counts], outcomes.scores[counts], outcomes.right[counts], outcomes.positives)

    def mean_average_precision(self, method: VocMethod) -> float:
        """The mean over the classes that have objects; nan if none has."""
        best_first = np.argsort(-self.scores, kind="stable")
        result = np.full(len(self.positives), np.nan)
        for label in np.flatnonzero(self.positives):
            hits = np.cumsum(self.right[best_first[self.labels[best_first] == label]])
            result[label] = average_precision_of_hits(hits, int(self.positives[label]), method)
        return mean_of_defined(result)


def _within(outcomes: Outcomes, low: float, high: float) -> _Ranking:
    """Only objects of that area, and detections that hit them or have that area themselves."""
    of_size = ~outcomes.object_ignored & (outcomes.object_areas >= low) & (outcomes.object_areas < high)
    own_size = (outcomes.areas >= low) & (outcomes.areas < high)
    right = outcomes.right
    counts = outcomes.counts & np.where(right, of_size[outcomes.objects] if len(of_size) else False, own_size)
    # A second hit of an object of another size is ignored with the object, whatever its own size.
    second = outcomes.outcomes == Outcome.DUPLICATE
    counts[second] &= of_size[outcomes.objects[second]]
    positives = outcomes.count_objects(of_size)
    return _Ranking(outcomes.labels[counts], outcomes.scores[counts], right[counts], positives)


def _repaired(outcomes: Outcomes, kind: Outcome) -> _Ranking:
    """Without the errors of one kind."""
    labels, right, counts = outcomes.labels.copy(), outcomes.right, outcomes.counts
    errors = np.flatnonzero(outcomes.outcomes == kind)
    counts[errors] = False
    if kind in (Outcome.LOCALIZATION, Outcome.CLASSIFICATION):
        free = ~outcomes.found_objects(right) & ~outcomes.object_ignored
        able = errors[free[outcomes.objects[errors]]]
        able = able[np.argsort(-outcomes.scores[able], kind="stable")]
        chosen = able[np.unique(outcomes.objects[able], return_index=True)[1]]
        labels[chosen] = outcomes.object_labels[outcomes.objects[chosen]]
        right[chosen] = counts[chosen] = True
    return _Ranking(labels[counts], outcomes.scores[counts], right[counts], outcomes.positives)


def _without_missed(outcomes: Outcomes) -> _Ranking:
    """Without the objects that have no true positive, except in classes that have no other."""
    found = outcomes.count_objects(outcomes.found_objects(outcomes.right))
    positives = np.where(found > 0, found, outcomes.positives)
    counts = outcomes.counts
    return _Ranking(outcomes.labels[counts], outcomes.scores[counts], outcomes.right[counts], positives)


def _confusion(outcomes: Outcomes, kept: Flags, missed: Flags) -> Integers:
    last = outcomes.num_classes
    taken_for = np.where(missed, last, outcomes.object_labels)
    without_object = kept & outcomes.counts & ~outcomes.right
    mistaken = np.flatnonzero(kept & (outcomes.outcomes == Outcome.CLASSIFICATION))
    mistaken = mistaken[missed[outcomes.objects[mistaken]]]
    mistaken = mistaken[np.argsort(-outcomes.scores[mistaken], kind="stable")]
    # Objects are counted once: the best scored of the detections that mistake one stands for all.
    mistaken = mistaken[np.unique(outcomes.objects[mistaken], return_index=True)[1]]
    taken_for[outcomes.objects[mistaken]] = outcomes.labels[mistaken]
    without_object[mistaken] = False
    counted = ~outcomes.object_ignored
    rows = np.concatenate([outcomes.object_labels[counted], np.full(int(without_object.sum()), last)])
    columns = np.concatenate([taken_for[counted], outcomes.labels[without_object]])
    return _table(rows, columns, (last + 1, last + 1))


def _table(rows: Integers, columns: Integers, shape: tuple[int, int]) -> Integers:
    """How often each pair occurs."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)
