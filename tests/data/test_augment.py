"""The sampling law against a slow reading of the official code, and images against their boxes."""

from __future__ import annotations

import colorsys
import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from oracles import iou
from refinedet.config import AugmentConfig
from refinedet.data import augment
from refinedet.data.augment import (
    Geometry,
    Photometric,
    distort,
    render,
    sample_geometry,
    sample_photometric,
    transform_boxes,
)

LAWS = ("linear", "area", "nearest", "cubic", "lanczos")
CROP_ONLY = AugmentConfig(expand_probability=0.0, flip_probability=0.0)
EXPAND_ONLY = AugmentConfig(expand_probability=1.0, flip_probability=0.0, crop=False)
GREY = (110.0, 112.0, 114.0)
seeds = st.integers(0, 2**32 - 1)


def random_targets(rng: np.random.Generator, count: int, width: int, height: int) -> np.ndarray:
    corners = rng.random((count, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return np.minimum(boxes, [width, height, width, height]).astype(np.float32)


# Geometry.


@settings(max_examples=200, deadline=None)
@given(seed=seeds, width=st.integers(20, 500), height=st.integers(20, 500), count=st.integers(0, 8))
def test_geometry_obeys_the_law(seed: int, width: int, height: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = random_targets(rng, count, width, height)
    config = AugmentConfig()
    geometry = sample_geometry(rng, width, height, boxes, config)
    left, top, right, bottom = geometry.region
    assert geometry.interpolation in LAWS
    # Within a canvas of at most four images' sides.
    assert right - left <= 4 * width
    assert bottom - top <= 4 * height
    # The last sampler wants no overlap, so a crop may even miss the image.
    assert -3 * width <= left < right <= 4 * width
    assert -3 * height <= top < bottom <= 4 * height
    size = (96, 64)
    moved, kept = transform_boxes(boxes, geometry, size)
    assert moved.dtype == np.float32
    assert moved.shape == (int(kept.sum()), 4)
    for (x1, y1, x2, y2), is_kept in zip(boxes.tolist(), kept.tolist(), strict=True):
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        margin = min(abs(x - left), abs(x - right), abs(y - top), abs(y - bottom))
        if margin > 1e-3:
            assert is_kept == (left < x < right and top < y < bottom)
    assert (moved[:, :2] >= 0).all()
    assert (moved[:, 2] <= 64).all()
    assert (moved[:, 3] <= 96).all()
    assert (moved[:, 2:] > moved[:, :2]).all()
    # By hand, box by box.
    for got, (x1, y1, x2, y2) in zip(moved.tolist(), boxes[kept].tolist(), strict=True):
        wanted = [
            min(max((x1 - left) / (right - left), 0), 1) * 64, min(max((y1 - top) / (bottom - top), 0), 1) * 96,
            min(max((x2 - left) / (right - left), 0), 1) * 64, min(max((y2 - top) / (bottom - top), 0), 1) * 96,
        ]  # fmt: skip
        if geometry.flip:
            wanted[0], wanted[2] = 64 - wanted[2], 64 - wanted[0]
        assert got == pytest.approx(wanted, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_equal_seeds_draw_equally(seed: int) -> None:
    boxes = random_targets(np.random.default_rng(seed), 4, 200, 100)
    first, second = np.random.default_rng(seed), np.random.default_rng(seed)
    assert sample_photometric(first) == sample_photometric(second)
    for _ in range(3):
        assert sample_geometry(first, 200, 100, boxes, AugmentConfig()) == sample_geometry(
            second, 200, 100, boxes, AugmentConfig()
        )


def test_expansion_statistics() -> None:
    rng = np.random.default_rng(0)
    draws = [sample_geometry(rng, 100, 50, np.zeros((0, 4), np.float32), EXPAND_ONLY).region for _ in range(4000)]
    regions = np.array(draws)
    width, height = regions[:, 2] - regions[:, 0], regions[:, 3] - regions[:, 1]
    ratio = width / 100
    # Both sides grow by the same U(1, 4), down to whole pixels; the image lies at a whole pixel of the canvas.
    assert np.abs(width / 2 - height).max() <= 1
    assert ratio.min() >= 1
    assert ratio.max() <= 4
    assert ratio.mean() == pytest.approx(2.5, abs=0.05)
    assert np.quantile(ratio, 0.25) == pytest.approx(1.75, abs=0.08)
    assert np.all(regions == np.round(regions))
    assert np.all(regions[:, :2] <= 0)
    assert np.all(regions[:, 2] >= 100)
    assert np.all(regions[:, 3] >= 50)
    large = ratio > 2
    places = [-regions[large, 0] / (width[large] - 100), -regions[large, 1] / (height[large] - 50)]
    for place in places:
        assert place.mean() == pytest.approx(0.5, abs=0.03)
        assert place.std() == pytest.approx(math.sqrt(1 / 12), abs=0.03)
    assert abs(np.corrcoef(*places)[0, 1]) < 0.1


def test_probabilities() -> None:
    rng = np.random.default_rng(1)
    nothing = np.zeros((0, 4), np.float32)
    draws = [sample_geometry(rng, 100, 50, nothing, AugmentConfig()) for _ in range(4000)]
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.03)
    # Without objects there is nothing to crop around: the canvas stays whole.
    assert np.mean([draw.region == (0, 0, 100, 50) for draw in draws]) == pytest.approx(0.5, abs=0.03)
    for law in LAWS:
        assert np.mean([draw.interpolation == law for draw in draws]) == pytest.approx(0.2, abs=0.03)
    never = AugmentConfig(expand_probability=0.0, flip_probability=0.0, interpolations=("area",))
    for _ in range(50):
        assert sample_geometry(rng, 100, 50, nothing, never) == Geometry((0, 0, 100, 50), False, "area")


def slow_crop(rng: random.Random, boxes: list[list[float]]) -> list[float]:
    """The official seven samplers, one trial at a time, on the unit square (reference, section 4)."""
    found = [[0.0, 0.0, 1.0, 1.0]]
    for least in (0.1, 0.3, 0.5, 0.7, 0.9, 0.0):
        for _ in range(50):
            scale = rng.uniform(0.3, 1.0)
            aspect = rng.uniform(max(0.5, scale**2), min(2.0, 1 / scale**2))
            width, height = scale * math.sqrt(aspect), scale / math.sqrt(aspect)
            x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            crop = [x, y, x + width, y + height]
            if any(iou(crop, box) >= least for box in boxes):
                found.append(crop)
                break
    return rng.choice(found)


@pytest.mark.parametrize(
    "boxes",
    [
        [[0.0, 0.0, 1.0, 1.0]],
        [[0.1, 0.2, 0.4, 0.9]],
        [[0.45, 0.45, 0.55, 0.5], [0.7, 0.1, 0.9, 0.6]],
        [[0.01, 0.01, 0.03, 0.02]],
    ],
)
def test_crops_are_distributed_as_the_official_ones(boxes: list[list[float]]) -> None:
    count = 1000
    slow_rng, rng = random.Random(2), np.random.default_rng(3)
    expected = np.array([slow_crop(slow_rng, boxes) for _ in range(count)])
    pixels = np.array(boxes, dtype=np.float32) * np.array([200, 100, 200, 100], np.float32)
    regions = [sample_geometry(rng, 200, 100, pixels, CROP_ONLY).region for _ in range(count)]
    crops = np.array(regions) / (200, 100, 200, 100)
    whole = (crops == (0, 0, 1, 1)).all(axis=1)
    # At least a seventh stays whole; the more samplers fail, the more.
    assert whole.mean() > 1 / 7 - 0.03
    assert whole.mean() == pytest.approx((expected == (0, 0, 1, 1)).all(axis=1).mean(), abs=0.05)
    for measure in (
        lambda c: c[:, 0], lambda c: c[:, 1], lambda c: c[:, 2], lambda c: c[:, 3],
        lambda c: (c[:, 2] - c[:, 0]) * (c[:, 3] - c[:, 1]),
        lambda c: np.log((c[:, 2] - c[:, 0]) / (c[:, 3] - c[:, 1])),
    ):  # fmt: skip
        ours, theirs = np.sort(measure(crops)), np.sort(measure(expected))
        # Kolmogorov-Smirnov distance; 0.09 is beyond chance for two samples of 1,000 (p < 0.001).
        points = np.concatenate([ours, theirs])
        distance = (
            np.abs(
                np.searchsorted(ours, points - 1e-9, "right") - np.searchsorted(theirs, points - 1e-9, "right")
            ).max()
            / count
        )
        assert distance < 0.09
    # Crops lie in the image; scale 0.3 to 1, aspect within [max(1/2, s^2), min(2, 1/s^2)].
    assert crops.min() >= 0
    assert crops.max() <= 1 + 1e-9
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    scale, aspect = np.sqrt(width * height), width / height
    assert scale.min() >= 0.3 - 1e-9
    assert (aspect >= np.maximum(0.5, scale**2) - 1e-6).all()
    assert (aspect <= np.minimum(2.0, scale**-2) + 1e-6).all()


@pytest.mark.parametrize("least", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_sampler_keeps_its_promise(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop overlaps at least one target by that much, in the pixels of the expanded image as well."""
    assert augment.CROP_MIN_OVERLAPS == (0.1, 0.3, 0.5, 0.7, 0.9, None)
    monkeypatch.setattr(augment, "CROP_MIN_OVERLAPS", (least,))
    rng = np.random.default_rng(4)
    cropped, best = 0, []
    for number in range(300):
        # One target is nearly the whole image, or a 0.9 would hardly ever be found.
        boxes = np.concatenate([random_targets(rng, 2, 160, 90), np.float32([[2, 1, 158, 89]])])
        config = AugmentConfig(expand_probability=float(number % 2), expand_ratio=1.5)
        region = sample_geometry(rng, 160, 90, boxes, config).region
        corners = np.array(region)
        if number % 2 == 0 and region == (0, 0, 160, 90):
            continue
        if number % 2 and np.all(corners == np.round(corners)):
            continue
        cropped += 1
        best.append(max(iou(region, box) for box in boxes.tolist()))
    assert cropped > 5
    assert min(best) >= least - 1e-6


# Images.


def extent(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@settings(max_examples=200, deadline=None)
@given(
    seed=seeds, law=st.sampled_from(LAWS), expand=st.booleans(), crop=st.booleans(), flip=st.booleans(),
    size=st.sampled_from([(96, 96), (64, 128), (160, 96)]), width=st.integers(40, 220), height=st.integers(40, 220),
)  # fmt: skip
def test_a_drawn_rectangle_lies_in_its_box(
    seed: int, law: str, expand: bool, crop: bool, flip: bool, size: tuple[int, int], width: int, height: int
) -> None:
    rng = np.random.default_rng(seed)
    x1, y1 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    x2, y2 = int(rng.integers(x1 + width // 3, width + 1)), int(rng.integers(y1 + height // 3, height + 1))
    image = np.full((height, width, 3), 20, dtype=np.uint8)
    image[y1:y2, x1:x2] = (250, 20, 20)
    boxes = np.array([[x1, y1, x2, y2]], dtype=np.float32)
    config = AugmentConfig(
        expand_probability=float(expand), crop=crop, flip_probability=float(flip), interpolations=(law,)
    )
    geometry = sample_geometry(rng, width, height, boxes, config)
    moved, kept = transform_boxes(boxes, geometry, size)
    assume(kept[0])
    assume(min(moved[0, 2] - moved[0, 0], moved[0, 3] - moved[0, 1]) >= 4)
    result = render(image, geometry, Photometric(), size, GREY)
    assert result.dtype == np.uint8
    assert result.shape == (*size, 3)
    red = (result[:, :, 0].astype(int) - result[:, :, 1]) > 115
    assert red.any()
    assert extent(red) == pytest.approx(moved[0].tolist(), abs=1.5)
    assert red.sum() == pytest.approx((moved[0, 2] - moved[0, 0]) * (moved[0, 3] - moved[0, 1]), rel=0.5, abs=20)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("flip", [False, True])
def test_identity_and_mirror(law: str, flip: bool) -> None:
    image = np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    result = render(image, Geometry((0, 0, 60, 40), flip, law), Photometric(), (40, 60), GREY)
    expected = image[:, ::-1] if flip else image
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("law", LAWS)
def test_expansion_fills_with_the_mean(law: str) -> None:
    # A canvas of 4 x 4 images, the image in its second column and third row; 1 pixel of the canvas is 1 of the
    # result.
    image = np.full((20, 30, 3), 200, dtype=np.uint8)
    geometry = Geometry((-30, -40, 90, 40), False, law)
    brighter = Photometric((("brightness", 20.0),))
    result = render(image, geometry, brighter, (80, 120), (103.53, 116.28, 123.675))
    expected = np.empty((80, 120, 3), dtype=np.uint8)
    expected[:] = (104, 116, 124)
    expected[40:60, 30:60] = 220
    np.testing.assert_array_equal(result, expected)


def test_a_region_without_image_is_all_filling() -> None:
    image = np.full((20, 30, 3), 200, dtype=np.uint8)
    result = render(image, Geometry((-300, -300, -200, -200), True, "linear"), Photometric(), (8, 8), GREY)
    assert (result == np.array([110, 112, 114])).all()


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(20, 300), height=st.integers(20, 300), ratio=st.floats(1.0, 4.0), share=st.floats(0.0, 1.0),
    law=st.sampled_from(LAWS), size=st.sampled_from([(64, 64), (320, 320), (96, 160)]),
)  # fmt: skip
def test_expansion_fills_what_the_image_does_not_cover(
    width: int, height: int, ratio: float, share: float, law: str, size: tuple[int, int]
) -> None:
    """Every pixel of the result that lies wholly in the image shows it, every other one is filling."""
    canvas_width, canvas_height = int(width * ratio), int(height * ratio)
    left, top = -int(share * (canvas_width - width)), -int(share * (canvas_height - height))
    geometry = Geometry((left, top, left + canvas_width, top + canvas_height), False, law)
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    result = render(image, geometry, Photometric(), size, (0.0, 0.0, 0.0))[:, :, 0]
    for axis, (count, side, start, sides) in enumerate(
        [(size[0], height, top, canvas_height), (size[1], width, left, canvas_width)]
    ):
        edges = start + np.arange(count + 1) * (sides / count)
        # A thousandth of a pixel is left to rounding.
        slack = sides / count * 1e-3
        covered = (edges[:-1] >= slack) & (edges[1:] <= side - slack)
        not_covered = (edges[:-1] < -slack) | (edges[1:] > side + slack)
        shown = result.any(axis=1 - axis)
        assert shown[covered].all()
        assert not shown[not_covered].any()


@settings(max_examples=60, deadline=None)
@given(
    left=st.floats(-60, 15), top=st.floats(-60, 15), right=st.floats(0, 60), bottom=st.floats(0, 60),
    law=st.sampled_from(LAWS), size=st.sampled_from([(64, 64), (200, 90)]),
)  # fmt: skip
def test_a_ramp_stays_in_place(
    left: float, top: float, right: float, bottom: float, law: str, size: tuple[int, int]
) -> None:
    """An image whose levels tell the place: five levels of red per column, five of green per row."""
    levels = (5 * np.arange(50)).astype(np.uint8)
    image = np.stack(np.broadcast_arrays(levels[None, :], levels[:, None], np.uint8(255)), axis=2)
    region = (left, top, 50 + right, 50 + bottom)
    result = render(np.ascontiguousarray(image), Geometry(region, False, law), Photometric(), size, (0.0, 0.0, 0.0))
    x = left + (np.arange(size[1]) + 0.5) * (region[2] - left) / size[1]
    y = top + (np.arange(size[0]) + 0.5) * (region[3] - top) / size[0]
    # Where no kernel reaches over the border.
    reach_x, reach_y = 3 * max(1, (region[2] - left) / size[1]) + 1, 3 * max(1, (region[3] - top) / size[0]) + 1
    columns = np.flatnonzero((x > reach_x) & (x < 50 - reach_x))
    rows = np.flatnonzero((y > reach_y) & (y < 50 - reach_y))
    inner = result[np.ix_(rows, columns)].astype(float)
    # Five levels are one pixel of the image. Pillow truncates linear and cubic results, its cubic kernel is not exact
    # on a ramp, and nearest and a box of whole pixels are half a pixel off.
    tolerance = {"linear": 1.1, "lanczos": 0.7, "cubic": 1.5, "nearest": 2.6, "area": 3.1}[law]
    assert np.abs(inner[:, :, 0] - 5 * (x[columns][None, :] - 0.5)).max(initial=0) <= tolerance
    assert np.abs(inner[:, :, 1] - 5 * (y[rows][:, None] - 0.5)).max(initial=0) <= tolerance


def test_shrinking_laws_differ_as_opencvs_do() -> None:
    """Area averages, linear and nearest sample: shrunk noise keeps its contrast unless it is averaged."""
    image = np.random.default_rng(6).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    spread = {
        law: render(image, Geometry((0, 0, 200, 200), False, law), Photometric(), (50, 50), GREY).std() for law in LAWS
    }
    assert spread["nearest"] > 65
    assert spread["linear"] > 30
    assert spread["cubic"] > 30
    assert spread["area"] < 22
    average = image.reshape(50, 4, 50, 4, 3).mean(axis=(1, 3))
    result = render(image, Geometry((0, 0, 200, 200), False, "area"), Photometric(), (50, 50), GREY)
    assert np.abs(result - average).max() <= 1


def test_linear_is_plain_bilinear() -> None:
    from refinedet.preprocess import resize

    image = np.random.default_rng(7).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    result = render(image, Geometry((0, 0, 70, 90), False, "linear"), Photometric(), (48, 64), GREY)
    assert np.abs(result - resize(image, 48, 64)).max() <= 1.01


# Colours.


def test_photometric_statistics() -> None:
    rng = np.random.default_rng(8)
    draws = [dict(sample_photometric(rng).steps) for _ in range(8000)]
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-36, 36)}
    for name, (low, high) in ranges.items():
        values = np.array([draw[name] for draw in draws if name in draw])
        assert len(values) / 8000 == pytest.approx(0.5, abs=0.025)
        share = (values - low) / (high - low)
        assert share.min() >= 0
        assert share.max() <= 1
        assert share.mean() == pytest.approx(0.5, abs=0.02)
        assert share.std() == pytest.approx(math.sqrt(1 / 12), abs=0.02)
    together = np.mean([len(draw) == 4 for draw in draws])
    assert together == pytest.approx(1 / 16, abs=0.015)
    assert np.mean([not draw for draw in draws]) == pytest.approx(1 / 16, abs=0.015)


def test_photometric_order() -> None:
    rng = np.random.default_rng(9)
    orders = [tuple(name for name, _ in sample_photometric(rng).steps) for _ in range(4000)]
    full = [order for order in orders if len(order) == 4]
    first, last = ("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")
    assert set(full) == {first, last}
    assert full.count(first) / len(full) == pytest.approx(0.5, abs=0.12)


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("brightness"), st.floats(-32, 32)), st.tuples(st.just("contrast"), st.floats(0.5, 1.5))
        ),
        max_size=3,
    ),
)  # fmt: skip
def test_brightness_and_contrast_in_numpy(seed: int, steps: list[tuple[str, float]]) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    expected = image.astype(np.float64)
    for name, strength in steps:
        expected = expected + strength if name == "brightness" else expected * strength
        expected = np.clip(np.rint(expected), 0, 255)
    result = np.asarray(distort(Image.fromarray(image), Photometric(tuple(steps))))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("name", "strength"), [("saturation", 0.5), ("saturation", 1.5), ("hue", 30.0), ("hue", -30.0)]
)
def test_saturation_and_hue_against_colorsys(name: str, strength: float) -> None:
    rng = np.random.default_rng(10)
    image = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    result = np.asarray(distort(Image.fromarray(image), Photometric(((name, strength),))))  # type: ignore[arg-type]
    errors = []
    for colour, got in zip(image.reshape(-1, 3).tolist(), result.reshape(-1, 3).tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
        if name == "saturation":
            saturation = min(1.0, saturation * strength)
        else:
            # Down it stops at red (0 degrees), up it turns on past red.
            hue = max(0.0, hue + strength / 360) % 1
        wanted = [255 * level for level in colorsys.hsv_to_rgb(hue, saturation, value)]
        errors.append(max(abs(a - b) for a, b in zip(got, wanted, strict=True)))
    # Pillow's HSV has 256 steps each: a few levels.
    assert np.mean(errors) < 3
    assert max(errors) < 12


def test_colours_saturate_after_each_step() -> None:
    image = Image.new("RGB", (1, 1), (250, 100, 5))
    # 250 + 30 stops at 255, then half: 127.5, rounded to even 128; 5 + 30 = 35, 17.5: 18.
    result = distort(image, Photometric((("brightness", 30.0), ("contrast", 0.5))))
    assert result.getpixel((0, 0)) == (128, 65, 18)
    result = distort(image, Photometric((("brightness", -30.0), ("contrast", 1.5))))
    assert result.getpixel((0, 0)) == (255, 105, 0)


def test_the_image_is_left_alone() -> None:
    image = np.random.default_rng(11).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    boxes = random_targets(np.random.default_rng(12), 3, 20, 20)
    before, boxes_before = image.copy(), boxes.copy()
    geometry = Geometry((-5, -5, 25, 25), True, "linear")
    render(image, geometry, Photometric((("brightness", 9.0),)), (32, 32), GREY)
    transform_boxes(boxes, geometry, (32, 32))
    assert np.array_equal(image, before)
    assert np.array_equal(boxes, boxes_before)


def test_no_boxes() -> None:
    moved, kept = transform_boxes(np.zeros((0, 4), np.float32), Geometry((0, 0, 9, 9), True, "linear"), (8, 8))
    assert moved.shape == (0, 4)
    assert kept.shape == (0,)
