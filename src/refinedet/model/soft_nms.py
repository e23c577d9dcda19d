"""Linear Soft-NMS on the detections of one image. NumPy only, so that a runtime without torch has it as well."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from refinedet.config import InferenceConfig


def soften(
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    settings: InferenceConfig,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Soft-NMS of one image, if the config asks for it: the last step, as in the official code for COCO.

    Args:
        boxes: (D, 4) xyxy in pixels of the image, clipped to it.
        scores: (D,).
        labels: (D,).
        settings: ``soft_nms_iou`` None leaves everything as it is.

    Returns:
        Boxes (E, 4), scores (E,) and labels (E,) that stay, best first.
    """
    if settings.soft_nms_iou is None:
        return boxes, scores, labels
    order, lowered = linear_soft_nms(
        boxes, scores, labels, iou=settings.soft_nms_iou, score_threshold=settings.score_threshold
    )
    return boxes[order], lowered, labels[order]


def linear_soft_nms(
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    *,
    iou: float,
    score_threshold: float,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Linear Soft-NMS within each class of one image (Bodla et al., ICCV 2017; official code: soft_nms, method 1).

    The best box is taken; of the others of its class, those that overlap it by more than ``iou`` have their score
    multiplied by one minus the overlap, and boxes below ``score_threshold`` are dropped; then the best of the rest.

    Args:
        boxes: (D, 4) xyxy in pixels of the image, clipped to it.
        scores: (D,); of equal ones the earlier counts as better.
        labels: (D,).
        iou: largest overlap that costs nothing.
        score_threshold: scores below this are dropped.

    Returns:
        (E,) indices of the boxes that stay, best first by their new score, and (E,) these scores.
    """
    lowered = scores.astype(np.float64)
    corners = boxes.astype(np.float64)
    area = np.clip(corners[:, 2:] - corners[:, :2], 0, None).prod(axis=1)
    taken = []
    for label in np.unique(labels):
        left = np.flatnonzero((labels == label) & (scores >= score_threshold))
        while len(left):
            best = left[np.argmax(lowered[left])]
            taken.append(best)
            left = left[left != best]
            size = np.minimum(corners[best, 2:], corners[left, 2:]) - np.maximum(corners[best, :2], corners[left, :2])
            inner = np.clip(size, 0, None).prod(axis=1)
            union = area[best] + area[left] - inner
            overlap = np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
            lowered[left] *= np.where(overlap > iou, 1.0 - overlap, 1.0)
            left = left[lowered[left] >= score_threshold]
    index = np.sort(np.array(taken, dtype=np.intp))
    order = index[np.argsort(-lowered[index], kind="stable")]
    return order, lowered[order].astype(np.float32)
