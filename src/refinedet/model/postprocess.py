"""From raw outputs to detections (paper, section 4 "Inference"; official detection_output_layer.cpp).

Batched tensor code with shapes that depend on the configuration only; images with fewer detections are padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refinedet import boxes as box_ops
from refinedet.config import ModelConfig
from refinedet.model.network import Predictions, passes_negative_filter, starting_boxes
from refinedet.model.nms import non_maximum_suppression, suppress_in_rounds


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
    settled: Tensor
    """(B,) bool: False if suppression was given too few ``rounds`` for the image, so that its outcome may be wrong."""


@torch.no_grad()
def postprocess(predictions: Predictions, config: ModelConfig, *, rounds: int | None = None) -> PaddedDetections:
    """Filter by theta, decode twice, keep the best candidates, suppress per class, keep the best of the image.

    1. Negative anchor filtering: a filtered anchor loses all its class scores.
    2. (anchor, class) pairs with a score above ``score_threshold`` compete; the best ``candidates`` of the image, or of
       each class, go on.
    3. Their anchors are refined by the ARM's offsets (unless the config has no two steps), the result by the ODM's;
       neither is clipped.
    4. Greedy NMS within a class: a box that overlaps a better kept one by more than ``nms_iou`` is dropped.
    5. The best ``max_detections`` of the image stay.

    Args:
        predictions: raw outputs, any float type.
        config: thresholds and offset_std.
        rounds: of suppression, for graphs: no step then depends on data, so that tracing sees all of it. None: as many
            as the images need.
    """
    settings = config.inference
    with torch.autocast(predictions.arm_logits.device.type, enabled=False):
        unfiltered = passes_negative_filter(predictions.arm_logits.float(), config.negative_threshold)
        scores = predictions.odm_logits.float().softmax(dim=-1)[..., :-1]
        passes = unfiltered[..., None] & (scores > settings.score_threshold)
        scores = torch.where(passes, scores, 0.0)
        batch, anchors, classes = scores.shape
        if settings.candidates_per == "image":
            flat = scores.reshape(batch, 1, anchors * classes)
        else:
            flat = scores.transpose(1, 2).contiguous()
        # Groups (B, R, K): one group for the image, or one for each class; NMS runs within a group.
        top_scores, index = _top(flat, settings.candidates, graph=rounds is not None)
        if settings.candidates_per == "image":
            anchor, label = index // classes, index % classes
        else:
            anchor, label = index, torch.arange(classes, device=index.device)[None, :, None].expand_as(index)
        boxes = _decode_twice(predictions, anchor.flatten(1), config).reshape(*anchor.shape, 4)
        keep, settled = _suppress(boxes, label, top_scores > 0, settings.nms_iou, rounds)
        kept_scores = torch.where(keep, top_scores, 0.0).flatten(1)
        final_scores, order = _top(kept_scores[:, None], settings.max_detections, graph=rounds is not None)
        final_scores, order = final_scores[:, 0], order[:, 0]
        final_boxes = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        final_labels = torch.where(final_scores > 0, label.flatten(1).gather(1, order), -1)
        return PaddedDetections(
            boxes=torch.where(final_scores[..., None] > 0, final_boxes, 0.0),
            scores=final_scores,
            labels=final_labels,
            counts=(final_scores > 0).sum(dim=1),
            settled=settled,
        )


def _suppress(
    boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float, rounds: int | None
) -> tuple[Tensor, Tensor]:
    """Suppression within each group: (B, R, K, 4) boxes to (B, R, K) bool, and (B,) bool, whether it settled."""
    if rounds is None:
        # Image by image where there is a group for each class: C overlap matrices of 1,000 x 1,000 are enough at once.
        groups = zip(boxes, labels, valid, strict=True)
        keep = torch.stack([non_maximum_suppression(*group, threshold) for group in groups])
        return keep, valid.new_ones(len(valid))
    keep, settled = suppress_in_rounds(
        boxes.flatten(0, 1), labels.flatten(0, 1), valid.flatten(0, 1), threshold, rounds
    )
    return keep.reshape(valid.shape), settled.reshape(valid.shape[:2]).all(dim=1)


def _top(scores: Tensor, count: int, *, graph: bool) -> tuple[Tensor, Tensor]:
    """Best ``count`` along the last axis, descending; of equal ones that are chosen the lower index first.

    Which of equal scores are chosen where not all fit in is left to ``topk``. ONNX has no stable sort, but its TopK
    promises the lower index first, so a graph takes the order as it comes.
    """
    if graph:
        return scores.topk(min(count, scores.shape[-1]), dim=-1)
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
