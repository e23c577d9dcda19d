from __future__ import annotations

import pytest

from refinedet.data.classes import (
    COCO_CATEGORY_IDS,
    COCO_CLASSES,
    VOC_CLASSES,
    coco_category_ids,
    fault_of_name,
    match_classes,
)


def test_the_classes_of_the_two_benchmarks() -> None:
    assert (len(VOC_CLASSES), VOC_CLASSES[0], VOC_CLASSES[-1]) == (20, "aeroplane", "tvmonitor")
    assert (len(COCO_CLASSES), COCO_CLASSES[0], COCO_CLASSES[-1]) == (80, "person", "toothbrush")
    # From COCO's own annotation files.
    ids = dict(zip(COCO_CLASSES, COCO_CATEGORY_IDS, strict=True))
    assert (ids["person"], ids["stop sign"], ids["dining table"], ids["toothbrush"]) == (1, 13, 67, 90)


def test_every_class_of_voc_is_one_of_coco() -> None:
    matches = match_classes(VOC_CLASSES, COCO_CLASSES)
    assert None not in matches
    assert len(set(matches)) == 20
    names = {voc: COCO_CLASSES[match] for voc, match in zip(VOC_CLASSES, matches, strict=True) if match is not None}
    assert (names["sofa"], names["pottedplant"], names["dog"]) == ("couch", "potted plant", "dog")


def test_spellings_and_strangers() -> None:
    assert match_classes(("Dining_Table", "dragon"), ("cat", "diningtable")) == (1, None)


def test_category_ids_only_where_all_are_known() -> None:
    assert coco_category_ids(("toothbrush", "tvmonitor")) == (90, 72)
    assert coco_category_ids(("toothbrush", "dragon")) is None
    assert coco_category_ids(("tv", "tvmonitor")) is None, "two names of one category"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("cat", None),
        ("Körper 1", None),
        (" ", "is empty"),
        ("x" * 201, "has 201 letters; at most 200 are possible"),
        ("a\nb", "has a line break or another control character"),
        ("a\udcff", "has a line break or another control character"),
    ],
)
def test_names_that_cannot_be(name: str, fault: str | None) -> None:
    assert fault_of_name(name) == fault
