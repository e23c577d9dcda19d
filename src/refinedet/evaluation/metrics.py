"""Average precision of detections against targets: PASCAL VOC's two figures and COCO's twelve.

Pure functions of numpy arrays; no torch, no files. Detections and targets come as one object per image, in the same
order; anything with the right attributes will do (``Detections`` and ``Record`` of this package have them).

A box over a whole image is ``0, 0, width, height`` here, so a width is ``x2 - x1``. That is the PASCAL devkit's count
of inclusive pixels, with its +1 already inside the coordinates (see docs/conventions.md). ``inclusive=True`` is for
boxes that name their last pixel instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

VocMethod = Literal["11-point", "area"]

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers in pycocotools' order."""

CURVE_RECALLS: npt.NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
"""The recalls at which curves are sampled; COCO's choice."""

_ELEVEN_RECALLS = np.arange(11, dtype=np.float64) * 0.1
"""Deliberately 0.30000000000000004 and its like, not exact tenths: the evaluators that published figures come from
compare recall with these floats, so that 3 objects of 10 do not reach the fourth. With exact tenths a class of VOC 2007
test moves by up to 0.002, and a class of ten objects by much more."""

_Array = npt.NDArray[Any]
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


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
    """The objects of one image: G boxes (xyxy pixels) with labels and flags."""

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


class TargetsWithAreas(Targets, Protocol):
    """Targets that also carry COCO's area, which decides what counts as small, medium and large."""

    @property
    def areas(self) -> _Array:
        """(G,) square pixels (in COCO's own files the area of the mask, not of the box)."""


@dataclass(frozen=True)
class VocResult:
    """What ``voc_average_precision`` found, class by class."""

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


def voc_average_precision(
    detections: Sequence[ScoredBoxes],
    targets: Sequence[Targets],
    num_classes: int,
    *,
    iou_threshold: float = 0.5,
    method: VocMethod = "11-point",
    inclusive: bool = False,
) -> VocResult:
    """Average precision by the rules of the PASCAL VOC devkit.

    The detections of a class are taken from the best score down (a stable sort, so ties keep the order of the images
    and of each image's detections). Each looks for the object of its class and image that it overlaps most, taken or
    not, difficult or not. An overlap above ``iou_threshold`` hits: a difficult or crowd object makes the detection not
    count at all, an object not hit before makes it a true positive, one hit before a false positive. All others are
    false positives.

    Args:
        detections: one entry per image: boxes (D, 4), scores (D,), labels (D,).
        targets: one entry per image, in the same order: boxes (G, 4), labels (G,), difficult (G,), crowd (G,).
        num_classes: C; labels are 0..C-1.
        iou_threshold: an overlap must be strictly above it, as in the widespread Python evaluators (the Matlab devkit
            accepts equality).
        method: "11-point" (VOC 2007: the mean of interpolated precision at recall 0, 0.1, ... 1) or "area" (VOC 2010
            and later: the area under interpolated precision). The eleven recalls are the floats ``k * 0.1``, as in
            the evaluators that published figures come from.
        inclusive: coordinates name the first and last pixel, so that widths and heights are one more than their
            difference.

    Returns:
        Per class average precision, counts and curves.

    Raises:
        ValueError: lengths differ, a label is out of range, a score is nan, or the method is unknown.
    """
    if method not in ("11-point", "area"):
        raise ValueError(f"method must be '11-point' or 'area', not {method!r}")
    check_lengths(detections, targets)
    boxes, labels, images = _join(detections, num_classes, "detections")
    scores = concatenate([item.scores for item in detections], np.float64)
    if len(scores) != len(boxes):
        raise ValueError(f"detections: {len(boxes)} boxes but {len(scores)} scores")
    if np.isnan(scores).any():
        raise ValueError("detections: a score is nan")
    target_boxes, target_labels, target_images = _join(targets, num_classes, "targets")
    ignored = ignored_objects(targets)

    best_first = np.argsort(-scores, kind="stable")
    average_precision = np.full(num_classes, np.nan)
    positives = np.bincount(target_labels[~ignored], minlength=num_classes).astype(np.int64)
    precision: list[_Floats] = []
    recall: list[_Floats] = []
    kept_scores: list[_Floats] = []
    for label in range(num_classes):
        chosen = best_first[labels[best_first] == label]
        of_class = np.flatnonzero(target_labels == label)
        overlap, nearest = _best_overlaps(
            boxes[chosen], images[chosen], target_boxes[of_class], target_images[of_class], inclusive=inclusive
        )
        hit = overlap > iou_threshold
        # Difficult objects neither count nor punish: their detections leave the list before anything is summed.
        counts = np.ones(len(chosen), dtype=bool)
        counts[hit] = ~ignored[of_class[nearest[hit]]]
        candidates = np.flatnonzero(hit & counts)
        true_positive = np.zeros(len(chosen), dtype=bool)
        true_positive[candidates[np.unique(nearest[candidates], return_index=True)[1]]] = True

        hits = np.cumsum(true_positive[counts])
        if positives[label] == 0:
            hits = hits[:0]
        precision.append(hits / np.arange(1, len(hits) + 1))
        recall.append(hits / max(1, positives[label]))
        kept_scores.append(scores[chosen][counts][: len(hits)])
        if positives[label] > 0:
            average_precision[label] = average_precision_of_hits(hits, int(positives[label]), method)
    return VocResult(average_precision, positives, tuple(precision), tuple(recall), tuple(kept_scores))


def average_precision_of_hits(hits: npt.NDArray[np.int64], positives: int, method: VocMethod) -> float:
    """Average precision of one class from its detections, best score first.

    Args:
        hits: (D,) true positives among the first 1, 2, ... D detections that count.
        positives: objects that count, at least 1.
        method: "11-point" or "area", as for ``voc_average_precision``.

    Returns:
        0..1.
    """
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if method == "11-point":
        return float(envelope[np.searchsorted(hits / positives, _ELEVEN_RECALLS)].mean())
    steps = np.diff(hits, prepend=0)
    return float((steps * envelope[:-1]).sum() / positives)


def interpolate_precision(precision: npt.NDArray[np.float64], recall: npt.NDArray[np.float64]) -> _Floats:
    """Precision at ``CURVE_RECALLS``: the best at this recall or beyond, 0 where it is never reached.

    Args:
        precision: (D,) after each detection.
        recall: (D,) after each detection, never falling.

    Returns:
        (101,) never rising.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    result: _Floats = envelope[np.searchsorted(recall, CURVE_RECALLS)]
    return result


def coco_average_precision(
    detections: Sequence[ScoredBoxes],
    targets: Sequence[TargetsWithAreas],
    num_classes: int,
    *,
    image_ids: Sequence[int] | None = None,
) -> CocoResult:
    """COCO's twelve numbers for boxes, equal to those of pycocotools, computed by faster-coco-eval.

    Crowd regions swallow detections without counting, as COCO has it. Difficult objects (data in VOC's form) are
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
    # Half a second to import, and only this function wants it.
    from faster_coco_eval import COCO, COCOeval_faster

    check_lengths(detections, targets)
    ids = list(range(1, len(targets) + 1)) if image_ids is None else [int(i) for i in image_ids]
    if len(ids) != len(targets) or len(set(ids)) != len(ids):
        raise ValueError(f"image_ids must be {len(targets)} distinct integers")
    boxes, labels, images = _join(detections, num_classes, "detections")
    scores = concatenate([item.scores for item in detections], np.float64)
    if len(scores) != len(boxes):
        raise ValueError(f"detections: {len(boxes)} boxes but {len(scores)} scores")
    if np.isnan(scores).any():
        raise ValueError("detections: a score is nan")
    target_boxes, target_labels, target_images = _join(targets, num_classes, "targets")
    areas = concatenate([item.areas for item in targets], np.float64)
    ignored = ignored_objects(targets)
    positives = np.bincount(target_labels[~ignored], minlength=num_classes).astype(np.int64)
    if len(target_boxes) == 0:
        # Nothing to find: every number is undefined, which pycocotools writes as -1.
        undefined = np.full(num_classes, np.nan)
        return CocoResult(dict.fromkeys(COCO_NAMES, -1.0), undefined, positives, np.zeros((num_classes, 101)))

    def annotations(xyxy: _Floats, of_image: _Ints, of_label: _Ints) -> list[dict[str, Any]]:
        xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1).tolist()
        return [
            {"image_id": ids[image], "category_id": label + 1, "bbox": box}
            for image, label, box in zip(of_image.tolist(), of_label.tolist(), xywh, strict=True)
        ]

    truth = annotations(target_boxes, target_images, target_labels)
    for number, (item, area, crowd) in enumerate(zip(truth, areas.tolist(), ignored.tolist(), strict=True)):
        # Ids start at 1: pycocotools takes a match with object 0 for none.
        item.update(id=number + 1, area=area, iscrowd=int(crowd))
    found = annotations(boxes, images, labels)
    for item, score in zip(found, scores.tolist(), strict=True):
        item["score"] = score

    reference = COCO(
        {
            "images": [{"id": i} for i in ids],
            "categories": [{"id": label + 1, "name": str(label)} for label in range(num_classes)],
            "annotations": truth,
        },
        print_function=_say_nothing,
    )
    evaluator = COCOeval_faster(reference, reference.loadRes(found), "bbox", print_function=_say_nothing)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()

    # (IoU thresholds, recalls, classes, area ranges, detection limits), -1 where a class has no object.
    precision = np.asarray(evaluator.eval["precision"], dtype=np.float64)[:, :, :, 0, -1]
    average_precision = np.full(num_classes, np.nan)
    defined = positives > 0
    average_precision[defined] = precision[:, :, defined].mean(axis=(0, 1))
    return CocoResult(
        numbers={name: float(value) for name, value in zip(COCO_NAMES, evaluator.stats, strict=True)},
        average_precision=average_precision,
        positives=positives,
        curves=np.maximum(precision[0].T, 0.0),
    )


def _best_overlaps(
    boxes: _Floats, images: _Ints, target_boxes: _Floats, target_images: _Ints, *, inclusive: bool
) -> tuple[_Floats, _Ints]:
    """The largest IoU of each box with a target of its image (0 if there is none) and which target that is.

    ``target_images`` never falls, so the targets of a box are a slice; all slices are laid end to end and compared in
    one go, without a loop over images.
    """
    start = np.searchsorted(target_images, images, side="left")
    count = np.searchsorted(target_images, images, side="right") - start
    end = np.cumsum(count)
    row = np.repeat(np.arange(len(boxes)), count)
    column = np.arange(len(row)) + np.repeat(start - (end - count), count)

    extra = 1.0 if inclusive else 0.0
    a, b = boxes[row], target_boxes[column]
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + extra
    shared = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0.0)
    union = (a[:, 2:] - a[:, :2] + extra).prod(axis=1) + (b[:, 2:] - b[:, :2] + extra).prod(axis=1) - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)

    overlap = np.zeros(len(boxes))
    nearest = np.zeros(len(boxes), dtype=np.int64)
    some = count > 0
    if some.any():
        overlap[some] = np.maximum.reduceat(iou, (end - count)[some])
        peaks = np.flatnonzero(iou == overlap[row])
        # The first of equal peaks, as the devkit's loop keeps it.
        rows, first = np.unique(row[peaks], return_index=True)
        nearest[rows] = column[peaks[first]]
    return overlap, nearest


def _join(
    items: Sequence[ScoredBoxes] | Sequence[Targets], num_classes: int, what: str
) -> tuple[_Floats, _Ints, _Ints]:
    """Boxes (N, 4), labels (N,) and image indices (N,) of all images end to end."""
    boxes: _Floats = concatenate([np.reshape(item.boxes, (-1, 4)) for item in items], np.float64).reshape(-1, 4)
    labels: _Ints = concatenate([item.labels for item in items], np.int64)
    images = np.repeat(np.arange(len(items)), [len(item.labels) for item in items]).astype(np.int64)
    if len(boxes) != len(labels):
        raise ValueError(f"{what}: {len(boxes)} boxes but {len(labels)} labels")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"{what}: label {wrong} is not in 0..{num_classes - 1}")
    return boxes, labels, images


def ignored_objects(targets: Sequence[Targets]) -> npt.NDArray[np.bool_]:
    """Of all images end to end, the objects that are difficult or a crowd."""
    difficult = concatenate([item.difficult for item in targets], np.bool_)
    crowd = concatenate([item.crowd for item in targets], np.bool_)
    result: npt.NDArray[np.bool_] = difficult | crowd
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


def mean_of_defined(values: _Floats) -> float:
    """The mean without nan; nan if nothing else is there."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _say_nothing(*_: object, **__: object) -> None:
    return None
