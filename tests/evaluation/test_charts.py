"""Line charts: where points land, which numbers stand at the axes, and that names keep apart."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest

from refinedet.evaluation.charts import Line, LineChart, round_ticks, short

SVG = "{http://www.w3.org/2000/svg}"


def chart(*lines: Line, **arguments: object) -> ElementTree.Element:
    settings: dict[str, object] = {
        "title": "t", "description": "d", "axes": ("x", "y"), "x_range": (0, 1), "y_range": (0, 1),
        **arguments,
    }  # fmt: skip
    return ElementTree.fromstring(LineChart(lines=lines, **settings).svg())  # type: ignore[arg-type]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.removeprefix("M").split("L"))]


def test_a_diagonal_goes_from_corner_to_corner() -> None:
    svg = chart(Line("diagonal", [0, 0.5, 1], [0, 0.5, 1]), dot=(0.5, 0.5))
    grid = [path.get("d", "") for path in svg.iter(f"{SVG}path") if path.get("class") == "grid"]
    (line,) = (path for path in svg.iter(f"{SVG}path") if path.get("class") == "line line-1")
    (x0, y0), (x1, y1), (x2, y2) = points(line.get("d", ""))
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert (x1, y1) == (pytest.approx((x0 + x2) / 2, abs=0.1), pytest.approx((y0 + y2) / 2, abs=0.1))
    # The ends lie on the lines of 0 and 1, which stand left, right, at the bottom and at the top.
    assert f"M{x0:g} {y0:g}H{x2:g}" in grid
    assert f"M{x2:g} {y2:g}V{y0:g}" in grid
    (dot,) = svg.iter(f"{SVG}circle")
    assert (dot.get("cx"), dot.get("cy")) == (f"{x1:g}", f"{y1:g}")


def test_text_is_escaped_and_axes_are_named() -> None:
    svg = chart(
        Line("<a> & b", [0, 1], [0, 1]), title="<t>", description="a & b", axes=("recall", "precision, %"), named=True
    )
    assert svg.find(f"{SVG}title").text == "<t>"  # type: ignore[union-attr]
    assert svg.find(f"{SVG}desc").text == "a & b"  # type: ignore[union-attr]
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"<a> & b", "recall", "precision, %"} <= set(texts)


def test_names_of_lines_that_end_together_keep_apart_and_in_order() -> None:
    lines = [Line(f"line {k}", [0, 1], [0.5, 0.02 * k]) for k in range(5)]
    svg = chart(*lines, named=True)
    heights = {t.text: float(t.get("y", "")) for t in svg.iter(f"{SVG}text") if "name" in t.get("class", "")}
    ordered = [heights[f"line {k}"] for k in reversed(range(5))]
    assert all(lower - upper >= 12.9 for upper, lower in itertools.pairwise(ordered))
    assert max(ordered) <= 190


def test_points_without_a_value_and_flat_runs_are_left_out() -> None:
    line = Line("a", list(range(6)), [1, 1, 1, 1, math.nan, 0])
    svg = chart(line, x_range=(0, 5))
    (path,) = (p for p in svg.iter(f"{SVG}path") if p.get("class") == "line line-1")
    assert len(points(path.get("d", ""))) == 3
    assert not [p for p in chart(Line("b", [0], [math.nan])).iter(f"{SVG}path") if "line" in p.get("class", "")]
    # A lone point would be no line: it is marked.
    assert len(list(chart(Line("c", [0.5], [0.5])).iter(f"{SVG}circle"))) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 800, [0, 200, 400, 600, 800]),
        (0, 120_000, [0, 50_000, 100_000]),
        (0, 0.0012, [0, 0.0005, 0.001]),
        (3, 9, [4, 6, 8]),
        (2, 2, [2]),
    ],
)
def test_round_ticks(low: float, high: float, expected: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("high", [10.0**power * factor for power in range(-6, 9) for factor in (1, 1.7, 3, 6.4, 9.9)])
def test_ticks_are_few_and_inside(high: float) -> None:
    ticks = round_ticks(0, high)
    assert 2 <= len(ticks) <= 5
    assert 0 == ticks[0] < ticks[-1] <= high * (1 + 1e-9)
    assert ticks[-1] >= high / 2


def test_short_numbers() -> None:
    assert [short(v) for v in (0, 0.5, 200, 5000, 20_000, 1_500_000)] == ["0", "0.5", "200", "5000", "20k", "1.5M"]
