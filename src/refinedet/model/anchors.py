"""Anchor tiling (paper, section 4 "Anchors Design and Matching"; official code's prior_box_layer)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64)
"""Input pixels per cell of the four levels."""


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of the four levels for an input whose sides are multiples of 64."""
    return [(height // stride, width // stride) for stride in STRIDES]


def tile_anchors(
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    anchor_sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Anchors in the official order: level by level, row by row, cell by cell, aspect ratio by aspect ratio.

    Args:
        sizes: rows and columns of each level, from the real feature maps.
        image_size: height and width of the network input in pixels; a level's step is ``image_size / size``.
        anchor_sizes: side of each level's square anchor, in pixels of the network input.
        aspect_ratios: width / height; an anchor keeps the square's area.
        device: where the anchors are made.

    Returns:
        (A, 4) float32 xyxy in pixels of the network input, centred on the cells, not clipped.
    """
    height, width = image_size
    levels = []
    for (rows, columns), side in zip(sizes, anchor_sizes, strict=True):
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * (height / rows)
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * (width / columns)
        half = torch.tensor(
            [[side * math.sqrt(ratio) / 2, side / math.sqrt(ratio) / 2] for ratio in aspect_ratios], device=device
        )
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([grid_x, grid_y], dim=-1)[:, :, None, :]
        levels.append(torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4))
    return torch.cat(levels)
