"""Records of one COCO file: which image each entry means, and which object each annotation is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refinedet.data.coco_document import Categories, Document, as_id, as_side
from refinedet.data.image_paths import ImageFinder, is_below
from refinedet.data.masks import box_of_segmentation
from refinedet.data.problems import (
    BOX_FORM,
    LISTED_TWICE,
    NO_BOX,
    NO_SIZE,
    FaultyFileError,
    ProblemLog,
    short_repr,
    shorten,
    unknown_class,
)
from refinedet.data.records import BoxRules, ReadRequest, Record, RecordBuilder
from refinedet.errors import RefineDetError
from refinedet.images import read_image_size

_RULES = BoxRules(tolerance=0.5)
"""COCO's boxes are rounded, so they may reach outside their image by half a pixel without a word."""
_FLAGS: dict[object, bool] = {0: False, 1: True, None: False, "0": False, "1": True, "": False, "false": False,
                              "true": True, "no": False, "yes": True}  # fmt: skip
"""What ``iscrowd`` may be; a text is compared in lower case. False, True, 0.0 and 1.0 equal 0 and 1."""
_FEW = 5
"""Below so many boxes their format is doubted, but not refused."""

Entry = dict[str, Any]


class RecordReader:
    """Reads the images and annotations of one COCO document."""

    def __init__(self, file: Path, split: str, categories: Categories, request: ReadRequest, log: ProblemLog) -> None:
        """Prepare for the file of a split."""
        self._file = file
        self._split = split
        self._categories = categories
        self._request = request
        self._log = log
        self._label_of, _ = categories.labels(request.class_names)
        self._forms = _BoxForms()

    def read(self, document: Document) -> list[Record]:
        """The records in the order of the document.

        Raises:
            FaultyFileError: (strict) an entry that cannot be used.
        """
        images = self._images(document)
        objects = self._objects(document, images)
        places = self._places(images)
        if "annotations" in document:
            self._join_repeated(images, objects, places)
        records = []
        for key, path in places.items():
            try:
                records.append(self._record(path, key, images[key], objects[key]))
            except FaultyFileError as error:
                self._log.fatal(error)
        self._check_forms()
        return records

    def _images(self, document: Document) -> dict[int | str, Entry]:
        images: dict[int | str, Entry] = {}
        for entry in document["images"]:
            key, name = as_id(entry.get("id")), entry.get("file_name")
            if key is None or not isinstance(name, str) or not name:
                shown = short_repr(entry.get("id"))
                reason = f"image {shown} needs an 'id', a whole number below 2**63 or a text, and a 'file_name'"
                self._log.fatal(FaultyFileError(self._file, reason), cause=f"{self._file}: no id")
            elif key in images:
                names = f"{_shown(images[key]['file_name'])} and {_shown(name)}"
                reason = f"image id {key} is listed twice ({names}); ids must be different"
                self._log.fatal(FaultyFileError(self._file, reason))
            else:
                images[key] = entry
        return images

    def _objects(self, document: Document, images: dict[int | str, Entry]) -> dict[int | str, list[Entry]]:
        """The annotations of each image."""
        objects: dict[int | str, list[Entry]] = {key: [] for key in images}
        for entry in document.get("annotations", []):
            key = entry.get("image_id")
            if type(key) is not int:  # as_id takes its time, and there may be a million annotations.
                key = as_id(key)
            group = objects.get(key) if key is not None else None
            if group is None:
                shown = short_repr(entry.get("image_id"))
                reason = f"{_name(entry)} belongs to image id {shown}, which the file does not list"
                self._log.fatal(FaultyFileError(self._file, reason), cause=f"{self._file}: no image")
            else:
                group.append(entry)
        return objects

    def _places(self, images: dict[int | str, Entry]) -> dict[int | str, Path]:
        """The file of each image that is there."""
        names = [entry["file_name"] for entry in images.values()]
        root = data_folder(self._request.path, self._file)
        folders = _image_folders(self._file, self._split, root, names, opened=self._request.path.is_dir())
        allowed = self._request.allow_outside
        finder = ImageFinder(self._file, folders, root, self._log, allow_outside=allowed)
        places: dict[int | str, Path] = {}
        for key, entry in images.items():
            try:
                places[key] = finder.find(entry["file_name"])
            except FaultyFileError as error:
                self._log.fatal(error, cause=f"{self._file}: image not found")
        return places

    def _join_repeated(
        self, images: dict[int | str, Entry], objects: dict[int | str, list[Entry]], places: dict[int | str, Path]
    ) -> None:
        """Make one image of entries that name the same file under several ids: together they are its annotation."""
        first_key: dict[str, int | str] = {}
        for key, path in list(places.items()):
            first = first_key.setdefault(str(path), key)
            if first == key:
                continue
            objects[first].extend(objects[key])
            del places[key]
            self._log.note(
                self._file,
                f"{_shown(images[key]['file_name'])} is listed under the ids {first} and {key}; read as one image with "
                "the objects of both",
                LISTED_TWICE,
                cause=f"{self._file}: two ids",
            )

    def _record(self, path: Path, key: int | str, image: Entry, entries: Sequence[Entry]) -> Record:
        size = self._size(path, key, image)
        builder = RecordBuilder(path, key, size, self._file, self._log, _RULES)
        for entry in entries:
            try:
                self._add(builder, image["file_name"], size, entry)
            except FaultyFileError as error:
                self._log.fatal(error)
        return builder.build()

    def _size(self, path: Path, key: int | str, image: Entry) -> tuple[int, int]:
        width, height = as_side(image.get("width")), as_side(image.get("height"))
        if width is not None and height is not None:
            return width, height
        try:
            width, height = read_image_size(path)
        except RefineDetError as error:
            raise FaultyFileError(self._file, f"image {short_repr(key)} has no size, and {error}") from None
        self._log.note(
            self._file,
            f"image {key} has no size; {width}x{height} taken from {_shown(image['file_name'])}",
            NO_SIZE,
            cause=f"{self._file}: no size",
        )
        return width, height

    def _add(self, builder: RecordBuilder, file_name: str, size: tuple[int, int], entry: Entry) -> None:
        """Add the object of an annotation, if it has a box."""
        category = entry.get("category_id")
        label = self._label_of.get(category) if type(category) is int else None
        if label is None:
            label = self._find_label(entry)
        box = entry.get("bbox")
        if not box:
            box = self._box_without_bbox(entry, size)
            if box is None:
                return
        elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            reason = f"{_name(entry)}: 'bbox' must be four numbers [x, y, width, height], not {short_repr(box)}"
            raise FaultyFileError(self._file, reason)
        else:
            self._forms.add(box, size)
        crowd = entry.get("iscrowd", 0)
        if crowd != 0:
            crowd = self._flag(entry, crowd)
        x, y, width, height = box
        area = entry.get("area")
        if area is None:
            area = width * height
        elif not _is_number(area) or area < 0:
            reason = f"{_name(entry)}: 'area' must be a number from 0 up, not {short_repr(area)}"
            raise FaultyFileError(self._file, reason)
        describe = partial(_describe, file_name, entry, box, self._categories)
        builder.add((x, y, x + width, y + height), label, describe, crowd=bool(crowd), area=area)

    def _find_label(self, entry: Entry) -> int:
        category = as_id(entry.get("category_id"))
        label = None if category is None else self._label_of.get(category)
        if label is not None:
            return label
        number = None if category is None else self._categories.number_of.get(category)
        if number is None:
            known = shorten([short_repr(key) for key in sorted(self._categories.number_of, key=_order)])
            reason = f"{_name(entry)} has category id {short_repr(entry.get('category_id'))}, which the file does not "
            raise FaultyFileError(self._file, f"{reason}list; known: {known}")
        name = self._categories.names[number]
        raise unknown_class(self._file, name, self._request.class_names or (), where=f"{_name(entry)}: ")

    def _box_without_bbox(self, entry: Entry, size: tuple[int, int]) -> Sequence[float] | None:
        """The box around the segmentation; None, with a note, if there is none."""
        try:
            box = box_of_segmentation(entry.get("segmentation"), size)
            reason = ""
        except ValueError as error:
            box, reason = None, f", and {error}"
        if box is None:
            message = f"{_name(entry)} has no 'bbox'{reason}; dropped"
            self._log.note(self._file, message, NO_BOX, cause=f"{self._file}: no box{reason}")
        return box

    def _flag(self, entry: Entry, value: object) -> bool:
        value = value.strip().lower() if isinstance(value, str) else value
        flag = None if isinstance(value, (list, dict)) else _FLAGS.get(value)
        if flag is None:
            raise FaultyFileError(self._file, f"{_name(entry)}: 'iscrowd' must be 0 or 1, not {short_repr(value)}")
        return flag

    def _check_forms(self) -> None:
        fault = self._forms.fault()
        if fault is not None and self._forms.count < _FEW:
            self._log.note(self._file, fault, BOX_FORM)
        elif fault is not None:
            self._log.fatal(FaultyFileError(self._file, fault))


class _BoxForms:
    """Notices boxes that are in all likelihood not [x, y, width, height] in pixels."""

    def __init__(self) -> None:
        self.count = 0
        self._shares = True
        self._corners = True
        self._outside = 0

    def add(self, box: Sequence[float], size: tuple[int, int]) -> None:
        """Look at one more box of an image of that (width, height)."""
        self.count += 1
        if self._shares:
            self._shares = min(box) >= 0 and max(box) <= 1
        if self._corners:
            x, y, width, height = box
            right, bottom = size[0] + _RULES.tolerance, size[1] + _RULES.tolerance
            self._corners = 0 <= x < width <= right and 0 <= y < height <= bottom
            self._outside += x + width > right or y + height > bottom

    def fault(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        if self.count and self._shares:
            return (
                f"no side of its {self.count} boxes exceeds one pixel: they seem to be shares of the image; 'bbox' is "
                "[x, y, width, height] in pixels, so multiply them by the image's width and height"
            )
        if self._corners and self._outside * 2 > self.count:
            return (
                f"{self._outside} of its {self.count} boxes reach outside their images, but would lie inside as "
                "[x1, y1, x2, y2]; 'bbox' is [x, y, width, height] in pixels, so store widths and heights"
            )
        return None


def data_folder(path: Path, file: Path) -> Path:
    """The folder that the images of a COCO file must lie in: what was opened, or what holds the opened file.

    A folder called "annotations" holds the files only; its images lie beside it.
    """
    if path.is_dir() and path.resolve().name.lower() != "annotations":
        return path
    above = file.absolute().parent
    return above.parent if above.name.lower() == "annotations" else above


def _image_folders(file: Path, split: str, root: Path, names: Sequence[str], *, opened: bool) -> list[Path]:
    """Where the images of a JSON file may be: the folder with most of them first, then by how usual the place is.

    Args:
        file: the JSON file.
        split: its split.
        root: the folder of the data.
        names: those of the images.
        opened: whether that folder was opened; else the file itself was, whose images may lie beside its folder.
    """
    beside, above = file.absolute().parent, file.absolute().parent.parent
    near = [beside, beside / split, beside / "images", beside / "data"]
    far = [
        above / split,
        # image_info_test-dev2017.json lists a part of test2017/.
        above / re.sub(r"-[a-z]+", "", split),
        above / "images" / split,
        above / split / "images",
    ]
    inside = {folder: is_below(folder, root) for folder in (*far, *near, above / "images", above)}
    if not inside[above]:
        del inside[above]
    if opened:
        inside = {folder: below for folder, below in inside.items() if below}
    sample = names[:: max(1, len(names) // 50)]
    folders = [folder for folder in inside if folder.is_dir()]
    hits = {folder: sum(_is_file(folder, name) for name in sample) for folder in folders}
    return sorted(folders, key=lambda folder: (-hits[folder], not inside[folder]))


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # A name that no file can have.
        return False


def _order(key: int | str) -> tuple[bool, int | str]:
    """Numbers before texts, each in ascending order."""
    return isinstance(key, str), key


def _name(entry: Entry) -> str:
    """An annotation in a message."""
    return f"annotation {short_repr(entry.get('id'))}"


def _shown(name: str) -> str:
    """A file name in a message."""
    return name if name.isprintable() and len(name) <= 200 else short_repr(name)


def _describe(file_name: str, entry: Entry, box: Sequence[float], categories: Categories) -> str:
    """The annotation as it stands in the file."""
    x, y, width, height = box
    key = as_id(entry["category_id"])
    name = "" if key is None else categories.names[categories.number_of[key]]
    return f"{_shown(file_name)}, {_name(entry)} ({name}): box x={x:g} y={y:g} w={width:g} h={height:g}"


def _is_number(value: object) -> bool:
    # The comparison is also False for NaN and infinity, which Python's json accepts, and safe for integers of any size.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12
