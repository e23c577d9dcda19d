"""Feature extractors (paper, section 4 "Backbone Network"): VGG-16 with a convolutional fc6/fc7, the ResNets, timm's.

A backbone maps images (B, 3, H, W) to four feature maps at strides 8, 16, 32 and 64. Parameter names follow
torchvision's where torchvision has the layer, so that its ImageNet weights load by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from refinedet.config import BackboneName, ModelConfig
from refinedet.errors import UsageError


class L2Norm(nn.Module):
    """Divide each pixel's feature vector by its length and multiply by a learned scale per channel.

    Source: paper, section 4 (conv4_3 and conv5_3 "have different feature scales"); official normalize_layer.cpp,
    across_spatial false, channel_shared false, epsilon inside the root.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape; the length is taken in float32 whatever the autocast type."""
        wide = x.float()
        length = (wide.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
        return (wide / length * self.weight[:, None, None].float()).to(x.dtype)


def xavier_fan_in_(weight: Tensor) -> None:
    """Caffe's "xavier" filler: uniform within sqrt(3 / fan_in); wider than torch's where fan_out exceeds fan_in."""
    fan_in = weight[0].numel()
    nn.init.uniform_(weight, -((3.0 / fan_in) ** 0.5), (3.0 / fan_in) ** 0.5)


def init_convolutions(module: nn.Module) -> None:
    """Xavier weights and zero biases for every convolution; N(0, 0.01) where batch norm follows (no bias).

    Source: official model_libs.py; Caffe computes fan_in of a deconvolution blob (in, out, k, k) as out * k * k,
    which is ``weight[0].numel()`` here as well.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            if layer.bias is None:
                nn.init.normal_(layer.weight, std=0.01)
            else:
                xavier_fan_in_(layer.weight)
                nn.init.zeros_(layer.bias)


class VGG16(nn.Module):
    """VGG-16 to conv5_3, pool5 2x2, fc6 as a 3x3 dilated convolution, fc7 1x1, and conv6_1, conv6_2.

    Taps: conv4_3 and conv5_3 after ReLU and L2Norm (10 and 8), fc7, conv6_2. The backbone itself goes on from the maps
    that are not normalised.
    """

    widths: ClassVar[tuple[int, ...]] = (64, 128, 256, 512, 512)
    """Channels of the convolutions of each block."""
    fc_width: ClassVar[int] = 1024
    """Channels of fc6 and fc7."""
    conv6_widths: ClassVar[tuple[int, int]] = (256, 512)
    """Channels of conv6_1 and conv6_2."""
    new_modules: ClassVar[tuple[str, ...]] = ("fc6", "fc7", "conv6_1", "conv6_2", "conv4_3_norm", "conv5_3_norm")
    """Parts that no ImageNet weights come with, and fc6 and fc7: files of the convolutions alone lack them, from others
    they are a sample of fully connected layers, which has to learn its place."""

    def __init__(self, *, fc6_dilation: int = 3, frozen_stages: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, frozen = 3, 0
        for block, (width, repeats) in enumerate(zip(self.widths, (2, 2, 3, 3, 3), strict=True), 1):
            for _ in range(repeats):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
            frozen = len(layers) if block == frozen_stages else frozen
        self.features = nn.Sequential(*layers)
        self.features[:frozen].requires_grad_(False)
        self.fc6 = nn.Conv2d(channels, self.fc_width, 3, padding=fc6_dilation, dilation=fc6_dilation)
        self.fc7 = nn.Conv2d(self.fc_width, self.fc_width, 1)
        self.conv6_1 = nn.Conv2d(self.fc_width, self.conv6_widths[0], 1)
        self.conv6_2 = nn.Conv2d(*self.conv6_widths, 3, stride=2, padding=1)
        self.conv4_3_norm = L2Norm(self.widths[3], 10.0)
        self.conv5_3_norm = L2Norm(self.widths[4], 8.0)
        self.out_channels = (self.widths[3], self.widths[4], self.fc_width, self.conv6_widths[1])
        init_convolutions(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four maps of 512, 512, 1024 and 512 channels."""
        conv4_3 = self.features[:23](images)
        # Not in place: the next block starts with a pooling that reads conv4_3, so both users see the same map.
        conv5_3 = self.features[23:30](conv4_3)
        x = self.features[30](conv5_3)
        x = F.relu(self.fc6(x))
        fc7 = F.relu(self.fc7(x))
        conv6_2 = F.relu(self.conv6_2(F.relu(self.conv6_1(fc7))))
        return [self.conv4_3_norm(conv4_3), self.conv5_3_norm(conv5_3), fc7, conv6_2]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with imported statistics and scales that no training changes (epsilon 1e-5).

    Same state-dict names as ``nn.BatchNorm2d`` but for ``num_batches_tracked``; safe at any batch size. torchvision's
    class of this name differs from ``nn.BatchNorm2d`` in the last digits and widens bfloat16 to float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape and dtype."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class ExtraResidual(nn.Module):
    """A bottleneck with a projection, new to the network: res6 and the official prediction blocks.

    Source: official ResBody with use_branch1; res6 is 128, 128, 512 of stride 2 (AddExtraLayers), a prediction block
    256, 256, 1024 of stride 1. The stride is on both 1x1 convolutions that come first.
    """

    def __init__(self, channels: int, width: int = 128, out_channels: int = 512, *, stride: int = 2) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False)
        self.branch1_bn = nn.BatchNorm2d(out_channels)
        self.branch2a = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        self.branch2a_bn = nn.BatchNorm2d(width)
        self.branch2b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.branch2b_bn = nn.BatchNorm2d(width)
        self.branch2c = nn.Conv2d(width, out_channels, 1, bias=False)
        self.branch2c_bn = nn.BatchNorm2d(out_channels)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.branch2a_bn(self.branch2a(x)))
        y = F.relu(self.branch2b_bn(self.branch2b(y)))
        return F.relu(self.branch1_bn(self.branch1(x)) + self.branch2c_bn(self.branch2c(y)))


class TorchvisionResNet(NamedTuple):
    """One of torchvision's networks that ``ResNet`` is made of."""

    title: str
    """Its name in the literature."""
    build: Callable[..., Any]
    """Makes it, classifier included."""
    weights: Any
    """Its ImageNet weights, as torchvision lists them."""


RESNETS = {
    "resnet18": TorchvisionResNet("ResNet-18", models.resnet18, models.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": TorchvisionResNet("ResNet-34", models.resnet34, models.ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": TorchvisionResNet("ResNet-50", models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": TorchvisionResNet("ResNet-101", models.resnet101, models.ResNet101_Weights.IMAGENET1K_V1),
    "resnext101_32x8d": TorchvisionResNet(
        "ResNeXt-101 (32x8d)", models.resnext101_32x8d, models.ResNeXt101_32X8D_Weights.IMAGENET1K_V1
    ),
    "resnext101_64x4d": TorchvisionResNet(
        "ResNeXt-101 (64x4d)", models.resnext101_64x4d, models.ResNeXt101_64X4D_Weights.IMAGENET1K_V1
    ),
}
"""By the name that ``ModelConfig.backbone`` gives them."""


class ResNet(nn.Module):
    """A torchvision ResNet or ResNeXt without its classifier, and res6.

    Taps: layer2, layer3, layer4 and res6 after ReLU (the paper's res3b3, res4b22, res5c, res6).

    Args:
        name: which one.
        norm: "batch" or "frozen".
        frozen_stages: leading stages that are not trained.
        layout: "caffe" moves each stage's stride from its first 3x3 convolution to the 1x1 one before it, and pools
            the stem without padding, rounding up; names and shapes of the parameters stay.
    """

    new_modules: ClassVar[tuple[str, ...]] = ("res6",)
    """Parts that no ImageNet weights come with."""

    def __init__(
        self, name: BackboneName, *, norm: str = "batch", frozen_stages: int = 0, layout: str = "torchvision"
    ) -> None:
        super().__init__()
        self.layout = layout
        body = RESNETS[name].build(weights=None, norm_layer=FrozenBatchNorm2d if norm == "frozen" else None)
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        if layout == "caffe":
            for layer in (self.layer2, self.layer3, self.layer4):
                layer[0].conv1.stride, layer[0].conv2.stride = layer[0].conv2.stride, (1, 1)
        width = body.fc.in_features
        self.out_channels = (width // 4, width // 2, width, 512)
        self.res6 = ExtraResidual(width)
        stages: list[list[nn.Module]] = [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3]]
        stages.append([self.layer4])
        self._frozen = [module for stage in stages[:frozen_stages] for module in stage]
        for module in self._frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNet:
        """As ``nn.Module.train``, but frozen stages stay in evaluation mode: their statistics must not drift."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four maps of ``out_channels`` channels."""
        caffe = self.layout == "caffe"
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=0 if caffe else 1, ceil_mode=caffe)
        maps: list[Tensor] = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(self.layer1(x) if not maps else x)
            maps.append(x)
        return [*maps, self.res6(x)]


class TimmBackbone(nn.Module):
    """Any timm network with feature maps of stride 8, 16 and 32, and res6 for stride 64.

    The maps need not halve exactly: networks that do not pad, such as Inception-ResNet-v2, give 37, 18 and 8 cells for
    320 pixels.

    Args:
        name: what timm calls it.

    Raises:
        UsageError: timm is not installed, does not know the name, or the network has no such maps.
    """

    new_modules: ClassVar[tuple[str, ...]] = ("res6",)
    """Parts that no ImageNet weights come with."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body: Any = create_timm(name, pretrained=False)
        channels = [int(count) for count in self.body.feature_info.channels()]
        self.res6 = ExtraResidual(channels[-1])
        self.out_channels = (channels[0], channels[1], channels[2], 512)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four maps of ``out_channels`` channels."""
        maps = list(self.body(images))
        if any(x.ndim != 4 or x.shape[1] != count for x, count in zip(maps, self.out_channels, strict=False)):
            raise UsageError(
                f"the timm model gives maps of shape {tuple(maps[0].shape)}; (B, channels, H, W) is needed"
            )
        return [*maps, self.res6(maps[-1])]

    def level_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the four maps, from a run that computes shapes only."""
        shell = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            maps = shell(torch.empty(1, 3, height, width, device="meta"))
        return [(x.shape[-2], x.shape[-1]) for x in maps]


def create_timm(name: str, *, pretrained: bool) -> Any:
    """The timm network reduced to its feature maps of stride 8, 16 and 32.

    Only names that timm has built in are accepted, so that a name out of a file never reaches a model hub.

    Raises:
        UsageError: timm is not installed, does not know the name, or the network has no such maps.
    """
    try:
        import timm
    except ImportError:
        raise UsageError("backbone 'timm' needs the package timm: pip install 'refinedet[timm]'") from None
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!a:.80} of its own (names of a hub are not taken)")
    try:
        body: Any = timm.create_model(name, features_only=True)
        strides = [int(stride) for stride in body.feature_info.reduction()]
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(f"timm has no feature maps of a model '{name}' ({reason})") from None
    # Of several maps of one stride the last has seen most.
    levels = [max((i for i, stride in enumerate(strides) if stride == wanted), default=-1) for wanted in (8, 16, 32)]
    if -1 in levels:
        raise UsageError(f"timm's '{name}' has maps of strides {strides}, but 8, 16 and 32 are needed")
    return timm.create_model(name, features_only=True, out_indices=levels, pretrained=pretrained)


Backbone = VGG16 | ResNet | TimmBackbone


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone that the config names, with random weights."""
    if config.backbone == "vgg16":
        return VGG16(fc6_dilation=config.fc6_dilation, frozen_stages=config.frozen_stages)
    if config.backbone == "timm":
        return TimmBackbone(config.timm_name)
    return ResNet(
        config.backbone,
        norm=config.backbone_norm,
        frozen_stages=config.frozen_stages,
        layout=config.backbone_layout,
    )
