"""Layouts are recognised, the three of them say the same about the same scenes, and wrong calls are one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refinedet.data import detect_layout, list_splits, open_dataset, open_joined
from refinedet.errors import UsageError

FolderFactory = Callable[..., Path]


def test_importing_the_data_layer_leaves_torch_alone() -> None:
    code = "import sys, refinedet.data, refinedet.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layouts(voc_folder: FolderFactory, coco_folder: FolderFactory, yolo_folder: FolderFactory) -> None:
    assert detect_layout(voc_folder()) == "voc"
    assert detect_layout(voc_folder(name="VOCdevkit/VOC2007").parent) == "voc"
    coco, yolo = coco_folder(), yolo_folder()
    assert detect_layout(coco) == "coco"
    assert detect_layout(coco / "annotations" / "instances_val.json") == "coco"
    assert detect_layout(yolo) == "yolo"
    assert detect_layout(yolo / "data.yaml") == "yolo"


def test_the_three_layouts_agree(
    voc_folder: FolderFactory, coco_folder: FolderFactory, yolo_folder: FolderFactory
) -> None:
    voc, coco, yolo = (open_dataset(make(), "train", ["cat", "dog"]) for make in (voc_folder, coco_folder, yolo_folder))
    assert [d.layout for d in (voc, coco, yolo)] == ["voc", "coco", "yolo"]
    assert len(voc) == len(coco) == len(yolo) == 3
    for index in range(3):
        first = voc[index]
        assert len(first.labels) > 0
        for other in (coco[index], yolo[index]):
            np.testing.assert_allclose(first.boxes, other.boxes, atol=1e-4)
            np.testing.assert_array_equal(first.labels, other.labels)
            assert (first.width, first.height) == (other.width, other.height)
            assert other.boxes.dtype == np.float32
        for dataset in (voc, coco, yolo):
            assert dataset.load_image(index).shape == (64, 96, 3)
            assert not dataset.problems


def test_the_boxes_of_the_fixtures_are_where_the_pixels_are_bright(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder())
    for index, record in enumerate(dataset.records):
        image = dataset.load_image(index).astype(int)
        covered = np.zeros(image.shape[:2], dtype=bool)
        for x1, y1, x2, y2 in record.boxes.astype(int):
            assert image[y1:y2, x1:x2].max(axis=2).mean() > 180
            covered[y1:y2, x1:x2] = True
        assert image[~covered].mean() < 45


def test_all_and_none_read_everything(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=5)
    assert len(open_dataset(root)) == len(open_dataset(root, "all")) == 5


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[:80%]", range(0, 8)),
        ("[80%:]", range(8, 10)),
        ("[-25%:]", range(8, 10)),  # a quarter of ten is two and a half: two
        ("[:-25%]", range(0, 8)),
        ("[3:7]", range(3, 7)),
        ("[-3:]", range(7, 10)),
        ("[50%:7]", range(5, 7)),
        ("[:]", range(0, 10)),
        ("[:100%]", range(0, 10)),
        ("[5:500]", range(5, 10)),
    ],
)
def test_a_part_of_a_split(
    voc_folder: FolderFactory, coco_folder: FolderFactory, yolo_folder: FolderFactory, part: str, expected: range
) -> None:
    for make in (voc_folder, coco_folder, yolo_folder):
        root = make(images=10)
        everything = open_dataset(root)
        found = open_dataset(root, f"all{part}")
        assert [r.image_id for r in found.records] == [everything[i].image_id for i in expected]
        assert found.split == f"all{part}"
        # Before the brackets, all is what nothing is.
        assert len(open_dataset(root, part)) == len(expected)


def test_two_parts_share_nothing_and_miss_nothing(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=7)
    train = open_dataset(root, "train")
    for percent in (34, 50, 66):
        parts = [open_dataset(root, split).records for split in (f"train[:{percent}%]", f"train[{percent}%:]")]
        assert [r.image_id for part in parts for r in part] == [r.image_id for r in train.records]


@pytest.mark.parametrize(
    "split",
    ["train[80%]", "train[:80%", "train[a:b]", "train[:1]+val", "train[::2]", "train]", f"train[:{'9' * 5000}]"],
)
def test_parts_that_are_none(voc_folder: FolderFactory, split: str) -> None:
    with pytest.raises(UsageError, match=r"written as \[first:last\] at the end"):
        open_dataset(voc_folder(), split)


def test_a_part_of_more_than_all(voc_folder: FolderFactory) -> None:
    root = voc_folder()
    with pytest.raises(UsageError, match="0 % to 100 %, not to 101%"):
        open_dataset(root, "train[:101%]")
    with pytest.raises(UsageError, match=r"no split 'trian'"):
        open_dataset(root, "trian[:10%]")
    with pytest.raises(UsageError, match=r"'train\[2:2\]' has no images"):
        open_dataset(root, "train[2:2]")


def test_images_without_objects_are_valid(
    voc_folder: FolderFactory, coco_folder: FolderFactory, yolo_folder: FolderFactory
) -> None:
    for make in (voc_folder, coco_folder, yolo_folder):
        dataset = open_dataset(make(), "val")
        empty = dataset[1]  # scene 3
        assert empty.boxes.shape == (0, 4)
        assert empty.labels.shape == empty.difficult.shape == empty.crowd.shape == empty.areas.shape == (0,)
        assert empty.labels.dtype == np.int64
        assert not dataset.problems


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder") as caught:
        open_dataset(tmp_path / "gone")
    assert str(tmp_path / "gone") in str(caught.value)
    assert caught.value.exit_code == 2


def test_folder_without_a_known_layout(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a dataset: found none of"):
        open_dataset(tmp_path)
    (tmp_path / "labels").mkdir()
    with pytest.raises(UsageError, match=r"no data\.yaml"):
        open_dataset(tmp_path)


def test_file_that_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(UsageError, match="a dataset is a folder"):
        open_dataset(tmp_path / "photo.jpg")


@pytest.mark.parametrize("names", [[], ["cat", "cat"]])
def test_bad_class_names(voc_folder: FolderFactory, names: list[str]) -> None:
    with pytest.raises(UsageError, match="class names must be different"):
        open_dataset(voc_folder(), class_names=names)


def test_splits_are_listed(voc_folder: FolderFactory, coco_folder: FolderFactory, yolo_folder: FolderFactory) -> None:
    assert list_splits(voc_folder()) == ("test", "train", "trainval", "val")
    assert list_splits(coco_folder()) == ("train", "val")
    assert list_splits(yolo_folder()) == ("train", "val")


def test_unknown_split_lists_the_known_ones(
    voc_folder: FolderFactory, coco_folder: FolderFactory, yolo_folder: FolderFactory
) -> None:
    for make in (voc_folder, coco_folder, yolo_folder):
        with pytest.raises(UsageError, match=r"no split 'dev'; available: .*train, .*val") as caught:
            open_dataset(make(), "dev")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strict", [True, False])
def test_images_without_any_annotation_are_no_dataset(voc_folder: FolderFactory, strict: bool) -> None:
    root = voc_folder(images=2)
    for file in (root / "Annotations").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="has no images"):
        open_dataset(root, strict=strict)


def test_several_datasets_are_joined(voc_folder: FolderFactory, yolo_folder: FolderFactory) -> None:
    voc, yolo = voc_folder(images=4), yolo_folder(images=4)
    joined = open_joined([voc, yolo], "train")
    assert len(joined) == 4
    assert len({record.image_id for record in joined.records}) == 4
    assert [record.image_path.is_relative_to(yolo) for record in joined.records] == [False, False, True, True]
    with pytest.raises(UsageError, match="its classes differ from those of"):
        open_joined([voc, voc_folder(name="other", class_names=("cat", "emu"))], "train")
