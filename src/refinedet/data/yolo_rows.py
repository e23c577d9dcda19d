"""The rows of a YOLO label file: class and box, relative to the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refinedet.data.problems import FaultyFileError

Box = tuple[float, float, float, float]
_LARGEST_FILE = 50_000_000
"""Bytes of a label file; a million boxes are smaller."""
_LARGEST_SHARE = 2.0
"""Numbers above are pixels: shares of the image are at most 1, and a little more where a box reaches outside."""


@dataclass(frozen=True)
class Row:
    """An object as it stands in the file."""

    number: int
    """Of the line, from 1."""
    class_number: int
    """Not yet compared with the number of classes."""
    box: Box
    """x1, y1, x2, y2 as shares of the image's width and height."""
    has_keypoints: bool
    """Whether keypoints followed the box."""


def read_rows(file: Path, keypoint_numbers: int, may_quote: Callable[[], bool]) -> list[Row]:
    """The objects of a label file.

    A row is ``class cx cy width height``; with keypoints, that many further numbers; without, also ``class x1 y1 x2 y2
    x3 y3 ...``, a polygon or the four corners of an oriented box, of which the box around it is taken.

    Args:
        file: the label file.
        keypoint_numbers: numbers that follow a box for its keypoints; 0 if the data has none.
        may_quote: asked on an error whether the message may show what the file says.

    Raises:
        FaultyFileError: it cannot be read, or a row is of another kind.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise FaultyFileError(file, f"larger than {_LARGEST_FILE} bytes, so it is no label file")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FaultyFileError(file, "cannot be read (it is not UTF-8 text)") from None
    except OSError as error:
        raise FaultyFileError(file, f"cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if fields:
            try:
                rows.append(_parse(number, fields, keypoint_numbers))
            except _RowError as error:
                shown = f": '{_shown(fields)}'" if may_quote() else ""
                raise FaultyFileError(file, f"line {number} {error}{shown}") from None
    return rows


def looks_like_rows(file: Path) -> bool:
    """Whether the first line of a file is a row of numbers, as in a label file. Empty files are label files, too."""
    try:
        with file.open("rb") as stream:
            start = stream.read(2000)
        lines = [line for line in start.decode("utf-8-sig", "replace").splitlines() if line.strip()]
        if lines:
            _parse(1, lines[0].split(), 0)
    except (OSError, _RowError) as error:
        return isinstance(error, _CountError)
    return True


class _RowError(ValueError):
    """What is wrong with a row, in words that follow "line 5"."""


class _CountError(_RowError):
    """The row has numbers, but not as many as it should."""


def _parse(number: int, fields: Sequence[str], keypoint_numbers: int) -> Row:
    try:
        values = [float(field) for field in fields]
    except ValueError:
        advice = "; separate the numbers by spaces, not by commas" if "," in fields[0] else ""
        raise _RowError(f"is not a row of numbers{advice}") from None
    if not all(math.isfinite(value) for value in values):
        raise _RowError("is not a row of numbers")
    if values[0] != int(values[0]):
        raise _RowError("must start with a whole number, the class")
    class_number, rest = int(values[0]), values[1:]
    with_keypoints = keypoint_numbers > 0 and len(rest) == 4 + keypoint_numbers
    box: Box
    if len(rest) == 4 or with_keypoints:
        cx, cy, width, height = rest[:4]
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    elif not keypoint_numbers and len(rest) >= 6 and len(rest) % 2 == 0:
        box = (min(rest[::2]), min(rest[1::2]), max(rest[::2]), max(rest[1::2]))
    else:
        raise _CountError(_wrong_count(len(fields), keypoint_numbers))
    if max(rest[:4] if with_keypoints else rest) > _LARGEST_SHARE:
        raise _RowError(
            "has numbers far above 1, so they seem to be pixels; divide them by the image's width and height"
        )
    return Row(number, class_number, box, with_keypoints)


def _wrong_count(count: int, keypoint_numbers: int) -> str:
    shown = "1 number" if count == 1 else f"{count} numbers"
    if keypoint_numbers:
        return (
            f"has {shown}; expected {5 + keypoint_numbers} (class cx cy width height, and {keypoint_numbers} "
            "for the keypoints, as 'kpt_shape' says), or 5 without keypoints"
        )
    advice = "; a confidence at the end belongs to detections, not to labels" if count == 6 else ""
    return f"has {shown}; expected 5 (class cx cy width height), or the class and the corners of a polygon{advice}"


def _shown(fields: Sequence[str]) -> str:
    text = " ".join(fields)[:60]
    return text if text.isprintable() else repr(text)[1:-1]
