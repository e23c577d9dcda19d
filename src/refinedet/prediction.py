"""The one road of prediction: images and videos are decoded ahead in threads and pass through a detector in batches.

``RefineDet.predict``, ``RefineDet.stream`` and the command line all take it; any detector with ``predict_arrays`` can.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, Protocol

from refinedet.config import DEFAULT_THRESHOLD
from refinedet.decoding import check_count, decode_ahead
from refinedet.detections import Detections, check_threshold
from refinedet.errors import RefineDetError, UsageError
from refinedet.pixels import Pixels
from refinedet.sources import OneImage, holds_many, list_images
from refinedet.video import Video, as_video


class ArrayDetector(Protocol):
    """Anything that turns pixels into detections."""

    def predict_arrays(self, images: list[Pixels], *, threshold: float | None = None) -> list[Detections]:
        """One ``Detections`` for each (H, W, 3) uint8 RGB image."""


def predict_ahead(
    model: ArrayDetector,
    source: object,
    *,
    threshold: float | None = DEFAULT_THRESHOLD,
    batch_size: int = 8,
    max_pixels: int | None = None,
    on_error: Callable[[OneImage, RefineDetError], None] | None = None,
) -> Iterator[tuple[Detections, Pixels]]:
    """Detections and pixels of each image and each frame of a video, in order, with flat memory.

    Args:
        model: the detector.
        source: see ``sources.list_images``.
        threshold: lowest score returned; None returns all that post-processing keeps.
        batch_size: images per run of the network; fewer where they are very large.
        max_pixels: largest width times height of an image; ``images.MAX_PIXELS`` if None.
        on_error: called with each image or video that cannot be read (to its end), and its error; without it the error
            is raised.

    Raises:
        UsageError: a wrong argument, or something that is no image.
        RefineDetError: an image cannot be read and ``on_error`` is None.
    """
    check_threshold(threshold)
    check_count("batch_size", batch_size)
    if max_pixels is not None and not max_pixels >= 1:
        raise UsageError(f"max_pixels must be at least 1, not {max_pixels!r}")

    def failed(image: OneImage, error: RefineDetError) -> None:
        if on_error is None:
            raise error
        on_error(image, error)

    items = list_images(source, max_pixels=max_pixels)
    for are_videos, group in itertools.groupby(items, key=lambda item: isinstance(item, Video)):
        road: Any = _frames if are_videos else _images
        with closing(road(group, batch_size, max_pixels, failed)) as batches:
            for batch in batches:
                answers = model.predict_arrays([pixels for _, pixels in batch], threshold=threshold)
                answers.reverse()
                batch.reverse()
                while batch:
                    # Popped, so that nothing here holds the pixels of an image that the caller is done with.
                    yield dataclasses.replace(answers.pop(), **batch[-1][0]), batch.pop()[1]


_Batches = Generator[list[tuple[dict[str, Any], Pixels]], None, None]
"""Where each image comes from, as fields of ``Detections``, and its pixels."""
_Failed = Callable[[OneImage, RefineDetError], None]


def _images(images: Iterator[OneImage], batch_size: int, max_pixels: int | None, failed: _Failed) -> _Batches:
    with closing(decode_ahead(images, OneImage.count, OneImage.read, batch_size=batch_size)) as batches:
        for batch in batches:
            readable: list[tuple[dict[str, Any], Pixels]] = []
            for decoded in batch:
                if decoded.pixels is not None:
                    readable.append(({"source": decoded.item.file}, decoded.pixels))
                elif decoded.error is not None:
                    failed(decoded.item, decoded.error)
            batch.clear()
            del decoded
            if readable:
                yield readable


def _frames(videos: Iterator[Video], batch_size: int, max_pixels: int | None, failed: _Failed) -> _Batches:
    for video in videos:
        try:
            with closing(video.batches(batch_size, max_pixels=max_pixels)) as batches:
                for batch in batches:
                    marked = [({"source": video.name, "time": time, "frame": n}, pixels) for pixels, time, n in batch]
                    batch.clear()
                    yield marked
        except RefineDetError as error:
            failed(OneImage(video.path, video.name, video.name), error)


def predict_all(
    model: ArrayDetector,
    source: object,
    *,
    threshold: float | None = DEFAULT_THRESHOLD,
    batch_size: int = 8,
    max_pixels: int | None = None,
) -> Detections | list[Detections]:
    """``predict_ahead`` to the end: one ``Detections`` for one image, a list where ``source`` holds many."""
    video = as_video(source)
    if video is not None and video.is_live:
        raise UsageError(f"{video.name}: may never end, so predict has no list to return; use stream")
    many = holds_many(source)
    road = predict_ahead(model, source, threshold=threshold, batch_size=batch_size, max_pixels=max_pixels)
    results = [detections for detections, _ in road]
    return results if many else results[0]
