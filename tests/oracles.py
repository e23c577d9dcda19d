"""Slow, obvious references in double precision: one box, one anchor, one image at a time.

They are written from the published description of the method and of the official code, not from the package: the same
rules as loops over Python floats. What they cannot decide is a comparison that lies within rounding of its threshold,
where float32 may fall on the other side; ``Margin`` records how close a case comes, so that a test can discard it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refinedet.evaluation.metrics import VocMethod, VocResult, voc_result
from refinedet.evaluation.outcomes import HIT_IOU, match_objects
from refinedet.model.network import Predictions
from refinedet.training.matching import Targets

Box = Sequence[float]
STD = (0.1, 0.1, 0.2, 0.2)


class Margin:
    """Smallest distance of any decision from falling otherwise."""

    def __init__(self) -> None:
        self.smallest = math.inf

    def note(self, value: float, threshold: float) -> None:
        self.smallest = min(self.smallest, abs(value - threshold))


# Boxes.


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (area(a) + area(b) - width * height)


def encode(box: Box, anchor: Box, std: Sequence[float] = STD) -> list[float]:
    anchor_width, anchor_height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return [
        ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / anchor_width / std[0],
        ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / anchor_height / std[1],
        math.log((box[2] - box[0]) / anchor_width) / std[2],
        math.log((box[3] - box[1]) / anchor_height) / std[3],
    ]


def decode(offsets: Sequence[float], anchor: Box, std: Sequence[float] = STD) -> list[float]:
    anchor_width, anchor_height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (anchor[0] + anchor[2]) / 2 + offsets[0] * std[0] * anchor_width
    y = (anchor[1] + anchor[3]) / 2 + offsets[1] * std[1] * anchor_height
    width = anchor_width * math.exp(offsets[2] * std[2])
    height = anchor_height * math.exp(offsets[3] * std[3])
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / sum(powers) for power in powers]


# Matching and mining (official bbox_util.cpp).


def match(
    anchors: Sequence[Box], boxes: Sequence[Box], positive_iou: float, margin: Margin | None = None
) -> tuple[list[int], list[float]]:
    """Target of each anchor (-1: none) and its best overlap: greedy bipartite, then one prediction at a time."""
    margin = margin or Margin()
    overlaps = [[iou(anchor, box) for box in boxes] for anchor in anchors]
    matched = [-1] * len(anchors)
    free_anchors, free_targets = list(range(len(anchors))), list(range(len(boxes)))
    while free_anchors and free_targets:
        best, best_pair = 1e-6, (-1, -1)
        for i in free_anchors:
            for j in free_targets:
                if overlaps[i][j] > best:
                    best, best_pair = overlaps[i][j], (i, j)
        if best_pair == (-1, -1):
            break
        for i in free_anchors:
            for j in free_targets:
                # Only pairs that contest the anchor or the target could change the outcome; exact ties go by index.
                shares = (i == best_pair[0]) != (j == best_pair[1])
                if shares and overlaps[i][j] > 0 and overlaps[i][j] != best:
                    margin.note(overlaps[i][j], best)
        matched[best_pair[0]] = best_pair[1]
        free_anchors.remove(best_pair[0])
        free_targets.remove(best_pair[1])
    best_overlaps = []
    for i in range(len(anchors)):
        best, best_target = 0.0, -1
        for j in range(len(boxes)):
            if overlaps[i][j] > best:
                best, best_target = overlaps[i][j], j
        best_overlaps.append(best)
        margin.note(best, positive_iou)
        for value in overlaps[i]:
            if best >= positive_iou - 1e-3 and value != best:
                margin.note(value, best)
        if matched[i] < 0 and best_target >= 0 and best >= positive_iou:
            matched[i] = best_target
    return matched, best_overlaps


def mine(
    losses: Sequence[float], candidates: Sequence[bool], positives: int, ratio: float, margin: Margin | None = None
) -> list[bool]:
    """The candidates with the largest losses, at most ``ratio`` times as many as there are positives."""
    margin = margin or Margin()
    ranked = sorted((i for i in range(len(losses)) if candidates[i]), key=lambda i: (-losses[i], i))
    count = min(int(ratio * positives), len(ranked))
    if 0 < count < len(ranked):
        margin.note(losses[ranked[count - 1]], losses[ranked[count]])
    chosen = set(ranked[:count])
    return [i in chosen for i in range(len(losses))]


# The loss (equation 1, official multibox_loss_layer.cpp).


def smooth_l1(x: Tensor) -> Tensor:
    return 0.5 * x * x if abs(float(x.detach())) < 1 else x.abs() - 0.5


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    largest = logits.max().detach()
    return largest + (logits - largest).exp().sum().log() - logits[label]


def module_loss(
    offsets: Tensor,
    logits: Tensor,
    anchors: Sequence[Sequence[Box]],
    boxes: Sequence[Sequence[Box]],
    labels: Sequence[Sequence[int]],
    passes: Sequence[Sequence[bool]],
    *,
    positive_iou: float,
    negative_iou: float,
    ratio: float,
    margin: Margin,
) -> tuple[Tensor, Tensor, int]:
    """Both losses of one module, divided by its positives (0 without any), and the number of positives.

    Per image: (A, 4) anchors, (G, 4) boxes, G labels, A flags.
    """
    background = logits.shape[-1] - 1
    classification, localization = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    positives = 0
    for b in range(len(anchors)):
        matched, overlaps = match(anchors[b], boxes[b], positive_iou, margin)
        found = [i for i in range(len(matched)) if matched[i] >= 0]
        candidates = []
        for i in range(len(matched)):
            margin.note(overlaps[i], negative_iou)
            candidates.append(matched[i] < 0 and overlaps[i] < negative_iou and passes[b][i])
        losses = [float(cross_entropy(logits[b, i].detach(), background)) for i in range(len(matched))]
        negatives = mine(losses, candidates, len(found), ratio, margin)
        for i in found:
            classification = classification + cross_entropy(logits[b, i], labels[b][matched[i]])
            wanted = encode(boxes[b][matched[i]], anchors[b][i])
            for k in range(4):
                localization = localization + smooth_l1(offsets[b, i, k] - wanted[k])
        for i in range(len(matched)):
            if negatives[i]:
                classification = classification + cross_entropy(logits[b, i], background)
        positives += len(found)
    if positives == 0:
        assert float(classification) == 0
        assert float(localization) == 0
        return classification, localization, 0
    return classification / positives, localization / positives, positives


def loss(
    predictions: Predictions,
    targets: Targets,
    *,
    arm_iou: tuple[float, float] = (0.5, 0.5),
    odm_iou: tuple[float, float] = (0.5, 0.5),
    ratio: float = 3.0,
    theta: float = 0.99,
    margin: Margin | None = None,
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The four losses, differentiable, and the positives of ARM and ODM. ``predictions`` must be float64."""
    margin = margin or Margin()
    batch = len(targets.labels)
    anchors: list[list[float]] = predictions.anchors.double().tolist()
    boxes, labels = [], []
    for b in range(batch):
        real = [g for g in range(targets.labels.shape[1]) if int(targets.labels[b, g]) >= 0]
        boxes.append([targets.boxes[b, g].double().tolist() for g in real])
        labels.append([int(targets.labels[b, g]) for g in real])
    everything = [[True] * len(anchors) for _ in range(batch)]
    arm = module_loss(
        predictions.arm_offsets, predictions.arm_logits, [anchors] * batch, boxes, [[0] * len(one) for one in labels],
        everything, positive_iou=arm_iou[0], negative_iou=arm_iou[1], ratio=ratio, margin=margin,
    )  # fmt: skip
    refined, passes = [], []
    for b in range(batch):
        refined.append([decode(predictions.arm_offsets[b, i].tolist(), anchors[i]) for i in range(len(anchors))])
        passes.append([])
        for i in range(len(anchors)):
            negative_confidence = softmax(predictions.arm_logits[b, i].tolist())[1]
            margin.note(negative_confidence, theta)
            passes[b].append(not negative_confidence > theta)
    odm = module_loss(
        predictions.odm_offsets, predictions.odm_logits, refined, boxes, labels, passes,
        positive_iou=odm_iou[0], negative_iou=odm_iou[1], ratio=ratio, margin=margin,
    )  # fmt: skip
    losses = {
        "arm_classification": arm[0],
        "arm_localization": arm[1],
        "odm_classification": odm[0],
        "odm_localization": odm[1],
    }
    return losses, (arm[2], odm[2])


# Inference.


def nms(boxes: Sequence[Box], threshold: float, margin: Margin | None = None) -> list[int]:
    """Indices kept of boxes of one class, sorted best first."""
    margin = margin or Margin()
    kept: list[int] = []
    for i in range(len(boxes)):
        suppressed = False
        for j in kept:
            overlap = iou(boxes[i], boxes[j])
            margin.note(overlap, threshold)
            suppressed = suppressed or overlap > threshold
        if not suppressed:
            kept.append(i)
    return kept


def postprocess(
    predictions: Predictions,
    *,
    candidates: int,
    candidates_per: str,
    nms_iou: float,
    max_detections: int,
    score_threshold: float = 0.01,
    theta: float = 0.99,
    margin: Margin | None = None,
) -> list[list[tuple[float, int, list[float]]]]:
    """Detections of each image, best first: score, label, box."""
    margin = margin or Margin()
    result = []
    for b in range(predictions.arm_logits.shape[0]):
        pairs = []
        boxes = {}
        for i, anchor in enumerate(predictions.anchors.double().tolist()):
            negative_confidence = softmax(predictions.arm_logits[b, i].double().tolist())[1]
            margin.note(negative_confidence, theta)
            if negative_confidence > theta:
                continue
            refined = decode(predictions.arm_offsets[b, i].double().tolist(), anchor)
            boxes[i] = decode(predictions.odm_offsets[b, i].double().tolist(), refined)
            for label, score in enumerate(softmax(predictions.odm_logits[b, i].double().tolist())[:-1]):
                margin.note(score, score_threshold)
                if score > score_threshold:
                    pairs.append((score, label, i))
        pairs.sort(key=lambda pair: -pair[0])
        for better, worse in itertools.pairwise(pairs):
            margin.note(better[0], worse[0])
        if candidates_per == "image":
            pairs = pairs[:candidates]
        detections = []
        for label in range(predictions.odm_logits.shape[-1] - 1):
            own = [pair for pair in pairs if pair[1] == label]
            if candidates_per == "class":
                own = own[:candidates]
            for index in nms([boxes[i] for _, _, i in own], nms_iou, margin):
                score, _, i = own[index]
                detections.append((score, label, boxes[i]))
        detections.sort(key=lambda detection: -detection[0])
        result.append(detections[:max_detections])
    return result


# Random cases.


def random_boxes(generator: torch.Generator, count: int, *, smallest: float, largest: float, side: float) -> Tensor:
    """(count, 4) float32 xyxy with sides between ``smallest`` and ``largest``, centres in a square of ``side``."""
    centre = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side
    size = smallest + (largest - smallest) * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([centre - size / 2, centre + size / 2], dim=1).float()


def random_predictions(
    generator: torch.Generator, *, batch: int, anchors: int, classes: int, side: float = 128.0, spread: float = 1.0
) -> Predictions:
    """Raw outputs over random anchors; about one anchor in eight has an objectness below 0.01."""

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return Predictions(
        arm_offsets=normal(batch, anchors, 4, scale=spread),
        arm_logits=normal(batch, anchors, 2, scale=3.0),
        odm_offsets=normal(batch, anchors, 4, scale=spread),
        odm_logits=normal(batch, anchors, classes + 1, scale=2.0),
        anchors=random_boxes(generator, anchors, smallest=16, largest=64, side=side),
    )


def random_targets(
    generator: torch.Generator, objects: Sequence[int], classes: int, *, kind: str = "usual", side: float = 128.0
) -> Targets:
    """Targets of a batch. ``kind``: "usual", "twins" (equal boxes in pairs), "tiny" (far below any anchor)."""
    boxes, labels = [], []
    for count in objects:
        low, high = (0.5, 4.0) if kind == "tiny" else (8.0, 80.0)
        one = random_boxes(generator, count, smallest=low, largest=high, side=side)
        if kind == "twins":
            one[1::2] = one[: 2 * (count // 2) : 2]
        boxes.append(one)
        labels.append(torch.randint(0, classes, (count,), generator=generator))
    return Targets.collate(boxes, labels)


def voc_average_precision(
    detections: Sequence[Any], targets: Sequence[Any], num_classes: int,
    *, iou_threshold: float = HIT_IOU, method: VocMethod = "11-point",
) -> VocResult:  # fmt: skip
    """Detections matched and measured by VOC's rules in one call: no oracle, but what oracles are compared with."""
    return voc_result(match_objects(detections, targets, num_classes, iou_threshold=iou_threshold), method)
