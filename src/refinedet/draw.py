"""Drawing: boxes on an image, and the image files that hold them.

Works on plain arrays, so that detections and targets are drawn by the same code.
"""

from __future__ import annotations

import colorsys
import csv
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, PngImagePlugin

from refinedet.errors import RefineDetError, UsageError
from refinedet.files import write_atomically
from refinedet.fonts import Font, load_font, pick_face

SIGNATURE = "boxes drawn by refinedet"
"""Written into drawn images: only such files are overwritten when a command is repeated."""

_GOLDEN_RATIO = 0.6180339887498949

_Rectangle = tuple[int, int, int, int]
_Color = tuple[int, int, int]

_SMALL_SIDE = 200
_ENLARGED_SIDE = 480
"""An image whose longer side is below the first is enlarged, on request, to about the second."""
_SMALLEST_LETTERS = 8
_LEAST_LETTERS = 4
"""A name that is cut to a narrow box keeps room for so many wide letters."""


def class_color(label: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every image and every run.

    Hues advance by the golden angle, so that neighbouring labels are far apart and no two of the first hundreds
    coincide; every seventh round is darker, which separates hues that come close.

    Args:
        label: Class index, 0..C-1.

    Returns:
        Red, green and blue, 0..255.
    """
    hue = (0.03 + label * _GOLDEN_RATIO) % 1.0
    value = 0.95 if (label // 7) % 2 == 0 else 0.75
    color = colorsys.hsv_to_rgb(hue, 0.8, value)
    # Pure blues and violets vanish on dark photos: mix in white until every hue is about as bright as the others.
    white = max(0.0, (0.42 - _luminance(color)) / (1 - _luminance(color)))
    red, green, blue = (round(255 * (part + white * (1 - part))) for part in color)
    return red, green, blue


def _luminance(color: tuple[float, float, float]) -> float:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def draw_boxes(
    image: npt.NDArray[np.uint8],
    boxes: npt.ArrayLike,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    scores: npt.ArrayLike | None = None,
    *,
    colors: Sequence[_Color] | None = None,
    tracks: npt.ArrayLike | None = None,
    line_width: int | None = None,
    show_labels: bool = True,
    font: str | Path | None = None,
    enlarge: bool = False,
) -> npt.NDArray[np.uint8]:
    """A copy of the image with boxes and their class names on it.

    Lines and letters grow with the image. A name is no wider than its box, or four letters where the box is narrower;
    longer ones lose their score, then their end. Names stay inside the image and off each other; of two that would
    cover each other the one of the lower score is left out. Boxes that are not finite or lie outside the image are
    left out.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (D, 4) xyxy pixels.
        labels: (D,) class indices; one beyond ``class_names`` is written as a number.
        class_names: Name of each label.
        scores: (D,) values to write behind the names; also the order in which boxes lie above each other.
        colors: Red, green and blue of each box; by default those of the tracks, or of the labels.
        tracks: (D,) numbers to write behind the names, such as those of objects in a video; negative ones are not.
        line_width: Thickness of the outlines in pixels; by default it follows the size of the image.
        show_labels: Whether names and scores are written.
        font: Font file for the names; by default one that has their letters (see ``fonts``).
        enlarge: Whether an image of less than 200 pixels is enlarged, with its boxes, so that names can be read.

    Returns:
        (H, W, 3) uint8, RGB; larger if it was enlarged.

    Raises:
        UsageError: arrays of other shapes or lengths, a line width below 1, or a file that is no font.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UsageError(f"the image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    box_array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    label_array = np.asarray(labels, dtype=np.int64).reshape(-1)
    score_array = None if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(box_array) != len(label_array) or (score_array is not None and len(score_array) != len(box_array)):
        raise UsageError(
            f"{len(box_array)} boxes, {len(label_array)} labels"
            + ("" if score_array is None else f", {len(score_array)} scores")
            + ": the numbers must be equal"
        )
    track_list = None if tracks is None else np.asarray(tracks, dtype=np.int64).reshape(-1).tolist()
    if colors is None:
        colors = [class_color(max(0, number)) for number in (track_list or label_array.tolist())]
    elif len(colors) != len(box_array):
        raise UsageError(f"{len(box_array)} boxes but {len(colors)} colours: the numbers must be equal")
    if line_width is not None and line_width < 1:
        raise UsageError(f"line_width must be at least 1 pixel, not {line_width}")
    if 0 in image.shape:
        return image.copy()
    # Copied once: the canvas must not share memory with the caller's array.
    canvas = Image.fromarray(np.ascontiguousarray(image)).copy()
    longest = max(canvas.size)
    if enlarge and longest < _SMALL_SIDE:
        factor = math.ceil(_ENLARGED_SIDE / longest)
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
        box_array = box_array * factor
    names = [class_names[n] if 0 <= n < len(class_names) else f"class {n}" for n in label_array.tolist()]
    if track_list is not None:
        names = [name + (f" {n}" if n >= 0 else "") for name, n in zip(names, track_list, strict=True)]
    writer = _Labels(canvas, names, line_width, font) if show_labels else None
    line = line_width or _line_width(canvas)
    best_first = range(len(box_array)) if score_array is None else np.argsort(-score_array, kind="stable").tolist()
    visible = [(index, _pixels(box_array[index], *canvas.size)) for index in best_first]
    draw = ImageDraw.Draw(canvas)
    for index, pixels in reversed(visible):
        if pixels is not None:
            draw.rectangle(pixels, outline=colors[index], width=line)
    for index, pixels in visible:
        if pixels is not None and writer is not None:
            score = "" if score_array is None else f" {score_array[index]:.0%}"
            writer.write(names[index], score, colors[index], pixels)
    return np.asarray(canvas)


def _line_width(canvas: Image.Image) -> int:
    return max(1, round(math.sqrt(canvas.width * canvas.height) / 220))


def _pixels(box: npt.NDArray[np.float64], width: int, height: int) -> _Rectangle | None:
    """First and last column and row that a box covers within the image; None if there is nothing to draw."""
    if not np.isfinite(box).all():
        return None
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[2], float(width)), min(box[3], float(height))
    if right <= left or bottom <= top:
        return None
    x1, y1 = min(math.floor(left), width - 1), min(math.floor(top), height - 1)
    return x1, y1, max(x1, math.ceil(right) - 1), max(y1, math.ceil(bottom) - 1)


class _Labels:
    """Writes names beside boxes, and remembers where they stand."""

    def __init__(self, canvas: Image.Image, names: Sequence[str], line: int | None, font: str | Path | None) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._width, self._height = canvas.size
        self._line = line or _line_width(canvas)
        self._size = max(10, round(math.sqrt(canvas.width * canvas.height) / 36))
        # One face for all, so that the names of an image look alike.
        self._face = pick_face("".join(sorted(set("".join(names)))), font)
        self._taken: list[_Rectangle] = []

    def write(self, name: str, score: str, color: _Color, box: _Rectangle) -> None:
        """Write a name, and a score where there is room, at the box; nothing if other names leave no place."""
        room = box[2] - box[0] + 1
        for size in dict.fromkeys((self._size, max(_SMALLEST_LETTERS, round(self._size * 0.75)))):
            font = load_font(self._face, size)
            pad = max(1, size // 6)
            widest = min(max(room, _LEAST_LETTERS * size), self._width) - 2 * pad
            text = self._cut(_one_line(name), score, font, widest)
            left, top, right, bottom = self._draw.textbbox((0, 0), text, font=font)
            # The height of the font, not of these letters: labels of one image are then equally high.
            _, line_top, _, line_bottom = self._draw.textbbox((0, 0), "Ag", font=font)
            over = min(top, line_top)
            sides = math.ceil(right - left) + 2 * pad, math.ceil(max(bottom, line_bottom) - over) + 2 * pad
            place = self._place(box, *sides)
            if place is None:
                continue
            self._taken.append(place)
            self._draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
            ink = (0, 0, 0) if _luminance(color) > 120 else (255, 255, 255)
            self._draw.text((place[0] + pad - left, place[1] + pad - over), text, fill=ink, font=font)
            return

    def _cut(self, name: str, score: str, font: Font, widest: float) -> str:
        """Name and score, the name alone, or the beginning of the name and an ellipsis, whichever fits first."""
        for text in (name + score, name):
            if self._draw.textlength(text, font=font) <= widest:
                return text
        kept = name
        while len(kept) > 1 and self._draw.textlength(f"{kept}\N{HORIZONTAL ELLIPSIS}", font=font) > widest:
            kept = kept[:-1].rstrip()
        return f"{kept}\N{HORIZONTAL ELLIPSIS}"

    def _place(self, box: _Rectangle, width: int, height: int) -> _Rectangle | None:
        """The first place for a label of that size that is free: above the box, in its corners, below it."""
        x1, y1, x2, y2 = box
        places = [
            (x1, y1 - height + self._line),
            (x1, y1),
            (x2 - width + 1, y1 - height + self._line),
            (x2 - width + 1, y1),
            (x1, y2 - self._line + 1),
            (x1, y2 - height + 1),
            (x2 - width + 1, y2 - height + 1),
        ]
        for x, y in places:
            # A place above the image is not moved down onto the box, where "inside" is the next place anyway.
            if y < 0 or y + height > self._height:
                continue
            place = _inside(x, y, width, height, self._width)
            if not any(_overlap(place, other) for other in self._taken):
                return place
        if self._taken or height > self._height:
            return None if self._taken else _inside(x1, 0, width, height, self._width)
        return _inside(x1, max(0, min(y1, self._height - height)), width, height, self._width)


def _one_line(name: str) -> str:
    """A name without line breaks and other characters that cannot be drawn."""
    return "".join(letter if letter.isprintable() else " " for letter in name[:200])


def _inside(x: int, y: int, label_width: int, label_height: int, width: int) -> _Rectangle:
    x = max(0, min(x, width - label_width))
    return x, y, min(width, x + label_width), y + label_height


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def check_image_ending(path: Path) -> Path:
    """``path``, if its ending is one of the encodings in which images are written.

    Raises:
        UsageError: an ending other than .jpg, .jpeg and .png.
    """
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UsageError(f"{path}: images are written as JPEG or PNG; name a .jpg or .png file")
    return path


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
    ending = check_image_ending(path).suffix.lower()

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


def png_bytes(pixels: npt.NDArray[np.uint8], longest: int) -> bytes:
    """(H, W, 3) uint8 RGB as a PNG file, made smaller if its longer side has more than ``longest`` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest))
    content = BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def read_curves(metrics: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The columns of a run's ``metrics.csv``: name to (iterations, values), without the cells that are empty.

    Raises:
        RefineDetError: the file cannot be read or is no table of metrics.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with metrics.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if len(names) < 2:
                raise RefineDetError(f"{metrics}: not a table of metrics (no header with two columns or more)")
            for row in reader:
                for name in names[1:]:
                    if row[name]:
                        steps, values = curves.setdefault(name, ([], []))
                        values.append(float(row[name]))
                        steps.append(int(row[names[0]]))
    except OSError as error:
        raise RefineDetError(f"{metrics}: cannot be read ({error.strerror})") from None
    except RefineDetError:
        raise
    except (TypeError, ValueError, csv.Error) as error:
        raise RefineDetError(f"{metrics}: not a table of metrics ({error})") from None
    return curves
