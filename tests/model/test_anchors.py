"""Anchor tiling against the formulas of the paper and a loop over cells."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet.model.anchors import STRIDES, level_sizes, tile_anchors

SIZES = (32.0, 64.0, 128.0, 256.0)
RATIOS = (1.0, 2.0, 0.5)


def tile(height: int, width: int) -> torch.Tensor:
    return tile_anchors(level_sizes(height, width), (height, width), SIZES, RATIOS)


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [
        (320, 320, 6375),  # 3 * (40^2 + 20^2 + 10^2 + 5^2)
        (512, 512, 16320),  # 3 * (64^2 + 32^2 + 16^2 + 8^2)
        (1024, 1024, 65280),
        (192, 320, 3825),  # 3 * (24 * 40 + 12 * 20 + 6 * 10 + 3 * 5)
        (320, 192, 3825),
        (64, 64, 255),
    ],
)
def test_counts(height: int, width: int, count: int) -> None:
    anchors = tile(height, width)
    assert anchors.shape == (count, 4)
    assert anchors.dtype == torch.float32


def test_values_by_hand() -> None:
    anchors = tile(320, 320)
    root = math.sqrt(2.0)
    # First cell of stride 8: centre (4, 4), side 32: 32 x 32, 45.25 x 22.63, 22.63 x 45.25.
    wide, narrow = 32 * root / 2, 32 / root / 2
    assert anchors[0].tolist() == [-12.0, -12.0, 20.0, 20.0]
    assert anchors[1].tolist() == pytest.approx([4 - wide, 4 - narrow, 4 + wide, 4 + narrow])
    assert anchors[2].tolist() == pytest.approx([4 - narrow, 4 - wide, 4 + narrow, 4 + wide])
    # The next cell is to the right: centre (12, 4); the next row begins after 40 cells: centre (4, 12).
    assert anchors[3].tolist() == [-4.0, -12.0, 28.0, 20.0]
    assert anchors[120].tolist() == [-12.0, -4.0, 20.0, 28.0]
    # Last cell of stride 64: centre (288, 288), side 256; 362.04 x 181.02 is not clipped to the image.
    assert anchors[-3].tolist() == [160.0, 160.0, 416.0, 416.0]
    assert anchors[-2].tolist() == pytest.approx([106.9806, 197.4903, 469.0194, 378.5097], abs=1e-3)
    assert anchors[-1].tolist() == pytest.approx([197.4903, 106.9806, 378.5097, 469.0194], abs=1e-3)
    # The second level begins after 4,800 anchors: stride 16, centre (8, 8), side 64.
    assert anchors[4800].tolist() == [-24.0, -24.0, 40.0, 40.0]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5),
    ratios=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=4),
    sides=st.tuples(*[st.floats(4.0, 400.0)] * 4),
)  # fmt: skip
def test_tiling_equals_the_loop(
    rows: int, columns: int, ratios: list[float], sides: tuple[float, float, float, float]
) -> None:
    height, width = 64 * rows, 64 * columns
    expected = []
    for stride, side in zip((8, 16, 32, 64), sides, strict=True):
        for row in range(height // stride):
            for column in range(width // stride):
                for ratio in ratios:
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    w, h = side * math.sqrt(ratio), side / math.sqrt(ratio)
                    expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    anchors = tile_anchors(level_sizes(height, width), (height, width), sides, ratios)
    torch.testing.assert_close(anchors.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-3, rtol=0)


def test_levels() -> None:
    assert STRIDES == (8, 16, 32, 64)
    assert level_sizes(192, 320) == [(24, 40), (12, 20), (6, 10), (3, 5)]


def test_step_follows_the_real_feature_map() -> None:
    # Five cells over 300 pixels: centres at 30, 90, ...
    anchors = tile_anchors([(1, 5)], (60, 300), [10.0], [1.0])
    assert anchors[:, 0].tolist() == pytest.approx([25.0, 85.0, 145.0, 205.0, 265.0])
    assert anchors[:, 1].tolist() == pytest.approx([25.0] * 5)


def test_levels_and_sides_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        tile_anchors([(4, 4)], (64, 64), SIZES, RATIOS)
