from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet.draw import class_color, draw_boxes, read_curves
from refinedet.errors import RefineDetError, UsageError

NAMES = ("cat", "a class with quite a long name")


def blank(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def test_colors_are_distinct_and_stable() -> None:
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    near = min(sum(abs(a - b) for a, b in zip(one, two, strict=True)) for one, two in itertools.pairwise(colors))
    assert near > 100
    assert class_color(3) == class_color(3)


def test_box_lies_where_it_should() -> None:
    image = blank(300, 200)
    drawn = draw_boxes(image, [[50, 60, 150, 160]], [0], NAMES)
    color = class_color(0)
    for x, y in ((50, 110), (149, 110), (100, 60), (100, 159)):
        assert tuple(drawn[y, x]) == color
    for x, y in ((100, 110), (49, 110), (150, 110), (100, 160)):
        assert tuple(drawn[y, x]) == (0, 0, 0)
    assert not image.any()


def test_colors_may_be_given() -> None:
    drawn = draw_boxes(
        blank(300, 200), [[10, 60, 90, 160], [150, 60, 250, 160]], [0, 0], NAMES, colors=[(1, 2, 3), (4, 5, 6)]
    )
    assert tuple(drawn[159, 50]) == (1, 2, 3)
    assert tuple(drawn[159, 200]) == (4, 5, 6)
    with pytest.raises(UsageError, match="1 boxes but 2 colours"):
        draw_boxes(blank(5, 5), [[0, 0, 1, 1]], [0], NAMES, colors=[(1, 2, 3), (4, 5, 6)])


def test_label_is_drawn_and_stays_inside() -> None:
    for box in ([0, 0, 300, 200], [280, 0, 300, 10], [290, 190, 300, 200], [0, 190, 10, 200]):
        with_label = draw_boxes(blank(300, 200), [box], [1], NAMES, [0.875])
        filled = (with_label == class_color(1)).all(axis=2).sum()
        assert filled > 300  # the ground of the label, more than the outline of the small boxes


def test_lines_grow_with_the_image() -> None:
    def thickness(side: int) -> int:
        drawn = draw_boxes(blank(side, side), [[side // 4, side // 4, side // 2, side // 2]], [0], NAMES)
        return int(drawn[side * 3 // 8, : side * 3 // 8].any(axis=1).sum())

    assert thickness(200) < thickness(1000) < thickness(3000)


def test_labels_of_stacked_boxes_do_not_hide_each_other() -> None:
    drawn = draw_boxes(blank(400, 300), [[100, 100, 300, 250]] * 2, [0, 1], NAMES)
    one = (drawn == class_color(0)).all(axis=2).sum()
    two = (drawn == class_color(1)).all(axis=2).sum()
    assert min(one, two) > 300


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=4, max_size=4), max_size=5),
)
def test_no_box_and_no_size_breaks_it(width: int, height: int, boxes: list[list[float]]) -> None:
    drawn = draw_boxes(blank(width, height), boxes, [i % 3 for i in range(len(boxes))], NAMES, [0.5] * len(boxes))
    assert drawn.shape == (height, width, 3)
    assert drawn.dtype == np.uint8


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match="must be"):
        draw_boxes(np.zeros((5, 5), np.uint8), [], [], NAMES)
    with pytest.raises(UsageError, match="must be"):
        draw_boxes(np.zeros((5, 5, 3), np.float32), [], [], NAMES)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1 boxes, 2 labels"):
        draw_boxes(blank(5, 5), [[0, 0, 1, 1]], [0, 1], NAMES)


def test_curves(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("iteration,loss,learning_rate,mAP\n1,3.5,0.1,\n2,2.5,0.1,0.25\n")
    assert read_curves(metrics) == {
        "loss": ([1, 2], [3.5, 2.5]), "learning_rate": ([1, 2], [0.1, 0.1]), "mAP": ([2], [0.25]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "not a table"),
        ("iteration,loss\n1,abc\n", "not a table"),
        ("iteration,loss\nx,1\n", "not a table"),
    ],
)
def test_curves_of_a_bad_file(content: str | None, message: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(RefineDetError, match=rf"metrics\.csv: .*{message}"):
        read_curves(metrics)


def widest_label(drawn: np.ndarray, label: int) -> int:
    """Length of the longest row in the colour of a class, outlines aside, which are drawn in another colour here."""
    rows = (drawn == class_color(label)).all(axis=2)
    return int(max(np.flatnonzero(row).max() - np.flatnonzero(row).min() + 1 if row.any() else 0 for row in rows))


def test_names_are_cut_to_their_boxes() -> None:
    for width in (80, 120, 200, 400):
        drawn = draw_boxes(blank(600, 400), [[50, 100, 50 + width, 300]], [1], NAMES, [0.875])
        assert widest_label(drawn, 1) <= max(width, 4 * 14)


def test_a_crowd_does_not_bury_the_image() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 380, (80, 2))
    boxes = np.concatenate([corners, corners + rng.integers(8, 20, (80, 2))], axis=1)
    drawn = draw_boxes(blank(400, 400), boxes, [1] * 80, NAMES, rng.uniform(0, 1, 80))
    plain = draw_boxes(blank(400, 400), boxes, [1] * 80, NAMES, show_labels=False)
    assert plain.any(axis=2).mean() < 0.15
    assert drawn.any(axis=2).mean() < 0.75


def test_without_labels_and_with_thick_lines() -> None:
    drawn = draw_boxes(blank(300, 200), [[50, 60, 150, 160]], [0], NAMES, show_labels=False, line_width=7)
    assert drawn[60:160, 50:150].any(axis=2).sum() == 100 * 100 - 86 * 86
    assert not drawn[:60].any()
    with pytest.raises(UsageError, match="at least 1 pixel"):
        draw_boxes(blank(300, 200), [], [], NAMES, line_width=0)


def test_small_images_are_enlarged_on_request() -> None:
    for size in ((28, 28), (3, 150), (199, 1)):
        drawn = draw_boxes(blank(*size), [[0, 0, size[0], size[1]]], [0], NAMES, enlarge=True)
        assert max(drawn.shape) >= 480
        assert drawn.shape[0] * size[0] == drawn.shape[1] * size[1]  # the same shape
        for corner in ((0, 0), (-1, -1), (0, -1)):
            assert tuple(drawn[corner]) == class_color(0)
    assert draw_boxes(blank(200, 20), [], [], NAMES, enlarge=True).shape == (20, 200, 3)


def test_odd_names_are_drawn() -> None:
    for name in ("", " ", "two\nlines", "\x1b[31mred\0", "\ud800", "x" * 5000, "\N{RIGHT-TO-LEFT OVERRIDE}abc"):
        drawn = draw_boxes(blank(300, 200), [[50, 60, 150, 160]], [0], [name], [0.5])
        assert drawn.shape == (200, 300, 3)
