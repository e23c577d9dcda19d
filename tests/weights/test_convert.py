from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet.config import ModelConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.model.backbones import RESNETS
from refinedet.model.network import RefineDetNetwork
from refinedet.presets import PRESETS
from refinedet.weights.caffemodel import read_caffemodel
from refinedet.weights.convert import Imported, fit_backbone, import_weights
from weights import formats

pytestmark = pytest.mark.usefixtures("narrow")

VGG = PRESETS["voc07-320-vgg16"].model
CAFFE_INPUT = ("bgr", (104.0, 117.0, 123.0), (1.0, 1.0, 1.0))
Blobs = dict[str, list[np.ndarray]]


def images(seed: int = 0) -> Tensor:
    return 60 * torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(seed))


def kernels_of(layers: Mapping[str, list[np.ndarray]]) -> formats.Kernels:
    return lambda name: [torch.from_numpy(one).double() for one in layers[name]]


def kernels_from(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> formats.Kernels:
    def get(name: str) -> list[Tensor]:
        key = keys[name]
        return [state[f"{key}.{suffix}"].double() for suffix in ("weight", "bias") if f"{key}.{suffix}" in state]

    return get


def assert_same_outputs(imported: Imported, run: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """The network against the other program, whose scores have background first (ARM: object second)."""
    x = images()
    with torch.no_grad():
        ours = imported.network(x)
        arm_offsets, arm_scores, odm_offsets, odm_scores = run(x.double())
    assert odm_scores.shape[-1] == imported.config.num_classes + 1
    # Scores that are all alike, or offsets that are all nearly 0, would prove nothing.
    assert odm_scores.max() > 0.2
    assert odm_scores.std() > 0.01
    for offsets in (arm_offsets, odm_offsets):
        assert 0.05 < offsets.std() < 100
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(ours.arm_offsets, arm_offsets, **close)
    torch.testing.assert_close(ours.odm_offsets, odm_offsets, **close)
    torch.testing.assert_close(ours.arm_logits.softmax(-1), arm_scores[..., [1, 0]], **close)
    reordered = torch.cat([odm_scores[..., 1:], odm_scores[..., :1]], dim=-1)
    torch.testing.assert_close(ours.odm_logits.softmax(-1), reordered, **close)


def assert_values(imported: Imported, layers: Mapping[str, list[np.ndarray]]) -> None:
    """Every tensor of a VGG-16 detector against the layers of an official file, whose names are spelt out here."""
    own = imported.network.state_dict()
    plain = {f"backbone.features.{n}": name for n, name in zip(formats.VGG_NUMBERS, formats.VGG_NAMES, strict=True)} | {
        f"backbone.{name}": name for name in ("fc6", "fc7", "conv6_1", "conv6_2")
    }
    for level in range(4):
        plain |= {
            f"tcb.{level}.conv1": f"TL{level + 3}_1", f"tcb.{level}.conv2": f"TL{level + 3}_2",
            f"tcb.{level}.conv3": f"P{level + 3}", f"odm.{level}.offsets": f"P{level + 3}_mbox_loc",
        }  # fmt: skip
        plain[f"arm.{level}.offsets"] = f"{('conv4_3_norm', 'conv5_3_norm', 'fc7', 'conv6_2')[level]}_mbox_loc"
        if level < 3:
            plain[f"tcb.{level}.deconv"] = f"P{level + 4}-up"
    for ours, name in plain.items():
        for suffix, blob in zip(("weight", "bias"), layers[name], strict=True):
            np.testing.assert_array_equal(own.pop(f"{ours}.{suffix}").numpy(), blob, err_msg=name)
    for name in ("conv4_3_norm", "conv5_3_norm"):
        np.testing.assert_array_equal(own.pop(f"backbone.{name}.weight").numpy(), layers[name][0])
    for module, count in (("arm", 2), ("odm", imported.config.num_classes + 1)):
        for level in range(4):
            name = ("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2")[level] if module == "arm" else f"P{level + 3}"
            # Row by row: anchor k, class c of ours is class c + 1 of theirs, our last is their 0.
            rows = [k * count + (c + 1) % count for k in range(3) for c in range(count)]
            for suffix, blob in zip(("weight", "bias"), layers[f"{name}_mbox_conf"], strict=True):
                np.testing.assert_array_equal(own.pop(f"{module}.{level}.logits.{suffix}").numpy(), blob[rows])
    assert not own, f"not looked at: {list(own)}"


def write(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


# Official VGG-16 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caffe_vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Blobs]:
    layers = formats.caffe_vgg_layers(20)
    path = tmp_path_factory.mktemp("caffe") / "VGG_VOC0712_refinedet_vgg16_320x320_iter_120000.caffemodel"
    return formats.write_caffemodel(path, layers), layers


def test_official_vgg16(caffe_vgg: tuple[Path, Blobs]) -> None:
    path, layers = caffe_vgg
    imported = import_weights(path, VGG)
    config = imported.config
    assert "official RefineDet with VGG-16" in imported.title
    assert imported.untrained == ()
    assert (config.channel_order, config.mean, config.std) == CAFFE_INPUT
    assert (config.num_classes, config.tcb_channels, config.fc6_dilation, config.tcb_deconv_kernel) == (
        20,
        formats.TCB,
        3,
        2,
    )
    inference = config.inference
    assert (inference.candidates, inference.candidates_per, inference.max_detections) == (1000, "class", 500)
    assert config.image_size == (320, 320)
    assert not imported.network.training
    assert_values(imported, layers)
    assert_same_outputs(imported, lambda x: formats.run_vgg(x, kernels_of(layers)))


def test_official_vgg16_for_coco_at_512_in_the_old_format(tmp_path: Path) -> None:
    layers = formats.caffe_vgg_layers(80)
    path = formats.write_caffemodel(tmp_path / "coco.caffemodel", layers, v1=True, legacy=True, packed=False)
    imported = import_weights(path, PRESETS["coco-512-vgg16"].model)
    assert imported.config.num_classes == 80
    assert imported.config.image_size == (512, 512)
    assert_values(imported, layers)
    assert_same_outputs(imported, lambda x: formats.run_vgg(x, kernels_of(layers)))


def test_one_class(tmp_path: Path) -> None:
    layers = formats.caffe_vgg_layers(1)
    imported = import_weights(formats.write_caffemodel(tmp_path / "a.caffemodel", layers), VGG)
    assert imported.config.num_classes == 1
    assert_values(imported, layers)


def test_a_dilation_that_the_file_states_is_taken(tmp_path: Path) -> None:
    layers = formats.caffe_vgg_layers(2)
    path = tmp_path / "dilated.caffemodel"
    path.write_bytes(formats.caffemodel(layers, dilations={"fc6": 6}))
    imported = import_weights(path, VGG)
    assert imported.config.fc6_dilation == 6
    assert_same_outputs(imported, lambda x: formats.run_vgg(x, kernels_of(layers), fc6_dilation=6))


def test_channel_order_can_be_overruled(caffe_vgg: tuple[Path, Blobs]) -> None:
    config = import_weights(caffe_vgg[0], VGG, channel_order="rgb").config
    assert (config.channel_order, config.mean, config.std) == ("rgb", (123.0, 117.0, 104.0), (1.0, 1.0, 1.0))
    assert import_weights(caffe_vgg[0], VGG, channel_order="bgr").config.mean == (104.0, 117.0, 123.0)


@pytest.mark.parametrize("form", [{}, {"packed": False}, {"legacy": True}, {"double": True}, {"v1": True}])
def test_every_form_of_blobs_reads_alike(tmp_path: Path, form: dict[str, bool]) -> None:
    layers = {"a": [formats.numbers("a", (4, 3, 2, 5)), formats.numbers("b", (4,))], "c": [np.float32([[7.5]])]}
    blobs = read_caffemodel(formats.write_caffemodel(tmp_path / "a.caffemodel", layers, **form)).blobs
    assert list(blobs) == ["a[0]", "a[1]", "c[0]"]
    np.testing.assert_array_equal(blobs["a[0]"].numpy(), layers["a"][0])
    np.testing.assert_array_equal(blobs["a[1]"].numpy(), layers["a"][1])
    assert blobs["c[0]"].flatten().tolist() == [7.5]


# Ports ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_luuuyi(tmp_path: Path, zipped: bool) -> None:
    state = formats.luuuyi_state(20)
    assert len(state) == 98
    path = write(tmp_path / "RefineDet320_VOC_final.pth", state, _use_new_zipfile_serialization=zipped)
    imported = import_weights(path, VGG)
    config = imported.config
    assert "luuuyi" in imported.title
    assert (config.channel_order, config.mean, config.std) == ("rgb", (123.0, 117.0, 104.0), (1.0, 1.0, 1.0))
    assert (config.num_classes, config.fc6_dilation, config.tcb_deconv_kernel) == (20, 3, 2)
    assert config.inference.candidates_per == "class"
    assert_values(imported, formats.caffe_vgg_layers(20))
    if zipped:
        kernels = kernels_from(state, formats.LUUUYI_KEYS)
        assert_same_outputs(imported, lambda x: formats.run_vgg(x, kernels))


def test_luuuyi_inside_a_checkpoint_of_data_parallel(tmp_path: Path) -> None:
    state = {f"module.{key}": value.double() for key, value in formats.luuuyi_state(3).items()}
    imported = import_weights(write(tmp_path / "a.pth", {"epoch": 3, "state_dict": state}), VGG)
    assert imported.config.num_classes == 3
    assert_values(imported, formats.caffe_vgg_layers(3))


def test_luuuyi_as_safetensors(tmp_path: Path) -> None:
    save_file(formats.luuuyi_state(2), tmp_path / "a.safetensors")
    assert_values(import_weights(tmp_path / "a.safetensors", VGG), formats.caffe_vgg_layers(2))


def test_dd604(tmp_path: Path) -> None:
    state = formats.dd604_state(20)
    imported = import_weights(write(tmp_path / "refinedet320.pth", state), VGG)
    config = imported.config
    assert "dd604" in imported.title
    assert (config.channel_order, config.mean, config.std) == CAFFE_INPUT
    assert (config.num_classes, config.fc6_dilation, config.tcb_deconv_kernel) == (20, 6, 3)
    layers = formats.caffe_vgg_layers(20)
    for name in ("P4-up", "P5-up", "P6-up"):
        layers[name][0] = formats.numbers(f"{name}/3x3", (formats.TCB, formats.TCB, 3, 3))
    assert_values(imported, layers)
    keys = {
        **{n: k.replace("vgg.", "base.") for n, k in formats.LUUUYI_KEYS.items()},
        "conv6_1": "extra.0", "conv6_2": "extra.2",
        "conv4_3_norm": "L2Norm_conv4_3", "conv5_3_norm": "L2Norm_conv5_3",
        "TL6_1": "pyramid_layer4.0", "TL6_2": "pyramid_layer4.2", "P6": "pyramid_layer4.4",
    }  # fmt: skip
    for n in (1, 2, 3):
        keys |= {f"TL{n + 2}_{i}": f"pyramid_layer{n}.conv{i}" for i in (1, 2)}
        keys |= {f"P{n + 2}": f"pyramid_layer{n}.conv3", f"P{n + 3}-up": f"pyramid_layer{n}.deconv"}
    run = kernels_from(state, keys)
    assert_same_outputs(imported, lambda x: formats.run_vgg(x, run, fc6_dilation=6, deconv_padding=(1, 1)))


def test_dd604_tensors_that_should_be_one_are_compared(tmp_path: Path) -> None:
    state = formats.dd604_state(2)
    state["layer2.3.weight"] = state["layer2.3.weight"] + 1
    with pytest.raises(RefineDetError, match=r"'base\.26\.weight' and 'layer2\.3\.weight' should be one tensor"):
        import_weights(write(tmp_path / "a.pth", state), VGG)


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_every_deconvolution_doubles_the_sides(kernel: int) -> None:
    config = dataclasses.replace(PRESETS["smoke"].model, tcb_channels=8, tcb_batch_norm=False, tcb_deconv_kernel=kernel)
    network = RefineDetNetwork(config).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 128)).odm_offsets.shape == (1, 3 * 2 * 85, 4)
    assert network.tcb[0].deconv.weight.shape[-1] == kernel  # type: ignore[union-attr]


# ImageNet ------------------------------------------------------------------------------------------------------------


def caffe_vgg_maps(imported: Imported, kernels: formats.Kernels) -> None:
    """The backbone's first three maps against the file's; the norms' scales are ours (10 and 8)."""
    own = imported.network.state_dict()

    def get(name: str) -> list[Tensor]:
        if name in ("conv4_3_norm", "conv5_3_norm"):
            return [torch.full((64,), 10.0 if name == "conv4_3_norm" else 8.0).double()]
        if name in ("conv6_1", "conv6_2"):
            return [own[f"backbone.{name}.{suffix}"].double() for suffix in ("weight", "bias")]
        return kernels(name)

    x = images()
    with torch.no_grad():
        ours, theirs = imported.network.backbone(x), formats.vgg_maps(x.double(), get)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.std()), check_dtype=False)


@pytest.mark.parametrize("v1", [False, True])
def test_caffe_vgg16_fc_reduced(tmp_path: Path, v1: bool) -> None:
    layers = formats.caffe_backbone_layers()
    path = tmp_path / "VGG_ILSVRC_16_layers_fc_reduced.caffemodel"
    formats.write_caffemodel(path, layers, v1=v1, legacy=v1)
    imported = import_weights(path, VGG)
    assert (imported.config.channel_order, imported.config.mean, imported.config.std) == CAFFE_INPUT
    assert imported.config.inference == VGG.inference
    assert imported.config.num_classes == 20
    assert imported.untrained == (
        "backbone.conv6_1", "backbone.conv6_2", "backbone.conv4_3_norm", "backbone.conv5_3_norm", "arm", "tcb", "odm",
    )  # fmt: skip
    caffe_vgg_maps(imported, kernels_of(layers))


def test_vgg16_reducedfc(tmp_path: Path) -> None:
    layers = formats.caffe_backbone_layers()
    keys = {name: str(n) for name, n in zip(formats.VGG_NAMES, formats.VGG_NUMBERS, strict=True)}
    keys |= {"fc6": "31", "fc7": "33"}
    state = {
        f"{keys[name]}.{suffix}": torch.from_numpy(one)
        for name, blobs in layers.items()
        for suffix, one in zip(("weight", "bias"), blobs, strict=True)
    }
    path = write(tmp_path / "vgg16_reducedfc.pth", state, _use_new_zipfile_serialization=False)
    imported = import_weights(path, VGG)
    assert "vgg16_reducedfc" in imported.title
    assert (imported.config.channel_order, imported.config.mean, imported.config.std) == CAFFE_INPUT
    caffe_vgg_maps(imported, kernels_from(state, keys))


@pytest.mark.parametrize("source", ["torchvision", "timm", "features"])
def test_imagenet_vgg16_of_torchvision_and_timm(tmp_path: Path, source: str) -> None:
    layers = formats.caffe_backbone_layers()
    state = {
        f"features.{n}.{suffix}": torch.from_numpy(one)
        for n, name in zip(formats.VGG_NUMBERS, formats.VGG_NAMES, strict=True)
        for suffix, one in zip(("weight", "bias"), layers[name], strict=True)
    }
    full = {
        "fc6": torch.from_numpy(formats.numbers("full6", (512, 64 * 49))),
        "fc7": torch.from_numpy(formats.numbers("full7", (512, 512))),
    }
    first, second = (
        ("classifier.0", "classifier.3") if source == "torchvision" else ("pre_logits.fc1", "pre_logits.fc2")
    )
    if source != "features":
        last = "classifier.6" if source == "torchvision" else "head.fc"
        timm = source == "timm"
        state |= {
            f"{first}.weight": full["fc6"].reshape(512, 64, 7, 7) if timm else full["fc6"],
            f"{first}.bias": torch.arange(512.0),
            f"{second}.weight": full["fc7"][:, :, None, None] if timm else full["fc7"],
            f"{second}.bias": -torch.arange(512.0),
            f"{last}.weight": torch.zeros(1000, 512),
            f"{last}.bias": torch.zeros(1000),
        }
    path = tmp_path / "vgg16.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    imported = import_weights(path, VGG)
    assert (imported.config.channel_order, imported.config.mean) == ("rgb", (123.675, 116.28, 103.53))
    own = imported.network.state_dict()
    for key, value in state.items():
        if key.startswith("features"):
            assert torch.equal(own[f"backbone.{key}"], value)
    assert ("backbone.fc6" in imported.untrained) == (source == "features")
    if source != "features":
        kernel = full["fc6"].reshape(512, 64, 7, 7)
        for output, channel, row, column in ((0, 0, 0, 0), (5, 7, 1, 2), (127, 63, 2, 2)):
            expected = kernel[4 * output, channel, 3 * row, 3 * column]
            assert own["backbone.fc6.weight"][output, channel, row, column] == expected
        assert torch.equal(own["backbone.fc6.bias"], torch.arange(0.0, 512, 4))
        assert own["backbone.fc7.weight"][3, 9, 0, 0] == full["fc7"][12, 36]
        assert torch.equal(own["backbone.fc7.bias"], -torch.arange(0.0, 512, 4))


@pytest.mark.parametrize(("name", "timm"), [("resnet18", False), ("resnet50", True), ("resnet101", False)])
def test_imagenet_resnets_of_torchvision_and_timm(tmp_path: Path, name: str, timm: bool) -> None:
    torch.manual_seed(1)
    body = RESNETS[name].build(weights=None).eval()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, std=0.1)
    state = body.state_dict()
    if timm:  # the same names, as safetensors
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    else:
        path = write(tmp_path / f"{name}.pth", state)
    config = dataclasses.replace(ModelConfig(), backbone=name, tcb_batch_norm=True)
    imported = import_weights(path, config)
    assert (imported.config.channel_order, imported.config.mean) == ("rgb", (123.675, 116.28, 103.53))
    assert imported.untrained == ("backbone.res6", "arm", "tcb", "odm")
    own = imported.network.state_dict()
    for key, value in state.items():
        if not key.startswith("fc.") and "num_batches" not in key:
            assert torch.equal(own[f"backbone.{key}"], value), key
    x = images() / 60
    with torch.no_grad():
        body.double()
        y = body.layer1(F.max_pool2d(F.relu(body.bn1(body.conv1(x.double()))), 3, 2, 1))
        for ours, layer in zip(imported.network.backbone(x), (body.layer2, body.layer3, body.layer4), strict=False):
            y = layer(y)
            torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4 * float(y.std()), check_dtype=False)


def test_frozen_norms_are_filled(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    config = dataclasses.replace(ModelConfig(), backbone="resnet18", backbone_norm="frozen", tcb_channels=16)
    imported = import_weights(write(tmp_path / "a.pth", state), config)
    assert torch.equal(imported.network.state_dict()["backbone.bn1.weight"], state["bn1.weight"])


RESNET = PRESETS["coco-320-resnet101"].model


def assert_normed(own: dict[str, Tensor], ours: str, norm: str, keys: tuple[str, str, str], layers: Blobs) -> None:
    convolution, statistics, scale = (layers[key] for key in keys)
    np.testing.assert_array_equal(own[f"{ours}.weight"].numpy(), convolution[0])
    assert statistics[2].item() == 3.5
    for name, blob in (("running_mean", statistics[0]), ("running_var", statistics[1])):
        np.testing.assert_allclose(own[f"{norm}.{name}"].numpy(), blob / np.float32(3.5), rtol=1e-6)
    np.testing.assert_array_equal(own[f"{norm}.weight"].numpy(), scale[0])
    np.testing.assert_array_equal(own[f"{norm}.bias"].numpy(), scale[1])


def test_caffe_resnet101_of_imagenet(tmp_path: Path) -> None:
    layers = formats.kaiming_layers()
    path = formats.write_caffemodel(tmp_path / "ResNet-101-model.caffemodel", layers)
    imported = import_weights(path, RESNET)
    assert (imported.config.channel_order, imported.config.mean, imported.config.std) == CAFFE_INPUT
    assert imported.untrained == ("backbone.res6", "arm", "tcb", "odm")
    own = imported.network.state_dict()
    assert_normed(own, "backbone.conv1", "backbone.bn1", ("conv1", "bn_conv1", "scale_conv1"), layers)
    for ours, norm, name in (
        ("layer1.0.downsample.0", "layer1.0.downsample.1", "2a_branch1"),
        ("layer1.2.conv2", "layer1.2.bn2", "2c_branch2b"),
        ("layer2.3.conv1", "layer2.3.bn1", "3b3_branch2a"),
        ("layer3.22.conv3", "layer3.22.bn3", "4b22_branch2c"),
        ("layer4.0.downsample.0", "layer4.0.downsample.1", "5a_branch1"),
    ):
        keys = (f"res{name}", f"bn{name}", f"scale{name}")
        assert_normed(own, f"backbone.{ours}", f"backbone.{norm}", keys, layers)
    x = images()
    with torch.no_grad():
        maps = formats.resnet_maps(x.double(), kernels_of(layers))
        for one, other in zip(imported.network.backbone(x), maps, strict=False):
            assert 1e-3 < other.std() < 1e4
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.std()), check_dtype=False)


def test_official_resnet101(tmp_path: Path) -> None:
    classes = 7
    layers = formats.caffe_resnet_layers(classes)
    path = formats.write_caffemodel(tmp_path / "coco_refinedet_resnet101_320x320.caffemodel", layers)
    imported = import_weights(path, RESNET)
    assert imported.untrained == ()
    assert imported.config.num_classes == classes
    assert (imported.config.channel_order, imported.config.mean, imported.config.std) == CAFFE_INPUT
    own = imported.network.state_dict()
    for ours, norm, keys in (
        ("backbone.res6.branch2b", "backbone.res6.branch2b_bn", [f"{k}6_branch2b" for k in ("res", "bn", "scale")]),
        ("tcb.0.deconv", "tcb.0.deconv_norm", ["P4-up", "P4-up_bn", "P4-up_scale"]),
        ("tcb.3.conv2", "tcb.3.norm2", ["TL6_2", "TL6_2_bn", "TL6_2_scale"]),
        ("tcb.2.conv3", "tcb.2.norm3", ["P5", "P5_bn", "P5_scale"]),
        (
            "arm.1.block.branch1", "arm.1.block.branch1_bn",
            [f"{kind}res4b22_relu_inter_branch1" for kind in ("res", "bn", "scale")],
        ),
        (
            "odm.3.block.branch2c", "odm.3.block.branch2c_bn",
            [f"{kind}P6_inter_branch2c" for kind in ("res", "bn", "scale")],
        ),
    ):  # fmt: skip
        assert_normed(own, ours, norm, tuple(keys), layers)  # type: ignore[arg-type]
    rows = [k * 8 + (c + 1) % 8 for k in range(3) for c in range(8)]
    np.testing.assert_array_equal(own["odm.1.logits.weight"].numpy(), layers["resP4_inter_mbox_conf"][0][rows])
    np.testing.assert_array_equal(own["arm.2.offsets.bias"].numpy(), layers["resres5c_relu_inter_mbox_loc"][1])
    assert_same_outputs(imported, lambda x: formats.run_resnet(x, kernels_of(layers)))


# Refusals ------------------------------------------------------------------------------------------------------------


def refusal(path: Path, config: ModelConfig = VGG) -> str:
    with pytest.raises(RefineDetError) as caught:
        import_weights(path, config)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_first_missing_and_first_unexpected_key_are_named(tmp_path: Path) -> None:
    # Keys are looked at first, so the tensors themselves may be anything.
    layers = {name: [one.ravel()[:2] for one in blobs] for name, blobs in formats.caffe_vgg_layers(2).items()}
    del layers["TL4_2"], layers["P5"]
    layers |= {"fc8": [np.zeros(3, np.float32)], "fc9": [np.zeros(3, np.float32)]}
    message = refusal(formats.write_caffemodel(tmp_path / "a.caffemodel", layers))
    assert "'TL4_2[0]' is missing, 'fc8[0]' is unexpected (4 missing, 2 unexpected)" in message
    state = {key: value.flatten()[:2].clone() for key, value in formats.luuuyi_state(2).items()}
    state["odm_extra.weight"] = state.pop("vgg.12.bias")
    message = refusal(write(tmp_path / "a.pth", state))
    assert "'vgg.12.bias' is missing, 'odm_extra.weight' is unexpected (1 missing, 1 unexpected)" in message


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    state = formats.luuuyi_state(2)
    state["tcb0.6.weight"] = state["tcb0.6.weight"][:, :64]
    message = refusal(write(tmp_path / "a.pth", state))
    assert "'tcb0.6.weight' has shape (32, 64, 3, 3), the network needs (32, 128, 3, 3)" in message
    state["arm_loc.0.weight"] = torch.zeros(24, 64, 3, 3)
    assert "24 outputs; models with 3 anchors" in refusal(write(tmp_path / "six.pth", state))
    state["arm_loc.0.weight"] = torch.zeros(12, 64, 3, 3)
    state["odm_conf.0.weight"] = torch.zeros(8, 32, 3, 3)
    assert "no number of classes" in refusal(write(tmp_path / "odd.pth", state))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = formats.luuuyi_state(2)
    state["vgg.5.bias"] = state["vgg.5.bias"].clone()
    state["vgg.5.bias"][7] = float("nan")
    assert "'vgg.5.bias' holds numbers that are not finite" in refusal(write(tmp_path / "a.pth", state))


def test_unknown_weights(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.pth", {"encoder.weight": torch.zeros(2)}))
    assert "no known format" in message
    assert "'encoder.weight'" in message
    bn = {f"features.{i}.{n}": torch.zeros(1) for i in range(40) for n in ("weight", "bias", "running_mean")}
    assert "no known format" in refusal(write(tmp_path / "bn.pth", bn))


def test_another_backbone_than_the_presets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", torchvision.models.resnet18(weights=None).state_dict())
    with pytest.raises(UsageError, match="has the backbone resnet18; the preset has vgg16"):
        import_weights(path, VGG)


def test_every_cut_of_a_caffemodel_is_one_line(tmp_path: Path) -> None:
    layers = {name: [one.ravel()[:5] for one in blobs] for name, blobs in formats.caffe_vgg_layers(2).items()}
    data = formats.caffemodel(layers)
    path = tmp_path / "cut.caffemodel"
    for size in (*range(60), *range(60, len(data), 97), len(data) - 1):
        path.write_bytes(data[:size])
        message = refusal(path)
        assert any(word in message for word in ("cut", "missing", "empty", "no layer", "no known format")), message


def test_files_of_other_kinds_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {
        b'name: "RefineDet"\nlayer {\n  name: "data"\n}\n': "not a readable .caffemodel",
        b"just words, and more of them\n" * 40: "not a readable .caffemodel",
        bytes(range(256)) * 30: "not a readable .caffemodel",
        b"\x89HDF\r\n\x1a\n" + bytes(60): "HDF5",
        b"PK\x03\x04" + bytes(60): "cut, corrupt, or a pickled object",
        formats.field(100, formats.field(1, b"relu")): "no layer with weights",
        (5000).to_bytes(8, "little") + b'{"a": {"dtype"': "safetensors",
    }
    for content, words in contents.items():
        path.write_bytes(content)
        assert words in refusal(path), content[:20]
    assert "cannot be read" in refusal(tmp_path / "nothing")
    two = {"a": [np.zeros((2, 2), np.float32)]}
    path.write_bytes(formats.caffemodel(two) + formats.caffemodel(two))
    assert "two layers with weights are called 'a'" in refusal(path)
    path.write_bytes(formats.field(100, formats.field(1, b"a") + formats.field(7, b"\x08\x02\x10\x03\x18\x01\x20\x01")))
    assert "'a[0]' says it has shape (2, 3, 1, 1) but holds 0 numbers" in refusal(path)


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy", "inside"])
def test_pickled_objects_are_never_run(tmp_path: Path, form: str) -> None:
    path, mark = tmp_path / "a.pth", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(mark)))
    elif form == "inside":
        write(path, {"vgg.0.weight": torch.zeros(2), "extra": Trap(mark)})
    else:
        write(path, Trap(mark), _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert "pickled object, which is never run" in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work"


def test_content_that_is_no_state_dict(tmp_path: Path) -> None:
    assert "no state dict" in refusal(write(tmp_path / "a.pth", [1, 2]))
    assert "'epoch' is no tensor" in refusal(write(tmp_path / "b.pth", {"epoch": 1}))
    assert "no state dict" in refusal(write(tmp_path / "c.pth", {}))


# Training from a file, and converting it ------------------------------------------------------------------------------


def resnet18_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(torchvision.models.resnet18(weights=None).state_dict())


@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "pytorch_model.bin", "a.safetensors"])
@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
def test_a_training_starts_from_the_network_that_convert_makes(tmp_path: Path, name: str, inside: str | None) -> None:
    state, path = resnet18_state(), tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        write(path, state if inside is None else {"epoch": 90, inside: state})
    config = ModelConfig(
        backbone="resnet18", tcb_channels=4, tcb_batch_norm=True, mean=(1.0, 2.0, 3.0), channel_order="bgr"
    )
    imported = import_weights(path, config)
    fitted = fit_backbone(config, path)
    assert fitted is not None
    assert fitted.config == imported.config
    assert (fitted.config.channel_order, fitted.config.mean) == ("rgb", (123.675, 116.28, 103.53))
    network = RefineDetNetwork(fitted.config)
    fitted.fill(network)
    for key, tensor in network.backbone.state_dict().items():
        if not key.startswith("res6."):
            assert torch.equal(tensor, imported.network.backbone.state_dict()[key])


def test_what_a_training_can_start_from(tmp_path: Path) -> None:
    assert fit_backbone(VGG, "random") is None
    with pytest.raises(UsageError, match=r"a whole detector: make a model of it with refinedet convert, .* --init"):
        fit_backbone(VGG, write(tmp_path / "a.pth", formats.luuuyi_state(2)))
    with pytest.raises(UsageError, match="has the backbone resnet18; the preset has vgg16"):
        fit_backbone(VGG, write(tmp_path / "b.pth", resnet18_state()))


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("odm_conf.0.weight", torch.tensor(1.0)),
        ("tcb1.0.weight", torch.tensor(1.0)),
        ("tcb1.0.weight", torch.zeros(7, 7, 9, 9)),
        ("arm_loc.0.weight", torch.zeros(12)),
        ("vgg.31.weight", torch.zeros(4, 4)),
        ("vgg.33.bias", torch.zeros(0)),
        ("conv4_3_L2Norm.weight", torch.tensor(1.0)),
        ("odm_conf.1.bias", torch.zeros(9, 9, 9)),
    ],
)
def test_odd_shapes_end_in_one_line(tmp_path: Path, key: str, tensor: Tensor) -> None:
    state = {name: value[:1, :1] if value.ndim > 1 else value[:1] for name, value in formats.luuuyi_state(2).items()}
    for name in ("arm_loc.0.weight", "odm_conf.0.weight", "tcb1.0.weight"):
        state[name] = formats.luuuyi_state(2)[name]
    state[key] = tensor
    refusal(write(tmp_path / "a.pth", state))
