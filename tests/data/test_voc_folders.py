"""Folders of one's own: XML and images lie where people put them, and what is not read is named with counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from refinedet.data import DetectionDataset, detect_layout, list_splits, open_dataset
from refinedet.data.problems import LISTED_TWICE, NO_ANNOTATION, SECOND_LABEL, SEVERAL_IMAGES, FaultyFileError
from refinedet.errors import RefineDetError, UsageError

FolderFactory = Callable[..., Path]


def xml(filename: str, *names: str) -> str:
    box = "<bndbox><xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    return (
        f"<annotation><filename>{filename}</filename><size><width>64</width><height>48</height></size>"
        + "".join(f"<object><name>{name}</name>{box}</object>" for name in names or ("cat",))
        + "</annotation>"
    )


def build(root: Path, *files: str, texts: Mapping[str, str] | None = None) -> Path:
    """Write images of 64x48 and annotations that name the image of their stem; ``texts`` gives other contents."""
    for name in (*files, *(texts or {})):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name in (texts or {}):
            assert texts is not None
            file.write_text(texts[name])
        elif file.suffix.lower() == ".xml":
            file.write_text(xml(f"{file.stem}.jpg"))
        elif file.suffix.lower() in (".heic", ".cr2"):
            file.write_bytes(b"\0\0\0\x18ftypheic")
        else:
            Image.new("RGB", (64, 48), (len(name), 40, 90)).save(file)
    return root


def images_of(dataset: DetectionDataset) -> list[str]:
    return [record.image_path.relative_to(dataset.path).as_posix() for record in dataset.records]


@pytest.mark.parametrize(
    "files",
    [
        ["a.jpg", "a.xml", "b.jpg", "b.xml"],
        ["annotations/a.xml", "annotations/b.xml", "images/a.jpg", "images/b.jpg"],
        ["annots/a.xml", "annots/b.xml", "my photos/a.jpg", "my photos/b.jpg"],
        ["annots/one/a.xml", "annots/two/b.xml", "pics/x/a.jpg", "b.jpg"],
        ["Annotations/a.XML", "Annotations/b.xml", "JPEGImages/a.jpg", "JPEGImages/b.JPG"],
        ["Annotations/deep/er/a.xml", "Annotations/b.xml", "JPEGImages/deep/er/a.jpg", "JPEGImages/b.jpg"],
        ["Annotations/b.xml", "JPEGImages/a.xml", "JPEGImages/a.jpg", "JPEGImages/b.jpg"],
        ["Annotations/a.xml", "Annotations/b.xml", "photos/a.jpg", "photos/b.jpg"],
        ["Annotations/a.xml", "Annotations/a.jpg", "Annotations/b.xml", "Annotations/b.jpg"],
    ],
)
def test_every_object_is_read(tmp_path: Path, files: list[str]) -> None:
    root = build(tmp_path / "own", *files)
    assert detect_layout(root) == "voc"
    dataset = open_dataset(root)
    images = sorted(name for name in files if not name.lower().endswith(".xml"))
    assert sorted(images_of(dataset)) == images
    assert [record.image_id for record in sorted(dataset.records, key=lambda r: str(r.image_id))] == ["a", "b"]
    assert all(record.boxes.tolist() == [[10, 10, 40, 40]] for record in dataset.records)
    assert dataset.class_names == ("cat",)
    assert dataset.problems == []
    assert list_splits(root) == ()


def test_other_xml_and_a_hidden_copy_are_nobodys_annotation(tmp_path: Path) -> None:
    root = build(
        tmp_path / "own", "a.jpg", "a.xml", ".trash/b.jpg", ".trash/b.xml",
        texts={"pom.xml": "<project/>", ".idea/x.xml": "<annotation>"},
    )  # fmt: skip
    dataset = open_dataset(root)
    assert images_of(dataset) == ["a.jpg"]
    assert dataset.problems == []


def test_a_broken_annotation_beside_its_image_is_not_overlooked(tmp_path: Path) -> None:
    root = build(tmp_path / "own", "a.jpg", "a.xml", "b.jpg", texts={"b.xml": ""})
    with pytest.raises(FaultyFileError, match=r"b\.xml: not well-formed XML"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("{}/a.xml", "{}/a.jpg"), ("test", "train", "valid")),
        (("{}/annotations/a.xml", "{}/images/a.jpg"), ("test", "train")),
        (("Annotations/{}/a.xml", "JPEGImages/{}/a.jpg"), ("train", "val")),
        (("xml/{}/a.xml", "img/{}/a.jpg"), ("training", "validation")),
    ],
)
def test_a_folder_for_each_split(tmp_path: Path, files: tuple[str, str], splits: tuple[str, ...]) -> None:
    root = build(tmp_path / "own", *(file.format(split) for split in splits for file in files))
    assert list_splits(root) == splits
    assert len(open_dataset(root)) == len(splits)
    assert len({record.image_id for record in open_dataset(root).records}) == len(splits)
    for split in splits:
        dataset = open_dataset(root, split)
        (image,) = images_of(dataset)
        assert f"/{split}/" in f"/{image}"
        assert dataset.problems == []
    assert len(open_dataset(root, "train")) == 1
    if "test" not in splits:
        assert len(open_dataset(root, "val")) == 1
    if len(splits) == 2 and "test" in splits:
        with pytest.raises(UsageError, match="no split 'trainval'; available: test, train"):
            open_dataset(root, "trainval")
    else:
        both = open_dataset(root, "trainval")
        assert both.split == "trainval"
        assert len(both) == 2
        assert not any(image.startswith("test/") for image in images_of(both))
    # Each of the folders is a dataset of its own, too.
    if files[0].startswith("{}"):
        assert len(open_dataset(root / "train")) == 1
        assert list_splits(root / "train") == ()


def test_a_folder_beside_those_of_the_splits_belongs_to_none(tmp_path: Path) -> None:
    places = ("train", "test", "more")
    root = build(tmp_path / "own", *(f"{p}/{f}" for p in places for f in ("annotations/a.xml", "images/a.jpg")))
    assert list_splits(root) == ("test", "train")
    assert len(open_dataset(root)) == 3
    assert images_of(open_dataset(root, "train")) == ["train/images/a.jpg"]


def test_split_files_with_folders_in_their_lines(tmp_path: Path) -> None:
    files = [name.format(n) for n in range(3) for name in ("Annotations/train/img{}.xml", "JPEGImages/train/img{}.jpg")]
    root = build(tmp_path / "own", *files, texts={"ImageSets/Main/default.txt": "train/img0\ntrain/img2\n"})
    assert list_splits(root) == ("default",)
    for split in ("default", "train"):
        assert [record.image_id for record in open_dataset(root, split).records] == ["img0", "img2"]
    lines = "JPEGImages/train/img1.jpg\nC:\\me\\data\\img2.jpg\n/home/me/img0.png\ntrain/img2.xml\n"
    (root / "ImageSets/Main/odd.txt").write_text(lines)
    dataset = open_dataset(root, "odd")
    assert [record.image_id for record in dataset.records] == ["img1", "img2", "img0"]
    assert [problem.kind for problem in dataset.problems] == [LISTED_TWICE]


def test_split_files_right_below_image_sets(tmp_path: Path) -> None:
    root = build(
        tmp_path / "own", "xml/a.xml", "xml/b.xml", "img/a.jpg", "img/b.jpg",
        texts={"ImageSets/train.txt": "a\n", "ImageSets/val.txt": "b\n"},
    )  # fmt: skip
    assert list_splits(root) == ("train", "val")
    assert images_of(open_dataset(root, "val")) == ["img/b.jpg"]


def test_the_filename_decides_between_images_of_one_stem(tmp_path: Path) -> None:
    texts = {"Annotations/g.xml": xml("g.jpg", "cat"), "Annotations/h.xml": xml("g.png", "dog")}
    root = build(tmp_path / "own", "JPEGImages/g.jpg", "JPEGImages/g.png", texts=texts)
    dataset = open_dataset(root)
    assert [(r.image_id, r.image_path.name, dataset.class_names[r.labels[0]]) for r in dataset.records] == [
        ("g", "g.jpg", "cat"), ("h", "g.png", "dog"),
    ]  # fmt: skip


def test_two_images_with_one_annotation_and_two_annotations_of_one_image(tmp_path: Path) -> None:
    root = build(tmp_path / "own", "Annotations/g.xml", "JPEGImages/g.jpg", "JPEGImages/g.png", "JPEGImages/g.xml")
    dataset = open_dataset(root)
    assert images_of(dataset) == ["JPEGImages/g.jpg"]
    assert sorted((p.path.name, p.kind.one) for p in dataset.problems) == [
        ("g.png", SEVERAL_IMAGES.one), ("g.xml", SECOND_LABEL.one),
    ]  # fmt: skip
    (root / "Annotations" / "other.xml").write_text(xml("g.jpg"))
    with pytest.raises(FaultyFileError, match=r"other\.xml: its image g\.jpg is already that of g\.xml"):
        open_dataset(root)


def test_images_that_cannot_be_read_are_counted_with_their_labels(tmp_path: Path) -> None:
    root = build(tmp_path / "own", "a.jpg", "a.xml", "b.HEIC", "b.xml", "c.heic", "d.CR2", "e.jpg")
    dataset = open_dataset(root)
    assert images_of(dataset) == ["a.jpg"]
    assert dataset.repaired() == (
        "2 images with the ending .heic passed over, 1 image with the ending .cr2 passed over, "
        "1 image without an annotation left out"
    )
    assert [problem.kind for problem in dataset.problems][-1] == NO_ANNOTATION


def test_only_the_split_that_was_asked_for_is_complained_about(tmp_path: Path) -> None:
    pairs = ("train/a.jpg", "train/a.xml", "test/a.jpg", "test/a.xml")
    root = build(tmp_path / "own", *pairs, "train/b.HEIC", "test/c.cr2")
    assert [problem.path.name for problem in open_dataset(root, "train").problems] == ["b.HEIC"]
    assert [problem.path.name for problem in open_dataset(root, "test").problems] == ["c.cr2"]


def test_pipes_and_links_in_a_circle_end(tmp_path: Path) -> None:
    root = build(tmp_path / "own", "a.jpg", "a.xml", "b.jpg")
    os.mkfifo(root / "b.xml")
    os.mkfifo(root / "c.jpg")
    (root / "round").symlink_to(root)
    dataset = open_dataset(root)
    assert images_of(dataset) == ["a.jpg"]
    assert sorted(problem.path.name for problem in dataset.problems) == ["b.jpg", "b.xml", "c.jpg"]
    (root / "self").symlink_to(root / "self")
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset(root / "self" / "x")


def test_nothing_outside_of_the_folder_is_read_or_quoted(voc_folder: FolderFactory, tmp_path: Path) -> None:
    root = voc_folder(images=2)
    secret = tmp_path / "secret.txt"
    secret.write_text("root:x:0:0\n")
    (root / "ImageSets/Main/leak.txt").symlink_to(secret)
    with pytest.raises(RefineDetError, match=r"leak\.txt: is a link to a file outside of the dataset") as caught:
        open_dataset(root, "leak")
    assert "root:x" not in str(caught.value)
    build(tmp_path, "a.jpg", "a.xml")
    for entry in ("../../a", str(tmp_path / "a"), str(tmp_path / "a.jpg")):
        (root / "ImageSets/Main/out.txt").write_text(f"{entry}\n")
        with pytest.raises(FaultyFileError, match="no such annotation, but the split lists it"):
            open_dataset(root, "out")
        with pytest.raises(FaultyFileError, match="no such image file, but the split lists it"):
            open_dataset(root, "out", require_annotations=False)
    secret.write_text("000001\n")
    assert len(open_dataset(root, "leak", allow_outside=True)) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300, "a name of 300 bytes"),
        ("x" * 100_000, "a name of 100000 bytes"),
        ("a\0b", "NUL"),
        ("\udcff" * 3, "no such folder"),
    ],
)
def test_names_that_no_file_can_have(tmp_path: Path, voc_folder: FolderFactory, name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        open_dataset(tmp_path / name)
    assert len(str(caught.value)) < 500
    if "\udcff" in name:
        return
    root = voc_folder(images=2)
    (root / "ImageSets/Main/odd.txt").write_text(f"{name}\n")
    with pytest.raises(FaultyFileError, match="no such annotation") as caught_entry:
        open_dataset(root, "odd")
    assert len(str(caught_entry.value)) < 700


def test_a_split_of_another_line(voc_folder: FolderFactory) -> None:
    with pytest.raises(UsageError, match="no split ") as caught:
        open_dataset(voc_folder(), "a\nb" + "x" * 5000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("names", ["cat", ["cat", 3], ["a\nb"], ["\ud800"], [""], [None]])
def test_class_names_that_are_no_list_of_texts(voc_folder: FolderFactory, names: list[str]) -> None:
    with pytest.raises(UsageError, match="class names must be") as caught:
        open_dataset(voc_folder(), class_names=names)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
