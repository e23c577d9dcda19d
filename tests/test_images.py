"""Pictures of every kind end up as RGB; broken ones end in one line that names the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from refinedet.errors import RefineDetError, UsageError
from refinedet.images import expand_sources, is_image_name, read_image, read_image_size

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


@pytest.fixture
def photos(tmp_path: Path, pixels: Pixels) -> Path:
    for name in ("b.png", "a.JPG", "deep/c.png", "deep/er/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_text("left by a Mac")
    (tmp_path / "none").mkdir()
    return tmp_path


def names(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def test_folder_gives_its_own_pictures_sorted(photos: Path) -> None:
    assert names(expand_sources([photos]), photos) == ["a.JPG", "b.png"]


def test_globs(photos: Path) -> None:
    assert names(expand_sources([f"{photos}/*"]), photos) == ["a.JPG", "b.png"]
    assert names(expand_sources([f"{photos}/**/*.png"]), photos) == ["b.png", "deep/c.png", "deep/er/d.png"]


def test_order_of_the_sources_is_kept(photos: Path) -> None:
    found = expand_sources([photos / "deep", str(photos / "b.png"), photos / "notes.txt"])
    assert names(found, photos) == ["deep/c.png", "b.png", "notes.txt"]


def test_file_whose_name_looks_like_a_glob(photos: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(photos / "x[1].png")
    assert names(expand_sources([photos / "x[1].png"]), photos) == ["x[1].png"]


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
        expand_sources([photos / source])
    assert_one_line(caught.value, photos / source)


def test_no_sources_and_addresses() -> None:
    with pytest.raises(UsageError, match="no images given"):
        expand_sources([])
    with pytest.raises(UsageError, match="not fetched"):
        expand_sources(["https://example.com/a.jpg"])
