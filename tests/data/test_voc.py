"""VOC folders: the right boxes, agreeing classes, several years, and every way an annotation can be bad."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet.data import open_dataset
from refinedet.data.classes import VOC_CLASSES
from refinedet.errors import RefineDetError, UsageError

FolderFactory = Callable[..., Path]


@pytest.fixture
def root(voc_folder: FolderFactory) -> Path:
    return voc_folder(images=4)


def xml_of(root: Path, index: int = 0) -> Path:
    return root / "Annotations" / f"{index:06d}.xml"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert re.search(old, text, re.DOTALL)
    file.write_text(re.sub(old, new, text, count=1, flags=re.DOTALL))


def write_objects(root: Path, *objects: str, index: int = 0) -> Path:
    """Replace the annotation of one image; images are 96x64."""
    file = xml_of(root, index)
    file.write_text(
        f"<annotation><filename>{index:06d}.jpg</filename><size><width>96</width><height>64</height></size>"
        + "".join(objects)
        + "</annotation>"
    )
    return file


def an_object(name: str, *corners: object, more: str = "") -> str:
    tags = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def assert_bad_file(root: Path, file: Path, message: str, split: str = "trainval") -> None:
    """Strict reading raises one line that names the file; lenient reading goes on without it."""
    with pytest.raises(RefineDetError, match=message) as caught:
        open_dataset(root, split)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    lenient = open_dataset(root, split, strict=False)
    fatal = [problem for problem in lenient.problems if problem.fatal]
    assert [problem.path for problem in fatal] == [file]
    assert re.search(message, str(fatal[0]))
    assert len(lenient) == 3


def test_corners_become_pixel_edges(root: Path) -> None:
    write_objects(root, an_object("cat", 1, 1, 96, 64), an_object("dog", 10, 20, 30, 40))
    record = open_dataset(root)[0]
    assert record.boxes.tolist() == [[0, 0, 96, 64], [9, 19, 30, 40]]
    assert record.areas.tolist() == [96 * 64, 21 * 21]


def test_float_corners_are_not_rounded(root: Path) -> None:
    write_objects(root, an_object("cat", 45.70000076, 3.5, 60.25, "1e1"))
    np.testing.assert_array_equal(
        open_dataset(root)[0].boxes, np.array([[44.70000076, 2.5, 60.25, 10]], dtype=np.float32)
    )


def test_difficult_is_kept(root: Path) -> None:
    write_objects(
        root,
        an_object("cat", 1, 1, 9, 9, more="<difficult>1</difficult>"),
        an_object("cat", 1, 1, 9, 9, more="<difficult>0</difficult>"),
        an_object("cat", 1, 1, 9, 9),
    )
    record = open_dataset(root)[0]
    assert record.difficult.tolist() == [True, False, False]
    assert record.crowd.tolist() == [False] * 3


def test_parts_of_a_person_are_no_objects(root: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    write_objects(root, an_object("cat", 10, 20, 30, 40, more=part))
    dataset = open_dataset(root)
    assert dataset[0].boxes.tolist() == [[9, 19, 30, 40]]
    assert dataset.class_names == ("cat", "dog")
    assert not dataset.problems


def test_classes_of_voc_are_the_twenty_in_alphabetical_order(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder(name="VOCdevkit/VOC2007"))
    assert dataset.class_names == VOC_CLASSES == tuple(sorted(VOC_CLASSES))
    assert len(VOC_CLASSES) == 20


def test_own_classes_are_sorted_and_the_same_for_every_split(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=4, class_names=("zebu", "ant", "mole"), splits={"train": [0], "val": [2]})
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert train.class_names == val.class_names == ("ant", "mole", "zebu")
    assert [train.class_names[label] for label in train[0].labels] == ["zebu"]


def test_given_classes_decide_the_labels(root: Path) -> None:
    dataset = open_dataset(root, class_names=["dog", "bird", "cat"])
    assert dataset.class_names == ("dog", "bird", "cat")
    assert dataset[0].labels.tolist() == [2]


def test_order_of_the_split_file_is_kept(root: Path) -> None:
    (root / "ImageSets/Main/odd.txt").write_text("000003\r\n\r\n  000001  \n000000.jpg\n000003\n")
    dataset = open_dataset(root, "odd")
    assert [record.image_id for record in dataset.records] == ["000003", "000001", "000000"]
    assert "listed twice" in dataset.problems[0].message


def test_lists_of_one_class(root: Path) -> None:
    (root / "ImageSets/Main/cat_train.txt").write_text("000000  1\n000001 -1\n000002  0\n")
    assert [record.image_id for record in open_dataset(root, "cat_train").records] == ["000000", "000002"]
    with pytest.raises(UsageError, match=r"available: test, train, trainval, val$"):
        open_dataset(root, "nothing")


def test_stem_that_ends_like_a_class_flag(root: Path) -> None:
    for folder, ending in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        shutil.copy(root / folder / f"000000{ending}", root / folder / f"scan 1{ending}")
    (root / "ImageSets/Main/odd.txt").write_text("scan 1\n")
    assert open_dataset(root, "odd")[0].image_id == "scan 1"


def test_several_years(voc_folder: FolderFactory) -> None:
    first = voc_folder(images=4, name="VOCdevkit/VOC2007", splits={"trainval": [0, 1], "test": [2, 3]})
    voc_folder(images=3, first=10, name="VOCdevkit/VOC2012", splits={"trainval": [10, 11], "val": [12]})
    devkit = first.parent

    def ids(split: str | None) -> list[str | int]:
        return [record.image_id for record in open_dataset(devkit, split).records]

    assert ids("trainval") == ["000000", "000001", "000010", "000011"]
    assert ids("test") == ["000002", "000003"]
    assert ids("2012:trainval") == ["000010", "000011"]
    assert ids("2007:trainval+2012:trainval") == ids("trainval")
    assert ids("VOC2007:test+VOC2012:val") == ["000002", "000003", "000012"]
    assert ids("trainval+test") == ["000000", "000001", "000002", "000003", "000010", "000011"]
    assert len(ids(None)) == 7
    assert len(open_dataset(devkit.parent, "trainval")) == 4
    with pytest.raises(UsageError, match=r"no year '2010' .* available: 2007, 2012"):
        ids("2010:train")
    with pytest.raises(UsageError, match="no split '2012:test'; available: test, trainval, val"):
        ids("2012:test")


def test_same_stem_in_two_years_stays_apart(voc_folder: FolderFactory) -> None:
    first = voc_folder(images=1, name="devkit/A")
    voc_folder(images=1, name="devkit/B")
    assert [record.image_id for record in open_dataset(first.parent).records] == ["000000", "B_000000"]


def test_flat_folder_without_splits(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=3, splits={})
    assert len(open_dataset(root)) == len(open_dataset(root, "all")) == 3
    with pytest.raises(UsageError, match="no split 'train'; it has no splits"):
        open_dataset(root, "train")


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "JPEG", "png", "PNG"])
def test_extensions_of_images(voc_folder: FolderFactory, extension: str) -> None:
    root = voc_folder(images=1, extension=extension)
    # Annotations copied from elsewhere often say .jpg whatever the file is.
    change(xml_of(root), "000000[.]" + extension, "000000.jpg")
    dataset = open_dataset(root)
    assert dataset[0].image_path.suffix == f".{extension}"
    assert dataset.load_image(0).shape == (64, 96, 3)
    assert not dataset.problems


def test_filename_that_disagrees(root: Path) -> None:
    change(xml_of(root), "000000[.]jpg", "C:\\\\\\\\pictures\\\\\\\\other.jpg")
    dataset = open_dataset(root)
    assert dataset[0].image_path.name == "000000.jpg"
    assert [str(problem.path) for problem in dataset.problems] == [str(xml_of(root))]
    assert "'other.jpg'" in dataset.problems[0].message


def test_filename_that_alone_leads_to_the_image(root: Path) -> None:
    (root / "JPEGImages/000000.jpg").rename(root / "JPEGImages/other.jpg")
    change(xml_of(root), "000000[.]jpg", "some/folder/other.jpg")
    dataset = open_dataset(root)
    assert dataset[0].image_path.name == "other.jpg"
    assert dataset[0].image_id == "000000"
    assert [problem.fatal for problem in dataset.problems] == [False]


def test_filename_cannot_leave_the_folder(root: Path) -> None:
    (root / "JPEGImages/000000.jpg").rename(root / "secret.jpg")
    change(xml_of(root), "000000[.]jpg", "../secret.jpg")
    assert_bad_file(root, xml_of(root), "its image is missing")


def test_images_without_annotation_are_named(root: Path) -> None:
    shutil.copy(root / "JPEGImages/000000.jpg", root / "JPEGImages/extra.jpg")
    dataset = open_dataset(root)
    assert len(dataset) == 4
    assert [(problem.path.name, problem.fatal) for problem in dataset.problems] == [("extra.jpg", False)]
    assert not open_dataset(root, "trainval").problems


def test_empty_split(root: Path) -> None:
    file = root / "ImageSets/Main/void.txt"
    file.write_text("\n")
    with pytest.raises(UsageError, match="split 'void' is empty") as caught:
        open_dataset(root, "void")
    assert str(file) in str(caught.value)


def test_listed_annotation_is_missing(root: Path) -> None:
    xml_of(root).unlink()
    assert_bad_file(root, xml_of(root), "no such annotation, but the split lists it")


def test_image_is_missing(root: Path) -> None:
    (root / "JPEGImages/000000.jpg").unlink()
    assert_bad_file(root, xml_of(root), "its image is missing: no 000000.jpg")


def test_xml_cut(root: Path) -> None:
    text = xml_of(root).read_text()
    xml_of(root).write_text(text[: len(text) // 2])
    assert_bad_file(root, xml_of(root), "not well-formed XML")


def test_xml_empty(root: Path) -> None:
    xml_of(root).write_text("")
    assert_bad_file(root, xml_of(root), "not well-formed XML")


def test_binary_in_place_of_xml(root: Path) -> None:
    xml_of(root).write_bytes(b"\x80\x04\x95cos\nsystem\n\x00\xff")
    assert_bad_file(root, xml_of(root), "not well-formed XML")


def test_entity_bomb(root: Path) -> None:
    levels = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    xml_of(root).write_text(
        f'<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a0 "boom">{levels}]><annotation>&a9;</annotation>'
    )
    assert_bad_file(root, xml_of(root), "declares entities, which are refused")


def test_external_entity(root: Path) -> None:
    xml_of(root).write_text(
        '<!DOCTYPE b [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation><filename>&x;</filename></annotation>'
    )
    assert_bad_file(root, xml_of(root), "declares entities, which are refused")


def test_xml_of_another_kind(root: Path) -> None:
    xml_of(root).write_text("<svg/>")
    assert_bad_file(root, xml_of(root), "not a VOC annotation: its outermost element is not <annotation>")


def test_broken_file_outside_the_split(root: Path) -> None:
    """It may hold a class that shifts the labels, so it is not passed over, unless the classes are given."""
    xml_of(root, 1).write_text("<annotation>")
    with pytest.raises(RefineDetError, match="not well-formed"):
        open_dataset(root, "train")
    assert len(open_dataset(root, "train", ["cat", "dog"])) == 2


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size/>",
        "<size><width>0</width><height>0</height></size>",
        "<size><width>x</width><height>9</height></size>",
    ],
)
def test_no_size(root: Path, size: str) -> None:
    change(xml_of(root), "<size>.*</size>", size)
    dataset = open_dataset(root)
    assert (dataset[0].width, dataset[0].height) == (96, 64)
    assert len(dataset) == 4
    assert [(problem.path, problem.fatal) for problem in dataset.problems] == [(xml_of(root), False)]
    assert "gives no image size; 96x64 taken from 000000.jpg" in dataset.problems[0].message


def test_no_size_and_no_readable_image(root: Path) -> None:
    change(xml_of(root), "<size>.*</size>", "")
    (root / "JPEGImages/000000.jpg").write_text("no image")
    assert_bad_file(root, xml_of(root), "gives no image size, and .*not an image")


def test_box_outside_the_image(root: Path) -> None:
    file = write_objects(
        root, an_object("cat", 90, 60, 120, 80), an_object("dog", 97, 1, 120, 20), an_object("cat", 1, 1, 9, 9)
    )
    dataset = open_dataset(root)
    assert dataset[0].boxes.tolist() == [[89, 59, 96, 64], [0, 0, 9, 9]]
    assert [str(problem) for problem in dataset.problems] == [
        f"{file}: object 1 (cat): box xmin=90 ymin=60 xmax=120 ymax=80 reaches outside the 96x64 image; clipped",
        f"{file}: object 2 (dog): box xmin=97 ymin=1 xmax=120 ymax=20 lies outside the 96x64 image; dropped",
    ]


def test_box_without_area(root: Path) -> None:
    write_objects(root, an_object("cat", 50, 30, 50, 30), an_object("cat", 9, 1, 2, 9), an_object("dog", 1, 1, 9, 9))
    dataset = open_dataset(root)
    assert dataset[0].boxes.tolist() == [[0, 0, 9, 9]]
    assert "object 1 (cat): box xmin=50 ymin=30 xmax=50 ymax=30 has no area; dropped" in str(dataset.problems[0])
    assert "object 2" in str(dataset.problems[1])
    assert "corners are swapped" in str(dataset.problems[1])


def test_object_without_box(root: Path) -> None:
    write_objects(root, "<object><name>cat</name></object>", an_object("dog", 1, 1, 9, 9), an_object("cat", 5, 5, 5, 5))
    dataset = open_dataset(root)
    assert dataset[0].boxes.tolist() == [[0, 0, 9, 9]]
    assert "object 1 (cat) has no <bndbox>; dropped" in str(dataset.problems[0])
    assert "object 3 (cat)" in str(dataset.problems[1])


@pytest.mark.parametrize("value", ["", "left", "nan", "inf"])
def test_corner_that_is_no_number(root: Path, value: str) -> None:
    file = write_objects(root, an_object("cat", 1, 1, value, 9))
    assert_bad_file(root, file, f"object 1 .cat.: <xmax> is '{value}', not a number")


def test_object_without_name(root: Path) -> None:
    file = write_objects(root, an_object(" ", 1, 1, 2, 9))
    assert_bad_file(root, file, "object 1 has no class name")


def test_unknown_class(root: Path) -> None:
    file = write_objects(root, an_object("cat", 1, 1, 9, 9), an_object("Dogg", 1, 1, 9, 9))
    with pytest.raises(
        RefineDetError, match=r"object 2: class 'Dogg' is not in the list of classes; .*'dog'"
    ) as caught:
        open_dataset(root, class_names=["cat", "dog"])
    assert str(file) in str(caught.value)
    lenient = open_dataset(root, class_names=["cat", "dog"], strict=False)
    assert len(lenient) == 3
    assert [(problem.path, problem.fatal) for problem in lenient.problems] == [(file, True)]


def test_image_of_another_size_is_found_when_it_is_loaded(root: Path) -> None:
    Image.new("RGB", (50, 50)).save(root / "JPEGImages/000000.jpg")
    dataset = open_dataset(root)
    with pytest.raises(RefineDetError, match="is 50x50, but its annotation is made for 96x64"):
        dataset.load_image(0)


def test_exif_turned_image_fits_its_annotation(root: Path) -> None:
    """One tool annotates what is stored, another what is shown; the size tells which it was."""
    stored = np.zeros((96, 64, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(root / "JPEGImages/000000.jpg", exif=exif)
    assert open_dataset(root).load_image(0).shape == (64, 96, 3)
    Image.fromarray(stored.transpose(1, 0, 2)).save(root / "JPEGImages/000000.jpg", exif=exif)
    assert open_dataset(root).load_image(0).shape == (64, 96, 3)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("split", "images"), [("train", 2500), ("val", 2508), ("trainval", 5008), (None, 5008), ("2007:train+val", 5008)]
)
def test_voc2007(shared_data: Path, split: str | None, images: int) -> None:
    dataset = open_dataset(shared_data / "VOCdevkit", split)
    assert len(dataset) == images
    assert dataset.class_names == VOC_CLASSES
    assert not dataset.problems


@pytest.mark.shared_data
def test_voc2007_against_regular_expressions(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "VOCdevkit/VOC2007", "val")
    for record in dataset.records[::10]:
        text = (shared_data / "VOCdevkit/VOC2007/Annotations" / f"{record.image_id}.xml").read_text()
        found = re.findall(
            r"<name>(\w+)</name>.*?<difficult>(\d)</difficult>.*?<xmin>(\d+)</xmin>\s*<ymin>(\d+)</ymin>\s*"
            r"<xmax>(\d+)</xmax>\s*<ymax>(\d+)</ymax>",
            text,
            re.DOTALL,
        )
        assert [dataset.class_names[label] for label in record.labels] == [row[0] for row in found]
        assert record.difficult.tolist() == [row[1] == "1" for row in found]
        expected = [[int(row[2]) - 1, int(row[3]) - 1, int(row[4]), int(row[5])] for row in found]
        assert record.boxes.tolist() == expected
    index = 7
    assert dataset.load_image(index).shape == (dataset[index].height, dataset[index].width, 3)


@pytest.mark.shared_data
def test_bccd(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "BCCD")
    assert len(dataset) == 364
    assert dataset.class_names == ("Platelets", "RBC", "WBC")
    assert sorted(problem.path.stem for problem in dataset.problems) == ["BloodImage_00338", "BloodImage_00343"]
    assert len(open_dataset(shared_data / "BCCD", "train")) == 205
