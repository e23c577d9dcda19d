"""A page on which the errors of a detector can be seen: ``index.html`` and, beside it, the worst images.

The page is one file of HTML with its style and its charts inside; it loads nothing but the pictures in ``images/`` and
runs no script, so it can be sent around, opened from a disk, or put on any server.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from refinedet.data.records import Record
from refinedet.detections import Detections
from refinedet.draw import draw_boxes, read_curves
from refinedet.errors import RefineDetError
from refinedet.evaluation.charts import Line, line_chart
from refinedet.evaluation.diagnosis import SCORE_THRESHOLD, SIZES, Diagnosis, ImageDiagnosis, diagnose
from refinedet.evaluation.metrics import CURVE_RECALLS, VocMethod
from refinedet.evaluation.outcomes import ERRORS, HIT_IOU, NEAR_IOU, Outcome
from refinedet.evaluation.report import METRICS, Report
from refinedet.files import write_atomically, write_text

PAGE_FILE = "index.html"
IMAGE_FOLDER = "images"
WORST_IMAGES = 12
"""Images shown of each sort: most errors, and surest errors."""

_IMAGE_SIDE = 640
_POINTS = 160
"""Points of a learning curve; what a page this wide can show."""
_MARKED = 40
"""Curves of no more points show each."""
_OPEN_CURVES = 24
"""Precision-recall curves shown at once; the others open on a click."""
_LONG = 25
"""Rows beyond which a table scrolls in itself."""
_LISTED = 4
"""Errors named below an image."""

_FOUND, _MISSED, _WRONG, _IGNORED = (66, 133, 244), (255, 200, 20), (236, 30, 110), (150, 150, 150)
"""Blue, yellow, magenta and gray stay apart for the colour-blind, and on photos."""


@dataclass(frozen=True)
class _Kind:
    name: str
    meaning: str


_KINDS = {
    Outcome.LOCALIZATION: _Kind(
        "localization",
        f"right class, but the box overlaps its object by an IoU of only {NEAR_IOU:g} to {HIT_IOU:g}",
    ),
    Outcome.CLASSIFICATION: _Kind(
        "classification", f"an IoU above {HIT_IOU:g} with an object, but one of another class"
    ),
    Outcome.BOTH: _Kind("class and place", f"an IoU of {NEAR_IOU:g} to {HIT_IOU:g} with an object of another class"),
    Outcome.DUPLICATE: _Kind("duplicate", "a better scored box has found the object already"),
    Outcome.BACKGROUND: _Kind("background", f"an IoU below {NEAR_IOU:g} with every object"),
}
_MISSED_KIND = _Kind("missed", "an object that counts, found by no box")


def write_page(
    report: Report,
    folder: str | Path,
    *,
    metrics_csv: Path | None = None,
    score_threshold: float = SCORE_THRESHOLD,
) -> Path:
    """Write ``index.html`` and ``images/worst-01.jpg``, ... into a folder.

    At most 24 images are decoded, one at a time, so that memory does not grow with the data. A picture or a
    ``metrics_csv`` that cannot be read costs its place on the page, not the page.

    Args:
        report: what ``evaluate`` returned.
        folder: made if it does not exist; files of those names in it are replaced, and ``images/worst-NN.jpg`` of an
            earlier, longer page removed.
        metrics_csv: log of the training, for its curves.
        score_threshold: errors are counted among detections that score at least this.

    Returns:
        The page.

    Raises:
        RefineDetError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    page = folder / PAGE_FILE
    records = [report.dataset[index] for index in report.indices]
    # Nothing below the threshold of the evaluation is there to be counted.
    threshold = max(score_threshold, report.settings.score_threshold or 0.0)
    method: VocMethod = "11-point" if report.metric == "voc07" else "area"
    diagnosis = diagnose(report.outcomes, score_threshold=threshold, method=method)
    pictures = _write_pictures(report, records, diagnosis, folder / IMAGE_FOLDER)
    sections = [
        _Section("errors", "Errors", _errors(report, diagnosis)),
        _Section("classes", "Classes", _classes(report)),
        _Section("curves", "Precision and recall", _curves(report, diagnosis)),
        _Section("confusion", "Confusion", _confusion(report, diagnosis)),
        _Section("sizes", "Sizes", _sizes(report, diagnosis)),
        _Section("images", "Worst images", _gallery(pictures)),
    ]
    if metrics_csv is not None:
        sections.append(_Section("training", "Training", _training(metrics_csv)))
    write_text(page, _document(report, _headline(report, diagnosis), sections))
    return page


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    body: str


@dataclass(frozen=True)
class _Picture:
    """An image of the gallery, written already; ``file`` is None if its pixels could not be read."""

    file: str | None
    size: tuple[int, int]
    name: str
    summary: str
    errors: list[str]
    surest: bool


# The parts of the page, from top to bottom.


def _headline(report: Report, diagnosis: Diagnosis) -> str:
    objects, right, wrong = int(diagnosis.objects.sum()), diagnosis.right, diagnosis.wrong
    limit = f"{diagnosis.score_threshold:g}"
    tiles = [
        _tile("mAP", _percent(report["mAP"]), "%", METRICS[report.metric]),
        _tile(
            "objects found",
            _percent(right / objects),
            "%",
            f"{right:,} of {objects:,}, with a score of {limit} or more",
        ),
        _tile(
            "detections right", _percent(right / (right + wrong)), "%", f"{right:,} of {right + wrong:,} at that score"
        )
        if right + wrong
        else _tile("detections", "0", "", f"nothing scores {limit} or more"),
    ]
    gain, name = max((value - diagnosis.mean_ap, kind.name) for kind, value in _repairs(diagnosis))
    if gain > 0:
        note = f"points of {_repaired_measure(report)} that it costs"
        tiles.append(_tile(f"costliest error: {name}", f"&minus;{100 * gain:.1f}", "", note))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(what: str, figure: str, unit: str, note: str) -> str:
    return (
        f'<div class="tile"><p class="what">{escape(what)}</p><p class="figure">{figure}<small>{unit}</small></p>'
        f'<p class="note">{escape(note)}</p></div>'
    )


def _repairs(diagnosis: Diagnosis) -> list[tuple[_Kind, float]]:
    """Each kind of error, and what mean AP would be without it."""
    return [*((_KINDS[kind], diagnosis.repaired[kind]) for kind in ERRORS), (_MISSED_KIND, diagnosis.repaired_missed)]


def _repaired_measure(report: Report) -> str:
    # Repairs are measured at one IoU; averaged over ten, a kind of error would not be the same at each.
    return "AP at IoU 0.5" if report.metric == "coco" else "mAP"


def _errors(report: Report, diagnosis: Diagnosis) -> str:
    measure = _repaired_measure(report)
    columns = [diagnosis.outcomes[:, kind] for kind in ERRORS] + [diagnosis.missed]
    counts = [int(column.sum()) for column in columns]
    rows = [
        _row(
            f'{kind.name}<span class="note">{kind.meaning}</span>',
            f"{count:,}",
            _bar(count / max(1, *counts), "missed" if kind is _MISSED_KIND else "wrong"),
            _percent(value),
            f"{100 * (value - diagnosis.mean_ap):+.1f}".replace("-", "&minus;"),
        )
        for (kind, value), count in zip(_repairs(diagnosis), counts, strict=True)
    ]
    ignored = int(diagnosis.outcomes[:, Outcome.IGNORED].sum())
    left_out = f"; {ignored:,} detection{'s' * (ignored != 1)} on them left out" if ignored else ""
    names = list(report.per_class)
    errors = np.sum(columns, axis=0)
    most = max(1, *(int(column.max()) for column in columns))
    by_class = [
        _row(
            escape(names[label]),
            f"{diagnosis.objects[label]:,}",
            f"{diagnosis.outcomes[label, Outcome.TRUE_POSITIVE]:,}",
            *(_shaded(int(column[label]), column[label] / most, "w") for column in columns),
            f"{errors[label]:,}",
        )
        for label in np.argsort(-errors, kind="stable").tolist()
    ]
    return (
        f"<p>Counted among the detections that score {diagnosis.score_threshold:g} or more. The last columns say what "
        f"{measure} ({_percent(diagnosis.mean_ap)} %) would be if all errors of a kind were repaired, at whatever "
        "score; each kind is repaired alone, so the gains do not add up. Difficult and crowd objects are neither found "
        f"nor missed{left_out}.</p>"
        + _table(
            "kinds",
            "Kinds of error",
            ("error", "number", '<span class="sr">as a bar</span>', f"{measure} %<br>if repaired", "gain"),
            rows,
        )
        + _table(
            "grid",
            "Errors by class: that of the detection or, if missed, of the object. The stronger the colour, the more.",
            ("class", "objects", "found", *(kind.name for kind, _ in _repairs(diagnosis)), "errors"),
            by_class,
        )
    )


def _classes(report: Report) -> str:
    known = sorted((n for n, v in report.per_class.items() if not math.isnan(v)), key=lambda n: -report.per_class[n])
    absent = [name for name, value in report.per_class.items() if math.isnan(value)]
    rows = [
        _row(
            escape(name),
            f"{report.objects[name]:,}",
            _percent(report.per_class[name]),
            _bar(report.per_class[name], "right"),
        )
        for name in known
    ]
    none = f'<p class="note">No objects: {escape(", ".join(absent))}.</p>' if absent else ""
    caption = f"Average precision by class, {METRICS[report.metric]}"
    return _table("bars", caption, ("class", "objects", "AP %", _SCALE), rows) + none


def _curves(report: Report, diagnosis: Diagnosis) -> str:
    labels = {name: label for label, name in enumerate(report.per_class)}
    names = sorted(report.curves, key=lambda name: -report.per_class[name])
    mean = np.mean([report.curves[name] for name in names], axis=0)
    panels = [_curve_panel("all classes", f"mean AP {_percent(report['mAP'])}", mean, None)]
    for name in names:
        label = labels[name]
        right = int(diagnosis.outcomes[label, Outcome.TRUE_POSITIVE])
        kept = right + int(diagnosis.outcomes[label, list(ERRORS)].sum())
        dot = (right / int(diagnosis.objects[label]), right / kept) if kept else None
        panels.append(_curve_panel(name, f"AP {_percent(report.per_class[name])}", report.curves[name], dot))
    shown, rest = "".join(panels[:_OPEN_CURVES]), "".join(panels[_OPEN_CURVES:])
    more = (
        f"<details><summary>{len(panels) - _OPEN_CURVES} more classes</summary>"
        f'<div class="panels">{rest}</div></details>'
        if rest
        else ""
    )
    return (
        "<p>Of the detections above some score, precision is the share that is right, and recall the share of the "
        "objects that they find. Both at IoU 0.5, precision interpolated. The dot is where a score of "
        f"{diagnosis.score_threshold:g} stands; it lies below the curve where a lower score has better precision.</p>"
        f'<div class="panels">{shown}</div>{more}'
    )


def _curve_panel(name: str, figure: str, curve: npt.NDArray[np.float64], dot: tuple[float, float] | None) -> str:
    at_dot = "" if dot is None else f" At the threshold: recall {dot[0]:.0%}, precision {dot[1]:.0%}."
    samples = ", ".join(f"{curve[recall]:.0%} at recall {recall}%" for recall in (25, 50, 75))
    chart = line_chart(
        [Line(name, CURVE_RECALLS.tolist(), curve.tolist())],
        title=f"Precision over recall, {name}",
        description=f"Precision {samples}.{at_dot}",
        axes=("recall", "precision"),
        x_range=(0, 1),
        y_range=(0, 1),
        ticks=((0, 0.5, 1), (0, 0.5, 1)),
        dot=dot,
    )
    return _panel(name, figure, chart)


def _panel(title: str, figure: str, chart: str, kind: str = "one") -> str:
    return (
        f'<figure class="{kind}"><figcaption><b>{escape(title)}</b> <span>{escape(figure)}</span></figcaption>{chart}'
        "</figure>"
    )


def _confusion(report: Report, diagnosis: Diagnosis) -> str:
    names = list(report.per_class)
    matrix, last = diagnosis.confusion, len(names)
    rows = []
    for row in range(last + 1):
        # A row of objects is shaded by shares of them, the row without objects by its own largest entry.
        whole = max(1, int(matrix[row].sum()) if row < last else int(matrix[row].max()))
        cells = [
            _shaded(int(matrix[row, column]), matrix[row, column] / whole, "r" if row == column else "w", zero="")
            for column in range(last + (row < last))
        ]
        rows.append(_row(escape(names[row]) if row < last else "background", *cells))
    mistaken = matrix[:last, :last].copy()
    np.fill_diagonal(mistaken, 0)
    worst = [divmod(index, last) for index in np.argsort(-mistaken, axis=None, kind="stable")[:8].tolist()]
    frequent = "".join(
        f"<li><b>{escape(names[row])}</b> taken for <b>{escape(names[column])}</b>: {mistaken[row, column]:,} of "
        f"{diagnosis.objects[row]:,}</li>"
        for row, column in worst
        if mistaken[row, column]
    )
    listed = f'<p>Most frequent:</p><ul class="frequent">{frequent}</ul>' if frequent else ""
    return (
        f"<p>Rows are true classes, columns what the detector calls them, at an IoU above {HIT_IOU:g} and a score of "
        f"{diagnosis.score_threshold:g} or more. Each object stands once in its row. The row <i>background</i> holds "
        "detections that have no object to themselves: in the wrong place, on the background, or a second one.</p>"
        + listed
        + _table(
            "matrix many" if last > _LONG else "matrix",
            "Confusion matrix: numbers of objects; the stronger the colour, the larger the share of the row",
            ("true \\ predicted", *(f"<span>{escape(name)}</span>" for name in names), "<span>missed</span>"),
            rows,
        )
    )


def _sizes(report: Report, diagnosis: Diagnosis) -> str:
    if report.metric == "coco":
        values = [report[name] for name in ("APs", "APm", "APl")]
    else:
        values = diagnosis.ap_by_size.tolist()
    limits = ("area below 32 x 32 pixels", "below 96 x 96", "96 x 96 and above")
    rows = []
    for size, limit, value, objects, found in zip(
        SIZES, limits, values, diagnosis.objects_by_size.tolist(), diagnosis.found_by_size.tolist(), strict=True
    ):
        figures = ("no objects", "", "")
        if objects:
            figures = (_percent(found / objects), _percent(value), _bar(value, "right"))
        rows.append(_row(f'{size}<span class="note">{limit}</span>', f"{objects:,}", *figures))
    caption = f"Average precision by the size of the object, {METRICS[report.metric]}"
    return (
        "<p>In pixels of the original pictures; objects of other sizes do not count. Found: with a score of "
        f"{diagnosis.score_threshold:g} or more.</p>"
        + _table("bars", caption, ("size", "objects", "found %", "AP %", _SCALE), rows)
    )


def _gallery(pictures: Sequence[_Picture]) -> str:
    if not pictures:
        return "<p>No image has an error.</p>"
    legend = "".join(
        f'<li><i style="background:rgb{color}"></i>{text}</li>'
        for color, text in (
            (_FOUND, "object, found"),
            (_MISSED, "object, missed"),
            (_WRONG, "wrong detection, with its score"),
            (_IGNORED, "object that does not count"),
        )
    )
    parts = [f'<ul class="legend">{legend}</ul>']
    for surest, title, text in (
        (False, "Most errors", "Wrong detections and missed objects together."),
        (
            True,
            "Surest errors",
            "The wrong detections of the highest scores, in images not shown above. Some may be objects that nobody "
            "annotated.",
        ),
    ):
        chosen = "".join(_figure(picture) for picture in pictures if picture.surest == surest)
        if chosen:
            parts.append(f'<h3>{title}</h3><p>{text}</p><div class="gallery">{chosen}</div>')
    return "".join(parts)


def _figure(picture: _Picture) -> str:
    listed = "".join(f"<li>{escape(one)}</li>" for one in picture.errors)
    name, summary = escape(picture.name), escape(picture.summary)
    if picture.file is None:
        shown = '<p class="none">the picture cannot be read</p>'
    else:
        source = f"{IMAGE_FOLDER}/{picture.file}"
        width, height = picture.size
        shown = (
            f'<a href="{source}"><img src="{source}" width="{width}" height="{height}" loading="lazy" '
            f'alt="{name}: {summary}"></a>'
        )
    return (
        f"<figure>{shown}<figcaption><b>{name}</b> <span>{summary}</span></figcaption>"
        f'<ul class="listed">{listed}</ul></figure>'
    )


def _training(metrics_csv: Path) -> str:
    try:
        curves = read_curves(metrics_csv)
    except RefineDetError as error:
        # The file is named, not the folders of the machine.
        return f'<p class="none">{escape(str(error).replace(str(metrics_csv), metrics_csv.name))}</p>'
    losses = [name for name in curves if name == "total" or "loss" in name or name.startswith(("arm_", "odm_"))]
    panels = []
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
        chart = line_chart(
            lines,
            title=f"{title} over iterations",
            description="In the end: " + ", ".join(f"{line.name} {line.y[-1]:.4g}" for line in lines) + ".",
            axes=("iteration", axis),
            x_range=(0, max(line.x[-1] for line in lines)),
            y_range=(min(0.0, *values), 1.05 * max(values) if max(values) > 0 else 1.0),
            named=several,
            marked=not several and len(values) <= _MARKED,
            size=(460, 270),
        )
        last = f"best {max(values):.1f}" if axis.startswith("mAP") else ""
        panels.append(_panel(title, last, chart, "several" if several else "one"))
    if not panels:
        return '<p class="none">The log of the training holds no losses and no mAP yet.</p>'
    return f'<p>From {escape(metrics_csv.name)}.</p><div class="panels large">{"".join(panels)}</div>'


def _thinned(name: str, steps: Sequence[int], values: Sequence[float], scale: float) -> Line:
    """A curve of at most ``_POINTS`` points, each the mean of those it stands for."""
    size = math.ceil(len(steps) / _POINTS)
    starts = range(0, len(steps), size)
    return Line(
        name,
        [steps[min(start + size, len(steps)) - 1] for start in starts],
        [scale * float(np.mean(values[start : start + size])) for start in starts],
    )


def _document(report: Report, headline: str, sections: Sequence[_Section]) -> str:
    title = escape(report.data + (f" {report.split}" if report.split else ""))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    facts = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(report))
    links = "".join(f'<a href="#{section.anchor}">{section.title}</a>' for section in sections)
    parts = "\n".join(
        f'<section id="{section.anchor}"><h2>{section.title}</h2>{section.body}</section>' for section in sections
    )
    return (
        '<!DOCTYPE html>\n<!-- report written by refinedet -->\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>RefineDet on {title}</title>\n<style>\n{style}</style></head>\n<body><main>"
        f'<header><p class="eyebrow">RefineDet, evaluation</p><h1>{title}</h1><dl>{facts}</dl></header>\n{headline}'
        + (f"<nav>{links}</nav>" if links else "")
        + f"\n{parts}\n<footer>How errors are told apart: docs/testing.md of refinedet. The figures for programs: "
        "report.json, per_class.csv and detections.json beside this page.</footer></main></body></html>\n"
    )


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    settings = report.settings
    yield "measure", METRICS[report.metric]
    yield "images", f"{report.images:,}" + (", the first of the split" if settings.limit else "")
    count = len(report.per_class)
    yield "objects", f"{sum(report.objects.values()):,} in {count} class{'es' * (count != 1)}"
    if settings.left_out is not None:
        yield "classes", f"those that model and data share; left out: {settings.left_out}"
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
        yield "time", f"{settings.seconds_per_image:.3f} s per image"


# Pictures.


def _write_pictures(report: Report, records: Sequence[Record], diagnosis: Diagnosis, folder: Path) -> list[_Picture]:
    chosen = _worst(report.detections, diagnosis)
    pictures = []
    for number, (position, surest) in enumerate(chosen, start=1):
        record, found, image = records[position], report.detections[position], diagnosis.images[position]
        file: str | None = f"worst-{number:02d}.jpg"
        size = (0, 0)
        try:
            pixels = report.dataset.load_image(report.indices[position])
        except RefineDetError:
            file = None
        else:
            drawn = Image.fromarray(_drawn(pixels, record, found, image))
            size = drawn.size
            write_atomically(folder / f"worst-{number:02d}.jpg", _saver(drawn))
        wrong, missed = int(image.wrong.sum()), int(image.missed.sum())
        pictures.append(
            _Picture(
                file,
                size,
                record.image_path.name,
                f"{wrong} wrong, {missed} missed",
                _named_errors(found, image),
                surest,
            )
        )
    _remove_pictures(folder, keep=len(chosen))
    return pictures


def _worst(detections: Sequence[Detections], diagnosis: Diagnosis) -> list[tuple[int, bool]]:
    """Positions of the images to show, and whether it is for the score of an error rather than for the number."""
    errors = np.array([int(image.wrong.sum()) + int(image.missed.sum()) for image in diagnosis.images])
    surest = np.array(
        [
            float(found.scores[image.wrong].max()) if image.wrong.any() else -1.0
            for found, image in zip(detections, diagnosis.images, strict=True)
        ]
    )
    most = [index for index in np.lexsort((-surest, -errors)).tolist() if errors[index]][:WORST_IMAGES]
    others = [i for i in np.argsort(-surest, kind="stable").tolist() if surest[i] >= 0 and i not in most]
    return [(index, False) for index in most] + [(index, True) for index in others[:WORST_IMAGES]]


def _drawn(
    pixels: npt.NDArray[np.uint8], record: Record, found: Detections, image: ImageDiagnosis
) -> npt.NDArray[np.uint8]:
    """A small copy with objects and wrong detections; what is most worth seeing on top."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.LANCZOS)
    scale = np.array([picture.width / record.width, picture.height / record.height] * 2)
    names = found.class_names
    ignored = record.difficult | record.crowd
    wrong = _surest_first(found, image)
    boxes = [found.boxes[wrong]]
    texts = [f"{names[found.labels[index]]} {found.scores[index]:.0%}" for index in wrong]
    colors = [_WRONG] * len(wrong)
    for chosen, color in ((image.missed, _MISSED), (~image.missed & ~ignored, _FOUND), (ignored, _IGNORED)):
        boxes.append(record.boxes[chosen])
        texts += [names[label] for label in record.labels[chosen]]
        colors += [color] * int(chosen.sum())
    return draw_boxes(np.asarray(picture), np.concatenate(boxes) * scale, np.arange(len(texts)), texts, colors=colors)


def _surest_first(found: Detections, image: ImageDiagnosis) -> npt.NDArray[np.int64]:
    """Indices of the wrong detections, best score first."""
    wrong = np.flatnonzero(image.wrong)
    return wrong[np.argsort(-found.scores[wrong], kind="stable")]


def _named_errors(found: Detections, image: ImageDiagnosis) -> list[str]:
    wrong = _surest_first(found, image)
    listed = []
    for index in wrong[:_LISTED].tolist():
        name, kind = found.class_names[found.labels[index]], _KINDS[Outcome(image.outcomes[index])]
        listed.append(f"{name} {found.scores[index]:.0%}: {kind.name}")
    return listed + ([f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else [])


def _saver(picture: Image.Image) -> Callable[[Path], None]:
    # Thin lines in full colour: halved chroma would smear them.
    def save(path: Path) -> None:
        picture.save(path, format="JPEG", quality=85, subsampling=0)

    return save


def _remove_pictures(folder: Path, keep: int) -> None:
    """Take away those of an earlier page beyond the first ``keep``."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = re.fullmatch(r"worst-(\d\d)\.jpg", path.name)
        if match is not None and int(match[1]) > keep:
            with contextlib.suppress(OSError):
                path.unlink()


# Tables.


_SCALE = '<span class="scale"><i>0</i><i>50</i><i>100 %</i></span>'
"""Head of a column of bars."""


def _table(kind: str, caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls in itself where it is too wide, or very long; ``heads`` and ``rows`` are HTML."""
    tall = " tall" if len(rows) > _LONG else ""
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    # A scrolling region must be reachable by keyboard.
    return (
        f'<div class="wide{tall}" tabindex="0"><table class="{kind}"><caption><span>{caption}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(head: str, *cells: str) -> str:
    """A row; a cell that is no ``<td>`` yet becomes one."""
    ready = (cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{head}</th>{"".join(ready)}</tr>\n'


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) or value < 0 else f"{100 * value:.1f}"


def _bar(share: float, kind: str) -> str:
    width = 0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0)
    return f'<td class="bar"><span class="track"><span class="{kind}" style="width:{width:.1f}%"></span></span></td>'


def _shaded(count: int, share: float, hue: str, zero: str = "&middot;") -> str:
    """A cell in one of nine shades of right (r) or wrong (w)."""
    if not count:
        return f"<td>{zero}</td>"
    return f'<td class="{hue}{min(9, math.ceil(9 * math.sqrt(share)))}">{count:,}</td>'
