"""Results to files and text: drawn copies, JSON, COCO results, and the paragraph of one image."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from refinedet.detections import Detections
from refinedet.draw import SIGNATURE, write_image
from refinedet.fetch import is_address, without_secrets
from refinedet.files import has_signature, json_text
from refinedet.pixels import Pixels
from refinedet.text import clock, printable

JSON_SIGNATURE = "detections written by refinedet"
_LARGEST_JPEG_SIDE = 16_000
_LONGEST_STEM = 200


class DrawnCopies:
    """Drawn copies in a folder: each image has its own file, and no file of the user is overwritten.

    Args:
        folder: where the copies go.
        originals: paths of the images, which are never written to.
    """

    def __init__(self, folder: Path, originals: Iterable[str | Path]) -> None:
        self.folder = folder
        self.written = 0
        """How many copies there are so far."""
        self._originals = {Path(original).resolve() for original in originals if not is_address(str(original))}
        self._names: set[str] = set()

    def write(self, original: str | Path | None, drawn: Pixels) -> Path:
        """Save the drawn copy of an image: a photograph as JPEG, every other as PNG.

        Raises:
            RefineDetError: it cannot be written.
        """
        target = self._target(str(original or "image"), large=max(drawn.shape) > _LARGEST_JPEG_SIDE)
        write_image(target, drawn, SIGNATURE)
        self.written += 1
        return target

    def _target(self, original: str, *, large: bool) -> Path:
        name = unquote(urlsplit(original).path) if is_address(original) else original
        path = Path(name.replace("\0", ""))
        stem = os.fsdecode(path.stem.encode(sys.getfilesystemencoding(), "surrogateescape")[:_LONGEST_STEM])
        # Photographs stay JPEG; all others become PNG, which loses nothing and has no limit on its sides.
        ending = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif") and not large else ".png"
        number = 1
        while True:
            name = f"{stem or 'image'}{'' if number == 1 else f'-{number}'}{ending}"
            target = self.folder / name
            # Compared in lower case: on many disks A.jpg and a.jpg are one file.
            if name.lower() not in self._names and target.resolve() not in self._originals and _is_free(target):
                self._names.add(name.lower())
                return target
            number += 1


def _is_free(path: Path) -> bool:
    """Whether there is nothing of that name, or a copy drawn earlier."""
    return not os.path.lexists(path) or (path.is_file() and has_signature(path, SIGNATURE))


def paragraph(detections: Detections, name: str | None = None) -> str:
    """Name, size and number of objects of an image, and below it, indented, its table; of a frame one line."""
    shown = printable(without_secrets(name or detections.source or ("image" if detections.time is None else "video")))
    if detections.time is not None:
        objects = ", ".join(f"{number} {printable(one)}" for one, number in detections.counts.items())
        numbers = "" if detections.track_ids is None else ", ".join(str(n) for n in detections.track_ids if n >= 0)
        objects = (objects or "nothing") + (f"  (tracks {numbers})" if numbers else "")
        return f"{shown}  {clock(detections.time)}  {objects}"
    width, height = detections.image_size
    count = len(detections)
    heading = f"{shown}  {width}x{height}  {count} object{'s' * (count != 1)}"
    if not count:
        return heading
    return heading + "".join(f"\n  {line}" for line in detections.table().splitlines())


def predictions_json(
    found: Sequence[Detections],
    *,
    model: str,
    class_names: Sequence[str],
    threshold: float | None,
    failed: Sequence[dict[str, str]] = (),
) -> str:
    """The JSON of a prediction: model, classes, threshold, the detections of each image, and the images that failed."""
    return json_text(
        {
            "model": model,
            "class_names": list(class_names),
            "threshold": threshold,
            "images": [detections.to_dict() for detections in found],
            "failed": list(failed),
        },
        JSON_SIGNATURE,
    )


def coco_json(
    found: Sequence[Detections],
    image_ids: Sequence[int | str],
    category_ids: Sequence[int] | None = None,
) -> str:
    """The JSON text of several images in the layout of COCO results, one list of all detections.

    ``file_name`` goes along, which COCO's tools ignore and other programs can use.

    Args:
        found: detections of each image.
        image_ids: COCO image id of each of them.
        category_ids: COCO category id of each label; the labels themselves if None.
    """
    results: list[dict[str, Any]] = [
        {**result, "file_name": detections.source}
        for image_id, detections in zip(image_ids, found, strict=True)
        for result in detections.to_coco(image_id, category_ids)
    ]
    return json_text(results, JSON_SIGNATURE)


def coco_image_ids(names: Sequence[str]) -> list[int]:
    """An id for each input: the number that its file name is if all names are different numbers, else 1, 2, 3, ..."""
    stems = [Path(name).stem for name in names]
    numbers = [int(stem) for stem in stems if re.fullmatch(r"[0-9]{1,18}", stem)]
    return numbers if len(set(numbers)) == len(names) else list(range(1, len(names) + 1))
