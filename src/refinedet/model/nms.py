"""Greedy non-maximum suppression within each class (paper, section 4 "Inference").

Three implementations with one outcome: torchvision's operator label by label on a CPU, whole batches until nothing
changes on other devices, and a fixed number of rounds for exported graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from refinedet import boxes as box_ops


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
    """``non_maximum_suppression`` for devices that favour large matrices.

    The loop repeats "drop what a kept box suppresses" from the state in which all are kept; after n rounds the first
    n + 1 boxes are decided as the greedy procedure decides them, so when nothing changes, all are. A few rounds are
    enough in practice.
    """
    beats = _beats(boxes, labels, threshold)
    keep = valid
    for _ in range(boxes.shape[1]):
        decided = _next_round(keep, valid, beats)
        if torch.equal(decided, keep):
            break
        keep = decided
    return keep


def suppress_in_rounds(
    boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """``suppress_at_once`` with a fixed number of rounds and no control flow that depends on data, for exported graphs.

    Returns:
        (N, K) bool, and (N,) bool: whether the last round changed nothing, so that the outcome is the greedy one.
    """
    beats = _beats(boxes, labels, threshold)
    keep = before = valid
    for _ in range(rounds):
        keep, before = _next_round(keep, valid, beats), keep
    return keep, (keep == before).all(dim=1)


def _beats(boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """(N, K, K) float32: 1 where the box of the row suppresses that of the column, if it is kept itself."""
    rivals = (box_ops.iou(boxes, boxes) > threshold) & (labels[:, :, None] == labels[:, None, :])
    # As numbers: how many kept boxes suppress each box is then a matrix product, exact and far faster than any().
    return rivals.to(torch.float32).triu(diagonal=1)


def _next_round(keep: Tensor, valid: Tensor, beats: Tensor) -> Tensor:
    """The valid boxes that no box of ``keep`` suppresses."""
    suppressed = torch.bmm(keep[:, None].to(torch.float32), beats)[:, 0] > 0
    return valid & ~suppressed


def _suppress_by_label(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """``non_maximum_suppression`` by torchvision's operator, which sorts by score and keeps the order of equal ones."""
    keep = torch.zeros_like(valid)
    # Scores that fall with the position: the boxes are sorted already.
    falling = torch.arange(boxes.shape[1], 0, -1, dtype=boxes.dtype)
    for image in range(len(boxes)):
        index = valid[image].nonzero()[:, 0]
        own_labels = labels[image, index]
        for label in own_labels.unique():  # type: ignore[no-untyped-call]
            same = index[own_labels == label]
            keep[image, same[nms(boxes[image, same], falling[: len(same)], threshold)]] = True
    return keep
