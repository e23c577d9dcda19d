"""The formats of weight files that can be imported, each a table from our tensors to the file's.

Where the order of numbers differs, the table says so: Caffe and the ports have background as the first class and
"object" as the ARM's second one; here background is the last in both.

To add a format, write its table and list it in ``convert.formats_for``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CAFFE_INPUT: dict[str, Any] = {"channel_order": "bgr", "mean": (104.0, 117.0, 123.0), "std": (1.0, 1.0, 1.0)}
"""Official scripts: BGR, 0..255, no std."""
_SWAPPED_INPUT: dict[str, Any] = {"channel_order": "rgb", "mean": (123.0, 117.0, 104.0), "std": (1.0, 1.0, 1.0)}
"""luuuyi: the mean is subtracted in BGR, then the channels are swapped."""
IMAGENET_INPUT: dict[str, Any] = {
    "channel_order": "rgb",
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}
"""torchvision and timm."""
ANCHORS_PER_CELL = 3
"""Of every RefineDet that can be imported; the heads' channels follow the order of the aspect ratios."""


class Entry(NamedTuple):
    """One of our tensors and the file's tensors that it is made of."""

    target: str
    """Its name in the network."""
    sources: tuple[str, ...]
    """Keys of the file."""
    make: Callable[..., Tensor]
    """From the file's tensors to ours; must work on tensors without data, too (device "meta")."""


Table = list[Entry]


@dataclass(frozen=True)
class WeightFormat:
    """A kind of weight file."""

    title: str
    """What it is, in words."""
    backbones: tuple[str, ...]
    """Config values of ``backbone`` that the weights fit."""
    table: Table
    """What fills which tensor."""
    ignored: str = r"$^"
    """Pattern of keys that may be there and are of no use to us."""
    detector: bool = False
    """Whether the file fills the whole network, not only the backbone."""
    input: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Config values of the input that the weights were trained with."""
    network: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else the weights demand of the config."""
    heads: tuple[str, str, str] = ("", "", "")
    """Of a detector: keys of the first ARM offset and ODM class kernels and of the P4-to-P3 deconvolution."""
    duplicates: tuple[tuple[str, str], ...] = ()
    """Pairs of keys that the port stores twice; the second is optional and must equal the first."""

    def keys(self) -> list[str]:
        """Keys of the file that the table reads, each once, in order."""
        return list(dict.fromkeys(key for entry in self.table for key in entry.sources))

    def misfit(self, keys: Iterable[str]) -> str:
        """The first key that is missing in the file and the first that is unexpected; "" if there is none."""
        given = list(keys)
        own = self.keys()
        known = {*own, *(second for _, second in self.duplicates)}
        present = set(given)
        missing = [key for key in own if key not in present]
        unexpected = [key for key in given if key not in known and not re.match(self.ignored, key)]
        parts = [f"'{missing[0]}' is missing"] if missing else []
        parts += [f"{unexpected[0]!a:.80} is unexpected"] if unexpected else []
        return f"{', '.join(parts)} ({len(missing)} missing, {len(unexpected)} unexpected)" if parts else ""


def same(tensor: Tensor) -> Tensor:
    """The tensor as the file has it."""
    return tensor


def _background_last(classes: int | None = None) -> Callable[[Tensor], Tensor]:
    """Move the first of each anchor's outputs to the end; rows are anchor by anchor. Of two, the move is a swap."""

    def make(tensor: Tensor) -> Tensor:
        per_anchor = classes or tensor.shape[0] // ANCHORS_PER_CELL
        if per_anchor == 0 or tensor.shape[0] % per_anchor:
            return tensor  # its shape is wrong, which the caller reports
        rows = tensor.reshape(-1, per_anchor, *tensor.shape[1:])
        return torch.cat([rows[:, 1:], rows[:, :1]], dim=1).reshape(tensor.shape)

    return make


def _numbered_vgg() -> dict[str, int]:
    """Caffe's layer names and their numbers in a sequence of convolutions, ReLUs and poolings."""
    names: dict[str, int] = {}
    number = 0
    for block, repeats in enumerate((2, 2, 3, 3, 3), start=1):
        for layer in range(1, repeats + 1):
            names[f"conv{block}_{layer}"] = number
            number += 2
        number += 1
    return names


_VGG = _numbered_vgg()
LEVELS = range(4)
_ARM_MAPS = ("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2")
CAFFE, TORCH = ("[0]", "[1]"), (".weight", ".bias")


def _layer(target: str, key: str, suffixes: tuple[str, str], make: Callable[..., Tensor] = same) -> Table:
    """Kernel and bias of a convolution."""
    return [
        Entry(f"{target}.weight", (key + suffixes[0],), make),
        Entry(f"{target}.bias", (key + suffixes[1],), make),
    ]


def _vgg_table(
    suffixes: tuple[str, str],
    name_of: Callable[[str], str],
    norms: tuple[str, str] | None = None,
) -> Table:
    """The backbone; ``name_of`` turns Caffe's layer names into the file's. Without ``norms``, the ImageNet part."""
    table: Table = []
    for name, number in _VGG.items():
        table += _layer(f"backbone.features.{number}", name_of(name), suffixes)
    for name in ("fc6", "fc7") if norms is None else ("fc6", "fc7", "conv6_1", "conv6_2"):
        table += _layer(f"backbone.{name}", name_of(name), suffixes)
    if norms is not None:
        table += [Entry(f"backbone.conv{4 + i}_3_norm.weight", (key,), same) for i, key in enumerate(norms)]
    return table


def head_table(keys: Callable[[str, str, int], str], suffixes: tuple[str, str]) -> Table:
    """Heads; ``keys`` is given ("arm" | "odm", "loc" | "conf", level)."""
    table: Table = []
    for module, move in (("arm", _background_last(2)), ("odm", _background_last())):
        for level in LEVELS:
            table += _layer(f"{module}.{level}.offsets", keys(module, "loc", level), suffixes)
            table += _layer(f"{module}.{level}.logits", keys(module, "conf", level), suffixes, move)
    return table


def _tcb_table(keys: Callable[[str, int], str], suffixes: tuple[str, str]) -> Table:
    """Transfer connection blocks; ``keys`` is given ("conv1" | "conv2" | "conv3" | "deconv", level)."""
    table: Table = []
    for level in LEVELS:
        for part in ("conv1", "conv2", "conv3", "deconv")[: 4 if level < 3 else 3]:
            table += _layer(f"tcb.{level}.{part}", keys(part, level), suffixes)
    return table


def caffe_tcb_key(part: str, level: int) -> str:
    """Caffe's name of a layer of a transfer connection block; level 0 is P3."""
    pyramid = level + 3
    # The deconvolution carries the name of the map that it enlarges, which is the level above.
    return {
        "conv1": f"TL{pyramid}_1",
        "conv2": f"TL{pyramid}_2",
        "conv3": f"P{pyramid}",
        "deconv": f"P{pyramid + 1}-up",
    }[part]


def caffe_vgg() -> WeightFormat:
    """Official VGG-16 models (320 and 512 have the same layers)."""

    def head(module: str, part: str, level: int) -> str:
        return f"{_ARM_MAPS[level] if module == 'arm' else f'P{level + 3}'}_mbox_{part}"

    table = _vgg_table(CAFFE, lambda name: name, norms=("conv4_3_norm[0]", "conv5_3_norm[0]"))
    table += head_table(head, CAFFE) + _tcb_table(caffe_tcb_key, CAFFE)
    return WeightFormat(
        "an official RefineDet with VGG-16 (Caffe)",
        ("vgg16",),
        table,
        detector=True,
        input=CAFFE_INPUT,
        network={"tcb_batch_norm": False, "fc6_dilation": 3},
        heads=("conv4_3_norm_mbox_loc[0]", "P3_mbox_conf[0]", "P4-up[0]"),
    )


def _numbered_name(prefix: str, extras: str = "") -> Callable[[str], str]:
    numbers: dict[str, str] = {name: f"{prefix}{number}" for name, number in _VGG.items()}
    numbers |= {"fc6": f"{prefix}31", "fc7": f"{prefix}33"}
    if extras:
        numbers |= {"conv6_1": extras.split()[0], "conv6_2": extras.split()[1]}
    return numbers.__getitem__


def luuuyi() -> WeightFormat:
    """Checkpoints of luuuyi/RefineDet.PyTorch."""

    def tcb(part: str, level: int) -> str:
        return {
            "conv1": f"tcb0.{3 * level}",
            "conv2": f"tcb0.{3 * level + 2}",
            "conv3": f"tcb2.{3 * level + 1}",
            "deconv": f"tcb1.{level}",
        }[part]

    norms = ("conv4_3_L2Norm.weight", "conv5_3_L2Norm.weight")
    table = _vgg_table(TORCH, _numbered_name("vgg.", "extras.0 extras.1"), norms=norms)
    table += head_table(lambda module, part, level: f"{module}_{part}.{level}", TORCH) + _tcb_table(tcb, TORCH)
    return WeightFormat(
        "a RefineDet of the luuuyi port (VGG-16)",
        ("vgg16",),
        table,
        detector=True,
        input=_SWAPPED_INPUT,
        network={"tcb_batch_norm": False, "fc6_dilation": 3},
        heads=("arm_loc.0.weight", "odm_conf.0.weight", "tcb1.0.weight"),
    )


def dd604() -> WeightFormat:
    """Checkpoints of dd604/refinedet.pytorch with VGG-16."""

    def tcb(part: str, level: int) -> str:
        if level < 3:
            return f"pyramid_layer{level + 1}.{part}"
        return {"conv1": "pyramid_layer4.0", "conv2": "pyramid_layer4.2", "conv3": "pyramid_layer4.4"}[part]

    norms = ("L2Norm_conv4_3.weight", "L2Norm_conv5_3.weight")
    table = _vgg_table(TORCH, _numbered_name("base.", "extra.0 extra.2"), norms=norms)
    table += head_table(lambda module, part, level: f"{module}_{part}.{level}", TORCH) + _tcb_table(tcb, TORCH)
    # The same modules, registered once more as the stages that its forward pass runs through.
    doubles = [(f"extra.{number}", f"layer4.{number}") for number in (0, 2)]
    for number in (*_VGG.values(), 31, 33):
        stage, first = (1, 0) if number < 23 else (2, 23) if number < 30 else (3, 30)
        doubles.append((f"base.{number}", f"layer{stage}.{number - first}"))
    return WeightFormat(
        "a RefineDet of the dd604 port (VGG-16)",
        ("vgg16",),
        table,
        detector=True,
        input=CAFFE_INPUT,
        network={"tcb_batch_norm": False, "fc6_dilation": 6},
        heads=("arm_loc.0.weight", "odm_conf.0.weight", "pyramid_layer1.deconv.weight"),
        duplicates=tuple((a + suffix, b + suffix) for a, b in doubles for suffix in TORCH),
    )


def imagenet_vggs() -> list[WeightFormat]:
    """VGG-16 trained on ImageNet, as five programs store it."""

    def features(prefix: str = "features.") -> Table:
        table: Table = []
        for number in _VGG.values():
            table += _layer(f"backbone.features.{number}", f"{prefix}{number}", TORCH)
        return table

    def subsampled(first: str, second: str) -> Table:
        # Paper, section 4: fc6 and fc7 become convolutions "via subsampling parameters". Every third row and column of
        # fc6's 7x7 kernel, every fourth of 4096 outputs.
        return [
            Entry("backbone.fc6.weight", (f"{first}.weight",), lambda x: x.reshape(len(x), -1, 7, 7)[::4, :, ::3, ::3]),
            Entry("backbone.fc6.bias", (f"{first}.bias",), lambda x: x[::4]),
            Entry("backbone.fc7.weight", (f"{second}.weight",), lambda x: x.flatten(1)[::4, ::4, None, None]),
            Entry("backbone.fc7.bias", (f"{second}.bias",), lambda x: x[::4]),
        ]

    vgg = ("vgg16",)
    return [
        WeightFormat(
            "VGG_ILSVRC_16_layers_fc_reduced (Caffe, backbone only)",
            vgg,
            _vgg_table(CAFFE, lambda name: name),
            ignored=r"fc8",
            input=CAFFE_INPUT,
        ),
        WeightFormat(
            "vgg16_reducedfc.pth (backbone only)", vgg, _vgg_table(TORCH, _numbered_name("")), input=CAFFE_INPUT
        ),
        WeightFormat(
            "torchvision's VGG-16 (backbone only)",
            vgg,
            features() + subsampled("classifier.0", "classifier.3"),
            ignored=r"classifier\.6\.",
            input=IMAGENET_INPUT,
        ),
        WeightFormat(
            "timm's VGG-16 (backbone only)",
            vgg,
            features() + subsampled("pre_logits.fc1", "pre_logits.fc2"),
            ignored=r"head\.fc\.",
            input=IMAGENET_INPUT,
        ),
        WeightFormat("the convolutions of VGG-16 (backbone only)", vgg, features(), input=IMAGENET_INPUT),
    ]
