"""Label files say what the detections say: written by hand here, and as the readers of the three layouts read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet.data import open_dataset
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.labels import LabelFolder, LabelLayout, voc_text, yolo_text

NAMES = ("cat", "dog & <co>")
BOXES = [[10, 20, 50, 40], [0, 0, 100, 80]]


def found(source: str, boxes: list[list[float]] = BOXES) -> Detections:  # type: ignore[assignment]
    labels = [1, 0][: len(boxes)]
    return Detections(boxes, [0.9, 0.5][: len(boxes)], labels, NAMES, (100, 80), source)  # type: ignore[arg-type]


def test_yolo_by_hand() -> None:
    assert yolo_text(found("a.jpg")) == (
        "1 0.3000000 0.3750000 0.4000000 0.2500000\n0 0.5000000 0.5000000 1.0000000 1.0000000\n"
    )
    assert yolo_text(found("a.jpg", [])) == ""


def test_voc_by_hand() -> None:
    text = "".join(line.strip() for line in voc_text(found("a.jpg"), "a.jpg").splitlines())
    assert "<filename>a.jpg</filename><size><width>100</width><height>80</height><depth>3</depth></size>" in text
    assert "<name>dog &amp; &lt;co&gt;</name>" in text
    assert "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>40</ymax></bndbox>" in text
    assert "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox>" in text
    # What is thinner than a pixel covers two, also at the edge of the image: xmin equal to xmax is read as no area.
    thin = voc_text(found("a.jpg", [[99.8, 79.9, 100, 80]]), "a.jpg")
    assert all(f"<{tag}>{value}</{tag}>" in thin for tag, value in
               (("xmin", 99), ("ymin", 79), ("xmax", 100), ("ymax", 80)))  # fmt: skip


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_the_readers_read_them(layout: LabelLayout, tmp_path: Path) -> None:
    images = {"voc": "JPEGImages", "yolo": "images", "coco": "."}[layout]
    sources = [str(tmp_path / "photos" / name) for name in ("1.jpg", "2.png", "3.jpg")]
    out = tmp_path / layout
    with LabelFolder(out, layout, NAMES, sources, category_ids=[7, 3]) as labels:
        for source, boxes in zip(sources, (BOXES, [], BOXES[:1]), strict=True):
            labels.add(found(source, boxes))  # type: ignore[arg-type]
    (out / images).mkdir(exist_ok=True)
    for source in sources:
        Image.new("RGB", (100, 80)).save(out / images / Path(source).name)
    path = out / "annotations.json" if layout == "coco" else out
    data = open_dataset(path, "val" if layout == "yolo" else None, class_names=NAMES)
    by_name = {record.image_path.name: record for record in data.records}
    assert sorted(by_name) == ["1.jpg", "2.png", "3.jpg"]
    order = np.argsort(by_name["1.jpg"].labels)[::-1]
    np.testing.assert_allclose(by_name["1.jpg"].boxes[order], BOXES, atol=1e-4)
    assert by_name["1.jpg"].labels[order].tolist() == [1, 0]
    assert [len(by_name[name].boxes) for name in ("2.png", "3.jpg")] == [0, 1]
    assert data.class_names == NAMES


def test_coco_by_hand(tmp_path: Path) -> None:
    with LabelFolder(tmp_path / "out", "coco", NAMES, ["x/a.jpg", "x/b/a.jpg"], category_ids=[7, 3]) as labels:
        labels.add(found("x/a.jpg"))
        labels.add(found("x/b/a.jpg", BOXES[:1]))  # type: ignore[arg-type]
    content = json.loads((tmp_path / "out/annotations.json").read_text())
    assert content["categories"] == [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog & <co>"}]
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [(1, "a.jpg"), (2, "b/a.jpg")]
    assert [(item["id"], item["image_id"], item["category_id"], item["bbox"], item["area"], item["score"])
            for item in content["annotations"]] == [
        (1, 1, 3, [10, 20, 40, 20], 800, 0.9), (2, 1, 7, [0, 0, 100, 80], 8000, 0.5),
        (3, 2, 3, [10, 20, 40, 20], 800, 0.9)
    ]  # fmt: skip


def test_names_keep_the_folders_below_the_common_one(tmp_path: Path) -> None:
    sources = ["in/one/a.jpg", "in/two/a.jpg", "in/two/deep/b.jpg"]
    with LabelFolder(tmp_path / "out", "yolo", NAMES, sources) as labels:
        for source in sources:
            labels.add(found(source))
    written = sorted(path.relative_to(tmp_path / "out/labels").as_posix() for path in tmp_path.rglob("*.txt"))
    assert written == ["one/a.txt", "two/a.txt", "two/deep/b.txt"]
    addresses = ["http://host/p/a.jpg?x=1", "http://host/q/../b.png"]
    with LabelFolder(tmp_path / "web", "voc", NAMES, addresses) as labels:
        labels.add(found(addresses[0]))
        labels.add(found(addresses[1]))
    assert sorted(path.relative_to(tmp_path / "web").as_posix() for path in tmp_path.rglob("*.xml")) == [
        "Annotations/p/a.xml", "Annotations/q/b.xml"
    ]  # fmt: skip


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/corrected.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        LabelFolder(tmp_path / "full", "yolo", NAMES, ["a.jpg"])
    for layout in ("voc", "yolo"):
        with pytest.raises(UsageError, match=r"a\.jpg and .*A\.png would have the same label file"):
            LabelFolder(tmp_path / "out", layout, NAMES, ["a.jpg", "A.png"])
        signed = [f"https://b/a.jpg?sig={secret}" for secret in ("s3cret", "s4cret")]
        with pytest.raises(UsageError, match=r"sig=\*\*\* and https://b/a\.jpg\?sig=\*\*\* would have"):
            LabelFolder(tmp_path / "signed", layout, NAMES, signed)
    with pytest.raises(UsageError, match="not as 'csv'"):
        LabelFolder(tmp_path / "out", "csv", NAMES, [])  # type: ignore[arg-type]
    labels = LabelFolder(tmp_path / "out", "coco", NAMES, ["a.jpg", "A.png"])  # COCO has one file for all
    with labels, pytest.raises(UsageError, match="none of the images"):
        labels.add(found("c.jpg"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RefineDetError, match="file"), LabelFolder(tmp_path / "file/out", "yolo", NAMES, ["a.jpg"]):
        pass


def test_an_error_leaves_no_document(tmp_path: Path) -> None:
    with pytest.raises(UsageError), LabelFolder(tmp_path / "out", "coco", NAMES, ["a.jpg"]) as labels:
        labels.add(found("b.jpg"))
    assert list((tmp_path / "out").iterdir()) == []
