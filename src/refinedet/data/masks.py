"""The box around a mask: polygons and run lengths as COCO files hold them.

Run lengths go down the columns of the image, first the pixels outside of the mask. As a list they are plain numbers.
As a text each number is cut into groups of five bits, lowest first, one group a character: character code 48 plus the
group, plus 32 where a further group follows; the sign is that of the last group's highest bit, and from the third
number on the difference to the number before the last is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

Box = tuple[float, float, float, float]


def box_of_segmentation(segmentation: Any, size: tuple[int, int]) -> Box | None:
    """(x, y, width, height) around a COCO segmentation in pixels; None if it is empty.

    Args:
        segmentation: a list of polygons ``[x1, y1, x2, y2, ...]``, one such polygon, or a dict with ``counts`` (a list
            or a text) and ``size`` (height, width).
        size: (width, height) of the image.

    Raises:
        ValueError: it is none of these, or damaged; the message says why.
    """
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
        return _box_of_polygons(polygons)
    if isinstance(segmentation, dict):
        return _box_of_runs(segmentation, size)
    raise ValueError("its segmentation is neither a list of polygons nor run lengths")


def _box_of_polygons(polygons: Sequence[Any]) -> Box | None:
    xs: list[float] = []
    ys: list[float] = []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(_is_coordinate, polygon)):
            raise ValueError("a polygon of its segmentation is no list of x and y")
        xs += polygon[::2]
        ys += polygon[1::2]
    if not xs:
        return None
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _is_coordinate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12


def _box_of_runs(mask: dict[str, Any], size: tuple[int, int]) -> Box | None:
    width, height = size
    if mask.get("size") != [height, width]:
        raise ValueError(f"its mask is not of the image's size, {height} rows and {width} columns")
    counts = mask.get("counts")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError("the run lengths of its mask are damaged")
    ends = list(accumulate(counts))
    if not ends or ends[-1] != width * height:
        raise ValueError("the run lengths of its mask do not add up to the size of the image")
    left, top, right, bottom = math.inf, math.inf, -1, -1
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        if start == end:
            continue
        (first_column, first_row), (last_column, last_row) = divmod(start, height), divmod(end - 1, height)
        if first_column != last_column:  # The run goes round the lower edge, so it covers rows from top to bottom.
            first_row, last_row = 0, height - 1
        left, right = min(left, first_column), max(right, last_column)
        top, bottom = min(top, first_row), max(bottom, last_row)
    if right < 0:
        return None
    return left, top, right - left + 1, bottom - top + 1


def decode_counts(text: str) -> list[int]:
    """Run lengths from their compressed text.

    Raises:
        ValueError: the text is cut off or has other characters.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError("the run lengths of its mask are damaged")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the run lengths of its mask are cut off")
    return counts
