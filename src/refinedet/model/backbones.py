"""Feature extractors: VGG-16 with a convolutional fc6/fc7, and the ResNets (paper, section 4 "Network architecture").

A backbone maps images (B, 3, H, W) to four feature maps at strides 8, 16, 32 and 64. Parameter names follow
torchvision's where torchvision has the layer, so that its ImageNet weights load by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import BackboneName, ModelConfig
from refinedet.errors import RefineDetError


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

    out_channels = (512, 512, 1024, 512)

    def __init__(self, *, fc6_dilation: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(repeats):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=fc6_dilation, dilation=fc6_dilation)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        self.conv6_1 = nn.Conv2d(1024, 256, 1)
        self.conv6_2 = nn.Conv2d(256, 512, 3, stride=2, padding=1)
        self.conv4_3_norm = L2Norm(512, 10.0)
        self.conv5_3_norm = L2Norm(512, 8.0)
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

    def load_imagenet(self, state: Mapping[str, Tensor], source: str) -> list[str]:
        """Load torchvision's VGG-16 layout and return the names of layers that start from random numbers.

        Fully connected layers, where present, become fc6 and fc7 "via subsampling parameters" (paper, section 4): of
        fc6's 7x7 kernel every third row and column, of its and fc7's 4096 outputs every fourth.
        """
        own = self.state_dict()
        wanted = [name for name in own if name.startswith("features.")]
        _check_layout(wanted, state, own, source)
        for name in wanted:
            own[name].copy_(state[name])
        if "classifier.0.weight" in state and "classifier.3.weight" in state:
            fc6 = state["classifier.0.weight"].float().reshape(4096, 512, 7, 7)
            own["fc6.weight"].copy_(fc6[::4, :, ::3, ::3])
            own["fc6.bias"].copy_(state["classifier.0.bias"][::4])
            own["fc7.weight"].copy_(state["classifier.3.weight"].float()[::4, ::4, None, None])
            own["fc7.bias"].copy_(state["classifier.3.bias"][::4])
            return ["conv6_1", "conv6_2"]
        return ["fc6", "fc7", "conv6_1", "conv6_2"]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with imported statistics and scales that no training changes (epsilon 1e-5).

    Same state-dict names as ``nn.BatchNorm2d`` but for ``num_batches_tracked``; safe at any batch size.
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
    """res6: one bottleneck of stride 2 with a projection (official AddExtraLayers: 128, 128, 512)."""

    def __init__(self, channels: int, width: int = 128, out_channels: int = 512) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(channels, out_channels, 1, stride=2, bias=False)
        self.branch1_bn = nn.BatchNorm2d(out_channels)
        self.branch2a = nn.Conv2d(channels, width, 1, stride=2, bias=False)
        self.branch2a_bn = nn.BatchNorm2d(width)
        self.branch2b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.branch2b_bn = nn.BatchNorm2d(width)
        self.branch2c = nn.Conv2d(width, out_channels, 1, bias=False)
        self.branch2c_bn = nn.BatchNorm2d(out_channels)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, ceil(H / 2), ceil(W / 2))."""
        y = F.relu(self.branch2a_bn(self.branch2a(x)))
        y = F.relu(self.branch2b_bn(self.branch2b(y)))
        return F.relu(self.branch1_bn(self.branch1(x)) + self.branch2c_bn(self.branch2c(y)))


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier, and res6. Taps: layer2, layer3, layer4, res6, after ReLU."""

    def __init__(self, name: BackboneName, *, norm: str, frozen_stages: int) -> None:
        super().__init__()
        builder = {
            "resnet18": torchvision.models.resnet18,
            "resnet34": torchvision.models.resnet34,
            "resnet50": torchvision.models.resnet50,
            "resnet101": torchvision.models.resnet101,
        }[name]
        body = builder(weights=None, norm_layer=FrozenBatchNorm2d if norm == "frozen" else None)
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
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
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        maps: list[Tensor] = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(self.layer1(x) if not maps else x)
            maps.append(x)
        return [*maps, self.res6(x)]

    def load_imagenet(self, state: Mapping[str, Tensor], source: str) -> list[str]:
        """Load torchvision's ResNet layout (classifier ignored); return the names of layers that start anew."""
        own = self.state_dict()
        wanted = [n for n in own if not n.startswith("res6.") and not n.endswith("num_batches_tracked")]
        _check_layout(wanted, state, own, source)
        for name in wanted:
            own[name].copy_(state[name])
        return ["res6"]


def _check_layout(wanted: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    for name in wanted:
        if name not in state:
            raise RefineDetError(f"{source}: no tensor '{name}'; these are not weights of this backbone")
        if state[name].shape != own[name].shape:
            raise RefineDetError(
                f"{source}: '{name}' has shape {tuple(state[name].shape)}, the backbone needs {tuple(own[name].shape)}"
            )


def build_backbone(config: ModelConfig) -> VGG16 | ResNet:
    """The backbone that the config names, with random weights."""
    if config.backbone == "vgg16":
        return VGG16(fc6_dilation=config.fc6_dilation)
    return ResNet(config.backbone, norm=config.backbone_norm, frozen_stages=config.frozen_stages)


def torchvision_state(name: BackboneName) -> OrderedDict[str, Tensor]:
    """ImageNet weights of that backbone, downloaded by torchvision (or found in its cache).

    Raises:
        RefineDetError: the download failed; the message says how to give a file instead.
    """
    weights = {
        "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
        "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
        "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
        "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    }[name]
    try:
        state: OrderedDict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise RefineDetError(
            f"ImageNet weights of {name} could not be downloaded ({reason}); give a file with --init-weights"
        ) from None
    return state
