"""Kinds of error: images of two or three boxes worked out by hand, and a slow reference on random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from oracles import iou, voc_average_precision
from refinedet.evaluation.diagnosis import Diagnosis, best_f1
from refinedet.evaluation.diagnosis import diagnose as diagnose_outcomes
from refinedet.evaluation.outcomes import ERRORS, Outcome, match_objects

CAT, DOG, COW = 0, 1, 2
TP, IGNORED, DUPLICATE = Outcome.TRUE_POSITIVE, Outcome.IGNORED, Outcome.DUPLICATE
LOCALIZATION, CLASSIFICATION, BOTH = Outcome.LOCALIZATION, Outcome.CLASSIFICATION, Outcome.BOTH
BACKGROUND = Outcome.BACKGROUND
Box = tuple[float, float, float, float]
HERE: Box = (0, 0, 100, 100)
"""IoU with HERE: RIGHT 0.9, HALF 0.5 exactly, THIRD 1/3, TENTH 0.1 exactly, SCRAP 0.09; AWAY 0."""
RIGHT, HALF, THIRD = (0, 0, 100, 90), (0, 0, 100, 50), (50, 0, 150, 100)
TENTH, SCRAP, AWAY = (0, 0, 10, 100), (0, 0, 9, 100), (300, 300, 400, 400)


@dataclass
class Found:
    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass
class Objects:
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float32]


def found(*items: tuple[Box, int, float]) -> Found:
    return Found(
        np.array([box for box, _, _ in items], np.float32).reshape(-1, 4),
        np.array([score for _, _, score in items], np.float32),
        np.array([label for _, label, _ in items], np.int64),
    )


def objects(*items: tuple[Box, int], difficult: Sequence[int] = (), crowd: Sequence[int] = ()) -> Objects:
    boxes = np.array([box for box, _ in items], np.float32).reshape(-1, 4)
    order = np.arange(len(items))
    return Objects(
        boxes,
        np.array([label for _, label in items], np.int64),
        np.isin(order, difficult),
        np.isin(order, crowd),
        (boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
    )


def diagnose(
    detections: Sequence[Found], targets: Sequence[Objects], classes: int, *, crowd_swallows: bool = False, **rest: Any
) -> Diagnosis:
    return diagnose_outcomes(match_objects(detections, targets, classes, crowd_swallows=crowd_swallows), **rest)


def one(detections: Found, targets: Objects, **arguments: object) -> Diagnosis:
    return diagnose([detections], [targets], 3, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("box", "label", "outcome"),
    [
        (HERE, CAT, TP),
        (RIGHT, CAT, TP),
        (HALF, CAT, LOCALIZATION),
        (THIRD, CAT, LOCALIZATION),
        (TENTH, CAT, LOCALIZATION),
        (SCRAP, CAT, BACKGROUND),
        (AWAY, CAT, BACKGROUND),
        (RIGHT, DOG, CLASSIFICATION),
        (HALF, DOG, BOTH),
        (THIRD, DOG, BOTH),
        (TENTH, DOG, BOTH),
        (SCRAP, DOG, BACKGROUND),
    ],
)
def test_one_detection_of_one_cat(box: Box, label: int, outcome: Outcome) -> None:
    result = one(found((box, label, 0.9)), objects((HERE, CAT)))
    assert result.images[0].outcomes.tolist() == [outcome]
    assert result.images[0].objects.tolist() == [-1 if outcome == BACKGROUND else 0]
    assert result.outcomes[label, outcome] == result.outcomes.sum() == 1
    assert result.missed.tolist() == [int(outcome != TP), 0, 0]
    assert (result.right, result.wrong) == ((1, 0) if outcome == TP else (0, 1))
    cell = {TP: (CAT, CAT), CLASSIFICATION: (CAT, DOG)}.get(outcome)
    expected = np.zeros((4, 4), int)
    if cell:
        expected[cell] = 1
    else:
        expected[CAT, 3] = expected[3, label] = 1
    assert result.confusion.tolist() == expected.tolist()


def test_the_best_scored_hit_is_right_and_the_others_are_duplicates() -> None:
    result = one(found((HERE, CAT, 0.6), (RIGHT, CAT, 0.8), (HERE, CAT, 0.8)), objects((HERE, CAT)))
    assert result.images[0].outcomes.tolist() == [DUPLICATE, TP, DUPLICATE]
    assert result.confusion[3].tolist() == [2, 0, 0, 0]
    assert result.missed.sum() == 0


def test_own_class_in_the_wrong_place_goes_before_another_class_in_the_right_one() -> None:
    targets = objects((HERE, DOG), (THIRD, CAT))
    result = one(found((RIGHT, CAT, 0.9)), targets)
    assert result.images[0].outcomes.tolist() == [LOCALIZATION]
    assert result.images[0].objects.tolist() == [1]


def test_difficult_and_crowd_objects_are_neither_errors_nor_misses() -> None:
    for flags in ({"difficult": [0]}, {"crowd": [0]}):
        targets = objects((HERE, CAT), (AWAY, DOG), **flags)
        result = one(found((HERE, CAT, 0.9), (RIGHT, CAT, 0.8)), targets)
        assert result.images[0].outcomes.tolist() == [IGNORED, IGNORED]
        assert (result.right, result.wrong) == (0, 0)
        assert result.objects.tolist() == [0, 1, 0]
        assert result.missed.tolist() == [0, 1, 0]
        assert result.confusion.sum() == 1
        # Under another name it is wrong all the same, as in the figure; its object has no row.
        result = one(found((HERE, COW, 0.9)), targets)
        assert result.images[0].outcomes.tolist() == [CLASSIFICATION]
        assert result.confusion[:, COW].tolist() == [0, 0, 0, 1]


def test_a_crowd_swallows_boxes_inside_it_by_cocos_rule_only() -> None:
    targets = objects(((0, 0, 400, 400), CAT), (AWAY, DOG), crowd=[0])
    inside, outside = found(((0, 0, 50, 50), CAT, 0.9)), found(((350, 0, 451, 50), CAT, 0.9))
    assert one(inside, targets).images[0].outcomes.tolist() == [BACKGROUND]
    assert one(inside, targets, crowd_swallows=True).images[0].outcomes.tolist() == [IGNORED]
    assert one(outside, targets, crowd_swallows=True).images[0].outcomes.tolist() == [BACKGROUND]
    other = found(((0, 0, 50, 50), DOG, 0.9))
    assert one(other, targets, crowd_swallows=True).images[0].outcomes.tolist() == [BACKGROUND]


def test_the_threshold_counts_but_does_not_reclassify() -> None:
    detections, targets = found((HERE, CAT, 0.9), (RIGHT, CAT, 0.3), (AWAY, DOG, 0.2)), objects((HERE, CAT))
    low, high = one(detections, targets, score_threshold=0.0), one(detections, targets, score_threshold=0.5)
    assert low.images[0].outcomes.tolist() == high.images[0].outcomes.tolist() == [TP, DUPLICATE, BACKGROUND]
    assert (low.wrong, high.wrong) == (2, 0)
    assert low.repaired == high.repaired
    assert one(detections, targets, score_threshold=0.95).missed.tolist() == [1, 0, 0]
    # 0.3 as float32 lies above 0.3, 0.9 below 0.9: both reach their own threshold.
    for score in (0.3, 0.9, 0.7):
        assert one(found((HERE, CAT, score)), targets, score_threshold=score).right == 1


def test_an_object_taken_for_two_things_stands_once_in_its_row() -> None:
    result = one(found((HERE, DOG, 0.5), (RIGHT, COW, 0.7)), objects((HERE, CAT)))
    assert result.confusion[CAT].tolist() == [0, 0, 1, 0]
    assert result.confusion[3].tolist() == [0, 1, 0, 0]
    # Found under its own name as well: then both are without an object.
    result = one(found((HERE, DOG, 0.9), (RIGHT, CAT, 0.5)), objects((HERE, CAT)))
    assert result.confusion[CAT].tolist() == [1, 0, 0, 0]
    assert result.confusion[3].tolist() == [0, 1, 0, 0]


def test_repairs_worked_out_by_hand() -> None:
    """Three cats far apart. Best first: a stray box, a cat found, a cat in the wrong place, a cat called dog.

    Area AP of cat: the only hit is second of three, so precision 1/2 over a third of the recall.
    """
    second, third = (1000, 0, 1100, 100), (2000, 0, 2100, 100)
    detections = found(
        (AWAY, CAT, 0.9), (HERE, CAT, 0.8), ((1050, 0, 1150, 100), CAT, 0.7), (third, DOG, 0.6), (RIGHT, CAT, 0.5)
    )
    targets = objects((HERE, CAT), (second, CAT), (third, CAT))
    result = one(detections, targets, method="area")
    assert result.images[0].outcomes.tolist() == [BACKGROUND, TP, LOCALIZATION, CLASSIFICATION, DUPLICATE]
    assert result.mean_ap == pytest.approx(1 / 2 / 3)
    # Without the stray box: precision 1 over a third.
    assert result.repaired[BACKGROUND] == pytest.approx(1 / 3)
    # Two hits of three at 2/3, interpolated over both.
    assert result.repaired[LOCALIZATION] == pytest.approx(2 / 3 * 2 / 3)
    # The third cat comes in at 0.6: the second hit among four; 1/2 stays the best precision.
    assert result.repaired[CLASSIFICATION] == pytest.approx(1 / 2 * 2 / 3)
    # The duplicate comes after the last hit: nothing to gain, and nothing of this kind here.
    assert result.repaired[DUPLICATE] == result.repaired[BOTH] == pytest.approx(1 / 6)
    # Only the first cat is left to find.
    assert result.repaired_missed == pytest.approx(1 / 2)


def test_repairs_do_not_find_an_object_twice() -> None:
    # The cat is found; a misplaced and a misnamed second box go away when repaired, and with them what they cost.
    detections = found((THIRD, CAT, 0.9), (HERE, DOG, 0.8), (HERE, CAT, 0.7))
    result = one(detections, objects((HERE, CAT)), method="area")
    assert result.mean_ap == pytest.approx(1 / 2)
    assert result.repaired[LOCALIZATION] == pytest.approx(1)
    assert result.repaired[CLASSIFICATION] == pytest.approx(1 / 2)
    # Two boxes in the wrong place of one object: one repair finds it, the other is no new false positive.
    detections = found((THIRD, CAT, 0.9), (HALF, CAT, 0.8))
    assert one(detections, objects((HERE, CAT)), method="area").repaired[LOCALIZATION] == pytest.approx(1)
    # Repaired, it is on an object that does not count: it is taken away.
    detections, targets = found((HERE, CAT, 0.5), (AWAY, CAT, 0.9)), objects((HERE, CAT), (AWAY, DOG), difficult=[1])
    assert one(detections, targets, method="area").repaired[CLASSIFICATION] == pytest.approx(1)


def test_a_class_of_which_nothing_is_found_stays_at_zero() -> None:
    result = one(found((HERE, CAT, 0.9)), objects((HERE, CAT), (AWAY, DOG)))
    assert result.mean_ap == result.repaired_missed == pytest.approx(1 / 2)


def test_threshold_of_the_best_f1() -> None:
    """Cat: hit, hit, wrong, hit; three of four objects found. F1 2/5, 4/6, 4/7, 6/8: all four are kept."""
    far = [(1000 * k, 0, 1000 * k + 100, 100) for k in range(1, 5)]
    detections = found((far[0], CAT, 0.9), (far[1], CAT, 0.8), (AWAY, CAT, 0.7), (far[2], CAT, 0.5), (HERE, DOG, 0.3))
    targets = objects(*((box, CAT) for box in far), (AWAY, DOG))
    thresholds, f1 = best_f1(match_objects([detections], [targets], 3))
    assert f1[:2].tolist() == pytest.approx([6 / 8, 0])
    assert thresholds[0] == pytest.approx(0.5)
    assert np.isnan(thresholds[1:]).all()
    assert np.isnan(f1[2])
    # A threshold cannot part detections of equal score: at 0.7 the wrong one is in as well.
    tied = found((far[0], CAT, 0.9), (far[1], CAT, 0.7), (AWAY, CAT, 0.7), (AWAY, CAT, 0.6))
    thresholds, f1 = best_f1(match_objects([tied], [objects(*((box, CAT) for box in far[:2]))], 3))
    assert (thresholds[0], f1[0]) == pytest.approx((0.7, 4 / 5))


def test_sizes() -> None:
    small, medium, large = (0, 0, 31, 31), (100, 0, 132, 32), (200, 0, 296, 96)
    targets = objects((small, CAT), (medium, CAT), (large, CAT))
    # The medium one is found first, then comes a large box on the background, then the large one is found.
    detections = found((medium, CAT, 0.9), ((500, 500, 700, 700), CAT, 0.8), (large, CAT, 0.7))
    result = one(detections, targets, method="area")
    assert result.objects_by_size.tolist() == [1, 1, 1]
    assert result.found_by_size.tolist() == [0, 1, 1]
    # The large box is false among the large only.
    assert result.ap_by_size.tolist() == pytest.approx([0, 1, 1 / 2])
    nothing_small = one(detections, objects((large, CAT)), method="area")
    assert np.isnan(nothing_small.ap_by_size).tolist() == [True, True, False]


def test_nothing_found_nothing_there_and_no_images() -> None:
    empty = diagnose([found()], [objects((HERE, CAT))], 1)
    assert (empty.mean_ap, empty.repaired_missed, empty.missed.tolist()) == (0, 0, [1])
    assert empty.confusion.tolist() == [[0, 1], [0, 0]]
    bare = diagnose([found((HERE, CAT, 0.9))], [objects()], 1)
    assert bare.images[0].outcomes.tolist() == [BACKGROUND]
    assert np.isnan(bare.mean_ap)
    none = diagnose([], [], 2)
    assert none.confusion.sum() == none.outcomes.sum() == 0
    with pytest.raises(ValueError, match="detections of 1 images but targets of 0"):
        diagnose([found()], [], 1)


# Random images, against loops over Python floats.

CLASSES = 3


def random_case(seed: int) -> tuple[list[Found], list[Objects]]:
    """Images of crowded boxes on a grid of 10 pixels, so that hits, near misses and exact limits all occur."""
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> npt.NDArray[np.float32]:
        corner = 10 * rng.integers(0, 10, (count, 2))
        return np.concatenate([corner, corner + 10 * rng.integers(1, 12, (count, 2))], axis=1).astype(np.float32)

    detections, targets = [], []
    for _ in range(int(rng.integers(1, 6))):
        count, there = int(rng.integers(0, 12)), int(rng.integers(0, 6))
        of_objects = boxes(there)
        some = boxes(count)
        if there:
            copied = rng.random(count) < 0.5
            some[copied] = of_objects[rng.integers(0, there, int(copied.sum()))]
        # Few different scores, so that ties occur.
        scores = (rng.integers(1, 8, count) / 8).astype(np.float32)
        detections.append(Found(some, scores, rng.integers(0, CLASSES, count)))
        difficult, crowd = rng.random(there) < 0.2, rng.random(there) < 0.1
        areas = (of_objects[:, 2:] - of_objects[:, :2]).prod(axis=1)
        targets.append(Objects(of_objects, rng.integers(0, CLASSES, there), difficult, crowd, areas))
    return detections, targets


def slow_outcomes(detections: Found, targets: Objects) -> list[Outcome]:
    """The rules of ``Outcome`` as they stand, one detection after the other."""
    outcomes = [BACKGROUND] * len(detections.labels)
    taken: set[int] = set()
    for d in sorted(range(len(outcomes)), key=lambda index: -detections.scores[index]):
        overlaps = [iou(detections.boxes[d].tolist(), box) for box in targets.boxes.tolist()]
        own = [(value, -g) for g, value in enumerate(overlaps) if targets.labels[g] == detections.labels[d]]
        other = [value for g, value in enumerate(overlaps) if targets.labels[g] != detections.labels[d]]
        value, minus_g = max(own, default=(0.0, 0))
        if value > 0.5:
            if targets.difficult[-minus_g] or targets.crowd[-minus_g]:
                outcomes[d] = IGNORED
            else:
                outcomes[d] = DUPLICATE if -minus_g in taken else TP
                taken.add(-minus_g)
        elif value >= 0.1:
            outcomes[d] = LOCALIZATION
        elif max(other, default=0.0) > 0.5:
            outcomes[d] = CLASSIFICATION
        elif max(other, default=0.0) >= 0.1:
            outcomes[d] = BOTH
    return outcomes


@pytest.mark.parametrize("seed", range(40))
def test_random_images(seed: int) -> None:
    detections, targets = random_case(seed)
    threshold = 0.5
    result = diagnose(detections, targets, CLASSES, score_threshold=threshold, method="area")
    expected = [slow_outcomes(a, b) for a, b in zip(detections, targets, strict=True)]
    assert [image.outcomes.tolist() for image in result.images] == expected

    # Every kept detection is one thing, every object that counts is found or missed.
    kept = [int(label) for a in detections for label, score in zip(a.labels, a.scores, strict=True) if score >= 0.5]
    np.testing.assert_array_equal(result.outcomes.sum(axis=1), np.bincount(kept, minlength=CLASSES))
    np.testing.assert_array_equal(result.outcomes[:, TP] + result.missed, result.objects)
    assert result.right + result.wrong + result.outcomes[:, IGNORED].sum() == len(kept)
    assert sum(int(image.missed.sum()) for image in result.images) == result.missed.sum()
    assert sum(int(image.wrong.sum()) for image in result.images) == result.wrong
    np.testing.assert_array_equal(result.objects_by_size.sum(), result.objects.sum())
    assert result.found_by_size.sum() == result.right

    # The matrix: rows are the objects, columns the detections that count, the diagonal the true positives.
    np.testing.assert_array_equal(result.confusion[:CLASSES].sum(axis=1), result.objects)
    counting = result.outcomes.sum(axis=1) - result.outcomes[:, IGNORED]
    np.testing.assert_array_equal(result.confusion[:, :CLASSES].sum(axis=0), counting)
    np.testing.assert_array_equal(np.diag(result.confusion)[:CLASSES], result.outcomes[:, TP])
    assert result.confusion[CLASSES, CLASSES] == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["11-point", "area"])
def test_average_precision_is_that_of_the_metric(seed: int, method: str) -> None:
    detections, targets = random_case(seed)
    result = diagnose(detections, targets, CLASSES, method=method)  # type: ignore[arg-type]
    reference = voc_average_precision(detections, targets, CLASSES, method=method)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result.objects, reference.positives)
    np.testing.assert_equal(result.mean_ap, reference.mean)
    if np.isnan(reference.mean):
        return
    # No repair does harm.
    for value in [*result.repaired.values(), result.repaired_missed]:
        assert value >= result.mean_ap - 1e-12
    assert set(result.repaired) == set(ERRORS)


def apart(seed: int) -> tuple[list[Found], list[Objects]]:
    """Random detections around objects that lie so far apart that none can be taken for another."""
    rng = np.random.default_rng(seed)
    detections, targets = [], []
    for _ in range(4):
        there, count = int(rng.integers(1, 6)), int(rng.integers(0, 20))
        corner = np.stack([500.0 * np.arange(there), np.zeros(there)], axis=1)
        boxes = np.concatenate([corner, corner + 100], axis=1).astype(np.float32)
        labels = rng.integers(0, CLASSES, there)
        shift = rng.choice([0, 10, 20, 50, 80, 120], count).astype(np.float32)
        near = rng.integers(0, there, count)
        some = boxes[near] + shift[:, None] * np.array([1, 0, 1, 0], np.float32)
        named = np.where(rng.random(count) < 0.6, labels[near], rng.integers(0, CLASSES, count))
        detections.append(Found(some, (rng.integers(1, 8, count) / 8).astype(np.float32), named))
        nobody = np.zeros(there, bool)
        targets.append(Objects(boxes, labels, rng.random(there) < 0.2, nobody, np.full(there, 1e4, np.float32)))
    return detections, targets


@pytest.mark.parametrize("seed", range(20))
def test_repairs_are_those_of_detections_repaired_one_by_one(seed: int) -> None:
    """Take the errors of a kind out of the detections, or set them right there, and measure anew."""
    detections, targets = apart(seed)
    result = diagnose(detections, targets, CLASSES, method="area")
    for kind in ERRORS:
        assert any(kind in image.outcomes for image in result.images) or kind == BOTH
        repaired = []
        for a, b, image in zip(detections, targets, result.images, strict=True):
            keep = image.outcomes != kind
            boxes, labels = a.boxes.copy(), a.labels.copy()
            done = {int(g) for g, o in zip(image.objects, image.outcomes, strict=True) if o == TP}
            if kind in (LOCALIZATION, CLASSIFICATION):
                for d in sorted(np.flatnonzero(~keep).tolist(), key=lambda index: -a.scores[index]):
                    g = int(image.objects[d])
                    if g not in done and not b.difficult[g]:
                        done.add(g)
                        keep[d], boxes[d], labels[d] = True, b.boxes[g], b.labels[g]
            repaired.append(Found(boxes[keep], a.scores[keep], labels[keep]))
        measured = voc_average_precision(repaired, targets, CLASSES, method="area").mean
        np.testing.assert_allclose(result.repaired[kind], measured)
    # Missed: the same detections, without the objects that none of them finds.
    fewer = []
    for b, image in zip(targets, result.images, strict=True):
        hit = np.isin(np.arange(len(b.labels)), image.objects[image.outcomes == TP])
        keep = hit | b.difficult
        fewer.append(Objects(b.boxes[keep], b.labels[keep], b.difficult[keep], b.crowd[keep], b.areas[keep]))
    measured_fewer = voc_average_precision(detections, fewer, CLASSES, method="area").average_precision
    measured_fewer[np.isnan(measured_fewer) & (result.objects > 0)] = 0
    np.testing.assert_allclose(result.repaired_missed, np.nanmean(measured_fewer))
