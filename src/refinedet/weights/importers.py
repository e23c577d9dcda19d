"""Weights of other programs, made into ours: the official Caffe models, two PyTorch ports, ImageNet backbones.

A file is read without running any code that it may hold; what it is is decided by the keys in it. Each known format is
a table from our tensors to the file's. Where the order of numbers differs, the table says so: Caffe and the ports have
background as the FIRST class and "object" as the ARM's second one, we have background last in both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refinedet.config import InferenceConfig, ModelConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.model.network import RefineDetNetwork
from refinedet.weights.caffemodel import CaffeModel, read_caffemodel

ChannelOrder = Literal["rgb", "bgr"]

_CAFFE_INPUT: dict[str, Any] = {"channel_order": "bgr", "mean": (104.0, 117.0, 123.0), "std": (1.0, 1.0, 1.0)}
"""Official scripts: BGR, 0..255, no std."""
_SWAPPED_INPUT: dict[str, Any] = {"channel_order": "rgb", "mean": (123.0, 117.0, 104.0), "std": (1.0, 1.0, 1.0)}
"""luuuyi: the mean goes off in BGR, then the channels are swapped."""
_IMAGENET_INPUT: dict[str, Any] = {
    "channel_order": "rgb",
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}
"""torchvision and timm."""
_OFFICIAL_INFERENCE: dict[str, Any] = {"candidates": 1000, "candidates_per": "class", "max_detections": 500}
"""detection_output_param of the official scripts (the paper says 400 per image and 200)."""

_OFFICIAL_ANCHORS: dict[str, Any] = {
    "anchor_sizes": (32.0, 64.0, 128.0, 256.0),
    "aspect_ratios": (1.0, 2.0, 0.5),
    "offset_std": (0.1, 0.1, 0.2, 0.2),
}
"""All sizes, data sets and ports have these; the heads' channels follow this order."""
_ANCHORS_PER_CELL = 3


class _Entry(NamedTuple):
    """One of our tensors and the file's tensors that it is made of."""

    target: str
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


_Table = list[_Entry]


@dataclass(frozen=True)
class _Format:
    title: str
    backbones: tuple[str, ...]
    """Config values of ``backbone`` that the weights fit."""
    table: _Table
    ignored: str = r"$^"
    """Pattern of keys that may be there and are of no use to us."""
    detector: bool = False
    """Whether the file fills the whole network, not only the backbone."""
    input: dict[str, Any] = dataclasses.field(default_factory=dict)
    form: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else the weights demand of the config."""
    heads: tuple[str, str, str] = ("", "", "")
    """Of a detector: keys of the first ARM offset and ODM class kernels and of the P4-to-P3 deconvolution."""
    duplicates: tuple[tuple[str, str], ...] = ()
    """Pairs of keys that the port stores twice; the second is optional and must equal the first."""

    def keys(self) -> list[str]:
        """Keys of the file that the table reads, each once, in order."""
        return list(dict.fromkeys(key for entry in self.table for key in entry.sources))


@dataclass(frozen=True)
class Imported:
    """Weights of another program as ours."""

    network: RefineDetNetwork
    """In evaluation mode, on the CPU."""
    config: ModelConfig
    """The preset's, with what the file's weights demand: classes, input, form of the network, post-processing."""
    title: str
    """What the file is, in words."""
    untrained: tuple[str, ...]
    """Parts of the network that the file does not hold and that start from random numbers; empty for a detector."""


def import_weights(path: str | Path, config: ModelConfig, *, channel_order: ChannelOrder | None = None) -> Imported:
    """Read a file of weights and fill a network with them.

    Args:
        path: .caffemodel, .pth / .pt (read with weights_only) or .safetensors; see docs/weights.md for the formats.
        config: size, backbone and whatever else the file does not decide.
        channel_order: what the network is fed, where the file's own convention (see docs/weights.md) is not right.

    Returns:
        The network and its config. Layers without weights in the file start from random numbers of seed 0.

    Raises:
        UsageError: the config is of another backbone than the file.
        RefineDetError: the file is missing, corrupt or a pickled object, of no known format, or does not fit it; the
            message names the first missing and the first unexpected key.
    """
    file = Path(path).expanduser()
    source, dilations = _read(file)
    found = _recognise(source, file)
    if config.backbone not in found.backbones:
        raise UsageError(
            f"{file}: is {found.title}, which has the backbone {found.backbones[0]}; the preset has {config.backbone}"
        )
    _check_keys(found, source, file)
    config = _config_for(found, source, dilations, config, file)
    if channel_order is not None and channel_order != config.channel_order:
        config = dataclasses.replace(
            config,
            channel_order=channel_order,
            mean=(config.mean[2], config.mean[1], config.mean[0]),
            std=(config.std[2], config.std[1], config.std[0]),
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RefineDetNetwork(config).eval()
    own = network.state_dict()
    wanted = [name for name in own if not name.endswith("num_batches_tracked")]
    filled = {entry.target for entry in found.table}
    absent = [name for name in wanted if name not in filled]
    if found.detector and absent:
        raise UsageError(f"{file}: {found.title} has no weights for '{absent[0]}': choose a preset of its form")
    for entry in found.table:
        if entry.target not in own:
            raise UsageError(f"{file}: {found.title} has '{entry.sources[0]}', for which the preset has no layer")
        own[entry.target].copy_(_made(entry, source, own[entry.target], file))
    return Imported(network, config, found.title, tuple(dict.fromkeys(_part(name) for name in absent)))


def import_card(imported: Imported, path: str | Path, class_names: Sequence[str]) -> str:
    """Model card of imported weights: which file they are from, and what was done to them.

    Raises:
        RefineDetError: the file cannot be read.
    """
    file = Path(path).expanduser()
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


def _part(name: str) -> str:
    """Name of the part of the network that a tensor belongs to: "backbone.conv6_1", "arm", "tcb", "odm"."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "backbone" else first


# Reading -------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors by key, and the dilations that a Caffe file states. The kind of file shows in its first bytes."""
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise RefineDetError(f"{file}: cannot be read ({error.strerror})") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return _plain(_read_safetensors(file), file), {}
    # A zip archive, or a pickle of protocol 2 to 5: torch's present and former file formats.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return _plain(_read_torch(file), file), {}
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise RefineDetError(f"{file}: HDF5 files are not read; give a .caffemodel, .pth or .safetensors file")
    if not head:
        raise RefineDetError(f"{file}: the file is empty")
    model: CaffeModel = read_caffemodel(file)
    return {key: _finite(tensor, key, file) for key, tensor in model.blobs.items()}, model.dilations


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise RefineDetError(f"{file}: not a readable safetensors file ({error})") from None


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        # torch raises anything from EOFError to UnpicklingError here, with many lines of advice to switch safety off.
        raise RefineDetError(
            f"{file}: not a readable file of tensors (cut, corrupt, or a pickled object, which is never run); save "
            f"the model's state_dict()"
        ) from None


def _plain(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what was loaded: out of a checkpoint's dict, without the prefix of DataParallel."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise RefineDetError(f"{file}: no state dict (a mapping from names to tensors) in it")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise RefineDetError(f"{file}: '{key}' is no tensor, so this is no state dict")
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    return {str(key)[len(prefix) :]: _finite(value, str(key), file) for key, value in content.items()}


def _finite(tensor: Tensor, key: str, file: Path) -> Tensor:
    if tensor.is_sparse or tensor.is_quantized or tensor.is_complex():
        raise RefineDetError(f"{file}: '{key}' is not a plain tensor")
    if not bool(torch.isfinite(tensor).all()):
        raise RefineDetError(f"{file}: '{key}' holds numbers that are not finite")
    return tensor.detach().float()


# Fitting -------------------------------------------------------------------------------------------------------------


def _recognise(source: Mapping[str, Tensor], file: Path) -> _Format:
    """The format whose keys overlap most with the file's (intersection over union, ignorable keys left out)."""
    best, score = None, 0.0
    for candidate in _formats():
        keys = set(candidate.keys())
        doubles = {second for _, second in candidate.duplicates}
        present = {k for k in source if k in keys or not (k in doubles or re.match(candidate.ignored, k))}
        overlap = len(keys & present) / len(keys | present)
        if overlap > score:
            best, score = candidate, overlap
    # Far below the overlap of a file that lacks a few keys, and above that of strangers with a few names in common.
    if best is None or score < 0.5:
        first = next(iter(source))
        nearest = f"; nearest is {best.title}: " + _misfit(best, source) if best else f" (first key: '{first}')"
        raise RefineDetError(f"{file}: weights of no known format{nearest}")
    return best


def _misfit(found: _Format, source: Mapping[str, Tensor]) -> str:
    keys = found.keys()
    known = {*keys, *(second for _, second in found.duplicates)}
    missing = [key for key in keys if key not in source]
    unexpected = [key for key in source if key not in known and not re.match(found.ignored, key)]
    parts = []
    if missing:
        parts.append(f"'{missing[0]}' is missing")
    if unexpected:
        parts.append(f"'{unexpected[0]}' is unexpected")
    return f"{', '.join(parts)} ({len(missing)} missing, {len(unexpected)} unexpected)" if parts else ""


def _check_keys(found: _Format, source: Mapping[str, Tensor], file: Path) -> None:
    misfit = _misfit(found, source)
    if misfit:
        raise RefineDetError(f"{file}: looks like {found.title}, but {misfit}")
    for first, second in found.duplicates:
        if second in source and not torch.equal(source[first], source[second]):
            raise RefineDetError(f"{file}: '{first}' and '{second}' should be one tensor, but differ")


def _config_for(
    found: _Format, source: Mapping[str, Tensor], dilations: Mapping[str, int], config: ModelConfig, file: Path
) -> ModelConfig:
    changes: dict[str, Any] = {**found.input, **found.form}
    if found.detector:
        arm, odm, deconv = (source[key] for key in found.heads)
        if arm.shape[0] != 4 * _ANCHORS_PER_CELL:
            raise RefineDetError(
                f"{file}: '{found.heads[0]}' has {arm.shape[0]} outputs; models with {_ANCHORS_PER_CELL} anchors per "
                f"cell have {4 * _ANCHORS_PER_CELL}"
            )
        if odm.shape[0] % _ANCHORS_PER_CELL or odm.shape[0] < 2 * _ANCHORS_PER_CELL:
            raise RefineDetError(
                f"{file}: '{found.heads[1]}' has {odm.shape[0]} outputs, which is no number of classes for "
                f"{_ANCHORS_PER_CELL} anchors per cell"
            )
        changes |= _OFFICIAL_ANCHORS
        changes["num_classes"] = odm.shape[0] // _ANCHORS_PER_CELL - 1
        changes["tcb_channels"] = deconv.shape[0]
        changes["tcb_deconv_kernel"] = deconv.shape[-1]
        if "fc6" in dilations and config.backbone == "vgg16":
            changes["fc6_dilation"] = dilations["fc6"]
        changes["inference"] = dataclasses.replace(InferenceConfig(), **_OFFICIAL_INFERENCE)
    try:
        return dataclasses.replace(config, **changes)
    except UsageError as error:
        raise RefineDetError(f"{file}: {error}") from None


def _made(entry: _Entry, source: Mapping[str, Tensor], target: Tensor, file: Path) -> Tensor:
    tensor = entry.make(*(source[key] for key in entry.sources))
    # Legacy Caffe blobs have four sides whatever they hold.
    if _without_leading_ones(tensor.shape) != _without_leading_ones(target.shape):
        raise RefineDetError(
            f"{file}: '{entry.sources[0]}' has shape {tuple(source[entry.sources[0]].shape)}, the network needs "
            f"{tuple(target.shape)} for '{entry.target}'"
        )
    return tensor.reshape(target.shape)


def _without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    sides = list(shape)
    while sides and sides[0] == 1:
        del sides[0]
    return tuple(sides)


# The tables ----------------------------------------------------------------------------------------------------------


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _background_last(classes: int | None = None) -> Callable[[Tensor], Tensor]:
    """Move the first of each anchor's outputs to the end; rows are anchor by anchor. Of two, the move is a swap."""

    def make(tensor: Tensor) -> Tensor:
        per_anchor = classes or tensor.shape[0] // _ANCHORS_PER_CELL
        if per_anchor == 0 or tensor.shape[0] % per_anchor:
            return tensor  # its shape is wrong, which the caller reports
        rows = tensor.reshape(-1, per_anchor, *tensor.shape[1:])
        return torch.cat([rows[:, 1:], rows[:, :1]], dim=1).reshape(tensor.shape)

    return make


def _mean_or_variance(accumulated: Tensor, factor: Tensor) -> Tensor:
    """Caffe stores sums; its third blob is what to divide them by (0 where nothing was ever added)."""
    total = factor.reshape(-1)[0]
    return accumulated.reshape(-1) / total if total != 0 else accumulated.reshape(-1) * 0


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
_LEVELS = range(4)
_ARM_MAPS = ("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2")
_CAFFE, _TORCH = ("[0]", "[1]"), (".weight", ".bias")


def _layer(target: str, key: str, suffixes: tuple[str, str], make: Callable[..., Tensor] = _same) -> _Table:
    """Kernel and bias of a convolution."""
    return [
        _Entry(f"{target}.weight", (key + suffixes[0],), make),
        _Entry(f"{target}.bias", (key + suffixes[1],), make),
    ]


def _vgg_table(
    suffixes: tuple[str, str],
    name_of: Callable[[str], str],
    norms: tuple[str, str] | None = None,
) -> _Table:
    """The backbone; ``name_of`` turns Caffe's layer names into the file's. Without ``norms``, the ImageNet part."""
    table: _Table = []
    for name, number in _VGG.items():
        table += _layer(f"backbone.features.{number}", name_of(name), suffixes)
    for name in ("fc6", "fc7") if norms is None else ("fc6", "fc7", "conv6_1", "conv6_2"):
        table += _layer(f"backbone.{name}", name_of(name), suffixes)
    if norms is not None:
        table += [_Entry(f"backbone.conv{4 + i}_3_norm.weight", (key,), _same) for i, key in enumerate(norms)]
    return table


def _head_table(keys: Callable[[str, str, int], str], suffixes: tuple[str, str]) -> _Table:
    """Heads; ``keys`` is given ("arm" | "odm", "loc" | "conf", level)."""
    table: _Table = []
    for module, move in (("arm", _background_last(2)), ("odm", _background_last())):
        for level in _LEVELS:
            table += _layer(f"{module}.{level}.offsets", keys(module, "loc", level), suffixes)
            table += _layer(f"{module}.{level}.logits", keys(module, "conf", level), suffixes, move)
    return table


def _tcb_table(keys: Callable[[str, int], str], suffixes: tuple[str, str]) -> _Table:
    """Transfer connection blocks; ``keys`` is given ("conv1" | "conv2" | "conv3" | "deconv", level)."""
    table: _Table = []
    for level in _LEVELS:
        for part in ("conv1", "conv2", "conv3", "deconv")[: 4 if level < 3 else 3]:
            table += _layer(f"tcb.{level}.{part}", keys(part, level), suffixes)
    return table


def _caffe_tcb_key(part: str, level: int) -> str:
    pyramid = level + 3
    # The deconvolution carries the name of the map that it enlarges, which is the level above.
    return {
        "conv1": f"TL{pyramid}_1",
        "conv2": f"TL{pyramid}_2",
        "conv3": f"P{pyramid}",
        "deconv": f"P{pyramid + 1}-up",
    }[part]


def _caffe_vgg() -> _Format:
    """Official VGG-16 models (320 and 512 have the same layers)."""

    def head(module: str, part: str, level: int) -> str:
        return f"{_ARM_MAPS[level] if module == 'arm' else f'P{level + 3}'}_mbox_{part}"

    table = _vgg_table(_CAFFE, lambda name: name, norms=("conv4_3_norm[0]", "conv5_3_norm[0]"))
    table += _head_table(head, _CAFFE) + _tcb_table(_caffe_tcb_key, _CAFFE)
    return _Format(
        "an official RefineDet with VGG-16 (Caffe)",
        ("vgg16",),
        table,
        detector=True,
        input=_CAFFE_INPUT,
        form={"tcb_batch_norm": False, "fc6_dilation": 3},
        heads=("conv4_3_norm_mbox_loc[0]", "P3_mbox_conf[0]", "P4-up[0]"),
    )


def _numbered_name(prefix: str, extras: str = "") -> Callable[[str], str]:
    numbers: dict[str, str] = {name: f"{prefix}{number}" for name, number in _VGG.items()}
    numbers |= {"fc6": f"{prefix}31", "fc7": f"{prefix}33"}
    if extras:
        numbers |= {"conv6_1": extras.split()[0], "conv6_2": extras.split()[1]}
    return numbers.__getitem__


def _luuuyi() -> _Format:
    def tcb(part: str, level: int) -> str:
        return {
            "conv1": f"tcb0.{3 * level}",
            "conv2": f"tcb0.{3 * level + 2}",
            "conv3": f"tcb2.{3 * level + 1}",
            "deconv": f"tcb1.{level}",
        }[part]

    norms = ("conv4_3_L2Norm.weight", "conv5_3_L2Norm.weight")
    table = _vgg_table(_TORCH, _numbered_name("vgg.", "extras.0 extras.1"), norms=norms)
    table += _head_table(lambda module, part, level: f"{module}_{part}.{level}", _TORCH) + _tcb_table(tcb, _TORCH)
    return _Format(
        "a RefineDet of the luuuyi port (VGG-16)",
        ("vgg16",),
        table,
        detector=True,
        input=_SWAPPED_INPUT,
        form={"tcb_batch_norm": False, "fc6_dilation": 3},
        heads=("arm_loc.0.weight", "odm_conf.0.weight", "tcb1.0.weight"),
    )


def _dd604() -> _Format:
    def tcb(part: str, level: int) -> str:
        if level < 3:
            return f"pyramid_layer{level + 1}.{part}"
        return {"conv1": "pyramid_layer4.0", "conv2": "pyramid_layer4.2", "conv3": "pyramid_layer4.4"}[part]

    norms = ("L2Norm_conv4_3.weight", "L2Norm_conv5_3.weight")
    table = _vgg_table(_TORCH, _numbered_name("base.", "extra.0 extra.2"), norms=norms)
    table += _head_table(lambda module, part, level: f"{module}_{part}.{level}", _TORCH) + _tcb_table(tcb, _TORCH)
    # The same modules, registered once more as the stages that its forward pass runs through.
    doubles = [(f"extra.{number}", f"layer4.{number}") for number in (0, 2)]
    for number in (*_VGG.values(), 31, 33):
        stage, first = (1, 0) if number < 23 else (2, 23) if number < 30 else (3, 30)
        doubles.append((f"base.{number}", f"layer{stage}.{number - first}"))
    return _Format(
        "a RefineDet of the dd604 port (VGG-16)",
        ("vgg16",),
        table,
        detector=True,
        input=_CAFFE_INPUT,
        form={"tcb_batch_norm": False, "fc6_dilation": 6},
        heads=("arm_loc.0.weight", "odm_conf.0.weight", "pyramid_layer1.deconv.weight"),
        duplicates=tuple((a + suffix, b + suffix) for a, b in doubles for suffix in _TORCH),
    )


def _imagenet_vggs() -> list[_Format]:
    def features(prefix: str = "features.") -> _Table:
        table: _Table = []
        for number in _VGG.values():
            table += _layer(f"backbone.features.{number}", f"{prefix}{number}", _TORCH)
        return table

    def subsampled(first: str, second: str) -> _Table:
        # Paper, section 4: fc6 and fc7 become convolutions "via subsampling parameters". Every third row and column of
        # fc6's 7x7 kernel, every fourth of 4096 outputs.
        return [
            _Entry("backbone.fc6.weight", (f"{first}.weight",), lambda x: x.reshape(-1, 512, 7, 7)[::4, :, ::3, ::3]),
            _Entry("backbone.fc6.bias", (f"{first}.bias",), lambda x: x[::4]),
            _Entry("backbone.fc7.weight", (f"{second}.weight",), lambda x: x.flatten(1)[::4, ::4, None, None]),
            _Entry("backbone.fc7.bias", (f"{second}.bias",), lambda x: x[::4]),
        ]

    vgg = ("vgg16",)
    return [
        _Format(
            "VGG_ILSVRC_16_layers_fc_reduced (Caffe, backbone only)",
            vgg,
            _vgg_table(_CAFFE, lambda name: name),
            ignored=r"fc8",
            input=_CAFFE_INPUT,
        ),
        _Format("vgg16_reducedfc.pth (backbone only)", vgg, _vgg_table(_TORCH, _numbered_name("")), input=_CAFFE_INPUT),
        _Format(
            "torchvision's VGG-16 (backbone only)",
            vgg,
            features() + subsampled("classifier.0", "classifier.3"),
            ignored=r"classifier\.6\.",
            input=_IMAGENET_INPUT,
        ),
        _Format(
            "timm's VGG-16 (backbone only)",
            vgg,
            features() + subsampled("pre_logits.fc1", "pre_logits.fc2"),
            ignored=r"head\.fc\.",
            input=_IMAGENET_INPUT,
        ),
        _Format("the convolutions of VGG-16 (backbone only)", vgg, features(), input=_IMAGENET_INPUT),
    ]


def _imagenet_resnets() -> list[_Format]:
    formats = []
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        with torch.device("meta"):
            keys = getattr(torchvision.models, name)(weights=None).state_dict()
        table = [
            _Entry(f"backbone.{key}", (key,), _same)
            for key in keys
            if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
        ]
        formats.append(
            _Format(
                f"torchvision's or timm's ResNet-{name[6:]} (backbone only)",
                (name,),
                table,
                ignored=r"fc\.|.*num_batches_tracked$",
                input=_IMAGENET_INPUT,
                form={"backbone_layout": "torchvision"},
            )
        )
    return formats


def _caffe_convolution(target: str, target_norm: str, layer: str, norm: str, scale: str) -> _Table:
    """A convolution without bias, Caffe's BatchNorm (statistics) and Scale (gamma, beta)."""
    return [
        _Entry(f"{target}.weight", (f"{layer}[0]",), _same),
        _Entry(f"{target_norm}.running_mean", (f"{norm}[0]", f"{norm}[2]"), _mean_or_variance),
        _Entry(f"{target_norm}.running_var", (f"{norm}[1]", f"{norm}[2]"), _mean_or_variance),
        _Entry(f"{target_norm}.weight", (f"{scale}[0]",), _same),
        _Entry(f"{target_norm}.bias", (f"{scale}[1]",), _same),
    ]


def _kaiming_table() -> _Table:
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


def _caffe_residual(target: str, name: str) -> _Table:
    """A residual block of the official additions; ``name`` is what stands between "res" and "branch"."""
    table: _Table = []
    for branch in ("1", "2a", "2b", "2c"):
        names = (f"{kind}{name}branch{branch}" for kind in ("res", "bn", "scale"))
        table += _caffe_convolution(f"{target}.branch{branch}", f"{target}.branch{branch}_bn", *names)
    return table


def _caffe_resnet() -> _Format:
    """Official ResNet-101 models (320 and 512 have the same layers)."""
    maps = ("res3b3_relu", "res4b22_relu", "res5c_relu", "res6_relu")

    def head(module: str, part: str, level: int) -> str:
        return f"res{maps[level] if module == 'arm' else f'P{level + 3}'}_inter_mbox_{part}"

    table = _kaiming_table() + _caffe_residual("backbone.res6", "6_")
    for level in _LEVELS:
        for part in ("conv1", "conv2", "conv3", "deconv")[: 4 if level < 3 else 3]:
            key = _caffe_tcb_key(part, level)
            norm = "deconv_norm" if part == "deconv" else f"norm{part[-1]}"
            table += _caffe_convolution(f"tcb.{level}.{part}", f"tcb.{level}.{norm}", key, f"{key}_bn", f"{key}_scale")
        table += _caffe_residual(f"arm.{level}.block", f"{maps[level]}_inter_")
        table += _caffe_residual(f"odm.{level}.block", f"P{level + 3}_inter_")
    table += _head_table(head, _CAFFE)
    return _Format(
        "an official RefineDet with ResNet-101 (Caffe)",
        ("resnet101",),
        table,
        detector=True,
        input=_CAFFE_INPUT,
        form={"tcb_batch_norm": True, "backbone_layout": "caffe", "prediction_blocks": True},
        heads=("resres3b3_relu_inter_mbox_loc[0]", "resP3_inter_mbox_conf[0]", "P4-up[0]"),
    )


def _formats() -> list[_Format]:
    return [
        _caffe_vgg(),
        _luuuyi(),
        _dd604(),
        *_imagenet_vggs(),
        *_imagenet_resnets(),
        _Format(
            "the ImageNet ResNet-101 of its authors (Caffe, backbone only)",
            ("resnet101",),
            _kaiming_table(),
            ignored=r"fc1000\[",
            input=_CAFFE_INPUT,
            form={"backbone_layout": "caffe"},
        ),
        _caffe_resnet(),
    ]
