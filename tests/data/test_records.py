"""Records keep what a reader found, as far as it can be used, and a dataset sums up and fingerprints its records."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from refinedet.data import Problem, open_dataset
from refinedet.data.problems import CLIPPED, NO_AREA, OUTSIDE, SWAPPED, ProblemLog, count_kinds
from refinedet.data.records import BoxRules, Record, RecordBuilder

FolderFactory = Callable[..., Path]


def test_subset(voc_folder: FolderFactory) -> None:
    dataset = open_dataset(voc_folder())
    part = dataset.subset([4, 1])
    assert [record.image_id for record in part.records] == ["000004", "000001"]
    assert part.class_names == dataset.class_names
    assert len(dataset) == 6


def test_only_classes(coco_folder: FolderFactory) -> None:
    names = ("lynx", "otter", "heron")
    dataset = open_dataset(coco_folder(images=6, class_names=names), "train+val")
    kept = dataset.only_classes([2, 0])
    assert kept.class_names == ("heron", "lynx")
    assert kept.category_ids == (9, 3)
    assert (kept.split, kept.path, len(kept)) == (dataset.split, dataset.path, len(dataset))
    total = 0
    for before, after in zip(dataset.records, kept.records, strict=True):
        rows = [row for row, label in enumerate(before.labels) if names[label] != "otter"]
        assert [kept.class_names[label] for label in after.labels] == [names[before.labels[row]] for row in rows]
        for field in ("boxes", "difficult", "crowd", "areas"):
            np.testing.assert_array_equal(getattr(after, field), getattr(before, field)[rows])
        assert (after.image_id, after.image_path, after.width) == (before.image_id, before.image_path, before.width)
        total += len(rows)
    assert 0 < total < sum(len(record.labels) for record in dataset.records)
    assert dataset.class_names == names, "the dataset that was asked is left as it is"


def build(boxes: list[list[float]], min_side: float = 0.0, tolerance: float = 0.0) -> tuple[Record, list[Problem]]:
    log = ProblemLog(strict=True)
    builder = RecordBuilder(Path("a.jpg"), "a", (100, 50), Path("a.xml"), log, BoxRules(min_side, tolerance))
    for label, box in enumerate(boxes):
        builder.add(box, label, partial("object {}".format, label))
    record = builder.build()
    return record, log.problems


def test_boxes_are_clipped_and_dropped_with_a_word() -> None:
    record, problems = build(
        [
            [0, 0, 100, 50],  # fine
            [-3, 10, 20, 60],  # clipped
            [100, 0, 120, 20],  # outside
            [5, 5, 5, 9],  # no width
            [30, 30, 20, 40],  # swapped
            [10.25, 10.5, 20.75, 20],  # fine, kept as it is
        ]
    )
    np.testing.assert_array_equal(
        record.boxes, np.array([[0, 0, 100, 50], [0, 10, 20, 50], [10.25, 10.5, 20.75, 20]], dtype=np.float32)
    )
    assert record.labels.tolist() == [0, 1, 5]
    np.testing.assert_allclose(record.areas, [5000, 800, 10.5 * 9.5])
    assert [problem.message for problem in problems] == [
        "object 1 reaches outside the 100x50 image; clipped",
        "object 2 lies outside the 100x50 image; dropped",
        "object 3 has no area; dropped",
        "object 4 has no area (its corners are swapped); dropped",
    ]
    assert [problem.kind for problem in problems] == [CLIPPED, OUTSIDE, NO_AREA, SWAPPED]
    assert not any(problem.fatal for problem in problems)


def test_rounding_is_forgiven_silently() -> None:
    record, problems = build([[-0.3, 0, 100.4, 50]], tolerance=0.5)
    assert record.boxes.tolist() == [[0, 0, 100, 50]]
    assert not problems


def test_a_side_that_vanishes_in_float32_is_no_area() -> None:
    record, problems = build([[90.0, 5, 90.0 + 1e-9, 9]])
    assert len(record.boxes) == 0
    assert "dropped" in problems[0].message


def test_problems_read_as_one_line() -> None:
    assert str(Problem(Path("a.xml"), "is cut", fatal=True)) == "a.xml: is cut"


def test_what_was_repaired_is_counted_by_kind_the_commonest_first(voc_folder: FolderFactory) -> None:
    root = voc_folder(images=3)
    assert open_dataset(root).repaired() is None
    for name in ("000000", "000001"):
        file = root / "Annotations" / f"{name}.xml"
        text = file.read_text().replace("<annotation>", "<annotation><object><name>cat</name></object>", 1)
        file.write_text(re.sub(r"<xmax>\d+</xmax>", "<xmax>97</xmax>", text))
    dataset = open_dataset(root)
    assert dataset.repaired() == "3 boxes clipped to their images, 2 objects without a box dropped"
    assert count_kinds(dataset.problems)[0] == (CLIPPED, 3)
    (root / "Annotations" / "000002.xml").unlink()
    line = open_dataset(root).repaired()
    assert line is not None
    assert line.endswith(", 1 image without an annotation left out")


def test_a_digest_follows_the_content_and_not_the_place(voc_folder: FolderFactory, tmp_path: Path) -> None:
    root = voc_folder(images=3)
    digest = open_dataset(root).digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    copy = tmp_path / "else" / "where"
    shutil.copytree(root, copy)
    assert open_dataset(copy).digest() == digest
    assert open_dataset(copy, class_names=["dog", "cat"]).digest() != digest
    assert open_dataset(copy, "train").digest() != digest
    file = copy / "Annotations" / "000001.xml"
    text = file.read_text()
    for changed in (
        re.sub(r"<xmin>(\d+)</xmin>", lambda m: f"<xmin>{int(m[1]) + 1}</xmin>", text),
        text.replace("<width>96<", "<width>97<"),
        text.replace("<name>dog<", "<name>cat<", 1),
    ):
        assert changed != text
        file.write_text(changed)
        assert open_dataset(copy, class_names=["cat", "dog"]).digest() != digest
    file.write_text(text)
    (copy / "JPEGImages" / "000001.jpg").rename(copy / "JPEGImages" / "9.jpg")
    file.rename(copy / "Annotations" / "9.xml")
    assert open_dataset(copy).digest() != digest
