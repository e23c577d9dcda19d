"""Ranges of numbers as annotations, and dataclasses that check their fields against them. Standard library only."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from refinedet.errors import UsageError


@dataclass(frozen=True)
class Range:
    """The values that a number of a configuration may have; used as ``Annotated[float, Range(0, 1)]``."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    above: bool = False
    """The value must exceed ``low``."""
    below: bool = False
    """The value must stay under ``high``."""
    multiple_of: int | None = None
    """The value must be a multiple of this."""

    def wanted(self, value: float) -> str | None:
        """What ``value`` should be instead, as in "at least 1"; None if it is in the range."""
        if not self.low <= value or (self.above and value == self.low):
            return f"{'greater than' if self.above else 'at least'} {self.low:.12g}"
        if not value <= self.high or (self.below and value == self.high):
            return f"{'less than' if self.below else 'at most'} {self.high:.12g}"
        if self.multiple_of is not None and value % self.multiple_of:
            return f"a multiple of {self.multiple_of}"
        return None


# Upper bounds are far beyond use; they keep a corrupt file or a slip of the hand from taking all memory.
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Share = Annotated[float, Range(0, 1)]
Overlap = Annotated[float, Range(0, 1, above=True)]
Side = Annotated[int, Range(64, 4096, multiple_of=64)]
Level = Annotated[float, Range(1, 8192)]
Offset = Annotated[float, Range(1e-3, 1e3)]
Mean = Annotated[float, Range(-1e4, 1e4)]
Deviation = Annotated[float, Range(1e-3, 1e4)]
Factor = Annotated[float, Range(0, 1e3)]


class Checked:
    """Checks every number of a configuration against its annotation when an instance is made."""

    def __post_init__(self) -> None:
        """Check all fields, then what depends on several of them.

        Raises:
            UsageError: a value of the wrong type, not finite, or out of range; the message names the field.
        """
        kind: Any = type(self)
        for name, hint in _hints(kind).items():
            value = getattr(self, name)
            for wanted, item in _faults(hint, value):
                whole = f" in {value!r}" if item is not value else ""
                raise UsageError(f"{name} must be {wanted}, not {item!r}{whole}")
        self._check_together()

    def _check_together(self) -> None:
        """Rules between fields."""


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _faults(hint: Any, value: Any, bounds: Range | None = None) -> Iterator[tuple[str, Any]]:
    """What is wrong in ``value``: for each fault, what it should be and what it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _faults(arguments[0], value, next((a for a in arguments[1:] if isinstance(a, Range)), None))
    elif origin in (types.UnionType, typing.Union):
        if value is not None:
            yield from _faults(next(a for a in arguments if a is not type(None)), value)
    elif origin is Literal:
        if value not in arguments:
            yield f"one of {', '.join(map(repr, arguments))}", value
    elif origin is tuple:
        if not isinstance(value, (tuple, list)):
            yield "a list of values", value
            return
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            yield f"{len(kinds)} values", value
        for kind, item in zip(kinds, value, strict=False):
            yield from _faults(kind, item)
    elif hint is float or hint is int:
        yield from _faults_of_number(hint, value, bounds)
    elif not isinstance(value, hint):
        yield {bool: "True or False", str: "a string"}.get(hint, f"a {hint.__name__}"), value


def _faults_of_number(kind: type, value: Any, bounds: Range | None) -> Iterator[tuple[str, Any]]:
    whole = kind is int
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        yield "a whole number" if whole else "a number", value
    elif not whole and not _is_finite(value):
        yield "a finite number", value
    elif bounds is not None and (wanted := bounds.wanted(value)) is not None:
        yield wanted, value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Refuse the value of a field where a rule between fields does not hold.

    Raises:
        UsageError: always if not ``holds``; the message names the field.
    """
    if not holds:
        raise UsageError(f"{name} must be {wanted}, not {value!r}")
