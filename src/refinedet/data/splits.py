"""Names of splits: which one is meant where the one that was asked for is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refinedet.data.problems import unknown_split

_OTHER_NAMES = {
    "train": ("training", "trainval", "default"),
    "val": ("valid", "validation", "dev"),
    "valid": ("val", "validation", "dev"),
    "validation": ("val", "valid", "dev"),
    "test": ("testing",),
}
"""For each usual name the others for the same split, the closest first."""


def choose_split(path: Path, asked: str, available: Sequence[str]) -> str:
    """The split that is meant by ``asked``.

    It is the one of that name; else the only one with that name and a year (COCO's "val2017"); else one that differs
    only in upper and lower case; else the first with another name for the same split ("valid", "validation" for "val").

    Args:
        path: of the dataset, for the message.
        asked: a name without "+" and brackets.
        available: names that the dataset has.

    Raises:
        UsageError: none of them; the message lists those that are there.
    """
    if asked in available:
        return asked
    with_year = [name for name in available if asked and name.startswith(asked) and name[len(asked) :].isdigit()]
    if len(with_year) == 1:
        return with_year[0]
    lower: dict[str, str] = {}
    for name in available:
        lower.setdefault(name.lower(), name)
    for name in (asked.lower(), *_OTHER_NAMES.get(asked.lower(), ())):
        if name in lower:
            return lower[name]
    raise unknown_split(path, asked, available)
