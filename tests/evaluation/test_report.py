"""``evaluate`` with a detector that is told what to find, and what becomes of its report."""

from __future__ import annotations

import csv
import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from refinedet import decoding
from refinedet.config import ModelConfig
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset, Record
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation import evaluate as evaluate_module
from refinedet.evaluation import report as report_module
from refinedet.evaluation.evaluate import collect_detections, evaluate, evaluate_detections
from refinedet.evaluation.metrics import COCO_NAMES
from refinedet.evaluation.report import Report
from refinedet.evaluation.settings import LeftOut
from refinedet.files import write_text

FolderFactory = Callable[..., Path]
Oracle = Callable[[Path, list[dict[str, Any]]], npt.NDArray[np.float64]]
NAMES = ("lynx", "otter")
"""No classes of VOC: a data set that has only those gets all twenty by default."""


class ToldDetector:
    """Gives the answers it was told, in the order in which it is asked."""

    def __init__(self, answers: list[Detections], class_names: tuple[str, ...] = NAMES) -> None:
        self.class_names = class_names
        self.config = ModelConfig(num_classes=len(class_names))
        self.answers = list(answers)
        self.seen: list[npt.NDArray[np.uint8]] = []
        self.batches: list[int] = []
        self.thresholds: set[float | None] = set()

    def predict_arrays(
        self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        start = len(self.seen)
        self.seen += images
        self.batches.append(len(images))
        self.thresholds.add(threshold)
        return self.answers[start : start + len(images)]


def right_answers(dataset: DetectionDataset, shift: float = 0.0) -> list[Detections]:
    """Every object of every image, moved right by ``shift`` pixels, each with another score."""
    answers = []
    for index in range(len(dataset)):
        record = dataset[index]
        scores = 0.9 - 0.01 * index - 0.001 * np.arange(len(record.labels))
        boxes = record.boxes + np.array([shift, 0, shift, 0], dtype=np.float32)
        answers.append(
            Detections(
                boxes,
                scores.astype(np.float32),
                record.labels,
                dataset.class_names,
                (record.width, record.height),
            )
        )
    return answers


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_perfect_answers_score_one(voc_folder: FolderFactory, metric: Any) -> None:
    folder = voc_folder(images=6, class_names=NAMES)
    dataset = open_dataset(folder, "trainval")
    model = ToldDetector(right_answers(dataset))
    report = evaluate(model, folder, split="trainval", metric=metric, batch_size=4)
    assert report["mAP"] == pytest.approx(1)
    assert report.per_class == pytest.approx({"lynx": 1, "otter": 1})
    assert report.images == 6
    assert report.split == "trainval"
    assert report.data == folder.name
    assert report.metric == metric
    assert report.objects == {
        name: sum(int(((r.labels == label) & ~r.difficult).sum()) for r in dataset.records)
        for label, name in enumerate(NAMES)
    }
    assert set(report) == ({"mAP", *COCO_NAMES} if metric == "coco" else {"mAP"})
    assert report.settings.score_threshold == model.config.inference.score_threshold
    assert report.settings.model.backbone == "vgg16"
    # The images came in order, in batches, unspoilt.
    assert model.batches == [4, 2]
    for index, image in enumerate(model.seen):
        np.testing.assert_array_equal(image, dataset.load_image(index))


def test_wrong_answers_score_less(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval")
    assert evaluate(ToldDetector(right_answers(dataset, shift=200)), dataset)["mAP"] == 0
    nothing = [Detections.empty(NAMES, (r.width, r.height)) for r in dataset.records]
    for metric in ("voc07", "coco"):
        report = evaluate_detections(dataset, nothing, metric)
        assert report["mAP"] == 0


def test_coco_data_keeps_its_ids(coco_folder: FolderFactory, tmp_path: Path) -> None:
    dataset = open_dataset(coco_folder(images=6, class_names=NAMES), "val")
    report = evaluate(ToldDetector(right_answers(dataset)), dataset, metric="coco")
    assert report["mAP"] == report["AP"] == pytest.approx(1)
    results = json.loads((report.save(tmp_path / "report") / "detections.json").read_text())
    assert {item["image_id"] for item in results} == {r.image_id for r in dataset.records if len(r.labels)}
    assert {item["category_id"] for item in results} <= {3, 6}


@pytest.mark.shared_data
def test_saved_detections_give_pycocotools_the_same_numbers(
    shared_data: Path, pycocotools_numbers: Oracle, tmp_path: Path
) -> None:
    file = shared_data / "coco_tiny/annotations/instances_train2017.json"
    dataset = open_dataset(shared_data / "coco_tiny")
    rng = np.random.default_rng(0)
    answers = []
    for record in dataset.records:
        boxes = record.boxes + rng.normal(0, 4, record.boxes.shape).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = rng.random(len(boxes)).astype(np.float32)
        answers.append(Detections(boxes, scores, record.labels, dataset.class_names, (record.width, record.height)))
    report = evaluate_detections(dataset, answers, "coco")
    report.save(tmp_path)
    wanted = pycocotools_numbers(file, json.loads((tmp_path / "detections.json").read_text()))
    np.testing.assert_allclose([report[name] for name in COCO_NAMES], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("metric", ["voc07", "coco"])
def test_report_json_round_trip(voc_folder: FolderFactory, tmp_path: Path, metric: Any) -> None:
    names = ("lynx", "otter", "unicorn")
    dataset = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval", class_names=names)
    report = evaluate(ToldDetector(right_answers(dataset, shift=3), names), dataset, metric=metric)
    folder = report.save(tmp_path / "deep" / "report")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert saved == {"generator": "report written by refinedet", **report.to_dict()}
    assert saved["per_class"]["unicorn"] is None
    assert saved["figures"]["mAP"] == report["mAP"]
    assert saved["settings"]["model"]["image_size"] == [320, 320]
    assert len(saved["curves"]["recall"]) == 101
    assert set(saved["curves"]["precision"]) == {"lynx", "otter"}
    assert all(len(curve) == 101 for curve in saved["curves"]["precision"].values())
    results = json.loads((folder / "detections.json").read_text())
    assert len(results) == sum(len(r.labels) for r in dataset.records)
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(names)
    assert rows[2]["AP"] == ""
    assert float(rows[0]["AP"]) == report.per_class["lynx"]
    # A second report takes the place of the first.
    report.save(folder)


def test_no_detections_at_all_saves_an_empty_list(voc_folder: FolderFactory, tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    nothing = [Detections.empty(NAMES, (r.width, r.height)) for r in dataset.records]
    evaluate_detections(dataset, nothing).save(tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == []


@pytest.mark.parametrize("written", [1, 2])
def test_a_report_that_was_left_incomplete_can_be_written_again(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    names: list[str] = []

    def write(path: Path, text: str) -> None:
        if len(names) == written:
            raise RefineDetError("disk full")
        names.append(path.name)
        write_text(path, text)

    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    report = evaluate_detections(dataset, right_answers(dataset))
    monkeypatch.setattr(report_module, "write_text", write)
    with pytest.raises(RefineDetError, match="disk full"):
        report.save(tmp_path / "report")
    assert len(names) == written
    report_module.check_report_folder(tmp_path / "report")


def test_report_cannot_be_written(voc_folder: FolderFactory, tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    report = evaluate_detections(dataset, right_answers(dataset))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RefineDetError, match=r"file.*cannot be made") as caught:
        report.save(blocked)
    assert "\n" not in str(caught.value)


def test_table_is_aligned(voc_folder: FolderFactory) -> None:
    names = ("lynx", "otter", "unicorn")
    dataset = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval", class_names=names)
    table = evaluate_detections(dataset, right_answers(dataset)).table()
    lines = table.splitlines()
    assert lines[0].split() == ["class", "objects", "AP", "%"]
    assert lines[1].split()[0] == "lynx"
    assert lines[1].endswith("100.00")
    assert lines[3].split() == ["unicorn", "0", "n/a"]
    assert lines[4].split()[0] == "mean"
    assert "VOC 2007 11-point AP, IoU 0.5; 6 images of voc trainval" in lines[4]
    assert len({len(line) for line in lines[:4]}) == 1
    coco = evaluate_detections(dataset, right_answers(dataset), "coco").table()
    assert "AP75 100.00" in coco
    assert coco.splitlines()[-1].startswith("AR1 ")


def test_shares_of_processes_add_up(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval")
    answers = right_answers(dataset, shift=4)
    shares: dict[int, Detections] = {}
    for rank in (1, 0):
        mine = range(rank, len(dataset), 2)
        shares |= collect_detections(ToldDetector([answers[i] for i in mine]), dataset, mine, batch_size=2)
    whole = evaluate(ToldDetector(answers), dataset)
    merged = evaluate_detections(dataset, shares, settings=whole.settings)
    assert merged.to_dict() == whole.to_dict()


def test_limit_and_progress(voc_folder: FolderFactory, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval")
    calls: list[tuple[int, int]] = []
    model = ToldDetector(right_answers(dataset))
    report = evaluate(
        model,
        dataset,
        limit=5,
        batch_size=2,
        threshold=0.3,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert report.images == 5
    assert report.settings.limit == 5
    assert report.settings.score_threshold == 0.3
    assert model.thresholds == {0.3}
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert evaluate(ToldDetector(right_answers(dataset)), dataset, limit=100).images == 6
    assert capsys.readouterr().out == ""


def test_no_object_is_an_error(voc_folder: FolderFactory) -> None:
    folder = voc_folder(images=4, class_names=NAMES, splits={"empty": [3]})  # Scene 3 has no objects.
    with pytest.raises(RefineDetError, match="no object to evaluate against in 1 image of split 'empty'") as caught:
        evaluate(ToldDetector([]), open_dataset(folder, "empty", class_names=NAMES))
    assert str(folder) in str(caught.value)
    dataset = open_dataset(folder, "empty", class_names=NAMES)
    with pytest.raises(RefineDetError, match="no object"):
        evaluate_detections(dataset, [Detections.empty(NAMES, (96, 64))], "coco")


def test_more_than_half_repaired_is_an_error(voc_folder: FolderFactory, caplog: pytest.LogCaptureFixture) -> None:
    folder = voc_folder(images=6, class_names=NAMES)
    dataset = open_dataset(folder, "trainval", class_names=NAMES)
    objects = sum(len(record.labels) for record in dataset.records)
    stated = {path: path.read_text() for path in sorted((folder / "Annotations").iterdir())}

    def write_with_swapped_sides(count: int) -> None:
        left = itertools.count()

        def swap(match: re.Match[str]) -> str:
            return f"<xmin>{match[3]}</xmin>{match[2]}<xmax>{match[1]}</xmax>" if next(left) < count else match[0]

        for path, text in stated.items():
            path.write_text(re.sub(r"<xmin>(.*?)</xmin>(.*?)<xmax>(.*?)</xmax>", swap, text))

    write_with_swapped_sides(objects // 2)
    half = open_dataset(folder, "trainval", class_names=NAMES)
    assert evaluate(ToldDetector(right_answers(half), NAMES), folder, split="trainval").images == 6
    assert f"{objects // 2} boxes with swapped corners dropped" in caplog.text
    write_with_swapped_sides(objects // 2 + 1)
    with pytest.raises(RefineDetError, match=f"{objects // 2 + 1} of {objects} objects had to be repaired or left out"):
        evaluate(ToldDetector([], NAMES), folder, split="trainval")


def test_only_ignored_objects_is_an_error(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    hard = [replace(record, difficult=np.ones(len(record.labels), dtype=bool)) for record in dataset.records]
    with pytest.raises(RefineDetError, match="no object"):
        evaluate_detections(replace(dataset, records=hard), right_answers(dataset))


def test_strange_classes_name_both_lists(voc_folder: FolderFactory, coco_folder: FolderFactory) -> None:
    for folder, split in (
        (voc_folder(images=4, class_names=NAMES), "trainval"),
        (coco_folder(images=4, class_names=NAMES), "val"),
    ):
        for data in (folder, open_dataset(folder, split)):
            with pytest.raises(RefineDetError) as caught:
                evaluate(ToldDetector([], ("lynx", "horse", "sheep")), data, split=split)
            message = str(caught.value)
            assert str(folder) in message
            assert "the model has 3 classes (horse, sheep, lynx), the data has 2 classes (otter, lynx)" in message
            assert "evaluate a model that was trained on the classes of the data" in message
            assert "\n" not in message


def test_same_classes_in_another_order(voc_folder: FolderFactory) -> None:
    folder = voc_folder(images=4, class_names=NAMES)
    backwards = ("otter", "lynx")
    with pytest.raises(RefineDetError, match=r"class_names=model\.class_names"):
        evaluate(ToldDetector([], backwards), open_dataset(folder, "trainval"))
    with pytest.raises(RefineDetError, match=r"class_names=model\.class_names"):
        evaluate(ToldDetector([]), open_dataset(folder, "trainval", class_names=(*NAMES, "unicorn")))
    dataset = open_dataset(folder, "trainval", class_names=backwards)
    assert evaluate(ToldDetector(right_answers(dataset), backwards), folder, split="trainval")["mAP"] == 1


@pytest.mark.parametrize("metric", ["voc07", "coco"])
def test_shared_classes(coco_folder: FolderFactory, tmp_path: Path, metric: Any) -> None:
    """Data of lynx, airplane and heron, a model of TV, aeroplane and Lynx: aeroplane and lynx count."""
    names = ("lynx", "airplane", "heron")
    folder = coco_folder(images=6, class_names=names)
    dataset = open_dataset(folder, "train+val")
    model_names = ("tv", "aeroplane", "Lynx")
    to_model = np.array([2, 1, 0])  # It takes herons for television sets.
    answers = [
        replace(found, labels=to_model[found.labels], class_names=model_names) for found in right_answers(dataset)
    ]
    model = ToldDetector(answers, model_names)
    with pytest.raises(RefineDetError, match="the model has 3 classes"):
        evaluate(model, folder, split="train+val", metric=metric)
    report = evaluate(model, folder, split="train+val", metric=metric, shared_classes=True)
    assert report.per_class == {"airplane": 1, "lynx": 1}
    counting = [names[label] for r in dataset.records for label in r.labels[~r.crowd]]
    assert report.objects == {name: counting.count(name) for name in ("airplane", "lynx")}
    assert counting.count("heron") > 0
    assert report.settings.left_out == LeftOut(("tv",), ("heron",))
    assert "share: 2; left out: 1 of the model, 1 of the data" in report.table()
    results = json.loads((report.save(tmp_path / "report") / "detections.json").read_text())
    assert len(results) == sum(int((r.labels != 2).sum()) for r in dataset.records)
    assert {item["category_id"] for item in results} == {3, 6}

    # An object that the model takes for another shared class is an error of both.
    swapped = [replace(found, labels=np.array([0, 2, 1])[found.labels]) for found in answers]
    assert evaluate(ToldDetector(swapped, model_names), dataset, metric=metric, shared_classes=True)["mAP"] < 0.3


def test_shared_classes_where_there_are_none(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    with pytest.raises(RefineDetError, match=r"model has 1 class \(horse\), the data has 2 .* they share none"):
        evaluate(ToldDetector([], ("horse",)), dataset, shared_classes=True)


def test_shared_classes_of_equal_ones_change_nothing(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(images=6, class_names=NAMES), "trainval")
    answers = right_answers(dataset, shift=12)
    plain = evaluate(ToldDetector(answers), dataset)
    shared = evaluate(ToldDetector(answers), dataset, shared_classes=True)
    assert shared.per_class == plain.per_class
    assert "left out" not in plain.table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "voc7"}, "unknown metric 'voc7': must be one of voc07, voc, coco"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_wrong_calls(voc_folder: FolderFactory, arguments: dict[str, Any], message: str) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    with pytest.raises(UsageError, match=message):
        evaluate(ToldDetector(right_answers(dataset)), dataset, **arguments)


def test_detections_must_fit_the_data(voc_folder: FolderFactory, tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    answers = right_answers(dataset)
    with pytest.raises(UsageError, match="2 images but detections of 1"):
        evaluate_detections(dataset, answers[:1])
    with pytest.raises(UsageError, match="detections of image 7"):
        evaluate_detections(dataset, {7: answers[0]})
    with pytest.raises(UsageError, match="nowhere"):
        evaluate(ToldDetector([]), tmp_path / "nowhere")


def test_broken_image_ends_in_its_name(voc_folder: FolderFactory) -> None:
    folder = voc_folder(images=6, class_names=NAMES)
    dataset = open_dataset(folder, "trainval")
    broken = folder / "JPEGImages" / "000004.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(RefineDetError, match=r"000004\.jpg"):
        evaluate(ToldDetector(right_answers(dataset)), dataset, batch_size=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


class CountingDataset(DetectionDataset):
    """Made of blank images; remembers how many were loaded."""

    loaded = 0

    def load_image(self, index: int) -> npt.NDArray[np.uint8]:
        self.loaded += 1
        return np.full((8, 8, 3), index, dtype=np.uint8)


def test_decoding_stays_a_few_batches_ahead() -> None:
    record = Record(
        image_path=Path("none.jpg"),
        image_id="none",
        width=8,
        height=8,
        boxes=np.array([[0, 0, 8, 8]], dtype=np.float32),
        labels=np.zeros(1, dtype=np.int64),
        difficult=np.zeros(1, dtype=bool),
        crowd=np.zeros(1, dtype=bool),
        areas=np.array([64], dtype=np.float32),
    )
    dataset = CountingDataset([record] * 200, ("thing",), "voc", None, Path("nowhere"))
    most_ahead = 0

    class SlowDetector(ToldDetector):
        def predict_arrays(
            self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
        ) -> list[Detections]:
            nonlocal most_ahead
            time.sleep(0.001)
            most_ahead = max(most_ahead, dataset.loaded - len(self.seen))
            return super().predict_arrays(images, threshold=threshold)

    answers = [Detections([[0, 0, 8, 8]], [0.5], [0], ("thing",), (8, 8))] * 200  # type: ignore[arg-type]
    model = SlowDetector(answers, ("thing",))
    report = evaluate(model, dataset, batch_size=4, threads=3)
    assert report["mAP"] == 1
    assert [int(image[0, 0, 0]) for image in model.seen] == list(range(200))
    assert most_ahead <= 4 + 2 * 4


def test_large_images_are_held_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels held are bounded, not images: batches shrink, and none is decoded ahead."""
    monkeypatch.setattr(decoding, "PIXELS_AHEAD", 100)
    one = Record(
        Path("none.jpg"), "none", 8, 8, np.array([[0, 0, 8, 8]], np.float32), np.zeros(1, np.int64),
        np.zeros(1, bool), np.zeros(1, bool), np.array([64], np.float32),
    )  # fmt: skip
    dataset = CountingDataset([one] * 20, ("thing",), "voc", None, Path("nowhere"))
    answers = [Detections([[0, 0, 8, 8]], [0.5], [0], ("thing",), (8, 8))] * 20  # type: ignore[arg-type]
    most = 0

    class Watcher(ToldDetector):
        def predict_arrays(
            self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
        ) -> list[Detections]:
            nonlocal most
            most = max(most, dataset.loaded - len(self.seen))
            return super().predict_arrays(images, threshold=threshold)

    model = Watcher(answers, ("thing",))
    assert evaluate(model, dataset, batch_size=8)["mAP"] == 1
    assert set(model.batches) == {1}
    assert most == 1
    assert [int(image[0, 0, 0]) for image in model.seen] == list(range(20))


def test_report_is_a_mapping_without_torch(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(images=2, class_names=NAMES), "trainval")
    report = evaluate_detections(dataset, right_answers(dataset))
    assert isinstance(report, Report)
    assert dict(report) == {"mAP": report["mAP"]}
    assert "torch" not in vars(evaluate_module)
