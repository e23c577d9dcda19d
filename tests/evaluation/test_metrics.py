"""The figures against arithmetic by hand, slow obvious loops, real detections and pycocotools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import voc_average_precision
from refinedet.evaluation.metrics import (
    COCO_NAMES,
    CURVE_RECALLS,
    coco_average_precision,
    interpolate_precision,
)

Array = npt.NDArray[Any]
Oracle = Callable[[Path, list[dict[str, Any]]], Array]


class Found:
    """Detections of one image."""

    def __init__(self, boxes: npt.ArrayLike = (), scores: npt.ArrayLike = (), labels: npt.ArrayLike = ()) -> None:
        self.boxes: Array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        self.scores: Array = np.asarray(scores, dtype=np.float64)
        self.labels: Array = np.asarray(labels, dtype=np.int64)


class Truth:
    """Objects of one image; flags are off and areas those of the boxes unless given."""

    def __init__(
        self,
        boxes: npt.ArrayLike = (),
        labels: npt.ArrayLike = (),
        difficult: npt.ArrayLike | None = None,
        crowd: npt.ArrayLike | None = None,
        areas: npt.ArrayLike | None = None,
    ) -> None:
        self.boxes: Array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        self.labels: Array = np.asarray(labels, dtype=np.int64)
        off = np.zeros(len(self.labels), dtype=bool)
        self.difficult: Array = off if difficult is None else np.asarray(difficult, dtype=bool)
        self.crowd: Array = off if crowd is None else np.asarray(crowd, dtype=bool)
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        self.areas: Array = sides.prod(axis=1) if areas is None else np.asarray(areas, dtype=np.float64)


# --- by hand ----------------------------------------------------------------------------------------------------------


def hand_example() -> tuple[list[Found], list[Truth]]:
    """One class, two images, three objects that count (A, B, C) and a difficult one (X).

    score  detection            IoU                                   verdict        hits/seen  precision  recall
    0.9    on A                 100 / 100                             hit            1/1        1          1/3
    0.8    on A again           100 / 100                             repeat: false  1/2        1/2        1/3
    0.7    on X                 100 / 100                             not counted
    0.6    half of B            50 / (100 + 50 - 50) = 0.5, not > 0.5 false          1/3        1/3        1/3
    0.5    on C, 1 px aside     90 / (100 + 100 - 90) = 0.818         hit            2/4        1/2        2/3
    0.4    on nothing           0                                     false          2/5        2/5        2/3
    0.3    on B                 100 / 100                             hit            3/6        1/2        3/3

    Interpolated precision: 1 up to recall 1/3, then 1/2 up to recall 1.
    11-point: recalls 0, .1, .2, .3 give 1; .4 ... 1 (seven of them) give 1/2: (4 + 3.5) / 11 = 7.5 / 11.
    Area: 1/3 * 1 + 2/3 * 1/2 = 2/3.
    """
    truths = [
        Truth([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0]),  # A, B
        Truth([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], difficult=[False, True]),  # C, X
    ]
    found = [
        Found([[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 55], [50, 50, 60, 60]], [0.9, 0.8, 0.6, 0.3], [0, 0, 0, 0]),
        Found([[80, 80, 90, 90], [50, 50, 60, 60], [1, 0, 11, 10]], [0.4, 0.7, 0.5], [0, 0, 0]),
    ]
    return found, truths


def test_voc_by_hand() -> None:
    found, truths = hand_example()
    eleven = voc_average_precision(found, truths, 1)
    assert eleven.average_precision[0] == pytest.approx(7.5 / 11, abs=1e-12)
    assert eleven.positives.tolist() == [3]
    assert eleven.precision[0] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2, 2 / 5, 1 / 2])
    assert eleven.recall[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert eleven.scores[0] == pytest.approx([0.9, 0.8, 0.6, 0.5, 0.4, 0.3])
    area = voc_average_precision(found, truths, 1, method="area")
    assert area.average_precision[0] == pytest.approx(2 / 3, abs=1e-12)
    # Recalls 0, 0.01, ... 0.33 lie at or below 1/3: 34 samples of 1, then 67 of 1/2.
    assert area.curve(0).tolist() == [1.0] * 34 + [0.5] * 67


def test_voc_best_overlap_comes_before_taken() -> None:
    # The second detection overlaps A (taken) by 100/120 and B by 80/140: the devkit does not fall back to B.
    truth = Truth([[0, 0, 10, 10], [4, 0, 14, 10]], [0, 0])
    found = Found([[0, 0, 10, 10], [0, 0, 12, 10]], [0.9, 0.8], [0, 0])
    result = voc_average_precision([found], [truth], 1, method="area")
    assert result.precision[0].tolist() == [1.0, 0.5]
    assert result.average_precision[0] == 0.5


def test_voc_threshold_must_be_exceeded() -> None:
    # Half of the object: an IoU of exactly 0.5.
    truth, found = Truth([[0, 0, 10, 10]], [0]), Found([[0, 0, 5, 10]], [0.9], [0])
    assert voc_average_precision([found], [truth], 1, iou_threshold=0.499).mean == 1
    assert voc_average_precision([found], [truth], 1).mean == 0


def test_voc_class_without_objects_is_left_out_of_the_mean() -> None:
    truth = Truth([[0, 0, 10, 10], [0, 0, 9, 9]], [1, 2], difficult=[False, True])
    found = Found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [0, 1])
    result = voc_average_precision([found], [truth], 3)
    assert np.isnan(result.average_precision[[0, 2]]).all()
    assert result.mean == result.average_precision[1] == 1
    assert len(result.precision[0]) == 0
    assert result.curve(0).tolist() == [0] * 101


def test_voc_nothing_found_is_zero_and_nothing_at_all_is_nan() -> None:
    assert voc_average_precision([Found()], [Truth([[0, 0, 1, 1]], [0])], 1).mean == 0
    assert np.isnan(voc_average_precision([Found()], [Truth()], 2).mean)
    assert np.isnan(voc_average_precision([], [], 2).mean)


def test_voc_crowd_is_ignored_like_difficult() -> None:
    found, truths = hand_example()
    truths[1] = Truth(truths[1].boxes, truths[1].labels, crowd=truths[1].difficult)
    assert voc_average_precision(found, truths, 1).mean == pytest.approx(7.5 / 11)


def test_tied_scores_keep_the_order_of_images_and_detections() -> None:
    truth, empty = Truth([[0, 0, 10, 10]], [0]), Truth()
    right, wrong = Found([[0, 0, 10, 10]], [0.5], [0]), Found([[50, 50, 60, 60]], [0.5], [0])
    assert voc_average_precision([right, wrong], [truth, empty], 1, method="area").mean == 1
    assert voc_average_precision([wrong, right], [empty, truth], 1, method="area").mean == 0.5


def test_eleven_recalls_are_the_floats_of_published_figures() -> None:
    # Ten objects, the first three found at once, then nothing right: recall 3/10 lies below 3 * 0.1.
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    found = Found(boxes[:3], [0.9, 0.8, 0.7], [0, 0, 0])
    assert voc_average_precision([found], [Truth(boxes, [0] * 10)], 1).mean == pytest.approx(3 / 11)


@pytest.mark.parametrize(
    ("found", "truth", "arguments", "message"),
    [
        ([Found()], [], {}, "1 images but targets of 0"),
        ([Found([[0, 0, 1, 1]], [0.5], [2])], [Truth()], {}, "label 2 is not in 0..1"),
        ([Found()], [Truth([[0, 0, 1, 1]], [-1])], {}, "label -1"),
        ([Found([[0, 0, 1, 1]], [np.nan], [0])], [Truth()], {}, "nan"),
        ([Found([[0, 0, 1, 1]], [], [0])], [Truth()], {}, "1 boxes but 0 scores"),
        ([Found()], [Truth()], {"method": "12-point"}, "12-point"),
    ],
)
def test_voc_refuses_what_does_not_fit(
    found: list[Found], truth: list[Truth], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        voc_average_precision(found, truth, 2, **arguments)


def test_interpolate_precision() -> None:
    curve = interpolate_precision(np.array([0.5, 1.0, 0.25]), np.array([0.0, 0.5, 0.75]))
    assert curve.tolist() == [1.0] * 51 + [0.25] * 25 + [0.0] * 25
    assert len(CURVE_RECALLS) == 101


# --- loops ------------------------------------------------------------------------------------------------------------


def overlap_by_loop(a: Array, b: Array) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return float(shared / (area_a + area_b - shared))


def voc_by_loop(found: list[Found], truths: list[Truth], label: int, threshold: float) -> tuple[float, float]:
    """11-point and area AP of one class, read off the devkit's rules line by line."""
    ranked = [
        (float(score), image, box)
        for image, item in enumerate(found)
        for box, score, its_label in zip(item.boxes, item.scores, item.labels, strict=True)
        if its_label == label
    ]
    ranked.sort(key=lambda entry: -entry[0])
    total = 0
    for truth in truths:
        for its_label, flag in zip(truth.labels, truth.difficult, strict=True):
            total += int(its_label == label and not flag)
    if total == 0:
        return float("nan"), float("nan")
    taken: set[tuple[int, int]] = set()
    hits = misses = 0
    points: list[tuple[float, float]] = []
    for _, image, box in ranked:
        truth = truths[image]
        best, which = -1.0, -1
        for j in range(len(truth.labels)):
            if truth.labels[j] == label:
                value = overlap_by_loop(box, truth.boxes[j])
                if value > best:
                    best, which = value, j
        if best > threshold:
            if truth.difficult[which]:
                continue
            if (image, which) in taken:
                misses += 1
            else:
                taken.add((image, which))
                hits += 1
        else:
            misses += 1
        points.append((hits / total, hits / (hits + misses)))
    eleven = sum(max([p for r, p in points if r >= k * 0.1], default=0.0) for k in range(11)) / 11
    area = 0.0
    for n in range(1, total + 1):
        area += max([p for r, p in points if r >= n / total], default=0.0) / total
    return eleven, area


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Found], list[Truth], int]:
    """Images with objects, some difficult, some twins, and detections near them, repeated, or anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_classes = draw(st.integers(1, 3))
    images = draw(st.integers(1, 5))
    most_objects = draw(st.sampled_from([0, 1, 3, 10]))
    most_found = draw(st.sampled_from([0, 2, 20]))
    found, truths = [], []
    for _ in range(images):
        count = int(rng.integers(0, most_objects + 1))
        corner = rng.integers(0, 30, (count, 2))
        boxes = np.concatenate([corner, corner + rng.integers(1, 20, (count, 2))], axis=1).astype(np.float64)
        if count > 1 and rng.random() < 0.3:
            boxes[1] = boxes[0]
        labels = rng.integers(0, num_classes, count)
        truths.append(Truth(boxes, labels, difficult=rng.random(count) < 0.3))
        repeats = rng.integers(0, 3, count) if most_found else np.zeros(count, dtype=np.int64)
        near = np.repeat(boxes, repeats, axis=0) + rng.integers(-3, 4, (repeats.sum(), 4))
        far = rng.uniform(0, 50, (int(rng.integers(0, most_found + 1)), 4))
        both = np.concatenate([near, far])
        both = np.concatenate([np.minimum(both[:, :2], both[:, 2:]), np.maximum(both[:, :2], both[:, 2:])], axis=1)
        own = np.concatenate([np.repeat(labels, repeats), rng.integers(0, num_classes, len(far))])
        found.append(Found(both, rng.permutation(1000)[: len(both)] / 1000 + rng.random(), own))
    return found, truths, num_classes


@settings(max_examples=200, deadline=None)
@given(case=cases(), threshold=st.sampled_from([0.3, 0.5, 0.75]))
def test_voc_equals_loops(case: tuple[list[Found], list[Truth], int], threshold: float) -> None:
    found, truths, num_classes = case
    expected = [voc_by_loop(found, truths, label, threshold) for label in range(num_classes)]
    for method, column in (("11-point", 0), ("area", 1)):
        result = voc_average_precision(
            found,
            truths,
            num_classes,
            iou_threshold=threshold,
            method=method,  # type: ignore[arg-type]
        )
        np.testing.assert_allclose(result.average_precision, [row[column] for row in expected], rtol=0, atol=1e-12)
        assert np.isfinite(result.mean) or all(np.isnan(row[0]) for row in expected)


# --- real detections --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exam(shared_data: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    folder = shared_data / "voc07_test_eval"
    with np.load(folder / "voc_eval.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads((folder / "voc_expected.json").read_text())


def per_image(arrays: dict[str, Array], boxes: Array, scores: Array, truth: Array) -> tuple[list[Found], list[Truth]]:
    inner = np.arange(1, len(arrays["image_ids"]))
    order = np.argsort(arrays["det_img"], kind="stable")
    cuts = np.searchsorted(arrays["det_img"][order], inner)
    parts = [np.split(column[order], cuts) for column in (boxes, scores, arrays["det_cls"])]
    cuts = np.searchsorted(arrays["gt_img"], inner)
    truths = [np.split(column, cuts) for column in (truth, arrays["gt_cls"], arrays["gt_difficult"].astype(bool))]
    return [Found(*row) for row in zip(*parts, strict=True)], [Truth(*row) for row in zip(*truths, strict=True)]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("protocol", "last_pixel", "tolerance"),
    [("float_no_plus_one", 0, 1e-5), ("float_plus_one", 1, 1e-5), ("text_plus_one", 1, 3e-3)],
)
def test_voc_exam(
    exam: tuple[dict[str, Array], dict[str, Any]], protocol: str, last_pixel: int, tolerance: float
) -> None:
    """``last_pixel`` is 1 where the protocol's corners name the last pixel: the edge of the box is one further."""
    arrays, expected = exam
    truth = arrays["gt_box"].astype(np.float64)
    if protocol.startswith("text"):
        boxes = np.round(arrays["det_box"].astype(np.float64) + 1, 1)
        found, truths = per_image(arrays, boxes, np.round(arrays["det_score"].astype(np.float64), 3), truth)
    else:
        found, truths = per_image(arrays, arrays["det_box"], arrays["det_score"], truth - 1)
    for item in [*found, *truths]:
        item.boxes = item.boxes + np.array([0, 0, last_pixel, last_pixel])
    figures = expected["protocols"][protocol]
    for method, name in (("11-point", "11point"), ("area", "area")):
        result = voc_average_precision(
            found,
            truths,
            20,
            method=method,  # type: ignore[arg-type]
        )
        wanted = [figures[f"ap_{name}"][class_name] for class_name in expected["classes"]]
        np.testing.assert_allclose(result.average_precision, wanted, rtol=0, atol=tolerance)
        assert result.mean == pytest.approx(figures[f"map_{name}"], abs=tolerance)


# --- COCO -------------------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize("seed", range(4))
def test_coco_equals_pycocotools(
    shared_data: Path, pycocotools_numbers: Oracle, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    file = shared_data / "coco_tiny/annotations/instances_train2017.json"
    document = json.loads(file.read_text())
    category_ids = sorted(category["id"] for category in document["categories"])
    label_of = {category: label for label, category in enumerate(category_ids)}
    image_ids = [image["id"] for image in document["images"]]
    rng = np.random.default_rng(seed)
    found, truths, results = [], [], []
    for image_id in image_ids:
        objects = [item for item in document["annotations"] if item["image_id"] == image_id]
        boxes = np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([label_of[item["category_id"]] for item in objects], dtype=np.int64)
        truths.append(
            Truth(
                boxes.astype(np.float32),
                labels,
                crowd=np.array([item["iscrowd"] for item in objects], dtype=bool),
                areas=np.array([item["area"] for item in objects], dtype=np.float32),
            )
        )
        repeats = int(rng.integers(0, 4))
        near = np.repeat(boxes, repeats, axis=0)
        near = near + rng.normal(0, 0.08, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        near = near.astype(np.float32).astype(np.float64)
        own = np.repeat(labels, repeats)
        own = np.where(rng.random(len(own)) < 0.2, rng.integers(0, len(category_ids), len(own)), own)
        # Two decimals: ties between images, which both sides must break alike.
        scores = rng.random(len(own)).round(2)
        found.append(Found(near, scores, own))
        for box, score, label in zip(near.tolist(), scores.tolist(), own.tolist(), strict=True):
            x1, y1, x2, y2 = box
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
    assert any(truth.crowd.any() for truth in truths)
    result = coco_average_precision(found, truths, len(category_ids), image_ids=image_ids)
    assert capfd.readouterr().out == ""
    wanted = pycocotools_numbers(file, results)
    np.testing.assert_allclose([result.numbers[name] for name in COCO_NAMES], wanted, rtol=0, atol=1e-9)
    assert np.nanmean(result.average_precision) == pytest.approx(wanted[0], abs=1e-9)
    assert result.curves[result.positives > 0].mean() == pytest.approx(wanted[1], abs=1e-9)
    assert result.curves.shape == (80, 101)


def test_coco_by_hand() -> None:
    # One object of 40x40 (medium). The detection covers 33 of its 40 columns: IoU 0.825, a hit at the seven thresholds
    # 0.50, 0.55 ... 0.80 and a miss at 0.85, 0.90, 0.95, so AP = 7/10.
    truth, found = Truth([[0, 0, 40, 40]], [1]), Found([[0, 0, 33, 40]], [0.9], [1])
    result = coco_average_precision([found], [truth], 2)
    assert result.numbers["AP"] == result.numbers["APm"] == pytest.approx(0.7)
    assert result.numbers["AP50"] == result.numbers["AP75"] == pytest.approx(1)
    assert result.numbers["AR1"] == result.numbers["ARm"] == pytest.approx(0.7)
    assert result.numbers["APs"] == result.numbers["ARl"] == -1
    assert np.isnan(result.average_precision[0])
    assert result.average_precision[1] == pytest.approx(0.7)


def test_coco_nothing_found_is_zero() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 50, 50], [0, 0, 200, 200]]
    result = coco_average_precision([Found(), Found()], [Truth(boxes, [0, 0, 0]), Truth()], 1)
    assert list(result.numbers) == list(COCO_NAMES)
    assert set(result.numbers.values()) == {0.0}
    assert result.average_precision.tolist() == [0]


def test_coco_nothing_to_find_is_undefined() -> None:
    for found, truths in (([], []), ([Found([[0, 0, 9, 9]], [0.5], [0])], [Truth()])):
        result = coco_average_precision(found, truths, 1)
        assert set(result.numbers.values()) == {-1.0}
        assert np.isnan(result.average_precision).all()


@pytest.mark.parametrize("flag", ["crowd", "difficult"])
def test_coco_ignored_objects_swallow_detections(flag: str) -> None:
    truth = Truth([[0, 0, 40, 40], [100, 100, 140, 140]], [0, 0], **{flag: [False, True]})
    found = Found([[100, 100, 120, 120], [0, 0, 40, 40]], [0.9, 0.8], [0, 0])
    result = coco_average_precision([found], [truth], 1)
    assert result.numbers["AP"] == pytest.approx(1)
    assert result.positives.tolist() == [1]


def test_coco_refuses_repeated_ids() -> None:
    with pytest.raises(ValueError, match="distinct"):
        coco_average_precision([Found(), Found()], [Truth(), Truth()], 1, image_ids=[7, 7])
