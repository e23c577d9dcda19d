"""Two runs side by side: settings that differ, and average precision on the images that both held out.

Both reports are read from the run folders (``report/detections.json``) and the images from the data of the first run,
so nothing is predicted again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refinedet.data import DetectionDataset
from refinedet.dataclass_json import flatten, to_dict
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.metrics import VocMethod, mean_of_defined, weighted_average_precision
from refinedet.evaluation.outcomes import Outcomes, match_objects
from refinedet.evaluation.report import DETECTIONS_FILE
from refinedet.evaluation.run_data import RunData
from refinedet.files import read_json, user_path
from refinedet.text import printable
from refinedet.training.run import REPORT_FOLDER

SAMPLES = 500
"""Number of times that the images are drawn again for the intervals."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What ``compare`` found; AP is that at IoU 0.5."""

    runs: tuple[str, str]
    """The two run folders."""
    images: int
    """Images that both held out."""
    settings: dict[str, tuple[Any, Any]]
    """Settings that differ, by their name in config.json, and their two values."""
    class_names: tuple[str, ...]
    """Classes of both."""
    average_precision: _Floats
    """(2, C) AP at IoU 0.5 of each run; nan for a class without objects."""
    interval: _Floats
    """(2, C + 1) 2.5th and 97.5th percentile of the difference of the second from the first; the last is the mean's."""

    def table(self) -> str:
        """The settings that differ, then a line for each class and the mean, in percent."""
        lines = []
        if self.settings:
            lines.append("settings that differ:")
            width = max(len(name) for name in self.settings)
            lines += [f"  {name:<{width}}  {one} -> {other}" for name, (one, other) in self.settings.items()]
        else:
            lines.append("settings: the same")
        width = max(len("class"), *(len(printable(name)) for name in self.class_names))
        lines.append(f"AP at IoU 0.5 on {self.images} images that both held out, 95 % intervals by bootstrap:")
        lines.append(f"{'class':<{width}}  {'first':>6}  {'second':>6}  {'difference':>10}  interval")
        means = [mean_of_defined(row) for row in self.average_precision]
        rows = [*zip(self.class_names, *self.average_precision.tolist(), strict=True), ("mean", *means)]
        for (name, one, other), (low, high) in zip(rows, self.interval.T.tolist(), strict=True):
            if math.isnan(one):
                lines.append(f"{printable(name):<{width}}  {'n/a':>6}  {'n/a':>6}")
                continue
            lines.append(
                f"{printable(name):<{width}}  {100 * one:6.2f}  {100 * other:6.2f}  {100 * (other - one):+10.2f}  "
                f"{100 * low:+.2f} to {100 * high:+.2f}"
            )
        return "\n".join(lines)


def compare(first: str | Path, second: str | Path, *, samples: int = SAMPLES, seed: int = 0) -> Comparison:
    """Compare two runs that evaluated on some images in common.

    Args:
        first: run folder with a report.
        second: another one.
        samples: times that the images are drawn with replacement for the intervals.
        seed: of these draws.

    Raises:
        UsageError: a folder is no run, or has no report.
        RefineDetError: no image or class is shared, or a file is bad.
    """
    runs = [RunData.of(user_path(folder)) for folder in (first, second)]
    datasets = [run.held_out() for run in runs]
    names = datasets[0].class_names
    if names != datasets[1].class_names:
        raise RefineDetError(f"{runs[1].folder}: its classes differ from those of {runs[0].folder}")
    position = [{record.image_path.resolve(): index for index, record in enumerate(d.records)} for d in datasets]
    shared = [path for path in position[0] if path in position[1]]
    if not shared:
        raise RefineDetError(f"{runs[0].folder} and {runs[1].folder} held out no image in common")
    outcomes = []
    for run, dataset, index in zip(runs, datasets, position, strict=True):
        by_id = saved_detections(run.folder, dataset)
        records = [dataset[index[path]] for path in shared]
        outcomes.append(match_objects([by_id[record.image_id] for record in records], records, len(names)))
    method: VocMethod = "11-point" if runs[0].metric == "voc07" else "area"
    whole = np.ones(len(shared))
    average_precision = np.stack([_weighted(of_run, whole, method) for of_run in outcomes])
    differences = drawn_differences([(outcomes[0], outcomes[1])], method, samples=samples, seed=seed)
    defined = np.append(~np.isnan(average_precision[0]), True)
    interval = np.full((2, len(names) + 1), np.nan)
    # A class may have no object in a draw; such draws say nothing about it.
    interval[:, defined] = np.nanpercentile(differences[:, defined], [2.5, 97.5], axis=0)
    return Comparison(
        runs=(str(runs[0].folder), str(runs[1].folder)),
        images=len(shared),
        settings=_differences(*(_settings(run) for run in runs)),
        class_names=names,
        average_precision=average_precision,
        interval=interval,
    )


def drawn_differences(
    pairs: Sequence[tuple[Outcomes, Outcomes]], method: VocMethod, *, samples: int = SAMPLES, seed: int = 0
) -> _Floats:
    """Paired bootstrap: how the difference of two models varies when the images are drawn again with replacement.

    Args:
        pairs: outcomes of the first and the second model on the same N images; several pairs, of one training seed
            each, are drawn together and averaged.
        method: of the average precision.
        samples: times that the images are drawn.
        seed: of the draws.

    Returns:
        (samples, C + 1) AP of the second minus that of the first, class by class and then the mean over the classes;
        nan for a class without objects in a draw.
    """
    images, classes = pairs[0][0].num_images, pairs[0][0].num_classes
    rng = np.random.default_rng(seed)
    differences = np.empty((samples, classes + 1))
    for row in differences:
        weights = np.bincount(rng.integers(0, images, images), minlength=images).astype(np.float64)
        drawn = np.array([[_weighted(of_model, weights, method) for of_model in pair] for pair in pairs])
        row[:-1] = (drawn[:, 1] - drawn[:, 0]).mean(axis=0)
        row[-1] = np.mean([mean_of_defined(second) - mean_of_defined(first) for first, second in drawn])
    return differences


def saved_detections(folder: Path, dataset: DetectionDataset) -> dict[int | str, Detections]:
    """Image id to the detections that the last evaluation in a run folder saved; images without any are empty.

    Raises:
        UsageError: there are none.
        RefineDetError: they do not fit the images and classes of ``dataset``.
    """
    path = folder / REPORT_FOLDER / DETECTIONS_FILE
    if not path.is_file():
        raise UsageError(f"{folder}: has no report ({path.name} is missing); it is written when a training ends")
    label_of = {number: label for label, number in enumerate(dataset.category_ids or range(len(dataset.class_names)))}
    rows: dict[int | str, list[Any]] = {record.image_id: [] for record in dataset.records}
    try:
        for item in read_json(path):
            x, y, width, height = item["bbox"]
            box = (x, y, x + width, y + height)
            rows[item["image_id"]].append((box, item["score"], label_of[item["category_id"]]))
    except (KeyError, TypeError, ValueError):
        raise RefineDetError(f"{path}: does not fit the images and classes of the run's data") from None
    return {
        record.image_id: Detections(
            [row[0] for row in rows[record.image_id]],  # type: ignore[arg-type]
            [row[1] for row in rows[record.image_id]],  # type: ignore[arg-type]
            [row[2] for row in rows[record.image_id]],  # type: ignore[arg-type]
            dataset.class_names,
            (record.width, record.height),
        )
        for record in dataset.records
    }


def _weighted(outcomes: Outcomes, weights: _Floats, method: VocMethod) -> _Floats:
    """(C,) AP where image n stands ``weights[n]`` times in the data."""
    of_detection = np.repeat(weights, np.diff(outcomes.detection_bounds))
    of_object = np.repeat(weights, np.diff(outcomes.object_bounds)) * ~outcomes.object_ignored
    counted = np.bincount(outcomes.object_labels, weights=of_object, minlength=outcomes.num_classes)
    positives = counted.astype(np.float64)
    return weighted_average_precision(outcomes, of_detection, positives, method)


def _settings(run: RunData) -> dict[str, Any]:
    """What decides the outcome of a run; not the program, machine and time of its start."""
    return {name: value for name, value in to_dict(run.config).items() if name != "provenance"}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flat names of values that differ, and both values."""
    before, after = (
        {name.removeprefix("preset."): value for name, value in flatten(config)} for config in (first, second)
    )
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
