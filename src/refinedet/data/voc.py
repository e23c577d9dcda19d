"""PASCAL VOC folders: Annotations/*.xml, JPEGImages/, ImageSets/Main/<split>.txt.

The devkit's corners are 1-based and inclusive; here they become pixel edges: (xmin - 1, ymin - 1, xmax, ymax).
XML is read through defusedxml, which refuses entities instead of expanding them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from refinedet.data.classes import VOC_CLASSES
from refinedet.data.problems import (
    LISTED_TWICE,
    NAME_DIFFERS,
    NO_ANNOTATION,
    NO_BOX,
    NO_SIZE,
    FaultyFileError,
    ProblemLog,
    unknown_class,
    unknown_split,
)
from refinedet.data.records import BoxRules, DetectionDataset, Layout, ReadRequest, Record, RecordBuilder
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import is_image_name, read_image_size

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element
_RULES = BoxRules(min_side=1.0)
"""Inclusive corners that coincide would be one pixel: a stray click of the annotator, never an object."""


@dataclass(frozen=True)
class VocFolder:
    """One year, or a folder of one's own in the same shape."""

    root: Path
    annotations: Path
    images: Path
    sets: Path

    @property
    def is_year(self) -> bool:
        """Whether it is called VOC2007 or the like."""
        name = self.root.resolve().name
        return name[:3].upper() == "VOC" and name[3:].isdigit()

    @property
    def year(self) -> str:
        """The digits of VOC2007 and the like, else the folder's name."""
        name = self.root.resolve().name
        return name[3:] if self.is_year else name


@dataclass(frozen=True)
class _Object:
    """An object as it stands in the file; ``box`` is already in pixel edges."""

    name: str
    box: tuple[float, float, float, float] | None
    difficult: bool


@dataclass(frozen=True)
class _Annotation:
    path: Path
    filename: str
    size: tuple[int, int] | None
    objects: tuple[_Object, ...]


def find_folders(path: Path) -> list[VocFolder]:
    """VOC folders at ``path``: itself, or the year folders in it (or in a VOCdevkit in it), sorted by name."""
    own = _as_folder(path)
    if own is not None:
        return [own]
    if not path.is_dir():
        return []
    found = [folder for child in sorted(path.iterdir()) if child.is_dir() and (folder := _as_folder(child))]
    if not found and (path / "VOCdevkit").is_dir():
        return find_folders(path / "VOCdevkit")
    return found


def list_splits(path: Path) -> tuple[str, ...]:
    """Splits of any of the folders, sorted. The per-class lists of VOC (``cat_train``) are not among them."""
    names = {name for folder in find_folders(path) for name in _split_files(folder)}
    return tuple(sorted(name for name in names if "_" not in name or name.rsplit("_", 1)[1] not in names))


def read_voc(request: ReadRequest, log: ProblemLog) -> DetectionDataset:
    """Read a VOCdevkit or a VOC folder.

    Without ``class_names`` the classes are those of all annotations of all folders in alphabetical order, so that the
    splits agree; for folders called VOC2007 and the like they are the 20 of VOC if there are no others.

    Where no annotations are required, a split that has not all of them is read without any. VOC 2012 test is such a
    split: it comes with a few XML files, which are for another task.

    Args:
        request: a path for which ``find_folders`` finds something; a split such as "train", "train+val",
            "2007:trainval+2012:trainval", or None for every annotation.
        log: receives the problems.

    Raises:
        UsageError: unknown or empty split.
        RefineDetError: (strict) a file that cannot be used.
    """
    path, split, class_names = request.path, request.split, request.class_names
    folders = find_folders(path)
    if request.require_annotations:
        # Beside annotated years, the pictures of a test set are nobody's concern here.
        folders = [folder for folder in folders if folder.annotations.is_dir()] or folders
    selection = _select(path, folders, split, log)
    if not request.require_annotations:
        if split is None and not any(selection):
            selection = [sorted(_images_by_stem(folder.images)) for folder in folders]
        pairs = list(zip(folders, selection, strict=True))
        if any(not set(stems) <= _annotated_stems(folder) for folder, stems in pairs):
            return _read_pictures(path, split, class_names, pairs, log)
    parsed: dict[Path, _Annotation | None] = {}
    for folder, stems in zip(folders, selection, strict=True):
        wanted = set(stems) if class_names is not None else _annotated_stems(folder)
        for stem in sorted(wanted & _annotated_stems(folder)):
            annotation_path = folder.annotations / f"{stem}.xml"
            try:
                parsed[annotation_path] = _parse(annotation_path)
            except FaultyFileError as error:
                log.fatal(error)
                parsed[annotation_path] = None
    if class_names is None:
        names = {item.name for annotation in parsed.values() if annotation for item in annotation.objects}
        # A year of VOC that is here only in part still has all of VOC's classes; a folder of one's own has what it has.
        of_voc = bool(names) and names.issubset(VOC_CLASSES) and all(folder.is_year for folder in folders)
        classes = VOC_CLASSES if of_voc else tuple(sorted(names))
    else:
        classes = tuple(class_names)
    label_of = {name: label for label, name in enumerate(classes)}

    records: list[Record] = []
    seen: set[str] = set()
    for folder, stems in zip(folders, selection, strict=True):
        images = _images_by_stem(folder.images)
        used: set[Path] = set()
        for stem in stems:
            annotation_path = folder.annotations / f"{stem}.xml"
            try:
                if annotation_path not in parsed:
                    raise FaultyFileError(
                        annotation_path, "no such annotation, but the split lists it; add it or remove it from the list"
                    )
                annotation = parsed[annotation_path]
                if annotation is None:
                    continue  # Already reported.
                # Two folders may use the same stem; detections are filed by image_id, so it must tell them apart.
                image_id = f"{folder.year}_{stem}" if stem in seen else stem
                record = _to_record(annotation, image_id, folder, images, label_of, log)
            except FaultyFileError as error:
                log.fatal(error)
                continue
            seen.add(image_id)
            used.add(record.image_path)
            records.append(record)
        if split is None:
            for stem in sorted(images.keys() - set(stems)):
                for name in images[stem]:
                    if folder.images / name not in used:
                        log.note(folder.images / name, "image has no annotation; left out", NO_ANNOTATION)
    return DetectionDataset(records, classes, "voc", split, path)


def _read_pictures(
    path: Path,
    split: str | None,
    class_names: Sequence[str] | None,
    selection: Sequence[tuple[VocFolder, Sequence[str]]],
    log: ProblemLog,
) -> DetectionDataset:
    """The pictures of a split without looking at annotations."""
    records: list[Record] = []
    seen: set[str] = set()
    for folder, stems in selection:
        images = _images_by_stem(folder.images)
        for stem in stems:
            image_path = folder.images / images.get(stem, [f"{stem}.jpg"])[0]
            try:
                try:
                    size = read_image_size(image_path)
                except RefineDetError as error:
                    raise FaultyFileError(image_path, str(error).removeprefix(f"{image_path}: ")) from None
                image_id = f"{folder.year}_{stem}" if stem in seen else stem
                record = RecordBuilder(image_path, image_id, size, image_path, log).build()
            except FaultyFileError as error:
                log.fatal(error)
                continue
            seen.add(image_id)
            records.append(record)
    classes = VOC_CLASSES if class_names is None else tuple(class_names)
    return DetectionDataset(records, classes, "voc", split, path, annotated=False)


def _as_folder(root: Path) -> VocFolder | None:
    sets = root / "ImageSets" / "Main"
    for folder in (root / "Annotations", root / "annotations"):
        if folder.is_dir() and (sets.is_dir() or any(name.endswith(".xml") for name in _listing(folder))):
            choices = [root / name for name in ("JPEGImages", "images", "Images")]
            images = next((choice for choice in choices if choice.is_dir()), choices[0])
            return VocFolder(root, folder, images, sets)
    if sets.is_dir() and (root / "JPEGImages").is_dir():
        # A test set as it comes from its server.
        return VocFolder(root, root / "Annotations", root / "JPEGImages", sets)
    return None


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None


def _annotated_stems(folder: VocFolder) -> set[str]:
    return {name[:-4] for name in _listing(folder.annotations) if name.endswith(".xml") and not name.startswith(".")}


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    images: dict[str, list[str]] = {}
    for name in sorted(_listing(folder)):
        if is_image_name(name):
            images.setdefault(Path(name).stem, []).append(name)
    return images


def _split_files(folder: VocFolder) -> dict[str, Path]:
    return {name[:-4]: folder.sets / name for name in sorted(_listing(folder.sets)) if name.endswith(".txt")}


def _select(path: Path, folders: Sequence[VocFolder], split: str | None, log: ProblemLog) -> list[list[str]]:
    """Stems to read of each folder."""
    if split is None:
        return [sorted(_annotated_stems(folder)) for folder in folders]
    chosen: list[dict[str, None]] = [{} for _ in folders]  # Dicts, to drop repetitions and keep the order.
    for part in split.split("+"):
        year, _, name = part.strip().rpartition(":")
        year = year[3:] if year[:3].upper() == "VOC" else year
        if year and year not in {folder.year for folder in folders}:
            years = ", ".join(folder.year for folder in folders)
            raise UsageError(f"{path}: no year '{year}' for split '{part.strip()}'; available: {years}")
        found = False
        for stems, folder in zip(chosen, folders, strict=True):
            files = _split_files(folder)
            if name not in files or (year and folder.year != year):
                continue
            found = True
            listed = _read_split(files[name], folder, log)
            if not listed:
                raise UsageError(f"{files[name]}: split '{name}' is empty; list one image per line")
            stems.update(dict.fromkeys(listed))
        if not found:
            raise unknown_split(path, part.strip(), list_splits(path))
    return [list(stems) for stems in chosen]


def _read_split(path: Path, folder: VocFolder, log: ProblemLog) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefineDetError(f"{path}: cannot be read ({error})") from None
    annotated = _annotated_stems(folder)
    stems: dict[str, None] = {}
    for line in lines:
        stem = line.strip()
        if stem not in annotated and stem.endswith((" -1", " 0", " 1")):
            # Per-class lists carry a second column: 1 present, 0 only difficult ones, -1 absent.
            stem, _, flag = stem.rpartition(" ")
            stem = "" if flag == "-1" else stem.strip()
        if not stem:
            continue
        if stem not in annotated and is_image_name(stem):
            stem = Path(stem).stem
        if stem in stems:
            log.note(path, f"'{stem}' is listed twice; read once", LISTED_TWICE)
        stems[stem] = None
    return list(stems)


def _parse(path: Path) -> _Annotation:
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise FaultyFileError(path, f"cannot be read ({error.strerror})") from None
    except DefusedXmlException:
        raise FaultyFileError(
            path,
            "XML declares entities, which are refused because they can exhaust memory or read other files; "
            "remove its DOCTYPE",
        ) from None
    except (ParseError, ValueError, LookupError) as error:
        raise FaultyFileError(path, f"not well-formed XML ({error}); it may be cut off: restore it") from None
    if root.tag != "annotation":
        raise FaultyFileError(path, f"not a VOC annotation: its root is <{root.tag}>, not <annotation>")
    # Only direct children: the parts of a person (head, hand, foot) are objects of another task.
    objects = tuple(_parse_object(path, index, item) for index, item in enumerate(root.findall("object"), start=1))
    filename = (root.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    return _Annotation(path, filename, _parse_size(root), objects)


def _parse_size(root: Element) -> tuple[int, int] | None:
    """(width, height), or None where the file gives none that can be true."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _parse_object(path: Path, index: int, item: Element) -> _Object:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise FaultyFileError(path, f"object {index} has no class name; add its <name>")
    difficult = (item.findtext("difficult") or "0").strip().lower() in ("1", "true")
    bndbox = item.find("bndbox")
    if bndbox is None:
        return _Object(name, None, difficult)
    corners = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = (bndbox.findtext(corner) or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise FaultyFileError(path, f"object {index} ({name}): <{corner}> is '{text}', not a number")
        corners.append(value)
    return _Object(name, (corners[0] - 1, corners[1] - 1, corners[2], corners[3]), difficult)


def _to_record(
    annotation: _Annotation,
    image_id: str,
    folder: VocFolder,
    images: dict[str, list[str]],
    label_of: dict[str, int],
    log: ProblemLog,
) -> Record:
    path = annotation.path
    for index, item in enumerate(annotation.objects, start=1):
        if item.name not in label_of:
            raise unknown_class(path, item.name, tuple(label_of), where=f"object {index}: ")
    image_path = folder.images / _find_image(annotation, folder, images, log)
    size = annotation.size
    if size is None:
        try:
            size = read_image_size(image_path)
        except RefineDetError as error:
            raise FaultyFileError(path, f"gives no image size, and {error}") from None
        log.note(path, f"gives no image size; {size[0]}x{size[1]} taken from {image_path.name}", NO_SIZE)
    builder = RecordBuilder(image_path, image_id, size, path, log, _RULES)
    for index, item in enumerate(annotation.objects, start=1):
        if item.box is None:
            log.note(path, f"object {index} ({item.name}) has no <bndbox>; dropped", NO_BOX)
        else:
            builder.add(item.box, label_of[item.name], partial(_describe, index, item), difficult=item.difficult)
    return builder.build()


def _describe(index: int, item: _Object) -> str:
    """The object as it stands in the file."""
    assert item.box is not None
    x1, y1, x2, y2 = item.box
    return f"object {index} ({item.name}): box xmin={x1 + 1:g} ymin={y1 + 1:g} xmax={x2:g} ymax={y2:g}"


def _find_image(annotation: _Annotation, folder: VocFolder, images: dict[str, list[str]], log: ProblemLog) -> str:
    """File name of the annotation's picture: that of the same stem, as the devkit has it, else what <filename> says."""
    stem, filename = annotation.path.stem, annotation.filename
    candidates = images.get(stem, [])
    if filename in candidates:
        return filename
    if candidates:
        said = Path(filename).stem if is_image_name(filename) else filename
        if filename and said != stem:
            log.note(
                annotation.path,
                f"<filename> is '{filename}'; {candidates[0]} is used, which has the same stem",
                NAME_DIFFERS,
            )
        return candidates[0]
    if filename and filename in images.get(Path(filename).stem, []):
        log.note(
            annotation.path, f"no image has the stem '{stem}'; {filename} is used, as <filename> says", NAME_DIFFERS
        )
        return filename
    raise FaultyFileError(
        annotation.path,
        f"its image is missing: no {stem}.jpg, .jpeg or .png in {folder.images}; restore the image or "
        "remove it from the split",
    )


def _recognises(path: Path) -> bool:
    return bool(find_folders(path))


LAYOUT = Layout(
    name="voc",
    evidence="Annotations/*.xml",
    recognises=_recognises,
    splits=list_splits,
    read=read_voc,
    server="voc",
)
