"""One image, given as whatever a user has, as RGB pixels.

A file, its bytes, an open file, an address, a Pillow image, a NumPy array and a torch tensor all pass through
``read_image`` and follow one law, so that the same image gives the same pixels whichever way it comes in. The rest of
the package sees (H, W, 3) uint8 RGB. Nothing here needs torch: a tensor is recognised without importing it.
"""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from refinedet.errors import RefineDetError, UsageError
from refinedet.fetch import fetch, is_address, without_secrets
from refinedet.pixels import Pixels, array_pixels, is_tensor, rgb_pixels, tensor_pixels
from refinedet.text import reason

if TYPE_CHECKING:
    import torch


class ReadableFile(Protocol):
    """An open binary file."""

    def read(self) -> bytes:
        """All bytes from the current position on."""


PixelSource: TypeAlias = "bytes | bytearray | memoryview | ReadableFile | Image.Image | npt.NDArray[Any] | torch.Tensor"
"""An image that is at hand."""
ImageSource: TypeAlias = "str | os.PathLike[str] | PixelSource"
"""One image: a path, an address (http, https, or of an object store), or an image that is at hand."""

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
     ".pnm", ".avif", ".mpo", ".jp2", ".j2k", ".jpx", ".jpf"}
)  # fmt: skip
"""Files of a folder that are taken for images, in lower case. A file that is named by itself may have any ending."""
UNREADABLE_EXTENSIONS = frozenset(
    {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
)
"""Photographs that Pillow cannot read; they are named where a folder is searched, not passed over in silence."""
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Pillow's names of the formats that are opened. EPS is not among them, since Pillow runs Ghostscript on it."""

MAX_PIXELS = 178_956_970
"""Width times height of the largest image that is decoded unless a call says otherwise (Pillow's own limit)."""

_ORIENTATION_TAG = 0x0112
KINDS = "a path, an address, bytes, an open binary file, a Pillow image, a NumPy array or a torch tensor"
"""What an image may be given as, for messages."""
_opening = threading.Lock()


def is_image_name(name: str) -> bool:
    """Whether a file name looks like an image; hidden files (such as macOS's ``._a.jpg``) do not."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_EXTENSIONS


def is_one_image(value: object) -> bool:
    """Whether ``read_image`` takes a value of this type, so that it is not a list of images."""
    single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    return isinstance(value, single) or is_tensor(value) or callable(getattr(value, "read", None))


def read_image(
    source: ImageSource, *, size: tuple[int, int] | None = None, max_pixels: int | None = None, name: str | None = None
) -> Pixels:
    """Pixels of an image.

    Gray, palette, CMYK and bilevel images become RGB; 16 bits per channel are scaled to 8 (65535 becomes 255);
    transparent pixels are composited over white; of an animation the first frame is taken; the EXIF orientation is
    applied. Arrays are (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4) of uint8, uint16 or bool: gray, gray and
    alpha, RGB, RGBA. Tensors are (H, W), (C, H, W) or (H, W, C) of uint8, or of floats in 0..1.

    Args:
        source: a path, an http(s) address, bytes, an open binary file, a Pillow image, an array or a tensor.
        size: (width, height) that annotations were made for. Some annotation tools see an image as its EXIF
            orientation turns it, others as it is stored: the one that has this size is returned, the turned one if
            both have.
        max_pixels: largest width times height that is decoded; ``MAX_PIXELS`` if None.
        name: what messages call the image; by default the path, the address or the kind of source.

    Returns:
        (H, W, 3) uint8 RGB, contiguous and writable; the caller's own array if it is so already.

    Raises:
        UsageError: a source of another type, shape or value.
        RefineDetError: the file is missing, empty, truncated, damaged, no image, too large, or not of ``size``.
    """
    name = name or describe(source)
    if isinstance(source, np.ndarray):
        return array_pixels(source, name)
    if is_tensor(source):
        return tensor_pixels(source, name)
    if isinstance(source, Image.Image):
        return _image_pixels(source, name, size, max_pixels, owned=False)
    with open_image(source, max_pixels=max_pixels, name=name) as image:
        return _image_pixels(image, name, size, max_pixels, owned=True)


def read_image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file as its EXIF orientation turns it, from the header alone.

    Raises:
        RefineDetError: the file is missing, empty or no image.
    """
    name = describe(path)
    with open_image(path, name=name) as image:
        if image.format == "TIFF":
            _load(image, name)  # Pillow turns TIFF images itself, while it decodes them.
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def describe(source: object) -> str:
    """What a message calls an image: its path or address (shortened, without secrets), or what kind of object it is."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = text if isinstance(text, str) else os.fsdecode(text)
        text = without_secrets(text)
        return text if len(text) <= 1000 else f"{text[:200]}..."
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", "")
        return file if file and isinstance(file, str) else "Pillow image"
    if isinstance(source, np.ndarray):
        return "array"
    if is_tensor(source):
        return "tensor"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    file = getattr(source, "name", None)
    return file if isinstance(file, str) else f"{type(source).__name__} object"


@contextmanager
def open_image(source: ImageSource, *, max_pixels: int | None = None, name: str | None = None) -> Iterator[Image.Image]:
    """Pillow's image of a file, an address, bytes or an open file: the header is read, the pixels are not.

    Raises:
        UsageError: the source is of another type.
        RefineDetError: the file is missing, empty, no regular file, no image, or of more than ``max_pixels``.
    """
    name = name or describe(source)
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if isinstance(source, str) and is_address(text):
            source = fetch(text)
        else:
            with _open_path(Path(text), name) as file, _open(file, name, max_pixels) as image:
                yield image
            return
    elif callable(getattr(source, "read", None)):
        source = read_file(cast(ReadableFile, source), name)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise UsageError(f"{name} is no image: an image is {KINDS}")
    if not len(source):
        raise RefineDetError(f"{name}: no bytes in it, so no image")
    with _open(BytesIO(source), name, max_pixels) as image:
        yield image


def read_file(file: ReadableFile, name: str) -> bytes:
    """All bytes of an open file.

    Raises:
        UsageError: it was opened as text.
        RefineDetError: it cannot be read.
    """
    try:
        content = file.read()
    except (OSError, ValueError) as error:  # a closed file raises ValueError
        raise RefineDetError(f"{name}: cannot be read ({reason(error, 300)})") from None
    if not isinstance(content, bytes):
        raise UsageError(f"{name}: opened as text; open it with mode 'rb'")
    return content


def _open_path(path: Path, name: str) -> IO[bytes]:
    """An open regular file.

    Pillow gets the file, not its path: of a path it maps gray TIFF images into memory and then turns them wrongly.
    """
    try:
        kind = path.stat()
    except FileNotFoundError:
        raise RefineDetError(f"{name}: no such image file") from None
    except OSError as error:
        raise RefineDetError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError:  # a NUL or a lone surrogate
        raise RefineDetError(f"{name!r}: no file can have this name") from None
    if stat.S_ISDIR(kind.st_mode):
        raise RefineDetError(f"{name}: cannot be read (it is a folder)")
    if not stat.S_ISREG(kind.st_mode):
        # A pipe without a writer would be waited for forever.
        raise RefineDetError(f"{name}: cannot be read (it is a pipe or a device, not a file)")
    if kind.st_size == 0:
        raise RefineDetError(f"{name}: file is empty; restore it or remove it")
    try:
        return path.open("rb")
    except OSError as error:
        raise RefineDetError(f"{name}: cannot be read ({error.strerror})") from None


def _open(file: IO[bytes], name: str, max_pixels: int | None) -> Image.Image:
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        image = _open_header(file, raise_limit=limit > MAX_PIXELS)
    except UnidentifiedImageError:
        if Path(name).suffix.lower() in UNREADABLE_EXTENSIONS:
            raise RefineDetError(f"{name}: this format cannot be read; convert the image to JPEG or PNG") from None
        raise RefineDetError(f"{name}: not an image, or of a format that is not read") from None
    except Image.DecompressionBombError:
        raise RefineDetError(_too_large(name, limit)) from None
    except MemoryError:
        raise RefineDetError(f"{name}: not enough memory to read it") from None
    except OSError as error:
        if error.strerror:
            raise RefineDetError(f"{name}: cannot be read ({error.strerror})") from None
        raise _unreadable(name, error) from None
    except Exception as error:  # Headers are parsed by plugins that raise nearly every type on damaged data.
        raise _unreadable(name, error) from None
    if image.width * image.height > limit:
        image.close()
        raise RefineDetError(_too_large(name, limit, image.size))
    return image


def _too_large(name: str, limit: int, size: tuple[int, int] | None = None) -> str:
    sides = f" ({size[0]}x{size[1]})" if size else ""
    advice = "scale it down, or predict it with a higher --max-pixels (in Python: max_pixels)"
    return f"{name}: image is too large{sides}: more than {limit:,} pixels; {advice}"


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow may be built without AVIF or JPEG 2000.


def _open_header(file: IO[bytes], *, raise_limit: bool) -> Image.Image:
    """``Image.open`` of the allowed formats, without Pillow's warnings, which say nothing that ours do not.

    Filters of warnings and Pillow's own limit belong to the whole process, so they are changed under a lock and only
    while a header is read.
    """
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS
        if raise_limit:
            Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except MemoryError:
        raise _no_memory(image, name) from None
    except Exception as error:  # Decoders raise nearly every type on damaged data (OSError, SyntaxError, zlib...).
        raise _unreadable(name, error) from None


def _no_memory(image: Image.Image, name: str) -> RefineDetError:
    return RefineDetError(f"{name}: not enough memory for an image of {image.width}x{image.height}; make it smaller")


def _unreadable(name: str, error: Exception) -> RefineDetError:
    text = reason(error, 300)
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return RefineDetError(f"{name}: image is truncated; restore the file or remove it from the data")
    return RefineDetError(f"{name}: image is damaged ({text}); restore the file or remove it from the data")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8."""
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A damaged EXIF block is no reason to refuse an image whose pixels are fine.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _image_pixels(
    image: Image.Image, name: str, size: tuple[int, int] | None, max_pixels: int | None, *, owned: bool
) -> Pixels:
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if image.width * image.height > limit:
        raise RefineDetError(_too_large(name, limit, image.size))
    _load(image, name)
    orientation = _orientation(image)
    stored = image.size
    turned = (stored[1], stored[0]) if orientation >= 5 else stored
    if size is not None and turned != size:
        if stored != size:
            raise RefineDetError(
                f"{name}: image is {turned[0]}x{turned[1]}, but its annotation is made for {size[0]}x{size[1]}; "
                "correct the size in the annotation or restore the original image"
            )
        orientation = 1
    try:
        if orientation != 1:
            image = image if owned else image.copy()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception:
                # Pillow has turned the pixels already when it fails to write an odd EXIF block anew.
                if image.size != turned:
                    raise
        return rgb_pixels(image)
    except MemoryError:
        raise _no_memory(image, name) from None
    except (OSError, ValueError, TypeError) as error:
        raise RefineDetError(
            f"{name}: cannot be converted to RGB from mode {image.mode} ({reason(error, 300)})"
        ) from None
