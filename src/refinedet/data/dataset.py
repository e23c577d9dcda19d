"""Pictures with their boxes, in one form whatever the files look like.

``open_dataset`` recognises the layout (PASCAL VOC, COCO or YOLO), reads every annotation and returns a
``DetectionDataset`` of ``Record``s. Pixels are read later, one picture at a time, by ``DetectionDataset.load_image``.
Nothing here needs torch.

Boxes are ``(x1, y1, x2, y2)`` in continuous pixel-edge coordinates: a box over an entire picture is
``(0, 0, width, height)``. See docs/conventions.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from refinedet.errors import RefineDetError, UsageError
from refinedet.images import read_image

Layout = Literal["voc", "coco", "yolo"]


@dataclass(frozen=True, eq=False)
class Record:
    """One picture and its objects; G objects, possibly none."""

    image_path: Path
    """The picture's file."""
    image_id: str | int
    """VOC and YOLO: the file's stem; COCO: the integer id of the JSON."""
    width: int
    """Width in pixels that the boxes refer to."""
    height: int
    """Height in pixels that the boxes refer to."""
    boxes: npt.NDArray[np.float32]
    """(G, 4) xyxy, pixel edges, inside the picture, with an area."""
    labels: npt.NDArray[np.int64]
    """(G,) 0..C-1."""
    difficult: npt.NDArray[np.bool_]
    """(G,) VOC's flag: trained on, ignored by the VOC metric. False elsewhere."""
    crowd: npt.NDArray[np.bool_]
    """(G,) COCO's iscrowd: not trained on, ignored by the COCO metric. False elsewhere."""
    areas: npt.NDArray[np.float32]
    """(G,) square pixels: COCO's "area" (of the mask), else the area of the box."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file."""

    path: Path
    """The file: an annotation for a faulty box, a picture for unreadable pixels."""
    message: str
    """One line without the path."""
    fatal: bool
    """True: training and evaluation refuse it, lenient reading left the file out. False: a box was dropped or clipped,
    a missing value filled in, or a picture without annotation passed over."""

    def __str__(self) -> str:
        """``path: message``."""
        return f"{self.path}: {self.message}"


@dataclass(eq=False)
class DetectionDataset:
    """The records of one split, with the names of their classes."""

    records: list[Record]
    """In the order of the split file (VOC), of the JSON (COCO), or of the sorted file names (YOLO)."""
    class_names: tuple[str, ...]
    """Index = label."""
    format: Layout
    """Layout of the files."""
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
        """Number of pictures."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """The record at ``index``."""
        return self.records[index]

    def load_image(self, index: int) -> npt.NDArray[np.uint8]:
        """Pixels of a picture, turned so that its boxes fit.

        Returns:
            (H, W, 3) uint8 RGB, where H and W are the record's.

        Raises:
            RefineDetError: missing, truncated, no image, or of another size than its annotation says.
        """
        record = self.records[index]
        return read_image(record.image_path, size=(record.width, record.height))

    def subset(self, indices: Iterable[int]) -> DetectionDataset:
        """The same data set with only the records at ``indices``, in that order."""
        return replace(self, records=[self.records[index] for index in indices], problems=list(self.problems))

    def only_classes(self, labels: Sequence[int]) -> DetectionDataset:
        """The same pictures with the objects of some classes only; pictures that have none stay, as empty ones.

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


def without_objects(record: Record) -> Record:
    """The same picture with nothing known of what is on it."""
    return replace(
        record,
        boxes=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        difficult=np.zeros(0, dtype=np.bool_),
        crowd=np.zeros(0, dtype=np.bool_),
        areas=np.zeros(0, dtype=np.float32),
    )


class FaultyFileError(RefineDetError):
    """One file cannot be used. Strict reading lets it through, lenient reading turns it into a ``Problem``."""

    def __init__(self, path: Path, reason: str) -> None:
        """Name the file and what is wrong with it."""
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class ProblemLog:
    """Collects problems while a parser reads; in strict mode the first fatal one ends the reading."""

    def __init__(self, *, strict: bool) -> None:
        """Start without problems."""
        self.strict = strict
        self.problems: list[Problem] = []

    def note(self, path: Path, message: str) -> None:
        """Remember something that was repaired."""
        self.problems.append(Problem(path, message, fatal=False))

    def fatal(self, error: FaultyFileError) -> None:
        """Raise ``error`` (strict) or remember it (lenient)."""
        if self.strict:
            raise error
        self.problems.append(Problem(error.path, error.reason, fatal=True))


def open_dataset(
    path: str | Path,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    *,
    strict: bool = True,
    require_annotations: bool = True,
) -> DetectionDataset:
    """Read all annotations of a split; the layout is recognised by ``detect_layout``.

    Args:
        path: a VOCdevkit, one VOC year, a COCO folder or JSON file, a YOLO folder or data.yaml.
        split: a name such as "train"; several joined by "+"; for a VOCdevkit also with its year, as in
            "2007:trainval+2012:trainval". None or "all" is everything. A part of it in brackets at the end, counted in
            pictures or in percent as in "train[:80%]" and "all[-50:]", takes so many in the data's own order: what is
            held out where the data has no split for it.
        class_names: the names in label order; by default they come from the data, in an order that does not depend
            on which files are read.
        strict: raise at the first file that cannot be used; otherwise collect ``problems`` and go on.
        require_annotations: False also takes splits for which results are handed in to a server: VOC, where a listed
            picture has no XML; COCO, a JSON without "annotations" (image_info_test-dev2017.json). Such a split is read
            without any objects and its ``annotated`` is False. COCO then refuses class names that are no category, as
            results of such a class could not be written.

    Boxes that reach outside the picture are clipped, boxes without an area are dropped, each with a ``Problem``, in
    both modes.

    Raises:
        UsageError: no such folder, unknown layout, unknown or empty split, or a part that is no part.
        RefineDetError: (strict) a file that cannot be used, named.
    """
    # The parsers build on the classes above, so they can only be imported once this module exists.
    from refinedet.data import coco, voc, yolo

    root = Path(path).expanduser()
    layout = detect_layout(root)
    if class_names is not None:
        names = tuple(class_names)
        if not names or len(set(names)) != len(names):
            raise UsageError(f"class names must be different from each other and at least one, not {list(names)!r}")
        class_names = names
    log = ProblemLog(strict=strict)
    whole, bounds = _split_part(split)
    part = None if whole in ("all", "") else whole
    if layout == "yolo":
        dataset = yolo.read_yolo(root, part, class_names, log)
    else:
        reader = voc.read_voc if layout == "voc" else coco.read_coco
        dataset = reader(root, part, class_names, log, require_annotations=require_annotations)
    dataset.problems = log.problems
    if bounds is not None:
        dataset.split = split
        first, last = (_position(bound, len(dataset)) for bound in bounds)
        dataset.records = dataset.records[first:last]
    if not dataset.records and not any(problem.fatal for problem in log.problems):
        where = f"split '{split}'" if split is not None else "this data set"
        raise UsageError(f"{root}: {where} has no images")
    return dataset


_PART = re.compile(r"(?P<whole>[^\[\]]*)\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\]")


def _split_part(split: str | None) -> tuple[str | None, tuple[str | None, str | None] | None]:
    """A split without its brackets, and the two bounds in them, None where one is left out."""
    if split is None or not ("[" in split or "]" in split):
        return split, None
    found = _PART.fullmatch(split)
    if found is None:
        raise UsageError(
            f"split '{split}': a part is written as [first:last] at the end, in pictures or percent: 'train[:80%]'"
        )
    return found["whole"], (found["first"], found["last"])


def _position(bound: str | None, count: int) -> int | None:
    """Index that a bound stands for among ``count`` pictures; percent are rounded down, negative ones count back."""
    if bound is None or not bound.endswith("%"):
        return None if bound is None else int(bound)
    percent = int(bound[:-1])
    if abs(percent) > 100:
        raise UsageError(f"a part of a split reaches from 0 % to 100 %, not to {bound}")
    return count * percent // 100 if percent >= 0 else count - count * -percent // 100


def detect_layout(path: str | Path) -> Layout:
    """Recognise the layout of a data set from the files that are there.

    Raises:
        UsageError: nothing at ``path``, or nothing that looks like one of the three layouts.
    """
    from refinedet.data import coco, voc, yolo

    root = Path(path).expanduser()
    if not root.exists():
        raise UsageError(f"{root}: no such folder")
    if root.is_file():
        if root.suffix.lower() == ".json":
            return "coco"
        if root.suffix.lower() in (".yaml", ".yml"):
            return "yolo"
        raise UsageError(f"{root}: a data set is a folder, a COCO .json or a YOLO data.yaml")
    if voc.find_folders(root):
        return "voc"
    if coco.find_annotation_files(root, unannotated=True):
        return "coco"
    if yolo.find_yaml(root) is not None:
        return "yolo"
    hint = ""
    if (root / "labels").is_dir():
        hint = "; it has labels/ but no data.yaml, which must give the class names"
    elif any(root.glob("*.json")):
        hint = "; if one of its .json files is a COCO file, give the path of that file"
    raise UsageError(
        f"{root}: not a data set: found neither Annotations/*.xml (VOC), annotations/*.json or "
        f"*/_annotations.coco.json (COCO), nor data.yaml (YOLO){hint}"
    )


def list_splits(path: str | Path) -> tuple[str, ...]:
    """Names that ``open_dataset`` accepts as ``split``; empty if the data is not divided.

    Raises:
        UsageError: as ``detect_layout``.
    """
    from refinedet.data import coco, voc, yolo

    root = Path(path).expanduser()
    return {"voc": voc.list_splits, "coco": coco.list_splits, "yolo": yolo.list_splits}[detect_layout(root)](root)


def unknown_split(path: Path, split: str, available: Iterable[str]) -> UsageError:
    """The error for a split that is not there, listing those that are."""
    known = ", ".join(available)
    return UsageError(f"{path}: no split '{split}'; " + (f"available: {known}" if known else "it has no splits"))


def unknown_class(path: Path, name: str, known: Sequence[str], where: str = "") -> FaultyFileError:
    """The error for an object of a class that is not in the list, with the nearest known name."""
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"the nearest known is '{lower[near[0]]}'" if near else f"known: {shorten(known)}"
    return FaultyFileError(path, f"{where}class '{name}' is not in the list of classes; {hint}")


def shorten(names: Sequence[str], most: int = 8) -> str:
    """Names joined by commas, cut after ``most``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def build_record(
    *,
    image_path: Path,
    image_id: str | int,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    difficult: Sequence[bool] | None = None,
    crowd: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
    annotation_path: Path,
    describe: Callable[[int], str],
    log: ProblemLog,
    min_side: float = 0.0,
    tolerance: float = 0.0,
) -> Record:
    """A record from what a parser read, with its boxes clipped to the picture and the useless ones dropped.

    Args:
        image_path: the picture.
        image_id: what detections are filed under.
        size: (width, height) that the boxes refer to.
        boxes: G finite xyxy boxes, pixel edges, not yet clipped.
        labels: G labels.
        difficult: G flags, all False if None.
        crowd: G flags, all False if None.
        areas: G areas in square pixels, those of the clipped boxes if None.
        annotation_path: the file that problems are filed under.
        describe: words for the i-th object as it stands in the file, for messages.
        min_side: boxes whose width or height does not exceed this have no area.
        tolerance: pixels by which a box may reach outside without a word (rounding of the annotation tool).
        log: receives a problem for each box clipped or dropped.
    """
    width, height = size
    count = len(boxes)
    given = np.asarray(boxes, dtype=np.float64).reshape(count, 4)
    limit = np.array([width, height, width, height], dtype=np.float64)
    clipped = np.clip(given, 0.0, limit).astype(np.float32)
    # Sides are compared in both precisions: one that vanishes in float32 has no area for anyone who comes later.
    given_empty = np.any(given[:, 2:] - given[:, :2] <= min_side, axis=1)
    empty = given_empty | np.any(clipped[:, 2:] - clipped[:, :2] <= min_side, axis=1)
    reaches_out = np.any(np.abs(given - np.clip(given, 0.0, limit)) > tolerance, axis=1)
    for index in np.flatnonzero(empty | reaches_out).tolist():
        if given_empty[index]:
            swapped = " (its corners are swapped)" if np.any(given[index, 2:] < given[index, :2]) else ""
            log.note(annotation_path, f"{describe(index)} has no area{swapped}; dropped")
        elif empty[index]:
            log.note(annotation_path, f"{describe(index)} lies outside the {width}x{height} image; dropped")
        else:
            log.note(annotation_path, f"{describe(index)} reaches outside the {width}x{height} image; clipped")
    keep = ~empty
    final = clipped[keep]
    own_areas = (final[:, 2] - final[:, 0]) * (final[:, 3] - final[:, 1])

    def flags(values: Sequence[bool] | None) -> npt.NDArray[np.bool_]:
        every = np.zeros(count, dtype=np.bool_) if values is None else np.array(values, dtype=np.bool_).reshape(count)
        kept: npt.NDArray[np.bool_] = every[keep]
        return kept

    return Record(
        image_path=image_path,
        image_id=image_id,
        width=width,
        height=height,
        boxes=final,
        labels=np.asarray(labels, dtype=np.int64).reshape(count)[keep],
        difficult=flags(difficult),
        crowd=flags(crowd),
        areas=own_areas if areas is None else np.asarray(areas, dtype=np.float32).reshape(count)[keep],
    )
