"""COCO instance files: which JSON files a folder has, and the records of its splits.

A folder holds annotations/instances_<split>.json beside <split>/, or <split>/_annotations.coco.json, or JSON files of
any name beside their images or a folder of images. Category ids may have gaps; label i is the i-th smallest category
id. Boxes (x, y, width, height) become pixel edges (x, y, x + width, y + height); an annotation without a box has the
one around its polygons or run lengths.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from refinedet.data.coco_document import IMAGES_ONLY, Categories, Document, read_categories, read_document
from refinedet.data.coco_records import RecordReader
from refinedet.data.pairing import SPLIT_FOLDERS
from refinedet.data.problems import ProblemLog
from refinedet.data.records import DetectionDataset, Layout, ReadRequest, Record, without_objects
from refinedet.data.splits import choose_split
from refinedet.errors import UsageError

ROBOFLOW_NAME = "_annotations.coco.json"
_OTHER_TASKS = ("captions_", IMAGES_ONLY, "panoptic_", "stuff_", "person_keypoints_")
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(SPLIT_FOLDERS))})(-?dev)?\d*")


def find_annotation_files(path: Path, *, unannotated: bool = False) -> dict[str, Path]:
    """Split name -> JSON file of a COCO folder (or of the JSON file itself), sorted by name; empty if it is none.

    Files in the usual places come first; failing these, JSON files of any name that have the keys of COCO.
    ``unannotated`` adds the files that only list images, where their split has no other.
    """
    return _usual_files(path, unannotated) or _files_of_any_name(path)


def _usual_files(path: Path, unannotated: bool) -> dict[str, Path]:
    if path.is_file():
        return {_split_name(path): path}
    if (path / ROBOFLOW_NAME).is_file():
        return {path.resolve().name: path / ROBOFLOW_NAME}
    candidates = sorted(file for file in path.glob("annotations/*.json") if file.is_file())
    instances = [file for file in candidates if file.name.startswith("instances_")]
    others = [file for file in candidates if not file.name.startswith(_OTHER_TASKS)]
    if len(others) > 1:
        others = [file for file in others if _looks_like_coco(file)] or others
    files = {_split_name(file): file for file in instances or others}
    if not files:
        files = {file.parent.name: file for file in sorted(path.glob(f"*/{ROBOFLOW_NAME}"))}
    if unannotated:
        for file in candidates:
            if file.name.startswith(IMAGES_ONLY):
                files.setdefault(_split_name(file), file)
    return files


def list_splits(path: Path) -> tuple[str, ...]:
    """Names of the splits, sorted; none for a single file whose name is not that of a split."""
    files = find_annotation_files(path)
    if len(files) == 1:
        (name, file), *_ = files.items()
        usual = file.name == ROBOFLOW_NAME or file.name.startswith(("instances_", IMAGES_ONLY))
        if not usual and not _SPLIT_NAME.fullmatch(name):
            return ()
    return tuple(sorted(files))


def read_coco(request: ReadRequest, log: ProblemLog) -> DetectionDataset:
    """Read a COCO folder or one of its JSON files.

    Where no annotations are required, files without "annotations" are read as well, and class names that the file lacks
    are refused.

    Args:
        request: a folder for which ``find_annotation_files`` finds something, or a JSON file; a split such as
            "train2017" ("train" will do where that is unambiguous), several joined by "+", or None for all; class names
            in label order, or None for the file's, by ascending category id. A given name that the file lacks gets an
            unused category id.
        log: receives the problems.

    Raises:
        UsageError: unknown split, splits that cannot be joined because their categories or image ids clash, or that
            only list images where annotations are required.
        RefineDetError: (strict) a file that cannot be used.
    """
    path, split = request.path, request.split
    files = find_annotation_files(path)
    if split is not None or not files:
        files = find_annotation_files(path, unannotated=True)
    chosen = list(files) if split is None else _choose(path, split, files)
    annotated = True
    records: list[Record] = []
    categories: Categories | None = None
    used_ids: set[int | str] = set()
    for name in chosen:
        file = files[name]
        document = read_document(file)
        annotated = annotated and _is_annotated(file, document, request)
        own = read_categories(file, document, _further_splits(file, files.values()))
        if categories is not None and own.names != categories.names:
            raise UsageError(
                f"{file}: its categories differ from those of {files[chosen[0]]}; read one split at a time"
            )
        categories = own
        _check_class_names(file, own, request)
        if not document["images"] and log.strict:
            raise UsageError(f"{file}: split '{name}' has no images")
        new = RecordReader(file, name, own, request, log).read(document)
        records += _with_own_ids(name, new, used_ids)
    assert categories is not None  # chosen is never empty
    _, category_ids = categories.labels(request.class_names)
    names = request.class_names or tuple(categories.names[key] for key in sorted(categories.names))
    if not annotated:
        # One split of several without annotations: figures of the rest would pass for those of the whole.
        records = [without_objects(record) for record in records]
    return DetectionDataset(records, names, "coco", split, path, category_ids, annotated=annotated)


def _is_annotated(file: Path, document: Document, request: ReadRequest) -> bool:
    if "annotations" in document:
        return True
    if request.require_annotations:
        raise UsageError(
            f"{file}: lists images without 'annotations', so nothing can be learnt or measured; "
            "'refinedet evaluate --submission FILE' writes results for its server"
        )
    return False


def _check_class_names(file: Path, categories: Categories, request: ReadRequest) -> None:
    """Results for a server cannot be written for a class that is no category."""
    strange = [name for name in request.class_names or () if name not in categories.names.values()]
    if strange and not request.require_annotations:
        raise UsageError(
            f"{file}: has no category '{strange[0]}', which is a class of the model; use a model of its categories"
        )


def _with_own_ids(split: str, records: Sequence[Record], used: set[int | str]) -> list[Record]:
    """Records of a split under ids that no split before it has: detections are filed under them.

    Exports number the images of each split from 0; such ids get the name of their split: "valid:0".
    """
    if any(record.image_id in used for record in records):
        records = [replace(record, image_id=f"{split}:{record.image_id}") for record in records]
    used.update(record.image_id for record in records)
    return list(records)


def _split_name(file: Path) -> str:
    if file.name == ROBOFLOW_NAME:
        return file.resolve().parent.name
    return file.stem.removeprefix("instances_").removeprefix(IMAGES_ONLY)


def _further_splits(file: Path, files: Iterable[Path]) -> list[Path]:
    """The JSON files of the other splits, also where only one split was opened."""
    beside = sorted(file.absolute().parent.parent.glob(f"*/{ROBOFLOW_NAME}")) if file.name == ROBOFLOW_NAME else []
    return [other for other in (*files, *beside) if other.resolve() != file.resolve()]


def _files_of_any_name(path: Path) -> dict[str, Path]:
    """COCO files directly in a folder or, failing that, in its subfolders, one each, which then name the splits."""
    here = [file for file in sorted(path.glob("*.json")) if _looks_like_coco(file)]
    if here:
        return {_split_name(file): file for file in here}
    below = [file for file in sorted(path.glob("*/*.json")) if _looks_like_coco(file)]
    if len(below) > 1 and len({file.parent for file in below}) == len(below):
        return {file.parent.name: file for file in below}
    return {_split_name(file): file for file in below}


def _looks_like_coco(file: Path) -> bool:
    """Whether a file has the keys of a COCO instances file. It may be large, so it is searched rather than parsed."""
    if file.name.startswith((".", *_OTHER_TASKS)) or not file.is_file() or file.stat().st_size == 0:
        return False
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return all(text.find(key) >= 0 for key in (b'"images"', b'"annotations"', b'"categories"'))
    except (OSError, ValueError):
        return False


def _choose(path: Path, split: str, files: dict[str, Path]) -> list[str]:
    chosen: dict[str, None] = {}
    for part in split.split("+"):
        chosen[choose_split(path, part.strip(), sorted(files))] = None
    return list(chosen)


def _recognises(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() == ".json"
    return bool(_usual_files(path, unannotated=True))


def _resembles(path: Path) -> bool:
    return bool(_files_of_any_name(path))


LAYOUT = Layout(
    name="coco",
    evidence=f"annotations/*.json, */{ROBOFLOW_NAME} or another COCO file",
    recognises=_recognises,
    splits=list_splits,
    read=read_coco,
    resembles=_resembles,
    server="coco",
)
