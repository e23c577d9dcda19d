"""A page on which the errors of a detector can be seen: ``index.html`` and, beside it, the images most worth seeing.

The page is one file of HTML with its style and its charts inside; it loads nothing but the images in ``images/`` and
runs no script, so it can be sent around, opened from a disk, or put on any server. This module counts; what the page
says, and how, stands in ``page.html`` (a jinja2 template) and ``page.css``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refinedet.draw import read_curves
from refinedet.errors import RefineDetError
from refinedet.evaluation.charts import Line, LineChart
from refinedet.evaluation.diagnosis import SCORE_THRESHOLD, SIZES, Diagnosis, best_f1, diagnose
from refinedet.evaluation.gallery import KIND_NAMES, LEGEND, SUSPECT_LEGEND, write_galleries, write_suspects
from refinedet.evaluation.metrics import CURVE_RECALLS, VocMethod
from refinedet.evaluation.outcomes import ERRORS, HIT_IOU, NEAR_IOU, Outcome
from refinedet.evaluation.report import IMAGE_FOLDER, METRICS, PAGE_FILE, REPORT_SIGNATURE, Report
from refinedet.evaluation.suspects import LOWEST_SCORE as SUSPECT_SCORE
from refinedet.files import user_path, write_text
from refinedet.text import printable

_POINTS = 160
"""Points of a learning curve; what a page this wide can show."""
_MARKED = 40
"""Curves of no more points show each."""
_MINUS = "\N{MINUS SIGN}"
_MEANINGS = {
    Outcome.LOCALIZATION: f"right class, but the box overlaps its object by an IoU of only {NEAR_IOU:g} to {HIT_IOU:g}",
    Outcome.CLASSIFICATION: f"an IoU above {HIT_IOU:g} with an object, but one of another class",
    Outcome.BOTH: f"an IoU of {NEAR_IOU:g} to {HIT_IOU:g} with an object of another class",
    Outcome.DUPLICATE: "a better scored box has found the object already",
    Outcome.BACKGROUND: f"an IoU below {NEAR_IOU:g} with every object",
}

_Cells = list[dict[str, Any]]


def write_page(
    report: Report,
    folder: str | Path,
    *,
    metrics_csv: Path | None = None,
    score_threshold: float = SCORE_THRESHOLD,
) -> Path:
    """Write ``index.html`` and ``images/worst-01.jpg``, ``images/good-01.jpg``, ... into a folder.

    At most 42 images are decoded, one at a time, so that memory does not grow with the data. An image or a
    ``metrics_csv`` that cannot be read costs its place on the page, not the page.

    Args:
        report: what ``evaluate`` returned.
        folder: made if it does not exist; files of those names in it are replaced, and images of an earlier, longer
            page removed.
        metrics_csv: log of the training, for its curves.
        score_threshold: errors are counted among detections that score at least this.

    Returns:
        The page.

    Raises:
        RefineDetError: the folder cannot be made or written to.
    """
    folder = user_path(folder)
    # Nothing below the threshold of the evaluation is there to be counted.
    threshold = max(score_threshold, report.settings.score_threshold or 0.0)
    method: VocMethod = "11-point" if report.metric == "voc07" else "area"
    diagnosis = diagnose(report.outcomes, score_threshold=threshold, method=method)
    galleries = write_galleries(report, report.records, diagnosis, folder / IMAGE_FOLDER)
    context = {
        **_description(report),
        **_error_tables(report, diagnosis),
        **_class_table(report),
        **_confusion(report, diagnosis),
        "tiles": _tiles(report, diagnosis),
        "curves": _curves(report, diagnosis),
        "sizes": _sizes(report, diagnosis),
        "galleries": galleries,
        "legend": LEGEND,
        "suspects": write_suspects(report, diagnosis, folder / IMAGE_FOLDER),
        "suspected": len(report.suspects),
        "suspect_legend": SUSPECT_LEGEND,
        "suspect_score": f"{SUSPECT_SCORE:g}",
        "training": None if metrics_csv is None else _training(metrics_csv),
    }
    page = folder / PAGE_FILE
    write_text(page, _environment().get_template("page.html").render(context))
    return page


def _environment() -> Environment:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters |= {"percent": _percent, "width": _width, "shade": _shade, "count": _count}
    return environment


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) or value < 0 else f"{100 * value:.1f}"


def _width(share: float) -> str:
    """Length of a bar in percent."""
    return f"{0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0):.1f}"


def _shade(share: float) -> int:
    """One of nine shades."""
    return min(9, math.ceil(9 * math.sqrt(share)))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# The parts of the page, from top to bottom.


def _description(report: Report) -> dict[str, Any]:
    provenance = report.settings.provenance
    made = [
        f"refinedet {provenance.version}" if provenance.version else "",
        f"torch {provenance.torch}" if provenance.torch else "",
        f"data {report.settings.data_digest[:12]}" if report.settings.data_digest else "",
    ]
    listed = ", ".join(part for part in made if part)
    return {
        "signature": REPORT_SIGNATURE,
        "style": Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8")),
        "title": printable(report.data + (f" {report.split}" if report.split else "")),
        "facts": list(_facts(report)),
        "notes": report.notes,
        "coco": report.metric == "coco",
        "measured": METRICS[report.metric],
        "names": [printable(name) for name in report.per_class],
        "hit_iou": f"{HIT_IOU:g}",
        "made": f"Made by {listed}." if listed else "",
    }


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    settings = report.settings
    if settings.weights:
        yield "weights", printable(settings.weights)
    yield "measure", METRICS[report.metric]
    yield "images", f"{report.images:,}" + (", the first of the split" if settings.limit else "")
    yield "objects", f"{sum(report.objects.values()):,} in {_classes(len(report.per_class))}"
    if settings.model is not None:
        height, width = settings.model.image_size
        yield "network", f"{settings.model.backbone}, {width} x {height} pixels"
    if settings.passes:
        yield "scales", f"multi-scale, {len(settings.passes)} passes"
    if settings.iteration is not None:
        yield "iteration", f"{settings.iteration:,}"
    if settings.score_threshold is not None:
        yield "scores in AP", f"{settings.score_threshold:g} and more"
    if settings.seconds_per_image is not None:
        device = f" ({settings.provenance.device})" if settings.provenance.device else ""
        yield "time", f"{settings.seconds_per_image:.3f} s per image{device}"
    if settings.provenance.date:
        yield "date", settings.provenance.date.replace("T", " ").replace("+00:00", " UTC")
    if settings.provenance.command:
        yield "command", settings.provenance.command


def _classes(number: int) -> str:
    return f"{number} class{'es' * (number != 1)}"


def _repairs(diagnosis: Diagnosis) -> list[tuple[str, str, float]]:
    """Name and meaning of each kind of error, and what mean AP would be without it."""
    kinds = [(KIND_NAMES[kind], _MEANINGS[kind], diagnosis.repaired[kind]) for kind in ERRORS]
    return [*kinds, ("missed", "an object that counts, found by no box", diagnosis.repaired_missed)]


def _repaired_measure(report: Report) -> str:
    # Repairs are measured at one IoU; averaged over ten, a kind of error would not be the same at each.
    return "AP at IoU 0.5" if report.metric == "coco" else "mAP"


def _tiles(report: Report, diagnosis: Diagnosis) -> list[dict[str, str]]:
    objects, right, wrong = int(diagnosis.objects.sum()), diagnosis.right, diagnosis.wrong
    limit = f"{diagnosis.score_threshold:g}"

    def tile(what: str, figure: str, unit: str, note: str) -> dict[str, str]:
        return {"what": what, "figure": figure, "unit": unit, "note": note}

    tiles = [tile("mAP", _percent(report["mAP"]), "%", METRICS[report.metric])]
    if report.metric == "coco":
        tiles.append(tile("AP50", _percent(report["AP50"]), "%", "AP at IoU 0.5"))
    note = f"{right:,} of {objects:,}, with a score of {limit} or more"
    tiles.append(tile("objects found", _percent(right / objects), "%", note))
    if right + wrong:
        note = f"{right:,} of {right + wrong:,} at that score"
        tiles.append(tile("detections right", _percent(right / (right + wrong)), "%", note))
    else:
        tiles.append(tile("detections", "0", "", f"nothing scores {limit} or more"))
    gain, name = max((value - diagnosis.mean_ap, name) for name, _, value in _repairs(diagnosis))
    if gain > 0:
        note = f"points of {_repaired_measure(report)} that it costs"
        tiles.append(tile(f"costliest error: {name}", f"{_MINUS}{100 * gain:.1f}", "", note))
    return tiles


def _error_tables(report: Report, diagnosis: Diagnosis) -> dict[str, Any]:
    columns = [diagnosis.outcomes[:, kind] for kind in ERRORS] + [diagnosis.missed]
    numbers = [int(column.sum()) for column in columns]
    kinds = [
        {
            "name": name,
            "meaning": meaning,
            "number": number,
            "share": number / max(1, *numbers),
            "color": "missed" if name == "missed" else "wrong",
            "repaired": repaired,
            "gain": f"{100 * (repaired - diagnosis.mean_ap):+.1f}".replace("-", _MINUS),
        }
        for (name, meaning, repaired), number in zip(_repairs(diagnosis), numbers, strict=True)
    ]
    names = [printable(name) for name in report.per_class]
    errors = np.sum(columns, axis=0)
    most = max(1, *(int(column.max()) for column in columns))
    by_class = [
        {
            "name": names[label],
            "objects": int(diagnosis.objects[label]),
            "found": int(diagnosis.outcomes[label, Outcome.TRUE_POSITIVE]),
            "cells": [{"count": int(column[label]), "share": column[label] / most} for column in columns],
            "errors": int(errors[label]),
        }
        for label in np.argsort(-errors, kind="stable").tolist()
    ]
    return {
        "threshold": f"{diagnosis.score_threshold:g}",
        "measure": _repaired_measure(report),
        "mean_ap": diagnosis.mean_ap,
        "ignored": int(diagnosis.outcomes[:, Outcome.IGNORED].sum()),
        "kinds": kinds,
        "errors_by_class": by_class,
    }


def _class_table(report: Report) -> dict[str, Any]:
    labels = {name: label for label, name in enumerate(report.per_class)}
    known = sorted((n for n, v in report.per_class.items() if not math.isnan(v)), key=lambda n: -report.per_class[n])
    thresholds, f1 = best_f1(report.outcomes)
    rows = [
        {
            "name": printable(name),
            "objects": report.objects[name],
            "ap": report.per_class[name],
            "ap50": report.per_class_ap50[name],
            "threshold": f"{thresholds[labels[name]]:.2f}" if f1[labels[name]] > 0 else "n/a",
            "f1": float(f1[labels[name]]),
        }
        for name in known
    ]
    return {"classes": rows, "absent": [printable(n) for n, value in report.per_class.items() if math.isnan(value)]}


def _curves(report: Report, diagnosis: Diagnosis) -> list[dict[str, Any]]:
    labels = {name: label for label, name in enumerate(report.per_class)}
    names = sorted(report.curves, key=lambda name: -report.per_class[name])
    mean = np.mean([report.curves[name] for name in names], axis=0)
    charts = [_curve("all classes", f"mean AP {_percent(report['mAP'])}", mean, None)]
    for name in names:
        label = labels[name]
        right = int(diagnosis.outcomes[label, Outcome.TRUE_POSITIVE])
        kept = right + int(diagnosis.outcomes[label, list(ERRORS)].sum())
        dot = (right / int(diagnosis.objects[label]), right / kept) if kept else None
        figure = f"AP {_percent(report.per_class[name])}"
        charts.append(_curve(printable(name), figure, report.curves[name], dot))
    return charts


def _curve(name: str, figure: str, curve: npt.NDArray[np.float64], dot: tuple[float, float] | None) -> dict[str, Any]:
    at_dot = "" if dot is None else f" At the threshold: recall {dot[0]:.0%}, precision {dot[1]:.0%}."
    samples = ", ".join(f"{curve[recall]:.0%} at recall {recall}%" for recall in (25, 50, 75))
    svg = LineChart(
        lines=[Line(name, CURVE_RECALLS.tolist(), curve.tolist())],
        title=f"Precision over recall, {name}",
        description=f"Precision {samples}.{at_dot}",
        axes=("recall", "precision"),
        x_range=(0, 1),
        y_range=(0, 1),
        ticks=((0, 0.5, 1), (0, 0.5, 1)),
        dot=dot,
    ).svg()
    return {"title": name, "figure": figure, "svg": Markup(svg)}


def _confusion(report: Report, diagnosis: Diagnosis) -> dict[str, Any]:
    names = [printable(name) for name in report.per_class]
    matrix, last = diagnosis.confusion, len(names)
    rows = []
    for row in range(last + 1):
        # A row of objects is shaded by shares of them, the row without objects by its own largest entry.
        whole = max(1, int(matrix[row].sum()) if row < last else int(matrix[row].max()))
        cells: _Cells = [
            {
                "count": int(matrix[row, column]),
                "share": matrix[row, column] / whole,
                "hue": "r" if row == column else "w",
            }
            for column in range(last + (row < last))
        ]
        rows.append({"name": names[row] if row < last else "background", "cells": cells})
    mistaken = matrix[:last, :last].copy()
    np.fill_diagonal(mistaken, 0)
    worst = [divmod(index, last) for index in np.argsort(-mistaken, axis=None, kind="stable")[:8].tolist()]
    confused = [
        {
            "true": names[row],
            "predicted": names[column],
            "count": int(mistaken[row, column]),
            "objects": int(diagnosis.objects[row]),
        }
        for row, column in worst
        if mistaken[row, column]
    ]
    return {"matrix": rows, "confused": confused}


def _sizes(report: Report, diagnosis: Diagnosis) -> list[dict[str, Any]]:
    if report.metric == "coco":
        values = [report[name] for name in ("APs", "APm", "APl")]
    else:
        values = diagnosis.ap_by_size.tolist()
    limits = ("area below 32 x 32 pixels", "below 96 x 96", "96 x 96 and above")
    return [
        {"name": size, "limit": limit, "objects": objects, "found": found / max(1, objects), "ap": value}
        for size, limit, value, objects, found in zip(
            SIZES, limits, values, diagnosis.objects_by_size.tolist(), diagnosis.found_by_size.tolist(), strict=True
        )
    ]


def _training(metrics_csv: Path) -> dict[str, Any]:
    try:
        curves = read_curves(metrics_csv)
    except RefineDetError as error:
        # The file is named, not the folders of the machine.
        return {"fault": str(error).replace(str(metrics_csv), metrics_csv.name)}
    losses = [name for name in curves if name == "total" or "loss" in name or name.startswith(("arm_", "odm_"))]
    charts = []
    for title, axis, names, scale in (
        ("Loss", "loss", losses, 1.0),
        ("mAP on the evaluation split", "mAP, %", ["mAP"], 100.0),
        ("Learning rate", "learning rate", ["learning_rate"], 1.0),
    ):
        lines = [_thinned(name.replace("_", " "), *curves[name], scale) for name in names if name in curves]
        values = [value for line in lines for value in line.y if math.isfinite(value)]
        if not values:
            continue
        several = len(lines) > 1
        svg = LineChart(
            lines=lines,
            title=f"{title} over iterations",
            description="In the end: " + ", ".join(f"{line.name} {line.y[-1]:.4g}" for line in lines) + ".",
            axes=("iteration", axis),
            x_range=(0, max(line.x[-1] for line in lines)),
            y_range=(min(0.0, *values), 1.05 * max(values) if max(values) > 0 else 1.0),
            named=several,
            marked=not several and len(values) <= _MARKED,
            size_wh=(460, 270),
        ).svg()
        figure = f"best {max(values):.1f}" if axis.startswith("mAP") else ""
        charts.append({"title": title, "figure": figure, "svg": Markup(svg), "kind": "several" if several else "one"})
    if not charts:
        return {"fault": "The log of the training holds no losses and no mAP yet."}
    return {"fault": "", "source": metrics_csv.name, "charts": charts}


def _thinned(name: str, steps: Sequence[int], values: Sequence[float], scale: float) -> Line:
    """A curve of at most ``_POINTS`` points, each the mean of those it stands for."""
    size = math.ceil(len(steps) / _POINTS)
    starts = range(0, len(steps), size)
    return Line(
        name,
        [steps[min(start + size, len(steps)) - 1] for start in starts],
        [scale * float(np.mean(values[start : start + size])) for start in starts],
    )
