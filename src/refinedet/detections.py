"""Detections: what a detector found in one image. Plain numpy, no torch."""

from __future__ import annotations

import base64
import html
import json
import numbers
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from refinedet import draw
from refinedet.errors import RefineDetError, UsageError, did_you_mean
from refinedet.files import check_output, user_path
from refinedet.images import ImageSource, read_image
from refinedet.text import printable

_NOTEBOOK_SIDE = 800


class Detection(NamedTuple):
    """One detected object."""

    box: npt.NDArray[np.float32]
    """(4,) xyxy in pixels of the original image."""
    score: float
    """0..1."""
    label: int
    """0..C-1."""
    name: str
    """Name of the class."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes, scores and labels of one image, best first as the detector returns them.

    The arrays are converted on construction; none is shared with a network.

    Raises:
        UsageError: the arrays differ in length, or a label has no name.

    Example:
        >>> found = Detections([[10, 20, 110, 220]], [0.9], [1], ("cat", "dog"), (640, 480))
        >>> found.names
        ['dog']
        >>> found[0].name, found.counts, found.filter(labels="cat")
        ('dog', {'dog': 1}, Detections(nothing in an image of 640x480))
        >>> found.to_coco(image_id=7)
        [{'image_id': 7, 'category_id': 1, 'bbox': [10.0, 20.0, 100.0, 200.0], 'score': 0.9}]
    """

    boxes: npt.NDArray[np.float32]
    """(D, 4) float32, xyxy, pixels of the original image (edges: a box over the whole image is 0, 0, W, H)."""
    scores: npt.NDArray[np.float32]
    """(D,) float32 in 0..1."""
    labels: npt.NDArray[np.int64]
    """(D,) int64 in 0..C-1."""
    class_names: tuple[str, ...]
    """Name of each label, C of them."""
    image_size: tuple[int, int]
    """Width and height of the original image in pixels."""
    source: str | None = None
    """Path or address the image came from, if it came from one."""
    time: float | None = None
    """Of a frame of a video: seconds from its start."""
    frame: int | None = None
    """Of a frame of a video: its number, from 0."""
    track_ids: npt.NDArray[np.int64] | None = None
    """(D,) number of each object over the frames of a video, from 1; -1 of those that are not followed yet."""

    def __post_init__(self) -> None:
        boxes = np.array(self.boxes, dtype=np.float32).reshape(-1, 4)
        scores = np.array(self.scores, dtype=np.float32).reshape(-1)
        labels = np.array(self.labels, dtype=np.int64).reshape(-1)
        if not len(boxes) == len(scores) == len(labels):
            raise UsageError(
                f"{len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels: the numbers must be equal"
            )
        names = tuple(self.class_names)
        tracks = None if self.track_ids is None else np.array(self.track_ids, dtype=np.int64).reshape(-1)
        if tracks is not None and len(tracks) != len(boxes):
            raise UsageError(f"{len(boxes)} boxes, {len(tracks)} track ids: the numbers must be equal")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(names)):
            raise UsageError(f"labels must lie in 0..{len(names) - 1}, found {labels.min()}..{labels.max()}")
        width, height = self.image_size
        size = int(width), int(height)
        values = {"boxes": boxes, "scores": scores, "labels": labels, "class_names": names, "image_size": size}
        for name, value in {**values, "track_ids": tracks}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def empty(cls, class_names: Sequence[str], image_size: tuple[int, int], source: str | None = None) -> Detections:
        """Nothing found in an image of that (width, height)."""
        none = np.zeros(0)
        return cls(none.reshape(0, 4), none, none, tuple(class_names), image_size, source)  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[label] for label in self.labels]

    @property
    def xywh(self) -> npt.NDArray[np.float32]:
        """(D, 4) left, top, width, height in pixels."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)

    @property
    def areas(self) -> npt.NDArray[np.float32]:
        """(D,) areas of the boxes in square pixels."""
        sides: npt.NDArray[np.float32] = np.maximum(self.boxes[:, 2:] - self.boxes[:, :2], 0)
        return sides[:, 0] * sides[:, 1]

    @property
    def counts(self) -> dict[str, int]:
        """Name of each class that was found, and how often, in the order of the first of each."""
        return dict(Counter(self.names))

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for index in range(len(self)):
            yield self[index]

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | npt.NDArray[Any] | Sequence[int] | Sequence[bool]) -> Detections: ...
    def __getitem__(
        self, index: int | np.integer[Any] | slice | npt.NDArray[Any] | Sequence[int] | Sequence[bool]
    ) -> Detection | Detections:
        """One detection by its number; several by a slice, a mask of D booleans, or an array of numbers."""
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            label = int(self.labels[index])
            return Detection(self.boxes[index], float(self.scores[index]), label, self.class_names[label])
        chosen = index
        if not isinstance(index, slice):
            chosen = np.asarray(index)
            if chosen.size == 0:
                chosen = chosen.astype(np.int64)
            if chosen.ndim != 1 or chosen.dtype.kind not in "iub":
                raise UsageError("detections are picked by a number, a slice, a mask of booleans or a list of numbers")
            if chosen.dtype.kind == "b" and len(chosen) != len(self):
                raise UsageError(f"a mask of {len(chosen)} booleans for {len(self)} detections")
        return self._take(chosen)

    def _take(self, chosen: Any) -> Detections:
        tracks = None if self.track_ids is None else self.track_ids[chosen]
        arrays = self.boxes[chosen], self.scores[chosen], self.labels[chosen]
        return replace(self, boxes=arrays[0], scores=arrays[1], labels=arrays[2], track_ids=tracks)

    def __add__(self, other: Detections) -> Detections:
        """These detections, then the others, of the same image and classes; they are not sorted again."""
        if not isinstance(other, Detections):
            return NotImplemented
        if (self.class_names, self.image_size) != (other.class_names, other.image_size):
            raise UsageError("only detections of the same classes in an image of the same size can be added")
        return replace(
            self,
            boxes=np.concatenate([self.boxes, other.boxes]),
            scores=np.concatenate([self.scores, other.scores]),
            labels=np.concatenate([self.labels, other.labels]),
            source=self.source if self.source == other.source else None,
            track_ids=None,
        )

    def __repr__(self) -> str:
        what = ", ".join(f"{count} {name}" for name, count in self.counts.items()) or "nothing"
        width, height = self.image_size
        return f"Detections({what} in {self.source or 'an image'} of {width}x{height})"

    def filter(
        self,
        threshold: float | None = None,
        labels: Sequence[int | str] | int | str | None = None,
        top: int | None = None,
    ) -> Detections:
        """Fewer detections, in the same order.

        Args:
            threshold: Keep scores of at least this.
            labels: Keep these classes, given by index or by name; one or several.
            top: Then keep this many of the best scores.

        Raises:
            UsageError: a class that does not exist, a threshold outside 0..1, or a negative ``top``.
        """
        check_threshold(threshold)
        keep = np.ones(len(self), dtype=bool)
        if threshold is not None:
            keep &= self.scores >= np.float32(threshold)
        if labels is not None:
            several = [labels] if isinstance(labels, (str, int, np.integer)) else labels
            keep &= np.isin(self.labels, [self._label(label) for label in several])
        indices = np.flatnonzero(keep)
        if top is not None:
            if top < 0:
                raise UsageError(f"top must not be negative, not {top}")
            best = np.argsort(-self.scores[indices], kind="stable")[:top]
            indices = indices[np.sort(best)]
        return self._take(indices)

    def _label(self, label: int | str) -> int:
        if isinstance(label, str):
            if label in self.class_names:
                return self.class_names.index(label)
            raise UsageError(f"unknown class '{label}': {did_you_mean(label, self.class_names)}")
        if not isinstance(label, (int, np.integer)):
            raise UsageError(f"a class is given by its name or its label, not by {label!r}")
        if not 0 <= label < len(self.class_names):
            raise UsageError(f"unknown class {label}: labels go from 0 to {len(self.class_names) - 1}")
        return int(label)

    def table(self) -> str:
        """One line per detection, aligned: class, score, box corners in pixels."""
        if not len(self):
            return "nothing found"
        names = [printable(name) for name in self.names]
        wide = max(len("class"), *(len(name) for name in names))
        lines = [f"{'class':<{wide}}  score      x1      y1      x2      y2"]
        for name, score, box in zip(names, self.scores, self.boxes, strict=True):
            corners = " ".join(f"{value:7.1f}" for value in box)
            lines.append(f"{name:<{wide}}  {score:5.3f} {corners}")
        return "\n".join(lines)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The COCO results format: boxes as x, y, width, height in pixels.

        Args:
            image_id: Id of the image in the annotation file.
            category_ids: COCO category id of each label, C of them; by default the labels themselves.

        Raises:
            UsageError: fewer or more ids than classes.
        """
        if category_ids is not None and len(category_ids) != len(self.class_names):
            raise UsageError(f"{len(category_ids)} category ids for {len(self.class_names)} classes")
        sizes = self.boxes[:, 2:] - self.boxes[:, :2]
        return [
            {
                "image_id": image_id,
                "category_id": int(label) if category_ids is None else int(category_ids[label]),
                "bbox": [*_shortest(box[:2]), *_shortest(size)],
                "score": _shortest([score])[0],
            }
            for box, size, score, label in zip(self.boxes, sizes, self.scores, self.labels, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, lossless: source, image size, and per detection label, name, score and xyxy box.

        Of a frame of a video also its number and time, and the track of each detection.
        """
        objects: list[dict[str, Any]] = [
            {"label": int(label), "name": name, "score": _shortest([score])[0], "box": _shortest(box)}
            for label, name, score, box in zip(self.labels, self.names, self.scores, self.boxes, strict=True)
        ]
        for item, track in zip(objects, () if self.track_ids is None else self.track_ids.tolist(), strict=False):
            item["track"] = track
        moment: dict[str, Any] = {} if self.time is None else {"frame": self.frame, "time": round(self.time, 6)}
        width, height = self.image_size
        return {"source": self.source, **moment, "width": width, "height": height, "detections": objects}

    def to_json(self) -> str:
        """``to_dict`` as a line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each detection: name, label, score, x1, y1, x2, y2, source.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("pandas is not installed: pip install pandas") from None
        corners = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T, strict=True))
        columns = {"name": self.names, "label": self.labels, "score": self.scores, **corners}
        return pandas.DataFrame({**columns, "source": [self.source] * len(self)})

    def to_supervision(self) -> Any:
        """The same as ``supervision.Detections`` (needs the extra ``refinedet[supervision]``).

        Raises:
            UsageError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UsageError("supervision is not installed: pip install 'refinedet[supervision]'") from None
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            tracker_id=self.track_ids,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(
        self,
        image: ImageSource | None = None,
        *,
        line_width: int | None = None,
        labels: bool = True,
        font: str | Path | None = None,
    ) -> npt.NDArray[np.uint8]:
        """A copy of the image with these detections on it; very small images are enlarged.

        Args:
            image: the image, of any kind that ``RefineDet.predict`` takes; by default ``source`` is read again.
            line_width: thickness of the outlines in pixels; by default it follows the size of the image.
            labels: whether names and scores are written.
            font: font file for the names; by default one that has their letters.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            UsageError: no image is given and none is known.
            RefineDetError: the image cannot be read, or has another size.
        """
        if image is None:
            if self.source is None:
                raise UsageError("these detections do not come from a file; give the image: draw(image)")
            image = self.source
        pixels = read_image(image)
        if pixels.shape[1::-1] != self.image_size:
            here, there = (f"{width}x{height}" for width, height in (pixels.shape[1::-1], self.image_size))
            raise RefineDetError(f"the image is {here}, but these detections were made in one of {there}")
        return draw.draw_boxes(
            pixels,
            self.boxes,
            self.labels,
            self.class_names,
            self.scores,
            tracks=self.track_ids,
            line_width=line_width,
            show_labels=labels,
            font=font,
            enlarge=True,
        )

    def save(self, path: str | Path, image: ImageSource | None = None, **settings: Any) -> Path:
        """Write the drawn image to a .jpg or .png file.

        Args:
            path: the file; one that this package drew is replaced, every other is kept.
            image: as in ``draw``.
            **settings: of ``draw``.

        Returns:
            The path.

        Raises:
            UsageError: the file exists and was not drawn by this package, or has another ending.
            RefineDetError: the image cannot be read, or the file cannot be written.
        """
        inputs = [self.source] if self.source else []
        target = check_output(user_path(path), ours=draw.SIGNATURE, inputs=inputs)
        draw.write_image(target, self.draw(image, **settings), draw.SIGNATURE)
        return target

    def _repr_png_(self) -> bytes | None:
        """The drawn image, for notebooks; None where the source is not known."""
        try:
            return draw.png_bytes(self.draw(), _NOTEBOOK_SIDE)
        except RefineDetError:
            return None

    def _repr_html_(self) -> str:
        """The drawn image and the table, for notebooks."""
        drawn = self._repr_png_()
        image = f'<img src="data:image/png;base64,{base64.b64encode(drawn).decode()}">' if drawn else ""
        return f"<div>{image}<pre>{html.escape(repr(self))}\n{html.escape(self.table())}</pre></div>"


def check_threshold(threshold: Any) -> None:
    """Refuse what is no score.

    Raises:
        UsageError: not None and not within 0..1.
    """
    if threshold is None:
        return
    number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)  # numpy's scalars are Real
    if not (number and 0 <= threshold <= 1):
        raise UsageError(f"threshold must be between 0 and 1, not {threshold!r}")


def _shortest(values: Any) -> list[float]:
    """The shortest decimals that give back the same float32: 0.9, not 0.8999999761581421."""
    return [float(str(np.float32(value))) for value in values]
