"""A model, data, a figure: ``evaluate`` runs the one over the other and returns a ``Report``.

The two halves are public as well, for whoever spreads the work over processes: ``collect_detections`` on a share of the
images, then, with all shares merged, ``evaluate_detections``. Detections are keyed by the index of their image, so no
image can count twice and the order in which they were found does not matter.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from refinedet.config import ModelConfig, to_dict
from refinedet.data.classes import match_classes
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.metrics import COCO_NAMES, CURVE_RECALLS, coco_average_precision, voc_average_precision
from refinedet.evaluation.multiscale import MultiScale, SizedDetector
from refinedet.evaluation.submission import plan_submission
from refinedet.files import check_output_folder, has_signature, json_text, make_folder, write_text

if TYPE_CHECKING:
    from refinedet.detections import Detections

Metric = Literal["voc07", "voc", "coco"]

METRICS: dict[str, str] = {
    "voc07": "VOC 2007 11-point AP, IoU 0.5",
    "voc": "VOC area AP, IoU 0.5",
    "coco": "COCO AP, IoU 0.50:0.95",
}
"""The figures, and how a table names them."""

REPORT_FILE = "report.json"
REPORT_SIGNATURE = "report written by refinedet"
"""Stands in ``REPORT_FILE``: a folder with it holds an earlier report, which may be replaced."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after every batch."""


class Detector(Protocol):
    """What is evaluated: a ``RefineDet``, or anything else that turns pictures into detections."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names; the index is the label."""

    def predict_arrays(
        self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        """One ``Detections`` for each (H, W, 3) RGB picture."""


@dataclass(frozen=True, eq=False)
class Report(Mapping[str, float]):
    """What an evaluation found. ``report["mAP"]`` is the figure; everything else stands in the attributes.

    As a mapping it holds "mAP" (0..1, the mean over the classes that have objects) and, for COCO, the twelve numbers by
    name ("AP", "AP50", ... "ARl"; "mAP" is "AP"). COCO numbers without any object of their size are -1. For a split
    without annotations, of which only a submission can be made, it is empty, and so are ``per_class`` and ``objects``.
    """

    metric: Metric
    """The figure: "voc07", "voc" or "coco"."""
    figures: dict[str, float]
    """What the mapping holds."""
    per_class: dict[str, float]
    """Class name to AP in 0..1; nan for a class without an object that counts."""
    objects: dict[str, int]
    """Class name to the number of objects that count (neither difficult nor crowd)."""
    images: int
    """Images evaluated."""
    split: str | None
    """The split of the data, where it has splits."""
    data: str
    """Name of the data's folder or file."""
    settings: dict[str, Any]
    """How the detections were made: the model's config, score threshold, batch size, whether and with which passes at
    several scales, ``left_out`` (None, or the class names of "model" and "data" that the other lacks), and
    ``seconds_per_image``, wall time from the file to the detections."""
    curves: dict[str, npt.NDArray[np.float64]] = field(repr=False)
    """Class name to (101,) interpolated precision at recall 0, 0.01, ... 1 and IoU 0.5; classes with objects only."""
    detections: list[Detections] = field(repr=False)
    """What was found, one entry per image evaluated."""
    dataset: DetectionDataset = field(repr=False)
    """The data, for whoever wants to look at the pictures (``evaluation.page``)."""
    indices: list[int] = field(repr=False)
    """The position of each of these images in ``dataset``."""

    @property
    def image_ids(self) -> list[int | str]:
        """The data's id of each of these images."""
        return [self.dataset[index].image_id for index in self.indices]

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """COCO's category id of each label, if the data has such ids."""
        return self.dataset.category_ids

    @property
    def left_out(self) -> str:
        """How many classes of model and data the other lacks, in words; empty unless only shared ones were measured."""
        names = self.settings.get("left_out")
        return f"{len(names['model'])} of the model, {len(names['data'])} of the data" if names else ""

    def __getitem__(self, name: str) -> float:
        """A figure by name."""
        return self.figures[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the figures."""
        return iter(self.figures)

    def __len__(self) -> int:
        """How many figures there are."""
        return len(self.figures)

    def table(self) -> str:
        """AP per class in percent, the mean, and COCO's numbers, as aligned text."""
        where = self.data + (f" {self.split}" if self.split else "")
        images = f"{self.images} image{'s' * (self.images != 1)} of {where}"
        if not self.figures:
            return f"no figures: {images} without annotations"
        how = ", multi-scale" if self.settings.get("multi_scale") else ""
        width = max([len("mean"), *(len(name) for name in self.per_class)])
        lines = [f"{'class':<{width}}  {'objects':>7}  {'AP %':>6}"]
        lines += [
            f"{name:<{width}}  {self.objects[name]:>7}  {_percent(value)}" for name, value in self.per_class.items()
        ]
        lines.append(
            f"{'mean':<{width}}  {sum(self.objects.values()):>7}  {_percent(self['mAP'])}  "
            f"({METRICS[self.metric]}{how}; {images})"
        )
        if self.left_out:
            lines.append(f"classes that model and data share: {len(self.per_class)}; left out: {self.left_out}")
        if self.metric == "coco":
            for names in (COCO_NAMES[:6], COCO_NAMES[6:]):
                lines.append("  ".join(f"{name} {_percent(self[name]).strip()}" for name in names))
        return "\n".join(lines)

    def results(self) -> Iterator[dict[str, Any]]:
        """The detections in COCO's results form: image_id, category_id, bbox (x, y, width, height in pixels), score.

        Where the data has no category ids, category_id is the label, 0..C-1.
        """
        for image_id, detections in zip(self.image_ids, self.detections, strict=True):
            yield from detections.to_coco(image_id, self.category_ids)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the detections, ready for strict JSON: nan becomes None, tuples become lists."""
        plain: dict[str, Any] = _plain(
            {
                "metric": self.metric,
                "data": self.data,
                "split": self.split,
                "images": self.images,
                "figures": self.figures,
                "per_class": self.per_class,
                "objects": self.objects,
                "settings": self.settings,
                "curves": {"iou": 0.5, "recall": CURVE_RECALLS, "precision": self.curves},
            }
        )
        return plain

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``detections.json`` (COCO's results form) and ``per_class.csv`` into a folder.

        Args:
            folder: made if it does not exist; files of those names in it are replaced.

        Returns:
            The folder.

        Raises:
            RefineDetError: the folder cannot be made or written to.
        """
        folder = make_folder(Path(folder))
        # One detection per line: a million of them stay readable, and a diff of two runs is a diff of detections.
        lines = (json.dumps(item, allow_nan=False) for item in self.results())
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["class", "objects", "AP"])
        for name, value in self.per_class.items():
            writer.writerow([name, self.objects[name], "" if math.isnan(value) else value])
        write_text(folder / "detections.json", "[" + ",\n".join(lines) + "]\n")
        write_text(folder / "per_class.csv", table.getvalue())
        # Last: it is what a report folder is recognised by.
        write_text(folder / REPORT_FILE, json_text(self.to_dict(), REPORT_SIGNATURE, indent=2))
        return folder


def check_report_folder(folder: Path, inputs: Sequence[str | Path] = ()) -> None:
    """Find out before the work whether a report may and can be written into a folder.

    Raises:
        UsageError: the folder is one of ``inputs``, or holds files of a report's names that are of another origin.
        RefineDetError: it cannot be made or written to.
    """
    names = (REPORT_FILE, "detections.json", "per_class.csv", "index.html", "images/worst-01.jpg")
    check_output_folder(
        folder, names, inputs=inputs, ours=lambda _: has_signature(folder / REPORT_FILE, REPORT_SIGNATURE)
    )


def evaluate(
    model: Detector,
    data: str | Path | DetectionDataset,
    split: str | None = "test",
    metric: Metric = "voc07",
    *,
    batch_size: int = 8,
    limit: int | None = None,
    threads: int = 2,
    threshold: float | None = None,
    multi_scale: bool = False,
    shared_classes: bool = False,
    submission: str | Path | None = None,
    progress: bool | Progress = False,
) -> Report:
    """Run a model over a data set and measure how good its detections are.

    Args:
        model: a ``RefineDet``; its class names must be those of the data, unless ``shared_classes`` is set.
        data: a folder or file that ``open_dataset`` understands, or a data set already open.
        split: which split of ``data``; of no effect if ``data`` is already open.
        metric: "voc07" (11-point AP of VOC 2007), "voc" (area AP of VOC 2010 and later) or "coco" (the twelve
            numbers). Any of them works on any data: difficult and crowd objects never count and never punish.
        batch_size: pictures that go through the network at once.
        limit: only the first so many images.
        threads: that decode pictures ahead of the network; memory does not grow with the data.
        threshold: drop detections that score less. Default: keep what the model's post-processing keeps
            (``config.inference.score_threshold``); anything higher costs average precision.
        multi_scale: multi-scale testing with flips and box voting (``evaluation.multiscale``): the passes of the
            paper's "+" rows for a model of 320 or 512 pixels, in COCO's form for "coco", else in VOC's. The network
            sees 32 (VOC) or 40 (COCO) times the pixels of a single scale at 320, 16 or 37 times at 512.
        shared_classes: measure a model on data of other classes, by those that both have: equal by name but for case,
            spaces, underscores and hyphens, VOC's and COCO's words for the same thing included (airplane, aeroplane).
            Objects and detections of any other class are left out. The report has the data's names, in the
            model's order.
        submission: file for the server of PASCAL VOC (.zip, .tar.gz) or COCO (.zip, .json); see
            ``evaluation.submission``. With it, ``split`` may be one without annotations: then no figure is computed.
        progress: True shows a bar on the terminal; a function is called with (images done, images in all).

    Returns:
        The report; ``report["mAP"]`` is in 0..1.

    Raises:
        RefineDetError: a file of the data is bad, no object is there to evaluate against, or the classes of model and
            data differ (with ``shared_classes``: have nothing in common).
        UsageError: an unknown metric, a missing folder, a batch size, limit or number of threads below 1, multi-scale
            testing of a model of another size, or a submission that the data or the metric does not fit, or that of
            shared classes only.
    """
    _check_metric(metric)
    if shared_classes and submission is not None:
        raise UsageError("a submission needs every class of its server, so it cannot be one of the shared classes only")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    runner: Detector = model
    passes: list[str] = []
    if multi_scale:
        several = MultiScale(
            cast(SizedDetector, model), "coco" if metric == "coco" else "voc", batch_size=max(1, batch_size)
        )
        runner, passes = several, [str(one) for one in several.passes]
    if isinstance(data, DetectionDataset):
        dataset = data
    elif shared_classes:
        dataset = open_dataset(data, split)
    else:
        dataset = _open(data, split, model.class_names, require_annotations=submission is None)
    sharing: _Sharing | None = None
    if shared_classes:
        sharing = _share_classes(dataset, model.class_names)
        dataset = sharing.dataset
    else:
        _check_class_names(dataset, model.class_names)
    indices = range(len(dataset) if limit is None else min(limit, len(dataset)))
    # Before the hour of inference, not after it.
    server = None if submission is None else plan_submission(submission, dataset, metric)
    measurable = dataset.annotated or server is None
    if measurable:
        _check_objects(dataset, indices)
    began = time.perf_counter()
    detections = collect_detections(
        runner, dataset, indices, batch_size=batch_size, threads=threads, threshold=threshold, progress=progress
    )
    seconds = time.perf_counter() - began
    if sharing is not None:
        detections = {index: sharing.relabel(found) for index, found in detections.items()}
    settings = {
        "model": to_dict(model.config),
        "score_threshold": model.config.inference.score_threshold if threshold is None else threshold,
        "batch_size": batch_size,
        "limit": limit,
        "multi_scale": multi_scale,
        "passes": passes,
        "left_out": None if sharing is None else sharing.left_out,
        "seconds_per_image": seconds / max(1, len(indices)),
    }
    if server is not None:
        ids = [dataset[index].image_id for index in indices]
        server.write(ids, [detections[index] for index in indices], dataset.class_names)
    if measurable:
        return evaluate_detections(dataset, detections, metric, settings=settings)
    return _report(dataset, detections, metric, settings)


@dataclass(frozen=True, eq=False)
class _Sharing:
    """The classes that model and data have in common."""

    dataset: DetectionDataset
    """The data with these classes only."""
    new_label: npt.NDArray[np.int64]
    """(C,) label of each class of the model in that data, -1 if the data lacks it."""
    left_out: dict[str, list[str]]
    """Names of "model" and of "data" that the other lacks."""

    def relabel(self, found: Detections) -> Detections:
        """Detections of the model as detections of the data's classes."""
        kept = found.filter(labels=np.flatnonzero(self.new_label >= 0).tolist())
        return replace(kept, labels=self.new_label[kept.labels], class_names=self.dataset.class_names)


def _share_classes(dataset: DetectionDataset, class_names: Sequence[str]) -> _Sharing:
    names = dataset.class_names
    matched = match_classes(class_names, names)
    shared = list(dict.fromkeys(label for label in matched if label is not None))
    if not shared:
        raise RefineDetError(
            f"{dataset.path}: the model has {_listed(class_names)}, the data has {_listed(names)}; they share none, so "
            "nothing can be measured"
        )
    new_label = [-1 if label is None else shared.index(label) for label in matched]
    left_out = {
        "model": [name for name, label in zip(class_names, matched, strict=True) if label is None],
        "data": [name for label, name in enumerate(names) if label not in shared],
    }
    return _Sharing(dataset.only_classes(shared), np.array(new_label, dtype=np.int64), left_out)


def collect_detections(
    model: Detector,
    dataset: DetectionDataset,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 8,
    threads: int = 2,
    threshold: float | None = None,
    progress: bool | Progress = False,
) -> dict[int, Detections]:
    """Run a model over images of a data set.

    Args:
        model: a ``RefineDet``.
        dataset: the data.
        indices: which images, as positions in ``dataset``; default: all. A process of several takes
            ``range(rank, len(dataset), processes)``.
        batch_size: pictures that go through the network at once.
        threads: that decode pictures ahead of the network.
        threshold: drop detections that score less; default: keep what post-processing keeps.
        progress: True shows a bar on the terminal; a function is called with (images done, images in all).

    Returns:
        Index of the image to its detections, boxes in pixels of the image.

    Raises:
        RefineDetError: a picture cannot be read.
        UsageError: batch size or number of threads below 1.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    order = range(len(dataset)) if indices is None else indices
    found: dict[int, Detections] = {}
    with ExitStack() as stack:
        report_progress = stack.enter_context(_ProgressBar()) if progress is True else progress or None
        images = stack.enter_context(closing(_decode_ahead(dataset, order, threads, ahead=2 * batch_size)))
        for start in range(0, len(order), batch_size):
            batch = list(itertools.islice(images, batch_size))
            answers = model.predict_arrays(batch, threshold=threshold)
            found.update(zip(order[start : start + batch_size], answers, strict=True))
            if report_progress is not None:
                report_progress(start + len(batch), len(order))
    return found


def evaluate_detections(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections] | Sequence[Detections],
    metric: Metric = "voc07",
    *,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Measure detections against a data set.

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
    _check_metric(metric)
    if isinstance(detections, Mapping):
        by_index = dict(detections)
    else:
        if len(detections) != len(dataset):
            raise UsageError(
                f"{dataset.path}: {len(dataset)} images but detections of {len(detections)}; pass a mapping from the "
                "index of the image to evaluate some of them"
            )
        by_index = dict(enumerate(detections))
    if by_index and not (min(by_index) >= 0 and max(by_index) < len(dataset)):
        raise UsageError(f"{dataset.path}: detections of image {max(by_index)}, but it has {len(dataset)} images")
    indices = sorted(by_index)
    _check_objects(dataset, indices)

    names = dataset.class_names
    records = [dataset[index] for index in indices]
    found = [by_index[index] for index in indices]
    ids = [record.image_id for record in records]
    if metric == "coco":
        # COCO's own ids where there are any: their order decides between tied scores.
        whole = [number for number in ids if isinstance(number, int)]
        distinct = len(whole) == len(ids) and len(set(whole)) == len(ids)
        coco = coco_average_precision(found, records, len(names), image_ids=whole if distinct else None)
        average_precision, positives = coco.average_precision, coco.positives
        figures = {"mAP": coco.numbers["AP"], **coco.numbers}
        curves = list(coco.curves)
    else:
        voc = voc_average_precision(found, records, len(names), method="11-point" if metric == "voc07" else "area")
        average_precision, positives = voc.average_precision, voc.positives
        figures = {"mAP": voc.mean}
        curves = [voc.curve(label) for label in range(len(names))]

    return replace(
        _report(dataset, by_index, metric, settings),
        figures=figures,
        per_class=dict(zip(names, average_precision.tolist(), strict=True)),
        objects=dict(zip(names, positives.tolist(), strict=True)),
        curves={name: curve for name, curve, count in zip(names, curves, positives, strict=True) if count},
    )


def _report(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections],
    metric: Metric,
    settings: Mapping[str, Any] | None,
) -> Report:
    """What was found, without any figure."""
    indices = sorted(detections)
    return Report(
        metric=metric,
        figures={},
        per_class={},
        objects={},
        images=len(indices),
        split=dataset.split,
        data=_data_name(dataset),
        settings=dict(settings or {}),
        curves={},
        detections=[detections[index] for index in indices],
        dataset=dataset,
        indices=indices,
    )


def _open(
    path: str | Path, split: str | None, class_names: Sequence[str], *, require_annotations: bool
) -> DetectionDataset:
    try:
        return open_dataset(path, split, class_names=class_names, require_annotations=require_annotations)
    except UsageError:
        raise
    except RefineDetError as error:
        # The parser stops at the first object of a strange class. Most likely the model is not one for this data, and
        # then the two lists side by side say more than the file.
        try:
            own = open_dataset(path, split)
        except RefineDetError:
            raise error from None
        if set(own.class_names) - set(class_names):
            _check_class_names(own, class_names)
        raise


def _decode_ahead(
    dataset: DetectionDataset, indices: Sequence[int], threads: int, ahead: int
) -> Generator[npt.NDArray[np.uint8], None, None]:
    """Pictures in the order of ``indices``, at most ``ahead`` of them decoded or being decoded beforehand."""
    remaining = iter(indices)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
        try:
            for index in itertools.islice(remaining, ahead):
                waiting.append(pool.submit(dataset.load_image, index))
            while waiting:
                image = waiting.popleft().result()
                for index in itertools.islice(remaining, 1):
                    waiting.append(pool.submit(dataset.load_image, index))
                yield image
        finally:
            for future in waiting:
                future.cancel()


class _ProgressBar:
    """A bar on stderr, so that a report on stdout can be piped."""

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task("evaluate", total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise UsageError(f"unknown metric '{metric}': must be one of {', '.join(METRICS)}")


def _check_class_names(dataset: DetectionDataset, class_names: Sequence[str]) -> None:
    of_data, of_model = tuple(dataset.class_names), tuple(class_names)
    if of_data == of_model:
        return
    shared = set(of_data) & set(of_model)
    used = {of_data[label] for record in dataset.records for label in record.labels.tolist()}
    if used <= set(of_model):
        fix = "open the data with class_names=model.class_names, every object of it is of a class of the model"
    else:
        fix = "evaluate a model that was trained on the classes of the data"
        if shared:
            fix += ", or measure those that both have (--shared-classes)"
    # What only one of them has comes first, or a long list would hide it.
    model_list, data_list = (_listed(sorted(names, key=shared.__contains__)) for names in (of_model, of_data))
    raise RefineDetError(f"{dataset.path}: the model has {model_list}, the data has {data_list}; {fix}")


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


def _listed(names: Sequence[str], shown: int = 6) -> str:
    listed = ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
    return f"{len(names)} class{'es' * (len(names) != 1)} ({listed})"


def _data_name(dataset: DetectionDataset) -> str:
    # Not the whole path: a report is shared, the folders of the machine that made it are nobody's business.
    path = Path(str(dataset.path))
    return path.name or path.resolve().name or str(path)


def _percent(value: float) -> str:
    return f"{'n/a':>6}" if math.isnan(value) or value < 0 else f"{100 * value:6.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)
