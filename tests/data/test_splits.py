"""A split that is not there is understood by its other names, and only where it is plain what is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from refinedet.data.splits import choose_split
from refinedet.errors import UsageError


@pytest.mark.parametrize(
    ("asked", "available", "meant"),
    [
        ("train", ["train", "trainval"], "train"),
        ("train", ["test", "trainval"], "trainval"),
        ("train", ["training", "trainval"], "training"),
        ("train", ["default"], "default"),
        ("train", ["Train", "Valid"], "Train"),
        ("val", ["train", "valid"], "valid"),
        ("val", ["train", "validation"], "validation"),
        ("valid", ["train", "val"], "val"),
        ("val", ["train2017", "val2017"], "val2017"),
        ("test", ["testing", "training"], "testing"),
    ],
)
def test_the_split_that_is_meant(asked: str, available: list[str], meant: str) -> None:
    assert choose_split(Path("data"), asked, available) == meant


@pytest.mark.parametrize(
    ("asked", "available"),
    [
        ("val", ["train", "test"]),
        ("test", ["train", "val"]),
        ("trainval", ["train", "val"]),
        ("val", ["trainval"]),
        ("train", ["train2014", "train2017"]),
        ("", ["train", "2017"]),
        ("train", []),
    ],
)
def test_what_cannot_be_meant(asked: str, available: list[str]) -> None:
    with pytest.raises(UsageError, match=f"data: no split '{asked}'; ") as caught:
        choose_split(Path("data"), asked, available)
    assert all(name in str(caught.value) for name in available)
