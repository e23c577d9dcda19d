"""The health check counts right and names every fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet.data import inspect_dataset, open_dataset
from refinedet.errors import RefineDetError, UsageError

FolderFactory = Callable[..., Path]


def test_counts_against_a_slow_loop(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=12, class_names=("ant", "bee", "fly"))
    report = inspect_dataset(root)
    dataset = open_dataset(root)
    assert (report.images, report.layout, report.split) == (12, "voc", None)
    assert report.images_without_objects == 1
    assert report.boxes == sum(len(record.labels) for record in dataset.records)
    for label, count in enumerate(report.classes):
        assert count.name == ("ant", "bee", "fly")[label]
        objects = images = difficult = 0
        for record in dataset.records:
            mine = [flag for other, flag in zip(record.labels, record.difficult, strict=True) if other == label]
            objects += len(mine)
            images += bool(mine)
            difficult += sum(mine)
        assert (count.objects, count.images, count.difficult, count.crowd) == (objects, images, difficult, 0)
    sizes = sorted(
        float(np.sqrt((x2 - x1) * (y2 - y1) / (96 * 64)))
        for record in dataset.records
        for x1, y1, x2, y2 in record.boxes.astype(float)
    )
    assert report.box_sizes[0] == pytest.approx(sizes[0])
    assert report.box_sizes[3] == pytest.approx(np.median(sizes))
    assert report.box_sizes[-1] == pytest.approx(sizes[-1])
    assert report.smallest_image == report.largest_image == (96, 64)
    assert not report.problems
    assert report.problems == ()


def test_crowds_are_counted(coco_folder: FolderFactory) -> None:
    report = inspect_dataset(coco_folder(images=6))
    assert sum(count.crowd for count in report.classes) == 2


def test_every_fault_is_named(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=8)
    images, xmls = root / "JPEGImages", root / "Annotations"
    whole = (images / "000000.jpg").read_bytes()
    (images / "000000.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "000001.jpg").write_text("no image")
    Image.new("RGB", (10, 10)).save(images / "000002.jpg")
    (images / "000003.jpg").unlink()
    (xmls / "000004.xml").write_text("<annotation>")
    text = (xmls / "000005.xml").read_text()
    one = text[text.index("<object>") : text.index("</object>") + len("</object>")]
    (xmls / "000005.xml").write_text(text.replace("</annotation>", one + one + "</annotation>"))
    (xmls / "000006.xml").write_text(
        text.replace("000005.jpg", "000006.jpg").replace("<xmin>", "<xmin>9", 1).replace("<xmax>", "<xmax>9", 1)
    )
    calls: list[tuple[int, int]] = []
    report = inspect_dataset(root, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]
    assert [path.name for path in report.unreadable] == ["000000.jpg", "000001.jpg", "000002.jpg"]
    assert report.duplicate_boxes == 2
    rendered = report.render()
    expected = {
        "000000.jpg": "truncated",
        "000001.jpg": "not an image",
        "000002.jpg": "is 10x10, but its annotation is made for 96x64",
        "000003.xml": "its image is missing",
        "000004.xml": "not well-formed",
        "000005.jpg": "3 times the same box",
        "000006.xml": "outside",
    }
    assert sorted(problem.path.name for problem in report.problems) == sorted(expected)
    for problem in report.problems:
        assert expected[problem.path.name] in problem.message
        assert str(problem) in rendered
    assert report.problems
    assert "and 5 more" in report.render(max_problems=2)


def test_table_can_be_read(voc_folder: FolderFactory) -> None:
    lines = inspect_dataset(voc_folder(class_names=("ant", "bee")), "train").render().splitlines()
    assert lines[0].endswith("(voc, split train)")
    assert lines[1].split() == ["images", "3"]
    header = next(index for index, line in enumerate(lines) if line.startswith("class"))
    assert lines[header].split() == ["class", "objects", "images", "difficult", "crowd"]
    assert lines[header + 1].split()[0] == "ant"
    assert len({len(line) for line in lines[header : header + 3]}) == 1


def test_data_without_any_object(yolo_folder: FolderFactory) -> None:
    root = yolo_folder(images=4)
    for file in (root / "labels/train").iterdir():
        file.unlink()
    report = inspect_dataset(root, "train")
    assert report.box_sizes == ()
    assert report.images_without_objects == report.images == 2
    assert "box size" not in report.render()


def test_mosaic(voc_folder: FolderFactory, tmp_path: Path) -> None:
    root = voc_folder(images=6, size=(640, 320))
    (root / "JPEGImages/000001.jpg").write_text("no image")
    report = inspect_dataset(root)
    for name in ("a.png", "b.png"):
        report.write_mosaic(tmp_path / name, columns=2, count=4, seed=1)
    report.write_mosaic(tmp_path / "c.png", columns=2, count=4, seed=2)
    first, again, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    np.testing.assert_array_equal(first, again)
    assert first.shape[0] >= 2 * 240
    assert first.shape[1] >= 2 * 480
    assert first.shape != other.shape or (first != other).any()
    report.write_mosaic(tmp_path / "all.png", columns=3, count=100)


def test_a_mosaic_keeps_the_shape_of_every_image(tmp_path: Path) -> None:
    """Green images of three shapes on a dark sheet: each is a full rectangle of its own shape, none is cropped."""
    root = tmp_path / "own"
    root.mkdir()
    shapes = {"wide": (400, 100), "high": (90, 180), "square": (50, 50)}
    for name, shape in shapes.items():
        Image.new("RGB", shape, (0, 200, 0)).save(root / f"{name}.png")
        (root / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename></annotation>")
    report = inspect_dataset(root)
    report.write_mosaic(tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    green = (sheet[..., 1] > 150) & (sheet[..., 0] < 60)
    seen = []
    while green.any():
        top, left = np.argwhere(green)[0]
        height = int(np.argmin(np.append(green[top:, left], False)))
        width = int(np.argmin(np.append(green[top, left:], False)))
        assert green[top : top + height, left : left + width].all()
        below = sheet[top + height : top + height + 22, left : left + width]
        assert (below.min(axis=2) > 150).any(), "the file name is written below"
        seen.append(width / height)
        green[top : top + height, left : left + width] = False
    assert sorted(seen) == pytest.approx(sorted(w / h for w, h in shapes.values()), rel=0.02)


def test_splits_and_images_without_label_are_counted(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=10)
    for index in (8, 9):
        (root / "Annotations" / f"{index:06d}.xml").unlink()
    for split in ("train", "val", "trainval", "test"):
        list_file = root / "ImageSets" / "Main" / f"{split}.txt"
        list_file.write_text("".join(line for line in list_file.open() if line.strip() not in ("000008", "000009")))
    (root / "ImageSets/Main/void.txt").write_text("")
    report = inspect_dataset(root)
    assert report.splits == (("test", 4), ("train", 4), ("trainval", 8), ("val", 4), ("void", 0))
    assert (report.images, report.images_without_objects, report.images_left_out) == (8, 1, 2)
    rendered = report.render()
    assert "splits             test 4, train 4, trainval 8, val 4, void 0\n" in rendered
    assert "without objects         1   (10.0 % of the images)\n" in rendered
    assert "left out                2   (20.0 % of the images)\n" in rendered
    assert "2 images without an annotation left out\n" in rendered
    assert "splits             test, train, trainval, val, void\n" in inspect_dataset(root, "train").render()


def test_mosaic_that_cannot_be(voc_folder: FolderFactory, tmp_path: Path) -> None:
    root = voc_folder(images=1)
    report = inspect_dataset(root)
    (tmp_path / "file").touch()
    with pytest.raises(RefineDetError, match=r"a\.png: cannot be written .*there is a file of that name"):
        report.write_mosaic(tmp_path / "file" / "a.png")
    with pytest.raises(UsageError, match=r"name a \.jpg or \.png file"):
        report.write_mosaic(tmp_path / "a.xyz")
    with pytest.raises(UsageError, match="at least 1 column"):
        report.write_mosaic(tmp_path / "a.png", columns=0)
    (root / "JPEGImages/000000.jpg").write_text("no image")
    with pytest.raises(UsageError, match="no readable image"):
        inspect_dataset(root).write_mosaic(tmp_path / "a.png")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        inspect_dataset(tmp_path / "gone")


@pytest.mark.shared_data
def test_bccd(shared_data: Path) -> None:
    report = inspect_dataset(shared_data / "BCCD")
    assert (report.images, report.boxes) == (364, 4886)
    assert {count.name: count.objects for count in report.classes} == {"Platelets": 361, "RBC": 4153, "WBC": 372}
    assert [problem.path.name for problem in report.problems] == ["BloodImage_00338.xml", "BloodImage_00343.xml"]
    assert all("has no area" in problem.message for problem in report.problems)
    assert report.unreadable == ()
    assert report.largest_image == (640, 480)
