"""Opening a dataset whatever its layout: recognising it, listing its splits, taking parts of them, joining several.

To add a layout, write a reader module that defines a ``Layout`` and name it in ``LAYOUTS``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from refinedet.data import coco, voc, yolo
from refinedet.data.classes import fault_of_name
from refinedet.data.problems import ProblemLog, short_repr
from refinedet.data.records import DetectionDataset, Layout, ReadRequest
from refinedet.data.splits import choose_split
from refinedet.errors import UsageError
from refinedet.files import user_path
from refinedet.text import cut

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (voc.LAYOUT, coco.LAYOUT, yolo.LAYOUT)}
"""By name, in the order in which they are tried."""


def open_dataset(
    path: str | Path,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    *,
    strict: bool = True,
    require_annotations: bool = True,
    allow_outside: bool = False,
) -> DetectionDataset:
    """Read all annotations of a split; the layout is recognised by ``detect_layout``.

    Args:
        path: a VOCdevkit, one VOC year, a folder with VOC annotations beside the images or in folders of any name, a
            COCO folder or JSON file, a YOLO folder or data.yaml.
        split: a name such as "train"; several joined by "+"; for a VOCdevkit also with its year, as in
            "2007:trainval+2012:trainval". None or "all" is everything. A part of it in brackets at the end, counted in
            images or in percent as in "train[:80%]" and "all[-50:]", takes so many in the data's own order: what is
            held out where the data has no split for it. Where there is no split of the name, one with another name
            for the same is taken ("valid" for "val", ``splits.choose_split``), and train and val for "trainval".
        class_names: the names in label order; by default they come from the data, in an order that does not depend
            on which files are read.
        strict: raise at the first file that cannot be used; otherwise collect ``problems`` and go on.
        require_annotations: False also takes splits for which results are handed in to a server: VOC, where a listed
            image has no XML; COCO, a JSON without "annotations" (image_info_test-dev2017.json). Such a split is read
            without any objects and its ``annotated`` is False. COCO then refuses class names that are no category, as
            results of such a class could not be written.
        allow_outside: annotation files and lists may name files outside the folder of the data. Otherwise such entries
            are refused, since data from elsewhere must not decide which files of this machine are read. The folder of
            the data is the one opened or the one that holds the opened file; for YOLO also the folders that data.yaml
            names by absolute paths or in its key ``path``, as those are the user's own statement.

    Boxes that reach outside the image are clipped, boxes without an area are dropped, each with a ``Problem``, in
    both modes.

    Raises:
        UsageError: no such folder, unknown layout, unknown or empty split, or a part that is no part.
        RefineDetError: (strict) a file that cannot be used, named.
    """
    root = user_path(path)
    layout = _recognise(root)
    names = None if class_names is None else _check_names(class_names)
    log = ProblemLog(strict=strict)
    whole, bounds = _split_part(split)
    part = None if whole in ("all", "") else _spell_out(whole, root, layout)
    request = ReadRequest(root, part, names, require_annotations, allow_outside)
    dataset = layout.read(request, log)
    dataset.problems = log.problems
    if bounds is not None or whole not in ("all", ""):
        dataset.split = split
    if bounds is not None:
        first, last = (_position(bound, len(dataset)) for bound in bounds)
        dataset.records = dataset.records[first:last]
    if not dataset.records and not any(problem.fatal for problem in log.problems):
        where = f"split '{split}'" if split is not None else "this dataset"
        raise UsageError(f"{root}: {where} has no images")
    return dataset


def open_joined(
    paths: Sequence[str | Path],
    split: str | None,
    class_names: Sequence[str] | None = None,
    *,
    allow_outside: bool = False,
) -> DetectionDataset:
    """The records of a split of several datasets in one.

    Args:
        paths: at least one, each as for ``open_dataset``.
        split: as for ``open_dataset``, the same for all.
        class_names: as for ``open_dataset``.
        allow_outside: as for ``open_dataset``.

    Raises:
        UsageError: their class names differ and none were given; otherwise as ``open_dataset``.
    """
    parts = [open_dataset(path, split, class_names, allow_outside=allow_outside) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if part.class_names != first.class_names:
            raise UsageError(
                f"{path}: its classes differ from those of {paths[0]}; give all names with --class-names a,b,c"
            )
    if len(parts) == 1:
        return first
    records = [record for part in parts for record in part.records]
    if len({record.image_id for record in records}) < len(records):
        # Two datasets may number their images alike; an evaluation tells images apart by their ids.
        records = [replace(record, image_id=f"{n}:{record.image_id}") for n, record in enumerate(records)]
    return replace(first, records=records, problems=[problem for part in parts for problem in part.problems])


def detect_layout(path: str | Path) -> str:
    """Name of the layout of a dataset, a key of ``LAYOUTS``, recognised from the files that are there.

    Raises:
        UsageError: nothing at ``path``, or nothing that looks like one of the layouts.
    """
    return _recognise(user_path(path)).name


def list_splits(path: str | Path) -> tuple[str, ...]:
    """Names that ``open_dataset`` accepts as ``split``; empty if the data is not divided.

    Raises:
        UsageError: as ``detect_layout``.
    """
    root = user_path(path)
    return _recognise(root).splits(root)


def _recognise(root: Path) -> Layout:
    try:
        if not root.exists():
            raise UsageError(f"{root}: no such folder")
    except OSError as error:  # a part of more than 255 bytes, links in a circle
        raise UsageError(f"{cut(str(root), 200)}: no such folder ({error.strerror})") from None
    for evidence in ("recognises", "resembles"):
        for layout in LAYOUTS.values():
            is_in_layout = getattr(layout, evidence)
            if is_in_layout is not None and is_in_layout(root):
                return layout
    if root.is_file():
        raise UsageError(f"{root}: a dataset is a folder, a COCO .json or a YOLO data.yaml")
    hint = ""
    if (root / "labels").is_dir():
        hint = "; it has labels/ but no data.yaml, which must give the class names"
    elif any(root.glob("*.json")):
        hint = "; if one of its .json files is a COCO file, give the path of that file"
    known = "; ".join(f"{layout.evidence} ({layout.name.upper()})" for layout in LAYOUTS.values())
    raise UsageError(f"{root}: not a dataset: found none of {known}{hint}")


def _check_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The class names as a tuple.

    Raises:
        UsageError: not texts of one line, the same one twice, or none at all.
    """
    names = () if isinstance(class_names, str) else tuple(class_names)
    for name in names:
        fault = fault_of_name(name) if isinstance(name, str) else "is no text"
        if fault is not None:
            raise UsageError(f"class names must be texts on one line, but {short_repr(name)} {fault}")
    if not names or len(set(names)) != len(names):
        raise UsageError(
            f"class names must be different from each other and at least one, not {cut(repr(list(names)), 200)}"
        )
    return names


_PART = re.compile(r"(?P<whole>[^\[\]]*)\[(?P<first>-?\d{1,18}%?)?:(?P<last>-?\d{1,18}%?)?\]")


def _split_part(split: str | None) -> tuple[str | None, tuple[str | None, str | None] | None]:
    """A split without its brackets, and the two bounds in them, None where one is left out."""
    if split is None or not ("[" in split or "]" in split):
        return split, None
    match = _PART.fullmatch(split)
    if match is None:
        raise UsageError(
            f"split {short_repr(split)}: a part is written as [first:last] at the end, in images or percent, as in "
            "'train[:80%]'"
        )
    return match["whole"], (match["first"], match["last"])


def _spell_out(split: str | None, root: Path, layout: Layout) -> str | None:
    """The split with "train+val" in the place of a "trainval" that the data has no name for."""
    words = [] if split is None else [word.strip() for word in split.split("+")]
    if split is None or "trainval" not in words:
        return split
    available = layout.splits(root)
    if "trainval" in available:
        return split
    try:
        both = [choose_split(root, name, available) for name in ("train", "val")]
    except UsageError:
        return split  # the reader says which splits there are
    return "+".join("+".join(both) if word == "trainval" else word for word in words)


def _position(bound: str | None, count: int) -> int | None:
    """Index that a bound stands for among ``count`` images; percent are rounded down, negative ones count back."""
    if bound is None or not bound.endswith("%"):
        return None if bound is None else int(bound)
    percent = int(bound[:-1])
    if abs(percent) > 100:
        raise UsageError(f"a part of a split reaches from 0 % to 100 %, not to {bound}")
    return count * percent // 100 if percent >= 0 else count - count * -percent // 100
