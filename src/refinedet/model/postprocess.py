"""From raw outputs to detections (paper, section 4 "Inference"; official detection_output_layer.cpp).

Batched tensor code with shapes that depend on the configuration only; images with fewer detections are padded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refinedet import boxes as box_ops
from refinedet.config import ModelConfig
from refinedet.model.network import Predictions, starting_boxes

_BLOCK = 128
"""Labels with few boxes are suppressed together up to so many: a call costs more than its overlaps."""


class PaddedDetections(NamedTuple):
    """Detections of a batch, best first, D = the config's ``max_detections`` or fewer."""

    boxes: Tensor
    """(B, D, 4) float32 xyxy in pixels of the network input, not clipped to it."""
    scores: Tensor
    """(B, D) float32, 0 for padding."""
    labels: Tensor
    """(B, D) int64 0..C-1, -1 for padding."""
    counts: Tensor
    """(B,) int64: how many are no padding."""


@torch.no_grad()
def postprocess(predictions: Predictions, config: ModelConfig) -> PaddedDetections:
    """Filter by theta, decode twice, keep the best candidates, suppress per class, keep the best of the image.

    1. An anchor whose negative confidence in the ARM exceeds ``negative_threshold`` loses all its class scores.
    2. (anchor, class) pairs with a score above ``score_threshold`` compete; the best ``candidates`` of the image, or of
       each class, go on.
    3. Their anchors are refined by the ARM's offsets (unless the config has no two steps), the result by the ODM's;
       neither is clipped.
    4. Greedy NMS within a class: a box that overlaps a better kept one by more than ``nms_iou`` is dropped.
    5. The best ``max_detections`` of the image stay.

    Args:
        predictions: raw outputs, any float type.
        config: thresholds and offset_std.
    """
    settings = config.inference
    with torch.autocast(predictions.arm_logits.device.type, enabled=False):
        objectness = predictions.arm_logits.float().softmax(dim=-1)[..., 0]
        scores = predictions.odm_logits.float().softmax(dim=-1)[..., :-1]
        passes = (objectness >= 1.0 - config.negative_threshold)[..., None] & (scores > settings.score_threshold)
        scores = torch.where(passes, scores, 0.0)
        batch, anchors, classes = scores.shape
        if settings.candidates_per == "image":
            flat = scores.reshape(batch, 1, anchors * classes)
        else:
            flat = scores.transpose(1, 2).contiguous()
        # Groups (B, R, K): one group for the image, or one for each class; NMS runs within a group.
        top_scores, index = _top(flat, settings.candidates)
        if settings.candidates_per == "image":
            anchor, label = index // classes, index % classes
        else:
            anchor, label = index, torch.arange(classes, device=index.device)[None, :, None].expand_as(index)
        boxes = _decode_twice(predictions, anchor.flatten(1), config).reshape(*anchor.shape, 4)
        # Image by image where there is a group for each class: C overlap matrices of 1,000 x 1,000 are enough at once.
        keep = torch.stack(
            [
                non_maximum_suppression(*groups, settings.nms_iou)
                for groups in zip(boxes, label, top_scores > 0, strict=True)
            ]
        )
        kept_scores = torch.where(keep, top_scores, 0.0).flatten(1)
        final_scores, order = _top(kept_scores[:, None], settings.max_detections)
        final_scores, order = final_scores[:, 0], order[:, 0]
        final_boxes = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        final_labels = torch.where(final_scores > 0, label.flatten(1).gather(1, order), -1)
        return PaddedDetections(
            boxes=torch.where(final_scores[..., None] > 0, final_boxes, 0.0),
            scores=final_scores,
            labels=final_labels,
            counts=(final_scores > 0).sum(dim=1),
        )


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Best ``count`` along the last axis, descending; of equal ones that are chosen the lower index first.

    Which of equal scores are chosen where not all fit in is left to ``topk``.
    """
    _, index = scores.topk(min(count, scores.shape[-1]), dim=-1, sorted=False)
    # topk leaves the order of ties open: back to index order first, then a stable sort by score.
    index = index.sort(dim=-1).values
    values, order = scores.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    return values, index.gather(-1, order)


def _decode_twice(predictions: Predictions, index: Tensor, config: ModelConfig) -> Tensor:
    """Boxes of the chosen anchors: (B, K) indices to (B, K, 4) xyxy."""
    std = torch.tensor(config.offset_std, device=index.device)
    spread = index[..., None].expand(-1, -1, 4)
    anchors = predictions.anchors.float()[index]
    start = starting_boxes(predictions.arm_offsets.float().gather(1, spread), anchors, std, config)
    return box_ops.decode(predictions.odm_offsets.float().gather(1, spread), start, std)


def non_maximum_suppression(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Greedy per-class suppression of boxes that are sorted by descending score, batched.

    Args:
        boxes: (N, K, 4) xyxy.
        labels: (N, K) int64; boxes of different labels never suppress each other.
        valid: (N, K) bool; others neither suppress nor are kept.
        threshold: largest overlap with a kept better box at which a box is kept.

    Returns:
        (N, K) bool.
    """
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        return _suppress_by_label(boxes, labels, valid, threshold)
    return suppress_at_once(boxes, labels, valid, threshold)


def suppress_at_once(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """``non_maximum_suppression`` for devices that like large matrices, and for graphs: every shape is fixed.

    The loop repeats "drop what a kept box suppresses" from the state in which all are kept; after n rounds the first
    n + 1 boxes are decided as the greedy procedure decides them, so when nothing changes, all are. A few rounds are
    enough in practice.
    """
    rivals = (box_ops.iou(boxes, boxes) > threshold) & (labels[:, :, None] == labels[:, None, :])
    # As numbers: how many kept boxes suppress each box is then a matrix product, exact and far faster than any().
    beats = rivals.triu(diagonal=1).to(torch.float32)
    keep = valid
    for _ in range(boxes.shape[1]):
        suppressed = torch.bmm(keep[:, None].to(torch.float32), beats)[:, 0] > 0
        decided = valid & ~suppressed
        if torch.equal(decided, keep):
            break
        keep = decided
    return keep


def _suppress_by_label(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """``non_maximum_suppression`` for a CPU: only valid boxes are compared, and hardly any of different labels."""
    keep = torch.zeros_like(valid)
    for n in range(len(boxes)):
        index = valid[n].nonzero()[:, 0]
        # Stable: within a label the best box stays first.
        own_labels, order = labels[n, index].sort(stable=True)
        index = index[order]
        blocks = [0]
        for count in own_labels.bincount().tolist():
            if blocks[-1] + count > _BLOCK:
                blocks.append(0)
            blocks[-1] += count
        for block in torch.split(index, blocks):
            keep[n, block] = suppress_at_once(
                boxes[n, block][None], labels[n, block][None], valid[n, block][None], threshold
            )[0]
    return keep


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
