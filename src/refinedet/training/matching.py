"""Which anchors are positive, which negatives are mined (paper, section 4; official bbox_util.cpp:624-760, 1078-1187).

On an accelerator everything is batched: images of a batch are padded to the same number of targets, and no step waits
for the device. A CPU has nothing to wait for; there images are matched one by one, with the same outcome.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refinedet import boxes as box_ops

_SMALLEST_OVERLAP = 1e-6
"""The greedy step wants more overlap than this (official code): a target that touches no anchor gets none."""
_OVERLAPS_AT_ONCE = 1 << 18
"""On a CPU overlaps are computed in pieces of about this many, so that the intermediate results stay in the cache."""


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
        most = max((len(of_image) for of_image in labels), default=0)
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
    matches = [_match_image(anchors[i], targets.boxes[i], targets.valid[i].numpy(), positive_iou) for i in range(batch)]
    nothing = torch.empty(0, count)
    return Match(
        torch.stack([target for target, _ in matches]) if matches else nothing.long(),
        torch.stack([overlap for _, overlap in matches]) if matches else nothing,
    )


def _match_image(
    anchors: Tensor, boxes: Tensor, valid: npt.NDArray[np.bool_], positive_iou: float
) -> tuple[Tensor, Tensor]:
    """``match`` of one image on a CPU: (A, 4) anchors and (G, 4) boxes to the (A,) targets and (A,) best overlaps."""
    count = len(anchors)
    index_of = np.flatnonzero(valid)  # rows of the overlaps are the image's own targets, without the padding
    best_overlap, best_row = anchors.new_zeros(count), torch.zeros(count, dtype=torch.int64)
    overlaps = anchors.new_empty(len(index_of), count)
    own_boxes = boxes[torch.from_numpy(index_of)]
    step = max(1, _OVERLAPS_AT_ONCE // max(1, count))
    for first in range(0, len(index_of), step):
        # NaN (boxes that are no numbers) must never win.
        part = box_ops.iou(own_boxes[first : first + step], anchors).nan_to_num_(nan=0.0)
        overlaps[first : first + step] = part
        value, row = part.max(dim=0)
        # Of equal overlaps the target of lower index stays.
        better = value > best_overlap
        best_row = torch.where(better, row + first, best_row)
        best_overlap = torch.where(better, value, best_overlap)
    matched = np.full(count, -1, dtype=np.int64)
    if len(index_of):
        reached = (best_overlap >= positive_iou).numpy()
        matched[reached] = index_of[best_row.numpy()[reached]]
        for target_row, anchor in _greedy_pairs(overlaps.numpy()):
            matched[anchor] = index_of[target_row]
    return torch.from_numpy(matched), best_overlap


def _greedy_pairs(overlaps: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """The pairs (target, anchor) of the greedy step, from the (G, A) overlaps, in the order in which they are made.

    A queue holds each free target's best anchor, as it was when the target was queued. What it names first is the
    next pair unless that anchor has been taken since; then only this target looks for its next best anchor. Overlaps of
    a target with its next anchors only fall, so the order of the queue stays right.
    """
    best = overlaps.argmax(axis=1) if overlaps.shape[1] else np.zeros(0, dtype=np.intp)
    queue = [
        (-value, anchor, row)
        for row, (anchor, value) in enumerate(
            zip(best.tolist(), overlaps[np.arange(len(best)), best].tolist(), strict=True)
        )
        if value > _SMALLEST_OVERLAP
    ]
    heapq.heapify(queue)
    # What a target falls back on: its anchors from the best one on, made when it is needed for the first time.
    fallbacks: dict[int, tuple[list[int], list[float]]] = {}
    position = [0] * len(best)
    taken: set[int] = set()
    pairs = []
    while queue:
        _, anchor, row = heapq.heappop(queue)
        if anchor not in taken:
            taken.add(anchor)
            pairs.append((row, anchor))
            continue
        if row not in fallbacks:
            touched = np.flatnonzero(overlaps[row] > _SMALLEST_OVERLAP)
            # There are not more anchors to avoid than other targets.
            order = touched[np.argsort(-overlaps[row, touched], kind="stable")][: len(best)]
            fallbacks[row] = order.tolist(), (-overlaps[row, order]).tolist()
        anchors, negated = fallbacks[row]
        while position[row] < len(anchors) and anchors[position[row]] in taken:
            position[row] += 1
        if position[row] < len(anchors):
            heapq.heappush(queue, (negated[position[row]], anchors[position[row]], row))
    return pairs


@torch.no_grad()
def match_together(anchors: Tensor, targets: Targets, positive_iou: float) -> Match:
    """``match`` of all images together, as an accelerator wants it; ``anchors`` (B, A, 4)."""
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

    # The greedy step takes pairs in falling order. A pair that both sides like best, among what is free, is taken by it
    # sooner or later, whatever comes before; so each round takes all of these, and a few rounds suffice.
    target_index = torch.arange(most, device=device)
    while True:
        value, anchor = overlaps.max(dim=2)  # of equal overlaps the first index, here and below
        likes_it = overlaps.max(dim=1).indices.gather(1, anchor) == target_index
        is_match = likes_it & (value > _SMALLEST_OVERLAP)
        if not bool(is_match.any()):
            break
        # One column more, for the targets that wait.
        column = torch.where(is_match, anchor, count)
        taker = torch.full((batch, count + 1), -1, dtype=torch.int64, device=device)
        taker = taker.scatter_(1, column, target_index.expand_as(column))[:, :-1]
        matched = torch.where(taker >= 0, taker, matched)
        overlaps.masked_fill_(is_match[:, :, None], -1.0).masked_fill_((taker >= 0)[:, None, :], -1.0)
    return Match(matched, best_overlap.clamp(min=0.0))


@torch.no_grad()
def mine_negatives(
    losses: Tensor, candidates: Tensor, positives: Tensor, negatives_per_positive: float, without_positives: int = 0
) -> Tensor:
    """Hard negatives: in each image, the candidates of largest loss, at most three times its positives.

    Args:
        losses: (B, A) classification loss that each anchor has as background.
        candidates: (B, A) bool, anchors that may be chosen.
        positives: (B, A) bool.
        negatives_per_positive: the ratio (paper: 3).
        without_positives: negatives of an image that has no positives (official code: none).

    Returns:
        (B, A) bool; of equal losses the anchor of lower index comes first.
    """
    count = positives.sum(dim=1)
    wanted = (count * negatives_per_positive).to(torch.int64)
    wanted = wanted.masked_fill(count == 0, without_positives)
    limit = torch.minimum(wanted, candidates.sum(dim=1))
    order = losses.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (rank < limit[:, None]) & candidates
