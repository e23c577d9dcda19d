"""The formats of weight files with residual networks: torchvision, timm, and Caffe's ResNet-101. See ``formats.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refinedet.config import ModelConfig
from refinedet.model.backbones import RESNETS, TimmBackbone
from refinedet.weights.formats import (
    CAFFE,
    CAFFE_INPUT,
    IMAGENET_INPUT,
    LEVELS,
    Entry,
    Table,
    WeightFormat,
    caffe_tcb_key,
    head_table,
    same,
)


def _mean_or_variance(accumulated: Tensor, factor: Tensor) -> Tensor:
    """Caffe stores sums; its third blob is what to divide them by (0 where nothing was ever added)."""
    total = factor.reshape(-1)[0]
    return torch.where(total != 0, accumulated.reshape(-1) / total, 0.0)


def imagenet_resnets(config: ModelConfig) -> list[WeightFormat]:
    """Those of torchvision and timm; of networks with the same keys, that of the config's backbone."""
    formats = []
    for names in (("resnet18",), ("resnet34",), ("resnet50",), ("resnet101", "resnext101_32x8d", "resnext101_64x4d")):
        name = config.backbone if config.backbone in names else names[0]
        with torch.device("meta"):
            keys = RESNETS[name].build(weights=None).state_dict()
        table = [
            Entry(f"backbone.{key}", (key,), same)
            for key in keys
            if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
        ]
        formats.append(
            WeightFormat(
                f"torchvision's or timm's {RESNETS[name].title} (backbone only)",
                names,
                table,
                ignored=r"fc\.|.*num_batches_tracked$",
                input=IMAGENET_INPUT,
                network={"backbone_layout": "torchvision"},
            )
        )
    return formats


def timm_format(config: ModelConfig, keys: Sequence[str]) -> WeightFormat:
    """What timm itself saves of the config's network; its classifier and unused layers are ignored."""
    # As a list of feature maps timm calls a stage "stages_0", as a classifier "stages.0".
    given = {key.replace(".", "_"): key for key in keys}
    body = TimmBackbone(config.timm_name).body
    table = [
        Entry(f"backbone.body.{name}", (given.get(name.replace(".", "_"), name),), same)
        for name in body.state_dict()
        if not name.endswith("num_batches_tracked")
    ]
    return WeightFormat(f"timm's {config.timm_name} (backbone only)", ("timm",), table, ignored="")


def _caffe_convolution(target: str, target_norm: str, layer: str, norm: str, scale: str) -> Table:
    """A convolution without bias, Caffe's BatchNorm (statistics) and Scale (gamma, beta)."""
    return [
        Entry(f"{target}.weight", (f"{layer}[0]",), same),
        Entry(f"{target_norm}.running_mean", (f"{norm}[0]", f"{norm}[2]"), _mean_or_variance),
        Entry(f"{target_norm}.running_var", (f"{norm}[1]", f"{norm}[2]"), _mean_or_variance),
        Entry(f"{target_norm}.weight", (f"{scale}[0]",), same),
        Entry(f"{target_norm}.bias", (f"{scale}[1]",), same),
    ]


def _kaiming_table() -> Table:
    """ResNet-101 to res5c by the names of its Caffe release: res4b1 .. res4b22, but res2a, res2b, res2c."""
    table = _caffe_convolution("backbone.conv1", "backbone.bn1", "conv1", "bn_conv1", "scale_conv1")
    for stage, blocks in ((2, 3), (3, 4), (4, 23), (5, 3)):
        for block in range(blocks):
            numbered = stage in (3, 4)
            letter = "a" if block == 0 else f"b{block}" if numbered else "abc"[block]
            ours, theirs = f"backbone.layer{stage - 1}.{block}", f"{stage}{letter}_branch"
            parts = [(f"conv{i}", f"bn{i}", f"2{branch}") for i, branch in ((1, "a"), (2, "b"), (3, "c"))]
            if block == 0:
                parts.insert(0, ("downsample.0", "downsample.1", "1"))
            for convolution, norm, branch in parts:
                names = (f"{kind}{theirs}{branch}" for kind in ("res", "bn", "scale"))
                table += _caffe_convolution(f"{ours}.{convolution}", f"{ours}.{norm}", *names)
    return table


def kaiming_resnet() -> WeightFormat:
    """ResNet-101-model.caffemodel."""
    return WeightFormat(
        "the ImageNet ResNet-101 of its authors (Caffe, backbone only)",
        ("resnet101",),
        _kaiming_table(),
        ignored=r"fc1000\[",
        input=CAFFE_INPUT,
        network={"backbone_layout": "caffe"},
    )


def _caffe_residual(target: str, name: str) -> Table:
    """A residual block of the official additions; ``name`` is what stands between "res" and "branch"."""
    table: Table = []
    for branch in ("1", "2a", "2b", "2c"):
        names = (f"{kind}{name}branch{branch}" for kind in ("res", "bn", "scale"))
        table += _caffe_convolution(f"{target}.branch{branch}", f"{target}.branch{branch}_bn", *names)
    return table


def caffe_resnet() -> WeightFormat:
    """Official ResNet-101 models (320 and 512 have the same layers)."""
    maps = ("res3b3_relu", "res4b22_relu", "res5c_relu", "res6_relu")

    def head(module: str, part: str, level: int) -> str:
        return f"res{maps[level] if module == 'arm' else f'P{level + 3}'}_inter_mbox_{part}"

    table = _kaiming_table() + _caffe_residual("backbone.res6", "6_")
    for level in LEVELS:
        for part in ("conv1", "conv2", "conv3", "deconv")[: 4 if level < 3 else 3]:
            key = caffe_tcb_key(part, level)
            norm = "deconv_norm" if part == "deconv" else f"norm{part[-1]}"
            table += _caffe_convolution(f"tcb.{level}.{part}", f"tcb.{level}.{norm}", key, f"{key}_bn", f"{key}_scale")
        table += _caffe_residual(f"arm.{level}.block", f"{maps[level]}_inter_")
        table += _caffe_residual(f"odm.{level}.block", f"P{level + 3}_inter_")
    table += head_table(head, CAFFE)
    return WeightFormat(
        "an official RefineDet with ResNet-101 (Caffe)",
        ("resnet101",),
        table,
        detector=True,
        input=CAFFE_INPUT,
        network={"tcb_batch_norm": True, "backbone_layout": "caffe", "prediction_blocks": True},
        heads=("resres3b3_relu_inter_mbox_loc[0]", "resP3_inter_mbox_conf[0]", "P4-up[0]"),
    )
