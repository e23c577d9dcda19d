"""Average precision of detections against targets: PASCAL VOC's two figures and COCO's twelve.

Pure functions of numpy arrays; no torch, no files. Detections and targets come as one object per image, in the same
order; anything with the right attributes will do (``Detections`` and ``Record`` of this package have them).

A box over a whole image is ``0, 0, width, height`` here, so a width is ``x2 - x1``. That is the PASCAL devkit's count
of inclusive pixels, with its +1 already inside the coordinates (see docs/conventions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from refinedet.evaluation.outcomes import (
    Floats,
    Integers,
    Outcomes,
    ScoredBoxes,
    Targets,
    check_lengths,
    concatenate,
    ignored_objects,
    join_boxes,
    join_scores,
)

VocMethod = Literal["11-point", "area"]

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers in pycocotools' order."""

CURVE_RECALLS: npt.NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
"""The recalls at which curves are sampled; COCO's choice."""

_ELEVEN_RECALLS = np.arange(11, dtype=np.float64) * 0.1
"""Deliberately 0.30000000000000004 and its like, not exact tenths: the evaluators that published figures come from
compare recall with these floats, so that 3 objects of 10 do not reach the fourth. With exact tenths a class of VOC 2007
test moves by up to 0.002, and a class of ten objects by much more."""


@dataclass(frozen=True)
class VocResult:
    """What ``voc_result`` found, class by class."""

    average_precision: npt.NDArray[np.float64]
    """(C,) in 0..1; nan for a class without an object that counts."""
    positives: npt.NDArray[np.int64]
    """(C,) objects that count, that is neither difficult nor crowd."""
    precision: tuple[npt.NDArray[np.float64], ...]
    """For each class: precision after each detection that counts, best score first; empty without positives."""
    recall: tuple[npt.NDArray[np.float64], ...]
    """For each class: recall after the same detections."""
    scores: tuple[npt.NDArray[np.float64], ...]
    """For each class: the score of the same detections."""

    @property
    def mean(self) -> float:
        """The mean over the classes that have objects; nan if none has."""
        return mean_of_defined(self.average_precision)

    def curve(self, label: int) -> npt.NDArray[np.float64]:
        """(101,) interpolated precision of a class at ``CURVE_RECALLS``: the best at this recall or beyond."""
        return interpolate_precision(self.precision[label], self.recall[label])


@dataclass(frozen=True)
class CocoResult:
    """What ``coco_average_precision`` found."""

    numbers: dict[str, float]
    """``COCO_NAMES`` to values in 0..1; -1 where no object of that size exists, as pycocotools has it."""
    average_precision: npt.NDArray[np.float64]
    """(C,) AP averaged over IoU 0.50:0.95; nan for a class without an object that counts."""
    positives: npt.NDArray[np.int64]
    """(C,) objects that count, that is neither difficult nor crowd."""
    curves: npt.NDArray[np.float64]
    """(C, 101) interpolated precision at IoU 0.5 and ``CURVE_RECALLS``; 0 for a class without objects."""

    @property
    def average_precision_50(self) -> npt.NDArray[np.float64]:
        """(C,) AP at IoU 0.5; nan for a class without an object that counts."""
        return np.where(self.positives > 0, self.curves.mean(axis=1), np.nan)


def voc_result(outcomes: Outcomes, method: VocMethod) -> VocResult:
    """Average precision by the rules of the PASCAL VOC devkit.

    The detections of a class are taken from the best score down (a stable sort, so ties keep the order of the images
    and of each image's detections). Each looks for the object of its class and image that it overlaps most, taken or
    not, difficult or not. An overlap above the threshold hits: a difficult or crowd object makes the detection not
    count at all, an object not hit before makes it a true positive, one hit before a false positive. All others are
    false positives.

    Args:
        outcomes: what ``outcomes.match_objects`` returned.
        method: "11-point" (VOC 2007: the mean of interpolated precision at recall 0, 0.1, ... 1) or "area" (VOC 2010
            and later: the area under interpolated precision). The eleven recalls are the floats ``k * 0.1``, as in
            the evaluators that published figures come from.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in ("11-point", "area"):
        raise ValueError(f"method must be '11-point' or 'area', not {method!r}")
    positives, right = outcomes.positives, outcomes.right
    best_first = np.argsort(-outcomes.scores, kind="stable")
    # Difficult objects neither count nor punish: their detections leave the list before anything is summed.
    best_first = best_first[outcomes.counts[best_first]]
    average_precision = np.full(outcomes.num_classes, np.nan)
    precision: list[Floats] = []
    recall: list[Floats] = []
    scores: list[Floats] = []
    for label in range(outcomes.num_classes):
        chosen = best_first[outcomes.labels[best_first] == label] if positives[label] else best_first[:0]
        hits = np.cumsum(right[chosen])
        precision.append(hits / np.arange(1, len(hits) + 1))
        recall.append(hits / max(1, positives[label]))
        scores.append(outcomes.scores[chosen])
        if positives[label]:
            average_precision[label] = average_precision_of_hits(hits, int(positives[label]), method)
    return VocResult(average_precision, positives, tuple(precision), tuple(recall), tuple(scores))


def average_precision_of_hits(hits: npt.NDArray[np.int64], positives: int, method: VocMethod) -> float:
    """Average precision of one class from its detections, best score first.

    Args:
        hits: (D,) true positives among the first 1, 2, ... D detections that count.
        positives: objects that count, at least 1.
        method: "11-point" or "area", as for ``voc_result``.

    Returns:
        0..1.
    """
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if method == "11-point":
        return float(envelope[np.searchsorted(hits / positives, _ELEVEN_RECALLS)].mean())
    steps = np.diff(hits, prepend=0)
    return float((steps * envelope[:-1]).sum() / positives)


def weighted_average_precision(outcomes: Outcomes, weights: Floats, positives: Floats, method: VocMethod) -> Floats:
    """VOC's average precision where every detection and object counts a number of times, for bootstrap samples.

    Args:
        outcomes: what ``outcomes.match_objects`` returned.
        weights: (D,) how often each detection counts.
        positives: (C,) objects of each class, counted as often.
        method: "11-point" or "area".

    Returns:
        (C,) nan for a class without objects.
    """
    best_first = np.argsort(-outcomes.scores, kind="stable")
    best_first = best_first[outcomes.counts[best_first] & (weights[best_first] > 0)]
    labels, right = outcomes.labels[best_first], outcomes.right[best_first]
    result = np.full(outcomes.num_classes, np.nan)
    for label in np.flatnonzero(positives > 0):
        own = labels == label
        weight = weights[best_first[own]]
        gains = weight * right[own]
        hits = np.cumsum(gains)
        precision = hits / np.cumsum(weight)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        if method == "11-point":
            result[label] = envelope[np.searchsorted(hits / positives[label], _ELEVEN_RECALLS)].mean()
        else:
            result[label] = (gains * envelope[:-1]).sum() / positives[label]
    return result


def interpolate_precision(precision: npt.NDArray[np.float64], recall: npt.NDArray[np.float64]) -> Floats:
    """Precision at ``CURVE_RECALLS``: the best at this recall or beyond, 0 where it is never reached.

    Args:
        precision: (D,) after each detection.
        recall: (D,) after each detection, never falling.

    Returns:
        (101,) never rising.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    result: Floats = envelope[np.searchsorted(recall, CURVE_RECALLS)]
    return result


def coco_average_precision(
    detections: Sequence[ScoredBoxes],
    targets: Sequence[Targets],
    num_classes: int,
    *,
    image_ids: Sequence[int] | None = None,
) -> CocoResult:
    """COCO's twelve numbers for boxes, equal to those of pycocotools, computed by faster-coco-eval.

    Crowd regions swallow detections without counting, as COCO has it. Difficult objects (data in VOC layout) are
    treated the same way, since COCO has no such flag.

    Args:
        detections: one entry per image: boxes (D, 4), scores (D,), labels (D,).
        targets: one entry per image, in the same order: boxes, labels, difficult, crowd and areas.
        num_classes: C; labels are 0..C-1.
        image_ids: distinct integers; pycocotools goes through images in their order, which decides between tied
            scores. Default: the order given.

    Returns:
        The numbers, and average precision and a curve per class. Without detections the numbers are 0.

    Raises:
        ValueError: lengths differ, a label is out of range, a score is nan, or ids repeat.
    """
    check_lengths(detections, targets)
    ids = list(range(1, len(targets) + 1)) if image_ids is None else [int(i) for i in image_ids]
    if len(ids) != len(targets) or len(set(ids)) != len(ids):
        raise ValueError(f"image_ids must be {len(targets)} distinct integers")
    boxes, labels, bounds = join_boxes(detections, num_classes, "detections")
    scores = join_scores(detections, len(boxes))
    target_boxes, target_labels, target_bounds = join_boxes(targets, num_classes, "targets")
    areas = concatenate([item.areas for item in targets], np.float64)
    ignored = ignored_objects(targets)
    positives = np.bincount(target_labels[~ignored], minlength=num_classes).astype(np.int64)
    if len(target_boxes) == 0:
        # Nothing to find: every number is undefined, which pycocotools writes as -1.
        undefined = np.full(num_classes, np.nan)
        return CocoResult(dict.fromkeys(COCO_NAMES, -1.0), undefined, positives, np.zeros((num_classes, 101)))

    truth = _annotations(ids, target_boxes, target_bounds, target_labels)
    for number, (item, area, crowd) in enumerate(zip(truth, areas.tolist(), ignored.tolist(), strict=True)):
        # Ids start at 1: pycocotools takes a match with object 0 for none.
        item.update(id=number + 1, area=area, iscrowd=int(crowd))
    results = _annotations(ids, boxes, bounds, labels)
    for item, score in zip(results, scores.tolist(), strict=True):
        item["score"] = score
    stats, precision = _evaluate_coco(ids, num_classes, truth, results)
    average_precision = np.full(num_classes, np.nan)
    defined = positives > 0
    average_precision[defined] = precision[:, :, defined].mean(axis=(0, 1))
    return CocoResult(
        numbers={name: float(value) for name, value in zip(COCO_NAMES, stats, strict=True)},
        average_precision=average_precision,
        positives=positives,
        curves=np.maximum(precision[0].T, 0.0),
    )


def _annotations(ids: Sequence[int], boxes: Floats, bounds: Integers, labels: Integers) -> list[dict[str, Any]]:
    """Boxes of all images in COCO's format; image n has those from bound n to bound n + 1."""
    image_ids = np.repeat(np.asarray(ids, dtype=np.int64), np.diff(bounds))
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return [
        {"image_id": image_id, "category_id": label + 1, "bbox": box}
        for image_id, label, box in zip(image_ids.tolist(), labels.tolist(), xywh.tolist(), strict=True)
    ]


def _evaluate_coco(
    ids: Sequence[int], num_classes: int, truth: list[dict[str, Any]], results: list[dict[str, Any]]
) -> tuple[Floats, Floats]:
    """The 12 numbers, and precision as (10 IoU thresholds, 101 recalls, C), -1 where a class has no object."""
    # Half a second to import, and only this function wants it.
    from faster_coco_eval import COCO, COCOeval_faster

    reference = COCO(
        {
            "images": [{"id": i} for i in ids],
            "categories": [{"id": label + 1, "name": str(label)} for label in range(num_classes)],
            "annotations": truth,
        },
        print_function=_say_nothing,
    )
    evaluator = COCOeval_faster(reference, reference.loadRes(results), "bbox", print_function=_say_nothing)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    # Of all area ranges the first (every size), of the limits on detections the last (100).
    precision = np.asarray(evaluator.eval["precision"], dtype=np.float64)[:, :, :, 0, -1]
    return np.asarray(evaluator.stats, dtype=np.float64), precision


def mean_of_defined(values: Floats) -> float:
    """The mean without nan; nan if nothing else is there."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _say_nothing(*_: object, **__: object) -> None:
    return None
