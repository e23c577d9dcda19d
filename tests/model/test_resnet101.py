"""Backbones beyond VGG-16: the official ResNet-101 against a forward pass written out from its prototxt, and timm's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.model.backbones import ResNet, TimmBackbone, build_backbone
from refinedet.model.network import RefineDetNetwork, TransferConnectionBlock, count_parameters
from refinedet.presets import PRESETS
from refinedet.weights.convert import fit
from refinedet.weights.store import WeightFile, imagenet_weights

State = Mapping[str, Tensor]
OFFICIAL = ModelConfig(
    backbone="resnet101",
    backbone_layout="caffe",
    prediction_blocks=True,
    tcb_batch_norm=True,
    num_classes=80,
    mean=(104.0, 117.0, 123.0),
    std=(1.0, 1.0, 1.0),
    channel_order="bgr",
)


def meta(config: ModelConfig) -> RefineDetNetwork:
    with torch.device("meta"):
        return RefineDetNetwork(config)


def test_parameter_counts() -> None:
    assert count_parameters(meta(OFFICIAL)) == 82_451_588
    assert count_parameters(meta(PRESETS["coco-320-resnet101"].model)) == 82_451_588
    assert count_parameters(meta(PRESETS["coco-512-resnet101"].model)) == 82_451_588
    paper = meta(replace(OFFICIAL, prediction_blocks=False, backbone_layout="torchvision"))
    blocks = 4 * 2 * (256 * 256 * 9 + 256 * 1024 + 2 * (256 + 256 + 1024 + 1024))
    projections = sum(c * (256 + 1024) for c in (512, 1024, 2048, 512, 256, 256, 256, 256))
    wider = sum(9 * (1024 - c) * (12 + 6) for c in (512, 1024, 2048, 512)) + 4 * 9 * (1024 - 256) * (12 + 243)
    assert count_parameters(paper) == 82_451_588 - blocks - projections - wider


@pytest.mark.parametrize(("name", "width"), [("resnext101_32x8d", 2048), ("resnext101_64x4d", 2048)])
def test_resnext(name: str, width: int) -> None:
    with torch.device("meta"):
        network = RefineDetNetwork(ModelConfig(backbone=name, tcb_batch_norm=True))  # type: ignore[arg-type]
        predictions = network(torch.zeros(1, 3, 320, 320))
    assert network.backbone.out_channels == (512, 1024, width, 512)
    assert predictions.anchors.shape == (6375, 4)


# The official network, from its prototxt (reference, sections 1.2 to 1.5).


def conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride, padding=padding)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Caffe's BatchNorm with global statistics, then Scale."""

    def column(part: str) -> Tensor:
        return state[f"{name}.{part}"].view(1, -1, 1, 1)

    return (x - column("running_mean")) / torch.sqrt(column("running_var") + 1e-5) * column("weight") + column("bias")


def body_block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """ResBody with Kaiming's strides: on branch2a and branch1."""
    y = F.relu(norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x, stride)))
    y = F.relu(norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", y, padding=1)))
    y = norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", y))
    if f"{name}.downsample.0.weight" in state:
        x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride))
    return F.relu(x + y)


def extra_block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(norm(state, f"{name}.branch2a_bn", conv(state, f"{name}.branch2a", x, stride)))
    y = F.relu(norm(state, f"{name}.branch2b_bn", conv(state, f"{name}.branch2b", y, padding=1)))
    y = norm(state, f"{name}.branch2c_bn", conv(state, f"{name}.branch2c", y))
    return F.relu(norm(state, f"{name}.branch1_bn", conv(state, f"{name}.branch1", x, stride)) + y)


def heads(state: State, name: str, maps: list[Tensor], logits: int) -> tuple[Tensor, Tensor]:
    all_offsets, all_logits = [], []
    for level, tap in enumerate(maps):
        x = extra_block(state, f"{name}.{level}.block", tap, 1)
        offsets = conv(state, f"{name}.{level}.offsets", x, padding=1)
        scores = conv(state, f"{name}.{level}.logits", x, padding=1)
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                for anchor in range(3):
                    all_offsets.append(offsets[:, anchor * 4 : anchor * 4 + 4, row, column])
                    all_logits.append(scores[:, anchor * logits : (anchor + 1) * logits, row, column])
    return torch.stack(all_offsets, dim=1), torch.stack(all_logits, dim=1)


def official_forward(state: State, images: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = F.relu(norm(state, "backbone.bn1", conv(state, "backbone.conv1", images, 2, 3)))
    # Caffe's pooling rounds up and, without padding, the last window may hang over the edge.
    x = F.pad(x, [0, 1, 0, 1], value=-torch.inf)
    x = F.max_pool2d(x, 3, 2)
    maps = []
    for stage, blocks in enumerate((3, 4, 23, 3), start=1):
        for block in range(blocks):
            x = body_block(state, f"backbone.layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
        maps.append(x)
    maps = [*maps[1:], extra_block(state, "backbone.res6", x, 2)]
    above: Tensor | None = None
    pyramid: list[Tensor] = []
    for level in (3, 2, 1, 0):
        name = f"tcb.{level}"
        y = F.relu(norm(state, f"{name}.norm1", conv(state, f"{name}.conv1", maps[level], padding=1)))
        y = norm(state, f"{name}.norm2", conv(state, f"{name}.conv2", y, padding=1))
        if above is not None:
            up = F.conv_transpose2d(above, state[f"{name}.deconv.weight"], stride=2)
            y = y + norm(state, f"{name}.deconv_norm", up)
        above = F.relu(norm(state, f"{name}.norm3", conv(state, f"{name}.conv3", F.relu(y), padding=1)))
        pyramid.insert(0, above)
    return (*heads(state, "arm", maps, 2), *heads(state, "odm", pyramid, classes + 1))


def randomise(network: nn.Module, seed: int) -> None:
    """Every tensor random, at scales that keep activations near 1 through a hundred layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            fan_in = tensor[0].numel() if "deconv" not in name else tensor.shape[0]
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2.0 / fan_in) ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("weight"):
            # The last scale of a residual branch is small, or a hundred sums would grow without end.
            scale = 0.2 if ".bn3." in name else 1.0
            tensor.copy_(scale * (0.5 + torch.rand(tensor.shape, generator=generator)))
        elif tensor.is_floating_point():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize(("height", "width"), [(64, 128)])
def test_official_network_equals_the_written_out_one(height: int, width: int) -> None:
    network = RefineDetNetwork(replace(OFFICIAL, num_classes=3)).double().eval()
    randomise(network, 0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        got = network(images)
        wanted = official_forward(network.state_dict(), images, 3)
    for ours, theirs in zip(got[:4], wanted, strict=True):
        assert ours.shape == theirs.shape
        assert 0.01 < theirs.std() < 1e4, "too small or too large to compare"
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def test_heads_have_biases_and_transfer_blocks_have_none() -> None:
    names = set(meta(OFFICIAL).state_dict())
    for head in ("arm", "odm"):
        assert {f"{head}.0.offsets.bias", f"{head}.0.logits.bias", f"{head}.3.block.branch1.weight"} <= names
    assert not any(name.endswith("bias") and "norm" not in name and name.startswith("tcb") for name in names), (
        "batch norm has the bias"
    )
    assert "tcb.2.deconv_norm.weight" in names


def test_transfer_blocks_see_the_tap_and_not_the_prediction_block() -> None:
    network = meta(replace(OFFICIAL, num_classes=3))
    assert [block.conv1.in_channels for block in network.tcb] == [512, 1024, 2048, 512]  # type: ignore[union-attr]
    assert [head.offsets.in_channels for head in (*network.arm, *network.odm)] == [1024] * 8  # type: ignore[union-attr]


def test_caffe_layout_has_the_names_and_shapes_of_torchvision() -> None:
    with torch.device("meta"):
        ours, theirs = ResNet("resnet101", layout="caffe"), ResNet("resnet101")
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    strides = [ours.layer2[0].conv1.stride, ours.layer2[0].conv2.stride, ours.layer2[0].downsample[0].stride]
    assert strides == [(2, 2), (1, 1), (2, 2)]
    assert theirs.layer2[0].conv2.stride == (2, 2)
    assert ours.layer1[0].conv1.stride == (1, 1)


def test_torchvision_weights_are_refused_for_the_caffe_layout() -> None:
    with pytest.raises(UsageError, match="--init-weights FILE"):
        imagenet_weights(OFFICIAL)


@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "vgg16", "backbone_layout": "caffe"},
        {"backbone": "timm"},
        {"backbone": "resnet18", "timm_name": "resnet18"},
        {"backbone": "timm", "timm_name": "resnet18", "backbone_norm": "frozen"},
        {"backbone": "timm", "timm_name": "resnet18", "frozen_stages": 1},
        {"tcb": False, "tcb_attention": True},
    ],
)
def test_impossible_models_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        ModelConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "columns", "above"), [(18, 37, (8, 18)), (5, 4, (3, 2)), (7, 9, (4, 4))])
def test_levels_that_do_not_halve_are_cut_or_filled(rows: int, columns: int, above: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = TransferConnectionBlock(4, 3, top=False, batch_norm=False).double()
    x = torch.randn(2, 4, rows, columns, dtype=torch.float64)
    upper = torch.randn(2, 3, *above, dtype=torch.float64)
    assert block.deconv is not None
    up = block.deconv(upper).detach()
    placed = torch.zeros(2, 3, rows, columns, dtype=torch.float64)
    # The spare rows are split evenly; of an odd number the larger half is behind.
    dy, dx = (rows - up.shape[2]) // 2, (columns - up.shape[3]) // 2
    for y in range(rows):
        for z in range(columns):
            if 0 <= y - dy < up.shape[2] and 0 <= z - dx < up.shape[3]:
                placed[:, :, y, z] = up[:, :, y - dy, z - dx]
    lateral = block.conv2(F.relu(block.conv1(x)))
    wanted = F.relu(block.conv3(F.relu(lateral + placed)))
    torch.testing.assert_close(block(x, upper), wanted)


# timm


def timm_model(name: str, **settings: object) -> ModelConfig:
    pytest.importorskip("timm")
    return ModelConfig(backbone="timm", timm_name=name, tcb_channels=16, tcb_batch_norm=True, **settings)  # type: ignore[arg-type]


def test_timm_inception_resnet_v2_gives_37_18_8_4() -> None:
    model = RefineDet(timm_model("inception_resnet_v2", num_classes=3))
    backbone = model.network.backbone
    assert isinstance(backbone, TimmBackbone)
    assert backbone.level_sizes(320, 320) == [(37, 37), (18, 18), (8, 8), (4, 4)]
    assert model.num_anchors == 3 * (37**2 + 18**2 + 8**2 + 4**2)
    with torch.no_grad():
        predictions = model.network(torch.zeros(1, 3, 320, 320))
    assert predictions.odm_logits.shape == (1, model.num_anchors, 4)
    assert predictions.anchors.shape == (model.num_anchors, 4)
    # The first cell's square anchor: centred in a cell of 320 / 37 pixels.
    centre = (predictions.anchors[0, :2] + predictions.anchors[0, 2:]) / 2
    torch.testing.assert_close(centre, torch.full((2,), 0.5 * 320 / 37))


def test_timm_networks_learn_and_round_trip(tmp_path: object) -> None:
    model = RefineDet(timm_model("resnet10t", num_classes=2, image_size=(64, 64)), ("a", "b"))
    assert model.num_anchors == 3 * (64 + 16 + 4 + 1)
    folder = model.save_pretrained(f"{tmp_path}/model")
    again = RefineDet.from_pretrained(folder)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(again.network(images).odm_logits, model.network(images).odm_logits)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_timm_imagenet_weights_load_from_classifier_and_from_features(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    whole = timm.create_model(name)
    backbone = build_backbone(timm_model(name))
    assert isinstance(backbone, TimmBackbone)
    fitted = fit(WeightFile.of_state(whole.state_dict(), "x.safetensors"), timm_model(name))
    assert fitted.untrained == ("backbone.res6", "arm", "tcb", "odm")
    fitted.fill(nn.ModuleDict({"backbone": backbone}))
    parts = timm.create_model(name, features_only=True, out_indices=(1, 2, 3) if "convnext" in name else (2, 3, 4))
    flat = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    parts.load_state_dict({key: flat[key.replace(".", "_")] for key in parts.state_dict()})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(backbone.eval()(images), parts.eval()(images), strict=False):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(RefineDetError, match=r"x\.safetensors: looks like timm's .* is missing"):
        fit(WeightFile.of_state({}, "x.safetensors"), timm_model(name))


@pytest.mark.parametrize(("name", "message"), [("vit_tiny_patch16_224", "8, 16 and 32"), ("resnet_999", "resnet_999")])
def test_timm_models_without_such_maps_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(timm_model(name))
    assert "\n" not in str(caught.value)
