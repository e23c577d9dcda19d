"""Objects of a video followed from frame to frame: every object gets a number, which it keeps.

Needs the extra ``refinedet[track]``: ByteTrack (Zhang et al., ECCV 2022) as it is in Roboflow's ``trackers``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from refinedet.config import DEFAULT_THRESHOLD
from refinedet.detections import Detections, check_threshold
from refinedet.errors import UsageError

LOWEST_SCORE = 0.1
"""Detections below the threshold but not below this continue the track of an object; they begin none."""


class ObjectTracker:
    """Numbers the objects of videos, frame by frame. Objects of different classes never share a number.

    An object has its number from its second frame on. One that is not detected for a second is a new object afterwards.

    Args:
        threshold: lowest score at which an object begins to be followed.

    Raises:
        UsageError: the package is not installed, or a threshold outside 0..1.
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        check_threshold(threshold)
        try:
            self._package = importlib.import_module("trackers")
            self._supervision = importlib.import_module("supervision")
        except ImportError:
            raise UsageError("following objects needs trackers: pip install 'refinedet[track]'") from None
        self._threshold = threshold
        self._video: str | None = None
        self._time = self._last = -1.0
        self._trackers: dict[int, Any] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        """Of each class and number of its tracker: the number among all objects."""
        self._count = 0

    def update(self, found: Detections) -> Detections:
        """The detections of the next frame with ``track_ids``; those of an image, which has no time, as they are.

        A frame of another video than before begins anew, with number 1.

        Args:
            found: detections down to ``LOWEST_SCORE``, from which those without a number may be left out afterwards.
        """
        if found.time is None:
            return found
        if found.source != self._video or found.time < self._last:
            self._video, self._trackers, self._numbers, self._count, self._time = found.source, {}, {}, 0, -1.0
        self._last = found.time
        self._time = max(found.time, self._time + 1e-6)  # the package has no use for two frames of one time
        ids = np.full(len(found), -1, np.int64)
        for label in sorted({*self._trackers, *found.labels.tolist()}):
            rows = np.flatnonzero(found.labels == label)
            followed, tracks = self._follow(label, rows, found)
            ids[followed] = [self._number(label, track) for track in tracks.tolist()]
        return dataclasses.replace(found, track_ids=ids)

    def _follow(
        self, label: int, rows: npt.NDArray[np.int64], found: Detections
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The rows that belong to objects of a class, and the tracker's numbers of these objects."""
        if label not in self._trackers:
            self._trackers[label] = self._package.ByteTrackTracker(
                track_activation_threshold=self._threshold, high_conf_det_threshold=self._threshold
            )
        answer = self._trackers[label].update(
            self._supervision.Detections(
                xyxy=found.boxes[rows], confidence=found.scores[rows], class_id=found.labels[rows], data={"row": rows}
            ),
            timestamp=self._time,
        )
        if not len(answer):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        known = answer.tracker_id >= 0
        return np.asarray(answer.data["row"])[known], answer.tracker_id[known]

    def _number(self, label: int, track: int) -> int:
        if (label, track) not in self._numbers:
            self._count += 1
            self._numbers[label, track] = self._count
        return self._numbers[label, track]


def track(frames: Iterable[Detections], *, threshold: float = DEFAULT_THRESHOLD) -> Iterator[Detections]:
    """Detections of frames with ``track_ids``.

    Args:
        frames: such as ``model.stream("clip.mp4", threshold=0.1)``: with the uncertain detections, which help to follow
            an object.
        threshold: lowest score returned, and at which an object begins to be followed.

    Raises:
        UsageError: the package is not installed, or a threshold outside 0..1.
    """
    tracker = ObjectTracker(threshold)
    for found in frames:
        yield tracker.update(found).filter(threshold=threshold)
