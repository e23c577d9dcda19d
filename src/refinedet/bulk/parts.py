"""The folder of a batch prediction: Parquet parts, a row for each image, and ``_manifest.json``.

A part is written aside and renamed, so every part that is there is whole. Which images are done is read from the parts
themselves; the manifest only keeps another model or threshold out. pyarrow is needed (``refinedet[batch]``).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import refinedet
from refinedet.dataclass_json import from_dict, to_dict
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import (
    check_output_folder,
    encoded,
    has_signature,
    json_text,
    read_json,
    remove_stale_parts,
    user_path,
    write_atomically,
    write_text,
)
from refinedet.text import reason

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise UsageError("batch prediction needs pyarrow: pip install 'refinedet[batch]'") from None

SIGNATURE = "batch written by refinedet"
MANIFEST_FILE = "_manifest.json"
SECONDS_PER_PART = 300.0
"""A part is written after this time however few rows it has, so that a kill costs at most so much work."""
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32()))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("names", pa.list_(pa.string())),
        pa.field("error", pa.string()),
        pa.field("model", pa.string(), nullable=False),
    ]
)
"""Columns of a part: boxes are xyxy in pixels of the image; error is null, or says why there are no detections; model
is the digest of the weights. Of an image that failed, width and height are null and the lists empty."""


@dataclass(frozen=True)
class Manifest:
    """``_manifest.json``: what made the rows, and how many there were when the last command ended."""

    model: str
    """Name of the weights as it was given."""
    model_digest: str
    """SHA-256 of the weights, the model's config and its class names."""
    threshold: float | None
    """Lowest score of the detections; None: all that post-processing keeps."""
    class_names: tuple[str, ...]
    """In label order."""
    category_ids: tuple[int, ...] | None = None
    """COCO category id of each label, where the model knows them."""
    version: str = refinedet.__version__
    """Of refinedet, at the last start."""
    images: int = 0
    """Rows, those with an error included."""
    failed: int = 0
    """Rows with an error."""
    complete: bool = False
    """Whether all images of the last command are done."""


def path_text(path: str) -> str:
    r"""A path as it stands in the rows: what is not UTF-8 in it is written ``\udcff``."""
    return encoded(path).decode()


def found_row(found: Detections, model: str) -> dict[str, Any]:
    """The row of an image."""
    return {
        "path": path_text(found.source or ""),
        "width": found.image_size[0],
        "height": found.image_size[1],
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
        "names": found.names,
        "error": None,
        "model": model,
    }


def failed_row(path: str, error: str, model: str) -> dict[str, Any]:
    """The row of an image without detections because of an error."""
    none: dict[str, Any] = {"boxes": [], "scores": [], "labels": [], "names": []}
    return {"path": path_text(path), "width": None, "height": None, **none, "error": path_text(error), "model": model}


def table_of(rows: list[dict[str, Any]]) -> Any:
    """A ``pyarrow.Table`` of rows."""
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class PartFolder:
    """A folder of parts.

    Args:
        path: the folder.
        rows_per_part: rows after which a part is written.
    """

    def __init__(self, path: str | Path, rows_per_part: int = 10_000) -> None:
        self.path = user_path(path)
        self._rows_per_part = rows_per_part
        self._buffer: list[Any] = []
        self._buffered, self._since, self._next = 0, 0.0, 0
        self._manifest: Manifest | None = None
        self.images = self.failed = 0
        """Rows in the parts, and those of them with an error."""

    @property
    def done(self) -> int:
        """Rows in the parts and at hand."""
        return self.images + self._buffered

    def parts(self) -> list[Path]:
        """The parts that are there, in the order of their numbers."""
        found = [path for path in self.path.iterdir() if _PART_NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def manifest(self) -> Manifest:
        """What made the parts.

        Raises:
            UsageError: the folder holds no batch prediction.
            RefineDetError: the manifest is damaged.
        """
        file = self.path / MANIFEST_FILE
        if not has_signature(file, SIGNATURE):
            raise UsageError(f"{self.path}: holds no batch prediction (no {MANIFEST_FILE} of 'refinedet batch')")
        values = read_json(file)
        values.pop("generator", None)
        return from_dict(Manifest, values, source=str(file))

    def check(self, wanted: Manifest) -> None:
        """Find out, before the work starts, whether rows of this model may be added.

        Raises:
            UsageError: the folder holds other files, or rows of another model or threshold.
            RefineDetError: it cannot be written to.
        """
        check_output_folder(self.path, ours=SIGNATURE)
        if not self.path.is_dir() or not any(not path.name.endswith(".part") for path in self.path.iterdir()):
            return
        there = self.manifest()
        if there.model_digest != wanted.model_digest:
            raise UsageError(
                f"{self.path}: holds detections of another model ({there.model}, digest {there.model_digest[:12]}, not "
                f"{wanted.model}, digest {wanted.model_digest[:12]}); choose another --out"
            )
        if there.threshold != wanted.threshold:
            raise UsageError(
                f"{self.path}: holds detections with --threshold {there.threshold}, not {wanted.threshold}; choose "
                "another --out"
            )

    def start(self, manifest: Manifest) -> set[str]:
        """Clear what a killed command left, write the manifest, and find out what is done; under the folder's lock.

        Returns:
            The paths that have a row.

        Raises:
            RefineDetError: a part cannot be read, or the manifest cannot be written.
        """
        remove_stale_parts(self.path)
        parts = self.parts()
        self._next = max((int(part.stem.removeprefix("part-")) for part in parts), default=-1) + 1
        done: set[str] = set()
        for part in parts:
            table = read_part(part, ["path", "error"])
            done.update(table["path"].to_pylist())
            self._count(table)
        self._manifest, self._since = manifest, time.monotonic()
        self._write_manifest(complete=False)
        return done

    def add(self, table: Any) -> None:
        """Take rows; a part is written when there are enough of them, or after ``SECONDS_PER_PART``.

        Raises:
            RefineDetError: it cannot be written; all parts before it are there.
        """
        self._buffer.append(table)
        self._buffered += len(table)
        if self._buffered >= self._rows_per_part or time.monotonic() - self._since >= SECONDS_PER_PART:
            self._write_part()

    def close(self, *, complete: bool) -> None:
        """Write the rows at hand as the last part, and the counts.

        Args:
            complete: whether all images of the command are done.

        Raises:
            RefineDetError: as ``add``.
        """
        self._write_part()
        self._write_manifest(complete=complete)

    def _count(self, table: Any) -> None:
        self.images += len(table)
        self.failed += len(table) - table["error"].null_count

    def _write_part(self) -> None:
        buffer, self._buffer = self._buffer, []
        self._buffered, self._since = 0, time.monotonic()
        if buffer:
            table = pa.concat_tables(buffer).combine_chunks()
            write_atomically(self.path / f"part-{self._next:05d}.parquet", lambda part: pq.write_table(table, part))
            self._next += 1
            self._count(table)

    def _write_manifest(self, *, complete: bool) -> None:
        assert self._manifest is not None
        counted = replace(self._manifest, images=self.images, failed=self.failed, complete=complete)
        write_text(self.path / MANIFEST_FILE, json_text(to_dict(counted), SIGNATURE))

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of all parts, one by one.

        Raises:
            RefineDetError: a part cannot be read.
        """
        for part in self.parts():
            yield from read_part(part, columns).to_pylist()


def read_part(part: Path, columns: Sequence[str] | None = None) -> Any:
    """A part as a ``pyarrow.Table``.

    Raises:
        RefineDetError: it cannot be read.
    """
    try:
        return pq.read_table(part, columns=None if columns is None else list(columns), partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise RefineDetError(
            f"{part}: not a readable part ({reason(error, 200)}); remove it, and the same command makes its rows anew"
        ) from None


def read_batch(folder: str | Path) -> Iterator[Detections]:
    """The detections of each image of a batch prediction, part by part; images that failed are left out.

    Args:
        folder: what ``batch`` wrote.

    Raises:
        UsageError: the folder holds no batch prediction.
        RefineDetError: a part cannot be read.

    Example:
        >>> from refinedet import batch, read_batch
        >>> folder = batch("voc07-320-resnet18", "examples/chelsea.jpg", "cats").folder
        >>> [detections.names for detections in read_batch(folder)]
        [['cat']]
    """
    parts = PartFolder(folder)
    class_names = parts.manifest().class_names
    for row in parts.rows():
        if row["error"] is None:
            size = (row["width"], row["height"])
            yield Detections(row["boxes"], row["scores"], row["labels"], class_names, size, row["path"])
