"""Where the images of a YOLO dataset are: found wherever they now lie, with or without a yaml, never outside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from refinedet.data import detect_layout, list_splits, open_dataset
from refinedet.data.holdout import image_names
from refinedet.errors import RefineDetError, UsageError
from refinedet.training.data_check import image_digests
from yolo_files import YAML, counts, write_images, write_labels, write_yolo

YamlFolder = Callable[..., Path]


@pytest.fixture
def yaml_folder(tmp_path: Path) -> YamlFolder:
    """``write_yolo`` in a folder of its own."""
    return partial(write_yolo, tmp_path / "yolo")


@pytest.mark.parametrize(
    ("text", "noted"),
    [
        ("train: /content/project-1/train/images", True),
        ("train: D:\\data\\train\\images", True),
        ("path: D:\\data\ntrain: train\\images", False),
        ("path: /home/user/export\ntrain: ./train/images/", False),
        ("train: ../train/images", False),
        ("Train: train/images", False),
        ("path: .\nTRAIN: [train/images]", False),
        ("path: null\ntrain: train/images\ntest:\nval: null", False),
    ],
)
def test_paths_of_other_machines(yaml_folder: YamlFolder, text: str, noted: bool) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], f"{text}\nnames: [cat, dog]\n")
    assert list_splits(root) == ("train",)
    dataset = open_dataset(root, "train")
    assert counts(dataset) == {"a.jpg": 1}
    assert [problem.fatal for problem in dataset.problems] == [False] * noted


def test_a_split_that_is_not_there_is_left_out(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], f"{YAML}test: ../test/images\n")
    assert list_splits(root) == ("train", "val")
    dataset = open_dataset(root)
    assert counts(dataset) == {"a.jpg": 1, "v.jpg": 1}
    assert dataset.repaired() == "1 split that is not there"
    with pytest.raises(UsageError, match=r"'test' names ../test/images, which does not exist"):
        open_dataset(root, "test")


def test_a_yaml_without_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg"])
    write_labels(tmp_path / "labels", ["a.txt"])
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    assert list_splits(tmp_path) == ()
    assert counts(open_dataset(tmp_path)) == {"a.jpg": 1}
    write_images(tmp_path / "images", ["train/b.jpg", "val/c.jpg"])
    write_labels(tmp_path / "labels", ["train/b.txt", "val/c.txt"])
    assert list_splits(tmp_path) == ("train", "val")
    assert counts(open_dataset(tmp_path, "val")) == {"c.jpg": 1}


@pytest.mark.parametrize("line", ["data/images/Train/a.jpg", "./images/Train/a.jpg", "C:\\x\\images\\Train\\a.jpg"])
def test_lists_of_images(tmp_path: Path, line: str) -> None:
    write_images(tmp_path / "images/Train", ["a.jpg", "b.jpg"])
    write_labels(tmp_path / "labels/Train", ["a.txt", "b.txt"])
    (tmp_path / "Train.txt").write_text(f"{line}\n\n")
    (tmp_path / "data.yaml").write_text("Train: Train.txt\npath: .\nnames: {0: cat}\n")
    assert counts(open_dataset(tmp_path, "train")) == {"a.jpg": 1}  # b.txt belongs to b.jpg, which is not listed


def test_a_list_with_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode("图.jpg".encode("gbk"))
    write_images(tmp_path / "images", [name])
    write_labels(tmp_path / "labels", [name.replace(".jpg", ".txt")])
    (tmp_path / "list.txt").write_bytes(b"images/" + os.fsencode(name) + b"\n")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [cat]\n")
    assert counts(open_dataset(tmp_path, "train")) == {name: 1}


def test_a_list_of_missing_images_is_one_problem(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], "train: list.txt\nnames: [cat]\n")
    (root / "list.txt").write_text("train/images/a.jpg\n" + "".join(f"gone/{i}.jpg\n" for i in range(5)) + "\0\n")
    dataset = open_dataset(root, "train", strict=False)
    assert counts(dataset) == {"a.jpg": 1}
    assert [(problem.path, problem.count) for problem in dataset.problems] == [(root / "list.txt", 6)]


# Data without a yaml.


@pytest.mark.parametrize(
    ("names_file", "images", "labels"),
    [
        ("classes.txt", ".", "."),  # labelImg
        ("classes.txt", "images", "labels"),  # Label Studio
        ("labels/classes.txt", "images", "labels"),
        ("obj.names", "obj_train_data", "obj_train_data"),  # CVAT
        ("images/train/classes.txt", "images/train", "labels/train"),
    ],
)
def test_names_without_a_yaml(tmp_path: Path, names_file: str, images: str, labels: str) -> None:
    write_images(tmp_path / images, ["a.jpg", "b.jpg"])
    write_labels(tmp_path / labels, ["a.txt"])
    (tmp_path / names_file).write_text("cat\ndog\n\n")
    (tmp_path / "notes.json").write_text('{"categories": []}')
    assert detect_layout(tmp_path) == "yolo"
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ("cat", "dog")
    assert counts(dataset) == {"a.jpg": 1, "b.jpg": 0}
    assert not dataset.problems


@pytest.mark.parametrize("has_data_file", [True, False])
def test_darknet(tmp_path: Path, has_data_file: bool) -> None:
    write_images(tmp_path / "obj_train_data", ["a.jpg", "b.jpg", "c.jpg"])
    write_labels(tmp_path / "obj_train_data", ["a.txt", "b.txt", "c.txt"])
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    (tmp_path / "valid.txt").write_text("data/obj_train_data/c.jpg\n")
    if has_data_file:
        (tmp_path / "obj.data").write_text(
            "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
        )
        assert detect_layout(tmp_path / "obj.data") == "yolo"
    assert list_splits(tmp_path) == ("train", "val")
    dataset = open_dataset(tmp_path, "train")
    assert counts(dataset) == {"a.jpg": 1, "b.jpg": 1}
    assert dataset.class_names == ("cat", "dog")
    assert counts(open_dataset(tmp_path, "val")) == {"c.jpg": 1}


def test_names_that_contradict_each_other(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg"])
    write_labels(tmp_path, ["classes.txt"], "cat\ndog\n")
    write_labels(tmp_path / "labels", ["classes.txt"], "dog\ncat\n")
    with pytest.raises(RefineDetError, match="its class names differ"):
        open_dataset(tmp_path)


def test_class_names_beside_the_annotations_of_another_tool(tmp_path: Path) -> None:
    # labelImg leaves its classes.txt behind when it is switched from YOLO to PASCAL VOC.
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "a.xml").write_text(
        "<annotation><filename>a.jpg</filename><size><width>160</width><height>120</height></size><object><name>dog"
        "</name><bndbox><xmin>21</xmin><ymin>21</ymin><xmax>60</xmax><ymax>60</ymax></bndbox></object></annotation>"
    )
    assert detect_layout(tmp_path) == "voc"
    assert open_dataset(tmp_path).class_names == ("dog",)


# What lies outside of the data.


def test_absolute_paths_of_the_yaml_are_the_users_own(yaml_folder: YamlFolder, tmp_path: Path) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"])
    other = tmp_path / "elsewhere"
    for text in (
        f"train: {root}/train/images",
        f"path: {root}\ntrain: train/images",
        "path: ../yolo\ntrain: train/images",
    ):
        other.mkdir(exist_ok=True)
        (other / "data.yaml").write_text(f"{text}\nnames: [cat]\n")
        assert counts(open_dataset(other, "train")) == {"a.jpg": 1}


def test_relative_paths_do_not_lead_out(yaml_folder: YamlFolder, tmp_path: Path) -> None:
    root = yaml_folder([], [], "train: ../private/images\nnames: [cat]\n")
    write_images(tmp_path / "private/images", ["p.jpg"])
    write_labels(tmp_path / "private/labels", ["p.txt"])
    for split in ("train", None):
        with pytest.raises(UsageError, match=r"leads out of the folder of the data .*--allow-outside"):
            open_dataset(root, split)
    assert counts(open_dataset(root, "train", allow_outside=True)) == {"p.jpg": 1}
    # An export that means the folder beside its yaml gets that.
    write_images(root / "private/images", ["own.jpg"])
    write_labels(root / "private/labels", ["own.txt"])
    assert counts(open_dataset(root, "train")) == {"own.jpg": 1}


@pytest.mark.parametrize("absolute", [True, False])
def test_lines_of_lists_do_not_lead_out(yaml_folder: YamlFolder, tmp_path: Path, absolute: bool) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], "train: list.txt\nnames: [cat]\n")
    write_images(tmp_path, ["private/p.jpg"])
    write_labels(tmp_path, ["private/p.txt"])
    (root / "list.txt").write_text(f"{tmp_path}/private/p.jpg\n" if absolute else "../private/p.jpg\n")
    with pytest.raises(RefineDetError, match=r"list.txt: line 1 names .* outside the folder of the data"):
        open_dataset(root, "train")
    assert counts(open_dataset(root, "train", allow_outside=True)) == {"p.jpg": 1}


@pytest.mark.parametrize("text", ["train: /", "path: /\ntrain: .", "train: ..", "train: ../..", "path: /\ntrain: /"])
def test_folders_above_are_refused(yaml_folder: YamlFolder, text: str) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], f"{text}\nnames: [cat]\n")
    if text.endswith(" ."):
        assert len(open_dataset(root, "train")) == 2  # "/" is no path of data, so "." is the folder of the yaml
        return
    with pytest.raises(UsageError, match=r"a folder above|leads out"):
        open_dataset(root, "train")


@pytest.mark.parametrize("place", ["/proc", "/proc/self/cwd/..", "/sys"])
def test_folders_of_the_system_hold_no_images(yaml_folder: YamlFolder, place: str) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], f"train: {place}\nnames: [cat]\n")
    with pytest.raises(RefineDetError, match=r"has no images|does not exist"):
        open_dataset(root, "train")


def test_links_in_a_circle(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"])
    for folder in (root / "train/images", root / "train/labels", root / "valid/labels"):
        (folder / "loop").symlink_to(root)
        (folder / "self").symlink_to(folder / "self")
        (folder / "top").symlink_to("/")
        (folder / "system").symlink_to("/proc")
    shutil.rmtree(root / "valid/images")
    write_images(root / "valid/images", ["other.jpg"])  # without labels, so these are looked for everywhere
    assert counts(open_dataset(root, "train")) == {"a.jpg": 1}
    assert counts(open_dataset(root, strict=False)) == {"a.jpg": 1}


def test_what_foreign_files_say_is_never_shown(yaml_folder: YamlFolder, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("swordfish:x:0:0\n")
    root = yaml_folder(["a.jpg", "b.jpg"], ["b.txt"])
    (root / "train/labels/a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RefineDetError, match="line 1 is not a row of numbers") as label:
        open_dataset(root, "train")
    (root / "list.txt").symlink_to(tmp_path / "secret.txt")
    (root / "data.yaml").write_text("train: list.txt\nnames: [cat]\n")
    with pytest.raises(RefineDetError, match="line 1 names no image") as listed:
        open_dataset(root, "train")
    (root / "data.yaml").unlink()
    (root / "classes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RefineDetError, match="class names lie outside") as names:
        open_dataset(root)
    for caught in (label, listed, names):
        assert "swordfish" not in str(caught.value)


def write_lists(root: Path) -> None:
    write_images(root / "images/train", ["a.jpg", "b.png"])
    write_labels(root / "labels/train", ["a.txt", "b.txt"])
    # One line as it stands, one that is found by its end.
    (root / "train.txt").write_text("images/train/a.jpg\n/content/images/train/b.png\n")


def write_with_list(root: Path, text: str) -> None:
    write_lists(root)
    (root / "data.yaml").write_text(text.format(root=root) + "\nnames: [cat]\n")


def write_darknet(root: Path) -> None:
    write_lists(root)
    (root / "obj.names").write_text("cat\n")
    (root / "obj.data").write_text("classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n")


@pytest.mark.parametrize(
    "write",
    [
        partial(write_with_list, text="train: train.txt"),
        partial(write_with_list, text="train: {root}/train.txt"),
        partial(write_with_list, text="train: {root}/images/train"),
        partial(write_with_list, text="path: {root}\ntrain: images/train"),
        partial(write_with_list, text="path: {root}\ntrain: [images/train, train.txt]"),
        write_darknet,
    ],
)
@pytest.mark.parametrize("spelling", ["root", ".", "../{name}/root", "root/images/.."])
def test_relative_paths_read_as_absolute_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], spelling: str
) -> None:
    root = tmp_path / "root"
    write(root)
    expected = open_dataset(root, "train")
    assert counts(expected) == {"a.jpg": 1, "b.png": 1}
    monkeypatch.chdir(root if spelling == "." else tmp_path)
    dataset = open_dataset(Path(spelling.format(name=tmp_path.name)), "train")
    assert counts(dataset) == {"a.jpg": 1, "b.png": 1}
    assert dataset.digest() == expected.digest()
    assert image_names(dataset) == image_names(expected) == ["images/train/a.jpg", "images/train/b.png"]
    spelled = spelling.format(name=tmp_path.name)
    assert image_digests(dataset, [spelled]) == image_digests(expected, [str(root)])
