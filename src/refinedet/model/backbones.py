"""Feature extractors (paper, section 4 "Backbone Network"): VGG-16 with a convolutional fc6/fc7, the ResNets, timm's.

A backbone maps images (B, 3, H, W) to four feature maps at strides 8, 16, 32 and 64. Parameter names follow
torchvision's where torchvision has the layer, so that its ImageNet weights load by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import BackboneName, ModelConfig
from refinedet.errors import RefineDetError, UsageError


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
    new_modules: ClassVar[tuple[str, ...]] = ("conv6_1", "conv6_2", "conv4_3_norm", "conv5_3_norm")
    """Parts that no ImageNet weights come with."""

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
        builder = {
            "resnet18": torchvision.models.resnet18,
            "resnet34": torchvision.models.resnet34,
            "resnet50": torchvision.models.resnet50,
            "resnet101": torchvision.models.resnet101,
            "resnext101_32x8d": torchvision.models.resnext101_32x8d,
            "resnext101_64x4d": torchvision.models.resnext101_64x4d,
        }[name]
        body = builder(weights=None, norm_layer=FrozenBatchNorm2d if norm == "frozen" else None)
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

    def load_imagenet(self, state: Mapping[str, Tensor], source: str) -> list[str]:
        """Load torchvision's ResNet layout (classifier ignored); return the names of layers that start anew."""
        own = self.state_dict()
        wanted = [n for n in own if not n.startswith("res6.") and not n.endswith("num_batches_tracked")]
        _check_layout(wanted, state, own, source)
        for name in wanted:
            own[name].copy_(state[name])
        return ["res6"]


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
        self.body: Any = _create_timm(name, pretrained=False)
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

    def load_imagenet(self, state: Mapping[str, Tensor], source: str) -> list[str]:
        """Load timm's layout (classifier and unused layers ignored); return the names of layers that start anew."""
        # As a list of feature maps timm calls a stage "stages_0", as a classifier "stages.0".
        flat = {name.replace(".", "_"): tensor for name, tensor in state.items()}
        own = self.body.state_dict()
        given = {name: flat[name.replace(".", "_")] for name in own if name.replace(".", "_") in flat}
        wanted = [name for name in own if not name.endswith("num_batches_tracked")]
        _check_layout(wanted, given, own, source)
        for name in wanted:
            own[name].copy_(given[name])
        return ["res6"]


def _create_timm(name: str, *, pretrained: bool) -> Any:
    """The timm network reduced to its feature maps of stride 8, 16 and 32."""
    try:
        import timm
    except ImportError:
        raise UsageError("backbone 'timm' needs the package timm: pip install 'refinedet[timm]'") from None
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


def _check_layout(wanted: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    for name in wanted:
        if name not in state:
            raise RefineDetError(f"{source}: no tensor '{name}'; these are not weights of this backbone")
        if state[name].shape != own[name].shape:
            raise RefineDetError(
                f"{source}: '{name}' has shape {tuple(state[name].shape)}, the backbone needs {tuple(own[name].shape)}"
            )


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone that the config names, with random weights."""
    if config.backbone == "vgg16":
        return VGG16(fc6_dilation=config.fc6_dilation)
    if config.backbone == "timm":
        return TimmBackbone(config.timm_name)
    return ResNet(
        config.backbone,
        norm=config.backbone_norm,
        frozen_stages=config.frozen_stages,
        layout=config.backbone_layout,
    )


def imagenet_state(config: ModelConfig) -> Mapping[str, Tensor]:
    """ImageNet weights of the config's backbone, downloaded by torchvision or timm (or found in their caches).

    Raises:
        UsageError: the backbone has Caffe's layout, whose weights neither has.
        RefineDetError: the download failed; the message says how to give a file instead.
    """
    name = config.backbone
    if config.backbone_layout == "caffe":
        raise UsageError(
            f"torchvision's weights of {name} are of another network than backbone_layout 'caffe': give Caffe's with "
            f"--init-weights FILE, or say --model.backbone-layout torchvision"
        )
    if name == "timm":
        # The hub's client raises HTTP, cache and name errors of its own and of two libraries.
        try:
            state: Mapping[str, Tensor] = _create_timm(config.timm_name, pretrained=True).state_dict()
        except UsageError:
            raise
        except Exception as error:
            raise RefineDetError(
                f"ImageNet weights of {config.timm_name} could not be downloaded ({type(error).__name__}); give a file "
                f"with --init-weights"
            ) from None
        return state
    weights = {
        "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
        "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
        "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
        "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
        "resnext101_32x8d": torchvision.models.ResNeXt101_32X8D_Weights.IMAGENET1K_V1,
        "resnext101_64x4d": torchvision.models.ResNeXt101_64X4D_Weights.IMAGENET1K_V1,
    }[name]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise RefineDetError(
            f"ImageNet weights of {name} could not be downloaded ({reason}); give a file with --init-weights"
        ) from None
    return state
