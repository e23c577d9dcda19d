"""One sheet that shows some images of a dataset with their boxes and file names, each in its own shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from refinedet import draw
from refinedet.data.records import DetectionDataset
from refinedet.fonts import Font, load_font, pick_face
from refinedet.text import printable

_BACKGROUND, _INK = (32, 32, 32), (230, 230, 230)
_GAP = 8
"""Pixels between images and around them."""
_CAPTION = 22
"""Height in pixels of the line below an image that holds its file name."""
_LETTERS = 14
"""Size in pixels of the letters of a caption."""
_COLUMN = 480
"""Width in pixels of the sheet for each column: sixteen photos must stay one viewable file."""
_ROW = 360
"""Height in pixels that no row exceeds; a photo of 4:3 then is as wide as a column."""


@dataclass(frozen=True)
class _Tile:
    """Where an image lies on the sheet, in pixels, without its caption."""

    left: int
    top: int
    width: int
    height: int


def draw_mosaic(dataset: DetectionDataset, indices: Sequence[int], columns: int) -> npt.NDArray[np.uint8]:
    """Draw images in rows that are as wide as the sheet, with their boxes on them and their file names below.

    The images of a row are equally high, so none is cropped or gets bands to fill a cell.

    Args:
        dataset: the data.
        indices: which images, at least one, as positions in ``dataset``.
        columns: how many photos of 4:3 fit into a row, at least 1.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        RefineDetError: an image cannot be read.
    """
    shapes = [(dataset[index].width, dataset[index].height) for index in indices]
    tiles, height = _lay_out(shapes, columns * _COLUMN)
    sheet = Image.new("RGB", (columns * _COLUMN, height), _BACKGROUND)
    captions = [printable(dataset[index].image_path.name) for index in indices]
    font = load_font(pick_face("".join(captions)), _LETTERS)
    for index, tile, caption in zip(indices, tiles, captions, strict=True):
        record = dataset[index]
        # Resized before drawing, so that lines and names come out sharp.
        photo = Image.fromarray(dataset.load_image(index))
        photo = photo.resize((tile.width, tile.height), Image.Resampling.BILINEAR)
        scale = np.array([tile.width / record.width, tile.height / record.height] * 2, dtype=np.float32)
        drawn = draw.draw_boxes(np.asarray(photo), record.boxes * scale, record.labels, dataset.class_names)
        sheet.paste(Image.fromarray(drawn), (tile.left, tile.top))
        pen = ImageDraw.Draw(sheet)
        text = _shorten(pen, font, caption, tile.width)
        pen.text((tile.left, tile.top + tile.height + 2), text, fill=_INK, font=font)
    return np.asarray(sheet)


def _lay_out(shapes: Sequence[tuple[int, int]], width: int) -> tuple[list[_Tile], int]:
    """Tiles of images of the given (width, height) on a sheet of that width, and the height of the sheet."""
    rows: list[list[float]] = [[]]  # width / height of the images of each row
    for shape_width, shape_height in shapes:
        if rows[-1] and _row_height(rows[-1], width) <= _ROW:
            rows.append([])
        rows[-1].append(shape_width / shape_height)
    tiles = []
    top = _GAP
    for row in rows:
        height = max(1, min(_ROW, int(_row_height(row, width))))
        left = _GAP
        for aspect in row:
            # A strip that is narrower than a pixel is still drawn.
            tile = _Tile(left, top, max(1, min(round(aspect * height), width - _GAP - left)), height)
            tiles.append(tile)
            left += tile.width + _GAP
        top += height + _CAPTION + _GAP
    return tiles, top


def _row_height(aspects: Sequence[float], width: int) -> float:
    """Height at which images of these shapes fill a row of that width."""
    return (width - _GAP * (len(aspects) + 1)) / sum(aspects)


def _shorten(pen: ImageDraw.ImageDraw, font: Font, name: str, width: int) -> str:
    """The name, or its beginning and its end with an ellipsis between them, no wider than ``width``."""
    kept = len(name)
    text = name
    while kept > 0 and pen.textlength(text, font=font) > width:
        kept -= 1
        text = f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"
    return text if kept > 0 else ""
