"""From what a user names (files, folders, patterns, addresses, videos, images at hand) to images, one by one.

``find_images`` turns paths into files, ``list_images`` turns any source into images; ``decoding.py`` reads them.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refinedet.errors import UsageError
from refinedet.fetch import check_scheme, fetch, is_address, is_store, list_store
from refinedet.files import user_path
from refinedet.images import (
    KINDS,
    UNREADABLE_EXTENSIONS,
    ImageSource,
    describe,
    is_image_name,
    is_one_image,
    open_image,
    read_file,
    read_image,
)
from refinedet.pixels import Pixels
from refinedet.video import Video, as_video


@dataclass
class ImageFiles:
    """What ``find_images`` found."""

    files: list[str] = field(default_factory=list)
    """Paths and addresses, in the order given."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Ending, such as ".heic", to the number of photographs in the searched folders that cannot be read."""

    def note(self) -> str | None:
        """One line that names what was passed over, if anything was."""
        if not self.passed_over:
            return None
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(self.passed_over.items()))
        return f"passed over: {counts} (these formats cannot be read; convert the images to JPEG or PNG)"


def find_images(sources: Iterable[str | os.PathLike[str]], *, recursive: bool = False) -> ImageFiles:
    """Files behind a list of files, folders, patterns, addresses and numbers of cameras, in the order given.

    Of a folder the images directly inside are taken, or with ``recursive`` those of its subfolders too (hidden ones and
    links to folders left out), sorted by name; a pattern such as ``photos/**/*.png`` gives its images, sorted; ``**``
    does not follow links to folders. A file named by itself is taken whatever its ending, an http(s) address as it is.
    In an object store (``fetch.STORES``) folders are always searched with their subfolders.

    Raises:
        UsageError: a source that does not exist or holds no images, or no source at all.
    """
    found = ImageFiles()
    for source in sources:
        found.files.extend(_files_of(source, found.passed_over, recursive))
    if not found.files:
        raise UsageError("no images given; name files, folders or patterns")
    return found


def holds_many(source: object) -> bool:
    """Whether a source stands for a list of images: a folder, a pattern, a video, or anything that is not one image."""
    if as_video(source) is not None:
        return True
    if not isinstance(source, (str, os.PathLike)):
        return not is_one_image(source)
    text = os.fspath(source)
    if isinstance(source, str) and is_address(text):
        return _is_listed(text)
    path = user_path(os.fsdecode(os.fspath(source)))
    return _holds(path.is_dir) or (not _holds(path.exists) and glob.has_magic(str(path)))


def _is_listed(address: str) -> bool:
    """Whether an address names a folder or a pattern in an object store; a web server lists nothing."""
    return is_store(address) and (glob.has_magic(address) or not is_image_name(address.rsplit("/", 1)[-1]))


def _files_of(source: str | os.PathLike[str], passed_over: Counter[str], recursive: bool) -> list[str]:
    name = describe(source)
    if isinstance(source, str) and as_video(source) is not None and (is_address(source) or source.isdigit()):
        return [source]
    if isinstance(source, str) and is_address(source):
        check_scheme(source)
        if _is_listed(source):
            which = "no image matches this pattern" if glob.has_magic(source) else "no images there"
            return _images_of(list_store(source), f"{name}: {which}", passed_over)
        return [source]
    path = user_path(os.fsdecode(os.fspath(source)))
    if _holds(path.is_dir):
        try:
            inside = sorted(_files_in(path, recursive))
        except OSError as error:
            raise UsageError(f"{name}: cannot be searched ({error.strerror})") from None
        hint = "" if recursive else "; its subfolders are not searched (the command line's --recursive does)"
        return _images_of(inside, f"{name}: no images in this folder{hint}", passed_over)
    if _holds(path.exists):
        return [str(path)]
    if glob.has_magic(str(path)):
        return _images_of(_matches(path, name), f"{name}: no image matches this pattern", passed_over)
    raise UsageError(f"{name}: no such file or folder")


def _files_in(folder: Path, recursive: bool) -> Iterator[Path]:
    """Files of a folder that are not hidden; links to folders are not followed."""
    for child in folder.iterdir():
        if child.name.startswith("."):
            continue
        if child.is_file():
            yield child
        elif recursive and child.is_dir() and not child.is_symlink():
            yield from _files_in(child, recursive)


def _images_of(files: Sequence[str | Path], none_found: str, passed_over: Counter[str]) -> list[str]:
    """Those of some paths or addresses that look like images; photographs in other formats are counted."""
    names = [Path(file).name for file in files]
    images = [str(file) for file, name in zip(files, names, strict=True) if is_image_name(name)]
    endings = [Path(name).suffix.lower() for name in names if not name.startswith(".")]
    unreadable = Counter(ending for ending in endings if ending in UNREADABLE_EXTENSIONS)
    if not images:
        note = ImageFiles(passed_over=unreadable).note()
        raise UsageError(none_found + (f"; {note}" if note else ""))
    passed_over.update(unreadable)
    return images


def _holds(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a path that is too long
        return False


def _matches(pattern: Path, name: str) -> list[Path]:
    """Files that match a pattern; hidden files and folders only where the pattern names them.

    ``glob.glob`` would follow symbolic links under ``**``, and never end where two of them lead back.
    """
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    if max(len(part) for part in parts) > 255:
        raise UsageError(f"{name}: no image matches this pattern (a part of it is longer than a file name can be)")
    wild: list[str] = []
    for part in parts[first:]:
        part = "**" if part == "**" else re.sub(r"\*\*+", "*", part)
        if not (part == "**" and wild and wild[-1] == "**"):
            wild.append(part)
    hidden = {part for part in wild if part.startswith(".")}
    base = Path(*parts[:first])
    if wild[-1] == "**":
        wild.append("*")
    try:
        files = {
            path
            for path in base.glob("/".join(wild))
            if (hidden or not any(part.startswith(".") for part in path.relative_to(base).parts)) and path.is_file()
        }
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: not a pattern that can be searched ({error})") from None
    return sorted(files)


@dataclass(frozen=True)
class OneImage:
    """One image of a prediction."""

    source: ImageSource
    """Where its pixels come from: a path, an address, the bytes of a file, or (H, W, 3) uint8 RGB pixels."""
    name: str
    """What messages call it."""
    file: str | None
    """Path or address, if it has one."""
    max_pixels: int | None = None

    def count(self) -> int:
        """Width times height, from the header.

        Raises:
            RefineDetError: as ``open_image``.
        """
        if isinstance(self.source, np.ndarray):
            return int(self.source.shape[0] * self.source.shape[1])
        if isinstance(self.source, str) and is_address(self.source):
            # Downloaded once; the class is frozen for its users, not for itself.
            object.__setattr__(self, "source", fetch(self.source))
        with open_image(self.source, max_pixels=self.max_pixels, name=self.name) as image:
            return image.width * image.height

    def read(self) -> Pixels:
        """Its pixels.

        Raises:
            RefineDetError: as ``read_image``.
        """
        return read_image(self.source, max_pixels=self.max_pixels, name=self.name)


def list_images(source: object, *, max_pixels: int | None = None) -> Iterator[OneImage | Video]:
    """The images and videos that a source stands for, one by one.

    What is at hand (an open file, a Pillow image, an array, a tensor) is read when it is reached, before a generator is
    asked for the next one, which may close the file or fill the same array anew. The others are read later.

    Args:
        source: whatever ``read_image`` or ``as_video`` takes, a folder, a pattern, or an iterable of these or of
            ``OneImage``.
        max_pixels: as in ``read_image``.

    Raises:
        UsageError: something in it is no image, or a file that does not exist.
    """
    if isinstance(source, (str, os.PathLike)) or is_one_image(source) or as_video(source) is not None:
        yield from _images_in(source, describe(source), max_pixels, copy=False)
        return
    if not isinstance(source, Iterable) or isinstance(source, (Mapping, Set)):
        raise UsageError(f"{_kind(source)} is no image: an image is {KINDS}; several come as a list or a generator")
    if isinstance(source, Sequence):
        for index, item in enumerate(source):
            _check_item(item, index)
    for index, item in enumerate(source):
        _check_item(item, index)
        name = describe(item)
        if not isinstance(item, (str, os.PathLike)):
            name = f"image {index} of the list ({name})"
        yield from _images_in(item, name, max_pixels, copy=not isinstance(source, Sequence))


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}".split("\n")[0]


def _check_item(item: object, index: int) -> None:
    if not is_one_image(item) and (isinstance(item, int) or as_video(item) is None):
        raise UsageError(f"item {index} of the list, {_kind(item)}, is no image: an image is {KINDS}")


def _images_in(source: Any, name: str, max_pixels: int | None, *, copy: bool) -> Iterator[OneImage | Video]:
    if isinstance(source, (OneImage, Video)):
        yield source
    elif (video := as_video(source)) is not None:
        if not isinstance(source, int):
            _files_of(source, Counter(), recursive=False)  # refuses a path that leads nowhere
        yield video
    elif isinstance(source, (str, os.PathLike)):
        passed_over: Counter[str] = Counter()
        for file in _files_of(source, passed_over, recursive=False):
            yield OneImage(file, describe(file), file, max_pixels)
        if note := ImageFiles(passed_over=passed_over).note():
            logging.getLogger("refinedet").warning("%s: %s", name, note)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield OneImage(source, name, None, max_pixels)
    elif callable(getattr(source, "read", None)) and not isinstance(source, (Image.Image, np.ndarray)):
        yield OneImage(read_file(source, name), name, None, max_pixels)
    else:
        pixels = read_image(source, max_pixels=max_pixels, name=name)
        opened = getattr(source, "filename", None) if isinstance(source, Image.Image) else None
        shared = copy and isinstance(source, np.ndarray) and np.shares_memory(pixels, source)
        opened = opened if isinstance(opened, str) else ""
        yield OneImage(pixels.copy() if shared else pixels, name, opened or None)
