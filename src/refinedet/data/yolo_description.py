"""What describes a YOLO dataset: data.yaml, Darknet's obj.data, or a file with a class name on each line.

All three become one ``Description``. YAML is read as texts only: a class may be called no, 1.0 or 2024-01-01, tags have
no effect, and aliases and merge keys cost nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refinedet.data.classes import fault_of_name
from refinedet.data.image_paths import is_really_below
from refinedet.data.pairing import SPLIT_FOLDERS
from refinedet.data.problems import short_repr
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import is_image_name

SPLITS = ("train", "val", "test")
_USUAL_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_FILES = ("obj.names", "classes.names", "classes.txt", "predefined_classes.txt")
"""Files with a class name on each line."""
_LISTS = {"train.txt": "train", "val.txt": "val", "valid.txt": "val", "test.txt": "test"}
"""Lists of images beside a file of class names, by split."""
_LARGEST_FILE = 1_000_000
"""Bytes of a file that describes a dataset; the names of 20,000 classes are smaller."""
_NOTHING = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Description:
    """What the describing file says; its entries are not yet looked up."""

    file: Path
    """The file."""
    folder: Path
    """The folder of the data, at which relative entries start."""
    document: dict[str, Any]
    """Its keys in lower case, with texts, lists and dicts of texts."""

    @property
    def root(self) -> Path:
        """The folder that the key ``path`` names, whether it is there or not; else ``folder``."""
        path = self.document.get("path")
        if not isinstance(path, str) or path in _NOTHING or not _can_be_path(path):
            return self.folder
        root = Path(os.path.abspath(self.folder / os.path.expanduser(path)))
        # The root of the file system is no folder of data.
        return self.folder if root == Path(root.anchor) else root

    def splits(self) -> dict[str, list[str]]:
        """Split -> folders and list files that it names, as written.

        Raises:
            RefineDetError: an entry that is neither.
        """
        entries: dict[str, list[str]] = {}
        for split, keys in (("train", ("train",)), ("val", ("val", "valid", "validation")), ("test", ("test",))):
            listed = next((self.document[key] for key in keys if self.document.get(key)), None)
            listed = [listed] if isinstance(listed, str) else listed
            if listed is None or listed in [[nothing] for nothing in _NOTHING]:
                continue
            if not isinstance(listed, list) or not all(isinstance(entry, str) and entry for entry in listed):
                raise RefineDetError(f"{self.file}: '{split}' must be a folder, a .txt file, or a list of those")
            entries[split] = listed
        return entries

    def class_names(self) -> tuple[str, ...]:
        """The names in the order of their numbers.

        Raises:
            RefineDetError: they are missing, incomplete, repeated, or not texts of one line.
        """
        listed = self.document.get("names")
        if isinstance(listed, dict):
            by_number = {int(key): name for key, name in listed.items() if key.isascii() and key.isdigit()}
            if len(by_number) < len(listed) or set(by_number) != set(range(len(listed))):
                raise RefineDetError(f"{self.file}: the keys of 'names' must be 0, 1, 2, ... without gaps")
            listed = [by_number[number] for number in range(len(by_number))]
        if not isinstance(listed, list) or not listed:
            raise RefineDetError(f"{self.file}: 'names' must be the list of class names")
        for name in listed:
            if not isinstance(name, str):
                raise RefineDetError(f"{self.file}: every name in 'names' must be a text, not {short_repr(name)}")
            fault = fault_of_name(name)
            if fault is not None:
                raise RefineDetError(f"{self.file}: 'names': the name {short_repr(name)} {fault}")
        if len(set(listed)) != len(listed):
            raise RefineDetError(f"{self.file}: 'names' has a name twice")
        count = self.document.get("nc")
        if isinstance(count, str) and count not in _NOTHING and count.strip() != str(len(listed)):
            raise RefineDetError(f"{self.file}: 'nc' is {short_repr(count)[1:-1]}, but 'names' has {len(listed)} names")
        return tuple(listed)

    def keypoint_numbers(self) -> int:
        """How many numbers follow the box in a row, for the keypoints of an object; 0 if there are none.

        Raises:
            RefineDetError: ``kpt_shape`` is not the number of points and the numbers of each.
        """
        shape = self.document.get("kpt_shape")
        if shape is None or shape in _NOTHING:
            return 0
        numbers = [int(text) for text in shape if _is_small(text)] if isinstance(shape, list) else []
        if len(numbers) != 2 or numbers[0] < 1 or numbers[1] not in (2, 3):
            raise RefineDetError(
                f"{self.file}: 'kpt_shape' must be [number of points, 2 or 3], not {short_repr(shape)}"
            )
        return numbers[0] * numbers[1]


def find_description(path: Path) -> Path | None:
    """The file that describes a YOLO dataset for sure: ``path`` itself, its data.yaml, or the only one with splits."""
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") or _is_darknet(path) else None
    for name in _USUAL_NAMES:
        if (path / name).is_file():
            return path / name
    candidates = []
    for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]):
        try:
            document = read_description(file).document
        except RefineDetError:
            continue
        if "names" in document and any(key in document for key in SPLITS):
            candidates.append(file)
    candidates = candidates or [file for file in sorted(path.glob("*.data")) if _is_darknet(file)]
    return candidates[0] if len(candidates) == 1 else None


def find_names_file(path: Path) -> Path | None:
    """A file with a class name on each line, in the folder or where its labels or images are; None if there is none.

    Raises:
        RefineDetError: two such files differ.
    """
    if path.is_file():
        return None
    files = [folder / name for folder in _near_folders(path) for name in NAME_FILES if (folder / name).is_file()]
    if not files:
        return None
    first = _read_names(files[0], path)
    for other in files[1:]:
        if _read_names(other, path) != first:
            raise RefineDetError(f"{other}: its class names differ from those of {files[0]}; remove one of the two")
    return files[0]


def _near_folders(path: Path) -> Iterator[Path]:
    """The folder, its subfolders, and what these have by the name of a split, labels or images."""
    yield path
    try:
        below = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return
    for folder in below:
        yield folder
        for name in (*sorted(SPLIT_FOLDERS), "labels", "images"):
            if (folder / name).is_dir():
                yield folder / name


def describe(path: Path) -> Description:
    """The description of a dataset that ``find_description`` or ``find_names_file`` recognises.

    Raises:
        UsageError: nothing describes it.
        RefineDetError: the file cannot be used.
    """
    file = find_description(path)
    if file is not None:
        return read_description(file)
    file = find_names_file(path)
    if file is None:
        raise UsageError(f"{path}: no data.yaml")
    # The file may lie among labels or images; the data is what was opened.
    lists = {split: name for name, split in _LISTS.items() if (path / name).is_file() and not _is_label(path / name)}
    return Description(file, path, {"names": _read_names(file, path), **lists})


def _is_label(file: Path) -> bool:
    """Whether a file named as a list of images is the label file of an image of that name."""
    return any(is_image_name(other.name) for other in file.parent.glob(f"{file.stem}.*"))


def read_description(file: Path) -> Description:
    """Read data.yaml or obj.data.

    Raises:
        RefineDetError: it cannot be read, is too large, not UTF-8, or no such file.
    """
    if _is_darknet(file):
        return Description(file, file.parent, _read_darknet(file))
    text = _read_text(file)
    try:
        document = yaml.load(text, Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        problem = " ".join(str(error.problem).split())
        advice = "; indent with spaces, not with tabs" if "\\t" in problem else ""
        raise RefineDetError(f"{file}: not valid YAML ({line}{problem}{advice})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise RefineDetError(f"{file}: not valid YAML ({reason})") from None
    if not isinstance(document, dict):
        raise RefineDetError(f"{file}: not a YOLO data.yaml: it needs the keys 'train', 'val' and 'names'")
    keys = {key.lower(): value for key, value in document.items() if isinstance(key, str)}
    return Description(file, file.parent, keys)


class _TextLoader(yaml.BaseLoader):
    """Makes texts, lists and dicts of texts, whatever the tags say, and refuses tags that ask for Python objects."""


def _refuse_tag(loader: yaml.BaseLoader, suffix: str, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag[:80]} is refused", node.start_mark)


for _prefix in ("!", "tag:yaml.org,2002:python"):
    _TextLoader.add_multi_constructor(_prefix, _refuse_tag)


def _read_text(file: Path) -> str:
    if file.exists() and not file.is_file():
        raise RefineDetError(f"{file}: not a regular file")  # opening a pipe would wait for its writer
    try:
        with file.open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise RefineDetError(f"{file}: cannot be read ({error.strerror})") from None
    if len(data) > _LARGEST_FILE:
        raise RefineDetError(f"{file}: larger than {_LARGEST_FILE} bytes, so it does not describe a dataset")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RefineDetError(f"{file}: not UTF-8 text (line {line}); save it with that encoding") from None


def _is_darknet(file: Path) -> bool:
    """Whether a file is Darknet's: lines such as ``names = data/obj.names``."""
    if file.suffix.lower() != ".data" or not file.is_file():
        return False
    try:
        return re.search(r"^\s*names\s*=", _read_text(file), re.MULTILINE) is not None
    except RefineDetError:
        return False


def _read_darknet(file: Path) -> dict[str, Any]:
    pairs = (line.partition("=") for line in _read_text(file).splitlines() if "=" in line)
    values = {key.strip().lower(): value.strip() for key, _, value in pairs}
    document: dict[str, Any] = {key: values[key] for key in ("train", "valid", "test") if values.get(key)}
    stated = Path(values["names"].replace("\\", "/"))
    # Paths start at the folder of the program that wrote them; the file itself lies beside this one.
    for place in (file.parent / stated, file.parent / stated.name):
        if _can_be_path(str(place)) and place.is_file():
            return {**document, "names": _read_names(place, file.parent), "nc": values.get("classes", "")}
    raise RefineDetError(f"{file}: 'names' is {short_repr(values['names'])}, which is not there; correct it")


def _read_names(file: Path, folder: Path) -> list[str]:
    if not is_really_below(file, folder):
        # Names are shown in tables and messages, where nothing from elsewhere belongs.
        raise RefineDetError(f"{file}: the class names lie outside {folder}; copy the file there")
    names = [line.strip() for line in _read_text(file).splitlines()]
    while names and not names[-1]:
        names.pop()
    return names


def _can_be_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return "\0" not in text and len(text) < 4096


def _is_small(text: object) -> bool:
    return isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 5
