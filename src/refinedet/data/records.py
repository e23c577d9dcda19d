"""Images with their objects, in one format for all layouts; readers fill them through ``RecordBuilder``.

Boxes are ``(x1, y1, x2, y2)`` in continuous pixel-edge coordinates: a box over an entire image is
``(0, 0, width, height)``. See docs/conventions.md. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from refinedet.data.problems import CLIPPED, NO_AREA, OUTSIDE, SWAPPED, Problem, ProblemKind, ProblemLog, describe_kinds
from refinedet.images import read_image


@dataclass(frozen=True, eq=False)
class Record:
    """One image and its objects; G objects, possibly none."""

    image_path: Path
    """The image file."""
    image_id: str | int
    """VOC and YOLO: the stem of the file, with folder or year where another image has the same; COCO: the JSON id."""
    width: int
    """Width in pixels that the boxes refer to."""
    height: int
    """Height in pixels that the boxes refer to."""
    boxes: npt.NDArray[np.float32]
    """(G, 4) xyxy, pixel edges, inside the image, with an area."""
    labels: npt.NDArray[np.int64]
    """(G,) 0..C-1."""
    difficult: npt.NDArray[np.bool_]
    """(G,) VOC's flag: trained on, ignored by the VOC metric. False elsewhere."""
    crowd: npt.NDArray[np.bool_]
    """(G,) COCO's iscrowd: not trained on, ignored by the COCO metric. False elsewhere."""
    areas: npt.NDArray[np.float32]
    """(G,) square pixels: COCO's "area" (of the mask), else the area of the box."""


@dataclass(eq=False)
class DetectionDataset:
    """The records of one split, with the names of their classes."""

    records: list[Record]
    """In the order of the split file (VOC), of the JSON (COCO), or of the sorted file names (YOLO)."""
    class_names: tuple[str, ...]
    """Index = label."""
    layout: str
    """Name of the layout of the files, a key of ``layouts.LAYOUTS``."""
    split: str | None
    """As it was asked for; None is everything."""
    path: Path
    """The folder or file that was opened."""
    category_ids: tuple[int, ...] | None = None
    """COCO only: the category id of each label."""
    problems: list[Problem] = field(default_factory=list)
    """What was repaired or left out while reading."""
    annotated: bool = True
    """False: a split whose annotations are not public, its records without objects although there are some."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """The record at ``index``."""
        return self.records[index]

    def load_image(self, index: int) -> npt.NDArray[np.uint8]:
        """Pixels of an image, turned so that its boxes fit.

        Returns:
            (H, W, 3) uint8 RGB, where H and W are the record's.

        Raises:
            RefineDetError: missing, truncated, no image, or of another size than its annotation says.
        """
        record = self.records[index]
        return read_image(record.image_path, size=(record.width, record.height))

    def subset(self, indices: Iterable[int]) -> DetectionDataset:
        """The same dataset with only the records at ``indices``, in that order."""
        return replace(self, records=[self.records[index] for index in indices], problems=list(self.problems))

    def only_classes(self, labels: Sequence[int]) -> DetectionDataset:
        """The same images with the objects of some classes only; images that have none stay, without objects.

        Args:
            labels: the classes to keep, different from each other; the i-th of them gets the label i.
        """
        new_label = np.full(len(self.class_names), -1, dtype=np.int64)
        new_label[list(labels)] = np.arange(len(labels))
        records = []
        for record in self.records:
            relabelled = new_label[record.labels]
            kept = relabelled >= 0
            objects = {name: getattr(record, name)[kept] for name in ("boxes", "difficult", "crowd", "areas")}
            records.append(replace(record, labels=relabelled[kept], **objects))
        return replace(
            self,
            records=records,
            class_names=tuple(self.class_names[label] for label in labels),
            category_ids=None if self.category_ids is None else tuple(self.category_ids[label] for label in labels),
            problems=list(self.problems),
        )

    def repaired(self) -> str | None:
        """One line that counts, commonest first, what reading clipped, dropped, filled in or left out; None if nothing.

        Example: ``"12 boxes clipped to their images, 1 box without an area dropped"``.
        """
        return describe_kinds(self.problems) or None

    def digest(self) -> str:
        """SHA-256, in hexadecimal, over class names and over names, sizes, boxes and labels of all images in order.

        Names are relative to the folder that was opened, so a dataset that is moved or copied keeps its digest. The
        pixels are not read.
        """
        folder = Path(os.path.abspath(self.path if self.path.is_dir() else self.path.parent))
        total = hashlib.sha256()

        def add(part: bytes) -> None:
            # Each part is preceded by its length: no two different datasets give the same sequence of bytes.
            total.update(len(part).to_bytes(8, "little") + part)

        for name in self.class_names:
            add(name.encode("utf-8", "surrogatepass"))
        for record in self.records:
            add(_relative_name(Path(os.path.abspath(record.image_path)), folder).encode("utf-8", "surrogatepass"))
            add(np.array([record.width, record.height], dtype="<i8").tobytes())
            for values, dtype in (
                (record.boxes, "<f4"), (record.labels, "<i8"), (record.difficult, "|b1"), (record.crowd, "|b1"),
            ):  # fmt: skip
                add(np.ascontiguousarray(values, dtype=dtype).tobytes())
        return total.hexdigest()


def _relative_name(file: Path, folder: Path) -> str:
    """The file below ``folder``; of one that lies elsewhere (a second dataset that was joined) its last two parts."""
    if file.is_relative_to(folder):
        return file.relative_to(folder).as_posix()
    return "/".join(file.parts[-2:])


def without_objects(record: Record) -> Record:
    """The same image with nothing known of what is on it."""
    return replace(
        record,
        boxes=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        difficult=np.zeros(0, dtype=np.bool_),
        crowd=np.zeros(0, dtype=np.bool_),
        areas=np.zeros(0, dtype=np.float32),
    )


@dataclass(frozen=True)
class ReadRequest:
    """What a reader is asked for; ``layouts.open_dataset`` explains the fields."""

    path: Path
    """Folder or file that the layout recognised."""
    split: str | None = None
    """Without brackets; None is everything."""
    class_names: tuple[str, ...] | None = None
    """In label order; None takes those of the data."""
    require_annotations: bool = True
    """False also reads splits whose annotations are kept by a server."""
    allow_outside: bool = False
    """Whether entries of annotation files and lists may name files outside the folder of the data."""


@dataclass(frozen=True)
class Layout:
    """A way in which datasets are kept on disk. ``layouts.LAYOUTS`` lists them; each reader module defines its own."""

    name: str
    """What it is called in code and messages."""
    evidence: str
    """By which files it is recognised, in words for the message that says that none was."""
    recognises: Callable[[Path], bool]
    """Whether a folder or file that exists is in this layout."""
    splits: Callable[[Path], tuple[str, ...]]
    """Names of the splits of a path that it recognises; empty if the data is not divided."""
    read: Callable[[ReadRequest, ProblemLog], DetectionDataset]
    """Reads the records of a split. Raises UsageError (unknown split) and, in strict mode, FaultyFileError."""
    resembles: Callable[[Path], bool] | None = None
    """Weaker evidence, such as label files anywhere below a folder; asked only where no layout recognises a path."""
    server: Literal["voc", "coco"] | None = None
    """Whose evaluation server takes results of such data; None if there is none."""


@dataclass(frozen=True)
class BoxRules:
    """What a layout says about the corners of its boxes."""

    min_side: float = 0.0
    """Boxes whose width or height does not exceed this, in pixels, have no area."""
    tolerance: float = 0.0
    """Pixels by which a box may reach outside without a word (rounding of the annotation tool)."""


class RecordBuilder:
    """Takes the objects of one image as a reader finds them, and makes a record of those that can be used.

    Boxes are clipped to the image; those that are empty or lie outside are dropped. Each such box becomes a problem of
    the log when the record is built.

    Example:
        >>> log = ProblemLog(strict=True)
        >>> builder = RecordBuilder(Path("a.jpg"), "a", (100, 50), Path("a.xml"), log)
        >>> builder.add((-3, 10, 20, 40), label=0, describe=lambda: "object 1 (cat)")
        >>> builder.build().boxes.tolist()
        [[0.0, 10.0, 20.0, 40.0]]
        >>> log.problems[0].message
        'object 1 (cat) reaches outside the 100x50 image; clipped'
    """

    def __init__(
        self,
        image_path: Path,
        image_id: str | int,
        size: tuple[int, int],
        annotation_path: Path,
        log: ProblemLog,
        rules: BoxRules | None = None,
    ) -> None:
        """Start without objects.

        Args:
            image_path: the image file.
            image_id: what detections are filed under.
            size: (width, height) that the boxes refer to, in pixels.
            annotation_path: the file that problems are filed under.
            log: receives the problems.
            rules: of the layout; by default any width and height above 0 is an area, and nothing may reach outside.
        """
        self._image_path = image_path
        self._image_id = image_id
        self._size = size
        self._annotation_path = annotation_path
        self._log = log
        self._rules = rules or BoxRules()
        self._boxes: list[Sequence[float]] = []
        self._labels: list[int] = []
        self._difficult: list[bool] = []
        self._crowd: list[bool] = []
        self._areas: list[float] = []
        self._describe: list[Callable[[], str]] = []

    def add(
        self,
        box: Sequence[float],
        label: int,
        describe: Callable[[], str],
        *,
        difficult: bool = False,
        crowd: bool = False,
        area: float | None = None,
    ) -> None:
        """Take an object.

        Args:
            box: finite xyxy, pixel edges, not yet clipped.
            label: 0..C-1.
            describe: gives words for the object as it stands in the file; called only if there is a problem with it.
            difficult: VOC's flag.
            crowd: COCO's flag.
            area: in square pixels; by default that of the clipped box.
        """
        self._boxes.append(box)
        self._labels.append(label)
        self._describe.append(describe)
        self._difficult.append(difficult)
        self._crowd.append(crowd)
        self._areas.append(np.nan if area is None else area)

    def build(self) -> Record:
        """The record; objects that cannot be used are left out and noted in the log."""
        width, height = self._size
        count = len(self._boxes)
        given = np.asarray(self._boxes, dtype=np.float64).reshape(count, 4)
        limit = np.array([width, height, width, height], dtype=np.float64)
        clipped = np.clip(given, 0.0, limit).astype(np.float32)
        min_side = self._rules.min_side
        # Sides are compared in both precisions: one that vanishes in float32 has no area for anyone who comes later.
        with np.errstate(over="ignore"):  # corners near the largest number that a file can state
            given_empty = np.any(given[:, 2:] - given[:, :2] <= min_side, axis=1)
        empty = given_empty | np.any(clipped[:, 2:] - clipped[:, :2] <= min_side, axis=1)
        reaches_out = np.any(np.abs(given - np.clip(given, 0.0, limit)) > self._rules.tolerance, axis=1)
        for index in np.flatnonzero(empty | reaches_out).tolist():
            if given_empty[index] and np.any(given[index, 2:] < given[index, :2]):
                self._note(index, "has no area (its corners are swapped); dropped", SWAPPED)
            elif given_empty[index]:
                self._note(index, "has no area; dropped", NO_AREA)
            elif empty[index]:
                self._note(index, f"lies outside the {width}x{height} image; dropped", OUTSIDE)
            else:
                self._note(index, f"reaches outside the {width}x{height} image; clipped", CLIPPED)
        keep = ~empty
        final = clipped[keep]
        box_areas = (final[:, 2] - final[:, 0]) * (final[:, 3] - final[:, 1])
        areas = np.asarray(self._areas, dtype=np.float32)[keep]
        return Record(
            image_path=self._image_path,
            image_id=self._image_id,
            width=width,
            height=height,
            boxes=final,
            labels=np.asarray(self._labels, dtype=np.int64)[keep],
            difficult=np.asarray(self._difficult, dtype=np.bool_)[keep],
            crowd=np.asarray(self._crowd, dtype=np.bool_)[keep],
            areas=np.where(np.isnan(areas), box_areas, areas),
        )

    def _note(self, index: int, what: str, kind: ProblemKind) -> None:
        self._log.note(self._annotation_path, f"{self._describe[index]()} {what}", kind)
