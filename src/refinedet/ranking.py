"""Which images to label next: those on which the detector is least sure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from refinedet.detections import Detections

LOWEST_SCORE = 0.1
"""Detections below it are left out: there are many in every image, and they say little about it."""
HEADER = ("image", "uncertainty", "doubtful", "detections")
"""Columns of the table, and by them a table of ours is recognised."""


@dataclass(frozen=True)
class Rank:
    """How sure a detector is of an image."""

    image: str
    """Path or address."""
    uncertainty: float
    """See ``rank``."""
    doubtful: int
    """Detections with a score from 0.2 to 0.8."""
    detections: int
    """Detections with a score of at least 0.1."""


def rank(found: Detections) -> Rank:
    """The uncertainty of an image, from all detections that post-processing keeps (threshold None).

    It is the sum of min(score, 1 - score) over the detections that score at least 0.1: the number of errors to expect
    at a threshold of 0.5 if scores were probabilities (least confidence, summed over the image as in Brust et al.,
    "Active Learning for Deep Object Detection", 2019). An image without detections has an uncertainty of 0.

    Example:
        >>> rank(Detections([[0, 0, 9, 9]] * 3, [0.9, 0.4, 0.05], [0, 0, 0], ("cat",), (10, 10), "a.jpg"))
        Rank(image='a.jpg', uncertainty=0.5, doubtful=1, detections=2)
    """
    scores = found.scores[found.scores >= np.float32(LOWEST_SCORE)].astype(np.float64)
    doubtful = int(((scores >= 0.2) & (scores <= 0.8)).sum())
    return Rank(found.source or "image", round(float(np.minimum(scores, 1 - scores).sum()), 4), doubtful, len(scores))


def rank_csv(ranks: Iterable[Rank]) -> str:
    """A table of images as CSV, most uncertain first; equal ones stay in their order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for one in sorted(ranks, key=lambda one: -one.uncertainty):
        writer.writerow([one.image, one.uncertainty, one.doubtful, one.detections])
    return text.getvalue()
