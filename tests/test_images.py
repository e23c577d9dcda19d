"""Images of every kind end up as RGB; broken ones end in one line that names the file."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps

from refinedet.errors import RefineDetError, UsageError
from refinedet.images import ImageSource, is_image_name, is_one_image, read_image, read_image_size

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def pixels() -> Pixels:
    """(20, 30, 3) without any symmetry."""
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def assert_one_line(error: BaseException, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)


def write_png_rgb(path: Path, size: tuple[int, int], bits: int, raw: bytes) -> None:
    """A PNG by hand: Pillow reads 16 bits per channel but cannot write them, and writes no lies about the size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def test_rgb_comes_back_unchanged_and_writable(tmp_path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(image, pixels)
    assert read_image_size(tmp_path / "a.png") == (30, 20)


def test_grayscale(tmp_path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(pixels[..., :1], 3, axis=2))


def test_bilevel(tmp_path: Path, pixels: Pixels) -> None:
    mask = pixels[..., 0] > 100
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 1], np.where(mask, 255, 0))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    cmyk = np.zeros((16, 32, 4), dtype=np.uint8)
    cmyk[:, 16:, 0] = 255  # cyan ink on the right, white paper on the left
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg").astype(int)
    assert np.abs(image[:, :12] - 255).max() < 10
    assert np.abs(image[:, 20:] - (0, 255, 255)).max() < 10


def test_palette(tmp_path: Path, pixels: Pixels) -> None:
    coarse = pixels // 128 * 127
    Image.fromarray(coarse).quantize(8).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), coarse)


def test_palette_with_a_transparent_entry_is_composited_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    expected = np.full((2, 4, 3), 255)
    expected[1, 3] = (200, 100, 50)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_gray_is_scaled(tmp_path: Path, name: str) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values * 257).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name)[..., 2], values)


def test_sixteen_bit_colour_is_scaled(tmp_path: Path, pixels: Pixels) -> None:
    wide = pixels.astype(">u2") * 257
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    write_png_rgb(tmp_path / "a.png", (30, 20), 16, raw)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


def test_alpha_is_composited_over_white(tmp_path: Path, pixels: Pixels) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "a.png")
    share = alpha / 255.0
    expected = pixels * share + 255 * (1 - share)
    assert np.abs(read_image(tmp_path / "a.png") - expected).max() <= 1


def test_gray_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[100, 255], [100, 0]]], dtype=np.uint8), mode="LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[100] * 3, [255] * 3]])


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif"), np.full((6, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, pixels: Pixels, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image, expected)
    assert image.shape == ((30, 20, 3) if orientation >= 5 else (20, 30, 3))
    assert read_image_size(tmp_path / name) == (image.shape[1], image.shape[0])
    np.testing.assert_array_equal(read_image(tmp_path / name, size=read_image_size(tmp_path / name)), image)


def test_exif_rotation_by_hand(tmp_path: Path) -> None:
    """Orientation 6: the camera was turned; the stored top left is the top right of the scene."""
    stored = np.zeros((2, 4, 3), dtype=np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (4, 2, 3)
    assert np.argwhere(image[..., 0]).tolist() == [[0, 1]]


def test_size_chooses_the_stored_orientation(tmp_path: Path, pixels: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size=(30, 20)), pixels)
    assert read_image(tmp_path / "a.png", size=(20, 30)).shape == (30, 20, 3)


def test_wrong_size_is_an_error(tmp_path: Path, pixels: Pixels) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    with pytest.raises(RefineDetError, match="is 30x20, but its annotation is made for 31x20") as caught:
        read_image(path, size=(31, 20))
    assert_one_line(caught.value, path)


def test_damaged_exif_is_ignored(tmp_path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_truncated(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(RefineDetError, match=r"image is truncated|damaged|not an image") as caught:
        read_image(path)
    assert_one_line(caught.value, path)
    if name == "a.jpg":
        assert "image is truncated" in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_escapes(tmp_path: Path, pixels: Pixels) -> None:
    """Flipped bytes give pixels or a RefineDetError, whatever the format's decoder thinks of them."""
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "a.gif", "a.tif", "a.webp", "a.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
        whole = np.frombuffer((tmp_path / name).read_bytes(), dtype=np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[rng.integers(0, min(len(broken), 400), 4)] = rng.integers(0, 256, 4)
            (tmp_path / name).write_bytes(broken.tobytes())
            try:
                assert read_image(tmp_path / name).ndim == 3
            except RefineDetError as error:
                assert_one_line(error, tmp_path / name)


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("this is a letter\n")
    with pytest.raises(RefineDetError, match="not an image") as caught:
        read_image(path)
    assert_one_line(caught.value, path)


def test_pickle_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    with pytest.raises(RefineDetError, match="not an image"):
        read_image(path)
    assert not (tmp_path / "pwned").exists()


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.touch()
    with pytest.raises(RefineDetError, match="file is empty") as caught:
        read_image(path)
    assert_one_line(caught.value, path)


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(RefineDetError, match="no such image file") as caught:
        read_image(path)
    assert_one_line(caught.value, path)


def test_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(RefineDetError, match="cannot be read") as caught:
        read_image(tmp_path)
    assert_one_line(caught.value, tmp_path)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    with pytest.raises(RefineDetError, match="floating-point") as caught:
        read_image(path)
    assert_one_line(caught.value, path)


def test_decompression_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png_rgb(path, (60000, 60000), 8, b"")
    with pytest.raises(RefineDetError, match="too large") as caught:
        read_image(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("a.jpg", True), ("a.JPEG", True), ("a.PNG", True), ("a.txt", False), ("._a.jpg", False), ("jpg", False)],
)
def test_is_image_name(name: str, answer: bool) -> None:
    assert is_image_name(name) is answer


# One law for every way in --------------------------------------------------------------------------------------------


def stored_images(pixels: Pixels) -> dict[str, Image.Image]:
    """An image of every kind that is treated in its own way."""
    gray = pixels[..., 0]
    alpha = np.concatenate([pixels, gray[..., None]], axis=2)
    palette = Image.fromarray(pixels // 64 * 64).quantize(16)
    return {
        "rgb.png": Image.fromarray(pixels),
        "gray.png": Image.fromarray(gray),
        "deep.png": Image.fromarray(gray.astype(np.uint16) * 199),
        "deep.tif": Image.fromarray(gray.astype(np.uint16) * 199),
        "alpha.png": Image.fromarray(alpha),
        "gray-alpha.png": Image.fromarray(alpha[..., 2:], mode="LA"),
        "bilevel.png": Image.fromarray(gray > 100),
        "palette.gif": palette,
        "ink.jpg": Image.fromarray(alpha, mode="CMYK"),
        "photo.jpg": Image.fromarray(pixels),
        "photo.webp": Image.fromarray(pixels),
        "photo.jp2": Image.fromarray(pixels),
    }


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_file_its_bytes_and_pillow_give_the_same_pixels(tmp_path: Path, pixels: Pixels, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, image in stored_images(pixels).items():
        path = tmp_path / name
        options = {} if name.endswith((".gif", ".jp2")) else {"exif": exif}
        image.save(path, **options)
        expected = read_image(path)
        assert expected.shape == ((30, 20, 3) if options and orientation >= 5 else (20, 30, 3)), name
        content = path.read_bytes()
        ways: list[ImageSource] = [str(path), content, bytearray(content), memoryview(content), io.BytesIO(content)]
        with path.open("rb") as file, Image.open(path) as opened, Image.open(path) as loaded:
            loaded.load()
            ways.append(file)
            if name != "deep.tif" or orientation < 5:  # Pillow itself mixes up the pixels of these, given a path.
                ways += [opened, loaded, opened]
            for way in ways:
                np.testing.assert_array_equal(read_image(way), expected, err_msg=f"{name} {type(way)}")
            assert loaded.size in ((30, 20), expected.shape[1::-1])


def test_the_same_samples_as_a_file_and_as_an_array(tmp_path: Path, pixels: Pixels) -> None:
    rng = np.random.default_rng(2)
    deep = rng.integers(0, 65536, (20, 30), dtype=np.uint16)
    alpha = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    for array in (pixels, pixels[..., 0], alpha, alpha[..., :2], deep, pixels[..., 0] > 99):
        mode = "LA" if array.ndim == 3 and array.shape[2] == 2 else None
        Image.fromarray(np.ascontiguousarray(array), mode=mode).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(array), read_image(tmp_path / "a.png"))
    colours = rng.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    write_png_rgb(tmp_path / "a.png", (30, 20), 16, b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours))
    np.testing.assert_array_equal(read_image(colours), read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image(pixels[..., :1]), read_image(pixels[..., 0]))
    np.testing.assert_array_equal(read_image(pixels[::-1, ::2]), pixels[::-1, ::2])


def test_tensors(pixels: Pixels) -> None:
    tensor = torch.from_numpy(pixels)
    chw = tensor.permute(2, 0, 1)
    for way in (tensor, chw, chw / 255, (tensor / 255).requires_grad_(), (chw / 255).double(), chw.contiguous()):
        np.testing.assert_array_equal(read_image(way), pixels)
    np.testing.assert_array_equal(read_image(chw[:1]), read_image(pixels[..., 0]))
    np.testing.assert_array_equal(read_image(chw[0]), read_image(pixels[..., 0]))
    # Three rows and three channels: torch's own order goes first.
    square = torch.arange(27, dtype=torch.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(read_image(square), square.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "None"),
        (7, "int object is no image: an image is a path"),
        (np.zeros(3, np.uint8), r"shape \(3,\) is no image"),
        (np.uint8(3), "is no image"),
        (np.array(3, np.uint8), r"shape \(\) is no image"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"pass list\(array\)"),
        (np.zeros((4, 4, 5), np.uint8), "is no image"),
        (np.zeros((0, 4, 3), np.uint8), "is no image"),
        (np.zeros((4, 4, 3), np.float32), "of type float32 is no image.*255"),
        (np.zeros((4, 4, 3), np.int64), "of type int64 is no image"),
        (np.zeros((4, 4), object), "of type object is no image"),
        (torch.zeros(3), "is no image"),
        (torch.tensor(3.0), "is no image"),
        (torch.zeros(2, 3, 4, 4), r"pass list\(tensor\)"),
        (torch.full((3, 4, 4), 1.5), r"lie in 0\.\.1"),
        (torch.full((3, 4, 4), float("nan")), r"lie in 0\.\.1"),
        (torch.zeros(3, 4, 4, device="meta"), "no plain values"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "is no image"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "of type int64"),
        (io.StringIO("text"), "opened as text"),
        ("ftp://example.com/a.jpg", "only http"),
        ("file:///etc/hostname", "only http"),
        ("file:/etc/hostname", "only http"),
    ],
)
def test_what_is_no_image(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_image(source)
    assert "\n" not in str(caught.value)


def test_bytes_and_files_that_are_no_image(tmp_path: Path) -> None:
    closed = (tmp_path / "a").open("wb")
    closed.close()
    for source in (b"", b"abc", io.BytesIO(b"abc"), memoryview(b"GIF89a"), closed):
        with pytest.raises(RefineDetError) as caught:
            read_image(source)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    Image.open(path).close()  # Pillow alone would take it
    for source in (path, path.read_bytes()):
        with pytest.raises(RefineDetError, match="not an image"):
            read_image(source)


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", Path("/dev/zero")):
        with pytest.raises(RefineDetError, match="a pipe or a device") as caught:
            read_image(path)
        assert_one_line(caught.value, path)


@pytest.mark.parametrize("name", ["a" * 100_000, "a/" * 50_000, "x" * 256 + ".jpg", "a\0b.jpg", "\ud800.jpg"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(RefineDetError) as caught:
        read_image(name)
    assert len(str(caught.value)) < 1200


def test_heic_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(RefineDetError, match=r"a\.HEIC: this format cannot be read; convert the image"):
        read_image(tmp_path / "a.HEIC")


def test_the_limit_of_pixels_can_be_moved(tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for source in (path, Image.fromarray(pixels), path.read_bytes()):
        with pytest.raises(RefineDetError, match=r"too large \(30x20\): more than 599 pixels; scale it down, or"):
            read_image(source, max_pixels=599)
        assert read_image(source, max_pixels=600).shape == (20, 30, 3)
    # Pillow's own limit, made small, stands for an image above it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RefineDetError, match="too large"):
        read_image(path)
    assert read_image(path, max_pixels=10**9).shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_images_are_converted_in_strips(
    tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, image in stored_images(pixels).items():
        image.save(tmp_path / name, **({} if name.endswith((".gif", ".jp2")) else {"exif": exif}))
        whole = read_image(tmp_path / name)
        monkeypatch.setattr("refinedet.pixels._STRIP_PIXELS", 77)
        np.testing.assert_array_equal(read_image(tmp_path / name), whole, err_msg=name)
        monkeypatch.undo()


def test_no_memory_is_one_line(tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)

    def no_memory(*_: object) -> None:
        raise MemoryError

    for place in ("PIL.ImageFile.ImageFile.load", "refinedet.images.rgb_pixels"):
        monkeypatch.setattr(place, no_memory)
        with pytest.raises(RefineDetError, match="not enough memory for an image of 30x20"):
            read_image(path)
        monkeypatch.undo()


@pytest.mark.filterwarnings("error")
def test_pillow_does_not_warn_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: Pixels) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # 600 pixels: a warning, not yet an error
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff")
    assert read_image(tmp_path / "a.png").shape == (20, 30, 3)
    palette = Image.fromarray(pixels).quantize(8)
    palette.save(tmp_path / "b.png", transparency=bytes([0, 128, 255]))
    assert read_image(tmp_path / "b.png").shape == (20, 30, 3)
    monkeypatch.undo()
    with Image.open(tmp_path / "b.png") as opened:
        np.testing.assert_array_equal(read_image(opened), read_image(tmp_path / "b.png"))


def test_what_counts_as_one_image(pixels: Pixels) -> None:
    for one in ("a", Path("a"), b"", pixels, torch.zeros(2), Image.fromarray(pixels), io.BytesIO()):
        assert is_one_image(one)
    for other in (None, 3, [pixels], (pixels,), iter([pixels]), {"a": 1}):
        assert not is_one_image(other)


def test_a_tensor_is_recognised_without_importing_torch() -> None:
    program = (
        "import sys, numpy as np\nimport refinedet.prediction\nfrom refinedet.images import read_image\n"
        "read_image(np.zeros((4, 4, 3), np.uint8))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
