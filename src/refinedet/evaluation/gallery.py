"""The images of the page: which are worth seeing, and how they are drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from refinedet.data.records import Record
from refinedet.detections import Detections
from refinedet.draw import SIGNATURE, draw_boxes
from refinedet.errors import RefineDetError
from refinedet.evaluation.diagnosis import Diagnosis, ImageDiagnosis
from refinedet.evaluation.outcomes import Outcome
from refinedet.evaluation.report import IMAGE_NAME, Report
from refinedet.files import write_atomically
from refinedet.text import printable

WORST_IMAGES = 12
"""Images shown of each sort of error: most errors, and surest errors."""
SUSPECTS = 12
"""Suspected label errors shown."""
GOOD_IMAGES = 6
"""Images shown in which everything is right."""
KIND_NAMES = {
    Outcome.LOCALIZATION: "localization",
    Outcome.CLASSIFICATION: "classification",
    Outcome.BOTH: "class and place",
    Outcome.DUPLICATE: "duplicate",
    Outcome.BACKGROUND: "background",
}
"""The kinds of error, as the page calls them."""

FOUND, MISSED, WRONG, IGNORED = (66, 133, 244), (255, 200, 20), (236, 30, 110), (150, 150, 150)
"""Blue, yellow, magenta and gray stay apart for the colour-blind, and on photos."""
LEGEND = (
    (FOUND, "object, found"),
    (MISSED, "object, missed"),
    (WRONG, "wrong detection, with its score"),
    (IGNORED, "object that does not count"),
)
SUSPECT_LEGEND = (
    (WRONG, "detection, with its score"),
    (MISSED, "annotation that it contradicts"),
    (FOUND, "other annotations"),
    (IGNORED, "difficult or crowd"),
)

_THUMBNAIL_SIDE, _LARGEST_SIDE = 640, 2000
_LISTED = 4
"""Errors named below an image."""


@dataclass(frozen=True)
class GalleryEntry:
    """An image of the page, written already."""

    file: str | None
    """Its name; None if its pixels could not be read."""
    thumbnail: str | None
    """The small copy, which the page shows and which leads to ``file``."""
    size: tuple[int, int]
    """Width and height of the small copy."""
    name: str
    """Of the image in the data."""
    summary: str
    """How much is right or wrong."""
    errors: list[str]
    """The surest errors in words."""


@dataclass(frozen=True)
class Gallery:
    """Images of one sort."""

    kind: str
    """"errors", "surest", "good" or "suspects"."""
    title: str
    """Heading."""
    text: str
    """What they have in common."""
    entries: list[GalleryEntry]
    """At least one."""


def write_galleries(report: Report, records: Sequence[Record], diagnosis: Diagnosis, folder: Path) -> list[Gallery]:
    """Draw the images that are worth seeing into a folder, one at a time; an image that cannot be read is left out.

    Args:
        report: the detections and the data.
        records: of each image of the report.
        diagnosis: of the report.
        folder: for ``worst-01.jpg``, ``good-01.jpg``, ... and their small copies; those of an earlier page go.

    Raises:
        RefineDetError: the folder cannot be written to.
    """
    most, surest = _worst(report.detections, diagnosis)
    sorts = (
        ("errors", "Most errors", "Wrong detections and missed objects together.", most),
        (
            "surest",
            "Surest errors",
            "The wrong detections of the highest scores, in images not shown above. Some may be objects that nobody "
            "annotated.",
            surest,
        ),
        ("good", "All right", "Every object found and no error, the images with most objects first.", _good(diagnosis)),
    )
    galleries = []
    numbers = {"worst": 0, "good": 0}
    for kind, title, text, positions in sorts:
        stem = "good" if kind == "good" else "worst"
        entries = []
        for position in positions:
            numbers[stem] += 1
            file = f"{stem}-{numbers[stem]:02d}.jpg"
            entries.append(_write_entry(report, position, records[position], diagnosis.images[position], folder / file))
        if entries:
            galleries.append(Gallery(kind, title, text, entries))
    _remove_images(folder, numbers)
    return galleries


def write_suspects(report: Report, diagnosis: Diagnosis, folder: Path) -> list[GalleryEntry]:
    """Draw the surest suspected label errors into a folder, each in an image of its own.

    Args:
        report: the detections and the data.
        diagnosis: of the report.
        folder: for ``suspect-01.jpg``, ... and their small copies; those of an earlier page go.

    Raises:
        RefineDetError: the folder cannot be written to.
    """
    entries = []
    for number, suspect in enumerate(report.suspects[:SUSPECTS], 1):
        record, own = report.records[suspect.position], report.detections[suspect.position]
        item = own[suspect.detection]
        said = f"detected: {printable(item.name)} {item.score:.0%}"
        if suspect.target is not None:
            said += f"; annotated: {printable(own.class_names[record.labels[suspect.target]])}, IoU {suspect.iou:.2f}"
        # Only the detection and the object in question are drawn as such.
        whole = diagnosis.images[suspect.position]
        kept, doubted = np.zeros_like(whole.kept), np.zeros_like(whole.missed)
        kept[suspect.detection] = True
        if suspect.target is not None:
            doubted[suspect.target] = True
        image = replace(whole, kept=kept, missed=doubted)
        path = folder / f"suspect-{number:02d}.jpg"
        entry = _write_entry(report, suspect.position, record, image, path)
        entries.append(replace(entry, summary=suspect.kind, errors=[said]))
    _remove_images(folder, {"suspect": len(entries)})
    return entries


def _worst(detections: Sequence[Detections], diagnosis: Diagnosis) -> tuple[list[int], list[int]]:
    """Positions of the images with most errors, and of others with the errors of the highest scores."""
    errors = np.array([int(image.wrong.sum()) + int(image.missed.sum()) for image in diagnosis.images])
    surest = np.array(
        [
            float(own.scores[image.wrong].max()) if image.wrong.any() else -1.0
            for own, image in zip(detections, diagnosis.images, strict=True)
        ]
    )
    most = [index for index in np.lexsort((-surest, -errors)).tolist() if errors[index]][:WORST_IMAGES]
    others = [i for i in np.argsort(-surest, kind="stable").tolist() if surest[i] >= 0 and i not in most]
    return most, others[:WORST_IMAGES]


def _good(diagnosis: Diagnosis) -> list[int]:
    """Positions of the images without an error, most objects first."""
    right = np.array(
        [
            0
            if image.missed.any() or image.wrong.any()
            else int((image.kept & (image.outcomes == Outcome.TRUE_POSITIVE)).sum())
            for image in diagnosis.images
        ]
    )
    return [index for index in np.argsort(-right, kind="stable").tolist() if right[index]][:GOOD_IMAGES]


def _write_entry(report: Report, position: int, record: Record, image: ImageDiagnosis, path: Path) -> GalleryEntry:
    own = report.detections[position]
    wrong, missed = int(image.wrong.sum()), int(image.missed.sum())
    right = int((image.kept & (image.outcomes == Outcome.TRUE_POSITIVE)).sum())
    name = printable(record.image_path.name)
    summary = f"{wrong} wrong, {missed} missed" if wrong or missed else f"{right} of {right} found"
    try:
        pixels = report.dataset.load_image(report.indices[position])
    except RefineDetError:
        return GalleryEntry(None, None, (0, 0), name, summary, _named_errors(own, image))
    large = _drawn(pixels, record, own, image, _LARGEST_SIDE)
    small = _drawn(pixels, record, own, image, _THUMBNAIL_SIDE)
    thumbnail = path.with_name(f"{path.stem}-small.jpg")
    write_atomically(path, _saver(large))
    write_atomically(thumbnail, _saver(small))
    return GalleryEntry(path.name, thumbnail.name, small.size, name, summary, _named_errors(own, image))


def _drawn(
    pixels: npt.NDArray[np.uint8], record: Record, own: Detections, image: ImageDiagnosis, side: int
) -> Image.Image:
    """A copy of at most ``side`` pixels with objects and wrong detections; what is most worth seeing on top."""
    drawn = Image.fromarray(pixels)
    drawn.thumbnail((side, side), Image.Resampling.LANCZOS)
    scale = np.array([drawn.width / record.width, drawn.height / record.height] * 2)
    names = [printable(name) for name in own.class_names]
    ignored = record.difficult | record.crowd
    wrong = _surest_first(own, image)
    boxes = [own.boxes[wrong]]
    texts = [f"{names[own.labels[index]]} {own.scores[index]:.0%}" for index in wrong]
    colors = [WRONG] * len(wrong)
    for chosen, color in ((image.missed, MISSED), (~image.missed & ~ignored, FOUND), (ignored, IGNORED)):
        boxes.append(record.boxes[chosen])
        texts += [names[label] for label in record.labels[chosen]]
        colors += [color] * int(chosen.sum())
    return Image.fromarray(
        draw_boxes(np.asarray(drawn), np.concatenate(boxes) * scale, np.arange(len(texts)), texts, colors=colors)
    )


def _surest_first(own: Detections, image: ImageDiagnosis) -> npt.NDArray[np.int64]:
    """Indices of the wrong detections, best score first."""
    wrong = np.flatnonzero(image.wrong)
    return wrong[np.argsort(-own.scores[wrong], kind="stable")]


def _named_errors(own: Detections, image: ImageDiagnosis) -> list[str]:
    wrong = _surest_first(own, image)
    listed = []
    for index in wrong[:_LISTED].tolist():
        name = printable(own.class_names[own.labels[index]])
        listed.append(f"{name} {own.scores[index]:.0%}: {KIND_NAMES[Outcome(image.outcomes[index])]}")
    return listed + ([f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else [])


def _saver(drawn: Image.Image) -> Callable[[Path], None]:
    # Thin lines in full colour: halved chroma would smear them.
    def save(path: Path) -> None:
        drawn.save(path, format="JPEG", quality=85, subsampling=0, comment=SIGNATURE)

    return save


def _remove_images(folder: Path, keep: dict[str, int]) -> None:
    """Remove those of an earlier page beyond the numbers to keep."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = IMAGE_NAME.fullmatch(path.name)
        if match is not None and int(match[2]) > keep.get(match[1], 100):
            with contextlib.suppress(OSError):
                path.unlink()
