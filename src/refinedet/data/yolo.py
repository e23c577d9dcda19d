"""YOLO folders: data.yaml, images/.../a.jpg with labels/.../a.txt.

The describing file may also be Darknet's obj.data, or only give the class names (classes.txt, obj.names). A line of a
label file is ``class cx cy width height``, relative to the image, or ``class x1 y1 x2 y2 x3 y3 ...``, a polygon or the
corners of an oriented box, of which the box around it is taken. An image without a label file has no objects, unless
label files are missing as a whole or do not fit the names of the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from refinedet.data.image_paths import is_really_below, steps_below
from refinedet.data.problems import PARTS_IGNORED, FaultyFileError, ProblemLog, unknown_class
from refinedet.data.records import BoxRules, DetectionDataset, Layout, ReadRequest, Record, RecordBuilder
from refinedet.data.yolo_description import Description, describe, find_description, find_names_file
from refinedet.data.yolo_images import SplitImages
from refinedet.data.yolo_labels import LabelFiles
from refinedet.data.yolo_rows import Row, read_rows
from refinedet.errors import RefineDetError
from refinedet.images import read_image_size

_RULES = BoxRules(tolerance=0.5)
"""Numbers are rounded when written, so boxes may reach outside their image by half a pixel without a word."""


def list_splits(path: Path) -> tuple[str, ...]:
    """Splits that the describing file names and that are there, in the order train, val, test."""
    return tuple(SplitImages(describe(path), ProblemLog(strict=False)).splits())


def read_yolo(request: ReadRequest, log: ProblemLog) -> DetectionDataset:
    """Read a YOLO folder.

    Which files are read: the folder of the data is that of the describing file, and what its key ``path`` and its
    absolute entries name, which its author wrote. Its relative entries, and each line of a list file, must stay below,
    unless ``request.allow_outside``. What a file from outside says, such as the target of a link, is never shown.

    Args:
        request: a folder with data.yaml, or that file; a split "train", "val" or "test", several joined by "+", or None
            for all; class names in label order, by default those of data.yaml in its order. With given names the class
            numbers of the label files are translated through the names of data.yaml.
        log: receives the problems.

    Raises:
        UsageError: unknown split, a folder of data.yaml that does not exist.
        RefineDetError: data.yaml cannot be used; (strict) another file that cannot be used.
    """
    description = describe(request.path)
    own_names = description.class_names()
    classes = request.class_names or own_names
    source = SplitImages(description, log, allow_outside=request.allow_outside)
    images = source.read(request.split)
    pairs = LabelFiles(description, source, log).pair(images)
    reader = _RecordReader(description, own_names, classes, source.folders, log)
    records: list[Record] = []
    seen: set[str] = set()
    for image, label_file in pairs.items():
        image_id = _new_id(image, source.folders, seen)
        try:
            records.append(reader.read(image, image_id, label_file))
        except FaultyFileError as error:
            log.fatal(error, cause=reader.cause)
    return DetectionDataset(records, classes, "yolo", request.split, request.path)


def _new_id(image: Path, folders: Iterable[Path], seen: set[str]) -> str:
    """The stem of an image; where folders share stems, its path in the data, as detections are filed under it."""
    image_id = image.stem
    if image_id in seen:
        steps = next((steps for folder in folders if (steps := steps_below(image, folder))), None)
        path = image if steps is None else Path(*steps)
        names = (path.with_suffix("").as_posix(), path.as_posix(), image.as_posix())
        image_id = next((name for name in names if name not in seen), names[-1])
    seen.add(image_id)
    return image_id


class _RecordReader:
    """Reads label files."""

    def __init__(
        self,
        description: Description,
        own_names: Sequence[str],
        classes: Sequence[str],
        folders: Sequence[Path],
        log: ProblemLog,
    ) -> None:
        self._description = description
        self._own_names = own_names
        self._classes = tuple(classes)
        self._label_of = {name: label for label, name in enumerate(classes)}
        self._keypoint_numbers = description.keypoint_numbers()
        self._folders = folders
        self._log = log
        self.cause: str | None = None
        """Of the last error, if it lies in the describing file and so in many label files."""

    def read(self, image: Path, image_id: str, label_file: Path | None) -> Record:
        """The record of an image.

        Raises:
            FaultyFileError: the image or its label file cannot be used.
        """
        self.cause = None
        try:
            width, height = read_image_size(image)
        except RefineDetError as error:
            raise FaultyFileError(image, str(error).removeprefix(f"{image}: ")) from None
        if label_file is None:
            return RecordBuilder(image, image_id, (width, height), image, self._log, _RULES).build()
        builder = RecordBuilder(image, image_id, (width, height), label_file, self._log, _RULES)
        for row in read_rows(label_file, self._keypoint_numbers, partial(self._may_quote, label_file)):
            label = self._label(label_file, row)
            x1, y1, x2, y2 = row.box
            box = (x1 * width, y1 * height, x2 * width, y2 * height)
            builder.add(box, label, partial(_describe, row.number, self._classes[label], box))
            if row.has_keypoints:
                self._log.note(
                    self._description.file,
                    "its objects have keypoints, which are passed over; their boxes are read",
                    PARTS_IGNORED,
                    cause="keypoints",
                )
        return builder.build()

    def _may_quote(self, file: Path) -> bool:
        return any(is_really_below(file, folder) for folder in self._folders)

    def _label(self, file: Path, row: Row) -> int:
        count = len(self._own_names)
        if not 0 <= row.class_number < count:
            self.cause = f"class number {row.class_number}"
            advice = "; are the classes numbered from 1?" if row.class_number == count else ""
            raise FaultyFileError(
                file,
                f"line {row.number}: class {row.class_number} is out of range; {self._description.file.name} has "
                f"{count} names, so 0 to {count - 1}{advice}",
            )
        name = self._own_names[row.class_number]
        if name not in self._label_of:
            self.cause = f"class {name}"
            raise unknown_class(file, name, self._classes, where=f"line {row.number}: ")
        return self._label_of[name]


def _describe(number: int, name: str, box: tuple[float, float, float, float]) -> str:
    """The line of the label file, with its box in pixels."""
    x1, y1, x2, y2 = box
    return f"line {number} ({name}): box {x1:g},{y1:g},{x2:g},{y2:g}"


LAYOUT = Layout(
    name="yolo",
    evidence="data.yaml, obj.data or classes.txt",
    recognises=lambda path: find_description(path) is not None,
    splits=list_splits,
    read=read_yolo,
    resembles=lambda path: find_names_file(path) is not None,
)
