"""Line charts as SVG text, for a page that needs no other file. Colours come from the page's style sheet.

A line has the class ``line-1``, ``line-2``, ... in the order given; texts are ``tick``, ``axis`` or ``name``. Sizes are
in units of the view box, which the page scales to the room there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Range = tuple[float, float]

_LETTER = 6.4
"""Width of a letter of the names at the end of lines, on average."""
_LINE_HEIGHT = 13.0


@dataclass(frozen=True)
class Line:
    """A line of a chart; points without a finite value are left out."""

    name: str
    """Written at its end, if the chart names its lines."""
    x: Sequence[float]
    """P values."""
    y: Sequence[float]
    """P values."""


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over an x and a y axis."""

    lines: Sequence[Line]
    """What to draw, the first on top."""
    title: str
    """Read out instead of the chart, and shown under the mouse."""
    description: str
    """What the lines say, in a sentence, for who cannot see them."""
    axes: tuple[str, str]
    """What x and y are, with their units."""
    x_range: Range
    """First and last value of the x axis."""
    y_range: Range
    """The same of the y axis."""
    ticks: tuple[Sequence[float], Sequence[float]] | None = None
    """Values to write at the axes; default: round numbers."""
    dot: tuple[float, float] | None = None
    """A point to mark."""
    named: bool = False
    """Write the names at the ends of the lines."""
    marked: bool = False
    """Mark every point of the lines, for lines of few points."""
    size_wh: tuple[int, int] = (240, 190)
    """Width and height."""

    def svg(self) -> str:
        """The chart as one ``<svg>`` element."""
        width, height = self.size_wh
        longest = max((len(line.name) for line in self.lines), default=0) if self.named else 0
        x_ticks, y_ticks = self.ticks or (round_ticks(*self.x_range), round_ticks(*self.y_range))
        left = 24.0 + _LETTER * max(len(short(value)) for value in y_ticks)
        frame = _Frame(left, width - 12.0 - _LETTER * longest, 10.0, height - 36.0, self.x_range, self.y_range)
        parts = [
            f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.description)}</desc>",
            *_axes(frame, self.axes, x_ticks, y_ticks),
        ]
        ends: list[tuple[float, int, str]] = []
        for number, line in reversed(list(enumerate(self.lines, start=1))):
            points = frame.points(line)
            if not points:
                continue
            path = "L".join(f"{_number(x)} {_number(y)}" for x, y in _without_flat_runs(points))
            parts.append(f'<path class="line line-{number}" d="M{path}"/>')
            if self.marked or len(points) == 1:
                parts += [
                    f'<circle class="mark mark-{number}" cx="{_number(x)}" cy="{_number(y)}" r="3"/>' for x, y in points
                ]
            ends.append((points[-1][1], number, line.name))
        if self.dot is not None:
            x, y = frame.x(self.dot[0]), frame.y(self.dot[1])
            parts.append(f'<circle class="dot" cx="{_number(x)}" cy="{_number(y)}" r="4"/>')
        if self.named:
            for end, number, name in _apart(ends, frame.top, frame.bottom):
                parts.append(
                    f'<text class="name name-{number}" x="{_number(frame.right + 6)}" y="{_number(end)}" dy=".35em">'
                    f"{escape(name)}</text>"
                )
        parts.append("</svg>")
        return "".join(parts)


@dataclass(frozen=True)
class _Frame:
    """Where the lines of a chart are drawn, in units of the view box, and the values at its edges."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: Range
    y_range: Range

    def x(self, value: float) -> float:
        """Position of a value of x."""
        low, high = self.x_range
        return self.left + (self.right - self.left) * (value - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        """Position of a value of y."""
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (value - low) / ((high - low) or 1.0)

    def points(self, line: Line) -> list[tuple[float, float]]:
        """Positions of the finite values of a line, none above or below the frame."""
        return [
            (self.x(x), min(max(self.y(y), self.top), self.bottom))
            for x, y in zip(line.x, line.y, strict=True)
            if math.isfinite(x) and math.isfinite(y)
        ]


def _axes(frame: _Frame, axes: tuple[str, str], x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    """Grid lines with their values, and what x and y are."""
    left, right, top, bottom = (_number(v) for v in (frame.left, frame.right, frame.top, frame.bottom))
    parts = []
    for value in y_ticks:
        y = _number(frame.y(value))
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text class="tick end" x="{_number(frame.left - 6)}" y="{y}" dy=".35em">{short(value)}</text>')
    for value in x_ticks:
        x = _number(frame.x(value))
        parts.append(f'<path class="grid" d="M{x} {top}V{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{x}" y="{_number(frame.bottom + 14)}">{short(value)}</text>')
    middle_x, middle_y = _number((frame.left + frame.right) / 2), _number((frame.top + frame.bottom) / 2)
    parts.append(f'<text class="axis middle" x="{middle_x}" y="{_number(frame.bottom + 31)}">{escape(axes[0])}</text>')
    parts.append(f'<text class="axis middle" transform="translate(10 {middle_y}) rotate(-90)">{escape(axes[1])}</text>')
    return parts


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` round numbers from ``low`` to ``high``, both included where they are round."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    while math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1 > most:
        # 1, 2, 5, 10, 20, ...
        step *= 2.5 if f"{step:e}".startswith("2") else 2.0
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.5, 20, 20k, 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _without_flat_runs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same line without points between two of equal height: curves of precision are mostly flat."""
    return [
        point
        for index, point in enumerate(points)
        if index in (0, len(points) - 1) or not points[index - 1][1] == point[1] == points[index + 1][1]
    ]


def _apart(ends: Sequence[tuple[float, int, str]], top: float, bottom: float) -> list[tuple[float, int, str]]:
    """Names moved so that none covers another: down from the highest, then up from the lowest."""
    ordered = sorted(ends)
    heights = [max(top, y) for y, _, _ in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + _LINE_HEIGHT)
    limit = bottom
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - _LINE_HEIGHT
    return [(height, number, name) for height, (_, number, name) in zip(heights, ordered, strict=True)]
