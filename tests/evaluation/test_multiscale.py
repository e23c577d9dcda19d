"""Multi-scale testing against its table, slow loops, and a detector whose answers can be foreseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet import RefineDet, cli, evaluate
from refinedet.config import InferenceConfig, ModelConfig
from refinedet.data import open_dataset
from refinedet.detections import Detections
from refinedet.errors import UsageError
from refinedet.evaluation import multiscale
from refinedet.evaluation.multiscale import MultiScale, Pass, passes, vote
from refinedet.model.soft_nms import linear_soft_nms

FolderFactory = Callable[..., Path]
Array = npt.NDArray[Any]
NAMES = ("lynx", "otter")
TINY = ModelConfig(backbone="resnet18", tcb_channels=8, tcb_batch_norm=True, num_classes=2)

# Which passes ---------------------------------------------------------------------------------------------------------

# Side(s) of the input and which boxes count, as the official code's functions read from top to bottom.
ALL = (None, None)
TABLES: dict[tuple[int, str], dict[tuple[int, int], tuple[float | None, float | None]]] = {
    (320, "voc"): {
        (320, 320): ALL,
        (320, 192): ALL,
        (192, 192): (32, None),
        (384, 384): (None, 160),
        (448, 448): (None, 128),
        (512, 512): (None, 96),
        (576, 576): (None, 64),
        (704, 704): (None, 32),
    },
    (512, "voc"): {
        (512, 512): ALL,
        (512, 384): ALL,
        (256, 256): ALL,
        (384, 384): ALL,
        (768, 768): (None, 192),
        (896, 896): (None, 128),
    },
}
TABLES[320, "coco"] = {**TABLES[320, "voc"], (640, 640): (None, 48)}
TABLES[512, "coco"] = {
    **TABLES[512, "voc"],
    (640, 640): (None, 224),
    (1024, 1024): (None, 96),
    (1152, 1152): (None, 64),
}


@pytest.mark.parametrize(
    ("side", "form", "count"), [(320, "voc", 16), (320, "coco", 18), (512, "voc", 12), (512, "coco", 18)]
)
def test_passes_are_the_official_ones(side: int, form: Any, count: int) -> None:
    plan = passes((side, side), form)
    assert len(plan) == len(set(plan)) == count
    wanted = {
        Pass(long, short, flip, *limits)
        for (long, short), limits in TABLES[side, form].items()
        for flip in (False, True)
    }
    assert set(plan) == wanted
    assert plan[0] == Pass(side, side)
    assert all(one.long % 64 == 0 and one.short % 64 == 0 for one in plan)
    assert str(plan[3]) == f"{side}x{192 if side == 320 else 384} flipped"


@pytest.mark.parametrize("size", [(128, 128), (320, 512), (512, 320), (1024, 1024)])
def test_other_sizes_have_no_passes(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"320x320 and 512x512 pixels, not {size[1]}x{size[0]}") as caught:
        passes(size, "voc")
    assert "\n" not in str(caught.value)


def test_the_ratio_pass_follows_the_image() -> None:
    ratio = Pass(320, 192)
    assert ratio.size((500, 375)) == (192, 320)
    assert ratio.size((375, 500)) == (320, 192)
    assert ratio.size((400, 400)) == (320, 192)  # the official code asks whether the height is less
    assert Pass(384, 384).size((500, 375)) == (384, 384)


def test_sizes_are_those_of_the_official_code_with_its_plus_one() -> None:
    # Inclusive pixels 10..41 are 32 wide (41 - 10 + 1): edges 10 and 42.
    def box(width: float, height: float) -> Array:
        return np.array([[10, 20, 10 + width, 20 + height]], dtype=np.float32)

    large, small = Pass(192, 192, longest_above=32), Pass(704, 704, shortest_below=32)
    assert [bool(large.counts(box(w, h))[0]) for w, h in ((32, 32), (33, 5), (5, 33))] == [False, True, True]
    assert [bool(small.counts(box(w, h))[0]) for w, h in ((32, 32), (31, 300), (300, 31))] == [False, True, True]
    assert Pass(320, 320).counts(box(1, 1)).all()
    assert large.counts(np.zeros((0, 4), np.float32)).shape == (0,)


# The vote -------------------------------------------------------------------------------------------------------------


def overlap(a: Array, b: Array) -> float:
    """IoU of two boxes in inclusive pixels with the official +1; ours are edges, one larger at the right and bottom."""
    ax2, ay2, bx2, by2 = a[2] - 1, a[3] - 1, b[2] - 1, b[3] - 1
    width = max(0.0, min(ax2, bx2) - max(a[0], b[0]) + 1)
    height = max(0.0, min(ay2, by2) - max(a[1], b[1]) + 1)
    areas = (ax2 - a[0] + 1) * (ay2 - a[1] + 1) + (bx2 - b[0] + 1) * (by2 - b[1] + 1)
    return width * height / (areas - width * height)


def slow_vote(boxes: Array, scores: Array, soft_threshold: float | None) -> list[tuple[float, list[float]]]:
    """(score, box), one box at a time."""
    rest = sorted(range(len(scores)), key=lambda i: -scores[i])
    result: list[tuple[float, list[float]]] = []
    while rest:
        best = rest[0]
        cluster = [i for i in rest if overlap(boxes[best], boxes[i]) >= 0.45]
        rest = [i for i in rest if i not in cluster]
        if len(cluster) == 1:
            result.append((scores[best], list(boxes[best])))
            continue
        if soft_threshold is not None:
            for i in cluster:
                softened = scores[i] * (1 - overlap(boxes[best], boxes[i]))
                if i != best and softened >= soft_threshold:
                    result.append((softened, list(boxes[i])))
        total = sum(scores[i] for i in cluster)
        mean = [sum(scores[i] * boxes[i][side] for i in cluster) / total for side in range(4)]
        result.append((scores[best], mean))
    return sorted(result, key=lambda item: -item[0])


def boxes_and_scores(count: int, seed: int) -> tuple[Array, Array]:
    """Boxes in bunches, so that there is something to merge; scores with ties."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(20, 80, (4, 2))[rng.integers(0, 4, count)] + rng.normal(0, 3, (count, 2))
    half = rng.uniform(5, 20, (4, 2))[rng.integers(0, 4, count)] + rng.uniform(0, 4, (count, 2))
    boxes = np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)
    return boxes, (rng.integers(2, 100, count) / 100).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40), st.integers(0, 10_000), st.sampled_from([None, 0.01, 0.3]))
def test_vote_equals_the_loop(count: int, seed: int, soft_threshold: float | None) -> None:
    boxes, scores = boxes_and_scores(count, seed)
    voted, best = vote(boxes, scores, soft_threshold=soft_threshold)
    wanted = slow_vote(boxes.astype(np.float64), scores.astype(np.float64), soft_threshold)
    assert voted.dtype == best.dtype == np.float32
    assert len(voted) == len(best) == len(wanted)
    assert (np.diff(best) <= 0).all()
    np.testing.assert_allclose(best, [score for score, _ in wanted], atol=1e-6)
    # Equal scores may come in either order.
    key = np.lexsort((*voted.T, np.round(best, 5)))
    reference = np.array([box for _, box in wanted]).reshape(-1, 4)
    other = np.lexsort((*reference.T.astype(np.float32), np.round([score for score, _ in wanted], 5)))
    np.testing.assert_allclose(voted[key], reference[other], atol=1e-3)


def test_vote_by_hand() -> None:
    boxes = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]], dtype=np.float32)
    scores = np.array([0.6, 0.2, 0.9], dtype=np.float32)
    voted, best = vote(boxes, scores)
    np.testing.assert_allclose(voted, [[50, 50, 60, 60], [0.5, 0, 10.5, 10]], rtol=1e-6)
    np.testing.assert_allclose(best, [0.9, 0.6])
    voted, best = vote(boxes, scores, soft_threshold=0.01)  # they overlap by 80 / 120
    np.testing.assert_allclose(voted[2], boxes[1])
    np.testing.assert_allclose(best, [0.9, 0.6, 0.2 / 3], rtol=1e-6)
    assert len(vote(boxes, scores, soft_threshold=0.07)[1]) == 2
    assert len(vote(boxes, scores, soft_threshold=0.0)[1]) == 3  # the best itself is not softened to 0


def test_vote_without_area_ends() -> None:
    boxes = np.array([[5, 5, 5, 9], [5, 5, 5, 9], [0, 0, 9, 9]], dtype=np.float32)
    voted, best = vote(boxes, np.array([0.9, 0.8, 0.7], np.float32))
    np.testing.assert_array_equal(voted, boxes)
    assert len(best) == 3
    assert vote(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))[0].shape == (0, 4)


# Passes over images -------------------------------------------------------------------------------------------------


class Finder:
    """Finds the bright rectangle of an image exactly, at every size; notes what it was asked."""

    class_names = NAMES

    def __init__(self, side: int = 320) -> None:
        self.config = replace(TINY, image_size=(side, side))
        self.calls: list[tuple[tuple[int, int] | None, int]] = []
        self.only_at: tuple[int, int] | None = None

    def predict_arrays(
        self,
        images: list[Array],
        *,
        threshold: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Detections]:
        self.calls.append((size, len(images)))
        assert self.config.inference.soft_nms_iou is None
        if self.only_at not in (None, size):
            return [Detections.empty(NAMES, (image.shape[1], image.shape[0])) for image in images]
        return [self._find(image) for image in images]

    def _find(self, image: Array) -> Detections:
        rows, columns = np.nonzero(image[:, :, 0] > 100)
        size = (image.shape[1], image.shape[0])
        if not len(rows):
            return Detections.empty(NAMES, size)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        label = int(image[:, :, 1].max() > 100)
        return Detections(np.array([box]), np.array([0.8]), np.array([label]), NAMES, size)


def make_image(size: tuple[int, int], box: tuple[int, int, int, int], label: int = 0) -> Array:
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    image[box[1] : box[3], box[0] : box[2], : label + 1] = 255
    return image


@pytest.mark.parametrize("form", ["voc", "coco"])
@pytest.mark.parametrize("side", [320, 512])
def test_mirrored_passes_come_back_in_place(side: int, form: Any) -> None:
    sizes = [(500, 375), (375, 500), (301, 301)]
    boxes = [(3, 5, 103, 300), (200, 17, 375, 35), (1, 2, 12, 14)]
    model = Finder(side)
    found = MultiScale(model, form).predict_arrays(
        [make_image(s, b, label % 2) for label, (s, b) in enumerate(zip(sizes, boxes, strict=True))]
    )
    for label, (one, size, box) in enumerate(zip(found, sizes, boxes, strict=True)):
        assert one.image_size == size
        # All passes say the same, so one box is left; in COCO's form copies softened by overlap 1 vanish.
        np.testing.assert_allclose(one.boxes, [box], atol=1e-3)
        np.testing.assert_allclose(one.scores, [0.8])
        assert one.labels.tolist() == [label % 2]


def test_runs_are_batched_by_size_within_a_pixel_budget() -> None:
    model = Finder()
    images = [make_image((500, 375), (3, 5, 103, 300))] * 3 + [make_image((375, 500), (3, 5, 103, 300))]
    MultiScale(model, "voc", batch_size=4).predict_arrays(images)
    runs: dict[Any, list[int]] = {}
    for size, count in model.calls:
        runs.setdefault(size, []).append(count)
        assert size is not None
        assert count == 1 or count * size[0] * size[1] <= 4 * 320 * 320
    assert {size: sum(counts) for size, counts in runs.items()} == {
        **{(s, s): 8 for s in (192, 320, 384, 448, 512, 576, 704)},
        (192, 320): 6,
        (320, 192): 2,
    }
    assert runs[320, 320] == [4, 4]
    assert runs[192, 192] == [8]
    assert runs[192, 320] == [6]
    assert runs[704, 704] == [1] * 8


def test_filters_drop_what_a_pass_may_not_say() -> None:
    """A detector that sees its box only at one input size."""
    size = (500, 375)
    for long, short, box, kept in (
        (192, 192, (10, 10, 42, 42), False),
        (192, 192, (10, 10, 43, 20), True),
        (384, 384, (10, 10, 170, 170), False),
        (384, 384, (10, 10, 169, 370), True),
        (704, 704, (10, 10, 42, 42), False),
        (704, 704, (10, 10, 41, 200), True),
        (320, 192, (10, 10, 490, 370), True),
    ):
        model = Finder()
        model.only_at = Pass(long, short).size(size)
        (found,) = MultiScale(model, "voc").predict_arrays([make_image(size, box)])
        assert len(found) == int(kept), (long, short, box)


def test_classes_do_not_vote_for_each_other_and_the_threshold_comes_last() -> None:
    class TwoClasses(Finder):
        def _find(self, image: Array) -> Detections:
            size = (image.shape[1], image.shape[0])
            boxes = np.array([[10, 10, 490, 370], [10, 10, 490, 370]])
            return Detections(boxes, np.array([0.3, 0.8]), np.array([0, 1]), NAMES, size)

    image = make_image((500, 375), (0, 0, 9, 9))
    (found,) = MultiScale(TwoClasses(), "voc").predict_arrays([image])
    assert found.labels.tolist() == [1, 0]
    (found,) = MultiScale(TwoClasses(), "voc").predict_arrays([image], threshold=0.5)
    assert found.labels.tolist() == [1]
    blank = np.zeros((375, 500, 3), np.uint8)
    assert [len(one) for one in MultiScale(Finder(), "coco").predict_arrays([blank])] == [0]
    assert MultiScale(Finder(), "coco").predict_arrays([]) == []


# Soft-NMS -------------------------------------------------------------------------------------------------------------


def slow_soft_nms(boxes: Array, scores: Array, labels: Array, iou: float, threshold: float) -> dict[int, float]:
    """Index of each box that stays to its new score, one box at a time."""
    stays: dict[int, float] = {}
    for label in set(labels.tolist()):
        rest = {i: float(scores[i]) for i in range(len(scores)) if labels[i] == label}
        while rest:
            best = min(rest, key=lambda i: (-rest[i], i))
            stays[best] = rest.pop(best)
            for i in list(rest):
                shared = overlap(boxes[best], boxes[i])
                if shared > iou:
                    rest[i] *= 1 - shared
                if rest[i] < threshold:
                    del rest[i]
    return stays


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40), st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_soft_nms_equals_the_loop(count: int, seed: int, iou: float) -> None:
    boxes, scores = boxes_and_scores(count, seed)
    labels = np.random.default_rng(seed).integers(0, 2, count)
    order, lowered = linear_soft_nms(boxes, scores, labels, iou=iou, score_threshold=0.01)
    wanted = slow_soft_nms(boxes.astype(np.float64), scores, labels, iou, 0.01)
    assert dict(zip(order.tolist(), lowered.tolist(), strict=True)) == pytest.approx(wanted, abs=1e-6)
    assert len(order) == len(wanted)
    assert (np.diff(lowered) <= 0).all()
    if iou == 1.0:
        assert len(order) == count


def tiny(side: int = 320, **inference: Any) -> RefineDet:
    torch.manual_seed(0)
    settings = InferenceConfig(**{"max_detections": 30, **inference})
    return RefineDet(replace(TINY, image_size=(side, side), inference=settings), NAMES)


def test_soft_nms_of_the_config_reaches_the_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    (plain,) = tiny(128).predict_arrays([image])
    soft = tiny(128, soft_nms_iou=0.3)
    (lowered,) = soft.predict_arrays([image])
    order, scores = linear_soft_nms(plain.boxes, plain.scores, plain.labels, iou=0.3, score_threshold=0.01)
    np.testing.assert_array_equal(lowered.boxes, plain.boxes[order])
    np.testing.assert_array_equal(lowered.scores, scores)
    assert lowered.scores.sum() < plain.scores.sum()
    # Several scales end in a vote instead: what the passes find is not softened before it.
    monkeypatch.setattr(multiscale, "passes", lambda size, form: [Pass(128, 128)])
    (voted,), (wanted,) = (MultiScale(model, "voc").predict_arrays([image]) for model in (soft, tiny(128)))
    np.testing.assert_array_equal(voted.scores, wanted.scores)
    np.testing.assert_array_equal(soft.predict_arrays([image])[0].scores, scores)
    with pytest.raises(UsageError, match="soft_nms_iou"):
        InferenceConfig(soft_nms_iou=1.5)


# With a network -------------------------------------------------------------------------------------------------------


def test_a_network_runs_at_another_size() -> None:
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    model = tiny(128)
    (own,) = model.predict_arrays([image])
    (same,) = model.predict_arrays([image], size=(128, 128))
    np.testing.assert_array_equal(own.boxes, same.boxes)
    # A model of that size in its config is the same network: anchors keep their pixels.
    (other,) = model.predict_arrays([image], size=(64, 192))
    built = RefineDet(replace(model.config, image_size=(64, 192)), NAMES, network=model.network)
    (wanted,) = built.predict_arrays([image])
    np.testing.assert_array_equal(other.boxes, wanted.boxes)
    np.testing.assert_array_equal(other.scores, wanted.scores)
    assert (other.boxes <= [120, 90, 120, 90]).all()
    with pytest.raises(UsageError, match="two multiples of 64"):
        model.predict_arrays([image], size=(100, 128))


def test_evaluate_at_several_scales(voc_folder: FolderFactory) -> None:
    data = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval")
    report = evaluate(Finder(), data, multi_scale=True)
    assert report.settings.multi_scale is True
    assert len(report.settings.passes) == 16
    assert report.settings.seconds_per_image > 0
    assert "VOC 2007 11-point AP, IoU 0.5, multi-scale; 6 images of voc trainval" in report.table()
    assert len(evaluate(Finder(512), data, "trainval", "coco", multi_scale=True).settings.passes) == 18
    with pytest.raises(UsageError, match="320x320 and 512x512 pixels, not 128x128"):
        evaluate(Finder(128), data, multi_scale=True)


@pytest.mark.slow
def test_evaluate_a_network_at_several_scales(voc_folder: FolderFactory) -> None:
    data = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    model = tiny()
    report = evaluate(model, data, multi_scale=True, limit=1)
    # Other batches, the same answers.
    (alone,) = MultiScale(model, "voc", batch_size=1).predict_arrays([data.load_image(0)])
    np.testing.assert_allclose(report.detections[0].scores, alone.scores, atol=1e-5)
    single = evaluate(model, data, limit=1)
    assert single.settings.multi_scale is False
    assert single.settings.passes == ()
    assert single.settings.seconds_per_image > 0


def run_command(data: Path, folder: Path, metric: str) -> str:
    command = ["evaluate", str(folder / "model"), str(data), "--split", "val", "--metric", metric, "--limit", "1"]
    assert cli.main([*command, "--multi-scale", "--report", str(folder / "report")]) == 0
    saved: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    assert saved["settings"]["multi_scale"] is True
    return ", ".join(saved["settings"]["passes"])


def test_command_line_with_small_passes(
    coco_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way with a real network, at sizes that take no time."""
    forms = []

    def few(size: tuple[int, int], form: str) -> list[Pass]:
        forms.append(form)
        return [Pass(64, 64), Pass(128, 64, flip=True), Pass(128, 128, shortest_below=30)]

    monkeypatch.setattr(multiscale, "passes", few)
    tiny(64).save_pretrained(tmp_path / "model")
    data = coco_folder(images=6, class_names=NAMES)
    for metric in ("voc07", "coco"):
        assert run_command(data, tmp_path, metric) == "64x64, 128x64 flipped, 128x128"
        output = capsys.readouterr().out
        assert "multi-scale; 1 image of coco val" in output
        assert "s per image" in output
    assert forms == ["voc", "coco"]
    assert cli.main(["evaluate", str(tmp_path / "model"), str(data), "--split", "val"]) == 0
    assert "multi-scale" not in capsys.readouterr().out


def test_command_line_refuses_other_sizes(
    coco_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(64).save_pretrained(tmp_path / "model")
    data = coco_folder(images=6, class_names=NAMES)
    assert cli.main(["evaluate", str(tmp_path / "model"), str(data), "--split", "val", "--multi-scale"]) == 2
    assert "models of 320x320 and 512x512 pixels, not 64x64" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "count"), [("voc07", 16), ("coco", 18)])
def test_command_line_at_several_scales(metric: str, count: int, coco_folder: FolderFactory, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    assert run_command(coco_folder(images=2, class_names=NAMES), tmp_path, metric).count(",") == count - 1
