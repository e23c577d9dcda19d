from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from refinedet.data.holdout import Division, divide_by_names, hold_out, image_names
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset, Record
from refinedet.errors import RefineDetError, UsageError

Maker = Callable[..., DetectionDataset]


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    """A dataset of files with the given labels; each file's content is unique unless ``content`` says otherwise."""

    def make(
        labels: Sequence[Sequence[int]], *, classes: int = 2, names: Sequence[str] = (), content: Sequence[str] = ()
    ) -> DetectionDataset:
        records = []
        for index, here in enumerate(labels):
            path = tmp_path / "images" / (names[index] if names else f"{index:04d}.jpg")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content[index] if content else f"image {index:06d}")
            count = len(here)
            records.append(
                Record(
                    image_path=path,
                    image_id=path.stem,
                    width=100,
                    height=100,
                    boxes=np.tile(np.array([[0, 0, 10, 10]], np.float32), (count, 1)),
                    labels=np.array(here, np.int64),
                    difficult=np.zeros(count, np.bool_),
                    crowd=np.zeros(count, np.bool_),
                    areas=np.full(count, 100, np.float32),
                )
            )
        class_names = tuple(f"c{label}" for label in range(classes))
        return DetectionDataset(records, class_names, "voc", None, tmp_path)

    return make


def names(dataset: DetectionDataset) -> set[str]:
    return {record.image_path.name for record in dataset.records}


def assert_parts(division: Division, whole: DetectionDataset) -> None:
    train, held = names(division.train), names(division.held_out)
    assert not train & held
    assert train | held == names(whole)
    assert train
    assert held


def test_fifteen_percent_are_held_out_by_a_seed(made: Maker) -> None:
    whole = made([[index % 2] for index in range(60)])
    division = hold_out(whole)
    assert_parts(division, whole)
    assert division.summary() == "split: 51 train, 9 held out (seed 0, every class in both)"
    assert names(hold_out(whole).held_out) == names(division.held_out)
    assert names(hold_out(whole, seed=1).held_out) != names(division.held_out)
    assert len(hold_out(whole, share=0.5).held_out) == 30


def test_the_order_of_the_records_does_not_matter(made: Maker) -> None:
    whole = made([[index % 3] for index in range(40)], classes=3)
    turned = whole.subset(random.Random(5).sample(range(40), 40))
    assert names(hold_out(turned).held_out) == names(hold_out(whole).held_out)


def test_the_parts_keep_the_order_of_the_records(made: Maker) -> None:
    division = hold_out(made([[0]] * 30))
    for part in (division.train, division.held_out):
        assert [r.image_id for r in part.records] == sorted(str(r.image_id) for r in part.records)


@pytest.mark.parametrize("seed", range(20))
def test_a_rare_class_is_on_both_sides(made: Maker, seed: int) -> None:
    whole = made([[0]] * 96 + [[1], [0, 1]] + [[2, 0], [2]], classes=3)
    division = hold_out(whole, seed=seed)
    for part in (division.train, division.held_out):
        assert {int(label) for record in part.records for label in record.labels} == {0, 1, 2}
    assert len(division.held_out) in (15, 16)


def test_a_class_of_one_image_is_trained_on_and_said(made: Maker) -> None:
    for seed in range(10):
        division = hold_out(made([[0]] * 20 + [[1]], classes=3), seed=seed)
        assert division.summary().endswith(f"(seed {seed}, c1 not in held out)")


@pytest.mark.parametrize("seed", range(5))
def test_images_without_objects_are_shared_out_too(made: Maker, seed: int) -> None:
    division = hold_out(made([[0]] * 50 + [[]] * 50), seed=seed)
    empty = sum(not len(record.labels) for record in division.held_out.records)
    assert len(division.held_out) == 15
    assert 7 <= empty <= 8


@pytest.mark.parametrize("seed", range(5))
def test_many_rare_classes_do_not_empty_the_training(made: Maker, seed: int) -> None:
    whole = made([[index % 40] for index in range(80)], classes=40)
    division = hold_out(whole, seed=seed)
    assert 12 <= len(division.held_out) <= 24  # at most twice the share
    assert {int(record.labels[0]) for record in division.train.records} == set(range(40))


@pytest.mark.parametrize("seed", range(5))
def test_exported_versions_of_an_image_stay_together(made: Maker, seed: int) -> None:
    files = [f"photo{index // 3}_jpg.rf.{index:032x}.jpg" for index in range(60)]
    division = hold_out(made([[0]] * 60, names=files), seed=seed)
    originals = [{name.split(".rf.")[0] for name in names(part)} for part in (division.train, division.held_out)]
    assert not originals[0] & originals[1]
    assert len(division.held_out) == 9


@pytest.mark.parametrize("seed", range(5))
def test_equal_files_stay_together(made: Maker, seed: int) -> None:
    content = [f"same {index % 10}" for index in range(40)]
    division = hold_out(made([[0]] * 40, content=content), seed=seed)
    seen = [{record.image_path.read_text() for record in part.records} for part in (division.train, division.held_out)]
    assert not seen[0] & seen[1]


def test_groups_are_taken_from_the_names(made: Maker) -> None:
    files = [f"patient{index // 5}-{index}.jpg" for index in range(50)] + ["alone.jpg"]
    for seed in range(5):
        division = hold_out(made([[0]] * 51, names=files), seed=seed, group_by=r"patient(\d+)")
        sides = [{name.split("-")[0] for name in names(part)} for part in (division.train, division.held_out)]
        assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", r"--group-by '\(': not a regular expression"), ("zebra", "matches no file name, such as '0000.jpg'")],
)
def test_a_pattern_that_cannot_be_meant_is_refused(made: Maker, pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hold_out(made([[0]] * 4), group_by=pattern)


def test_nothing_to_hold_out_is_said(made: Maker) -> None:
    with pytest.raises(RefineDetError, match="it has 1 image; add images, or train without evaluation"):
        hold_out(made([[0]]))
    with pytest.raises(RefineDetError, match="its 3 images belong together"):
        hold_out(made([[0]] * 3, names=["v-1.jpg", "v-2.jpg", "v-3.jpg"]), group_by="v")
    with pytest.raises(UsageError, match="share to hold out must be between 0 and 1"):
        hold_out(made([[0]] * 3), share=1.0)


def test_two_images_give_one_each(made: Maker) -> None:
    division = hold_out(made([[0], [1]]))
    assert (len(division.train), len(division.held_out)) == (1, 1)


def test_a_division_comes_back_from_its_names_where_the_data_moved(voc_folder: Callable[..., Path]) -> None:
    root = voc_folder(images=12, splits={})
    whole = open_dataset(root)
    division = hold_out(whole)
    listed = image_names(division.held_out)
    assert all(not name.startswith("/") for name in listed)
    moved = shutil.move(root, root.with_name("moved"))
    again = divide_by_names(open_dataset(moved), listed)
    assert names(again.train) == names(division.train)
    assert names(again.held_out) == names(division.held_out)


def test_names_that_do_not_fit_are_refused(made: Maker) -> None:
    whole = made([[0]] * 4)
    with pytest.raises(RefineDetError, match=r"images that the run's lists name are missing: images/9999\.jpg"):
        divide_by_names(whole, ["images/9999.jpg"])
    with pytest.raises(RefineDetError, match="nothing is left"):
        divide_by_names(whole, image_names(whole))
