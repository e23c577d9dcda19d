"""What a training asks of its data before it starts: something to learn, something to measure, the data of its run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from refinedet.data.problems import count_kinds
from refinedet.data.records import DetectionDataset, Record
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import read_image_size

SMALLEST_AREA = 0.1
"""Square pixels of the network's input: below this an object is too small for any anchor, even in an enlarged crop."""


def require_objects(dataset: DetectionDataset, image_size: tuple[int, int]) -> None:
    """Refuse data from which nothing can be learned.

    Args:
        dataset: to train on.
        image_size: height and width of the network's input.

    Raises:
        RefineDetError: no object is left; with counts and the three commonest reasons.
    """
    crowd = sum(int(record.crowd.sum()) for record in dataset.records)
    small = sum(_count_small(record, image_size) for record in dataset.records)
    objects = sum(len(record.labels) for record in dataset.records)
    if objects > crowd + small:
        return
    empty = sum(len(record.labels) == 0 for record in dataset.records)
    reasons = [(count, kind.one if count == 1 else kind.many) for kind, count in count_kinds(dataset.problems)]
    reasons += [
        (crowd, "objects marked as crowd, which are not trained on"),
        (small, "objects too small to match any anchor"),
        (empty, "images without objects"),
    ]
    common = sorted((reason for reason in reasons if reason[0]), key=lambda reason: -reason[0])[:3]
    raise RefineDetError(
        f"{dataset.path}: nothing to learn from: {len(dataset)} images, {objects} objects, none of which can be "
        f"trained on ({', '.join(f'{count} {what}' for count, what in common)}); refinedet inspect {dataset.path} "
        "names them"
    )


def _count_small(record: Record, image_size: tuple[int, int]) -> int:
    boxes = record.boxes[~record.crowd].astype(np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    scale = image_size[0] * image_size[1] / (record.width * record.height)
    return int((areas * scale < SMALLEST_AREA).sum())


def require_few_repairs(dataset: DetectionDataset) -> str | None:
    """One line that counts what reading repaired, None if nothing.

    Raises:
        RefineDetError: it is more than half of the objects or of the images.
    """
    line = dataset.repaired()
    if line is None:
        return None
    counts = {"object": 0, "image": 0}
    lost = {"object": 0, "image": 0}
    for kind, count in count_kinds(dataset.problems):
        if kind.unit in counts:
            counts[kind.unit] += count
            lost[kind.unit] += count if kind.lost else 0
    totals = {"object": sum(len(record.labels) for record in dataset.records), "image": len(dataset)}
    for unit, count in counts.items():
        total = totals[unit] + lost[unit]
        if 2 * count > total:
            raise RefineDetError(
                f"{dataset.path}: {count} of {total} {unit}s had to be repaired or left out ({line}); "
                f"refinedet inspect {dataset.path} names them"
            )
    return line


def require_measurable(dataset: DetectionDataset) -> None:
    """Look at an evaluation split before a training starts that it is to measure in the end.

    Raises:
        UsageError: no object in it.
        RefineDetError: an image is missing or, by its header, unreadable or of another size than its annotation says.
    """
    if not any(len(record.labels) for record in dataset.records):
        raise UsageError(
            f"{dataset.path}: no objects in split '{dataset.split}' to measure on; take another with --evaluate-split, "
            "or none with --evaluate-split none"
        )
    for record in dataset.records:
        size = read_image_size(record.image_path)
        if size not in ((record.width, record.height), (record.height, record.width)):
            raise RefineDetError(
                f"{record.image_path}: image is {size[0]}x{size[1]}, but its annotation is made for "
                f"{record.width}x{record.height}; correct the size in the annotation or restore the original image"
            )


def image_digests(dataset: DetectionDataset, roots: Sequence[str]) -> dict[str, str]:
    """A short digest of size, boxes, labels and flags of every image, by its name.

    Args:
        dataset: of one or several folders.
        roots: these folders, as absolute paths. Names are relative to them, so that data which was moved keeps them.
    """
    folders = [path if path.is_dir() else path.parent for path in map(Path, map(os.path.abspath, roots))]
    digests: dict[str, str] = {}
    for record in dataset.records:
        total = hashlib.sha256(repr((record.width, record.height)).encode())
        for values in (record.boxes, record.labels, record.difficult, record.crowd):
            total.update(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes())
        file = Path(os.path.abspath(record.image_path))
        inside = [(n, folder) for n, folder in enumerate(folders) if file.is_relative_to(folder)]
        name = "/".join(file.parts[-2:])
        if inside:
            number, folder = inside[0]
            name = (f"{number}:" if number else "") + file.relative_to(folder).as_posix()
        digests[name] = total.hexdigest()[:16]
    return digests


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Which images were added, removed or changed, in words with counts and examples; None if none."""
    parts = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and before[name] != now[name]],
    }
    words = [
        f"{len(names)} {'image' if len(names) == 1 else 'images'} {what} ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''})"
        for what, names in parts.items()
        if names
    ]
    return ", ".join(words) or None
