"""Weights of other programs, converted: the official Caffe models, two PyTorch ports, ImageNet backbones.

What a file is shows in its keys (``formats.py``). ``fit`` compares its header with the network before any number is
read; ``Fitted.fill`` then puts the numbers where they belong. ``refinedet convert`` and ``--init-weights`` both come
through here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refinedet.config import InferenceConfig, ModelConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import user_path
from refinedet.model.network import RefineDetNetwork
from refinedet.weights.formats import (
    ANCHORS_PER_CELL,
    Entry,
    WeightFormat,
    caffe_vgg,
    dd604,
    imagenet_vggs,
    luuuyi,
)
from refinedet.weights.formats_resnet import caffe_resnet, imagenet_resnets, kaiming_resnet, timm_format
from refinedet.weights.store import WeightFile, imagenet_weights, network_shell, open_weights

ChannelOrder = Literal["rgb", "bgr"]

_OFFICIAL_INFERENCE: dict[str, Any] = {"candidates": 1000, "candidates_per": "class", "max_detections": 500}
"""detection_output_param of the official scripts (the paper says 400 per image and 200)."""
_OFFICIAL_ANCHORS: dict[str, Any] = {
    "anchor_sizes": (32.0, 64.0, 128.0, 256.0),
    "aspect_ratios": (1.0, 2.0, 0.5),
    "offset_std": (0.1, 0.1, 0.2, 0.2),
}
"""All sizes, datasets and ports have these; the heads' channels follow this order."""


@dataclass(frozen=True)
class Fitted:
    """A weight file that is known to fit a config."""

    file: WeightFile
    """Its header and how to read it."""
    format: WeightFormat
    """What it is."""
    config: ModelConfig
    """The config that was asked for, with what the weights demand: input, layout; of a detector also classes, anchors,
    transfer connection blocks and post-processing."""
    untrained: tuple[str, ...]
    """Parts of the network that the file does not hold; empty for a detector."""

    def fill(self, network: nn.Module) -> None:
        """Copy the file's numbers into a network of ``config``; other parts stay as they are.

        Raises:
            RefineDetError: corrupt, numbers that are not finite, or two copies of a tensor that differ.
        """
        source = self.file.read()
        for first, second in self.format.duplicates:
            if second in source and not torch.equal(source[first], source[second]):
                raise RefineDetError(f"{self.file.source}: '{first}' and '{second}' should be one tensor, but differ")
        own = network.state_dict()
        with torch.no_grad():
            for entry in self.format.table:
                own[entry.target].copy_(_make(entry, source, own[entry.target], self.file.source))


@dataclass(frozen=True)
class Imported:
    """Converted weights of another program."""

    network: RefineDetNetwork
    """In evaluation mode, on the CPU."""
    config: ModelConfig
    """See ``Fitted``."""
    title: str
    """What the file is, in words."""
    untrained: tuple[str, ...]
    """Parts of the network that the file does not hold and that start from random numbers; empty for a detector."""


def fit(file: WeightFile, config: ModelConfig, *, channel_order: ChannelOrder | None = None) -> Fitted:
    """Find out what a weight file is and that it fits, from its header alone.

    Args:
        file: see ``store.open_weights``.
        config: size, backbone and whatever else the file does not decide.
        channel_order: what the network is fed, where the file's own convention (see docs/weights.md) is not right.

    Raises:
        UsageError: the config is of another backbone than the file.
        RefineDetError: no known format, or a tensor is missing, unexpected or of another shape.
    """
    kind = _recognise(list(file.header), config, file.source)
    if config.backbone not in kind.backbones:
        raise UsageError(
            f"{file.source}: is {kind.title}, which has the backbone {kind.backbones[0]}; the preset has "
            f"{config.backbone}"
        )
    config = _config_for(kind, file, config)
    if channel_order is not None and channel_order != config.channel_order:
        config = dataclasses.replace(
            config,
            channel_order=channel_order,
            mean=(config.mean[2], config.mean[1], config.mean[0]),
            std=(config.std[2], config.std[1], config.std[0]),
        )
    own = network_shell(config).state_dict()
    filled = {entry.target for entry in kind.table}
    absent = [name for name in own if name not in filled and not name.endswith("num_batches_tracked")]
    if kind.detector and absent:
        raise UsageError(f"{file.source}: {kind.title} has no weights for '{absent[0]}': choose a preset of its form")
    for entry in kind.table:
        if entry.target not in own:
            raise UsageError(f"{file.source}: {kind.title} has '{entry.sources[0]}', for which the preset has no layer")
        _make(entry, file.header, own[entry.target].to("meta"), file.source)
    return Fitted(file, kind, config, tuple(dict.fromkeys(_part_of_network(name) for name in absent)))


def fit_backbone(config: ModelConfig, init_weights: str | Path | None) -> Fitted | None:
    """The weights of the backbone that a training starts from.

    Args:
        config: of the model that is to be trained.
        init_weights: a weight file; "torchvision" (or None) downloads ImageNet weights; "random" takes none.

    Returns:
        The weights and the config with the input that they need; None for "random".

    Raises:
        UsageError: a file that holds a whole detector, or another backbone.
        RefineDetError: as ``store.open_weights`` and ``fit``, or a failed download.
    """
    if init_weights == "random":
        return None
    file = imagenet_weights(config) if init_weights in (None, "torchvision") else open_weights(str(init_weights))
    fitted = fit(file, config)
    if fitted.format.detector:
        raise UsageError(
            f"{file.source}: is {fitted.format.title}, a whole detector: make a model of it with refinedet convert, "
            f"and start from that with --init"
        )
    return fitted


def import_weights(path: str | Path, config: ModelConfig, *, channel_order: ChannelOrder | None = None) -> Imported:
    """Read a file of weights and fill a network with them.

    Args:
        path: a weight file; see docs/weights.md for the formats.
        config: as for ``fit``.
        channel_order: as for ``fit``.

    Returns:
        The network and its config. Layers without weights in the file start from random numbers of seed 0.

    Raises:
        UsageError: the config is of another backbone than the file.
        RefineDetError: the file is missing, corrupt or a pickled object, of no known format, or does not fit it; the
            message names the first missing and the first unexpected key.
    """
    fitted = fit(open_weights(path), config, channel_order=channel_order)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RefineDetNetwork(fitted.config).eval()
    fitted.fill(network)
    return Imported(network, fitted.config, fitted.format.title, fitted.untrained)


def import_card(imported: Imported, path: str | Path, class_names: Sequence[str]) -> str:
    """Model card of imported weights: which file they are from, and what was done to them.

    Raises:
        RefineDetError: the file cannot be read.
    """
    file = user_path(path)
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RefineDetError(f"{file}: cannot be read ({error.strerror})") from None
    config = imported.config
    height, width = config.image_size
    if imported.untrained:
        state = (
            f"Not a trained detector: the file has no weights for {', '.join(imported.untrained)}, which are random.\n"
            "Start a training from this folder with `--init`."
        )
    else:
        state = "The file's figures are its authors'; nothing was measured after the conversion."
    return f"""---
library_name: refinedet
pipeline_tag: object-detection
---

# {file.stem}

RefineDet ("Single-Shot Refinement Neural Network for Object Detection", CVPR 2018), {config.backbone} at
{height}x{width}, {len(class_names)} classes, imported from another program.

## Source

`{file.name}` (sha256 {digest}): {imported.title}. The licence is that of the file.

The numbers are the file's; classifiers are reordered for background last, sums of Caffe's batch norm are divided by
their count. Input: {config.channel_order}, mean {config.mean}, std {config.std}.

## Measured

{state}

## Classes

{", ".join(class_names)}

## Use

    from refinedet import RefineDet
    model = RefineDet.from_pretrained("<this folder>")
    print(model.predict("photo.jpg").table())
"""


def formats_for(config: ModelConfig) -> list[WeightFormat]:
    """Every format; of ResNets with the same keys, only that of the config's backbone."""
    return [
        caffe_vgg(),
        luuuyi(),
        dd604(),
        *imagenet_vggs(),
        *imagenet_resnets(config),
        kaiming_resnet(),
        caffe_resnet(),
    ]


def _recognise(keys: Sequence[str], config: ModelConfig, source: str) -> WeightFormat:
    """The format whose keys overlap most with the file's (intersection over union, ignorable keys left out).

    Args:
        keys: of the file.
        config: decides between formats of the same keys, and what a timm network is called.
        source: of the keys, for messages.

    Raises:
        RefineDetError: no format has most of the keys, or the nearest one lacks some.
    """
    if config.backbone == "timm":
        nearest: WeightFormat | None = timm_format(config, keys)
        score = 1.0
    else:
        nearest, score = None, 0.0
        for candidate in formats_for(config):
            own = set(candidate.keys())
            doubles = {second for _, second in candidate.duplicates}
            present = {k for k in keys if k in own or not (k in doubles or re.match(candidate.ignored, k))}
            overlap = len(own & present) / len(own | present)
            if overlap > score:
                nearest, score = candidate, overlap
    # Far below the overlap of a file that lacks a few keys, and above that of strangers with a few names in common.
    if nearest is None or score < 0.5:
        hint = f"; nearest is {nearest.title}: {nearest.misfit(keys)}" if nearest else f" (first key: {keys[0]!a:.60})"
        raise RefineDetError(f"{source}: weights of no known format{hint}")
    misfit = nearest.misfit(keys)
    if misfit:
        raise RefineDetError(f"{source}: looks like {nearest.title}, but {misfit}")
    return nearest


def _part_of_network(name: str) -> str:
    """Name of the part of the network that a tensor belongs to: "backbone.conv6_1", "arm", "tcb", "odm"."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "backbone" else first


def _config_for(kind: WeightFormat, file: WeightFile, config: ModelConfig) -> ModelConfig:
    changes: dict[str, Any] = {**kind.input, **kind.network}
    if kind.detector:
        arm, odm, deconv = (file.header[key] for key in kind.heads)
        for key, tensor in zip(kind.heads, (arm, odm, deconv), strict=True):
            if tensor.ndim != 4:
                raise RefineDetError(
                    f"{file.source}: '{key}' has shape {tuple(tensor.shape)}; the kernels of a convolution have 4 sides"
                )
        if arm.shape[0] != 4 * ANCHORS_PER_CELL:
            raise RefineDetError(
                f"{file.source}: '{kind.heads[0]}' has {arm.shape[0]} outputs; models with {ANCHORS_PER_CELL} anchors "
                f"per cell have {4 * ANCHORS_PER_CELL}"
            )
        if odm.shape[0] % ANCHORS_PER_CELL or odm.shape[0] < 2 * ANCHORS_PER_CELL:
            raise RefineDetError(
                f"{file.source}: '{kind.heads[1]}' has {odm.shape[0]} outputs, which is no number of classes for "
                f"{ANCHORS_PER_CELL} anchors per cell"
            )
        changes |= _OFFICIAL_ANCHORS
        changes["num_classes"] = odm.shape[0] // ANCHORS_PER_CELL - 1
        changes["tcb_channels"] = deconv.shape[0]
        changes["tcb_deconv_kernel"] = deconv.shape[-1]
        if "fc6" in file.dilations and config.backbone == "vgg16":
            changes["fc6_dilation"] = file.dilations["fc6"]
        changes["inference"] = dataclasses.replace(InferenceConfig(), **_OFFICIAL_INFERENCE)
    try:
        return dataclasses.replace(config, **changes)
    except UsageError as error:
        raise RefineDetError(f"{file.source}: {error}") from None


def _make(entry: Entry, source: Mapping[str, Tensor], target: Tensor, file: str) -> Tensor:
    """Our tensor out of the file's; of tensors without data (device "meta"), its shape."""
    given = source[entry.sources[0]]
    try:
        tensor = entry.make(*(source[key].float() for key in entry.sources))
    except (RuntimeError, IndexError):
        tensor = None  # the table cuts or reshapes, and the sides are not what it expects
    # Legacy Caffe blobs have four sides whatever they hold.
    if tensor is None or _without_leading_ones(tensor.shape) != _without_leading_ones(target.shape):
        raise RefineDetError(
            f"{file}: '{entry.sources[0]}' has shape {tuple(given.shape)}, the network needs {tuple(target.shape)} for "
            f"'{entry.target}'"
        )
    return tensor.reshape(target.shape)


def _without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    sides = list(shape)
    while sides and sides[0] == 1:
        del sides[0]
    return tuple(sides)
