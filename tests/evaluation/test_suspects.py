"""Planted label errors are found, and nothing else is suspected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.evaluation.test_page import read

from conftest import FolderFactory
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset, Record
from refinedet.detections import Detections
from refinedet.detector import RefineDet
from refinedet.evaluation.evaluate import collect_detections, evaluate_detections
from refinedet.evaluation.gallery import MISSED, SUSPECTS, WRONG
from refinedet.evaluation.page import write_page
from refinedet.evaluation.report import Report
from refinedet.evaluation.suspects import MOST
from refinedet.evaluation.suspects import _iou as overlap

NAMES = ("lynx", "otter")


@pytest.fixture
def true_data(voc_folder: FolderFactory) -> DetectionDataset:
    """Sixty images; every object of it is really there."""
    return open_dataset(voc_folder(images=60, size=(320, 240), class_names=NAMES), "trainval", NAMES)


def seen(data: DetectionDataset, score: float = 0.95) -> list[Detections]:
    """A detector that sees what is really there, a little off, surer of earlier images."""
    found = []
    for number, record in enumerate(data.records):
        scores = np.full(len(record.labels), score - 0.003 * number, np.float32)
        boxes = np.clip(record.boxes + np.float32(1.5), 0, [record.width, record.height] * 2)
        found.append(Detections(boxes, scores, record.labels, NAMES, (record.width, record.height)))
    return found


def alone(record: Record, row: int) -> bool:
    """Whether no other object is near an object, so that it is clear which annotation an error belongs to."""
    x1, y1, x2, y2 = record.boxes[row]
    others = np.delete(record.boxes, row, axis=0)
    apart = (others[:, 0] > x2) | (others[:, 2] < x1) | (others[:, 1] > y2) | (others[:, 3] < y1)
    return bool(apart.all()) and not record.difficult[row] and x2 + (x2 - x1) * 0.5 < record.width


def planted(data: DetectionDataset) -> tuple[DetectionDataset, list[tuple[str, str | int]]]:
    """The data with an error in every second image that allows one, and the list of them in order."""
    records, errors = [], []
    kinds = ("missing box", "wrong class", "badly placed box")
    for number, record in enumerate(data.records):
        rows = [row for row in range(len(record.labels)) if alone(record, row)]
        if number % 2 or not rows:
            records.append(record)
            continue
        row, kind = rows[0], kinds[len(errors) % 3]
        errors.append((kind, record.image_id))
        boxes, labels = record.boxes.copy(), record.labels.copy()
        if kind == "missing box":
            keep = np.arange(len(labels)) != row
            fields = {name: getattr(record, name)[keep] for name in ("difficult", "crowd", "areas")}
            records.append(replace(record, boxes=boxes[keep], labels=labels[keep], **fields))
            continue
        if kind == "wrong class":
            labels[row] = 1 - labels[row]
        else:
            boxes[row, [0, 2]] += (boxes[row, 2] - boxes[row, 0]) * 0.5
        records.append(replace(record, boxes=boxes, labels=labels))
    return replace(data, records=records), errors


def report_of(data: DetectionDataset, found: list[Detections], metric: Any = "voc07") -> Report:
    return evaluate_detections(data, found, metric)


@pytest.mark.parametrize("metric", ["voc07", "coco"])
def test_planted_errors_are_found_and_nothing_else(true_data: DetectionDataset, metric: Any) -> None:
    wrong, errors = planted(true_data)
    assert len({kind for kind, _ in errors}) == 3
    assert len(errors) >= 9
    report = report_of(wrong, seen(true_data), metric)
    assert [(one.kind, report.records[one.position].image_id) for one in report.suspects] == errors
    assert report_of(true_data, seen(true_data), metric).suspects == []
    # A detector that is not sure suspects nobody.
    assert report_of(wrong, seen(true_data, 0.69), metric).suspects == []


def test_what_is_said_of_each(true_data: DetectionDataset, tmp_path: Path) -> None:
    wrong, errors = planted(true_data)
    report = report_of(wrong, seen(true_data))
    said = json.loads((report.save(tmp_path / "report") / "report.json").read_text())["suspects"]
    assert [(one["kind"], one["image_id"]) for one in said] == errors
    by_id = {record.image_id: record for record in wrong.records}
    for one, suspect in zip(said, report.suspects, strict=True):
        record = by_id[one["image_id"]]
        assert one["image"] == record.image_path.name
        true = next(r for r in true_data.records if r.image_id == one["image_id"])
        # The detection is that of an object that is really there, whatever the annotation says.
        offsets = np.abs(true.boxes + 1.5 - one["detected"]["box"]).max(axis=1)
        assert offsets.min() < 2
        assert one["detected"]["name"] == NAMES[true.labels[offsets.argmin()]]
        if one["kind"] == "missing box":
            assert one["annotated"] is None
        else:
            assert suspect.target is not None
            assert one["annotated"]["box"] == record.boxes[suspect.target].tolist()
            assert (one["annotated"]["name"] == one["detected"]["name"]) == (one["kind"] == "badly placed box")
            low, high = (0.5, 1.0) if one["kind"] == "wrong class" else (0.1, 0.5)
            assert low < one["annotated"]["iou"] <= high


def one_image(tmp_path: Path, objects: list[tuple[Any, int, bool]], found: list[tuple[Any, int, float]]) -> Report:
    from refinedet.data.problems import ProblemLog
    from refinedet.data.records import RecordBuilder

    file = tmp_path / "a.png"
    Image.new("RGB", (640, 480)).save(file)
    builder = RecordBuilder(file, "a", (640, 480), file, ProblemLog(strict=True))
    for box, label, difficult in [*objects, ((600, 440, 640, 480), 0, False)]:
        builder.add(box, label, describe=str, difficult=difficult)
    data = DetectionDataset([builder.build()], NAMES, "voc", None, tmp_path)
    boxes, labels, scores = zip(*found, strict=True)
    return report_of(data, [Detections(boxes, scores, labels, NAMES, (640, 480))])


BOX, NEAR, FAR = (100, 100, 200, 200), (140, 100, 240, 200), (400, 100, 500, 200)


@pytest.mark.parametrize(
    ("objects", "found", "kinds"),
    [
        ([], [(BOX, 0, 0.9), (FAR, 1, 0.6)], ["missing box"]),
        ([], [(BOX, 0, 0.9), (BOX, 1, 0.8), (FAR, 1, 0.75)], ["missing box"] * 2),  # in one place the surest counts
        ([(BOX, 1, False)], [(BOX, 0, 0.9)], ["wrong class"]),
        ([(BOX, 1, False)], [(BOX, 0, 0.9), (BOX, 1, 0.4)], []),  # something speaks for the annotation
        ([(BOX, 1, False)], [(BOX, 0, 0.9), (BOX, 1, 0.3)], ["wrong class"]),
        ([(BOX, 1, True)], [(BOX, 0, 0.9)], []),  # difficult
        ([(BOX, 0, False)], [(NEAR, 0, 0.9)], ["badly placed box"]),
        ([(BOX, 0, False)], [(NEAR, 0, 0.9), (BOX, 0, 0.8)], []),  # a second box is an error of the detector
        ([(BOX, 0, False)], [(BOX, 0, 0.9), (BOX, 0, 0.8)], []),  # a duplicate too
        ([(BOX, 0, False)], [(NEAR, 1, 0.9)], []),  # of another class and place
    ],
)
def test_cases(tmp_path: Path, objects: Any, found: Any, kinds: list[str]) -> None:
    assert [one.kind for one in one_image(tmp_path, objects, found).suspects] == kinds


def test_each_has_an_image_of_its_own(true_data: DetectionDataset, tmp_path: Path) -> None:
    wrong, errors = planted(true_data)
    report = report_of(wrong, seen(true_data))
    reader = read(write_page(report, report.save(tmp_path / "page")))
    shown = [str(attributes["href"]) for attributes in reader.all("a") if "suspect-" in str(attributes["href"])]
    assert shown == [f"images/suspect-{number:02d}.jpg" for number in range(1, min(len(errors), SUSPECTS) + 1)]
    assert f"{len(errors)} annotations that a detection with a score of 0.7 or more contradicts" in reader.text
    for number, suspect in enumerate(report.suspects[:SUSPECTS], 1):
        with Image.open(tmp_path / f"page/images/suspect-{number:02d}.jpg") as image:
            pixels = np.asarray(image).astype(int)
        detected = report.detections[suspect.position].boxes[suspect.detection]
        x1, _, x2, y2 = (int(value) for value in detected)
        edge = pixels[min(y2, 239) - 3 : y2 + 1, (x1 + x2) // 2]
        assert np.abs(edge - WRONG).sum(axis=1).min() < 90
        if suspect.kind == "badly placed box":
            x1, _, x2, y2 = (int(value) for value in report.records[suspect.position].boxes[suspect.target])
            edge = pixels[y2 - 3 : y2, x2 - 8]
            assert np.abs(edge - MISSED).sum(axis=1).min() < 90
    # The page of a better annotation has none, and removes the images of the earlier one.
    reader = read(write_page(report_of(true_data, seen(true_data)), tmp_path / "page"))
    assert "label errors" not in reader.text
    assert not list((tmp_path / "page/images").glob("suspect*"))


def test_the_list_is_bounded(tmp_path: Path) -> None:
    found = [((x, y, x + 4, y + 4), 0, 0.9) for x in range(0, 600, 9) for y in range(0, 400, 9)]
    assert len(found) > MOST
    assert len(one_image(tmp_path, [], found).suspects) == MOST


@pytest.mark.slow
@pytest.mark.shared_data
def test_planted_errors_in_real_photos(shared_data: Path) -> None:
    """Of the surest 20 suspects at least half were planted, and at least a third of the planted ones are found.

    The figures of docs/testing.md: 60 random objects of the held-out 250 images, at most one in an image.
    """
    model = RefineDet.from_pretrained("voc07-320-resnet18")
    data = open_dataset(shared_data / "VOCdevkit", "val[-250:]", model.class_names)
    found = collect_detections(model, data)
    for seed in range(5):
        wrong, errors = planted_anywhere(data, np.random.default_rng(seed))
        hits = []
        for one in evaluate_detections(wrong, found).suspects:
            kind, box = errors.get(one.position, ("", np.zeros(4, np.float32)))
            hits.append(kind == one.kind and overlap(found[one.position].boxes[one.detection], box) > 0.3)
        print(
            f"seed {seed}: {len(errors)} planted, {sum(hits)} of {len(hits)} suspects, {sum(hits[:20])} of the first 20"
        )
        assert sum(hits[:20]) >= 10
        assert sum(hits) >= len(errors) / 3


def planted_anywhere(
    data: DetectionDataset, random: np.random.Generator
) -> tuple[DetectionDataset, dict[int, tuple[str, Any]]]:
    """The data with errors in random images, and for each image with one its kind and the true box."""
    records, errors = list(data.records), dict[int, tuple[str, Any]]()
    objects = [(n, row) for n, record in enumerate(records) for row in np.flatnonzero(~record.difficult).tolist()]
    for count, (number, row) in enumerate(random.permutation(objects)[:60].tolist()):
        record = records[number]
        if number in errors:
            continue
        kind = ("missing box", "wrong class", "badly placed box")[count % 3]
        errors[number] = kind, record.boxes[row]
        boxes, labels, keep = record.boxes.copy(), record.labels.copy(), np.ones(len(record.labels), np.bool_)
        if kind == "missing box":
            keep[row] = False
        elif kind == "wrong class":
            labels[row] = (labels[row] + random.integers(1, len(data.class_names))) % len(data.class_names)
        else:
            shift = random.choice([-0.5, 0.5]) * (boxes[row, 2] - boxes[row, 0])
            boxes[row, [0, 2]] = np.clip(boxes[row, [0, 2]] + shift, 0, record.width)
        fields = {name: getattr(record, name)[keep] for name in ("difficult", "crowd", "areas")}
        records[number] = replace(record, boxes=boxes[keep], labels=labels[keep], **fields)
    return replace(data, records=records), errors
