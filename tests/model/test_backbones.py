"""Backbones: taps against torchvision, imported weights, frozen parts and the law of the first weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import ModelConfig
from refinedet.errors import RefineDetError
from refinedet.model.backbones import (
    VGG16,
    ExtraResidual,
    FrozenBatchNorm2d,
    L2Norm,
    ResNet,
    build_backbone,
    init_convolutions,
)
from refinedet.weights.convert import fit
from refinedet.weights.store import WeightFile

VGG_CHANNELS = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256),
    17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip


@pytest.fixture(scope="module")
def vgg() -> VGG16:
    torch.manual_seed(0)
    return VGG16()


def shake_statistics(module: nn.Module, seed: int = 0) -> None:
    """Random statistics and scales for every batch norm, so that none is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            shape = layer.running_mean.shape
            layer.running_mean.copy_(0.2 * torch.randn(shape, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            layer.weight.data.copy_(0.5 + torch.rand(shape, generator=generator))
            layer.bias.data.copy_(0.2 * torch.randn(shape, generator=generator))


def test_l2norm_against_a_loop() -> None:
    norm = L2Norm(3, 10.0)
    norm.weight.data = torch.tensor([10.0, 8.0, 2.0])
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    result = norm(x)
    for b in range(2):
        for row in range(2):
            for column in range(2):
                vector = x[b, :, row, column].tolist()
                length = math.sqrt(sum(value * value for value in vector) + 1e-10)
                expected = [value / length * scale for value, scale in zip(vector, (10, 8, 2), strict=True)]
                assert result[b, :, row, column].tolist() == pytest.approx(expected, rel=1e-5)
    zeros = torch.zeros(1, 3, 1, 1, requires_grad=True)
    norm(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_vgg_layout(vgg: VGG16) -> None:
    shapes = {name: tuple(value.shape) for name, value in vgg.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    for number, (out, into) in VGG_CHANNELS.items():
        expected |= {f"features.{number}.weight": (out, into, 3, 3), f"features.{number}.bias": (out,)}
    for name, shape in {"fc6": (1024, 512, 3, 3), "fc7": (1024, 1024, 1, 1), "conv6_1": (256, 1024, 1, 1),
                        "conv6_2": (512, 256, 3, 3)}.items():  # fmt: skip
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    expected |= {"conv4_3_norm.weight": (512,), "conv5_3_norm.weight": (512,)}
    assert shapes == expected
    parameters = sum(parameter.numel() for parameter in vgg.parameters())
    assert parameters == 20_483_904 + 1_442_560 + 1_024  # reference: vgg, extras, L2Norm


def test_vgg_features_are_torchvisions(vgg: VGG16) -> None:
    """The 13 layers are torchvision's ``features`` by name and by value."""
    reference = torchvision_features()
    reference.load_state_dict({k.removeprefix("features."): v for k, v in vgg.state_dict().items() if "features" in k})
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        taps = vgg(images)
        expected = images
        for number, layer in enumerate(reference):
            expected = layer(expected)
            if number == 22:
                normalised = vgg.conv4_3_norm(expected)
        assert [tuple(tap.shape) for tap in taps] == [(1, 512, 8, 8), (1, 512, 4, 4), (1, 1024, 2, 2), (1, 512, 1, 1)]
        torch.testing.assert_close(taps[0], normalised)
        torch.testing.assert_close(
            taps[2], F.relu(F.conv2d(F.relu(F.conv2d(expected, vgg.fc6.weight, vgg.fc6.bias, padding=3, dilation=3)),
                                     vgg.fc7.weight, vgg.fc7.bias))
        )  # fmt: skip


def load_imagenet(backbone: nn.Module, state: Mapping[str, Tensor], source: str, config: ModelConfig) -> list[str]:
    """Fill a backbone as ``train --init-weights`` does; the names of its parts that stay random."""
    fitted = fit(WeightFile.of_state(state, source), config)
    fitted.fill(nn.ModuleDict({"backbone": backbone}))
    return [part.removeprefix("backbone.") for part in fitted.untrained if part.startswith("backbone.")]


VGG_CONFIG = ModelConfig(backbone="vgg16")


def torchvision_features() -> nn.Sequential:
    # The feature extractor alone: torchvision.models.vgg16 would allocate half a gigabyte of classifier.
    from torchvision.models.vgg import cfgs, make_layers

    features: nn.Sequential = make_layers(cfgs["D"])
    return features


def test_vgg_takes_feature_layers_only(vgg: VGG16) -> None:
    source = {name: torch.randn_like(value) for name, value in vgg.state_dict().items() if name.startswith("features")}
    fresh = VGG16()
    before = fresh.fc6.weight.detach().clone()
    random = load_imagenet(fresh, source, "file", VGG_CONFIG)
    assert random == ["fc6", "fc7", "conv6_1", "conv6_2", "conv4_3_norm", "conv5_3_norm"]
    for name, value in source.items():
        assert torch.equal(fresh.state_dict()[name], value)
    assert torch.equal(fresh.fc6.weight, before)


def test_vgg_subsamples_fully_connected_layers(vgg: VGG16) -> None:
    features = {name: value.clone() for name, value in vgg.state_dict().items() if name.startswith("features")}
    target = VGG16()
    # Stride-0 views stand in for the 400 MB matrix: first every output has the same row of input numbers, then every
    # input the number of its output.
    inputs = torch.arange(512 * 7 * 7, dtype=torch.float32)
    outputs = torch.arange(4096, dtype=torch.float32)
    state = features | {
        "classifier.0.weight": inputs.expand(4096, -1), "classifier.0.bias": outputs,
        "classifier.3.weight": outputs.expand(4096, -1), "classifier.3.bias": 2 * outputs,
    }  # fmt: skip
    random = load_imagenet(target, state, "file", VGG_CONFIG)
    assert random == ["conv6_1", "conv6_2", "conv4_3_norm", "conv5_3_norm"]
    for channel in (0, 1, 300, 511):
        for row in range(3):
            for column in range(3):
                # torchvision flattens (512, 7, 7): channel, then row, then column; rows and columns 0, 3, 6 are kept.
                number = channel * 49 + 3 * row * 7 + 3 * column
                assert target.fc6.weight[:, channel, row, column].eq(number).all()
    assert target.fc6.bias.tolist() == [4.0 * i for i in range(1024)]
    assert target.fc7.bias.tolist() == [8.0 * i for i in range(1024)]
    assert torch.equal(target.fc7.weight[7, :, 0, 0], 4 * torch.arange(1024.0))
    state |= {
        "classifier.0.weight": outputs[:, None].expand(-1, 25088),
        "classifier.3.weight": outputs[:, None].expand(-1, 4096),
    }
    load_imagenet(target, state, "file", VGG_CONFIG)
    assert torch.equal(target.fc6.weight[:, 5, 1, 2], 4 * torch.arange(1024.0))
    assert torch.equal(target.fc7.weight[:, 5, 0, 0], 4 * torch.arange(1024.0))


def test_wrong_weights_are_named(vgg: VGG16) -> None:
    good = {name: value for name, value in vgg.state_dict().items() if name.startswith("features")}
    missing = {name: value for name, value in good.items() if name != "features.28.bias"}
    with pytest.raises(RefineDetError, match=r"weights\.pth: .* 'features\.28\.bias' is missing"):
        load_imagenet(vgg, missing, "weights.pth", VGG_CONFIG)
    wrong = good | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    with pytest.raises(RefineDetError, match=r"weights\.pth: 'features\.0\.weight' has shape \(64, 1, 3, 3\)"):
        load_imagenet(vgg, wrong, "weights.pth", VGG_CONFIG)
    # A fully connected layer of other sides than VGG-16's cannot be subsampled.
    wrong = good | {
        "classifier.0.weight": torch.zeros(1).expand(4096, 512 * 48), "classifier.0.bias": torch.zeros(4096),
        "classifier.3.weight": torch.zeros(1).expand(4096, 4096), "classifier.3.bias": torch.zeros(4096),
    }  # fmt: skip
    with pytest.raises(RefineDetError, match=r"'classifier\.0\.weight' has shape \(4096, 24576\)"):
        load_imagenet(vgg, wrong, "weights.pth", VGG_CONFIG)


def test_first_weights_follow_caffes_xavier(vgg: VGG16) -> None:
    for name, layer in vgg.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        fan_in = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        bound = math.sqrt(3.0 / fan_in)
        assert 0.99 * bound < layer.weight.abs().max().item() <= (1 + 1e-6) * bound, name
        # The standard deviation of U(-b, b) is b / sqrt(3) = sqrt(1 / fan_in).
        assert layer.weight.std().item() == pytest.approx(math.sqrt(1.0 / fan_in), rel=0.05), name
        assert layer.bias.eq(0).all(), name
    assert VGG16().conv4_3_norm.weight.eq(10).all()
    assert VGG16().conv5_3_norm.weight.eq(8).all()


def test_deconvolution_and_normalised_convolutions_start_as_in_caffe() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.ConvTranspose2d(64, 32, 2, stride=2), nn.Conv2d(64, 64, 3, bias=False))
    init_convolutions(layers)
    # A Caffe deconvolution's blob is (in, out, k, k), and its fan_in is out * k * k = 128.
    bound = math.sqrt(3.0 / 128)
    assert 0.99 * bound < layers[0].weight.abs().max().item() <= (1 + 1e-6) * bound
    assert layers[0].bias.eq(0).all()
    assert layers[1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layers[1].weight.mean().item() == pytest.approx(0.0, abs=1e-3)


def test_frozen_batch_norm_is_batch_norm_in_evaluation() -> None:
    reference, frozen = nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    shake_statistics(reference)
    state = {name: value for name, value in reference.state_dict().items() if name != "num_batches_tracked"}
    frozen.load_state_dict(state)
    x = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(2))
    for mode in (True, False):
        frozen.train(mode)
        torch.testing.assert_close(frozen(x), reference(x))
    assert torch.equal(frozen.running_mean, state["running_mean"])
    assert list(frozen.parameters()) == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_resnet_taps_are_torchvisions(name: str, norm: str) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(weights=None).eval()
    shake_statistics(reference)
    backbone = ResNet(name, norm=norm, frozen_stages=0).eval()
    config = ModelConfig(backbone=name, backbone_norm=norm)
    assert load_imagenet(backbone, reference.state_dict(), "file", config) == ["res6"]
    images = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = reference.layer1(reference.maxpool(reference.relu(reference.bn1(reference.conv1(images)))))
        expected = []
        for layer in (reference.layer2, reference.layer3, reference.layer4):
            x = layer(x)
            expected.append(x)
        taps = backbone(images)
    for tap, wanted, channels in zip(taps, expected, backbone.out_channels, strict=False):
        torch.testing.assert_close(tap, wanted)
        assert tap.shape[1] == channels
    assert taps[3].shape == (1, 512, 1, 2)
    assert backbone.out_channels == ((128, 256, 512, 512) if name == "resnet18" else (512, 1024, 2048, 512))


def test_res6_is_the_official_bottleneck() -> None:
    torch.manual_seed(0)
    block = ExtraResidual(32).eval()
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.2)
    shake_statistics(block)
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(4))
    own = block.state_dict()

    def normed(y: torch.Tensor, name: str, **settings: int) -> torch.Tensor:
        y = F.conv2d(y, own[f"{name}.weight"], **settings)
        return F.batch_norm(y, own[f"{name}_bn.running_mean"], own[f"{name}_bn.running_var"],
                            own[f"{name}_bn.weight"], own[f"{name}_bn.bias"], eps=1e-5)  # fmt: skip

    y = F.relu(normed(x, "branch2a", stride=2))
    y = normed(F.relu(normed(y, "branch2b", padding=1)), "branch2c")
    expected = F.relu(normed(x, "branch1", stride=2) + y)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    shapes = [tuple(own[f"branch{part}.weight"].shape) for part in ("1", "2a", "2b", "2c")]
    assert shapes == [(512, 32, 1, 1), (128, 32, 1, 1), (128, 128, 3, 3), (512, 128, 1, 1)]


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 5])
def test_frozen_stages_neither_learn_nor_drift(stages: int) -> None:
    torch.manual_seed(0)
    backbone = ResNet("resnet18", norm="batch", frozen_stages=stages)
    backbone.eval().train()
    groups = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    frozen = {name for group in groups[:stages] for name in group}
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    sum(tap.square().sum() for tap in backbone(images)).backward()
    for name, parameter in backbone.named_parameters():
        is_frozen = name.split(".")[0] in frozen
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
    for name, module in backbone.named_modules():
        if name.split(".")[0] in frozen:
            assert not module.training, name
        elif name:
            assert module.training, name
    for name, value in backbone.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(value, before[name]) == (name.split(".")[0] in frozen), name


def test_frozen_norm_has_statistics_but_no_parameters() -> None:
    backbone = ResNet("resnet18", norm="frozen", frozen_stages=0).train()
    body = [n for n, _ in backbone.named_parameters() if ("bn" in n or "downsample.1" in n) and "res6" not in n]
    assert body == []
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.res6.modules())


def test_the_config_chooses() -> None:
    backbone = build_backbone(ModelConfig(backbone="resnet18", backbone_norm="frozen", frozen_stages=2))
    assert isinstance(backbone, ResNet)
    assert isinstance(backbone.bn1, FrozenBatchNorm2d)
    assert not backbone.layer1[0].conv1.weight.requires_grad
    assert backbone.layer2[0].conv1.weight.requires_grad
