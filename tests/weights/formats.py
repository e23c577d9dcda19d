"""Weight files of other programs, made of numbers that follow from the keys, and how those programs would run them.

Nothing here uses the package: names, order and wire format are written down once more, from the formats themselves.
Widths are an eighth of the real ones, so that dozens of networks can be made; ``tests/weights/conftest.py`` makes those
of the package as narrow.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Arrays = dict[str, np.ndarray]


# Numbers -------------------------------------------------------------------------------------------------------------


@cache
def numbers(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 numbers that depend on the key only, not to be changed; kernels keep the size of their input."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    scale = (2.0 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float32)


NARROW = 8
VGG_WIDTHS = {"1": (8, 8), "2": (16, 16), "3": (32,) * 3, "4": (64,) * 3, "5": (64,) * 3}
FC, TCB, CONV6_1, CONV6_2 = 128, 32, 32, 64
VGG_NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_NAMES = tuple(f"conv{block}_{i + 1}" for block, widths in VGG_WIDTHS.items() for i in range(len(widths)))
MAP_WIDTHS = (64, 64, FC, CONV6_2)


def vgg_convolutions() -> dict[str, tuple[int, ...]]:
    """Kernel shapes of conv1_1 to conv5_3, fc6 and fc7 by Caffe's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for block, widths in VGG_WIDTHS.items():
        for i, width in enumerate(widths):
            shapes[f"conv{block}_{i + 1}"] = (width, channels, 3, 3)
            channels = width
    return shapes | {"fc6": (FC, 64, 3, 3), "fc7": (FC, FC, 1, 1)}


def caffe_vgg_layers(classes: int = 20, anchors: int = 3) -> dict[str, list[np.ndarray]]:
    """Blobs of an official VGG-16 model by layer name."""
    shapes = vgg_convolutions() | {"conv6_1": (CONV6_1, FC, 1, 1), "conv6_2": (CONV6_2, CONV6_1, 3, 3)}
    for name, width in zip(("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"), MAP_WIDTHS, strict=True):
        shapes[f"{name}_mbox_loc"] = (4 * anchors, width, 3, 3)
        shapes[f"{name}_mbox_conf"] = (2 * anchors, width, 3, 3)
    for level, width in zip((3, 4, 5, 6), MAP_WIDTHS, strict=True):
        shapes |= {f"TL{level}_1": (TCB, width, 3, 3), f"TL{level}_2": (TCB, TCB, 3, 3), f"P{level}": (TCB, TCB, 3, 3)}
        shapes[f"P{level}_mbox_loc"] = (4 * anchors, TCB, 3, 3)
        shapes[f"P{level}_mbox_conf"] = ((classes + 1) * anchors, TCB, 3, 3)
        if level > 3:
            shapes[f"P{level}-up"] = (TCB, TCB, 2, 2)
    layers = {}
    for name, shape in shapes.items():
        outputs = shape[1] if name.endswith("-up") else shape[0]
        layers[name] = [numbers(f"{name}/0", shape), numbers(f"{name}/1", (outputs,))]
    for name, scale in (("conv4_3_norm", 10), ("conv5_3_norm", 8)):
        layers[name] = [scale + numbers(f"{name}/0", (64,))]
    return layers


LUUUYI_KEYS = {
    **{name: f"vgg.{number}" for name, number in zip(VGG_NAMES, VGG_NUMBERS, strict=True)},
    "fc6": "vgg.31", "fc7": "vgg.33", "conv6_1": "extras.0", "conv6_2": "extras.1",
    "conv4_3_norm": "conv4_3_L2Norm", "conv5_3_norm": "conv5_3_L2Norm",
    **{f"{n}_mbox_{p}": f"arm_{p}.{i}" for i, n in enumerate(("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"))
       for p in ("loc", "conf")},
    **{f"P{i + 3}_mbox_{p}": f"odm_{p}.{i}" for i in range(4) for p in ("loc", "conf")},
    "TL3_1": "tcb0.0", "TL4_1": "tcb0.3", "TL5_1": "tcb0.6", "TL6_1": "tcb0.9",
    "TL3_2": "tcb0.2", "TL4_2": "tcb0.5", "TL5_2": "tcb0.8", "TL6_2": "tcb0.11",
    "P4-up": "tcb1.0", "P5-up": "tcb1.1", "P6-up": "tcb1.2",
    "P3": "tcb2.1", "P4": "tcb2.4", "P5": "tcb2.7", "P6": "tcb2.10",
}  # fmt: skip
"""Caffe's layer names to luuuyi's keys: the table of the reference."""


def luuuyi_state(classes: int = 20) -> dict[str, Tensor]:
    """A state dict of the luuuyi port."""
    state = {}
    for name, blobs in caffe_vgg_layers(classes).items():
        for blob, suffix in zip(blobs, ("weight", "bias"), strict=False):
            state[f"{LUUUYI_KEYS[name]}.{suffix}"] = torch.from_numpy(blob)
    return state


def dd604_state(classes: int = 20) -> dict[str, Tensor]:
    """A state dict of the dd604 port, backbone stored twice, deconvolutions 3x3."""
    keys = {name: f"base.{number}" for name, number in zip(VGG_NAMES, VGG_NUMBERS, strict=True)}
    keys |= {"fc6": "base.31", "fc7": "base.33", "conv6_1": "extra.0", "conv6_2": "extra.2"}
    keys |= {"conv4_3_norm": "L2Norm_conv4_3", "conv5_3_norm": "L2Norm_conv5_3"}
    keys |= {name: key for name, key in LUUUYI_KEYS.items() if "_mbox_" in name}
    for level in (3, 4, 5):
        block = f"pyramid_layer{level - 2}"
        keys |= {f"TL{level}_1": f"{block}.conv1", f"TL{level}_2": f"{block}.conv2", f"P{level}": f"{block}.conv3"}
        keys[f"P{level + 1}-up"] = f"{block}.deconv"
    keys |= {"TL6_1": "pyramid_layer4.0", "TL6_2": "pyramid_layer4.2", "P6": "pyramid_layer4.4"}
    layers = caffe_vgg_layers(classes)
    for name in ("P4-up", "P5-up", "P6-up"):
        layers[name][0] = numbers(f"{name}/3x3", (TCB, TCB, 3, 3))
    state = {}
    for name, blobs in layers.items():
        for blob, suffix in zip(blobs, ("weight", "bias"), strict=False):
            state[f"{keys[name]}.{suffix}"] = torch.from_numpy(blob)
    twice = {f"base.{n}": f"layer1.{n}" for n in VGG_NUMBERS[:10]}
    twice |= {f"base.{n}": f"layer2.{m}" for n, m in ((24, 1), (26, 3), (28, 5))}
    twice |= {"base.31": "layer3.1", "base.33": "layer3.3", "extra.0": "layer4.0", "extra.2": "layer4.2"}
    for first, second in twice.items():
        for suffix in ("weight", "bias"):
            state[f"{second}.{suffix}"] = state[f"{first}.{suffix}"]
    return state


def caffe_backbone_layers() -> dict[str, list[np.ndarray]]:
    """Blobs of VGG_ILSVRC_16_layers_fc_reduced."""
    return {n: [numbers(f"{n}/0", s), numbers(f"{n}/1", s[:1])] for n, s in vgg_convolutions().items()}


# The wire format -----------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def blob(array: np.ndarray, *, packed: bool = True, legacy: bool = False, double: bool = False) -> bytes:
    """A BlobProto. Legacy: num, channels, height, width instead of a shape."""
    if legacy:
        sides = (1,) * (4 - array.ndim) + array.shape
        head = b"".join(varint(number << 3) + varint(side) for number, side in enumerate(sides, start=1))
    else:
        head = field(7, field(1, b"".join(varint(side) for side in array.shape)))
    if double:
        return head + field(8, array.astype("<f8").tobytes())
    flat = array.astype("<f4").ravel()
    if packed:
        return head + field(5, flat.tobytes())
    tagged = np.empty(flat.size, dtype=[("tag", "u1"), ("value", "<f4")])
    tagged["tag"], tagged["value"] = 5 << 3 | 5, flat
    return head + tagged.tobytes()


def caffemodel(
    layers: Mapping[str, list[np.ndarray]],
    *,
    v1: bool = False,
    packed: bool = True,
    legacy: bool = False,
    double: bool = False,
    dilations: Mapping[str, int] | None = None,
) -> bytes:
    """A NetParameter with layers between which stand some without weights, as in files that Caffe writes."""
    parts = [field(1, b"net")]
    if v1:
        parts.append(field(2, field(4, b"data") + varint(5 << 3) + varint(5) + field(3, b"data")))
    else:
        parts.append(field(100, field(1, b"data") + field(2, b"AnnotatedData") + field(4, b"data")))
    for name, blobs in layers.items():
        encoded = [blob(one, packed=packed, legacy=legacy, double=double) for one in blobs]
        if v1:
            body = field(2, b"x") + field(3, b"y") + field(4, name.encode()) + varint(5 << 3) + varint(4)
            parts.append(field(2, body + b"".join(field(6, one) for one in encoded)))
            continue
        body = field(1, name.encode()) + field(2, b"Convolution") + b"".join(field(7, one) for one in encoded)
        if dilations and name in dilations:
            # num_output, pad, dilation
            body += field(106, varint(1 << 3) + varint(64) + varint(18 << 3) + varint(dilations[name]))
        parts.append(field(100, body))
        parts.append(field(100, field(1, f"relu_{name}".encode()) + field(2, b"ReLU")))
    return b"".join(parts)


def write_caffemodel(path: Path, layers: Mapping[str, list[np.ndarray]], **form: bool) -> Path:
    path.write_bytes(caffemodel(layers, **form))  # type: ignore[arg-type]
    return path


# How the other programs run them -------------------------------------------------------------------------------------

Kernels = Callable[[str], list[Tensor]]


def l2norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt() * scale[None, :, None, None]


def vgg_maps(x: Tensor, w: Kernels, fc6_dilation: int = 3) -> list[Tensor]:
    """conv4_3 (normalised), conv5_3 (normalised), fc7, conv6_2."""
    maps = []
    for block, widths in VGG_WIDTHS.items():
        for i in range(len(widths)):
            x = F.relu(F.conv2d(x, *w(f"conv{block}_{i + 1}"), padding=1))
        if block in "45":
            maps.append(l2norm(x, w(f"conv{block}_3_norm")[0]))
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    x = F.relu(F.conv2d(x, *w("fc6"), padding=fc6_dilation, dilation=fc6_dilation))
    x = F.relu(F.conv2d(x, *w("fc7")))
    maps.append(x)
    x = F.relu(F.conv2d(x, *w("conv6_1")))
    maps.append(F.relu(F.conv2d(x, *w("conv6_2"), stride=2, padding=1)))
    return maps


def flat(x: Tensor, per_anchor: int) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, per_anchor)


def run_vgg(
    x: Tensor, w: Kernels, *, fc6_dilation: int = 3, deconv_padding: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ARM offsets and scores, ODM offsets and scores; background first in both scores, as the program has it."""
    maps = vgg_maps(x, w, fc6_dilation)
    classes = w("P3_mbox_conf")[0].shape[0] // 3
    arm_loc, arm_conf, odm_loc, odm_conf = [], [], [], []
    above: Tensor | None = None
    names = ("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2")
    for level in (6, 5, 4, 3):
        name, source = names[level - 3], maps[level - 3]
        arm_loc.insert(0, flat(F.conv2d(source, *w(f"{name}_mbox_loc"), padding=1), 4))
        arm_conf.insert(0, flat(F.conv2d(source, *w(f"{name}_mbox_conf"), padding=1), 2))
        y = F.relu(F.conv2d(source, *w(f"TL{level}_1"), padding=1))
        y = F.conv2d(y, *w(f"TL{level}_2"), padding=1)
        if above is not None:
            padding, extra = deconv_padding
            y = y + F.conv_transpose2d(above, *w(f"P{level + 1}-up"), stride=2, padding=padding, output_padding=extra)
        above = F.relu(F.conv2d(F.relu(y), *w(f"P{level}"), padding=1))
        odm_loc.insert(0, flat(F.conv2d(above, *w(f"P{level}_mbox_loc"), padding=1), 4))
        odm_conf.insert(0, flat(F.conv2d(above, *w(f"P{level}_mbox_conf"), padding=1), classes))
    return (
        torch.cat(arm_loc, 1), torch.cat(arm_conf, 1).softmax(-1), torch.cat(odm_loc, 1),
        torch.cat(odm_conf, 1).softmax(-1),
    )  # fmt: skip


# ResNet-101 ----------------------------------------------------------------------------------------------------------


def resnet_convolutions() -> dict[str, tuple[int, ...]]:
    """Kernel shapes of the Caffe ResNet-101 to res5c by what follows "res" (or "conv1")."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    channels = 64
    for stage, blocks, width in ((2, 3, 8), (3, 4, 16), (4, 23, 32), (5, 3, 64)):
        for block in range(blocks):
            letter = "abc"[block] if stage in (2, 5) else "a" if block == 0 else f"b{block}"
            name = f"{stage}{letter}_branch"
            if block == 0:
                shapes[f"{name}1"] = (4 * width, channels, 1, 1)
            shapes[f"{name}2a"] = (width, channels, 1, 1)
            shapes[f"{name}2b"] = (width, width, 3, 3)
            shapes[f"{name}2c"] = (4 * width, width, 1, 1)
            channels = 4 * width
    return shapes


def batch_normed(layer: str, norm: str, scale: str, shape: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
    """Blobs of a convolution without bias, its BatchNorm (sums and a factor) and its Scale."""
    # Of a deconvolution, outputs are the second side; here it has as many inputs.
    factor = np.float32(3.5)
    mean = numbers(f"{norm}/0", shape[:1]) * factor
    variance = (1 + 0.5 * np.abs(numbers(f"{norm}/1", shape[:1]))) * factor
    # Branches that end in a sum are damped, or 33 of them would blow the numbers up.
    gamma = (0.3 if scale.endswith("2c") else 1.0) * (1 + numbers(f"{scale}/0", shape[:1]))
    return {
        layer: [numbers(f"{layer}/0", shape)],
        norm: [mean, variance, np.array([factor])],
        scale: [gamma.astype(np.float32), numbers(f"{scale}/1", shape[:1])],
    }


def kaiming_layers() -> dict[str, list[np.ndarray]]:
    """Blobs of the ImageNet ResNet-101, classifier included."""
    layers: dict[str, list[np.ndarray]] = {}
    for name, shape in resnet_convolutions().items():
        if name == "conv1":
            layers |= batch_normed("conv1", "bn_conv1", "scale_conv1", shape)
        else:
            layers |= batch_normed(f"res{name}", f"bn{name}", f"scale{name}", shape)
    return layers | {"fc1000": [numbers("fc1000/0", (1000, 256)), numbers("fc1000/1", (1000,))]}


RESNET_MAPS = ("res3b3_relu", "res4b22_relu", "res5c_relu", "res6_relu")
RESNET_WIDTHS = (64, 128, 256, 512)


def residual_layers(name: str, channels: int, widths: tuple[int, int, int]) -> dict[str, list[np.ndarray]]:
    first, second, third = widths
    shapes = {
        "1": (third, channels, 1, 1), "2a": (first, channels, 1, 1), "2b": (second, first, 3, 3),
        "2c": (third, second, 1, 1),
    }  # fmt: skip
    layers: dict[str, list[np.ndarray]] = {}
    for branch, shape in shapes.items():
        layers |= batch_normed(
            f"res{name}branch{branch}", f"bn{name}branch{branch}", f"scale{name}branch{branch}", shape
        )
    return layers


def caffe_resnet_layers(classes: int = 80) -> dict[str, list[np.ndarray]]:
    """Blobs of an official ResNet-101 model."""
    layers = kaiming_layers()
    del layers["fc1000"]
    layers |= residual_layers("6_", 256, (128, 128, 512))
    for level, (name, width) in enumerate(zip(RESNET_MAPS, RESNET_WIDTHS, strict=True), start=3):
        shapes = {f"TL{level}_1": (TCB, width, 3, 3), f"TL{level}_2": (TCB, TCB, 3, 3), f"P{level}": (TCB, TCB, 3, 3)}
        if level > 3:
            shapes[f"P{level}-up"] = (TCB, TCB, 2, 2)
        for key, shape in shapes.items():
            layers |= batch_normed(key, f"{key}_bn", f"{key}_scale", shape)
        for tap, channels, outputs in ((name, width, 2), (f"P{level}", TCB, classes + 1)):
            layers |= residual_layers(f"{tap}_inter_", channels, (256, 256, 1024))
            for part, count in (("loc", 4), ("conf", outputs)):
                key = f"res{tap}_inter_mbox_{part}"
                # What comes in is some hundred times larger than an offset.
                kernel = np.float32(0.01) * numbers(f"{key}/0", (3 * count, 1024, 3, 3))
                layers[key] = [kernel, numbers(f"{key}/1", (3 * count,))]
    return layers


def run_norm(x: Tensor, w: Kernels, norm: str, scale: str) -> Tensor:
    """Caffe's BatchNorm with global statistics and Scale."""
    (mean, variance, factor), (gamma, beta) = w(norm), w(scale)
    shape = (1, -1, 1, 1)
    x = (x - (mean / factor).reshape(shape)) / ((variance / factor).reshape(shape) + 1e-5).sqrt()
    return x * gamma.reshape(shape) + beta.reshape(shape)


def run_residual(x: Tensor, w: Kernels, name: str, stride: int, project: bool = True) -> Tensor:
    def branch(x: Tensor, which: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, w(f"res{name}branch{which}")[0], stride=stride, padding=padding)
        return run_norm(x, w, f"bn{name}branch{which}", f"scale{name}branch{which}")

    y = F.relu(branch(x, "2a", stride))
    y = branch(F.relu(branch(y, "2b", padding=1)), "2c")
    return F.relu(y + (branch(x, "1", stride) if project else x))


def resnet_maps(x: Tensor, w: Kernels) -> list[Tensor]:
    """res3b3, res4b22, res5c."""
    x = F.relu(run_norm(F.conv2d(x, w("conv1")[0], stride=2, padding=3), w, "bn_conv1", "scale_conv1"))
    x = F.max_pool2d(x, 3, 2, padding=0, ceil_mode=True)
    maps = []
    for stage, blocks in ((2, 3), (3, 4), (4, 23), (5, 3)):
        for block in range(blocks):
            letter = "abc"[block] if stage in (2, 5) else "a" if block == 0 else f"b{block}"
            stride = 2 if block == 0 and stage > 2 else 1
            x = run_residual(x, w, f"{stage}{letter}_", stride, project=block == 0)
        maps.append(x)
    return maps[1:]


def run_resnet(x: Tensor, w: Kernels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``run_vgg``, for the official ResNet-101 network."""
    maps = resnet_maps(x, w)
    maps.append(run_residual(maps[-1], w, "6_", 2))
    classes = w("resP3_inter_mbox_conf")[0].shape[0] // 3

    def normed(x: Tensor, key: str) -> Tensor:
        return run_norm(F.conv2d(x, w(key)[0], padding=1), w, f"{key}_bn", f"{key}_scale")

    def heads(x: Tensor, tap: str, outputs: int) -> tuple[Tensor, Tensor]:
        x = run_residual(x, w, f"{tap}_inter_", 1)
        loc = F.conv2d(x, *w(f"res{tap}_inter_mbox_loc"), padding=1)
        return flat(loc, 4), flat(F.conv2d(x, *w(f"res{tap}_inter_mbox_conf"), padding=1), outputs)

    arm, odm = [], []
    above: Tensor | None = None
    for level in (6, 5, 4, 3):
        arm.insert(0, heads(maps[level - 3], RESNET_MAPS[level - 3], 2))
        y = normed(F.relu(normed(maps[level - 3], f"TL{level}_1")), f"TL{level}_2")
        if above is not None:
            key = f"P{level + 1}-up"
            y = y + run_norm(F.conv_transpose2d(above, w(key)[0], stride=2), w, f"{key}_bn", f"{key}_scale")
        above = F.relu(normed(F.relu(y), f"P{level}"))
        odm.insert(0, heads(above, f"P{level}", classes))
    arm_loc, arm_conf = (torch.cat(parts, 1) for parts in zip(*arm, strict=True))
    odm_loc, odm_conf = (torch.cat(parts, 1) for parts in zip(*odm, strict=True))
    return arm_loc, arm_conf.softmax(-1), odm_loc, odm_conf.softmax(-1)
