"""The health check behind ``refinedet inspect``: what is in a dataset, and what is wrong with it, file by file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from refinedet.data.layouts import list_splits, open_dataset
from refinedet.data.mosaic import draw_mosaic
from refinedet.data.problems import NO_ANNOTATION, REPEATED, UNREADABLE, Problem, describe_kinds
from refinedet.data.records import DetectionDataset
from refinedet.draw import write_image
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import check_output
from refinedet.images import read_image

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the sizes of boxes: smallest, 5%, quarter, median, three quarters, 95%, largest."""
MOSAIC_SIGNATURE = "mosaic drawn by refinedet"
"""Stands in the file, so that a later mosaic may replace it."""


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """How often a class occurs."""

    name: str
    objects: int
    """Boxes, difficult and crowd ones included."""
    images: int
    """Images with at least one of them."""
    difficult: int
    """Boxes with VOC's flag."""
    crowd: int
    """Boxes with COCO's flag."""


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """What ``inspect_dataset`` found."""

    path: Path
    """The dataset."""
    layout: str
    """Name of the layout of the files, such as "voc"."""
    split: str | None
    """None: everything."""
    splits: tuple[tuple[str, int | None], ...]
    """Names of all splits, with their numbers of images where everything is inspected; empty if there are none."""
    images: int
    """Images with a usable annotation; unreadable ones included."""
    boxes: int
    """Usable boxes."""
    images_without_objects: int
    """Images that are annotated, or may be without a label file, and have no objects."""
    images_left_out: int
    """Images that are not used because they have no annotation."""
    classes: tuple[ClassCount, ...]
    """In label order."""
    box_sizes: tuple[float, ...]
    """``QUANTILES`` of sqrt(box area / image area); empty without boxes."""
    smallest_image: tuple[int, int] | None
    """(width, height) of the image with the fewest pixels; None without images."""
    largest_image: tuple[int, int] | None
    """(width, height) of the image with the most pixels; None without images."""
    duplicate_boxes: int
    """Boxes that repeat another one of the same class in the same image."""
    unreadable: tuple[Path, ...]
    """Images that are truncated, damaged, or of another size than their annotation says."""
    problems: tuple[Problem, ...]
    """Every faulty box and file, by name; those of ``unreadable`` among them."""
    dataset: DetectionDataset = field(repr=False)
    """The records that were read."""

    def render(self, max_problems: int | None = None) -> str:
        """The report as text; after ``max_problems`` the rest of the problems is only counted."""
        title = f"{self.path} ({self.layout}, {'all images' if self.split is None else 'split ' + self.split})"
        lines = [
            title,
            f"images             {self.images:>8}",
            f"  without objects  {self.images_without_objects:>8}{self._share(self.images_without_objects)}",
            f"  left out         {self.images_left_out:>8}{self._share(self.images_left_out)}",
            f"  unreadable       {len(self.unreadable):>8}",
            f"boxes              {self.boxes:>8}",
            f"  duplicates       {self.duplicate_boxes:>8}",
            f"problems           {sum(problem.count for problem in self.problems):>8}",
        ]
        if self.problems:
            lines.append(f"  that is          {describe_kinds(self.problems)}")
        if self.splits:
            counts = (name if count is None else f"{name} {count}" for name, count in self.splits)
            lines.append(f"splits             {', '.join(counts)}")
        if self.smallest_image is not None and self.largest_image is not None:
            small, large = ("x".join(map(str, size)) for size in (self.smallest_image, self.largest_image))
            lines.append(f"image size         from {small} to {large}")
        if self.box_sizes:
            labels = ("min", "5%", "25%", "50%", "75%", "95%", "max")
            values = "  ".join(f"{label} {100 * size:.1f}" for label, size in zip(labels, self.box_sizes, strict=True))
            lines.append(f"box size           {values}   (square root of its share of the image, in %)")
        if self.classes:
            width = max(len("class"), *(len(count.name) for count in self.classes))
            lines += ["", f"{'class':<{width}}  {'objects':>8}  {'images':>8}  {'difficult':>9}  {'crowd':>6}"]
            lines += [
                f"{c.name:<{width}}  {c.objects:>8}  {c.images:>8}  {c.difficult:>9}  {c.crowd:>6}"
                for c in self.classes
            ]
        if self.problems:
            shown = self.problems if max_problems is None else self.problems[:max_problems]
            lines += ["", "problems:"]
            lines += [f"  {problem}" for problem in shown]
            if len(shown) < len(self.problems):
                lines.append(f"  and {len(self.problems) - len(shown)} more")
        return "\n".join(lines)

    def _share(self, images: int) -> str:
        """How much of all images these are; nothing where there are none."""
        every = self.images + self.images_left_out
        return f"   ({100 * images / every:.1f} % of the images)" if images else ""

    def write_mosaic(self, path: str | Path, columns: int = 4, count: int = 16, seed: int = 0) -> None:
        """Write one image that shows ``count`` random images with their boxes drawn and their file names below.

        Args:
            path: the file to write.
            columns: photos of 4:3 in a row.
            count: images to show.
            seed: of the choice.

        Raises:
            UsageError: no image can be read, a number is not positive, or the file is there and no earlier mosaic.
            RefineDetError: the file cannot be written.
        """
        check_output(Path(path), inputs=[self.path], ours=MOSAIC_SIGNATURE)
        if columns < 1 or count < 1:
            raise UsageError(f"a mosaic needs at least 1 column and 1 image, not {columns} and {count}")
        broken = set(self.unreadable)
        usable = [i for i, record in enumerate(self.dataset.records) if record.image_path not in broken]
        if not usable:
            raise UsageError(f"{self.path}: no readable image for a mosaic")
        chosen = np.random.default_rng(seed).permutation(len(usable))[:count]
        sheet = draw_mosaic(self.dataset, [usable[position] for position in sorted(chosen)], columns)
        write_image(Path(path), sheet, MOSAIC_SIGNATURE)


def inspect_dataset(
    path: str | Path,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    *,
    allow_outside: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> HealthReport:
    """Read a dataset leniently, decode every image, and count.

    Args:
        path: as for ``open_dataset``.
        split: as for ``open_dataset``; None inspects all images.
        class_names: as for ``open_dataset``.
        allow_outside: as for ``open_dataset``.
        progress: called with (images done, images in all) after each image.

    Raises:
        UsageError: no dataset at ``path``, unknown or empty split.
        RefineDetError: the dataset as a whole cannot be read, such as a COCO file that is no JSON.
    """
    dataset = open_dataset(path, split, class_names, strict=False, allow_outside=allow_outside)
    problems = list(dataset.problems)
    unreadable: list[Path] = []
    duplicates = 0
    for index, record in enumerate(dataset.records):
        try:
            read_image(record.image_path, size=(record.width, record.height))
        except RefineDetError as error:
            unreadable.append(record.image_path)
            reason = str(error).removeprefix(f"{record.image_path}: ")
            problems.append(Problem(record.image_path, reason, fatal=True, kind=UNREADABLE))
        rows = np.concatenate([record.boxes, record.labels[:, None].astype(np.float32)], axis=1)
        kinds, counts = np.unique(rows, axis=0, return_counts=True)
        for kind, times in zip(kinds[counts > 1], counts[counts > 1], strict=True):
            duplicates += int(times) - 1
            corners = ",".join(f"{value:g}" for value in kind[:4])
            name = dataset.class_names[int(kind[4])]
            message = f"{times} times the same box {corners} ({name})"
            problems.append(Problem(record.image_path, message, fatal=False, kind=REPEATED))
        if progress is not None:
            progress(index + 1, len(dataset))
    sizes = [(record.width, record.height) for record in dataset.records]
    relative = _relative_sizes(dataset)
    return HealthReport(
        path=dataset.path,
        layout=dataset.layout,
        split=dataset.split,
        splits=_count_splits(path, split, class_names, allow_outside=allow_outside),
        images=len(dataset),
        boxes=sum(len(record.labels) for record in dataset.records),
        images_without_objects=sum(len(record.labels) == 0 for record in dataset.records),
        images_left_out=sum(problem.count for problem in problems if problem.kind == NO_ANNOTATION),
        classes=_count_classes(dataset),
        box_sizes=tuple(float(value) for value in np.quantile(relative, QUANTILES)) if len(relative) else (),
        smallest_image=min(sizes, key=lambda size: (size[0] * size[1], size), default=None),
        largest_image=max(sizes, key=lambda size: (size[0] * size[1], size), default=None),
        duplicate_boxes=duplicates,
        unreadable=tuple(unreadable),
        problems=tuple(problems),
        dataset=dataset,
    )


def _relative_sizes(dataset: DetectionDataset) -> npt.NDArray[np.float64]:
    parts = [np.zeros(0)]
    for record in dataset.records:
        sides = (record.boxes[:, 2:] - record.boxes[:, :2]).astype(np.float64)
        parts.append(np.sqrt(sides.prod(axis=1) / (record.width * record.height)))
    return np.concatenate(parts)


def _count_classes(dataset: DetectionDataset) -> tuple[ClassCount, ...]:
    count = len(dataset.class_names)
    objects, images, difficult, crowd = (np.zeros(count, dtype=np.int64) for _ in range(4))
    for record in dataset.records:
        objects += np.bincount(record.labels, minlength=count)
        images[np.unique(record.labels)] += 1
        difficult += np.bincount(record.labels[record.difficult], minlength=count)
        crowd += np.bincount(record.labels[record.crowd], minlength=count)
    return tuple(
        ClassCount(name=name, objects=int(o), images=int(i), difficult=int(d), crowd=int(c))
        for name, o, i, d, c in zip(dataset.class_names, objects, images, difficult, crowd, strict=True)
    )


def _count_splits(
    path: str | Path, split: str | None, class_names: Sequence[str] | None, *, allow_outside: bool
) -> tuple[tuple[str, int | None], ...]:
    """Every split with its number of images, or only the names where a single split is looked at."""
    counts: list[tuple[str, int | None]] = []
    for name in list_splits(path):
        if split is not None:
            counts.append((name, None))
            continue
        try:
            dataset = open_dataset(path, name, class_names, strict=False, allow_outside=allow_outside)
            counts.append((name, len(dataset)))
        except RefineDetError:  # an empty list, say
            counts.append((name, 0))
    return tuple(counts)
