"""Ranges of numbers, and dataclasses that check their fields against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from refinedet.errors import UsageError
from refinedet.ranges import Checked, Range, require


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.0000001)),
        (Range(0, 1, above=True), (1e-30, 1), (0, 2)),
        (Range(0, 1, below=True), (0, 0.999), (1,)),
        (Range(64, 256, multiple_of=64), (64, 128, 256), (0, 65, 320)),
        (Range(0, 1), (), (float("nan"), float("inf"))),
    ],
)
def test_ranges(bounds: Range, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert [bounds.wanted(value) for value in inside] == [None] * len(inside)
    assert all(bounds.wanted(value) for value in outside)


@dataclass(frozen=True)
class Example(Checked):
    share: Annotated[float, Range(0, 1)] = 0.5
    sides: tuple[Annotated[int, Range(64, 128, multiple_of=64)], ...] = ()
    maybe: Annotated[int, Range(1, 9)] | None = None

    def _check_together(self) -> None:
        require(self.share < 1 or not self.sides, "sides", self.sides, "empty where share is 1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, "share must be at most 1, not 1.5"),
        ({"share": True}, "share must be a number, not True"),
        ({"sides": (64, 65)}, r"sides must be a multiple of 64, not 65 in \(64, 65\)"),
        ({"maybe": 0}, "maybe must be at least 1, not 0"),
        ({"share": 1.0, "sides": (64,)}, r"sides must be empty where share is 1, not \(64,\)"),
    ],
)
def test_an_instance_checks_its_fields(values: dict[str, object], message: str) -> None:
    assert Example(maybe=9, sides=(64, 128)).maybe == 9
    with pytest.raises(UsageError, match=f"^{message}$"):
        Example(**values)  # type: ignore[arg-type]
