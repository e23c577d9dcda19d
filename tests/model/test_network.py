"""The network against the same network written out by hand, from its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import ModelConfig
from refinedet.model.anchors import level_sizes, tile_anchors
from refinedet.model.network import (
    PredictionHead,
    Predictions,
    RefineDetNetwork,
    TransferConnectionBlock,
    count_parameters,
)

State = Mapping[str, Tensor]
SMALL_RESNET = ModelConfig(
    backbone="resnet18", backbone_norm="frozen", tcb_batch_norm=True, tcb_channels=32, num_classes=5
)


def conv(state: State, name: str, x: Tensor, **settings: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **settings)


def heads(state: State, name: str, maps: list[Tensor], logits: int) -> tuple[Tensor, Tensor]:
    """Per level, cell by cell in rows, anchor by anchor: offsets and logits, written as loops over cells."""
    offsets_of_all, logits_of_all = [], []
    for level, x in enumerate(maps):
        batch, _, height, width = x.shape
        offsets = conv(state, f"{name}.{level}.offsets", x, padding=1).view(batch, 3, 4, height, width)
        scores = conv(state, f"{name}.{level}.logits", x, padding=1).view(batch, 3, logits, height, width)
        for row in range(height):
            for column in range(width):
                for anchor in range(3):
                    offsets_of_all.append(offsets[:, anchor, :, row, column])
                    logits_of_all.append(scores[:, anchor, :, row, column])
    return torch.stack(offsets_of_all, dim=1), torch.stack(logits_of_all, dim=1)


def vgg_refinedet(state: State, images: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """VGG-16 RefineDet of the official prototxt (reference, sections 1.2 to 1.4)."""
    x = images
    number = 0
    taps = {}
    for block, repeats in enumerate((2, 2, 3, 3, 3), start=1):
        for repeat in range(1, repeats + 1):
            x = F.relu(conv(state, f"backbone.features.{number}", x, padding=1))
            taps[f"conv{block}_{repeat}"] = x
            number += 2
        x = F.max_pool2d(x, 2, 2)
        number += 1
    fc6 = F.relu(conv(state, "backbone.fc6", x, padding=3, dilation=3))
    fc7 = F.relu(conv(state, "backbone.fc7", fc6))
    conv6_1 = F.relu(conv(state, "backbone.conv6_1", fc7))
    conv6_2 = F.relu(conv(state, "backbone.conv6_2", conv6_1, stride=2, padding=1))

    def normalised(name: str) -> Tensor:
        y = taps[name]
        length = torch.sqrt((y * y).sum(dim=1, keepdim=True) + 1e-10)
        return y / length * state[f"backbone.{name}_norm.weight"].view(1, -1, 1, 1)

    maps = [normalised("conv4_3"), normalised("conv5_3"), fc7, conv6_2]
    # Top: conv, ReLU, conv, ReLU, conv, ReLU.
    p6 = F.relu(conv(state, "tcb.3.conv1", maps[3], padding=1))
    p6 = F.relu(conv(state, "tcb.3.conv2", p6, padding=1))
    p6 = F.relu(conv(state, "tcb.3.conv3", p6, padding=1))
    pyramid = [p6]
    for level in (2, 1, 0):
        lateral = conv(state, f"tcb.{level}.conv1", maps[level], padding=1)
        lateral = conv(state, f"tcb.{level}.conv2", F.relu(lateral), padding=1)
        up = F.conv_transpose2d(
            pyramid[0], state[f"tcb.{level}.deconv.weight"], state[f"tcb.{level}.deconv.bias"], stride=2
        )
        summed = F.relu(lateral + up)
        pyramid.insert(0, F.relu(conv(state, f"tcb.{level}.conv3", summed, padding=1)))
    return (*heads(state, "arm", maps, 2), *heads(state, "odm", pyramid, classes + 1))


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Biases, scales and statistics that start at 0 or 1 become random, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.ndim != 1:
                continue
            if name == "running_var" or (name == "weight" and value.ndim == 1):
                value.data.copy_((0.5 + torch.rand(value.shape, generator=generator)) * value.data)
            else:
                value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))


def assert_outputs(predictions: Predictions, expected: tuple[Tensor, ...]) -> None:
    for got, wanted, name in zip(predictions[:4], expected, Predictions._fields, strict=False):
        assert got.shape == wanted.shape, name
        assert wanted.abs().max() > 0.05, f"{name}: too small to compare"
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("classes", "count"), [(20, 34_440_884), (80, 36_100_484)])
def test_vgg_parameter_counts(classes: int, count: int) -> None:
    with torch.device("meta"):
        network = RefineDetNetwork(ModelConfig(num_classes=classes))
    assert count_parameters(network) == count
    parts = {name: count_parameters(part) for name, part in network.named_children()}
    odm = 691_500 if classes == 20 else 36_100_484 - 34_440_884 + 691_500
    assert parts == {"backbone": 21_927_488, "arm": 414_792, "tcb": 11_407_104, "odm": odm}


@pytest.mark.parametrize(("height", "width"), [(128, 64), (64, 128)])
def test_vgg_network_equals_the_written_out_one(height: int, width: int) -> None:
    torch.manual_seed(0)
    network = RefineDetNetwork(ModelConfig(num_classes=3))
    randomise(network)
    network = network.double().eval()
    images = 20 * torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        predictions = network(images)
        expected = vgg_refinedet(network.state_dict(), images, 3)
    assert_outputs(predictions, expected)
    count = 3 * sum(rows * columns for rows, columns in level_sizes(height, width))
    assert [tuple(x.shape) for x in predictions] == [
        (2, count, 4), (2, count, 2), (2, count, 4), (2, count, 4), (count, 4),
    ]  # fmt: skip
    config = network.config
    anchors = tile_anchors(level_sizes(height, width), (height, width), config.anchor_sizes, config.aspect_ratios)
    assert torch.equal(predictions.anchors.float(), anchors)


def test_resnet_network_equals_the_written_out_one() -> None:
    torch.manual_seed(0)
    network = RefineDetNetwork(SMALL_RESNET)
    for part in (network.tcb, network.backbone.res6):
        for layer in part.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight)
    randomise(network)
    network = network.double().eval()
    images = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = network.state_dict()

    def norm(name: str, x: Tensor) -> Tensor:
        return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state[f"{name}.weight"],
                            state[f"{name}.bias"], eps=1e-5)  # fmt: skip

    with torch.no_grad():
        predictions = network(images)
        maps = network.backbone(images)
        pyramid: list[Tensor] = []
        for level in (3, 2, 1, 0):
            name = f"tcb.{level}"
            x = F.relu(norm(f"{name}.norm1", conv(state, f"{name}.conv1", maps[level], padding=1)))
            x = norm(f"{name}.norm2", conv(state, f"{name}.conv2", x, padding=1))
            if pyramid:
                up = F.conv_transpose2d(pyramid[0], state[f"{name}.deconv.weight"], stride=2)
                x = x + norm(f"{name}.deconv_norm", up)
            x = conv(state, f"{name}.conv3", F.relu(x), padding=1)
            pyramid.insert(0, F.relu(norm(f"{name}.norm3", x)))
        expected = (*heads(state, "arm", maps, 2), *heads(state, "odm", pyramid, 6))
    assert_outputs(predictions, expected)
    assert not any(name.startswith("tcb") and "conv" in name and name.endswith("bias") and "norm" not in name
                   for name in state)  # fmt: skip


@pytest.mark.parametrize(("side", "count"), [(320, 6375), (512, 16320)])
def test_anchor_counts_of_the_real_feature_maps(side: int, count: int) -> None:
    with torch.device("meta"):
        network = RefineDetNetwork(ModelConfig(image_size=(side, side)))
        predictions = network(torch.zeros(1, 3, side, side))
    assert [tuple(x.shape) for x in predictions] == [
        (1, count, 4), (1, count, 2), (1, count, 4), (1, count, 21), (count, 4),
    ]  # fmt: skip


def test_any_multiple_of_64_and_any_aspect_ratios() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="resnet18", tcb_channels=16, num_classes=1, aspect_ratios=(1.0, 3.0), anchor_sizes=(9.0,) * 4
    )
    network = RefineDetNetwork(config).eval()
    with torch.no_grad():
        predictions = network(torch.zeros(1, 3, 64, 192))
    assert predictions.odm_logits.shape == (1, 2 * (8 * 24 + 4 * 12 + 2 * 6 + 1 * 3), 2)
    assert predictions.anchors.shape[0] == predictions.arm_offsets.shape[1]


def test_outputs_do_not_depend_on_mode_or_batch() -> None:
    torch.manual_seed(0)
    network = RefineDetNetwork(ModelConfig(backbone="resnet18", backbone_norm="frozen", tcb_channels=16)).eval()
    network.backbone.res6.eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        joint, alone = network(images), network(images[1:])
        assert [type(x) for x in joint] == [Tensor] * 5
        for whole, one in zip(joint[:4], alone[:4], strict=True):
            torch.testing.assert_close(whole[1:], one, atol=1e-5, rtol=1e-5)


def test_heads_and_blocks_start_with_xavier() -> None:
    torch.manual_seed(0)
    for module in (PredictionHead(64, 3, 21), TransferConnectionBlock(64, 32, top=False, batch_norm=False)):
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                bound = (3.0 / layer.weight[0].numel()) ** 0.5
                assert 0.98 * bound < layer.weight.abs().max().item() <= (1 + 1e-6) * bound
                assert layer.bias.eq(0).all()
    normed = TransferConnectionBlock(64, 32, top=False, batch_norm=True)
    for layer in (normed.conv1, normed.conv2, normed.conv3, normed.deconv):
        assert layer.bias is None
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert TransferConnectionBlock(64, 32, top=True, batch_norm=False).deconv is None


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    network = RefineDetNetwork(ModelConfig(backbone="resnet18", tcb_channels=16, num_classes=2)).train()
    predictions = network(torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(4)))
    sum(output.square().sum() for output in predictions[:4]).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
