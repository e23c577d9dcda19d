"""Pictures of results: boxes on an image, mosaics of images, curves of a training.

Works on plain arrays, so that detections and targets are drawn by the same code.
"""

from __future__ import annotations

import colorsys
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from refinedet.errors import RefineDetError, UsageError

_GOLDEN_RATIO = 0.6180339887498949
_MOSAIC_BACKGROUND = (32, 32, 32)

_Rectangle = tuple[int, int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def class_color(label: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture and every run.

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
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> npt.NDArray[np.uint8]:
    """A copy of the image with boxes and their class names on it.

    Lines and letters grow with the image. Names stay inside the image and, where there is room, off each other.
    Boxes that are not finite or lie outside the image are left out.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (D, 4) xyxy pixels.
        labels: (D,) class indices; one outside ``class_names`` is written as its number.
        class_names: Name of each label.
        scores: (D,) scores in 0..1, written as a percentage behind the name; boxes of high score are drawn on top.
        colors: D colours, each red, green and blue, 0..255; default: those of the classes.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UsageError: the image is not (H, W, 3) uint8, or the lengths of boxes, labels, scores and colours differ.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UsageError(f"an image to draw on must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    box_array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    label_array = np.asarray(labels, dtype=np.int64).reshape(-1)
    score_array = None if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(box_array) != len(label_array) or (score_array is not None and len(score_array) != len(box_array)):
        raise UsageError(
            f"{len(box_array)} boxes, {len(label_array)} labels"
            + ("" if score_array is None else f", {len(score_array)} scores")
            + ": the numbers must be equal"
        )
    if colors is None:
        colors = [class_color(int(label)) for label in label_array]
    elif len(colors) != len(box_array):
        raise UsageError(f"{len(box_array)} boxes but {len(colors)} colours: the numbers must be equal")
    height, width = image.shape[:2]
    if height == 0 or width == 0:
        return image.copy()
    # Copied once: the canvas must not share memory with the caller's array.
    canvas = Image.fromarray(np.ascontiguousarray(image)).copy()
    draw = ImageDraw.Draw(canvas)
    line = max(1, round(math.sqrt(width * height) / 220))
    font_size = max(9, round(math.sqrt(width * height) / 32))

    best_first = range(len(box_array)) if score_array is None else np.argsort(-score_array, kind="stable").tolist()
    visible = []
    for index in best_first:
        pixels = _pixels(box_array[index], width, height)
        if pixels is not None:
            visible.append((index, pixels))
    for index, pixels in reversed(visible):
        draw.rectangle(pixels, outline=colors[index], width=line)
    taken: list[_Rectangle] = []
    for index, pixels in visible:
        label = int(label_array[index])
        text = class_names[label] if 0 <= label < len(class_names) else f"class {label}"
        if score_array is not None:
            text += f" {score_array[index]:.0%}"
        _draw_label(draw, text, colors[index], pixels, (width, height), font_size, line, taken)
    return np.asarray(canvas)


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


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    color: tuple[int, int, int],
    box: _Rectangle,
    size: tuple[int, int],
    font_size: int,
    line: int,
    taken: list[_Rectangle],
) -> None:
    width, height = size
    pad = max(1, font_size // 6)
    text, font = _fit(draw, text, font_size, width - 2 * pad)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    text_width = math.ceil(right - left)
    # The height of the font, not of these letters: labels of one picture are then equally high.
    _, line_top, _, line_bottom = draw.textbbox((0, 0), "Ag", font=font)
    label_width, label_height = text_width + 2 * pad, math.ceil(max(bottom, line_bottom) - min(top, line_top)) + 2 * pad
    x1, y1, x2, y2 = box
    places = [
        (x1, y1 - label_height + line),
        (x1, y1),
        (x2 - label_width + 1, y1),
        (x1, y2 - line + 1),
        (x1, y2 - label_height + 1),
        (x2 - label_width + 1, y2 - label_height + 1),
    ]
    # A place above the image is not moved down onto the box, where "inside" is the next place anyway.
    chosen: _Rectangle | None = None
    for x, y in places:
        if y < 0 or y + label_height > height:
            continue
        place = _inside(x, y, label_width, label_height, width, height)
        if not any(_overlap(place, other) for other in taken):
            chosen = place
            break
    if chosen is None:
        y = y1 - label_height + line
        chosen = _inside(x1, y if y >= 0 else y1, label_width, label_height, width, height)
    taken.append(chosen)
    draw.rectangle((chosen[0], chosen[1], chosen[2] - 1, chosen[3] - 1), fill=color)
    ink = (0, 0, 0) if _luminance(color) > 120 else (255, 255, 255)
    draw.text((chosen[0] + pad - left, chosen[1] + pad - min(top, line_top)), text, fill=ink, font=font)


def _fit(draw: ImageDraw.ImageDraw, text: str, font_size: int, width: int) -> tuple[str, _Font]:
    """The text and a font in which it is no wider than the image: smaller letters first, then fewer."""
    size = font_size
    while True:
        font = ImageFont.load_default(size=size)
        if draw.textlength(text, font=font) <= width or size <= 7:
            break
        size -= 1
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = text[:-2] + "."
    return text, font


def _inside(x: int, y: int, label_width: int, label_height: int, width: int, height: int) -> _Rectangle:
    x = max(0, min(x, width - label_width))
    y = max(0, min(y, height - label_height))
    return x, y, min(width, x + label_width), min(height, y + label_height)


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def mosaic(
    images: Sequence[npt.NDArray[np.uint8]], columns: int | None = None, *, cell: int = 240
) -> npt.NDArray[np.uint8]:
    """All images on one sheet, row by row.

    Args:
        images: (H, W, 3) uint8 RGB arrays of any sizes; each is shrunk or enlarged into its cell, sides in proportion.
        columns: Cells in a row; by default as many as make the sheet about square.
        cell: Side of a cell in pixels.

    Returns:
        (rows * cell + gaps, columns * cell + gaps, 3) uint8.

    Raises:
        UsageError: no images, or fewer than one column.
    """
    if not images:
        raise UsageError("a mosaic needs at least one image")
    across = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if across < 1 or cell < 1:
        raise UsageError(f"a mosaic needs at least one column and one pixel, not {across} and {cell}")
    across = min(across, len(images))
    rows = math.ceil(len(images) / across)
    gap = max(2, cell // 60)
    sheet = Image.new("RGB", (across * (cell + gap) + gap, rows * (cell + gap) + gap), _MOSAIC_BACKGROUND)
    for index, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(image))
        scale = cell / max(picture.width, picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
        row, column = divmod(index, across)
        corner = (
            gap + column * (cell + gap) + (cell - picture.width) // 2,
            gap + row * (cell + gap) + (cell - picture.height) // 2,
        )
        sheet.paste(picture, corner)
    return np.asarray(sheet)


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draw the curves of a run's ``metrics.csv``: losses, accuracy and learning rate over the iterations.

    Args:
        metrics: The CSV file that ``loggers.CsvLogger`` writes; its first column is the iteration.
        picture: The image file to write (.png, .svg or .pdf).

    Raises:
        RefineDetError: the file cannot be read or holds nothing to draw, or the picture cannot be written.
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("curves need matplotlib: pip install 'refinedet[report]'") from None
    curves = read_curves(metrics)
    panels = [
        ("loss", [name for name in curves if "loss" in name or name == "total" or name.startswith(("arm_", "odm_"))]),
        ("mAP", [name for name in curves if "AP" in name]),
        ("learning rate", [name for name in curves if "learning_rate" in name]),
    ]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        raise RefineDetError(f"{metrics}: holds no losses, no mAP and no learning rate to draw")
    # The object interface: pyplot would keep global state and might look for a display.
    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    axes: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for (title, names), axis in zip(panels, axes[:, 0], strict=True):
        for name in names:
            steps, values = curves[name]
            axis.plot(steps, values, label=name, linewidth=1, marker="o" if len(steps) < 30 else None, markersize=3)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[-1, 0].set_xlabel("iteration")
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise RefineDetError(f"{picture}: cannot be written ({error})") from None


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
