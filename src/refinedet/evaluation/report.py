"""What an evaluation found: figures, curves and detections, as a table, as JSON and as files in a folder."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from refinedet.data import DetectionDataset
from refinedet.evaluation.metrics import COCO_NAMES, CURVE_RECALLS
from refinedet.evaluation.outcomes import Outcomes
from refinedet.evaluation.settings import EvaluationSettings
from refinedet.evaluation.suspects import Suspect, find_suspects
from refinedet.files import check_output_folder, has_signature, json_text, make_folder, user_path, write_text
from refinedet.text import printable

if TYPE_CHECKING:
    from refinedet.data.records import Record
    from refinedet.detections import Detections

Metric = Literal["voc07", "voc", "coco"]

METRICS: dict[str, str] = {
    "voc07": "VOC 2007 11-point AP, IoU 0.5",
    "voc": "VOC area AP, IoU 0.5",
    "coco": "COCO AP, IoU 0.50:0.95",
}
"""The figures, and how a table names them."""

REPORT_FILE, DETECTIONS_FILE, TABLE_FILE = "report.json", "detections.json", "per_class.csv"
"""What ``Report.save`` writes."""
PAGE_FILE, IMAGE_FOLDER, IMAGE_NAME = "index.html", "images", re.compile(r"(worst|good|suspect)-(\d\d)(-small)?\.jpg")
"""The page about a report, and the folder and names of its images."""
REPORT_SIGNATURE = "report written by refinedet"
"""Stands in ``REPORT_FILE``: a folder with it holds an earlier report, which may be replaced."""


@dataclass(frozen=True, eq=False)
class Report(Mapping[str, float]):
    """What an evaluation found. ``report["mAP"]`` is the figure; everything else stands in the attributes.

    As a mapping it holds "mAP" (0..1, the mean over the classes that have objects) and, for COCO, the twelve numbers by
    name ("AP", "AP50", ... "ARl"; "mAP" is "AP"). COCO numbers without any object of their size are -1.
    """

    metric: Metric
    """The figure: "voc07", "voc" or "coco"."""
    figures: dict[str, float]
    """What the mapping holds."""
    per_class: dict[str, float]
    """Class name to AP in 0..1; nan for a class without an object that counts."""
    per_class_ap50: dict[str, float]
    """Class name to AP at IoU 0.5 in 0..1: for VOC's metrics the same as ``per_class``."""
    objects: dict[str, int]
    """Class name to the number of objects that count (neither difficult nor crowd)."""
    split: str | None
    """The split of the data, where it has splits."""
    data: str
    """Name of the data's folder or file."""
    settings: EvaluationSettings
    """How the detections were made."""
    curves: dict[str, npt.NDArray[np.float64]] = field(repr=False)
    """Class name to (101,) interpolated precision at recall 0, 0.01, ... 1 and IoU 0.5; classes with objects only."""
    outcomes: Outcomes = field(repr=False)
    """The detections of all images, matched with the objects at IoU 0.5."""
    detections: list[Detections] = field(repr=False)
    """What was found, one entry per image evaluated."""
    dataset: DetectionDataset = field(repr=False)
    """The data, for whoever wants to look at the images (``evaluation.page``)."""
    indices: list[int] = field(repr=False)
    """The position of each of these images in ``dataset``."""

    @property
    def images(self) -> int:
        """Images evaluated."""
        return len(self.indices)

    @property
    def image_ids(self) -> list[int | str]:
        """The data's id of each of these images."""
        return [self.dataset[index].image_id for index in self.indices]

    @property
    def records(self) -> list[Record]:
        """The images evaluated, with their objects."""
        return [self.dataset[index] for index in self.indices]

    @cached_property
    def suspects(self) -> list[Suspect]:
        """Annotations that may be wrong, since detections of high scores contradict them; surest first."""
        return find_suspects(self.outcomes, self.detections, self.records)

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """COCO's category id of each label, if the data has such ids."""
        return self.dataset.category_ids

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know, a sentence each."""
        settings = self.settings
        notes = []
        if settings.trained_on:
            run = f" ({printable(settings.run)})" if settings.run else ""
            notes.append(f"{settings.trained_on} of these {_count(self.images, 'image')} were trained on{run}")
        if settings.left_out is not None:
            notes.append(f"classes that model and data share: {len(self.per_class)}; left out: {settings.left_out}")
        if settings.repaired:
            notes.append(f"repaired while reading: {settings.repaired}")
        return notes

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
        """AP per class in percent, the mean, and COCO's numbers, as aligned text; COCO's table has AP50 as well."""
        where = printable(self.data + (f" {self.split}" if self.split else ""))
        names = {name: printable(name) for name in self.per_class}
        width = max([len("mean"), *map(len, names.values())])
        coco = self.metric == "coco"

        def row(name: str, objects: int, ap: float, ap50: float, rest: str = "") -> str:
            second = f"  {_percent(ap50)}" if coco else ""
            return f"{name:<{width}}  {objects:>7}  {_percent(ap)}{second}{rest}"

        lines = [f"{'class':<{width}}  {'objects':>7}  {'AP %':>6}" + (f"  {'AP50 %':>6}" if coco else "")]
        lines += [
            row(shown, self.objects[name], self.per_class[name], self.per_class_ap50[name])
            for name, shown in names.items()
        ]
        how = ", multi-scale" if self.settings.multi_scale else ""
        what = f"  ({METRICS[self.metric]}{how}; {_count(self.images, 'image')} of {where})"
        lines.append(row("mean", sum(self.objects.values()), self["mAP"], self.figures.get("AP50", math.nan), what))
        lines += self.notes
        if coco:
            for numbers in (COCO_NAMES[:6], COCO_NAMES[6:]):
                lines.append("  ".join(f"{name} {_percent(self[name]).strip()}" for name in numbers))
        return "\n".join(lines)

    def results(self) -> Iterator[dict[str, Any]]:
        """The detections in COCO's results format: image_id, category_id, bbox (x, y, width, height in pixels), score.

        Where the data has no category ids, category_id is the label, 0..C-1.
        """
        for image_id, detections in zip(self.image_ids, self.detections, strict=True):
            yield from detections.to_coco(image_id, self.category_ids)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the detections, ready for strict JSON: nan becomes None, tuples become lists."""
        content: dict[str, Any] = _json_value(
            {
                "metric": self.metric,
                "data": self.data,
                "split": self.split,
                "images": self.images,
                "figures": self.figures,
                "per_class": self.per_class,
                "per_class_ap50": self.per_class_ap50,
                "objects": self.objects,
                "settings": self.settings.to_dict(),
                "suspects": [
                    suspect.to_dict(self.dataset[self.indices[suspect.position]], self.detections[suspect.position])
                    for suspect in self.suspects
                ],
                "curves": {"iou": 0.5, "recall": CURVE_RECALLS, "precision": self.curves},
            }
        )
        return content

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``detections.json`` (COCO's results format) and ``per_class.csv`` into a folder.

        Args:
            folder: made if it does not exist; files of those names in it are replaced.

        Returns:
            The folder.

        Raises:
            RefineDetError: the folder cannot be made or written to.
        """
        folder = make_folder(user_path(folder))
        # First: a report folder is recognised by it, also one that a full disk or a kill left incomplete.
        write_text(folder / REPORT_FILE, json_text(self.to_dict(), REPORT_SIGNATURE, indent=2))
        # One detection per line: a million of them stay readable, and a diff of two runs is a diff of detections.
        lines = (json.dumps(result, allow_nan=False) for result in self.results())
        write_text(folder / DETECTIONS_FILE, "[" + ",\n".join(lines) + "]\n")
        write_text(folder / TABLE_FILE, self._csv())
        return folder

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "objects", "AP", "AP50"])
        for name, value in self.per_class.items():
            figures = ["" if math.isnan(figure) else figure for figure in (value, self.per_class_ap50[name])]
            shown = printable(name)
            # A spreadsheet takes what begins with one of these for a formula.
            writer.writerow(
                [f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown, self.objects[name], *figures]
            )
        return text.getvalue()


def check_report_folder(folder: Path, inputs: Sequence[str | Path] = ()) -> None:
    """Find out before the work whether a report may and can be written into a folder.

    Raises:
        UsageError: the folder is one of ``inputs``, or holds files of a report's names that are of another origin.
        RefineDetError: it cannot be made or written to.
    """
    names = names_of_report(folder)
    check_output_folder(
        folder, names, inputs=inputs, ours=lambda _: has_signature(folder / REPORT_FILE, REPORT_SIGNATURE)
    )


def names_of_report(folder: Path) -> list[str]:
    """Names in a folder that a report and its page would replace or remove."""
    images: list[str] = []
    with contextlib.suppress(OSError):  # there is no such folder yet
        images = [f"{IMAGE_FOLDER}/{name}" for name in os.listdir(folder / IMAGE_FOLDER) if IMAGE_NAME.fullmatch(name)]
    return [REPORT_FILE, DETECTIONS_FILE, TABLE_FILE, PAGE_FILE, *images]


def data_name(dataset: DetectionDataset) -> str:
    """What a report calls the data: the last part of its path."""
    # Not the whole path: a report is shared, the folders of the machine that made it are nobody's business.
    path = Path(str(dataset.path))
    return path.name or path.resolve().name or str(path)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _percent(value: float) -> str:
    return f"{'n/a':>6}" if math.isnan(value) or value < 0 else f"{100 * value:6.2f}"


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _json_value(value.tolist())
    if isinstance(value, np.generic):
        return _json_value(value.item())
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)
