from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conftest import FolderFactory
from refinedet.config import TrainConfig
from refinedet.data.records import DetectionDataset
from refinedet.errors import RefineDetError, UsageError
from refinedet.training.data import DataChoice, TrainingData, open_training_data, reopen_training_data

LIGHT = TrainConfig(train_split="train", evaluate_split="val")
PAPER = TrainConfig(train_split="trainval", evaluate_split="test")


def opened(path: Path, settings: TrainConfig = LIGHT, **choice: Any) -> TrainingData:
    return open_training_data(DataChoice((path,), **choice), settings)


def ids(dataset: DetectionDataset | None) -> set[str]:
    assert dataset is not None
    return {str(record.image_id) for record in dataset.records}


def splits(**sizes: int) -> dict[str, list[int]]:
    """Disjoint splits of so many images each; "trainval" is the union of those two."""
    result, first = {}, 0
    for name, size in sizes.items():
        result[name] = list(range(first, first + size))
        first += size
    return result


def test_undivided_data_is_divided(voc_folder: FolderFactory) -> None:
    data = opened(voc_folder(images=12, splits={}))
    assert (len(data.train), len(data.evaluation or [])) == (10, 2)
    assert not ids(data.train) & ids(data.evaluation)
    assert (data.train_split, data.evaluate_split) == ("all", "held out")
    assert data.notes[-1].startswith("split: 10 train, 2 held out (seed 0")


def test_a_training_split_alone_is_divided(voc_folder: FolderFactory) -> None:
    data = opened(voc_folder(images=12, splits={"train": list(range(12))}))
    assert (len(data.train), len(data.evaluation or [])) == (10, 2)
    assert (data.train_split, data.evaluate_split) == ("train", "held out")


@pytest.mark.parametrize(
    ("there", "settings", "expected"),
    [
        (splits(train=6, val=3), LIGHT, ("train", "val")),
        (splits(train=6, val=3, test=3), LIGHT, ("train", "val")),
        (splits(train=6, test=3), LIGHT, ("train", "test")),
        (splits(train=6, valid=3), LIGHT, ("train", "valid")),
        (splits(trainval=6, test=3), PAPER, ("trainval", "test")),
        (splits(train=6, val=3), PAPER, ("train", "val")),
        (splits(trainval=9), PAPER, ("trainval", "held out")),
        (splits(training=6, validation=3), LIGHT, ("training", "validation")),
    ],
)
def test_splits_that_are_there_are_taken(
    voc_folder: FolderFactory, there: dict[str, list[int]], settings: TrainConfig, expected: tuple[str, str]
) -> None:
    data = opened(voc_folder(images=12, splits=there), settings)
    assert (data.train_split, data.evaluate_split) == expected
    assert not ids(data.train) & ids(data.evaluation)


def test_trainval_and_test_are_preferred_on_request(voc_folder: FolderFactory) -> None:
    there = {**splits(train=4, val=2, test=3), "trainval": list(range(6))}
    data = opened(voc_folder(images=12, splits=there), prefer_trainval=True)
    assert (data.train_split, data.evaluate_split) == ("trainval", "test")
    assert (len(data.train), len(data.evaluation or [])) == (6, 3)
    # Without a test split there is nothing left to evaluate on but val.
    del there["test"]
    data = opened(voc_folder(images=12, splits=there, name="second"), prefer_trainval=True)
    assert (data.train_split, data.evaluate_split) == ("train", "val")


def test_named_splits_are_taken_as_they_are(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=12, splits={})
    given = frozenset({"train_split", "evaluate_split"})
    settings = dataclasses.replace(LIGHT, train_split="all[:50%]", evaluate_split="all[50%:]")
    data = opened(root, settings, given=given)
    assert (len(data.train), len(data.evaluation or [])) == (6, 6)
    with pytest.raises(UsageError, match="no split 'vla'"):
        opened(root, dataclasses.replace(LIGHT, evaluate_split="vla"), given=frozenset({"evaluate_split"}))
    with pytest.raises(UsageError, match="'all' is the training split"):
        opened(root, dataclasses.replace(LIGHT, train_split="all", evaluate_split="all"), given=given)


def test_no_evaluation_is_a_choice(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=6, splits={})
    data = opened(root, dataclasses.replace(LIGHT, evaluate_split="none"), given=frozenset({"evaluate_split"}))
    assert (len(data.train), data.evaluation, data.evaluate_split) == (6, None, "none")


def test_other_data_can_be_evaluated_on(voc_folder: FolderFactory) -> None:
    train, test = voc_folder(images=6, splits={}), voc_folder(images=3, splits={}, name="other", first=6)
    data = opened(train, evaluate_paths=(test,))
    assert (len(data.train), len(data.evaluation or [])) == (6, 3)
    assert data.evaluate_split == "all"
    divided = voc_folder(images=9, splits=splits(train=6, val=3), name="divided")
    data = opened(train, evaluate_paths=(divided,))
    assert (data.evaluate_split, len(data.evaluation or [])) == ("val", 3)


def test_some_classes_are_trained_on(voc_folder: FolderFactory) -> None:
    data = opened(voc_folder(images=12, splits={}), classes=("dog",))
    assert data.train.class_names == ("dog",)
    assert data.evaluation is not None
    assert data.evaluation.class_names == ("dog",)
    assert data.notes[0].startswith("left out: ")
    assert "objects of 1 other classes (cat)" in data.notes[0]
    with pytest.raises(UsageError, match="--classes: no class 'cow'; the data has cat, dog"):
        opened(voc_folder(images=4, splits={}, name="second"), classes=("cow",))


def test_broken_images_are_left_out_on_request(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=12, splits={})
    (root / "JPEGImages/000004.jpg").write_bytes((root / "JPEGImages/000004.jpg").read_bytes()[:500])
    assert len(opened(root).train) == 10  # the present stop is that of whoever reads it
    data = opened(root, skip_broken=True)
    assert "000004" not in ids(data.train) | ids(data.evaluation)
    assert len(data.train) + len(data.evaluation or []) == 11
    assert data.notes[0] == "left out: 1 of 12 images, which cannot be read (--skip-broken)"
    assert "000004.jpg" in data.notes[1]


def test_a_division_is_written_and_read_again(voc_folder: FolderFactory, tmp_path: Path) -> None:
    root = voc_folder(images=12, splits={})
    data = opened(root, group_by=r"\d{5}")
    run = tmp_path / "run"
    data.save_lists(run)
    lines = (run / "split/held_out.txt").read_text().splitlines()
    assert len(lines) == len(data.evaluation or [])
    settings = dataclasses.replace(LIGHT, train_split=data.train_split, evaluate_split=data.evaluate_split)
    again = reopen_training_data(DataChoice((root,)), settings, run)
    assert ids(again.train) == ids(data.train)
    assert ids(again.evaluation) == ids(data.evaluation)
    (run / "split/held_out.txt").unlink()
    with pytest.raises(RefineDetError, match=r"held_out\.txt: cannot be read"):
        reopen_training_data(DataChoice((root,)), settings, run)
