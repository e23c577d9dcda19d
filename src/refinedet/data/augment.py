"""Augmentation: the official code's sampling law, and one resampling that draws what the law has decided.

The law (``sample_geometry``, ``sample_photometric``) looks at boxes and sizes only. The pixels (``render``) are touched
once: the region that expansion and crop have chosen is cut out of the image and warped straight to the network's
size. Order of the law: photometric, expand, crop, warp, flip (official code: annotated_data_layer.cpp:147-232).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from refinedet.config import AugmentConfig

Interpolation = Literal["linear", "area", "nearest", "cubic", "lanczos"]
FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

BRIGHTNESS = 32.0
"""Added to all channels: uniform in +-32 of 255."""
CONTRAST = SATURATION = (0.5, 1.5)
"""Factor of all channels, and of the S of HSV: uniform between these."""
HUE_DEGREES = 36.0
"""Turn of the hue: uniform in +-36 degrees (the official +-18 are OpenCV's half degrees)."""
PHOTOMETRIC_PROBABILITY = 0.5
"""Chance of each of the four distortions."""
CROP_MIN_OVERLAPS = (0.1, 0.3, 0.5, 0.7, 0.9, None)
"""Overlap that a crop must have with at least one target: one sampler each; the last takes any crop. The seventh
sampler is the whole image."""
CROP_TRIALS = 50
"""Crops that a sampler tries before it gives up."""
CROP_SCALE = (0.3, 1.0)
"""Root of the crop's share of the area."""
CROP_ASPECT = (0.5, 2.0)
"""Width / height of a crop relative to the image's; narrowed to [scale^2, 1 / scale^2] so that the crop fits."""
MOSAIC_CENTRE = (0.3, 0.7)
"""Where four images meet: uniform between these, in shares of the width and of the height."""
MIXUP_BETA = 8.0
"""The share of the first of two mixed images: Beta(8, 8), near one half, so that the objects of both can be seen."""


@dataclass(frozen=True)
class Geometry:
    """Which part of an image becomes the network's input."""

    region: tuple[float, float, float, float]
    """xyxy in pixels of the image; what lies outside the image is filled."""
    flip: bool
    """Mirror the result."""
    interpolation: Interpolation
    """How it is resampled."""


@dataclass(frozen=True)
class Photometric:
    """Colour distortions, in the order in which they are applied."""

    steps: tuple[tuple[Literal["brightness", "contrast", "saturation", "hue"], float], ...] = field(default=())
    """Name and strength: an addend in 0..255, a factor, a factor, degrees."""


def sample_photometric(rng: np.random.Generator) -> Photometric:
    """Draw colour distortions: [brightness, contrast, saturation, hue] or, with probability 0.5, contrast last."""
    contrast_first = rng.random() < 0.5
    draws: dict[Literal["brightness", "contrast", "saturation", "hue"], float] = {
        "brightness": rng.uniform(-BRIGHTNESS, BRIGHTNESS),
        "contrast": rng.uniform(*CONTRAST),
        "saturation": rng.uniform(*SATURATION),
        "hue": rng.uniform(-HUE_DEGREES, HUE_DEGREES),
    }
    applied = rng.random(4) < PHOTOMETRIC_PROBABILITY
    chosen = [(name, value) for (name, value), on in zip(draws.items(), applied, strict=True) if on]
    if not contrast_first:
        chosen.sort(key=lambda step: step[0] == "contrast")
    return Photometric(tuple(chosen))


def sample_geometry(
    rng: np.random.Generator, width: int, height: int, boxes: FloatArray, config: AugmentConfig
) -> Geometry:
    """Draw expansion, crop, flip and interpolation.

    * Expansion, with ``expand_probability``: a canvas of U(1, ``expand_ratio``) times the sides, the image at a
      random whole pixel of it.
    * Crop: seven samplers, each of up to 50 crops of the canvas, six of them wanting an overlap with at least one
      target (``CROP_MIN_OVERLAPS``); one of the crops found is picked, the whole canvas being always among them.

    Args:
        rng: source of randomness; equal states give equal results.
        width: of the image in pixels.
        height: of the image in pixels.
        boxes: (G, 4) targets, xyxy in pixels of the image; difficult ones included.
        config: probabilities.
    """
    x, y, canvas_width, canvas_height = 0.0, 0.0, float(width), float(height)
    if rng.random() < config.expand_probability:
        ratio = rng.uniform(1.0, config.expand_ratio)
        canvas_width, canvas_height = float(int(width * ratio)), float(int(height * ratio))
        x = -math.floor(rng.uniform(0.0, canvas_width - width))
        y = -math.floor(rng.uniform(0.0, canvas_height - height))
    region = (x, y, x + canvas_width, y + canvas_height)
    if config.crop and len(boxes):
        canvas = np.array([canvas_width, canvas_height, canvas_width, canvas_height])
        relative = (boxes.astype(np.float64) - np.array([x, y, x, y])) / canvas
        regions = [region]
        for least in CROP_MIN_OVERLAPS:
            crop = _first_crop(rng, relative, least)
            if crop is not None:
                left, top, right, bottom = (crop * canvas).tolist()
                regions.append((x + left, y + top, x + right, y + bottom))
        region = regions[int(rng.integers(len(regions)))]
    flip = bool(rng.random() < config.flip_probability)
    interpolation = config.interpolations[int(rng.integers(len(config.interpolations)))]
    return Geometry(region, flip, interpolation)


def _first_crop(
    rng: np.random.Generator, boxes: npt.NDArray[np.float64], least: float | None
) -> npt.NDArray[np.float64] | None:
    """First of 50 random crops, xyxy in shares of the canvas, that overlaps any box by at least ``least``."""
    trials = 1 if least is None else CROP_TRIALS
    scale = rng.uniform(*CROP_SCALE, size=trials)
    low, high = np.maximum(CROP_ASPECT[0], scale**2), np.minimum(CROP_ASPECT[1], scale**-2)
    aspect = low + (high - low) * rng.random(trials)
    width, height = scale * np.sqrt(aspect), scale / np.sqrt(aspect)
    left, top = rng.random(trials) * (1 - width), rng.random(trials) * (1 - height)
    crops = np.stack([left, top, left + width, top + height], axis=1)
    first: npt.NDArray[np.float64] = crops[0]
    if least is None:
        return first
    size = np.minimum(crops[:, None, 2:], boxes[None, :, 2:]) - np.maximum(crops[:, None, :2], boxes[None, :, :2])
    intersection = size.clip(min=0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    overlap = intersection / ((width * height)[:, None] + areas[None] - intersection)
    good = np.flatnonzero((overlap >= least).any(axis=1))
    if not len(good):
        return None
    first = crops[good[0]]
    return first


def transform_boxes(
    boxes: FloatArray, geometry: Geometry, size: tuple[int, int]
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Carry targets over to the rendered image.

    Args:
        boxes: (G, 4) xyxy in pixels of the image.
        geometry: what was drawn.
        size: height and width of the rendered image.

    Returns:
        (K, 4) xyxy in pixels of the rendered image, clipped to it, and the (G,) mask of the K targets kept: those
        whose centre lies in the region (official emit constraint CENTER).
    """
    height, width = size
    left, top, right, bottom = geometry.region
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = (centre[:, 0] >= left) & (centre[:, 0] <= right) & (centre[:, 1] >= top) & (centre[:, 1] <= bottom)
    factor = np.array([width / (right - left), height / (bottom - top)] * 2)
    moved = (boxes[kept] - np.array([left, top, left, top])) * factor
    moved = np.clip(moved, 0.0, np.array([width, height, width, height], dtype=np.float64))
    if geometry.flip:
        moved[:, [0, 2]] = width - moved[:, [2, 0]]
    return moved.astype(np.float32), kept


def render(
    image: ByteArray,
    geometry: Geometry,
    photometric: Photometric,
    size: tuple[int, int],
    fill: tuple[float, float, float],
) -> ByteArray:
    """Draw what the law has decided.

    Args:
        image: (H, W, 3) uint8 RGB.
        geometry: region, flip, interpolation.
        photometric: applied to the image, not to the filling.
        size: height and width of the result.
        fill: RGB colour in 0..255 of what lies outside the image: the mean of the model's input.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    height, width = size
    left, top, right, bottom = geometry.region
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    # Whole pixels of the result that the image covers, and the exact part of the image that covers them.
    x1, x2 = max(0, math.ceil(-left * scale_x - 1e-6)), min(width, math.floor((image.shape[1] - left) * scale_x + 1e-6))
    y1, y2 = max(0, math.ceil(-top * scale_y - 1e-6)), min(height, math.floor((image.shape[0] - top) * scale_y + 1e-6))
    colour = tuple(round(value) for value in fill)
    canvas = Image.new("RGB", (width, height), colour)
    if x2 > x1 and y2 > y1:
        source = (
            max(0.0, left + x1 / scale_x),
            max(0.0, top + y1 / scale_y),
            min(float(image.shape[1]), left + x2 / scale_x),
            min(float(image.shape[0]), top + y2 / scale_y),
        )
        part = _resample(Image.fromarray(image), source, (x2 - x1, y2 - y1), geometry.interpolation)
        canvas.paste(distort(part, photometric), (x1, y1))
    if geometry.flip:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(canvas)


def _resample(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], law: Interpolation
) -> Image.Image:
    if law in ("area", "lanczos", "nearest"):
        kernel = {
            "area": Image.Resampling.BOX,
            "lanczos": Image.Resampling.LANCZOS,
            "nearest": Image.Resampling.NEAREST,
        }[law]
        return image.resize(size, kernel, box=box)
    # transform() samples between neighbouring pixels and does not average when it shrinks, as OpenCV's kernels do;
    # resize() would antialias.
    sampling = Image.Resampling.BILINEAR if law == "linear" else Image.Resampling.BICUBIC
    return image.transform(size, Image.Transform.EXTENT, box, sampling)


def sample_mosaic(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Draw the point where four images meet.

    Args:
        rng: source of randomness.
        size: height and width of the whole, at least 4 each.

    Returns:
        Four tiles, xyxy in whole pixels, that cover the whole without overlap: top left, top right, bottom left,
        bottom right.
    """
    height, width = size
    x, y = round(width * rng.uniform(*MOSAIC_CENTRE)), round(height * rng.uniform(*MOSAIC_CENTRE))
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]


def mix(first: ByteArray, second: ByteArray, share: float) -> ByteArray:
    """Lay two images over each other.

    Args:
        first: (H, W, 3) uint8.
        second: of the same shape.
        share: of ``first``, 0..1; ``second`` has the rest.

    Returns:
        (H, W, 3) uint8, rounded down.
    """
    return np.asarray(Image.blend(Image.fromarray(second), Image.fromarray(first), share))


def distort(image: Image.Image, photometric: Photometric) -> Image.Image:
    """Apply colour distortions to an RGB image, saturating at 0 and 255 after each, as the official uint8 code does.

    The hue saturates at 0 and wraps at 360 degrees, the behaviour of OpenCV's 8-bit hue.
    """
    levels = np.arange(256, dtype=np.float64)
    for name, strength in photometric.steps:
        if name == "brightness":
            image = image.point(_table(levels + strength) * 3)
        elif name == "contrast":
            image = image.point(_table(levels * strength) * 3)
        else:
            hue = saturation = levels
            if name == "saturation":
                saturation = levels * strength
            else:
                # Pillow's hue has 256 steps for 360 degrees.
                hue = np.mod(np.maximum(levels + strength * 256 / 360, 0), 256)
            tables = _table(hue) + _table(saturation) + _table(levels)
            image = image.convert("HSV").point(tables).convert("RGB")
    return image


def _table(values: npt.NDArray[np.float64]) -> list[int]:
    table: list[int] = np.clip(np.rint(values), 0, 255).astype(int).tolist()
    return table
