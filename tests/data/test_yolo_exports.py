"""YOLO folders as tools and people really write them: each is read with the right value, or named with a count."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from refinedet.data import open_dataset
from refinedet.errors import RefineDetError
from yolo_files import EDGES, YAML, counts, write_images, write_labels, write_yolo

YamlFolder = Callable[..., Path]


@pytest.fixture
def yaml_folder(tmp_path: Path) -> YamlFolder:
    """``write_yolo`` in a folder of its own."""
    return partial(write_yolo, tmp_path / "yolo")


# Which label file belongs to which image.


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["p0.jpg", "p1.jpg"], ["p0.TXT", "p1.TXT"]),
        (["p0.webp.jpg", "p1.webp.jpg", "ok.jpg"], ["p0.txt", "p1.txt", "ok.txt"]),
        (["p0.jpg", "p1.jpg"], ["p0.jpg.txt", "p1.jpg.txt"]),
        (["P0.JPG", "P1.JPG"], ["p0.txt", "p1.txt"]),
        (["a.b.c.jpg"], ["a.b.c.txt"]),
        (["p0.jpg", "p1.jpg"], ["deep/er/p0.txt", "deep/p1.txt"]),
    ],
)
def test_labels_of_other_names_are_read_where_it_is_plain(
    yaml_folder: YamlFolder, images: list[str], labels: list[str]
) -> None:
    dataset = open_dataset(yaml_folder(images, labels), "train")
    assert counts(dataset) == dict.fromkeys(sorted(images), 1)
    np.testing.assert_allclose(dataset[0].boxes[0], EDGES, rtol=1e-6)
    assert not any(problem.fatal for problem in dataset.problems)


def test_labels_of_unclear_names_are_not_taken_for_background(yaml_folder: YamlFolder) -> None:
    images = [*(f"img_{i}.jpg" for i in range(4)), "ok.jpg"]
    dataset = open_dataset(yaml_folder(images, [*(f"img{i}.txt" for i in range(4)), "ok.txt"]))
    assert counts(dataset) == {"ok.jpg": 1, "v.jpg": 1}
    assert [problem.count for problem in dataset.problems] == [4, 4]
    assert dataset.repaired() == "4 label files without an image, 4 images without an annotation left out"


def test_backgrounds_stay_where_a_few_labels_have_lost_their_image(yaml_folder: YamlFolder) -> None:
    images = [f"{i}.jpg" for i in range(6)]
    dataset = open_dataset(yaml_folder(images, ["0.txt", "gone.txt"]), "train")
    assert counts(dataset) == {"0.jpg": 1, **dict.fromkeys(images[1:], 0)}
    assert dataset.repaired() == "1 label file without an image"


def test_an_image_without_a_label_file_is_a_background_without_a_word(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg", "b.jpg"], ["a.txt"])
    for name in ("classes.txt", "README.txt"):
        (root / "train/labels" / name).write_text("cat\ndog\n")
    dataset = open_dataset(root, "train")
    assert counts(dataset) == {"a.jpg": 1, "b.jpg": 0}
    assert not dataset.problems


def test_labels_beside_some_of_the_images(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg", "b.jpg"], ["a.txt"])
    write_labels(root / "train/images", ["b.txt"])
    assert counts(open_dataset(root, "train")) == {"a.jpg": 1, "b.jpg": 1}


@pytest.mark.parametrize("name", ["Labels", "annotations", "some other folder"])
def test_labels_in_a_folder_of_another_name(yaml_folder: YamlFolder, name: str) -> None:
    root = yaml_folder(["a.jpg", "b.jpg"], ["a.txt", "b.txt"])
    (root / "train/labels").rename(root / "train" / name)
    dataset = open_dataset(root, "train")
    assert counts(dataset) == {"a.jpg": 1, "b.jpg": 1}
    assert bool(dataset.problems) == (name == "some other folder")


def test_a_removed_folder_of_labels_is_a_problem(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg", "b.jpg"], [])
    shutil.rmtree(root / "train/labels")
    with pytest.raises(RefineDetError, match=r"none of its images has labels; expected them in .*train/labels"):
        open_dataset(root, "train")
    with pytest.raises(RefineDetError, match=r"a.jpg: has no labels, as there is no folder .*train/labels"):
        open_dataset(root)
    dataset = open_dataset(root, strict=False)
    assert counts(dataset) == {"v.jpg": 1}
    assert [(problem.fatal, problem.count) for problem in dataset.problems] == [(True, 2)]
    (root / "train/labels").mkdir()
    assert counts(open_dataset(root)) == {"a.jpg": 0, "b.jpg": 0, "v.jpg": 1}


def test_two_images_with_one_label_file(yaml_folder: YamlFolder) -> None:
    dataset = open_dataset(yaml_folder(["a.jpg", "a.png"], ["a.txt"]), "train")
    assert counts(dataset) == {"a.jpg": 1, "a.png": 1}
    assert [record.image_id for record in dataset.records] == ["a", "train/images/a"]
    assert "label file of 2 images, and read for each: a.jpg, a.png" in dataset.problems[0].message


def test_ids_stay_different(yaml_folder: YamlFolder) -> None:
    dataset = open_dataset(yaml_folder(["a.jpg", "a.png", "a.bmp", "b/a.jpg"], ["a.txt", "b/a.txt"]), "train")
    assert len({record.image_id for record in dataset.records}) == len(dataset) == 4


def test_images_that_cannot_be_read_are_counted(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt", "b.txt"])
    (root / "train/images/b.heic").touch()
    dataset = open_dataset(root, "train")
    assert "1 image with the ending .heic passed over" in str(dataset.repaired())


def test_the_label_of_an_image_that_cannot_be_read_is_that_ones(yaml_folder: YamlFolder) -> None:
    """It is not taken for one of another name that c.jpg may have lost: that image shows nothing."""
    root = yaml_folder(["a.jpg", "c.jpg"], ["a.txt", "b.txt"])
    (root / "train/images/b.HEIC").touch()
    dataset = open_dataset(root, "train")
    assert counts(dataset) == {"a.jpg": 1, "c.jpg": 0}
    assert dataset.repaired() == "1 image with the ending .heic passed over"


def test_a_pipe_is_no_label_file(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg", "b.jpg"], ["a.txt"])
    os.mkfifo(root / "train/labels/b.txt")
    assert counts(open_dataset(root, "train")) == {"a.jpg": 1, "b.jpg": 0}


def test_the_folder_above_may_be_called_images(tmp_path: Path) -> None:
    root = tmp_path / "images/project"
    write_images(root, ["train/a.jpg", "valid/v.jpg"])
    write_labels(root, ["train/a.txt", "valid/v.txt"])
    (root / "data.yaml").write_text("train: train\nval: valid\nnames: [cat, dog]\n")
    assert counts(open_dataset(root)) == {"a.jpg": 1, "v.jpg": 1}


def test_all_labels_in_one_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["train/a.jpg", "train/b.jpg", "val/c.jpg"])
    write_labels(tmp_path / "labels", ["a.txt", "b.txt", "c.txt"])
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    for split, expected in (("train", {"a.jpg": 1, "b.jpg": 1}), ("val", {"c.jpg": 1})):
        assert counts(open_dataset(tmp_path, split)) == expected


# The rows.


@pytest.mark.parametrize(
    ("shape", "row", "box"),
    [
        ("[2, 3]", "0 0.5 0.5 0.2 0.2 0.45 0.45 2 0.55 0.55 2", [64, 48, 96, 72]),
        ("[3, 2]", "0 0.6 0.25 0.09 0.18 0.625 0.3 0.6 0.25 0.63 0.236", [88.8, 19.2, 103.2, 40.8]),
        ("[17, 3]", "0 0.6 0.25 0.09 0.18" + " 0.6 0.25 2" * 17, [88.8, 19.2, 103.2, 40.8]),
        ("[17, 3]", "0 0.6 0.25 0.09 0.18", [88.8, 19.2, 103.2, 40.8]),
    ],
)
def test_keypoints_are_passed_over(yaml_folder: YamlFolder, shape: str, row: str, box: list[float]) -> None:
    root = yaml_folder(["a.jpg", "b.jpg"], ["a.txt", "b.txt"], f"{YAML}kpt_shape: {shape}\n", row)
    dataset = open_dataset(root, "train")
    np.testing.assert_allclose(dataset[0].boxes, [box], rtol=1e-5)
    expected = [] if len(row.split()) == 5 else [(root / "data.yaml", 2, False)]
    assert [(problem.path, problem.count, problem.fatal) for problem in dataset.problems] == expected


def test_keypoints_of_another_number(yaml_folder: YamlFolder) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"], f"{YAML}kpt_shape: [4, 2]\n", "0 0.5 0.5 0.2 0.2 0.45 0.45 0.55 0.55\n")
    with pytest.raises(RefineDetError, match=r"line 1 has 9 numbers; expected 13 .*'kpt_shape'"):
        open_dataset(root, "train")


@pytest.mark.parametrize("shape", ["17", "[17]", "[0, 3]", "[17, 4]", "[a, 3]", "[99999, 3]", "{a: 1}", "[[1], 2]"])
def test_shape_of_keypoints_that_is_none(yaml_folder: YamlFolder, shape: str) -> None:
    with pytest.raises(RefineDetError, match=r"data.yaml: 'kpt_shape' must be"):
        open_dataset(yaml_folder(["a.jpg"], ["a.txt"], f"{YAML}kpt_shape: {shape}\n"))


def test_oriented_boxes(yaml_folder: YamlFolder) -> None:
    dataset = open_dataset(yaml_folder(["a.jpg"], ["a.txt"], row="0 0.1 0.1 0.4 0.1 0.4 0.5 0.1 0.5"), "train")
    np.testing.assert_allclose(dataset[0].boxes, [[16, 12, 64, 60]], rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "box", "noted"),
    [
        ("0 0.9 0.5 0.2001 0.2", [128, 48, 160, 72], False),
        ("0 1.0000001 0.5 0.2 0.2", [144, 48, 160, 72], True),
        ("\ufeff0\t0.5\t0.5\t0.2\t0.2 \r\n\r\n", [64, 48, 96, 72], False),
    ],
)
def test_slightly_above_one_is_clipped(yaml_folder: YamlFolder, row: str, box: list[float], noted: bool) -> None:
    dataset = open_dataset(yaml_folder(["a.jpg"], ["a.txt"], row=row), "train")
    np.testing.assert_allclose(dataset[0].boxes, [box], atol=0.02)
    assert [problem.fatal for problem in dataset.problems] == [False] * noted


def test_a_cause_in_the_yaml_is_one_problem(yaml_folder: YamlFolder) -> None:
    names = [f"{i}" for i in range(5)]
    root = yaml_folder([f"{name}.jpg" for name in names], [f"{name}.txt" for name in names], row="2 0.5 0.5 0.2 0.2")
    with pytest.raises(RefineDetError, match=r"0.txt: line 1: class 2 is out of range; .* numbered from 1"):
        open_dataset(root, "train")
    assert [problem.count for problem in open_dataset(root, "train", strict=False).problems] == [5]


# The names.


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [yes, no]", ("yes", "no")),
        ("names: [0, 1, 2.50, A]", ("0", "1", "2.50", "A")),
        ("names: [007, 2024-01-01, null, 1e3, 0x1F]", ("007", "2024-01-01", "null", "1e3", "0x1F")),
        ('names:\n  "0": cat\n  "1": dog', ("cat", "dog")),
        ('nc: "2"\nnames: [cat, dog]', ("cat", "dog")),
        ("NC: 2\nNames: [cat, dog]", ("cat", "dog")),
        ("names: [猫, собака]", ("猫", "собака")),
    ],
)
def test_names_are_read_as_they_are_written(yaml_folder: YamlFolder, text: str, names: tuple[str, ...]) -> None:
    dataset = open_dataset(yaml_folder(["a.jpg"], ["a.txt"], f"train: train/images\n{text}\n"))
    assert dataset.class_names == names
    assert len(dataset[0].labels) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{YAML}nc: '3'".encode(), "'nc' is 3, but 'names' has 2 names"),
        (f"{YAML}nc: two".encode(), "'nc' is two, but 'names' has 2 names"),
        ("train: train/images\nnames: [猫, 狗]\n".encode("gbk"), r"not UTF-8 text \(line 2\)"),
        (b"train: train/images\nnames:\n\t- cat\n", r"line 3: .* indent with spaces, not with tabs"),
        (b"a: !!int ''", "needs the keys|must be the list"),
        (b"a: !!python/object/apply:os.system [ls]", "is refused"),
        (b"a: !custom x", "is refused"),
        (b"[" * 50_000, "nested too deeply|not valid YAML"),
        (b"# \xff" + b" " * 2_000_000, "larger than 1000000 bytes"),
        (b"? [a, b]\n: c", "not valid YAML"),
        (b"names: [cat]\ntrain: {a: b}", "'train' must be a folder"),
        (b"names: [cat]\ntrain: [[a]]", "'train' must be a folder"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_line(yaml_folder: YamlFolder, text: bytes, reason: str) -> None:
    root = yaml_folder(["a.jpg"], ["a.txt"])
    (root / "data.yaml").write_bytes(text)
    for strict in (True, False):
        with pytest.raises(RefineDetError, match=reason) as caught:
            open_dataset(root, strict=strict)
        assert str(caught.value).startswith(f"{root / 'data.yaml'}: ")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("tag", ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!binary '%'"])
def test_tags_have_no_effect(yaml_folder: YamlFolder, tag: str) -> None:
    assert len(open_dataset(yaml_folder(["a.jpg"], ["a.txt"], f"{YAML}note: {tag}\n"))) == 2


def test_merge_keys_and_aliases_cost_nothing(yaml_folder: YamlFolder) -> None:
    merges = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
    dataset = open_dataset(yaml_folder(["a.jpg"], ["a.txt"], f"m0: &m0 {{a: b}}\n{merges}{YAML}"))
    assert len(dataset) == 2  # an expansion would not end
