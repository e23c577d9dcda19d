"""One PASCAL VOC annotation file: its size, its image's name, and its objects as corners.

XML is read through defusedxml, which refuses entities instead of expanding them.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from refinedet.data.classes import fault_of_name
from refinedet.data.problems import NO_BOX, ODD_VALUE, SECOND_BOX, FaultyFileError, ProblemKind
from refinedet.text import cut

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_LARGEST_FILE = 64_000_000
"""Bytes; an annotation of ten thousand objects has about three million."""
_LARGEST_SIDE = 1_000_000
"""Pixels; an image file cannot be wider or higher than that in practice."""
_DECLARATION = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:\- ]{1,40})["'][^>]{0,200}\?>""")
_ODD_CODECS = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7"})
"""Codecs of Python that are no encoding of a file, or that take long on purpose-made input."""
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950", "shift_jis": "cp932", "euc_kr": "cp949"}
"""Encodings that files declare although they use the letters of a larger one, which reads all of the smaller."""
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class VocObject:
    """An object as it stands in the file."""

    index: int
    """Which of the file's objects it is, from 1."""
    name: str
    """Class name; white space within it is a single space."""
    corners: Corners
    """xmin, ymin, xmax, ymax, 1-based with the last pixel included."""
    difficult: bool

    @property
    def box(self) -> Corners:
        """(x1, y1, x2, y2), pixel edges."""
        xmin, ymin, xmax, ymax = self.corners
        return xmin - 1, ymin - 1, xmax, ymax

    def describe(self) -> str:
        """The object in words, for messages."""
        xmin, ymin, xmax, ymax = self.corners
        return f"object {self.index} ({self.name}): box xmin={xmin:g} ymin={ymin:g} xmax={xmax:g} ymax={ymax:g}"


@dataclass(frozen=True)
class VocAnnotation:
    """What an annotation file says."""

    path: Path
    filename: str
    """Last part of <filename>, possibly empty."""
    size: tuple[int, int] | None
    """(width, height), or None where the file gives none that can be true."""
    objects: list[VocObject] = field(default_factory=list)
    """Those that have a box."""
    names: dict[int, str] = field(default_factory=dict)
    """Class name of every object by its index, those without a box included."""
    notes: list[tuple[str, ProblemKind]] = field(default_factory=list)
    """What was repaired."""


def parse_annotation(path: Path) -> VocAnnotation:
    """Read an annotation file.

    Raises:
        FaultyFileError: unreadable, no XML, no annotation, or an object whose class or corners cannot be read.
    """
    root = _read_xml(path)
    if root.tag != "annotation":
        raise FaultyFileError(path, "not a VOC annotation: its outermost element is not <annotation>")
    filename = (root.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    annotation = VocAnnotation(path, filename, _parse_size(root))
    # Only direct children: the parts of a person (head, hand, foot) are objects of another task.
    for index, item in enumerate(root.findall("object"), start=1):
        _parse_object(annotation, index, item)
    return annotation


def is_annotation(path: Path) -> bool:
    """Whether the beginning of an XML file looks like an annotation."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as stream:
            head = stream.read(2000)
    except OSError:
        return False
    return b"<annotation" in head.replace(b"\0", b"")  # UTF-16 has a zero beside each letter


def _read_xml(path: Path) -> Element:
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise FaultyFileError(path, f"cannot be read ({error.strerror})") from None
    if len(data) > _LARGEST_FILE:
        raise FaultyFileError(path, f"larger than {_LARGEST_FILE // 1_000_000} MB, which no annotation is")
    try:
        try:
            return ElementTree.fromstring(data)
        except (LookupError, ValueError, ParseError) as error:
            text = _decode(path, data)
            if text is None:
                raise error from None
            return ElementTree.fromstring(text)
    except DefusedXmlException:
        raise FaultyFileError(
            path,
            "XML declares entities, which are refused because they can exhaust memory or read other files; "
            "remove its DOCTYPE",
        ) from None
    except (ParseError, ValueError, LookupError) as error:
        if _DECLARATION.match(data) is None and not data.startswith((b"\xff\xfe", b"\xfe\xff")) and not _is_utf8(data):
            reason = "it is not UTF-8 and declares no encoding: save it as UTF-8 or restore it"
        else:
            reason = f"{error}; it may be cut off: restore it"
        raise FaultyFileError(path, f"not well-formed XML ({reason})") from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decode(path: Path, data: bytes) -> str | None:
    """The text by the encoding that the file declares and Python knows; None if it declares none.

    The XML parser itself knows few: not gb2312, and not the name "utf8".
    """
    declared = _DECLARATION.match(data)
    if declared is None:
        return None
    name = declared[1].decode("ascii").strip()
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        codec = ""
    if not codec or codec in _ODD_CODECS:
        raise FaultyFileError(path, f"declares the encoding '{name}', which is unknown; save it as UTF-8")
    try:
        text = data.decode(_SUPERSETS.get(codec, codec))
    except LookupError:  # a codec from bytes to bytes, such as base64
        raise FaultyFileError(path, f"declares the encoding '{name}', which is unknown; save it as UTF-8") from None
    except ValueError:
        raise FaultyFileError(
            path, f"is not text in the encoding '{name}' that it declares; save it as UTF-8 and declare that"
        ) from None
    return re.sub(r"^\ufeff?\s*<\?xml.*?\?>", "", text, count=1)


def _parse_size(root: Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if 0 < width <= _LARGEST_SIDE and 0 < height <= _LARGEST_SIDE else None


def _parse_object(annotation: VocAnnotation, index: int, item: Element) -> None:
    """Add the boxes of an <object> to the annotation."""
    name = clean_name(item.findtext("name") or "")
    if not name:
        raise FaultyFileError(annotation.path, f"object {index} has no class name; add its <name>")
    fault = fault_of_name(name)
    if fault is not None:
        raise FaultyFileError(annotation.path, f"object {index}: its name {fault}")
    annotation.names[index] = name
    difficult = _parse_flag(annotation, index, item)
    boxes = []
    elements = item.findall("bndbox")
    for element in elements:
        if len(element) or (element.text or "").strip() or len(elements) == 1:
            boxes.append(_parse_corners(annotation.path, f"object {index} ({name})", element))
    if not boxes:
        around = _parse_outline(annotation.path, f"object {index} ({name})", item)
        if around is None:
            annotation.notes.append((f"object {index} ({name}) has no <bndbox>; dropped", NO_BOX))
            return
        boxes.append(around)
    if len(boxes) > 1:
        message = f"object {index} ({name}) has {len(boxes)} <bndbox>; each is read as an object"
        annotation.notes.append((message, SECOND_BOX))
    elif len(elements) > 1:
        annotation.notes.append((f"object {index} ({name}) has a second <bndbox>, which is empty", SECOND_BOX))
    annotation.objects.extend(VocObject(index, name, corners, difficult) for corners in boxes)


def clean_name(text: str) -> str:
    """A class name on one line: white space and control characters become single spaces."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _parse_flag(annotation: VocAnnotation, index: int, item: Element) -> bool:
    """Whether the object is difficult."""
    text = (item.findtext("difficult") or "0").strip().lower()
    if text in ("true", "yes", "false", "no", ""):
        return text in ("true", "yes")
    try:
        return float(text) != 0
    except ValueError:
        message = f"object {index}: <difficult> is neither 0 nor 1; taken for 0"
        annotation.notes.append((message, ODD_VALUE))
        return False


def _parse_corners(path: Path, where: str, element: Element) -> Corners:
    xmin, ymin, xmax, ymax = (_number(path, where, element, corner) for corner in _CORNERS)
    return xmin, ymin, xmax, ymax


def _parse_outline(path: Path, where: str, item: Element) -> Corners | None:
    """The corners around a <polygon> or a turned box (<robndbox>, angle in radians); None if there is neither."""
    polygon = item.find("polygon")
    if polygon is not None:
        xs, ys = (list(_polygon_numbers(path, where, polygon, axis)) for axis in ("x", "y"))
        if xs and len(xs) == len(ys):
            return min(xs), min(ys), max(xs), max(ys)
    turned = item.find("robndbox")
    if turned is None:
        return None
    cx, cy, width, height, angle = (_number(path, where, turned, tag) for tag in ("cx", "cy", "w", "h", "angle"))
    sine, cosine = abs(math.sin(angle)), abs(math.cos(angle))
    half_width, half_height = (width * cosine + height * sine) / 2, (width * sine + height * cosine) / 2
    return cx - half_width, cy - half_height, cx + half_width, cy + half_height


def _polygon_numbers(path: Path, where: str, polygon: Element, axis: str) -> Iterator[float]:
    """One coordinate of all points: <x1><y1><x2>..., or <pt><x><y></pt>."""
    for element in polygon.iter():
        if re.fullmatch(rf"{axis}\d*", element.tag):
            yield _as_number(path, where, element.tag, element.text)


def _number(path: Path, where: str, element: Element, tag: str) -> float:
    return _as_number(path, where, tag, element.findtext(tag))


def _as_number(path: Path, where: str, tag: str, text: str | None) -> float:
    text = (text or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FaultyFileError(path, f"{where}: <{tag}> is '{cut(text, 40)}', not a number")
    return value
