"""The law of pixels: what Pillow, an array or a tensor holds, as (H, W, 3) uint8 RGB.

``images.read_image`` brings every kind of source here, so that the same samples give the same pixels whichever way they
come in.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from refinedet.errors import UsageError

Pixels: TypeAlias = npt.NDArray[np.uint8]

_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_STRIP_PIXELS = 4_000_000
"""Larger images are converted in strips, so that intermediate forms need little memory."""


def rgb_pixels(image: Image.Image) -> Pixels:
    """Pixels of a Pillow image, its EXIF orientation left alone.

    Raises:
        OSError, ValueError: Pillow cannot convert its mode.
    """
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    if rows >= height:
        return np.array(_to_rgb(image), dtype=np.uint8)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, width, bottom))))
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        # Mode "I" has 32 bits, but Pillow's readers use it for 16-bit files. Pillow's own conversion would clip at 255.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(_eight_bit_gray(wide)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), straight).convert("RGB")
    return image.convert("RGB")


def _eight_bit_gray(wide: npt.NDArray[Any]) -> Pixels:
    return ((wide.astype(np.int64) + 128) // 257).astype(np.uint8)


def array_pixels(array: npt.NDArray[Any], name: str) -> Pixels:
    """Pixels of an array, by the same law as a file of those samples.

    Args:
        array: (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4) of uint8, uint16 or bool.
        name: what a message calls it.

    Raises:
        UsageError: another shape or type.
    """
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 2, 3, 4) or 0 in array.shape:
        hint = "; pass list(array) for a batch of images" if array.ndim == 4 else ""
        raise UsageError(f"{name} of shape {array.shape} is no image: (H, W), (H, W, 3) or (H, W, 4) is needed{hint}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        # As Pillow reads files: gray is rounded, of colours the high byte is taken.
        array = _eight_bit_gray(array) if channels == 1 else (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        fix = "(255 * array).round().astype(np.uint8)" if array.dtype.kind == "f" else "array.astype(np.uint8)"
        raise UsageError(f"{name} of type {array.dtype} is no image: uint8 or uint16 is needed, such as {fix}")
    if channels == 3:
        return np.require(array, requirements=["C", "W"])
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return rgb_pixels(Image.fromarray(np.ascontiguousarray(array), mode="LA" if channels == 2 else "RGBA"))


def is_tensor(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported for it."""
    torch = sys.modules.get("torch")  # Whoever has a tensor has imported torch.
    return torch is not None and isinstance(value, torch.Tensor)


def tensor_pixels(tensor: Any, name: str) -> Pixels:
    """Pixels of a torch tensor.

    Args:
        tensor: (H, W), (C, H, W) or (H, W, C), C = 1, 3 or 4, of uint8, or of floats in 0..1; on any device.
        name: what a message calls it.

    Raises:
        UsageError: another shape, type or range, or a tensor without plain values.
    """
    if tensor.ndim not in (2, 3):
        hint = "; pass list(tensor) for a batch of images" if tensor.ndim == 4 else ""
        raise UsageError(
            f"{name} of shape {tuple(tensor.shape)} is no image: (C, H, W) or (H, W, C) with 1, 3 or 4 channels is "
            f"needed{hint}"
        )
    try:
        values = tensor.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # meta, sparse, quantized tensors
        raise UsageError(f"{name}: has no plain values ({str(error).splitlines()[0]})") from None
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f":
        if not (array.size and array.min() >= 0 and array.max() <= 1):  # NaN fails both
            raise UsageError(f"{name} of floats is no image unless all its values lie in 0..1; use uint8 for 0..255")
        array = np.rint(array * np.float32(255)).astype(np.uint8)
    return array_pixels(array, name)
