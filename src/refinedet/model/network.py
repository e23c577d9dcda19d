"""The RefineDet network (paper, section 3 and figures 1 and 2): images in, raw outputs of ARM and ODM out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import ModelConfig
from refinedet.model.anchors import STRIDES, tile_anchors
from refinedet.model.backbones import build_backbone, init_convolutions


class Predictions(NamedTuple):
    """Raw outputs of the network for a batch.

    Offsets are in units of anchor sides divided by ``offset_std``: see ``boxes.decode``. ``arm_offsets`` apply to
    ``anchors``, ``odm_offsets`` to the anchors that the ARM has refined.
    """

    arm_offsets: Tensor
    """(B, A, 4)."""
    arm_logits: Tensor
    """(B, A, 2): object, background."""
    odm_offsets: Tensor
    """(B, A, 4)."""
    odm_logits: Tensor
    """(B, A, C + 1): the classes, background last."""
    anchors: Tensor
    """(A, 4) xyxy in pixels of the network input, the same for every image."""


class TransferConnectionBlock(nn.Module):
    """Turn an ARM feature map into an ODM one, adding the map of the level above (paper, figure 2).

    Without batch norm: conv, ReLU, conv, + deconv(above), ReLU, conv, ReLU. With it, every convolution and the
    deconvolution lose their bias and are normalised (official ResNet-101 code). The deconvolution doubles both sides;
    its kernel is 2x2 in the official code, 4x4 in the figure and 3x3 in a port whose weights can be imported. The top
    level has no map above, and a ReLU in the place of the sum.
    """

    def __init__(self, in_channels: int, channels: int, *, top: bool, batch_norm: bool, deconv_kernel: int = 2) -> None:
        super().__init__()
        bias = not batch_norm
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.deconv = None
        if not top:
            # Side out = 2 * side - 2 - 2 * padding + kernel + output_padding, and must be 2 * side.
            padding, output_padding = (deconv_kernel - 1) // 2, deconv_kernel % 2
            self.deconv = nn.ConvTranspose2d(channels, channels, deconv_kernel, 2, padding, output_padding, bias=bias)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.deconv_norm = nn.BatchNorm2d(channels) if batch_norm and not top else nn.Identity()
        self.norm3 = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        init_convolutions(self)

    def forward(self, x: Tensor, above: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) and (B, channels, H / 2, W / 2) from above to (B, channels, H, W)."""
        x = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.deconv is not None:
            x = x + self.deconv_norm(self.deconv(above))
        return F.relu(self.norm3(self.conv3(F.relu(x))))


class PredictionHead(nn.Module):
    """Two 3x3 convolutions over one level: four offsets and the class logits of each anchor of a cell."""

    def __init__(self, channels: int, anchors_per_cell: int, logits: int) -> None:
        super().__init__()
        self.logits_per_anchor = logits
        self.offsets = nn.Conv2d(channels, anchors_per_cell * 4, 3, padding=1)
        self.logits = nn.Conv2d(channels, anchors_per_cell * logits, 3, padding=1)
        init_convolutions(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, H, W) to (B, H * W * K, 4) and (B, H * W * K, logits), cells row by row, K anchors each."""
        batch = x.shape[0]
        offsets = self.offsets(x).permute(0, 2, 3, 1).reshape(batch, -1, 4)
        logits = self.logits(x).permute(0, 2, 3, 1).reshape(batch, -1, self.logits_per_anchor)
        return offsets, logits


class RefineDetNetwork(nn.Module):
    """Backbone, ARM heads, transfer connection blocks and ODM heads (paper, figure 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        channels = self.backbone.out_channels
        per_cell, width, top = len(config.aspect_ratios), config.tcb_channels, len(STRIDES) - 1
        self.arm = nn.ModuleList([PredictionHead(c, per_cell, 2) for c in channels])
        self.tcb = nn.ModuleList(
            [
                TransferConnectionBlock(
                    c,
                    width,
                    top=level == top,
                    batch_norm=config.tcb_batch_norm,
                    deconv_kernel=config.tcb_deconv_kernel,
                )
                for level, c in enumerate(channels)
            ]
        )
        self.odm = nn.ModuleList([PredictionHead(width, per_cell, config.num_classes + 1) for _ in channels])

    def forward(self, images: Tensor) -> Predictions:
        """Run the network.

        Args:
            images: (B, 3, H, W) float, normalised as the config says, H and W multiples of 64.

        Returns:
            Raw outputs, level by level, row by row, aspect ratio by aspect ratio.
        """
        height, width = images.shape[-2:]
        maps = self.backbone(images)
        arm = [head(x) for head, x in zip(self.arm, maps, strict=True)]
        above: Tensor | None = None
        odm: list[tuple[Tensor, Tensor]] = []
        for level in reversed(range(len(maps))):
            above = self.tcb[level](maps[level], above)
            odm.insert(0, self.odm[level](above))
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        config = self.config
        anchors = tile_anchors(sizes, (height, width), config.anchor_sizes, config.aspect_ratios, device=images.device)
        return Predictions(
            arm_offsets=torch.cat([offsets for offsets, _ in arm], dim=1),
            arm_logits=torch.cat([logits for _, logits in arm], dim=1),
            odm_offsets=torch.cat([offsets for offsets, _ in odm], dim=1),
            odm_logits=torch.cat([logits for _, logits in odm], dim=1),
            anchors=anchors,
        )


def count_parameters(network: nn.Module) -> int:
    """Learnable numbers, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())
