"""What is refused before a training starts, and how data that has changed is described."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from conftest import FolderFactory
from refinedet.data import open_dataset
from refinedet.data.problems import CLIPPED, NO_AREA, Problem
from refinedet.data.records import DetectionDataset
from refinedet.errors import RefineDetError, UsageError
from refinedet.training.data_check import (
    describe_changes,
    image_digests,
    require_few_repairs,
    require_measurable,
    require_objects,
)

SIZE = (64, 64)


def dataset_of(folder: Path, **changes: object) -> DetectionDataset:
    dataset = open_dataset(folder, "trainval")
    return dataclasses.replace(dataset, **changes)  # type: ignore[arg-type]


def test_objects_that_nothing_can_be_learned_from_are_counted(voc_folder: FolderFactory) -> None:
    dataset = dataset_of(voc_folder(images=6))
    require_objects(dataset, SIZE)
    objects = sum(len(record.labels) for record in dataset.records)
    crowd = [
        dataclasses.replace(record, crowd=np.ones(len(record.labels), dtype=np.bool_)) for record in dataset.records
    ]
    problems = [Problem(Path("x"), "", fatal=False, kind=NO_AREA)] * 40
    with pytest.raises(RefineDetError, match="nothing to learn from") as caught:
        require_objects(dataclasses.replace(dataset, records=crowd, problems=problems), SIZE)
    reasons = (
        f"(40 boxes without an area dropped, {objects} objects marked as crowd, which are not trained on, 1 images"
    )
    assert reasons in str(caught.value)
    small = [
        dataclasses.replace(record, boxes=record.boxes * 0 + np.float32([5, 5, 5.1, 5.1])) for record in dataset.records
    ]
    with pytest.raises(RefineDetError, match=f"{objects} objects too small to match any anchor"):
        require_objects(dataclasses.replace(dataset, records=small), SIZE)
    # One object that can be learned is enough.
    require_objects(dataclasses.replace(dataset, records=[*small, dataset.records[0]]), SIZE)


def test_repairs_are_one_line_until_they_are_more_than_half(voc_folder: FolderFactory) -> None:
    dataset = dataset_of(voc_folder(images=6))
    assert require_few_repairs(dataset) is None
    objects = sum(len(record.labels) for record in dataset.records)
    clipped = [Problem(Path("x"), "", fatal=False, kind=CLIPPED)] * (objects // 2)
    line = require_few_repairs(dataclasses.replace(dataset, problems=clipped))
    assert line == f"{objects // 2} boxes clipped to their images"
    with pytest.raises(RefineDetError, match=f"{objects // 2 + 1} of {objects} objects had to be repaired"):
        require_few_repairs(dataclasses.replace(dataset, problems=[*clipped, clipped[0]]))


def test_an_evaluation_split_is_looked_at_beforehand(voc_folder: FolderFactory) -> None:
    folder = voc_folder(images=6)
    require_measurable(dataset_of(folder))
    with pytest.raises(UsageError, match="no objects in split"):
        require_measurable(dataset_of(folder).subset([3]))
    (folder / "JPEGImages/000002.jpg").write_bytes(b"no image")
    with pytest.raises(RefineDetError, match=r"000002\.jpg"):
        require_measurable(dataset_of(folder))


def test_changes_are_named(voc_folder: FolderFactory) -> None:
    folder = voc_folder(images=6)
    dataset = dataset_of(folder)
    before = image_digests(dataset, [str(folder)])
    assert list(before)[:2] == ["JPEGImages/000000.jpg", "JPEGImages/000001.jpg"]
    assert describe_changes(before, before) is None
    moved = folder.rename(folder.parent / "moved")
    assert image_digests(dataset_of(moved), [str(moved)]) == before
    records = list(dataset_of(moved).records)
    records[1] = dataclasses.replace(records[1], boxes=records[1].boxes + 1)
    now = image_digests(dataclasses.replace(dataset, records=records[1:]), [str(moved)])
    now |= {f"new{number}.jpg": "x" for number in range(5)}
    assert describe_changes(before, now) == (
        "5 images added (new0.jpg, new1.jpg, new2.jpg, ...), 1 image removed (JPEGImages/000000.jpg), "
        "1 image changed (JPEGImages/000001.jpg)"
    )
