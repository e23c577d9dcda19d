"""What becomes of the detections of a batch prediction: a report against ground truth, and label files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from refinedet.bulk.parts import PartFolder, path_text, read_batch
from refinedet.data import DetectionDataset
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.evaluate import check_metric, evaluate_detections, open_evaluation_data
from refinedet.evaluation.report import Metric, Report
from refinedet.evaluation.settings import EvaluationSettings
from refinedet.evaluation.sharing import check_class_names, share_classes
from refinedet.labels import LabelFolder, LabelLayout
from refinedet.training.data_check import require_few_repairs


def evaluate_batch(
    folder: str | Path,
    data: str | Path,
    split: str | None = None,
    metric: Metric = "voc07",
    *,
    limit: int | None = None,
    shared_classes: bool = False,
    allow_outside: bool = False,
) -> Report:
    """Measure the detections of a batch prediction against ground truth, without running the model again.

    A row belongs to the image of the same path; where the images have moved, to the one whose file name is the same,
    if that name occurs once.

    Args:
        folder: what ``batch`` wrote. Detections below its threshold are missing, which costs average precision; a batch
            prediction that is to be measured is made with a threshold of 0.01.
        data: as for ``evaluate``.
        split: as for ``evaluate``.
        metric: as for ``evaluate``.
        limit: as for ``evaluate``.
        shared_classes: as for ``evaluate``.
        allow_outside: as for ``evaluate``.

    Raises:
        UsageError: the folder holds no batch prediction, or an image of the data has no row in it.
        RefineDetError: a part or a file of the data cannot be read, an image of the data failed, or the classes differ.
    """
    check_metric(metric)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    parts = PartFolder(folder)
    manifest = parts.manifest()
    class_names = manifest.class_names
    dataset = open_evaluation_data(data, split, class_names, shared_classes=shared_classes, allow_outside=allow_outside)
    require_few_repairs(dataset)
    shared = share_classes(class_names, dataset) if shared_classes else None
    if shared is None:
        check_class_names(dataset, class_names)
    else:
        dataset = shared.dataset
    indices = range(len(dataset) if limit is None else min(limit, len(dataset)))
    detections = _of_images(parts, class_names, dataset, indices)
    settings = EvaluationSettings(
        weights=manifest.model,
        score_threshold=manifest.threshold,
        limit=limit,
        left_out=None if shared is None else shared.left_out,
    )
    if shared is not None:
        detections = {index: shared.only_shared(found) for index, found in detections.items()}
    return evaluate_detections(dataset, detections, metric, settings=settings)


def _of_images(
    parts: PartFolder, class_names: tuple[str, ...], dataset: DetectionDataset, indices: Sequence[int]
) -> dict[int, Detections]:
    """The detections of some images of a dataset, by their index."""
    paths = {index: path_text(os.path.abspath(dataset[index].image_path)) for index in indices}
    wanted = {path: index for index, path in paths.items()}
    by_name = _unique({index: os.path.basename(path) for index, path in paths.items()})
    detections: dict[int, Detections] = {}
    moved: dict[int, list[Detections]] = {}
    errors: list[str] = []
    for row in parts.rows():
        index = wanted.get(row["path"])
        elsewhere = by_name.get(os.path.basename(row["path"])) if index is None else None
        if index is None and elsewhere is None:
            continue
        if row["error"] is not None:
            errors.append(row["error"])
            continue
        found = Detections(
            row["boxes"], row["scores"], row["labels"], class_names, (row["width"], row["height"]), row["path"]
        )
        if index is not None:
            detections[index] = found
        elif elsewhere is not None:
            moved.setdefault(elsewhere, []).append(found)
    for index, several in moved.items():
        if len(several) == 1:
            detections.setdefault(index, several[0])
    missing = [index for index in indices if index not in detections]
    if errors and missing:
        raise RefineDetError(f"{parts.path}: {len(errors)} images of the data failed, the first: {errors[0]}")
    if missing:
        raise UsageError(
            f"{parts.path}: has no row for {len(missing)} of {len(indices)} images of the data, the first: "
            f"{paths[missing[0]]}; run 'refinedet batch' on them with the same --out"
        )
    for index, found in detections.items():
        record = dataset[index]
        if found.image_size != (record.width, record.height):
            raise RefineDetError(
                f"{parts.path}: {found.source} was {found.image_size[0]}x{found.image_size[1]} pixels, but the data "
                f"says {record.width}x{record.height} of {record.image_path}"
            )
    return detections


def _unique(names: Mapping[int, str]) -> dict[str, int]:
    """Index of each name that occurs once."""
    indices: dict[str, list[int]] = {}
    for index, name in names.items():
        indices.setdefault(name, []).append(index)
    return {name: several[0] for name, several in indices.items() if len(several) == 1}


def write_labels(folder: str | Path, layout: LabelLayout, out: Path) -> int:
    """Write the detections of a batch prediction as label files.

    Args:
        folder: what ``batch`` wrote; images that failed get no labels.
        layout: "coco", "voc" or "yolo"; see ``refinedet.labels``.
        out: new or empty folder.

    Returns:
        The number of images.

    Raises:
        UsageError: ``folder`` holds no batch prediction, ``out`` holds something, or two images share a label file.
        RefineDetError: a part cannot be read, or the labels cannot be written.
    """
    parts = PartFolder(folder)
    manifest = parts.manifest()
    sources = (row["path"] for row in parts.rows(["path", "error"]) if row["error"] is None)
    count = 0
    with LabelFolder(out, layout, manifest.class_names, sources, manifest.category_ids) as labels:
        for detections in read_batch(folder):
            labels.add(detections)
            count += 1
    return count
