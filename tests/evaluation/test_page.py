"""The page of errors: what it says, that it is sound HTML which loads nothing, and which images go with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset
from refinedet.detections import Detections
from refinedet.errors import RefineDetError
from refinedet.evaluation.evaluate import evaluate_detections
from refinedet.evaluation.gallery import FOUND, GOOD_IMAGES, IGNORED, MISSED, SUSPECTS, WORST_IMAGES, WRONG
from refinedet.evaluation.page import write_page
from refinedet.evaluation.report import Report
from refinedet.evaluation.settings import EvaluationSettings, LeftOut
from refinedet.provenance import Provenance

FolderFactory = Callable[..., Path]
NAMES = ("<b>&", "otter")
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Reads a page, stumbles over any tag that is not closed in order, and remembers what it saw."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(page: Path) -> Reader:
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    # Nothing comes from elsewhere, nothing runs.
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+", text)
    assert not reader.all("script") + reader.all("link") + reader.all("iframe")
    assert all(not str(a.get("src", "images/")).startswith(("/", "http", "..")) for _, a in reader.tags)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in reader.all("a"):
        target = str(attributes["href"])
        assert target[1:] in ids if target.startswith("#") else (page.parent / target).is_file()
    for attributes in reader.all("img"):
        assert attributes["alt"]
        with Image.open(page.parent / str(attributes["src"])) as image:
            assert image.format == "JPEG"
            assert [str(side) for side in image.size] == [attributes["width"], attributes["height"]]
    svgs, titles = reader.all("svg"), reader.all("title")
    assert len(titles) == len(svgs) + 1
    return reader


def moved(dataset: DetectionDataset, shift: float = 0.0, score: float = 0.9) -> list[Detections]:
    """Every object found, ``shift`` pixels to the right of where it is."""
    return [
        Detections(
            record.boxes + np.array([shift, 0, shift, 0], np.float32),
            np.full(len(record.labels), score, np.float32),
            record.labels,
            dataset.class_names,
            (record.width, record.height),
        )
        for record in dataset.records
    ]


def report_of(dataset: DetectionDataset, detections: list[Detections], metric: Any = "voc07") -> Report:
    return evaluate_detections(dataset, detections, metric, settings=EvaluationSettings(seconds_per_image=0.25))


@pytest.fixture
def dataset(voc_folder: FolderFactory) -> DetectionDataset:
    """Six images of 96 x 64, of which the fourth has no objects."""
    return replace(
        open_dataset(voc_folder(class_names=("lynx", "otter")), "trainval", ("lynx", "otter")), class_names=NAMES
    )


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_the_page_says_what_the_report_says(dataset: DetectionDataset, tmp_path: Path, metric: Any) -> None:
    # Half of each box is off: IoU of small boxes falls below 0.5, that of large ones does not.
    report = report_of(dataset, moved(dataset, shift=9), metric)
    path = write_page(report, tmp_path / "new" / "report")
    assert path == tmp_path / "new" / "report" / "index.html"
    reader = read(path)
    assert 0 < report["mAP"] < 1
    for value in (report["mAP"], *report.per_class.values()):
        assert f"{100 * value:.1f}" in reader.text
    assert "voc trainval" in reader.text
    assert "0.250 s per image" in reader.text
    assert {"voc07": "11-point", "voc": "area AP", "coco": "0.50:0.95"}[metric] in reader.text
    # Objects of 96 x 64 images have no more than 48 x 32 pixels.
    assert reader.text.count("no objects") == 1
    for title in ("Errors", "Classes", "Precision and recall", "Confusion", "Sizes", "Images"):
        assert title in reader.text
    assert "Training" not in reader.text
    # As many curves as classes, and their mean.
    assert len(reader.all("svg")) == 3


def test_names_are_escaped(dataset: DetectionDataset, tmp_path: Path) -> None:
    path = write_page(report_of(dataset, moved(dataset, shift=30)), tmp_path)
    assert "<b>&" in read(path).text
    assert "<b>&<" not in path.read_text()
    assert "&lt;b&gt;&amp;" in path.read_text()


def test_counts_of_errors_by_hand(dataset: DetectionDataset, tmp_path: Path) -> None:
    """One object that is found, found again, and called by another name; and a box on nothing."""
    lone = dataset.subset([0])  # one object, of class 0
    record = lone[0]
    assert len(record.labels) == 1
    x1, y1, x2, y2 = (float(value) for value in record.boxes[0])
    corner = (0, 0, 2, 2) if x1 > 4 or y1 > 4 else (94, 62, 96, 64)
    found = Detections(
        [(x1, y1, x2, y2), (x1, y1, x2, y2), (x1, y1, x2, y2), corner], [0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1], NAMES,
        (record.width, record.height),
    )  # fmt: skip
    text = write_page(report_of(lone, [found]), tmp_path).read_text()
    rows = {
        name: int(number) for name, number in re.findall(r'<tr><th scope="row">([a-z ]+)<span.*?<td>(\d+)</td>', text)
    }
    assert rows == {
        "localization": 0, "classification": 1, "class and place": 0, "duplicate": 1, "background": 1, "missed": 0,
        "small": rows["small"], "medium": rows["medium"], "large": 0,
    }  # fmt: skip
    assert rows["small"] + rows["medium"] == 1
    assert "1 of 4 at that score" in text
    assert "otter 70%: classification" in text
    assert "3 wrong, 0 missed" in text


def test_images_show_what_is_wrong(tmp_path: Path) -> None:
    """A black image with boxes in yellow (missed), blue (found), gray (does not count) and magenta (wrong)."""
    from refinedet.data.problems import ProblemLog
    from refinedet.data.records import RecordBuilder

    file = tmp_path / "a.png"
    Image.new("RGB", (1280, 640), (0, 0, 0)).save(file)
    boxes = [(20, 100, 300, 300), (400, 100, 700, 300), (20, 400, 300, 600)]
    builder = RecordBuilder(file, "a", (1280, 640), file, ProblemLog(strict=True))
    for box, difficult in zip(boxes, [False, False, True], strict=True):
        builder.add(box, 0, describe=str, difficult=difficult)
    record = builder.build()
    dataset = DetectionDataset([record], ("otter",), "voc", None, tmp_path)
    found = Detections([boxes[1], (900, 100, 1200, 300)], [0.9, 0.8], [0, 0], ("otter",), (1280, 640))
    reader = read(write_page(report_of(dataset, [found]), tmp_path / "page"))
    assert "a.png" in reader.text
    assert str(tmp_path) not in reader.text
    with Image.open(tmp_path / "page/images/worst-01.jpg") as image:
        assert image.size == (1280, 640)
    shown = [a["href"] for a in reader.all("a") if "images/" in str(a["href"])]
    assert shown == ["images/worst-01.jpg", "images/suspect-01.jpg"]
    with Image.open(tmp_path / "page/images/worst-01-small.jpg") as image:
        assert image.size == (640, 320)
        pixels = np.asarray(image).astype(int)
    # The middle of the lower edge of each box, at half the size.
    for (x1, _, x2, y2), color in zip(
        [*boxes, (900, 100, 1200, 300)],
        [MISSED, FOUND, IGNORED, WRONG],
        strict=True,
    ):
        edge = pixels[y2 // 2 - 2 : y2 // 2, (x1 + x2) // 4]
        assert np.abs(edge - color).sum(axis=1).min() < 60, (edge, color)


def test_few_images_are_decoded_however_many_are_wrong(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_dataset(voc_folder(images=40, class_names=("lynx", "otter")), "trainval", ("lynx", "otter"))
    decoded: list[int] = []
    load = DetectionDataset.load_image
    monkeypatch.setattr(
        DetectionDataset, "load_image", lambda self, index: (decoded.append(index), load(self, index))[1]
    )
    scores = np.linspace(0.95, 0.5, 40)
    answers = [replace(d, scores=np.full(len(d), s, np.float32)) for d, s in zip(moved(data, 200), scores, strict=True)]
    path = write_page(report_of(data, answers), tmp_path)
    assert len(decoded) == 2 * WORST_IMAGES + SUSPECTS == len(read(path).all("img"))
    decoded = decoded[: 2 * WORST_IMAGES]
    assert len(set(decoded)) == 2 * WORST_IMAGES
    # The first half has the most errors, the second the surest of the others.
    records = [data[index] for index in decoded]
    counts = [2 * len(r.labels) - int(r.difficult.sum()) for r in records]
    assert counts[:WORST_IMAGES] == sorted(counts[:WORST_IMAGES], reverse=True)
    assert min(counts[:WORST_IMAGES]) >= max(counts[WORST_IMAGES:])
    assert decoded[WORST_IMAGES:] == sorted(decoded[WORST_IMAGES:])
    # A better detector leaves fewer images, and none of the earlier ones; other files stay.
    (tmp_path / "images/mine.jpg").write_bytes(b"x")
    answers = [*moved(data)[:38], *answers[38:]]
    path = write_page(report_of(data, answers), tmp_path)
    assert len(read(path).all("img")) == 2 + GOOD_IMAGES
    names = sorted(p.name for p in (tmp_path / "images").iterdir() if not p.name.startswith("good"))
    assert names == ["mine.jpg", "worst-01-small.jpg", "worst-01.jpg", "worst-02-small.jpg", "worst-02.jpg"]


def test_nothing_found_and_nothing_wrong(dataset: DetectionDataset, tmp_path: Path) -> None:
    nothing = [Detections.empty(NAMES, (record.width, record.height)) for record in dataset.records]
    for metric in ("voc07", "coco"):
        path = write_page(report_of(dataset, nothing, metric), tmp_path)
        assert "nothing scores 0.4 or more" in read(path).text
        assert not re.search(r">[+-]?(nan|inf)", path.read_text())
    reader = read(write_page(report_of(dataset, moved(dataset)), tmp_path))
    assert "No image has an error." in reader.text
    # Five of the six images have objects, all of them found.
    assert len(reader.all("img")) == 5
    assert "All right" in reader.text
    assert not list((tmp_path / "images").glob("worst*"))


@pytest.mark.parametrize("count", [1, 80])
def test_one_class_and_eighty(voc_folder: FolderFactory, tmp_path: Path, count: int) -> None:
    names = tuple(f"class{k}" for k in range(count))
    data = open_dataset(voc_folder(images=12, class_names=names), "trainval", names)
    answers = moved(data, shift=9)
    for metric in ("voc07", "coco"):
        report = report_of(data, answers, metric)
        reader = read(write_page(report, tmp_path / metric))
        assert len(reader.all("svg")) == len(report.curves) + 1
        absent = [name for name, objects in report.objects.items() if not objects]
        assert ("No objects: " in reader.text) == bool(absent)
    # With an object and a curve of each class: those of the first 23 are open, the others behind a click.
    several = replace(
        data[0],
        boxes=np.repeat(data[0].boxes[:1], count, axis=0),
        labels=np.arange(count),
        difficult=np.zeros(count, bool),
        crowd=np.zeros(count, bool),
        areas=np.repeat(data[0].areas[:1], count),
    )
    reader = read(write_page(report_of(replace(data, records=[several]), answers[:1]), tmp_path / "full"))
    assert len(reader.all("svg")) == count + 1
    assert len(reader.all("details")) == (count > 23)


def test_learning_curves(dataset: DetectionDataset, tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    rows = [f"{10 * k},{5 / k:.3f},{8 / k:.3f},0.01,{k / 1000 if k % 100 == 0 else ''}" for k in range(1, 1001)]
    log.write_text("iteration,arm_classification,total,learning_rate,mAP\n" + "\n".join(rows) + "\n")
    report = report_of(dataset, moved(dataset))
    path = write_page(report, tmp_path / "page", metrics_csv=log)
    reader = read(path)
    for text in ("Training", "Loss", "Learning rate", "arm classification", "iteration", "best 100.0"):
        assert text in reader.text
    assert len(reader.all("svg")) == 6
    # A thousand rows are more than a page can show.
    longest = max(str(a.get("d", "")).count("L") for a in reader.all("path"))
    assert longest < 200
    for bad in ("", "iteration\n", "iteration,mAP\n1,x\n"):
        log.write_text(bad)
        text = read(write_page(report, tmp_path / "page", metrics_csv=log)).text
        assert "metrics.csv: " in text
        assert str(tmp_path) not in text
    log.write_text("iteration,speed\n1,2\n")
    assert "no losses and no mAP" in read(write_page(report, tmp_path / "page", metrics_csv=log)).text


def test_an_image_that_is_gone_costs_its_place_only(dataset: DetectionDataset, tmp_path: Path) -> None:
    report = report_of(dataset, moved(dataset, shift=200))
    dataset[0].image_path.unlink()
    reader = read(write_page(report, tmp_path / "page"))
    # Among the errors, and among the label errors that are suspected.
    assert reader.text.count("the image cannot be read") == 2
    assert dataset[0].image_path.name in reader.text
    assert len([a for a in reader.all("img") if "worst" in str(a["src"])]) == 4


def test_some_images_of_the_data(dataset: DetectionDataset, tmp_path: Path) -> None:
    answers = moved(dataset, shift=200)
    report = evaluate_detections(
        dataset, {2: answers[2], 5: answers[5]}, settings=EvaluationSettings(limit=2, passes=("a", "b"))
    )
    assert report.indices == [2, 5]
    text = read(write_page(report, tmp_path)).text
    assert "2, the first of the split" in text
    assert "multi-scale, 2 passes" in text
    assert "000002.jpg" in text
    assert "000000.jpg" not in text


def test_a_threshold_of_the_evaluation_above_that_of_the_page(dataset: DetectionDataset, tmp_path: Path) -> None:
    report = replace(report_of(dataset, moved(dataset)), settings=EvaluationSettings(score_threshold=0.6))
    assert "with a score of 0.6 or more" in read(write_page(report, tmp_path)).text


def test_classes_left_out_are_said(dataset: DetectionDataset, tmp_path: Path) -> None:
    nothing = [Detections.empty(dataset.class_names, (r.width, r.height)) for r in dataset.records]
    report = evaluate_detections(
        dataset, nothing, settings=EvaluationSettings(left_out=LeftOut(("tv",), ("fox", "owl")))
    )
    assert "left out: 1 of the model, 2 of the data" in read(write_page(report, tmp_path)).text
    assert "left out" not in read(write_page(evaluate_detections(dataset, nothing), tmp_path)).text


def test_a_folder_that_cannot_be_made(dataset: DetectionDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefineDetError, match=r"file.*cannot be"):
        write_page(report_of(dataset, moved(dataset, shift=200)), tmp_path / "file")


def test_where_it_comes_from(dataset: DetectionDataset, tmp_path: Path) -> None:
    made = Provenance("1.2.3", "2.9", "cuda:0", "refinedet evaluate 'a b' <data>", "2030-01-02T03:04:05+00:00")
    settings = EvaluationSettings(
        weights="runs/a\x1b[2J", run="runs/a", trained_on=2, provenance=made, seconds_per_image=0.5
    )
    report = evaluate_detections(dataset, moved(dataset, shift=9), "coco", settings=settings)
    text = read(write_page(report, tmp_path)).text
    for fact in (
        r"runs/a\x1b[2J", "2 of these 6 images were trained on (runs/a)", "refinedet evaluate 'a b' <data>",
        "2030-01-02 03:04:05 UTC", "refinedet 1.2.3, torch 2.9, data " + dataset.digest()[:12],
        "0.500 s per image (cuda:0)",
        "AP50 %", f"{100 * report['AP50']:.1f}", "threshold",
    ):  # fmt: skip
        assert fact in text, fact


def test_odd_names_are_harmless(voc_folder: FolderFactory, tmp_path: Path) -> None:
    names = ("a\nb\x1b[31m", "\udcff<i>")
    data = replace(
        open_dataset(voc_folder(class_names=("lynx", "otter")), "trainval", ("lynx", "otter")), class_names=names
    )
    report = report_of(data, moved(data, shift=9))
    reader = read(write_page(report, report.save(tmp_path)))
    table = report.table()
    for text in (reader.text, table, (tmp_path / "per_class.csv").read_text()):
        assert r"a\nb\x1b[31m" in text
        assert r"\udcff<i>" in text
        assert "\x1b" not in text
    assert len(table.splitlines()) == 4
