"""Detections: what a detector found in one image. Plain numpy, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from refinedet import draw
from refinedet.errors import UsageError, did_you_mean
from refinedet.text import printable


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
    """File the image came from, if it came from one."""

    def __post_init__(self) -> None:
        boxes = np.array(self.boxes, dtype=np.float32).reshape(-1, 4)
        scores = np.array(self.scores, dtype=np.float32).reshape(-1)
        labels = np.array(self.labels, dtype=np.int64).reshape(-1)
        if not len(boxes) == len(scores) == len(labels):
            raise UsageError(
                f"{len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels: the numbers must be equal"
            )
        names = tuple(self.class_names)
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(names)):
            raise UsageError(f"labels must lie in 0..{len(names) - 1}, found {labels.min()}..{labels.max()}")
        width, height = self.image_size
        for name, value in (
            ("boxes", boxes),
            ("scores", scores),
            ("labels", labels),
            ("class_names", names),
            ("image_size", (int(width), int(height))),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def empty(cls, class_names: Sequence[str], image_size: tuple[int, int], source: str | None = None) -> Detections:
        """Nothing found in an image of that (width, height)."""
        return cls(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            labels=np.zeros(0, np.int64),
            class_names=tuple(class_names),
            image_size=image_size,
            source=source,
        )

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[label] for label in self.labels]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for name in self.names:
            counts[name] = counts.get(name, 0) + 1
        what = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        width, height = self.image_size
        return f"Detections({what} in {self.source or 'an image'} of {width}x{height})"

    def filter(
        self,
        threshold: float | None = None,
        labels: Sequence[int | str] | None = None,
        top: int | None = None,
    ) -> Detections:
        """Fewer detections, in the same order.

        Args:
            threshold: Keep scores of at least this.
            labels: Keep these classes, given by index or by name.
            top: Then keep this many of the best scores.

        Raises:
            UsageError: a class that does not exist, or a negative ``top``.
        """
        keep = np.ones(len(self), dtype=bool)
        if threshold is not None:
            keep &= self.scores >= np.float32(threshold)
        if labels is not None:
            keep &= np.isin(self.labels, [self._label(label) for label in labels])
        indices = np.flatnonzero(keep)
        if top is not None:
            if top < 0:
                raise UsageError(f"top must not be negative, not {top}")
            best = np.argsort(-self.scores[indices], kind="stable")[:top]
            indices = indices[np.sort(best)]
        return replace(self, boxes=self.boxes[indices], scores=self.scores[indices], labels=self.labels[indices])

    def _label(self, label: int | str) -> int:
        if isinstance(label, str):
            if label in self.class_names:
                return self.class_names.index(label)
            raise UsageError(f"unknown class '{label}': {did_you_mean(label, self.class_names)}")
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
        """The COCO results form: boxes as x, y, width, height in pixels.

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
        """Plain values for JSON, lossless: source, image size, and per detection label, name, score and xyxy box."""
        return {
            "source": self.source,
            "width": self.image_size[0],
            "height": self.image_size[1],
            "detections": [
                {"label": int(label), "name": name, "score": _shortest([score])[0], "box": _shortest(box)}
                for label, name, score, box in zip(self.labels, self.names, self.scores, self.boxes, strict=True)
            ],
        }

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
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A copy of the image, (H, W, 3) uint8 RGB, with these detections on it; see ``draw.draw_boxes``."""
        return draw.draw_boxes(image, self.boxes, self.labels, self.class_names, self.scores)


def _shortest(values: Any) -> list[float]:
    """The shortest decimals that give back the same float32: 0.9, not 0.8999999761581421."""
    return [float(str(np.float32(value))) for value in values]
