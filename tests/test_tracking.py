"""Objects keep their numbers over the frames; whatever happens to the detections, the true objects are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from refinedet.detections import Detections
from refinedet.errors import UsageError
from refinedet.tracking import ObjectTracker, track

pytest.importorskip("trackers")

NAMES = ("cat", "dog")


def frame(number: int, objects: dict[str, tuple[float, float, float, int]], source: str = "clip.mp4") -> Detections:
    """Boxes of 40 x 40 pixels: name of the object to left, top, score, label. The best score goes first."""
    rows = sorted(objects.values(), key=lambda row: -row[2])
    boxes = [[left, top, left + 40, top + 40] for left, top, _, _ in rows]
    scores, labels = [row[2] for row in rows], [row[3] for row in rows]
    return Detections(boxes, scores, labels, NAMES, (640, 480), source, time=number / 25, frame=number)  # type: ignore[arg-type]


def numbers(found: Detections, objects: dict[str, tuple[float, float, float, int]]) -> dict[str, int]:
    """The number of each object, found by its corner."""
    assert found.track_ids is not None
    at = {
        (*box[:2].tolist(), label): n for box, label, n in zip(found.boxes, found.labels, found.track_ids, strict=True)
    }
    return {
        name: int(at[np.float32(left), np.float32(top), label])
        for name, (left, top, _, label) in objects.items()
        if (np.float32(left), np.float32(top), label) in at
    }


def scene() -> Iterator[dict[str, tuple[float, float, float, int]]]:
    """Two cats that pass each other, a dog in the place of the first cat, a cat that comes later."""
    for number in range(80):
        objects = {
            "right": (4.0 * number, 100.0, 0.9, 0),
            "left": (320 - 4.0 * number, 130.0, 0.8, 0),
            "dog": (4.0 * number, 100.0, 0.7, 1),
        }
        if 20 <= number < 30:
            objects["right"] = (*objects["right"][:2], 0.2, 0)  # hardly seen
        if 50 <= number < 60:
            del objects["left"]  # not seen at all
        if number >= 40:
            objects["late"] = (500.0, 300.0 + number % 2, 0.6, 0)
        yield objects


def test_every_object_keeps_a_number_of_its_own() -> None:
    tracker, seen = ObjectTracker(0.4), defaultdict(list)
    for number, objects in enumerate(scene()):
        found = frame(number, objects)
        answer = tracker.update(found)
        np.testing.assert_array_equal(answer.boxes, found.boxes)
        np.testing.assert_array_equal(answer.scores, found.scores)
        for name, given in numbers(answer, objects).items():
            seen[name].append(given)
    kept = {name: set(values) - {-1} for name, values in seen.items()}
    assert all(len(values) == 1 for values in kept.values()), kept
    assert sorted(next(iter(values)) for values in kept.values()) == [1, 2, 3, 4]
    assert kept["late"] == {4}
    # Only the first frame of an object, and that in which it comes back, may lack the number.
    assert all(values.count(-1) <= 2 for values in seen.values()), seen


def test_uncertain_detections_are_left_out_but_continue_a_track() -> None:
    frames = [frame(number, objects) for number, objects in enumerate(scene())]
    answers = list(track(frames, threshold=0.4))
    assert [len(answer) for answer in answers] == [int((found.scores >= 0.4).sum()) for found in frames]
    before, after = answers[19], answers[35]
    for answer in (before, after):
        assert answer.track_ids is not None
    right = [numbers(answer, list(scene())[number])["right"] for answer, number in ((before, 19), (after, 35))]
    assert right[0] == right[1] > 0


def test_an_object_that_was_away_for_long_is_a_new_one_and_so_is_all_of_another_video() -> None:
    tracker = ObjectTracker(0.4)
    there = {"cat": (100.0, 100.0, 0.9, 0)}
    first = [numbers(tracker.update(frame(n, there)), there)["cat"] for n in range(5)]
    for number in range(5, 60):
        empty = tracker.update(frame(number, {}))
        assert empty.track_ids is not None
        assert len(empty.track_ids) == 0
    later = [numbers(tracker.update(frame(n, there)), there)["cat"] for n in range(60, 65)]
    other = [numbers(tracker.update(frame(n, there, "other.mp4")), there)["cat"] for n in range(5)]
    assert [first[-1], later[-1], other[-1]] == [1, 2, 1]


def test_images_have_no_tracks() -> None:
    image = Detections.empty(NAMES, (10, 10), "a.jpg")
    assert ObjectTracker().update(image) is image
    with pytest.raises(UsageError, match="threshold must be between 0 and 1"):
        ObjectTracker(7)


def test_frames_of_one_time_are_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    tracker, there = ObjectTracker(0.4), {"cat": (100.0, 100.0, 0.9, 0)}
    for _ in range(3):
        found = tracker.update(frame(7, there))
    assert numbers(found, there) == {"cat": 1}
    assert not [warning for warning in recwarn if "timestamp" in str(warning.message)]
