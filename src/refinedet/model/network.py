"""The RefineDet network (paper, section 3 and figures 1 and 2): images in, raw outputs of ARM and ODM out.

With ``tcb=False`` the outputs keep their form: the ARM that is not there "predicts" offsets of 0 and an object
everywhere, so nobody behind the network has to ask.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet import boxes as box_ops
from refinedet.config import ModelConfig
from refinedet.model.anchors import STRIDES, tile_anchors
from refinedet.model.backbones import Backbone, ExtraResidual, build_backbone, init_convolutions

_CERTAIN = 100.0
"""Logit of the object where no ARM looks: its score is exactly 1 in every float type, so any theta lets it pass."""


class Predictions(NamedTuple):
    """Raw outputs of the network for a batch.

    Offsets are in units of anchor sides divided by ``offset_std``: see ``boxes.decode``. ``arm_offsets`` apply to
    ``anchors``, ``odm_offsets`` to the anchors that the ARM has refined (to ``anchors`` if the config says not
    ``two_step``; see ``starting_boxes``).
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


def starting_boxes(arm_offsets: Tensor, anchors: Tensor, offset_std: Tensor, config: ModelConfig) -> Tensor:
    """The boxes that the ODM's offsets apply to: refined anchors, or the anchors where the config has no two steps.

    Args:
        arm_offsets: (B, K, 4) float32.
        anchors: (K, 4) or (B, K, 4) float32 xyxy in pixels of the network input.
        offset_std: the config's, as a tensor of shape (4,) where the offsets are.
        config: two_step, tcb.

    Returns:
        (B, K, 4) xyxy in the same pixels.
    """
    if config.two_step and config.tcb:
        return box_ops.decode(arm_offsets, anchors, offset_std)
    return anchors.expand_as(arm_offsets)


def passes_negative_filter(arm_logits: Tensor, negative_threshold: float) -> Tensor:
    """Negative anchor filtering (paper, section 3): which anchors the ARM leaves to the ODM.

    An anchor whose negative confidence exceeds theta is filtered. In training such an anchor leaves the pool of the
    ODM's hard negatives (``training/loss.py``), in inference it is discarded (``model/postprocess.py``).

    Args:
        arm_logits: (..., 2) float32: object, background.
        negative_threshold: theta; 1.0 filters nothing.

    Returns:
        (...) bool: False where the anchor is filtered.
    """
    # P(object) >= 1 - theta rather than P(background) <= theta: near 1 float32 has no digits left.
    return arm_logits.softmax(dim=-1)[..., 0] >= 1.0 - negative_threshold


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation: multiply each channel by a weight computed from the means of all channels.

    Source: Hu et al., "Squeeze-and-Excitation Networks"; reduction 16, at least 8 channels in the middle. torchvision's
    ``SqueezeExcitation`` computes the same, but under names that saved models do not have.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(8, channels // 16)
        self.squeeze = nn.Conv2d(channels, middle, 1)
        self.excite = nn.Conv2d(middle, channels, 1)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape, each channel multiplied by a number between 0 and 1."""
        weight: Tensor = self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        return x * weight


class TransferConnectionBlock(nn.Module):
    """Turn an ARM feature map into an ODM one, adding the map of the level above (paper, figure 2).

    Without batch norm: conv, ReLU, conv, + deconv(above), ReLU, conv, ReLU. With it, every convolution and the
    deconvolution lose their bias and are normalised (official ResNet-101 code). The deconvolution doubles both sides;
    its kernel is 2x2 in the official code, 4x4 in the figure and 3x3 in a port whose weights can be imported. The top
    level has no map above, and a ReLU in the place of the sum. Where the levels do not halve exactly, the map from
    above is cut or filled with zeros, evenly on opposite sides.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        top: bool,
        batch_norm: bool,
        deconv_kernel: int = 2,
        attention: bool = False,
    ) -> None:
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
        self.attention = ChannelAttention(channels) if attention else nn.Identity()

    def forward(self, x: Tensor, above: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) and (B, channels, about H / 2, about W / 2) from above to (B, channels, H, W)."""
        x = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.deconv is not None:
            x = x + _cut_or_pad(self.deconv_norm(self.deconv(above)), x.shape[-2], x.shape[-1])
        x = self.attention(F.relu(self.norm3(self.conv3(F.relu(x)))))
        return x


def _cut_or_pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut ``x`` to that size, or fill it up with zeros, half of it before and half (the larger) after."""
    down, right = rows - x.shape[-2], columns - x.shape[-1]
    if down == 0 and right == 0:
        return x
    return F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])


class PredictionHead(nn.Module):
    """Two 3x3 convolutions over one level: four offsets and the class logits of each anchor of a cell.

    With ``block``, a residual block of 1024 channels stands before them, which nothing but them sees (official
    ResNet-101 code, inter_layer_depth 1).
    """

    def __init__(self, channels: int, anchors_per_cell: int, logits: int, *, block: bool = False) -> None:
        super().__init__()
        self.logits_per_anchor = logits
        self.block = ExtraResidual(channels, 256, 1024, stride=1) if block else nn.Identity()
        channels = 1024 if block else channels
        self.offsets = nn.Conv2d(channels, anchors_per_cell * 4, 3, padding=1)
        self.logits = nn.Conv2d(channels, anchors_per_cell * logits, 3, padding=1)
        init_convolutions(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, H, W) to (B, H * W * K, 4) and (B, H * W * K, logits), cells row by row, K anchors each."""
        batch = x.shape[0]
        x = self.block(x)
        offsets = self.offsets(x).permute(0, 2, 3, 1).reshape(batch, -1, 4)
        logits = self.logits(x).permute(0, 2, 3, 1).reshape(batch, -1, self.logits_per_anchor)
        return offsets, logits


class RefineDetNetwork(nn.Module):
    """Backbone, ARM heads, transfer connection blocks and ODM heads (paper, figure 1)."""

    def __init__(self, config: ModelConfig, backbone: nn.Module | None = None) -> None:
        """Make a network with random weights.

        Args:
            config: what it is made of.
            backbone: in place of the one that the config names. Maps images to four feature maps at strides 8, 16, 32
                and 64; ``out_channels`` says their channels, ``new_modules`` which of its children are not pretrained.
        """
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config) if backbone is None else cast(Backbone, backbone)
        channels = self.backbone.out_channels
        width, top = config.tcb_channels, len(STRIDES) - 1
        per_cell, block = len(config.aspect_ratios), config.prediction_blocks
        arm_channels = channels if config.tcb else ()
        odm_channels = (width,) * len(channels) if config.tcb else channels
        # Checkpoints number the parameters in the order of these lines.
        self.arm = nn.ModuleList(PredictionHead(c, per_cell, 2, block=block) for c in arm_channels)
        self.tcb = nn.ModuleList(
            TransferConnectionBlock(
                c,
                width,
                top=level == top,
                batch_norm=config.tcb_batch_norm,
                deconv_kernel=config.tcb_deconv_kernel,
                attention=config.tcb_attention,
            )
            for level, c in enumerate(arm_channels)
        )
        self.odm = nn.ModuleList(PredictionHead(c, per_cell, config.num_classes + 1, block=block) for c in odm_channels)

    def forward(self, images: Tensor) -> Predictions:
        """Run the network.

        Args:
            images: (B, 3, H, W) float, normalised as the config says, H and W multiples of 64.

        Returns:
            Raw outputs, level by level, row by row, aspect ratio by aspect ratio.
        """
        config = self.config
        maps = self.backbone(images)
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        image_size = (images.shape[-2], images.shape[-1])
        anchors = tile_anchors(sizes, image_size, config.anchor_sizes, config.aspect_ratios, device=images.device)
        odm_offsets, odm_logits = _run_heads(self.odm, self._connect(maps) if config.tcb else maps)
        if config.tcb:
            arm_offsets, arm_logits = _run_heads(self.arm, maps)
        else:
            arm_offsets = torch.zeros_like(odm_offsets)
            arm_logits = F.pad(odm_logits.new_full((*odm_logits.shape[:2], 1), _CERTAIN), [0, 1])
        return Predictions(arm_offsets, arm_logits, odm_offsets, odm_logits, anchors)

    def _connect(self, maps: list[Tensor]) -> list[Tensor]:
        """The ODM's maps, from the top level down."""
        above: Tensor | None = None
        connected: list[Tensor] = []
        for block, x in zip(reversed(self.tcb), reversed(maps), strict=True):
            above = block(x, above)
            connected.insert(0, above)
        return connected


def _run_heads(heads: nn.ModuleList, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Offsets and logits of all levels, (B, A, 4) and (B, A, logits)."""
    levels = [head(x) for head, x in zip(heads, maps, strict=True)]
    return torch.cat([offsets for offsets, _ in levels], dim=1), torch.cat([logits for _, logits in levels], dim=1)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def evaluation_view(network: ModuleT) -> ModuleT:
    """The same network in evaluation mode, as modules of its own that hold the same tensors.

    Running it neither depends on the mode of ``network`` nor changes it, so that several threads may predict while
    another one trains. Making it takes about a millisecond, and it sees every later change of the weights, because the
    dictionaries of parameters and buffers are shared.

    Args:
        network: any module whose ``forward`` finds its parts as attributes. What ``torch.compile`` returned keeps to
            the mode of the module that was compiled.
    """
    view = copy.copy(network)
    view.__dict__["training"] = False
    view.__dict__["_modules"] = {
        name: None if part is None else evaluation_view(part) for name, part in network._modules.items()
    }
    return view


def count_parameters(network: nn.Module) -> int:
    """Learnable numbers, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())
