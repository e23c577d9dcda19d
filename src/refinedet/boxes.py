"""Pure functions on box tensors: area, overlap, conversion, and the offset coding of the paper's section 3.

A box is ``(x1, y1, x2, y2)`` in continuous pixel coordinates: a box over a whole W x H image is ``(0, 0, W, H)``. All
functions take any leading shape, compute in the dtype they are given, and never change their arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALLEST_SIDE = 1e-6
"""Sides are raised to this before a division or a logarithm, so that a box without area codes to finite numbers."""
_LARGEST_LOG_SCALE = 30.0
"""exp() of more than this is cut: 1e13 anchor sides is no box, and its square still fits into float32."""


def area(boxes: Tensor) -> Tensor:
    """Area of each box.

    Args:
        boxes: (..., 4) xyxy. A box with x2 < x1 or y2 < y1 has no area.

    Returns:
        (...) in square pixels.
    """
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Jaccard overlap of every box of ``a`` with every box of ``b``; no "+1", and 0 where a box has no area.

    Args:
        a: (..., N, 4) xyxy.
        b: (..., M, 4) xyxy, leading shape broadcastable to that of ``a``.

    Returns:
        (..., N, M) in [0, 1].
    """
    # Planes of (N, M) for each corner: on a CPU twice as fast as pairs of coordinates in the last axis.
    a_x1, a_y1, a_x2, a_y2 = a[..., :, None, :].movedim(-1, 0).contiguous()
    b_x1, b_y1, b_x2, b_y2 = b[..., None, :, :].movedim(-1, 0).contiguous()
    width = (torch.minimum(a_x2, b_x2) - torch.maximum(a_x1, b_x1)).clamp_(min=0)
    height = (torch.minimum(a_y2, b_y2) - torch.maximum(a_y1, b_y1)).clamp_(min=0)
    intersection = width * height
    union = area(a)[..., :, None] + area(b)[..., None, :] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy to centre x, centre y, width, height."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height to xyxy."""
    half = boxes_cxcywh[..., 2:] / 2
    return torch.cat([boxes_cxcywh[..., :2] - half, boxes_cxcywh[..., :2] + half], dim=-1)


def encode(boxes: Tensor, anchors: Tensor, offset_std: Tensor) -> Tensor:
    """Offsets that ``decode`` would need to turn each anchor into its box.

    Args:
        boxes: (..., 4) xyxy.
        anchors: (..., 4) xyxy, broadcastable to ``boxes``.
        offset_std: (4,) divides the offsets (0.1, 0.1, 0.2, 0.2 in the official code, there called variance).

    Returns:
        (..., 4): shift of the centre in anchor sides and log ratio of the sides, each divided by ``offset_std``.
        Finite for boxes and anchors without area: their sides count as 1e-6.
    """
    box, anchor = to_cxcywh(boxes), to_cxcywh(anchors)
    box_size, anchor_size = box[..., 2:].clamp(min=_SMALLEST_SIDE), anchor[..., 2:].clamp(min=_SMALLEST_SIDE)
    shift = (box[..., :2] - anchor[..., :2]) / anchor_size
    return torch.cat([shift, torch.log(box_size / anchor_size)], dim=-1) / offset_std


def decode(offsets: Tensor, anchors: Tensor, offset_std: Tensor) -> Tensor:
    """Move and scale anchors by predicted offsets (center-size coding, not clipped to the image).

    Args:
        offsets: (..., 4).
        anchors: (..., 4) xyxy, broadcastable to ``offsets``.
        offset_std: (4,) multiplies the offsets.

    Returns:
        (..., 4) xyxy. Scales are cut at exp(30), far beyond any box, so that a wild size offset yields no inf or NaN.
    """
    scaled = offsets * offset_std
    anchor = to_cxcywh(anchors)
    centre = anchor[..., :2] + scaled[..., :2] * anchor[..., 2:]
    size = anchor[..., 2:] * torch.exp(scaled[..., 2:].clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE))
    return to_xyxy(torch.cat([centre, size], dim=-1))


def clip(boxes: Tensor, height: float, width: float) -> Tensor:
    """(..., 4) xyxy cut to the image's ``[0, width] x [0, height]``."""
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def scale(boxes: Tensor, factor_x: float, factor_y: float) -> Tensor:
    """(..., 4) xyxy carried over to an image resized by these factors."""
    if not (math.isfinite(factor_x) and math.isfinite(factor_y)):
        raise ValueError(f"scale factors must be finite, not {factor_x} and {factor_y}")
    return boxes * boxes.new_tensor([factor_x, factor_y, factor_x, factor_y])
