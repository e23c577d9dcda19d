"""Files, folders and patterns become images, decoded ahead in bounded memory."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from refinedet.decoding import Decoded, decode_ahead
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import read_image
from refinedet.sources import find_images, holds_many, list_images

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path, pixels: Pixels) -> Path:
    for name in ("b.png", "a.JPG", "deep/c.png", "deep/er/d.png", ".hidden/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_text("left by a Mac")
    (tmp_path / "none").mkdir()
    return tmp_path


def names(files: list[str], root: Path) -> list[str]:
    return [Path(file).relative_to(root).as_posix() for file in files]


def test_folder_gives_its_own_images_sorted(photos: Path) -> None:
    assert names(find_images([photos]).files, photos) == ["a.JPG", "b.png"]


def test_patterns(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(find_images([f"{photos}/*"]).files, photos) == ["a.JPG", "b.png"]
    for pattern in ("**/*.png", "**/**/*.png", "**.png/../**/*.png"):
        if ".." not in pattern:
            assert names(find_images([f"{photos}/{pattern}"]).files, photos) == ["b.png", "deep/c.png", "deep/er/d.png"]
    assert names(find_images([f"{photos}/d**/c.png"]).files, photos) == ["deep/c.png"]
    assert names(find_images([f"{photos}/deep/**"]).files, photos) == ["deep/c.png", "deep/er/d.png"]
    assert names(find_images([f"{photos}/.hid*/*.png"]).files, photos) == [".hidden/e.png"]
    assert names(find_images([f"{photos}/[ab].*"]).files, photos) == ["a.JPG", "b.png"]
    monkeypatch.chdir(photos / "deep")
    assert find_images(["*.png", "../*.png", "er/?.png"]).files == ["c.png", "../b.png", "er/d.png"]


def test_order_of_the_sources_is_kept(photos: Path) -> None:
    found = find_images([photos / "deep", str(photos / "b.png"), photos / "notes.txt", "https://example.com/a.jpg"])
    assert found.files[-1] == "https://example.com/a.jpg"
    assert names(found.files[:-1], photos) == ["deep/c.png", "b.png", "notes.txt"]


def test_file_whose_name_looks_like_a_pattern(photos: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(photos / "x[1].png")
    assert names(find_images([photos / "x[1].png"]).files, photos) == ["x[1].png"]
    assert not holds_many(photos / "x[1].png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "no images in this folder"),
        ("*.webp", "no image matches"),
        ("z.png", "no such file or folder"),
        ("*.txt", "no image matches"),
    ],
)
def test_nothing_found(photos: Path, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_images([photos / source])
    assert str(photos / source) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a" * 100_000, "*" * 100_000, "a/" * 50_000, "[" * 5000 + "*", "~nosuch/a.jpg", "a\0b.jpg", "\ud800.jpg"]
)
def test_names_beyond_reason_are_one_line(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_images([name])
    assert len(str(caught.value)) < 1200


def test_no_sources_and_strange_addresses() -> None:
    with pytest.raises(UsageError, match="no images given"):
        find_images([])
    for address in ("ftp://example.com/a.jpg", "file:///etc/passwd", "file:/etc/passwd", "memory://bucket/a.jpg"):
        with pytest.raises(UsageError, match="only http://, https:// and the object stores"):
            find_images([address])


def test_symbolic_links_that_lead_back_are_not_followed(photos: Path) -> None:
    for folder in (photos, photos / "deep"):
        for name in ("loop", "again"):
            (folder / name).symlink_to(photos, target_is_directory=True)
    before = time.monotonic()
    assert names(find_images([f"{photos}/**/*.png"]).files, photos) == ["b.png", "deep/c.png", "deep/er/d.png"]
    assert time.monotonic() - before < 5


def test_pipes_in_a_folder_are_no_images(photos: Path) -> None:
    os.mkfifo(photos / "c.jpg")
    assert names(find_images([photos]).files, photos) == ["a.JPG", "b.png"]
    assert names(find_images([f"{photos}/*"]).files, photos) == ["a.JPG", "b.png"]


def test_photographs_that_cannot_be_read_are_named(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("x.HEIC", "y.heic", "z.cr2", "none/q.heif"):
        (photos / name).write_bytes(b"x")
    found = find_images([photos])
    assert names(found.files, photos) == ["a.JPG", "b.png"]
    assert found.passed_over == Counter({".heic": 2, ".cr2": 1})
    note = found.note()
    assert note is not None
    assert note.startswith("passed over: 1 .cr2, 2 .heic")
    with pytest.raises(UsageError, match=r"no images in this folder.*passed over: 1 \.heif"):
        find_images([photos / "none"])
    with caplog.at_level(logging.WARNING, logger="refinedet"):
        assert len(list(list_images(photos))) == 2
    assert "2 .heic" in caplog.text


def test_jpeg_2000_is_read(tmp_path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.jp2")
    assert names(find_images([tmp_path]).files, tmp_path) == ["a.jp2"]
    np.testing.assert_array_equal(read_image(tmp_path / "a.jp2"), pixels)


# Listing -------------------------------------------------------------------------------------------------------------


def test_one_or_many(photos: Path, pixels: Pixels) -> None:
    assert all(holds_many(many) for many in (photos, f"{photos}/*", [], [pixels], iter([pixels]), ("a",)))
    assert not any(holds_many(one) for one in ("a.jpg", photos / "b.png", "https://e.com/*.jpg", pixels, b"x"))


def test_a_mixed_list(photos: Path, pixels: Pixels) -> None:
    mixed = [str(photos), f"{photos}/deep/*", pixels, b"bytes", Image.open(photos / "b.png"), io.BytesIO(b"x")]
    images = list(list_images(mixed))
    files = [image.file and Path(image.file).name for image in images]
    assert files == ["a.JPG", "b.png", "c.png", None, None, "b.png", None]
    assert images[3].name == "image 2 of the list (array)"


@pytest.mark.parametrize("wrong", [None, 2.5, object(), {"a.jpg": 1}, {"a.jpg"}])
def test_what_is_neither_one_nor_many(wrong: Any) -> None:
    with pytest.raises(UsageError, match="is no image: an image is a path"):
        list(list_images(wrong))
    with pytest.raises(UsageError, match=r"item 1 of the list, .* is no image"):
        next(list_images([b"x", wrong]))  # before anything is done
    generated = list_images(item for item in (b"x", wrong))
    assert next(generated).source == b"x"
    with pytest.raises(UsageError, match="item 1 of the list"):
        next(generated)


def test_a_generator_may_reuse_its_array_and_close_its_files(photos: Path) -> None:
    def frames() -> Iterator[Pixels]:
        buffer = np.zeros((4, 4, 3), np.uint8)
        for value in range(5):
            buffer[:] = value
            yield buffer

    def opened() -> Iterator[Image.Image]:
        for name in ("a.JPG", "b.png"):
            with Image.open(photos / name) as image:
                yield image

    batches = list(decode(list_images(frames()), batch_size=2))
    values = [int(one.pixels[0, 0, 0]) for batch in batches for one in batch if one.pixels is not None]
    assert values == [0, 1, 2, 3, 4]
    (batch,) = decode(list_images(opened()), batch_size=2)
    np.testing.assert_array_equal(batch[1].pixels, read_image(photos / "b.png"))


# Decoding ahead ------------------------------------------------------------------------------------------------------


def decode(images: Any, **settings: Any) -> Iterator[list[Decoded[Any]]]:
    return decode_ahead(images, lambda image: image.count(), lambda image: image.read(), **settings)


class Work:
    """Items are widths of images of one row; notes how many pixels are alive and which threads work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.alive = self.most = 0
        self.threads: set[str] = set()

    def read(self, width: int) -> Pixels:
        if width < 0:
            raise RefineDetError(f"image {width}: broken")
        with self.lock:
            self.alive += width
            self.most = max(self.most, self.alive)
            if width < 500:  # a very large image is decoded alone, in the thread of the caller
                self.threads.add(threading.current_thread().name)
        time.sleep(0.0005 * (width % 5))
        return np.zeros((1, width, 3), np.uint8)

    def give_up(self, batch: list[Decoded[int]]) -> None:
        with self.lock:
            self.alive -= sum(one.item for one in batch if one.pixels is not None)


@pytest.mark.parametrize("seed", range(20))
def test_order_batches_and_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    widths = [int(width) for width in rng.integers(1, 100, 60)]
    widths[7] = 500  # larger than the bound: decoded alone
    for index in (3, 11, 59):
        widths[index] = -1 - index
    work, seen = Work(), []
    batches = decode_ahead(iter(widths), abs, work.read, batch_size=6, threads=3, pixels_ahead=300)
    for batch in batches:
        assert 1 <= len(batch) <= 6
        seen += [one.item for one in batch]
        for one in batch:
            assert (one.pixels is None) == (one.item < 0) == (one.error is not None)
            assert one.pixels is None or one.pixels.shape[1] == one.item
        work.give_up(batch)
    assert seen == widths
    assert work.most <= 500
    assert not any(name == threading.current_thread().name for name in work.threads)
    small = [width for width in widths if width != 500]
    work = Work()
    for batch in decode_ahead(small, abs, work.read, batch_size=6, threads=3, pixels_ahead=300):
        work.give_up(batch)
    assert work.most <= 300


def test_the_next_batch_is_decoded_while_the_caller_works() -> None:
    work = Work()
    batches = decode_ahead(range(10, 30), abs, work.read, batch_size=4)
    assert [one.item for one in next(batches)] == [10, 11, 12, 13]
    deadline = time.monotonic() + 10
    while work.alive < sum(range(10, 18)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert work.alive >= sum(range(10, 18))
    batches.close()


def test_full_batches_where_there_is_room() -> None:
    sizes = [len(batch) for batch in decode_ahead(range(1, 24), abs, Work().read, batch_size=8)]
    assert sizes == [8, 8, 7]


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    batches = decode_ahead(range(1, 1000), abs, Work().read, batch_size=2)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_a_bug_is_not_hidden() -> None:
    def broken(_: int) -> Pixels:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(decode_ahead([1], abs, broken, batch_size=1))


@pytest.mark.parametrize("value", [0, -1, 2.5, None, True])
def test_wrong_batch_sizes(value: Any) -> None:
    with pytest.raises(UsageError, match="batch_size must be a whole number of at least 1"):
        next(decode_ahead([1], abs, Work().read, batch_size=value))


@pytest.mark.slow
def test_memory_stays_flat_over_images_that_unpack_to_half_a_gigabyte(tmp_path: Path) -> None:
    """A file of half a megabyte whose 13,300 x 13,400 black pixels just pass the limit, five times in a row."""
    width, height = 13_300, 13_400
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    ]
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    for number in range(1, 5):
        (tmp_path / f"{number}.png").symlink_to("0.png")
    program = (
        "import re, sys\n"
        "from refinedet.decoding import decode_ahead\n"
        "from refinedet.sources import OneImage, list_images\n"
        "sizes = []\n"
        "for batch in decode_ahead(list_images(sys.argv[1]), OneImage.count, OneImage.read, batch_size=8):\n"
        "    sizes += [image.pixels.shape for image in batch]\n"
        "    batch.clear()\n"
        "    del batch\n"
        "assert sizes == [(13400, 13300, 3)] * 5\n"
        # getrusage's ru_maxrss would count the memory of the process that started this one.
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1500  # 680 MB in Pillow, 510 MB as RGB
