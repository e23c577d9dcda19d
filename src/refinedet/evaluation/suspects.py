"""Annotations that may be wrong: where a detector that is sure of itself disagrees with them.

A detection of a high score that is counted as wrong is an error of the detector or one of the annotation. These are
listed, surest first, for somebody to look at. Pure functions of ``outcomes.Outcomes``; no torch, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from refinedet.data.records import Record
from refinedet.detections import Detections
from refinedet.evaluation.outcomes import HIT_IOU, Outcome, Outcomes

LOWEST_SCORE = 0.7
"""Disagreements of a lower score are left out."""
MOST = 1000
"""Suspects that are listed."""

SuspectKind: TypeAlias = Literal["missing box", "wrong class", "badly placed box"]
KINDS: dict[Outcome, SuspectKind] = {
    Outcome.BACKGROUND: "missing box",
    Outcome.CLASSIFICATION: "wrong class",
    Outcome.LOCALIZATION: "badly placed box",
}
"""What the annotation lacks if the detection is right, by what the detection is if the annotation is."""


@dataclass(frozen=True, eq=False)
class Suspect:
    """One annotation that may be wrong, or may be missing."""

    position: int
    """Position of the image among those evaluated."""
    kind: SuspectKind
    """What may be wrong."""
    detection: int
    """Row of the detection in its image."""
    target: int | None
    """Row of the annotated object in its image; None for a missing box."""
    score: float
    """Of the detection."""
    iou: float
    """Of the detection and the annotated object; 0 for a missing box."""

    def to_dict(self, record: Record, found: Detections) -> dict[str, Any]:
        """Plain values for JSON: the image, and both boxes, xyxy in pixels of the image."""
        item = found[self.detection]
        annotated = None
        if self.target is not None:
            box = [float(value) for value in record.boxes[self.target]]
            name = found.class_names[record.labels[self.target]]
            annotated = {"name": name, "box": box, "iou": round(self.iou, 4)}
        return {
            "kind": self.kind,
            "image": record.image_path.name,
            "image_id": record.image_id,
            "score": round(self.score, 4),
            "detected": {"name": item.name, "box": [round(float(value), 2) for value in item.box]},
            "annotated": annotated,
        }


def find_suspects(
    outcomes: Outcomes, detections: Sequence[Detections], records: Sequence[Record], *, threshold: float = LOWEST_SCORE
) -> list[Suspect]:
    """The annotations that may be wrong, those that contradict the surest detections first, at most ``MOST``.

    * missing box: a detection where no object of any class is annotated;
    * wrong class: a detection on an object of another class, for which no detection of its own class speaks;
    * badly placed box: a detection that overlaps an object of its class too little, and no other hits that object.

    Objects that are difficult or a crowd are left out, and of several detections in one place the surest counts.

    Args:
        outcomes: the detections matched with the objects.
        detections: of each image.
        records: of each image.
        threshold: lowest score of a detection that contradicts; half of it is enough to speak for an annotation.
    """
    spoken_for = outcomes.found_objects(outcomes.reach(threshold / 2))
    kinds = np.isin(outcomes.outcomes, [int(kind) for kind in KINDS])
    candidates = np.flatnonzero(kinds & outcomes.reach(threshold))
    suspects: list[Suspect] = []
    taken: dict[int, list[npt.NDArray[np.float32]]] = {}
    for index in candidates[np.argsort(-outcomes.scores[candidates], kind="stable")].tolist():
        target = int(outcomes.objects[index])
        if target >= 0 and (spoken_for[target] or outcomes.object_ignored[target]):
            continue
        position = int(np.searchsorted(outcomes.detection_bounds, index, side="right")) - 1
        row = index - int(outcomes.detection_bounds[position])
        box = detections[position].boxes[row]
        places = taken.setdefault(position, [])
        if any(_iou(box, place) > HIT_IOU for place in places):
            continue
        places.append(box)
        of_image = None if target < 0 else target - int(outcomes.object_bounds[position])
        iou = 0.0 if of_image is None else _iou(box, records[position].boxes[of_image])
        kind = KINDS[Outcome(outcomes.outcomes[index])]
        suspects.append(Suspect(position, kind, row, of_image, float(outcomes.scores[index]), iou))
        if len(suspects) == MOST:
            break
    return suspects


def _iou(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    shared = float(sides.prod())
    return shared / max(float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared, 1e-9)
