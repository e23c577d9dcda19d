"""Pictures in: one file to RGB pixels, and a list of sources to a list of files.

Whatever a picture is stored as, the rest of the package sees (H, W, 3) uint8 RGB. Nothing here needs torch.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from refinedet.errors import RefineDetError, UsageError
from refinedet.files import write_atomically

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
     ".pnm", ".avif", ".mpo"}
)  # fmt: skip
"""Files of a folder that are taken for pictures, in lower case. A file that is named by itself may have any ending."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF orientation tag (Exif 2.32, section 4.6.4)."""
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


def is_image_name(name: str) -> bool:
    """Whether a file name looks like a picture; hidden files (such as macOS's ``._a.jpg``) do not."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_EXTENSIONS


def read_image(path: str | Path, *, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """Pixels of a picture file.

    Gray, palette, CMYK and bilevel pictures become RGB; 16 bits per channel are scaled to 8 (65535 becomes 255);
    transparent pixels are composited over white; of an animation the first frame is taken.

    Args:
        path: the file.
        size: (width, height) that annotations were made for. Some annotation tools see a picture as its EXIF
            orientation turns it, others as it is stored: the one that has this size is returned, the turned one if
            both have. Without ``size`` the EXIF orientation is applied.

    Returns:
        (H, W, 3) uint8 RGB, contiguous and writable.

    Raises:
        RefineDetError: the file is missing, empty, truncated, damaged, no picture, or not of ``size``.
    """
    path = Path(path)
    with _open(path) as image:
        _load(path, image)
        transposition = _transposition(image)
        stored = image.size
        turned = _turned(stored, transposition)
        if size is not None and turned != size:
            if stored != size:
                raise RefineDetError(
                    f"{path}: image is {turned[0]}x{turned[1]}, but its annotation is made for {size[0]}x{size[1]}; "
                    "correct the size in the annotation or restore the original image"
                )
            transposition = None
        try:
            rgb = _to_rgb(image)
        except (OSError, ValueError) as error:
            raise RefineDetError(
                f"{path}: cannot be converted to RGB from mode {image.mode} ({_one_line(error)})"
            ) from None
        if transposition is not None:
            rgb = rgb.transpose(transposition)
        return np.array(rgb, dtype=np.uint8)


def read_image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as its EXIF orientation turns it, from the header alone.

    Raises:
        RefineDetError: the file is missing, empty or no picture.
    """
    path = Path(path)
    with _open(path) as image:
        if image.format == "TIFF":
            _load(path, image)  # Pillow turns TIFF pictures itself, while it decodes them.
        return _turned(image.size, _transposition(image))


def expand_sources(sources: Iterable[str | Path]) -> list[Path]:
    """Files behind a list of files, folders and globs, in the order given.

    Of a folder the pictures directly inside are taken, sorted by name; a glob such as ``photos/*.jpg`` or
    ``photos/**/*.png`` gives its pictures, sorted. A file named by itself is taken whatever its ending.

    Raises:
        UsageError: a source that does not exist or holds no pictures, or no source at all.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if is_image_name(child.name) and child.is_file())
            if not found:
                raise UsageError(f"{source}: no images in this folder; its subfolders are not searched")
        elif path.exists():
            found = [path]
        elif glob.has_magic(str(path)):
            matches = (Path(match) for match in glob.glob(str(path), recursive=True))
            found = sorted(match for match in matches if is_image_name(match.name) and match.is_file())
            if not found:
                raise UsageError(f"{source}: no image matches this pattern")
        elif "://" in str(source):
            raise UsageError(f"{source}: addresses are not fetched; download the image and give its path")
        else:
            raise UsageError(f"{source}: no such file or folder")
        files.extend(found)
    if not files:
        raise UsageError("no images given; name files, folders or patterns")
    return files


def write_image(path: Path, pixels: npt.NDArray[np.uint8], signature: str) -> None:
    """Write pixels as a JPEG or PNG file that carries a signature, by which ``files.check_output`` recognises it.

    Args:
        path: the file; its ending decides the encoding.
        pixels: (H, W, 3) uint8 RGB.
        signature: such as "boxes drawn by refinedet".

    Raises:
        UsageError: an ending other than .jpg, .jpeg and .png.
        RefineDetError: the file cannot be written; what it held before is still there.
    """
    ending = path.suffix.lower()
    if ending not in (".jpg", ".jpeg", ".png"):
        raise UsageError(f"{path}: images are written as JPEG or PNG; name a .jpg or .png file")

    def write(part: Path) -> None:
        image = Image.fromarray(pixels)
        if ending == ".png":
            text = PngImagePlugin.PngInfo()
            text.add_text("Software", signature)
            image.save(part, format="PNG", pnginfo=text)
        else:
            # Full colour resolution: halved chroma would smear thin lines.
            image.save(part, format="JPEG", quality=92, subsampling=0, comment=signature)

    write_atomically(path, write)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise RefineDetError(f"{path}: no such image file") from None
    except UnidentifiedImageError:
        if path.stat().st_size == 0:
            raise RefineDetError(f"{path}: file is empty; restore it or remove it") from None
        raise RefineDetError(f"{path}: not an image, or of a format that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        raise RefineDetError(f"{path}: image is too large ({_one_line(error)})") from None
    except MemoryError:
        raise
    except OSError as error:
        if error.strerror:
            raise RefineDetError(f"{path}: cannot be read ({error.strerror})") from None
        raise _unreadable(path, error) from None
    except Exception as error:  # Headers are parsed by plugins that raise nearly every type on damaged data.
        raise _unreadable(path, error) from None


def _load(path: Path, image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise nearly every type on damaged data (OSError, SyntaxError, zlib...).
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> RefineDetError:
    text = _one_line(error)
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return RefineDetError(f"{path}: image is truncated; restore the file or remove it from the data")
    return RefineDetError(f"{path}: image is damaged ({text}); restore the file or remove it from the data")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _transposition(image: Image.Image) -> Image.Transpose | None:
    if image.format == "TIFF":
        return None  # Turned by Pillow already.
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # A damaged EXIF block is no reason to refuse a picture whose pixels are fine.
        return None


def _turned(size: tuple[int, int], transposition: Image.Transpose | None) -> tuple[int, int]:
    sideways = (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
    )
    return (size[1], size[0]) if transposition in sideways else size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        # Mode "I" has 32 bits, but Pillow's readers use it for 16-bit files. Pillow's own conversion would clip at 255.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), straight).convert("RGB")
    return image.convert("RGB")
