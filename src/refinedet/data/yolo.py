"""YOLO folders: data.yaml, images/.../a.jpg with labels/.../a.txt.

A line of a label file is ``class cx cy width height``, relative to the picture, or ``class x1 y1 x2 y2 x3 y3 ...``, a
polygon, of which the bounding box is taken. A picture without a label file has no objects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from refinedet.data.problems import FaultyFileError, ProblemLog, unknown_class
from refinedet.data.records import BoxRules, DetectionDataset, Layout, ReadRequest, Record, RecordBuilder
from refinedet.data.splits import choose_split
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import is_image_name, read_image_size

_SPLIT_KEYS = ("train", "val", "test")
_USUAL_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_RULES = BoxRules(tolerance=0.5)
"""Numbers are rounded when written, so boxes may reach outside their image by half a pixel without a word."""


def find_yaml(path: Path) -> Path | None:
    """The file that describes a YOLO data set: ``path`` itself, its data.yaml, or the only YAML file with splits."""
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    for name in _USUAL_NAMES:
        if (path / name).is_file():
            return path / name
    found = []
    for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]):
        try:
            document = _read_yaml(file)
        except RefineDetError:
            continue
        if "names" in document and any(key in document for key in _SPLIT_KEYS):
            found.append(file)
    return found[0] if len(found) == 1 else None


def list_splits(path: Path) -> tuple[str, ...]:
    """Keys of data.yaml that name pictures, in the order train, val, test."""
    file = _yaml_of(path)
    return _splits(_read_yaml(file))


def read_yolo(request: ReadRequest, log: ProblemLog) -> DetectionDataset:
    """Read a YOLO folder.

    Args:
        request: a folder with data.yaml, or that file; a split "train", "val" or "test", several joined by "+", or None
            for all; class names in label order, by default those of data.yaml in its order. With given names the class
            numbers of the label files are translated through the names of data.yaml.
        log: receives the problems.

    Raises:
        UsageError: unknown split, a folder of data.yaml that does not exist.
        RefineDetError: data.yaml cannot be used; (strict) another file that cannot be used.
    """
    path, split, class_names = request.path, request.split, request.class_names
    file = _yaml_of(path)
    document = _read_yaml(file)
    own_names = _names(file, document)
    classes = tuple(class_names) if class_names is not None else own_names
    label_of = {name: label for label, name in enumerate(classes)}
    available = _splits(document)
    images: dict[Path, None] = {}
    for part in available if split is None else [part.strip() for part in split.split("+")]:
        key = choose_split(file, part, available)
        found = _images_of(file, document, key, log)
        if not found and split is not None:
            raise UsageError(f"{file}: split '{part}' has no images")
        images.update(dict.fromkeys(found))
    labels = {image: _label_path(image) for image in images}
    folders = {label.parent for label in labels.values()}
    if images and not any(folder.is_dir() for folder in folders):
        # Each picture alone may do without a label file, but all of them together have lost theirs.
        first = min(folders)
        raise RefineDetError(f"{file}: none of its images has labels; expected them in {first}")
    records: list[Record] = []
    seen: set[str] = set()
    for image, label_path in labels.items():
        # Folders may share stems; detections are filed by image_id, so it must tell them apart.
        image_id = image.stem if image.stem not in seen else image.with_suffix("").as_posix()
        seen.add(image_id)
        try:
            records.append(_to_record(image, image_id, label_path, own_names, label_of, log))
        except FaultyFileError as error:
            log.fatal(error)
    return DetectionDataset(records, classes, "yolo", split, path)


def _yaml_of(path: Path) -> Path:
    file = find_yaml(path)
    if file is None:
        raise UsageError(f"{path}: no data.yaml")
    return file


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise RefineDetError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RefineDetError(f"{file}: not valid YAML ({reason})") from None
    if not isinstance(document, dict):
        raise RefineDetError(f"{file}: not a YOLO data.yaml: it needs the keys 'train', 'val' and 'names'")
    return document


def _splits(document: dict[str, Any]) -> tuple[str, ...]:
    return tuple(key for key in _SPLIT_KEYS if document.get(key))


def _names(file: Path, document: dict[str, Any]) -> tuple[str, ...]:
    listed = document.get("names")
    if isinstance(listed, dict):
        if sorted(listed, key=str) != sorted(range(len(listed)), key=str):
            raise RefineDetError(f"{file}: the keys of 'names' must be 0, 1, 2, ... without gaps")
        listed = [listed[index] for index in range(len(listed))]
    if not isinstance(listed, list) or not listed:
        raise RefineDetError(f"{file}: 'names' must be the list of class names")
    if not all(isinstance(name, (str, int, float)) and not isinstance(name, bool) for name in listed):
        raise RefineDetError(f"{file}: every name in 'names' must be a text; put quotes around names such as \"no\"")
    names = tuple(str(name) for name in listed)
    if len(set(names)) != len(names):
        raise RefineDetError(f"{file}: 'names' has a name twice")
    count = document.get("nc")
    if isinstance(count, int) and count != len(names):
        raise RefineDetError(f"{file}: 'nc' is {count}, but 'names' has {len(names)} names")
    return names


def _images_of(file: Path, document: dict[str, Any], key: str, log: ProblemLog) -> list[Path]:
    entries = document[key]
    if isinstance(entries, str):
        entries = [entries]
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise RefineDetError(f"{file}: '{key}' must be a folder, a .txt file, or a list of those")
    images: dict[Path, None] = {}
    for entry in entries:
        place = _resolve(file, document, entry)
        if place is None:
            raise UsageError(f"{file}: '{key}' names {entry}, which does not exist; correct it or the key 'path'")
        if place.is_dir():
            images.update(dict.fromkeys(_walk(place)))
        elif place.suffix.lower() == ".txt":
            images.update(dict.fromkeys(_read_list(place, log)))
        else:
            raise UsageError(f"{file}: '{key}' names {entry}, which is neither a folder nor a .txt file")
    return list(images)


def _resolve(file: Path, document: dict[str, Any], entry: str) -> Path | None:
    """The place that an entry means: below 'path', or beside data.yaml, where exported data sets keep it."""
    here = file.parent
    root = document.get("path")
    candidates = [here / entry]
    if isinstance(root, str) and root:
        candidates = (
            [Path(root).expanduser() / entry, *candidates]
            if Path(root).is_absolute()
            else [here / root / entry, *candidates]
        )
    # Roboflow writes "../train/images" for a folder beside data.yaml.
    stripped = entry
    while stripped.startswith("../"):
        stripped = stripped[3:]
    candidates.append(here / stripped)
    return next((Path(os.path.normpath(place)) for place in candidates if place.exists()), None)


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, _, names in os.walk(folder):
        found.extend(Path(parent) / name for name in names if is_image_name(name))
    return sorted(found)


def _read_list(file: Path, log: ProblemLog) -> list[Path]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefineDetError(f"{file}: cannot be read ({error})") from None
    images = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image = file.parent / line.strip()
        if image.is_file():
            images.append(Path(os.path.normpath(image)))
        else:
            log.fatal(FaultyFileError(file, f"line {number} names {line.strip()}, which does not exist"))
    return images


def _label_path(image: Path) -> Path:
    """The last folder named "images" becomes "labels"; without one, the label file lies beside its picture."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _to_record(
    image: Path, image_id: str, label_path: Path, own_names: Sequence[str], label_of: dict[str, int], log: ProblemLog
) -> Record:
    try:
        width, height = read_image_size(image)
    except RefineDetError as error:
        raise FaultyFileError(image, str(error).removeprefix(f"{image}: ")) from None
    try:
        text = label_path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise FaultyFileError(label_path, f"cannot be read ({error})") from None
    builder = RecordBuilder(image, image_id, (width, height), label_path, log, _RULES)
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        index, (x1, y1, x2, y2) = _parse_line(label_path, number, fields)
        if not 0 <= index < len(own_names):
            raise FaultyFileError(
                label_path,
                f"line {number}: class {index} is out of range; data.yaml has {len(own_names)} names, so 0 to "
                f"{len(own_names) - 1}",
            )
        name = own_names[index]
        if name not in label_of:
            raise unknown_class(label_path, name, tuple(label_of), where=f"line {number}: ")
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        builder.add(box, label_of[name], partial(_describe, number, name, box))
    return builder.build()


def _describe(number: int, name: str, box: tuple[float, float, float, float]) -> str:
    """The line of the label file, with its box in pixels."""
    x1, y1, x2, y2 = box
    return f"line {number} ({name}): box {x1:g},{y1:g},{x2:g},{y2:g}"


def _parse_line(path: Path, number: int, fields: Sequence[str]) -> tuple[int, tuple[float, float, float, float]]:
    """Class number and relative xyxy box of a line."""
    try:
        values = [float(field) for field in fields]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        raise FaultyFileError(path, f"line {number}: '{' '.join(fields)[:60]}' is not a row of numbers")
    if values[0] != int(values[0]):
        raise FaultyFileError(path, f"line {number}: class must be a whole number, not {fields[0]}")
    index, rest = int(values[0]), values[1:]
    if len(rest) == 4:
        cx, cy, width, height = rest
        return index, (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    if len(rest) >= 6 and len(rest) % 2 == 0:
        return index, (min(rest[::2]), min(rest[1::2]), max(rest[::2]), max(rest[1::2]))
    raise FaultyFileError(
        path,
        f"line {number} has {len(fields)} numbers; expected 5 (class cx cy width height), or the class and the "
        "corners of a polygon",
    )


def _recognises(path: Path) -> bool:
    return find_yaml(path) is not None


LAYOUT = Layout(
    name="yolo",
    evidence="data.yaml",
    recognises=_recognises,
    splits=list_splits,
    read=read_yolo,
)
