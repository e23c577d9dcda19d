"""Boxes around polygons and run lengths, against pycocotools and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as oracle

from refinedet.data.masks import box_of_segmentation, decode_counts


def test_polygons_by_hand() -> None:
    assert box_of_segmentation([[20, 20, 60, 20, 60, 60]], (160, 120)) == (20, 20, 40, 40)
    assert box_of_segmentation([[5, 9, 6, 10, 7, 9], [1, 2.5, 3, 4, 2, 3]], (160, 120)) == (1, 2.5, 6, 7.5)
    assert box_of_segmentation([20, 20, 60, 20, 60, 60], (160, 120)) == (20, 20, 40, 40)


@pytest.mark.parametrize("segmentation", [None, [], [[]], {"size": [2, 3], "counts": [6]}])
def test_nothing_has_no_box(segmentation: object) -> None:
    assert box_of_segmentation(segmentation, (3, 2)) is None


def test_run_lengths_against_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(1, 40, 2))
        pixels = np.zeros((height, width), dtype=np.uint8, order="F")
        for _ in range(int(rng.integers(1, 4))):
            x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
            pixels[y : y + int(rng.integers(1, 12)), x : x + int(rng.integers(1, 12))] = 1
        pixels &= rng.random(pixels.shape) < 0.9
        compressed = oracle.encode(pixels)
        text = compressed["counts"].decode()
        counts = decode_counts(text)
        assert sum(counts) == width * height
        assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts), pixels.flatten(order="F"))
        expected = tuple(oracle.toBbox(compressed).tolist()) if pixels.any() else None
        for form in (text, counts):
            assert box_of_segmentation({"size": [height, width], "counts": form}, (width, height)) == expected


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [2, 3], "counts": "abc"}, "cut off"),
        ({"size": [2, 3], "counts": "\u20ac"}, "damaged"),
        ({"size": [2, 3], "counts": "o" * 100}, "damaged"),
        ({"size": [2, 3], "counts": [1, -1, 6]}, "damaged"),
        ({"size": [2, 3], "counts": ["1", "5"]}, "damaged"),
        ({"size": [2, 3]}, "damaged"),
        ({"size": [2, 3], "counts": [1, 2]}, "do not add up"),
        ({"size": [2, 3], "counts": [10**30]}, "do not add up"),
        ({"size": [3, 2], "counts": [6]}, "not of the image's size"),
        ([[1, 2, 3]], "no list of x and y"),
        ([["1", 2]], "no list of x and y"),
        ([[1, float("nan")]], "no list of x and y"),
        ([[1, 10**400]], "no list of x and y"),
        ([[1, 2], {}], "no list of x and y"),
        ("abc", "neither"),
        (5, "neither"),
    ],
)
def test_damaged_masks_are_named(segmentation: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        box_of_segmentation(segmentation, (3, 2))
