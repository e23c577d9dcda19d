"""Detections as label files in the layouts of Pascal VOC, COCO and YOLO, for label tools and for training.

* voc: ``Annotations/<name>.xml`` for each image, corners as whole numbers, 1-based with the last pixel included;
* coco: ``annotations.json`` with images, categories and annotations, which carry their score;
* yolo: ``labels/<name>.txt`` for each image, and ``data.yaml`` with the names of the classes.

A name keeps the folders below the folder that all images have in common.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, TypeAlias, get_args
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.fetch import is_address, without_secrets
from refinedet.files import check_output_folder, encoded, failure_reason, make_folder, write_atomically, write_text

LabelLayout: TypeAlias = Literal["coco", "voc", "yolo"]
SIGNATURE = "labels written by refinedet"


class LabelFolder:
    """A folder that takes the labels of images one by one; a context manager, which completes it at its end.

    Args:
        folder: new or empty, so that labels which somebody corrected are never lost.
        layout: "coco", "voc" or "yolo".
        class_names: name of each label, C of them.
        sources: paths or addresses of all images, from which their names follow.
        category_ids: COCO category id of each label; 1 to C if None.

    Raises:
        UsageError: the folder holds something, an unknown layout, or two images would share a label file.
        RefineDetError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        layout: LabelLayout,
        class_names: Sequence[str],
        sources: Iterable[str],
        category_ids: Sequence[int] | None = None,
    ) -> None:
        if layout not in get_args(LabelLayout):
            raise UsageError(f"labels are written as {', '.join(get_args(LabelLayout))}, not as {layout!r}")
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder}: is not empty; choose a new folder for the labels, or remove this one")
        self.folder = check_output_folder(folder, ours=SIGNATURE)
        self.layout, self.class_names = layout, tuple(class_names)
        self._names = _names_below_root(sources)
        if layout != "coco":
            _check_different(self._names, folder)
        self._ids = tuple(category_ids or range(1, len(class_names) + 1))
        self._images = self._objects = 0
        self._streams: tuple[IO[bytes], ...] = ()
        """COCO: the images and the annotations, until they are joined."""

    def __enter__(self) -> LabelFolder:
        make_folder(self.folder)
        if self.layout == "coco":
            self._streams = tuple(tempfile.TemporaryFile(dir=self.folder) for _ in range(2))  # noqa: SIM115 - closed at the end
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            for stream in self._streams:
                stream.close()

    def add(self, found: Detections) -> None:
        """Write the labels of an image.

        Raises:
            RefineDetError: they cannot be written.
            UsageError: the image is none of ``sources``.
        """
        name = self._names.get(found.source or "")
        if name is None:
            raise UsageError(f"{found.source}: is none of the images that the labels are for")
        if self.layout == "voc":
            write_text(self.folder / "Annotations" / name.with_suffix(".xml"), voc_text(found, str(name)))
        elif self.layout == "yolo":
            write_text(self.folder / "labels" / name.with_suffix(".txt"), yolo_text(found))
        else:
            self._add_coco(found, str(name))

    def _add_coco(self, found: Detections, name: str) -> None:
        images, objects = self._streams
        self._images += 1
        width, height = found.image_size
        try:
            _append(images, {"id": self._images, "file_name": name, "width": width, "height": height})
            for item in found.to_coco(self._images, self._ids):
                self._objects += 1
                area = item["bbox"][2] * item["bbox"][3]
                _append(objects, {"id": self._objects, **item, "area": area, "iscrowd": 0})
        except OSError as error:
            raise RefineDetError(f"{self.folder}: labels cannot be written ({failure_reason(error)})") from None

    def _complete(self) -> None:
        if self.layout == "yolo":
            names = json.dumps(list(self.class_names), ensure_ascii=False)  # JSON is YAML
            write_text(
                self.folder / "data.yaml", f"# {SIGNATURE}\npath: .\ntrain: images\nval: images\nnames: {names}\n"
            )
        elif self.layout == "coco":
            write_atomically(self.folder / "annotations.json", self._write_coco)

    def _write_coco(self, path: Path) -> None:
        names = enumerate(self.class_names)
        categories = [{"id": self._ids[label], "name": name} for label, name in names]
        head = {"generator": SIGNATURE, "categories": categories}
        with path.open("wb") as target:
            target.write(encoded(json.dumps(head, ensure_ascii=False)[:-1]))
            for key, stream in zip(("images", "annotations"), self._streams, strict=True):
                target.write(f',\n"{key}": ['.encode())
                stream.seek(0)
                shutil.copyfileobj(stream, target)
                target.write(b"]")
            target.write(b"}\n")


def _append(stream: IO[bytes], item: dict[str, Any]) -> None:
    stream.write(encoded((",\n" if stream.tell() else "\n") + json.dumps(item, ensure_ascii=False, allow_nan=False)))


def voc_text(found: Detections, file_name: str) -> str:
    """The annotation file of one image in Pascal VOC's layout; a box is at least two pixels wide and high."""
    width, height = found.image_size
    root = ElementTree.Element("annotation")
    root.append(ElementTree.Comment(f" {SIGNATURE} "))
    ElementTree.SubElement(root, "filename").text = file_name
    _elements(ElementTree.SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
    # Where first and last pixel are the same, readers of this layout see a box without an area.
    first = np.clip(np.rint(found.boxes[:, :2]).astype(int) + 1, 1, np.maximum([width - 1, height - 1], 1))
    last = np.maximum(np.rint(found.boxes[:, 2:]).astype(int), np.minimum(first + 1, [width, height]))
    for name, start, end in zip(found.names, first.tolist(), last.tolist(), strict=True):
        item = ElementTree.SubElement(root, "object")
        _elements(item, {"name": name, "truncated": 0, "difficult": 0})
        corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), [*start, *end], strict=True))
        _elements(ElementTree.SubElement(item, "bndbox"), corners)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _elements(parent: ElementTree.Element, values: dict[str, object]) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(parent, tag).text = str(value)


def yolo_text(found: Detections) -> str:
    """The label file of one image in YOLO's layout: ``label cx cy width height``, shares of the image."""
    boxes = found.boxes.astype(np.float64) / np.tile(found.image_size, 2)
    rows = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    return "".join(
        f"{label} {' '.join(f'{value:.7f}' for value in row)}\n" for label, row in zip(found.labels, rows, strict=True)
    )


def _names_below_root(sources: Iterable[str]) -> dict[str, PurePosixPath]:
    """For each source the path of its image below the folder that all have in common."""
    paths = {source: _local_path(source) for source in sources}
    folders = {path.parent for path in paths.values()}
    root = os.path.commonpath([str(folder) for folder in folders]) if folders else "/"
    return {source: PurePosixPath(path.relative_to(root).as_posix()) for source, path in paths.items()}


def _local_path(source: str) -> Path:
    if not is_address(source):
        return Path(os.path.abspath(source))
    parts = urlsplit(source)
    inside = [part for part in unquote(parts.path).replace("\0", "").split("/") if part not in ("", ".", "..")]
    return Path("/", parts.netloc or parts.scheme, *inside)


def _check_different(names: dict[str, PurePosixPath], folder: Path) -> None:
    taken: dict[str, str] = {}
    for source, name in names.items():
        # Compared in lower case: on many disks A.txt and a.txt are one file.
        other = taken.setdefault(str(name.with_suffix("")).lower(), source)
        if other != source:
            both = f"{without_secrets(other)} and {without_secrets(source)}"
            raise UsageError(f"{folder}: {both} would have the same label file; rename one of the images")
