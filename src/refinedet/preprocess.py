"""The one path from an image to network input, shared by evaluation, prediction and exported models. No torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from refinedet.config import ModelConfig

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def preprocess(image: ByteArray, config: ModelConfig, size: tuple[int, int] | None = None) -> FloatArray:
    """Warp an image to the network's size and normalise it.

    Args:
        image: (H, W, 3) uint8, RGB.
        config: size, resize law, channel order, mean, std.
        size: height and width to use instead of ``config.image_size``.

    Returns:
        (3, height, width) float32, contiguous.

    Raises:
        ValueError: the image has another shape or type.
    """
    height, width = size or config.image_size
    return normalize(resize(image, height, width, config.resize), config)


def resize(image: ByteArray, height: int, width: int, law: str = "bilinear") -> FloatArray:
    """Warp (H, W, 3) uint8 to (height, width, 3) float32 in 0..255, the aspect ratio not kept (official code).

    "bilinear" samples four pixels with half-pixel centres, also when it shrinks, as cv2.INTER_LINEAR and
    ``F.interpolate`` do, and keeps fractions. "antialias" averages over the area that a pixel covers (Pillow).
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    if min(image.shape[:2]) == 0:
        raise ValueError("an image must have pixels")
    if law == "antialias":
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized, dtype=np.float32)
    top, bottom, down = _taps(image.shape[0], height)
    left, right, across = _taps(image.shape[1], width)
    # Rows as long vectors: numpy is several times slower on a last axis of three channels.
    flat = image.reshape(image.shape[0], -1)
    rows = flat.take(top, axis=0).astype(np.float32)
    step = flat.take(bottom, axis=0) - rows
    step *= down[:, None]
    rows += step
    rows = rows.reshape(height, image.shape[1], 3)
    result: FloatArray = rows.take(left, axis=1).reshape(height, -1)
    step = rows.take(right, axis=1).reshape(height, -1)
    step -= result
    step *= np.repeat(across, 3)
    result += step
    return result.reshape(height, width, 3)


@lru_cache(maxsize=64)
def _taps(source: int, target: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], FloatArray]:
    """For each of ``target`` pixels: the two source pixels it lies between, and the share of the second."""
    position = (np.arange(target, dtype=np.float64) + 0.5) * (source / target) - 0.5
    position = np.clip(position, 0, source - 1)
    first = np.floor(position).astype(np.intp)
    second = np.minimum(first + 1, source - 1)
    return first, second, (position - first).astype(np.float32)


def normalize(image: npt.NDArray[np.float32] | ByteArray, config: ModelConfig) -> FloatArray:
    """(H, W, 3) RGB in 0..255 to (3, H, W) in the config's channel order, minus mean, divided by std."""
    ordered = image if config.channel_order == "rgb" else image[:, :, ::-1]
    result = np.empty((3, *image.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.subtract(ordered[:, :, channel], np.float32(config.mean[channel]), out=result[channel])
        result[channel] *= np.float32(1.0 / config.std[channel])
    return result
