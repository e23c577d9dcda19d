"""From a batch of padded outputs to the ``Detections`` of each image. NumPy only, for the runtime without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from refinedet.config import InferenceConfig
from refinedet.detections import Detections
from refinedet.model.soft_nms import soften


class PaddedArrays(NamedTuple):
    """Outputs for B images, D detections each, best first and padded at the end."""

    boxes: npt.NDArray[np.float32]
    """(B, D, 4) xyxy in pixels of the network input."""
    scores: npt.NDArray[np.float32]
    """(B, D)."""
    labels: npt.NDArray[np.int64]
    """(B, D)."""
    counts: npt.NDArray[np.int64]
    """(B,) detections that are not padding."""


def unpad(
    padded: PaddedArrays,
    images: Sequence[npt.NDArray[np.uint8]],
    input_size: tuple[int, int],
    class_names: tuple[str, ...],
    settings: InferenceConfig,
) -> list[Detections]:
    """Detections in pixels of each image, clipped to it, after Soft-NMS if the settings ask for it.

    Args:
        padded: outputs for these images.
        images: (H, W, 3) each, as they were before they were resized.
        input_size: height and width that they were resized to.
        class_names: C names.
        settings: see ``soft_nms.soften``.
    """
    height, width = input_size
    results = []
    for row, (image, count) in enumerate(zip(images, padded.counts.tolist(), strict=True)):
        rows, columns = image.shape[:2]
        factor = np.array([columns / width, rows / height] * 2, dtype=np.float32)
        scaled = np.clip(padded.boxes[row, :count] * factor, 0, np.array([columns, rows] * 2, dtype=np.float32))
        boxes, scores, labels = soften(scaled, padded.scores[row, :count], padded.labels[row, :count], settings)
        results.append(
            Detections(boxes=boxes, scores=scores, labels=labels, class_names=class_names, image_size=(columns, rows))
        )
    return results


def finish(
    results: list[Detections], *, threshold: float | None, sources: Sequence[str | None] | None
) -> list[Detections]:
    """Name the file of each image, if given, and keep the detections that score at least ``threshold``."""
    if sources is not None:
        results = [replace(result, source=source) for result, source in zip(results, sources, strict=True)]
    return results if threshold is None else [result.filter(threshold=threshold) for result in results]
