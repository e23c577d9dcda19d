"""Which anchors are positive, which negatives are mined (paper, section 4; official bbox_util.cpp:624-760, 1078-1187).

Everything is batched: images of a batch are padded to the same number of targets, and no step waits for the device.
Only on a CPU, which has nothing to wait for, are images matched one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refinedet import boxes as box_ops

_SMALLEST_OVERLAP = 1e-6
"""The greedy step wants more overlap than this (official code): a target that touches no anchor gets none."""


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to the largest number G of targets of its images."""

    boxes: Tensor
    """(B, G, 4) float32 xyxy in pixels of the network input."""
    labels: Tensor
    """(B, G) int64: 0..C-1, or -1 where an image has fewer than G targets."""

    @property
    def valid(self) -> Tensor:
        """(B, G) bool: False for padding."""
        return self.labels >= 0

    @staticmethod
    def collate(boxes: list[Tensor], labels: list[Tensor]) -> Targets:
        """Pad the targets of each image, (G_i, 4) and (G_i,), to one batch."""
        most = max((len(one) for one in labels), default=0)
        padded_boxes = torch.zeros(len(boxes), most, 4)
        padded_labels = torch.full((len(boxes), most), -1, dtype=torch.int64)
        for row, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            padded_boxes[row, : len(image_labels)] = image_boxes
            padded_labels[row, : len(image_labels)] = image_labels
        return Targets(padded_boxes, padded_labels)

    def to(self, device: torch.device) -> Targets:
        """The same targets on another device."""
        return Targets(self.boxes.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> Targets:
        """The same targets in page-locked memory, from which copies to CUDA need not be waited for."""
        return Targets(self.boxes.pin_memory(), self.labels.pin_memory())


class Match(NamedTuple):
    """Outcome of ``match``."""

    target: Tensor
    """(B, A) int64: index of the matched target, -1 for none."""
    overlap: Tensor
    """(B, A): best overlap with any target of the image; 0 without targets."""


@torch.no_grad()
def match(anchors: Tensor, targets: Targets, positive_iou: float) -> Match:
    """Match anchors to targets: greedy one-to-one first, then every anchor whose best overlap is large enough.

    Greedy step: of all pairs of a free anchor and a free target, the one with the largest overlap is matched (of equal
    ones the anchor, then the target of lowest index), until no pair overlaps by more than 1e-6; so two targets never
    fight for one anchor. Then each anchor that is still free takes the target that it overlaps most, if that
    overlap is at least ``positive_iou``.

    Args:
        anchors: (A, 4), or (B, A, 4) where each image has its own; xyxy.
        targets: the batch's ground truth in the same coordinates.
        positive_iou: threshold of the second step.

    Returns:
        The matched target and the best overlap of each anchor.
    """
    batch, count = len(targets.labels), anchors.shape[-2]
    anchors = anchors.expand(batch, count, 4)
    if targets.labels.device.type != "cpu":
        return match_together(anchors, targets, positive_iou)
    # Each image alone, up to the last of its own targets: work on padding costs a CPU more than this loop.
    counts = [max((n + 1 for n, valid in enumerate(row) if valid), default=0) for row in targets.valid.tolist()]
    singles = [
        match_together(
            anchors[i : i + 1], Targets(targets.boxes[i : i + 1, :n], targets.labels[i : i + 1, :n]), positive_iou
        )
        for i, n in enumerate(counts)
    ]
    return Match(torch.cat([one.target for one in singles]), torch.cat([one.overlap for one in singles]))


@torch.no_grad()
def match_together(anchors: Tensor, targets: Targets, positive_iou: float) -> Match:
    """``match`` of all images in the same steps, as an accelerator wants it; ``anchors`` (B, A, 4)."""
    batch, most = targets.labels.shape
    count = anchors.shape[1]
    device = targets.labels.device
    if most == 0:
        nothing = torch.full((batch, count), -1, dtype=torch.int64, device=device)
        return Match(nothing, torch.zeros(batch, count, device=device))
    # Target-major, so that the search for a target's best anchor runs over adjacent memory.
    overlaps = box_ops.iou(targets.boxes, anchors)
    # NaN (boxes that are no numbers) must never win; padding must never match.
    overlaps = torch.where(targets.valid[:, :, None], overlaps, -1.0).nan_to_num(nan=0.0)
    best_overlap, best_target = overlaps.max(dim=1)
    matched = torch.where(best_overlap >= positive_iou, best_target, -1)

    images = torch.arange(batch, device=device)
    target_index = torch.arange(most, device=device)
    for _ in range(most):  # one round matches one pair in every image of the batch
        value, anchor = overlaps.max(dim=2)
        top = value.amax(dim=1)
        tied = value == top[:, None]
        lowest_anchor = torch.where(tied, anchor, count).amin(dim=1)
        wants = tied & (anchor == lowest_anchor[:, None])
        target = torch.where(wants, target_index, most).amin(dim=1)
        found = top > _SMALLEST_OVERLAP
        matched[images, lowest_anchor] = torch.where(found, target, matched[images, lowest_anchor])
        overlaps[images, target] = -1.0
        overlaps[images, :, lowest_anchor] = -1.0
    return Match(matched, best_overlap.clamp(min=0.0))


@torch.no_grad()
def mine_negatives(losses: Tensor, candidates: Tensor, positives: Tensor, negatives_per_positive: float) -> Tensor:
    """Hard negatives: in each image, the candidates of largest loss, at most three times its positives.

    Args:
        losses: (B, A) classification loss that each anchor has as background.
        candidates: (B, A) bool, anchors that may be chosen.
        positives: (B, A) bool; an image without any gets no negatives.
        negatives_per_positive: the ratio (paper: 3).

    Returns:
        (B, A) bool; of equal losses the anchor of lower index comes first.
    """
    wanted = (positives.sum(dim=1) * negatives_per_positive).to(torch.int64)
    limit = torch.minimum(wanted, candidates.sum(dim=1))
    order = losses.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (rank < limit[:, None]) & candidates
