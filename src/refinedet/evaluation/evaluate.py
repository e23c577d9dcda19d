"""A model, data, a figure: ``evaluate`` runs the one over the other and returns a ``Report``.

The two halves are public as well, for whoever spreads the work over processes: ``collect_detections`` on a share of the
images, then, with all shares merged, ``evaluate_detections``. Detections are keyed by the index of their image, so no
image can count twice and the order in which they were found does not matter.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from refinedet.data import DetectionDataset, list_splits, open_dataset
from refinedet.decoding import decode_ahead
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.detector import Detector
from refinedet.evaluation.metrics import coco_average_precision, voc_result
from refinedet.evaluation.multiscale import Form, MultiScale
from refinedet.evaluation.outcomes import match_objects
from refinedet.evaluation.report import METRICS, Metric, Report, data_name
from refinedet.evaluation.run_data import RunData, find_run
from refinedet.evaluation.settings import EvaluationSettings
from refinedet.evaluation.sharing import check_class_names, share_classes
from refinedet.text import printable
from refinedet.training.data_check import require_few_repairs

if TYPE_CHECKING:
    from refinedet.detections import Detections
    from refinedet.detector import RefineDet
    from refinedet.runtime import Runtime

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after every batch."""

BATCH_SIZE = 8
"""Images that go through the network at once, where nothing else is said."""
_HELD_OUT_SPLITS = ("test", "val", "valid", "validation")
"""The default split is the first of these that the data has."""

_log = logging.getLogger(__name__)


def evaluate(
    model: Detector | str | Path,
    data: str | Path | DetectionDataset | None = None,
    split: str | None = None,
    metric: Metric | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    threads: int = 2,
    threshold: float | None = None,
    multi_scale: bool = False,
    shared_classes: bool = False,
    device: str = "auto",
    allow_outside: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Run a model over a dataset and measure how good its detections are.

    Args:
        model: a ``RefineDet``, or what ``load_detector`` loads: an exported file, the name of a bundled model, a run
            folder, a folder of weights. Its class names must be those of the data, unless ``shared_classes`` is set.
        data: a folder or file that ``open_dataset`` understands, or a dataset already open. Default: the images that
            the run held out, if ``model`` is a run folder.
        split: which split of ``data``; "all" takes every image. Default: "test" or, where there is none, "val"; every
            image of data that is not divided. Of no effect if ``data`` is already open.
        metric: "voc07" (11-point AP of VOC 2007), "voc" (area AP of VOC 2010 and later) or "coco" (the twelve
            numbers). Any of them works on any data: difficult and crowd objects never count and never punish. Default:
            the run's own for the images that it held out, else "voc07".
        batch_size: images that go through the network at once.
        limit: only the first so many images.
        threads: that decode images ahead of the network; memory does not grow with the data.
        threshold: drop detections that score less. Default: keep what the model's post-processing keeps
            (``config.inference.score_threshold``); anything higher costs average precision.
        multi_scale: multi-scale testing with flips and box voting (``evaluation.multiscale``): the passes of the
            paper's "+" rows for a model of 320 or 512 pixels, COCO's for "coco", else VOC's. The network
            sees 32 (VOC) or 40 (COCO) times the pixels of a single scale at 320, 16 or 37 times at 512.
        shared_classes: measure a model on data of other classes, by those that both have
            (``evaluation.sharing.share_classes``). The report has the data's names, in the model's order.
        device: "cpu", "cuda" or "auto"; for a model that is given by its name.
        allow_outside: as for ``open_dataset``.
        on_progress: called with (images done, images in all).

    Returns:
        The report; ``report["mAP"]`` is in 0..1.

    Raises:
        RefineDetError: a file of the data is bad, most of it had to be repaired, no object is there to evaluate
            against, or the classes of model and data differ (with ``shared_classes``: have nothing in common).
        UsageError: an unknown metric, a missing folder, a batch size, limit or number of threads below 1, or
            multi-scale testing of a model of another size.

    Example:
        >>> from refinedet import evaluate
        >>> report = evaluate("voc07-320-resnet18", "photos", split="val", shared_classes=True)
        >>> sorted(report.per_class), 0 <= report["mAP"] <= 1
        (['cat', 'dog'], True)
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    run = _run_of(model)
    if data is None:
        data, metric = _held_out(run, metric)
    metric = check_metric(metric or "voc07")
    detector, weights = _load(model, device)
    if not isinstance(dataset := data, DetectionDataset):
        dataset = open_evaluation_data(
            dataset, split, detector.class_names, shared_classes=shared_classes, allow_outside=allow_outside
        )
        require_few_repairs(dataset)  # Of a dataset that was made smaller the repairs may be those of other images.
    runner, passes = _at_scales(detector, metric, batch_size) if multi_scale else (detector, ())
    shared = share_classes(detector.class_names, dataset) if shared_classes else None
    if shared is None:
        check_class_names(dataset, detector.class_names)
    else:
        dataset = shared.dataset
    if repaired := dataset.repaired():
        _log.warning("%s: repaired while reading: %s", dataset.path, printable(repaired))
    indices = range(len(dataset) if limit is None else min(limit, len(dataset)))
    # Before the hour of inference, not after it.
    _check_objects(dataset, indices)
    began = time.perf_counter()
    detections = collect_detections(
        runner, dataset, indices, batch_size=batch_size, threads=threads, threshold=threshold, on_progress=on_progress
    )
    if shared is not None:
        detections = {index: shared.only_shared(of_image) for index, of_image in detections.items()}
    seconds = time.perf_counter() - began  # before the images of a run are counted, which reads its annotations
    settings = replace(
        EvaluationSettings.of(detector, threshold),
        weights=weights,
        batch_size=batch_size,
        limit=limit,
        multi_scale=multi_scale,
        passes=passes,
        left_out=None if shared is None else shared.left_out,
        run="" if run is None else str(run.folder),
        trained_on=None if run is None else run.count_trained_on(dataset, indices),
        seconds_per_image=seconds / max(1, len(indices)),
    )
    return evaluate_detections(dataset, detections, metric, settings=settings)


def _run_of(model: Detector | str | Path) -> RunData | None:
    folder = find_run(model) if isinstance(model, (str, Path)) else None
    return None if folder is None else RunData.of(folder)


def _held_out(run: RunData | None, metric: Metric | None) -> tuple[DetectionDataset, Metric]:
    if run is None:
        raise UsageError("DATA is missing: only a run folder knows which images it held out")
    return run.held_out(), metric or run.metric


def _at_scales(detector: Detector, metric: Metric, batch_size: int) -> tuple[Detector, tuple[str, ...]]:
    """The same model under multi-scale testing, and its passes in words."""
    form: Form = "coco" if metric == "coco" else "voc"
    several = MultiScale(cast("RefineDet | Runtime", detector), form, batch_size=max(1, batch_size))
    return several, tuple(str(one) for one in several.passes)


def _load(model: Detector | str | Path, device: str) -> tuple[Detector, str]:
    """The detector, and its name if it was given by one."""
    if not isinstance(model, (str, Path)):
        return model, ""
    from refinedet.loading import load_detector

    return load_detector(model, device=device), str(model)


def default_split(data: str | Path) -> str:
    """The split that is evaluated where none is named: "test" or "val", and "all" of data that is not divided.

    Raises:
        UsageError: the data is divided, but into neither of them.
    """
    splits = list_splits(data)
    if not splits or (len(splits) == 1 and Path(data).is_file()):
        return "all"
    for name in _HELD_OUT_SPLITS:
        # COCO's splits carry a year: val2017.
        if any(re.fullmatch(rf"{name}\d*", split) for split in splits):
            return name
    # Opened by that name, the data says which splits it has.
    return _HELD_OUT_SPLITS[0]


def open_evaluation_data(
    path: str | Path,
    split: str | None,
    class_names: tuple[str, ...],
    *,
    shared_classes: bool = False,
    require_annotations: bool = True,
    allow_outside: bool = False,
) -> DetectionDataset:
    """Open data to evaluate a model on.

    Args:
        path: a folder or file that ``open_dataset`` understands.
        split: as for ``evaluate``.
        class_names: of the model; those of the data, unless ``shared_classes`` is set.
        shared_classes: take the classes of the data, whatever they are.
        require_annotations: False also opens splits whose annotations are kept by a server.
        allow_outside: as for ``open_dataset``.

    Raises:
        RefineDetError: a bad file, or an object of a class that the model lacks.
        UsageError: no such folder or split.
    """
    if split is None:
        split = default_split(path)
    if shared_classes:
        return open_dataset(path, split, allow_outside=allow_outside)
    try:
        return open_dataset(
            path,
            split,
            class_names=class_names,
            require_annotations=require_annotations,
            allow_outside=allow_outside,
        )
    except UsageError:
        raise
    except RefineDetError as error:
        # The parser stops at the first object of a strange class. Most likely the model is not one for this data, and
        # then the two lists side by side say more than the file.
        try:
            own = open_dataset(path, split, allow_outside=allow_outside)
        except RefineDetError:
            raise error from None
        if set(own.class_names) - set(class_names):
            check_class_names(own, class_names)
        raise


def collect_detections(
    model: Detector,
    dataset: DetectionDataset,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    threads: int = 2,
    threshold: float | None = None,
    on_progress: Progress | None = None,
) -> dict[int, Detections]:
    """Run a model over images of a dataset.

    Memory does not grow with the data. Batches of large images are smaller than ``batch_size``.

    Args:
        model: a ``RefineDet``.
        dataset: the data.
        indices: which images, as positions in ``dataset``; default: all. A process of several takes
            ``range(rank, len(dataset), processes)``.
        batch_size: images that go through the network at once.
        threads: that decode images ahead of the network.
        threshold: drop detections that score less; default: keep what post-processing keeps.
        on_progress: called with (images done, images in all).

    Returns:
        Index of the image to its detections, boxes in pixels of the image.

    Raises:
        RefineDetError: an image cannot be read; it is named.
        UsageError: batch size or number of threads below 1.
    """
    order = range(len(dataset)) if indices is None else indices

    def count_pixels(index: int) -> int:
        return dataset[index].width * dataset[index].height

    detections: dict[int, Detections] = {}
    pipeline = decode_ahead(order, count_pixels, dataset.load_image, batch_size=batch_size, threads=threads)
    with closing(pipeline) as batches:
        for batch in batches:
            images = []
            for decoded in batch:
                if decoded.error is not None:
                    raise decoded.error
                assert decoded.pixels is not None
                images.append(decoded.pixels)
            part = [decoded.item for decoded in batch]
            # From here on only ``images`` holds the pixels.
            batch.clear()
            detections.update(zip(part, model.predict_arrays(images, threshold=threshold), strict=True))
            del images, decoded
            if on_progress is not None:
                on_progress(len(detections), len(order))
    return detections


def evaluate_detections(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections] | Sequence[Detections],
    metric: Metric = "voc07",
    *,
    settings: EvaluationSettings | None = None,
) -> Report:
    """Measure detections against a dataset.

    Args:
        dataset: the data.
        detections: for each image of ``dataset`` in order, or a mapping from the index of an image; then only the
            images in the mapping are evaluated.
        metric: "voc07", "voc" or "coco".
        settings: how the detections were made, for the report.

    Raises:
        RefineDetError: no object is there to evaluate against.
        UsageError: an unknown metric, or detections that do not fit the data.
    """
    check_metric(metric)
    by_index = _by_index(dataset, detections)
    indices = sorted(by_index)
    _check_objects(dataset, indices)

    names = dataset.class_names
    records = [dataset[index] for index in indices]
    own = [by_index[index] for index in indices]
    outcomes = match_objects(own, records, len(names), crowd_swallows=metric == "coco")
    if metric == "coco":
        # COCO's own ids where there are any: their order decides between tied scores.
        ids = [record.image_id for record in records]
        whole = [number for number in ids if isinstance(number, int)]
        distinct = len(whole) == len(ids) and len(set(whole)) == len(ids)
        coco = coco_average_precision(own, records, len(names), image_ids=whole if distinct else None)
        average_precision, ap50 = coco.average_precision, coco.average_precision_50
        figures = {"mAP": coco.numbers["AP"], **coco.numbers}
        curves = list(coco.curves)
    else:
        voc = voc_result(outcomes, "11-point" if metric == "voc07" else "area")
        average_precision = ap50 = voc.average_precision
        figures = {"mAP": voc.mean}
        curves = [voc.curve(label) for label in range(len(names))]
    positives = outcomes.positives
    return Report(
        metric=metric,
        figures=figures,
        per_class=dict(zip(names, average_precision.tolist(), strict=True)),
        per_class_ap50=dict(zip(names, ap50.tolist(), strict=True)),
        objects=dict(zip(names, positives.tolist(), strict=True)),
        split=dataset.split,
        data=data_name(dataset),
        settings=replace(
            settings or EvaluationSettings(), repaired=dataset.repaired() or "", data_digest=dataset.digest()
        ),
        curves={name: curve for name, curve, count in zip(names, curves, positives, strict=True) if count},
        outcomes=outcomes,
        detections=own,
        dataset=dataset,
        indices=indices,
    )


def _by_index(
    dataset: DetectionDataset, detections: Mapping[int, Detections] | Sequence[Detections]
) -> dict[int, Detections]:
    if not isinstance(detections, Mapping):
        if len(detections) != len(dataset):
            raise UsageError(
                f"{dataset.path}: {len(dataset)} images but detections of {len(detections)}; pass a mapping from the "
                "index of the image to evaluate some of them"
            )
        return dict(enumerate(detections))
    if detections and not (min(detections) >= 0 and max(detections) < len(dataset)):
        raise UsageError(f"{dataset.path}: detections of image {max(detections)}, but it has {len(dataset)} images")
    return dict(detections)


def check_metric(metric: str) -> Metric:
    """The name of a figure as such.

    Raises:
        UsageError: there is no figure of that name.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric '{metric}': must be one of {', '.join(METRICS)}")
    return cast(Metric, metric)


def _check_objects(dataset: DetectionDataset, indices: Sequence[int]) -> None:
    for index in indices:
        record = dataset[index]
        if not (record.difficult | record.crowd).all():
            return
    of_split = f" of split '{dataset.split}'" if dataset.split else ""
    raise RefineDetError(
        f"{dataset.path}: no object to evaluate against in {len(indices)} image{'s' * (len(indices) != 1)}{of_split} "
        "(difficult and crowd ones do not count); choose another split or check the annotations with "
        "'refinedet inspect'"
    )
