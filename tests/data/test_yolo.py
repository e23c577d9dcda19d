"""YOLO folders: every form of data.yaml, polygons, and every way a label file can be bad."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refinedet.data import detect_layout, list_splits, open_dataset
from refinedet.data.health import MOSAIC_SIGNATURE
from refinedet.draw import SIGNATURE, write_image
from refinedet.errors import RefineDetError, UsageError

FolderFactory = Callable[..., Path]


@pytest.fixture
def root(yolo_folder: FolderFactory) -> Path:
    return yolo_folder(images=6)


def labels_of(root: Path, index: int = 0, split: str = "train") -> Path:
    return root / "labels" / split / f"{index:06d}.txt"


def yaml(root: Path, text: str) -> None:
    (root / "data.yaml").write_text(text)


def assert_bad_file(root: Path, file: Path, message: str) -> None:
    with pytest.raises(RefineDetError, match=message) as caught:
        open_dataset(root, "train")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    lenient = open_dataset(root, "train", strict=False)
    assert [(problem.path, problem.fatal) for problem in lenient.problems] == [(file, True)]
    assert len(lenient) == 2


def test_centre_and_size_become_edges(root: Path) -> None:
    labels_of(root).write_text("1 0.5 0.5 1 1\n\n0 0.25 0.5 0.5 0.25\n")
    dataset = open_dataset(root, "train")
    assert dataset[0].boxes.tolist() == [[0, 0, 96, 64], [0, 24, 48, 40]]
    assert dataset[0].labels.tolist() == [1, 0]
    assert dataset[0].image_id == "000000"
    assert dataset.class_names == ("cat", "dog")
    assert not dataset.problems


def test_polygon_becomes_its_bounding_box(root: Path) -> None:
    labels_of(root).write_text("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5\n1 0.1 0.5 0.2 1 0.3 0.5\n")
    record = open_dataset(root, "train")[0]
    expected = np.array([[24, 16, 72, 48], [9.6, 32, 28.8, 64]])
    np.testing.assert_allclose(record.boxes, expected, rtol=1e-6)


def test_rounded_numbers_at_the_edge_are_fine(root: Path) -> None:
    labels_of(root).write_text("0 0.9 0.5 0.201 1.002\n")
    dataset = open_dataset(root, "train")
    assert dataset[0].boxes[0, 2] == 96
    assert not dataset.problems


def test_image_without_label_file_has_no_objects(root: Path) -> None:
    labels_of(root).unlink()
    labels_of(root, 2).write_text("")
    dataset = open_dataset(root, "train")
    assert [len(record.labels) for record in dataset.records] == [0, 0, 2]
    assert not dataset.problems


@pytest.mark.parametrize(
    "names",
    ["names: [cat, dog]", "names:\n  0: cat\n  1: dog", "nc: 2\nnames:\n  - cat\n  - dog", "names: {1: dog, 0: cat}"],
)
def test_forms_of_names(root: Path, names: str) -> None:
    yaml(root, f"train: images/train\nval: images/val\n{names}\n")
    assert open_dataset(root).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("names: [cat, cat]", "a name twice"),
        ("names: {0: cat, 2: dog}", "without gaps"),
        ("names: [cat, [dog]]", r"must be a text, not \['dog'\]"),
        ("names: [cat, '']", "is empty"),
        ('names: [cat, "a\\nb"]', "has a line break"),
        ('names: [cat, "a\\ud800"]', "control character"),
        (f"names: [cat, {'x' * 100_000}]", "has 100000 letters"),
        ("names: {0: cat, one: dog}", "without gaps"),
        ("names: {1: cat, 2: dog}", "without gaps"),
        ("names: []", "must be the list of class names"),
        ("names: cat", "must be the list of class names"),
        ("nc: 2", "must be the list of class names"),
        ("nc: 3\nnames: [cat, dog]", "'nc' is 3, but 'names' has 2"),
    ],
)
def test_bad_names(root: Path, names: str, message: str) -> None:
    yaml(root, f"train: images/train\n{names}\n")
    for strict in (True, False):
        with pytest.raises(RefineDetError, match=message) as caught:
            open_dataset(root, "train", strict=strict)
        assert str(caught.value).startswith(f"{root / 'data.yaml'}: ")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "path: {root}\ntrain: images/train",
        "path: .\ntrain: images/train",
        "path: somewhere/else\ntrain: images/train",
        "train: {root}/images/train",
        "train: ../images/train",  # Roboflow's habit
        "train: [images/train]",
        "train: list.txt",
    ],
)
def test_forms_of_a_split(root: Path, text: str) -> None:
    (root / "list.txt").write_text("./images/train/000000.jpg\nimages/train/000002.jpg\n\nimages/train/000004.jpg\n")
    yaml(root, text.format(root=root) + "\nnames: [cat, dog]\n")
    dataset = open_dataset(root, "train")
    assert [record.image_id for record in dataset.records] == ["000000", "000002", "000004"]
    assert all(len(record.labels) for record in dataset.records)
    assert list_splits(root) == ("train",)


def test_several_folders_and_subfolders(root: Path) -> None:
    yaml(root, "train: [images/train, images/val]\ntest: images\nnames: [cat, dog]\n")
    assert len(open_dataset(root, "train")) == 6
    assert len(open_dataset(root, "test")) == 6
    assert len(open_dataset(root)) == 6  # each image once
    assert sum(len(record.labels) for record in open_dataset(root).records) > 6


def test_valid_means_val(root: Path) -> None:
    assert len(open_dataset(root, "valid")) == len(open_dataset(root, "val")) == 3
    assert len(open_dataset(root, "train+val")) == 6


def test_labels_beside_the_images(root: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    (flat / "photos").mkdir(parents=True)
    for folder in ("images", "labels"):
        for file in (root / folder / "train").iterdir():
            shutil.copy(file, flat / "photos")
    yaml(flat, "train: photos\nnames: [cat, dog]\n")
    assert [len(record.labels) for record in open_dataset(flat).records] == [1, 3, 2]


def test_same_stem_twice_stays_apart(root: Path) -> None:
    shutil.copy(root / "images/train/000000.jpg", root / "images/val/000000.jpg")
    ids = [record.image_id for record in open_dataset(root).records]
    assert len(set(ids)) == len(ids) == 7


def test_yaml_of_another_name(root: Path) -> None:
    (root / "data.yaml").rename(root / "pets.yaml")
    assert detect_layout(root) == "yolo"
    assert len(open_dataset(root, "train")) == 3


def test_given_classes_translate_the_numbers(root: Path) -> None:
    labels_of(root).write_text("0 0.5 0.5 1 1\n1 0.5 0.5 1 1\n")
    assert open_dataset(root, "train", ["dog", "bird", "cat"])[0].labels.tolist() == [2, 0]


def test_unknown_class(root: Path) -> None:
    labels_of(root).write_text("1 0.5 0.5 1 1\n0 0.5 0.5 1 1\n")
    with pytest.raises(RefineDetError, match=r"line 2: class 'cat' is not in the list of classes; .* 'cats'") as caught:
        open_dataset(root, "train", ["cats", "dog"])
    assert str(labels_of(root)) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 1 1", "line 2: class 2 is out of range; data.yaml has 2 names, so 0 to 1"),
        ("-1 0.5 0.5 1 1", "line 2: class -1 is out of range"),
        ("0.5 0.5 0.5 1 1", "line 2 must start with a whole number, the class: '0.5 0.5 0.5 1 1'"),
        ("cat 0.5 0.5 1 1", "line 2 is not a row of numbers: 'cat 0.5 0.5 1 1'"),
        ("0 nan 0.5 1 1", "line 2 is not a row of numbers: '0 nan 0.5 1 1'"),
        ("0 0.5 0.5 1", "line 2 has 4 numbers; expected 5"),
        ("0 0.5 0.5 1 1 0.9", "line 2 has 6 numbers; expected 5"),
        ("0,0.5,0.5,0.2,0.2", "line 2 is not a row of numbers; separate the numbers by spaces"),
        ("0 40 40 40 40", "line 2 has numbers far above 1, so they seem to be pixels"),
        ("0 10 10 20 10 20 20", "line 2 has numbers far above 1, so they seem to be pixels"),
        ("0 0.5 0.5 1 1e400", "line 2 is not a row of numbers"),
        ("9" * 500 + " 0.5 0.5 1 1", "line 2 is not a row of numbers"),
        ("a\x1b[31m\ud7ff 0.5 0.5 1 1", "line 2 is not a row of numbers"),
    ],
)
def test_bad_line(root: Path, line: str, message: str) -> None:
    labels_of(root).write_text(f"0 0.5 0.5 1 1\n{line}\n")
    assert_bad_file(root, labels_of(root), re.escape(message))


def test_label_file_that_is_no_text(root: Path) -> None:
    labels_of(root).write_bytes(b"\x80\x04\xff\xfe")
    assert_bad_file(root, labels_of(root), "cannot be read")


def test_box_without_area_and_box_outside(root: Path) -> None:
    labels_of(root).write_text("0 0.5 0.5 0 0.1\n1 1.5 0.5 0.2 0.2\n0 1.0 0.5 0.5 0.5\n")
    dataset = open_dataset(root, "train")
    assert dataset[0].boxes.tolist() == [[72, 16, 96, 48]]
    assert [problem.message.split("; ")[1] for problem in dataset.problems] == ["dropped", "dropped", "clipped"]
    assert "line 1 (cat): box 48,28.8,48,35.2 has no area" in str(dataset.problems[0])
    assert "line 2 (dog)" in str(dataset.problems[1])
    assert all(problem.path == labels_of(root) for problem in dataset.problems)


def test_all_labels_lost(root: Path) -> None:
    shutil.rmtree(root / "labels")
    with pytest.raises(RefineDetError, match=r"none of its images has labels; expected them in .*labels/train"):
        open_dataset(root, "train")


def test_file_that_is_no_image(root: Path) -> None:
    (root / "images/train/000000.jpg").write_text("letter")
    assert_bad_file(root, root / "images/train/000000.jpg", "not an image")


def test_missing_folder(root: Path) -> None:
    shutil.rmtree(root / "images/train")
    with pytest.raises(UsageError, match="'train' names images/train, which does not exist") as caught:
        open_dataset(root, "train")
    assert str(root / "data.yaml") in str(caught.value)


def test_empty_split(root: Path) -> None:
    for file in (root / "images/train").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="split 'train' has no images"):
        open_dataset(root, "train")


def test_list_names_a_missing_image(root: Path) -> None:
    (root / "list.txt").write_text("images/train/000000.jpg\nimages/train/000002.jpg\nimages/train/gone.jpg\n")
    yaml(root, "train: list.txt\nnames: [cat, dog]\n")
    assert_bad_file(root, root / "list.txt", "line 3 names images/train/gone.jpg, which does not exist")


@pytest.mark.parametrize("text", ["a: [", "\x00", "just text", "- 1\n- 2", ""])
def test_yaml_that_cannot_be_used(root: Path, text: str) -> None:
    yaml(root, text)
    with pytest.raises(RefineDetError, match=r"not valid YAML|not a YOLO data.yaml") as caught:
        open_dataset(root, "train")
    assert str(root / "data.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_is_never_executed(root: Path, tmp_path: Path) -> None:
    yaml(root, f"names: !!python/object/apply:os.system ['touch {tmp_path}/pwned']\ntrain: images/train\n")
    with pytest.raises(RefineDetError, match="not valid YAML"):
        open_dataset(root, "train")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["data.yaml", "other.yml", "obj.data", "classes.txt"])
def test_a_pipe_is_no_description(root: Path, name: str) -> None:
    (root / "data.yaml").unlink(missing_ok=True)
    os.mkfifo(root / name)
    with pytest.raises(UsageError, match="not a dataset"):
        open_dataset(root, "train")


def test_yaml_bomb(root: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    yaml(root, f"l0: &l0 [boom]\n{levels}train: *l29\nnames: *l29\n")
    with pytest.raises(RefineDetError) as caught:
        open_dataset(root, "train")
    assert len(str(caught.value)) < 500


def test_images_that_refinedet_has_drawn_are_no_data(root: Path) -> None:
    """A report or drawn copies in the folder of the data must not become images of the background."""
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("cat\ndog\n")
    before = [record.image_path for record in open_dataset(root).records]
    drawn = root / "images/train/runs/finetune/report/images/000.jpg"
    drawn.parent.mkdir(parents=True)
    pixels = np.zeros((64, 96, 3), np.uint8)
    write_image(drawn, pixels, SIGNATURE)
    write_image(root / "images/train/drawn.png", pixels, MOSAIC_SIGNATURE)
    write_image(root / "images/train/other.png", pixels, "taken by somebody else")
    dataset = open_dataset(root)
    assert {record.image_path for record in dataset.records} == {*before, root / "images/train/other.png"}
    noted = [problem for problem in dataset.problems if "drawn by refinedet" in problem.message]
    assert {problem.path for problem in noted} == {root / "images/train/drawn.png", drawn}
    assert not any(problem.fatal for problem in noted)
    # With a label file it is data, whoever made it.
    (root / "labels/train/drawn.txt").write_text("0 0.5 0.5 1 1\n")
    assert root / "images/train/drawn.png" in {record.image_path for record in open_dataset(root).records}
