"""The tables of a COCO file: the document itself, its ids, and its categories."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinedet.data.classes import fault_of_name
from refinedet.data.problems import short_repr
from refinedet.errors import RefineDetError
from refinedet.files import read_json

Document = dict[str, list[dict[str, Any]]]
IMAGES_ONLY = "image_info_"
"""Start of the names of files that list images whose annotations the server keeps to itself."""
_LARGEST_ID = 2**63 - 1
_LARGEST_SIDE = 1_000_000


def as_id(value: object) -> int | str | None:
    """An id as an integer where it is one, in whatever type it was written; another text as it is; None if no id."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return value if -_LARGEST_ID <= value <= _LARGEST_ID else None
    if not isinstance(value, str) or not value.strip() or len(value) > 200:
        return None
    # Digits that a file writes with leading zeros ("000042") are a name, not a number.
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 and str(int(value)) == value else value


def as_side(value: object) -> int | None:
    """Width or height of an image in pixels, in whatever type it was written; None if it cannot be one."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= _LARGEST_SIDE:
        return None
    return int(value) if value == int(value) else None


def read_document(file: Path) -> Document:
    """A COCO file; "annotations" may be missing in a list of images only.

    Raises:
        RefineDetError: it cannot be read, is no JSON, or has not the three tables.
    """
    document = read_json(file)
    for key in ("images", "annotations", "categories"):
        values = document.get(key) if isinstance(document, dict) else None
        if key == "annotations" and "annotations" not in document and file.name.startswith(IMAGES_ONLY):
            continue
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise RefineDetError(f"{file}: not a COCO instances file: it needs a list of objects named '{key}'")
    return document  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Categories:
    """The categories of a file that are classes."""

    names: dict[int, str]
    """Category id -> name. Ids that are texts are replaced by 1..C in the order of the file."""
    number_of: dict[int | str, int]
    """Id as it stands in annotations (by ``as_id``) -> category id."""

    def labels(self, class_names: Sequence[str] | None) -> tuple[dict[int | str, int], tuple[int, ...]]:
        """(id as it stands in annotations -> label, category id of each label).

        Args:
            class_names: names in label order; one that the file lacks gets an unused id. None takes all categories by
                ascending id.
        """
        if class_names is None:
            ordered = sorted(self.names)
        else:
            id_of = {name: number for number, name in self.names.items()}
            unused = max(self.names, default=0)
            ordered = []
            for name in class_names:
                if name not in id_of:
                    unused += 1
                ordered.append(id_of.get(name, unused))
        label_of = {number: label for label, number in enumerate(ordered)}
        known = {raw: label_of[number] for raw, number in self.number_of.items() if number in label_of}
        return known, tuple(ordered)


def read_categories(file: Path, document: Document, others: Iterable[Path]) -> Categories:
    """The categories of a document.

    Some exports put a root above the classes, as category 0 with the supercategory "none". It is a class only if an
    annotation of this file or of one of the others, which are the further splits of the same data, uses it.

    Raises:
        RefineDetError: an entry without a usable id and name, or two entries with the same.
    """
    names: dict[int | str, str] = {}
    for entry in document["categories"]:
        key, name = as_id(entry.get("id")), entry.get("name")
        if key is None or not isinstance(name, str):
            raise RefineDetError(
                f"{file}: category {short_repr(entry)} needs an 'id', a whole number or a text, and a 'name'"
            )
        fault = fault_of_name(name)
        if fault is not None:
            raise RefineDetError(f"{file}: category {short_repr(key)}: its name, {short_repr(name)}, {fault}")
        if key in names:
            raise RefineDetError(f"{file}: category {key} ('{name}') is listed twice; ids and names must be different")
        names[key] = name
    root = _root(document["categories"])
    twin = None
    if root is not None:
        # A root that has the name of one of the classes is that class.
        twin = next((key for key, name in names.items() if key != root and name == names[root]), None)
        if twin is not None or not any(_uses(table, root) for table in _tables(document, others)):
            del names[root]
    key_of = {name: key for key, name in names.items()}
    for key, name in names.items():
        if key_of[name] != key:
            raise RefineDetError(
                f"{file}: category {key_of[name]} ('{name}') is listed twice; ids and names must be different"
            )
    texts = any(isinstance(key, str) for key in names)
    number_of = {key: place if texts else int(key) for place, key in enumerate(names, start=1)}
    categories = {number_of[key]: name for key, name in names.items()}
    if root is not None and twin is not None:
        number_of[root] = number_of[twin]
    return Categories(categories, number_of)


def _root(entries: Sequence[dict[str, Any]]) -> int | None:
    """The id of the category above all others, if there is one."""
    root = next((entry for entry in entries if as_id(entry.get("id")) == 0), None)
    if root is None or len(entries) < 2 or root.get("supercategory") != "none":
        return None
    below = all(entry.get("supercategory") == root.get("name") for entry in entries if entry is not root)
    return 0 if below else None


def _tables(document: Document, others: Iterable[Path]) -> Iterator[Document]:
    yield document
    for file in others:
        with contextlib.suppress(RefineDetError):  # A file that cannot be read is reported when it is read itself.
            yield read_document(file)


def _uses(document: Document, category: int) -> bool:
    return any(as_id(entry.get("category_id")) == category for entry in document.get("annotations", []))
