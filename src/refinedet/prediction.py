"""The one road of prediction: sources are found, decoded ahead in threads, and pass through a detector in batches.

``RefineDet.predict``, ``RefineDet.stream`` and the command line all take it; any detector with ``predict_arrays`` can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Protocol

from refinedet.config import DEFAULT_THRESHOLD
from refinedet.detections import Detections, check_threshold
from refinedet.errors import RefineDetError, UsageError
from refinedet.pixels import Pixels
from refinedet.sources import OneImage, decode_ahead, holds_many, list_images


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
    """Detections and pixels of each image, in order, with flat memory.

    Args:
        model: the detector.
        source: see ``sources.list_images``.
        threshold: lowest score returned; None returns all that post-processing keeps.
        batch_size: images per run of the network; fewer where they are very large.
        max_pixels: largest width times height of an image; ``images.MAX_PIXELS`` if None.
        on_error: called with each image that cannot be read, and its error; without it the error is raised.

    Raises:
        UsageError: a wrong argument, or something that is no image.
        RefineDetError: an image cannot be read and ``on_error`` is None.
    """
    check_threshold(threshold)
    if max_pixels is not None and not max_pixels >= 1:
        raise UsageError(f"max_pixels must be at least 1, not {max_pixels!r}")
    images = list_images(source, max_pixels=max_pixels)
    with closing(decode_ahead(images, OneImage.count, OneImage.read, batch_size=batch_size)) as batches:
        for batch in batches:
            readable: list[tuple[OneImage, Pixels]] = []
            for decoded in batch:
                if decoded.pixels is not None:
                    readable.append((decoded.item, decoded.pixels))
                elif decoded.error is not None:
                    if on_error is None:
                        raise decoded.error
                    on_error(decoded.item, decoded.error)
            batch.clear()
            del decoded
            if not readable:
                continue
            answers = model.predict_arrays([pixels for _, pixels in readable], threshold=threshold)
            answers.reverse()
            readable.reverse()
            while readable:
                # Popped, so that nothing here holds the pixels of an image that the caller is done with.
                yield dataclasses.replace(answers.pop(), source=readable[-1][0].file), readable.pop()[1]


def predict_all(
    model: ArrayDetector,
    source: object,
    *,
    threshold: float | None = DEFAULT_THRESHOLD,
    batch_size: int = 8,
    max_pixels: int | None = None,
) -> Detections | list[Detections]:
    """``predict_ahead`` to the end: one ``Detections`` for one image, a list where ``source`` holds many."""
    many = holds_many(source)
    road = predict_ahead(model, source, threshold=threshold, batch_size=batch_size, max_pixels=max_pixels)
    results = [detections for detections, _ in road]
    return results if many else results[0]
