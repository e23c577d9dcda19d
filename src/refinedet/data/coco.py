"""COCO instance files: annotations/instances_<split>.json beside <split>/, or <split>/_annotations.coco.json.

Category ids may have gaps; label i is the i-th smallest category id. Boxes (x, y, width, height) become pixel edges
(x, y, x + width, y + height).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from refinedet.data.problems import (
    NO_BOX,
    NO_SIZE,
    FaultyFileError,
    ProblemLog,
    shorten,
    unknown_class,
)
from refinedet.data.records import (
    BoxRules,
    DetectionDataset,
    Layout,
    ReadRequest,
    Record,
    RecordBuilder,
    without_objects,
)
from refinedet.data.splits import choose_split
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import read_json
from refinedet.images import read_image_size

ROBOFLOW_NAME = "_annotations.coco.json"
_OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "stuff_", "person_keypoints_")
_RULES = BoxRules(tolerance=0.5)
"""COCO's boxes are rounded, so they may reach outside their image by half a pixel without a word."""


_IMAGES_ONLY = "image_info_"
"""Lists of pictures whose annotations the server keeps to itself."""


def find_annotation_files(path: Path, *, unannotated: bool = False) -> dict[str, Path]:
    """Split name -> JSON file of a COCO folder (or of the JSON file itself), sorted by name; empty if it is none.

    ``unannotated`` adds the files that only list pictures, where their split has no other.
    """
    if path.is_file():
        return {_split_name(path): path}
    if (path / ROBOFLOW_NAME).is_file():
        return {path.resolve().name: path / ROBOFLOW_NAME}
    candidates = sorted(path.glob("annotations/*.json"))
    instances = [file for file in candidates if file.name.startswith("instances_")]
    others = [file for file in candidates if not file.name.startswith(_OTHER_TASKS)]
    found = {_split_name(file): file for file in instances or others}
    if not found:
        found = {file.parent.name: file for file in sorted(path.glob(f"*/{ROBOFLOW_NAME}"))}
    if unannotated:
        for file in candidates:
            if file.name.startswith(_IMAGES_ONLY):
                found.setdefault(_split_name(file), file)
    return found


def list_splits(path: Path) -> tuple[str, ...]:
    """Names of the splits, sorted."""
    return tuple(sorted(find_annotation_files(path)))


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
            only list pictures where annotations are required.
        RefineDetError: (strict) a file that cannot be used.
    """
    path, split, class_names = request.path, request.split, request.class_names
    files = find_annotation_files(path)
    if split is not None or not files:
        files = find_annotation_files(path, unannotated=True)
    chosen = list(files) if split is None else _choose(path, split, files)
    annotated = True
    records: list[Record] = []
    categories: dict[int, str] | None = None
    seen: dict[int, str] = {}
    for name in chosen:
        file = files[name]
        document = _read_document(file)
        if "annotations" not in document:
            if request.require_annotations:
                raise UsageError(
                    f"{file}: lists images without 'annotations', so nothing can be learnt or measured; "
                    "'refinedet evaluate --submission FILE' writes results for its server"
                )
            annotated = False
        own = _categories(file, document)
        if categories is not None and own != categories:
            raise UsageError(
                f"{file}: its categories differ from those of {files[chosen[0]]}; read one split at a time"
            )
        categories = own
        strange = [name for name in class_names or () if name not in own.values()]
        if strange and not request.require_annotations:
            raise UsageError(
                f"{file}: has no category '{strange[0]}', which is a class of the model; use a model of its categories"
            )
        label_of, _ = _labels(own, class_names)
        before = len(records)
        records.extend(_read_records(file, name, document, own, label_of, class_names, log))
        for record in records[before:]:
            image_id = int(record.image_id)
            if image_id in seen and log.strict:
                raise UsageError(
                    f"{file}: image id {image_id} is also used in split '{seen[image_id]}'; read one split at a time"
                )
            seen[image_id] = name
    assert categories is not None  # chosen is never empty
    label_of, category_ids = _labels(categories, class_names)
    names = tuple(class_names) if class_names is not None else tuple(categories[key] for key in sorted(categories))
    if not annotated:
        # One split of several without annotations: figures of the rest would pass for those of the whole.
        records = [without_objects(record) for record in records]
    return DetectionDataset(records, names, "coco", split, path, category_ids, annotated=annotated)


def _split_name(file: Path) -> str:
    if file.name == ROBOFLOW_NAME:
        return file.resolve().parent.name
    return file.stem.removeprefix("instances_").removeprefix(_IMAGES_ONLY)


def _choose(path: Path, split: str, files: dict[str, Path]) -> list[str]:
    chosen: dict[str, None] = {}
    for part in split.split("+"):
        chosen[choose_split(path, part.strip(), sorted(files))] = None
    return list(chosen)


def _read_document(file: Path) -> dict[str, list[dict[str, Any]]]:
    document = read_json(file)
    for key in ("images", "annotations", "categories"):
        values = document.get(key) if isinstance(document, dict) else None
        if key == "annotations" and "annotations" not in document and file.name.startswith(_IMAGES_ONLY):
            continue
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise RefineDetError(f"{file}: not a COCO instances file: it needs a list of objects named '{key}'")
    return document  # type: ignore[no-any-return]


def _categories(file: Path, document: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    """Id -> name."""
    entries = document["categories"]
    if file.name == ROBOFLOW_NAME and len(entries) > 1:
        # Roboflow puts a root above the classes, as category 0, which no annotation uses.
        first = next((entry for entry in entries if entry.get("id") == 0), None)
        rest = [entry for entry in entries if entry is not first]
        if (
            first is not None
            and first.get("supercategory") == "none"
            and all(entry.get("supercategory") == first.get("name") for entry in rest)
        ):
            entries = rest
    categories: dict[int, str] = {}
    for entry in entries:
        key, name = entry.get("id"), entry.get("name")
        if not _is_int(key) or not isinstance(name, str):
            raise RefineDetError(f"{file}: category {_cut(entry)} needs an integer 'id' and a 'name'")
        if key in categories or name in categories.values():
            raise RefineDetError(f"{file}: category {key} ('{name}') is listed twice; ids and names must be different")
        categories[key] = name
    return categories


def _labels(categories: dict[int, str], class_names: Sequence[str] | None) -> tuple[dict[int, int], tuple[int, ...]]:
    """(category id -> label, category id of each label)."""
    if class_names is None:
        ids = tuple(sorted(categories))
        return {key: label for label, key in enumerate(ids)}, ids
    id_of = {name: key for key, name in categories.items()}
    unused = max(categories, default=0)
    ordered = []
    for name in class_names:
        if name not in id_of:
            unused += 1
        ordered.append(id_of.get(name, unused))
    return {key: label for label, key in enumerate(ordered) if key in categories}, tuple(ordered)


def _read_records(
    file: Path,
    split: str,
    document: dict[str, list[dict[str, Any]]],
    categories: dict[int, str],
    label_of: dict[int, int],
    class_names: Sequence[str] | None,
    log: ProblemLog,
) -> list[Record]:
    images: dict[int, dict[str, Any]] = {}
    for entry in document["images"]:
        key = entry.get("id")
        try:
            if not _is_int(key) or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
                raise FaultyFileError(file, f"image {_cut(key)} needs an integer 'id' and a 'file_name'")
            if key in images:
                raise FaultyFileError(
                    file,
                    f"image id {key} is listed twice ({images[key]['file_name']} and {entry['file_name']}); "
                    "ids must be different",
                )
        except FaultyFileError as error:
            log.fatal(error)
            continue
        images[key] = entry
    objects: dict[int, list[dict[str, Any]]] = {key: [] for key in images}
    for entry in document.get("annotations", []):
        try:
            _check_annotation(file, entry, images, categories, label_of, class_names)
        except FaultyFileError as error:
            log.fatal(error)
            continue
        if entry.get("bbox") is None:
            log.note(file, f"annotation {entry.get('id')} has no 'bbox'; dropped", NO_BOX)
        else:
            objects[entry["image_id"]].append(entry)
    if not images:
        if log.strict:
            raise UsageError(f"{file}: split '{split}' has no images")
        return []
    folders = _image_folders(file, split)
    folder = _image_folder(folders, [entry["file_name"] for entry in images.values()])
    missing = _missing(folder, (entry["file_name"] for entry in images.values()))
    records = []
    for key, entry in images.items():
        try:
            if entry["file_name"] in missing:
                raise FaultyFileError(
                    folder / entry["file_name"],
                    f"image is missing, but {file} lists it; restore it or remove it from the file",
                )
            records.append(_to_record(file, folder, entry, objects[key], categories, label_of, log))
        except FaultyFileError as error:
            log.fatal(error)
    return records


def _check_annotation(
    file: Path,
    entry: dict[str, Any],
    images: dict[int, dict[str, Any]],
    categories: dict[int, str],
    label_of: dict[int, int],
    class_names: Sequence[str] | None,
) -> None:
    where = f"annotation {entry.get('id')}"
    image_id, category = entry.get("image_id"), entry.get("category_id")
    if not _is_int(image_id) or image_id not in images:
        raise FaultyFileError(file, f"{where} belongs to image id {_cut(image_id)}, which the file does not list")
    if not _is_int(category) or category not in categories:
        known = shorten([str(key) for key in sorted(categories)])
        raise FaultyFileError(
            file, f"{where} has category id {_cut(category)}, which the file does not list; known: {known}"
        )
    if category not in label_of:
        raise unknown_class(file, categories[category], class_names or (), where=f"{where}: ")
    box = entry.get("bbox")
    if box is None:
        return
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise FaultyFileError(file, f"{where}: 'bbox' must be four numbers [x, y, width, height], not {_cut(box)}")
    if entry.get("area") is not None and not _is_number(entry["area"]):
        raise FaultyFileError(file, f"{where}: 'area' must be a number, not {_cut(entry['area'])}")


def _image_folders(file: Path, split: str) -> list[Path]:
    """Where the images of a JSON file may be, most usual place first."""
    above = file.absolute().parent.parent
    if file.name == ROBOFLOW_NAME:
        return [file.parent]
    candidates = (
        above / split,
        # image_info_test-dev2017.json lists a part of test2017/.
        above / re.sub(r"-[a-z]+", "", split),
        above / "images" / split,
        above / split / "images",
        file.parent,
        file.parent / split,
        file.parent / "images",
        above / "images",
        above,
    )
    return [folder for folder in candidates if folder.is_dir()]


def _image_folder(folders: Sequence[Path], names: Sequence[str]) -> Path:
    """The folder with most of the images; the first of them if it is a draw."""
    sample = names[:: max(1, len(names) // 50)]
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in sample))


def _missing(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the names that are no files. One listing of the folder instead of a question for each of 118,000."""
    listed = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    return {name for name in names if name not in listed and not (folder / name).is_file()}


def _to_record(
    file: Path,
    folder: Path,
    image: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    categories: dict[int, str],
    label_of: dict[int, int],
    log: ProblemLog,
) -> Record:
    image_path = folder / image["file_name"]
    width, height = image.get("width"), image.get("height")
    if not (_is_int(width) and _is_int(height) and width > 0 and height > 0):
        try:
            width, height = read_image_size(image_path)
        except RefineDetError as error:
            raise FaultyFileError(file, f"image {image['id']} has no size, and {error}") from None
        log.note(file, f"image {image['id']} has no size; {width}x{height} taken from {image['file_name']}", NO_SIZE)

    builder = RecordBuilder(image_path, image["id"], (width, height), file, log, _RULES)
    for entry in entries:
        x, y, w, h = entry["bbox"]
        builder.add(
            (x, y, x + w, y + h),
            label_of[entry["category_id"]],
            partial(_describe, image["file_name"], entry, categories),
            crowd=bool(entry.get("iscrowd", 0)),
            area=w * h if entry.get("area") is None else entry["area"],
        )
    return builder.build()


def _describe(file_name: str, entry: dict[str, Any], categories: dict[int, str]) -> str:
    """The annotation as it stands in the file."""
    x, y, w, h = entry["bbox"]
    name = categories[entry["category_id"]]
    return f"{file_name}, annotation {entry.get('id')} ({name}): box x={x:g} y={y:g} w={w:g} h={h:g}"


def _cut(value: object) -> str:
    """Its repr, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # The comparison is also False for NaN and infinity, which Python's json accepts, and safe for integers of any size.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12


def _recognises(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() == ".json"
    return bool(find_annotation_files(path, unannotated=True))


LAYOUT = Layout(
    name="coco",
    evidence=f"annotations/*.json or */{ROBOFLOW_NAME}",
    recognises=_recognises,
    splits=list_splits,
    read=read_coco,
    server="coco",
)
