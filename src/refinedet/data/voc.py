"""Reading PASCAL VOC folders and folders of one's own with VOC annotations.

The devkit's corners are 1-based and inclusive; here they become pixel edges: (xmin - 1, ymin - 1, xmax, ymax).
``voc_folders`` finds the files, ``voc_xml`` reads one annotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refinedet.data.classes import VOC_CLASSES
from refinedet.data.pairing import note_passed_over, split_folder
from refinedet.data.problems import (
    NAME_DIFFERS,
    NO_ANNOTATION,
    NO_SIZE,
    SECOND_LABEL,
    SEVERAL_IMAGES,
    FaultyFileError,
    ProblemLog,
    unknown_class,
    unknown_split,
)
from refinedet.data.records import BoxRules, DetectionDataset, Layout, ReadRequest, Record, RecordBuilder
from refinedet.data.splits import choose_split
from refinedet.data.voc_folders import VocContents, VocFolder, find_folders, find_loose_folder, list_contents
from refinedet.data.voc_xml import VocAnnotation, parse_annotation
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import is_image_name, read_image_size
from refinedet.text import cut

_RULES = BoxRules(min_side=1.0)
"""Inclusive corners that coincide would be one pixel: a stray click of the annotator, never an object."""


def list_splits(path: Path) -> tuple[str, ...]:
    """Splits of any of the folders, sorted. The per-class lists of VOC (``cat_train``) are not among them."""
    return _splits(_contents(path))


def read_voc(request: ReadRequest, log: ProblemLog) -> DetectionDataset:
    """Read a VOCdevkit, a VOC folder, or a folder of one's own with VOC annotations.

    Without ``class_names`` the classes are those of all annotations of all folders in alphabetical order, so that the
    splits agree; for folders called VOC2007 and the like they are the 20 of VOC if there are no others.

    Where no annotations are required, a split that has not all of them is read without any. VOC 2012 test is such a
    split: it comes with a few XML files, which are for another task.

    Args:
        request: a split such as "train", "train+val", "2007:trainval+2012:trainval", or None for every annotation.
        log: receives the problems.

    Raises:
        UsageError: unknown or empty split.
        RefineDetError: (strict) a file that cannot be used.
    """
    contents = _contents(request.path)
    if request.require_annotations:
        # Beside annotated years, the images of a test set are nobody's concern here.
        contents = [part for part in contents if part.folder.annotations.is_dir()] or contents
    selection = _select(request, contents, log)
    if not request.require_annotations:
        if request.split is None and not any(selection):
            selection = [sorted(part.images) for part in contents]
        if any(not set(keys) <= part.annotations.keys() for part, keys in zip(contents, selection, strict=True)):
            return _read_unannotated(request, contents, selection, log)
    parsed = _parse(contents, selection, request.class_names, log)
    classes = request.class_names or _classes(parsed.values(), contents)
    label_of = {name: label for label, name in enumerate(classes)}
    records: list[Record] = []
    seen: set[str] = set()
    for part, keys in zip(contents, selection, strict=True):
        reader = _FolderReader(part, label_of, parsed, log)
        for key in keys:
            try:
                record = reader.read(key, seen)
            except FaultyFileError as error:
                log.fatal(error)
                continue
            if record is not None:
                seen.add(str(record.image_id))
                records.append(record)
        _note_left_out(request, reader, set(keys))
    return DetectionDataset(records, classes, "voc", request.split, request.path)


def _contents(path: Path) -> list[VocContents]:
    folders = find_folders(path)
    if not folders:
        loose = find_loose_folder(path)
        folders = [loose] if loose is not None else []
    return [list_contents(folder) for folder in folders]


def _splits(contents: Sequence[VocContents]) -> tuple[str, ...]:
    names = {name for part in contents for name in part.splits()}
    return tuple(sorted(name for name in names if "_" not in name or name.rsplit("_", 1)[1] not in names))


def _select(request: ReadRequest, contents: Sequence[VocContents], log: ProblemLog) -> list[list[str]]:
    """Keys to read of each folder."""
    if request.split is None:
        return [list(part.annotations) for part in contents]
    chosen: list[dict[str, None]] = [{} for _ in contents]  # Dicts, to drop repetitions and keep the order.
    splits = [part.splits() for part in contents]
    years = [part.folder.year for part in contents]
    for asked in (word.strip() for word in request.split.split("+")):
        year, _, name = asked.rpartition(":")
        year = year[3:] if year[:3].upper() == "VOC" else year
        if year and year not in years:
            raise UsageError(f"{request.path}: no year '{year}' for split '{asked}'; available: {', '.join(years)}")
        own = [i for i in range(len(contents)) if year in ("", years[i])]
        if not any(name in splits[i] for i in own):
            available = _splits([contents[i] for i in own])
            try:
                name = choose_split(request.path, name, available)
            except UsageError:
                raise unknown_split(request.path, asked, _splits(contents)) from None
        for i in own:
            if name in splits[i]:
                keys = contents[i].keys_of_split(name, log, allow_outside=request.allow_outside)
                if not keys:
                    raise UsageError(f"{splits[i][name]}: split '{name}' is empty; list one image per line")
                chosen[i].update(dict.fromkeys(keys))
    return [list(keys) for keys in chosen]


def _parse(
    contents: Sequence[VocContents],
    selection: Sequence[Sequence[str]],
    class_names: Sequence[str] | None,
    log: ProblemLog,
) -> dict[Path, VocAnnotation | None]:
    """Annotations by their path: the selected ones, or all where these give the classes. None are the faulty ones."""
    parsed: dict[Path, VocAnnotation | None] = {}
    for part, keys in zip(contents, selection, strict=True):
        wanted = keys if class_names is not None else part.annotations
        for path in sorted(part.annotations[key] for key in wanted if key in part.annotations):
            try:
                parsed[path] = parse_annotation(path)
            except FaultyFileError as error:
                log.fatal(error)
                parsed[path] = None
    return parsed


def _classes(parsed: Iterable[VocAnnotation | None], contents: Sequence[VocContents]) -> tuple[str, ...]:
    names = {name for annotation in parsed if annotation for name in annotation.names.values()}
    # A year of VOC that is here only in part still has all of VOC's classes; a folder of one's own has what it has.
    of_voc = bool(names) and names.issubset(VOC_CLASSES) and all(part.folder.is_year for part in contents)
    return VOC_CLASSES if of_voc else tuple(sorted(names))


@dataclass
class _FolderReader:
    """Makes records of the annotations of one folder, and remembers which images they use."""

    contents: VocContents
    label_of: dict[str, int]
    parsed: dict[Path, VocAnnotation | None]
    log: ProblemLog
    used: dict[Path, Path] = field(default_factory=dict)
    """Image -> annotation of the records so far."""

    def read(self, key: str, seen: set[str]) -> Record | None:
        """The record of a key; None if its annotation was reported before or its image is passed over.

        Raises:
            FaultyFileError: no annotation, no image, two annotations for the image, an unknown class.
        """
        folder = self.contents.folder
        path = self.contents.annotations.get(key)
        if path is None:
            if key in self.contents.passed_over:
                return None
            shown = key if len(key) <= 200 else f"{key[:80]}..."
            raise FaultyFileError(
                folder.annotations / f"{shown}.xml",
                "no such annotation, but the split lists it; add it or remove it from the list",
            )
        annotation = self.parsed[path]
        if annotation is None:
            return None
        for index, name in annotation.names.items():
            if name not in self.label_of:
                raise unknown_class(path, name, tuple(self.label_of), where=f"object {index}: ")
        image = self._find_image(key, annotation)
        if image is None:
            return None
        if image in self.used:
            raise FaultyFileError(
                path, f"its image {image.name} is already that of {self.used[image].name}; keep all objects in one file"
            )
        size = annotation.size
        if size is None:
            try:
                size = read_image_size(image)
            except RefineDetError as error:
                raise FaultyFileError(path, f"gives no image size, and {error}") from None
            self.log.note(path, f"gives no image size; {size[0]}x{size[1]} taken from {image.name}", NO_SIZE)
        self.used[image] = path
        for message, kind in annotation.notes:
            self.log.note(path, message, kind)
        builder = RecordBuilder(image, image_id(key, folder, seen), size, path, self.log, _RULES)
        for item in annotation.objects:
            builder.add(item.box, self.label_of[item.name], item.describe, difficult=item.difficult)
        return builder.build()

    def _find_image(self, key: str, annotation: VocAnnotation) -> Path | None:
        """The annotation's image: that of the same name, as the devkit has it, else what <filename> says.

        None if it is one of those that cannot be read here, which are noted once.
        """
        path, filename = annotation.path, annotation.filename
        fitting = self.contents.matches.images_of.get(path, [])
        named = next((image for image in fitting if image.name == filename), None)
        if named is not None:
            return named
        if fitting and fitting[0].stem == path.stem:
            stated = Path(filename).stem if is_image_name(filename) else filename
            if filename and stated != path.stem:
                message = f"<filename> is '{cut(filename, 80)}'; {fitting[0].name} is used, which has the same stem"
                self.log.note(path, message, NAME_DIFFERS)
            return fitting[0]
        by_name = self.contents.images_by_name.get(filename, [])
        beside = [image for image in by_name if self.contents.key(image).rpartition("/")[0] == key.rpartition("/")[0]]
        for images in (beside, by_name, fitting):
            if len(images) == 1:
                message = f"no image has the stem '{path.stem}'; {images[0].name} is used, as <filename> says"
                if images is fitting:
                    message = f"no image has the stem '{path.stem}'; {images[0].name} is used, the only one that fits"
                self.log.note(path, message, NAME_DIFFERS)
                return images[0]
        if key in self.contents.passed_over:
            return None
        where = self.contents.folder.images
        raise FaultyFileError(
            path,
            f"its image is missing: no {path.stem}.jpg, .jpeg or .png in {where}; restore the image or remove it from "
            "the split",
        )


def image_id(key: str, folder: VocFolder, seen: set[str]) -> str:
    """What detections are filed under: the stem, unless an image before has it; then its folder or year is added."""
    stem = key.rsplit("/", 1)[-1]
    if stem not in seen:
        return stem
    return key if "/" in key and key not in seen else f"{folder.year}_{key}"


def _note_left_out(request: ReadRequest, reader: _FolderReader, keys: set[str]) -> None:
    """Note what of a folder is in no record although it belongs to what was asked for."""
    contents, log = reader.contents, reader.log

    def is_asked_for(file: Path) -> bool:
        key = contents.key(file)
        return request.split is None or key in keys or split_folder(key.split("/")[:-1]) == request.split

    note_passed_over(contents.files, log, is_asked_for)
    for file in filter(is_asked_for, contents.second_annotations):
        first = contents.annotations[contents.key(file)]
        log.note(file, f"{first} is another annotation of the same image; this one is left out", SECOND_LABEL)
    for image in contents.files.images:
        key = contents.key(image)
        if image in reader.used or not is_asked_for(image):
            continue
        if request.split is None and key not in contents.annotations:
            log.note(image, "image has no annotation; left out", NO_ANNOTATION)
        elif any(other in reader.used for other in contents.images[key]):
            other = next(other for other in contents.images[key] if other in reader.used)
            log.note(image, f"shares its annotation with {other.name}, which is used; left out", SEVERAL_IMAGES)


def _read_unannotated(
    request: ReadRequest, contents: Sequence[VocContents], selection: Sequence[Sequence[str]], log: ProblemLog
) -> DetectionDataset:
    """The images of a split without looking at annotations."""
    records: list[Record] = []
    seen: set[str] = set()
    for part, keys in zip(contents, selection, strict=True):
        for key in keys:
            images = part.images.get(key)
            try:
                if images is None:
                    missing = part.folder.images / f"{cut(key, 80)}.jpg"
                    raise FaultyFileError(missing, "no such image file, but the split lists it")
                try:
                    size = read_image_size(images[0])
                except RefineDetError as error:
                    raise FaultyFileError(images[0], str(error).removeprefix(f"{images[0]}: ")) from None
                builder = RecordBuilder(images[0], image_id(key, part.folder, seen), size, images[0], log)
                records.append(builder.build())
            except FaultyFileError as error:
                log.fatal(error)
                continue
            seen.add(str(records[-1].image_id))
    classes = request.class_names or VOC_CLASSES
    return DetectionDataset(records, classes, "voc", request.split, request.path, annotated=False)


LAYOUT = Layout(
    name="voc",
    evidence="XML annotations",
    recognises=lambda path: bool(find_folders(path)),
    resembles=lambda path: find_loose_folder(path) is not None,
    splits=list_splits,
    read=read_voc,
    server="voc",
)
