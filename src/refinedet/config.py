"""Configuration: frozen dataclasses, the presets, and their JSON round trip.

Standard library only, so that the command line can answer ``--help`` without importing torch. Every number of the
paper's presets names its source; "reference" means the official Caffe code.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from refinedet.errors import RefineDetError, UsageError
from refinedet.files import read_json, write_text

BackboneName = Literal[
    "vgg16", "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d", "timm"
]


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How raw outputs become detections (paper, section 4 "Inference")."""

    score_threshold: float = 0.01
    """Class scores at or below this are dropped before NMS (official code: confidence_threshold 0.01)."""
    candidates: int = 400
    """How many (anchor, class) pairs of highest score go into NMS (paper: 400; official code: 1000)."""
    candidates_per: Literal["image", "class"] = "image"
    """Whether ``candidates`` counts pairs of the whole image (the paper) or of each class (the official code)."""
    nms_iou: float = 0.45
    """Within a class, a box that overlaps a better one by more than this is dropped (paper, section 4)."""
    max_detections: int = 200
    """Detections kept per image (paper: 200; official code: 500)."""
    soft_nms_iou: float | None = None
    """Then lower the score of a box to ``score * (1 - IoU)`` where it overlaps a better one of its class by more than
    this (linear Soft-NMS). None: do not. The official code does it for COCO at a single scale, with 0.3."""

    def __post_init__(self) -> None:
        _require(0 <= self.score_threshold < 1, "score_threshold", self.score_threshold, "in [0, 1)")
        _require(self.candidates >= 1, "candidates", self.candidates, "at least 1")
        _require(0 <= self.nms_iou <= 1, "nms_iou", self.nms_iou, "in [0, 1]")
        _require(self.max_detections >= 1, "max_detections", self.max_detections, "at least 1")
        _require(
            self.soft_nms_iou is None or 0 <= self.soft_nms_iou <= 1,
            "soft_nms_iou",
            self.soft_nms_iou,
            "in [0, 1] or none",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and everything its weights depend on, input normalisation included."""

    backbone: BackboneName = "vgg16"
    """Feature extractor; taps at strides 8, 16, 32 and 64. "timm" takes the network that ``timm_name`` names."""
    timm_name: str = ""
    """With backbone "timm": a timm model with feature maps of stride 8, 16 and 32, such as "inception_resnet_v2"."""
    backbone_layout: Literal["torchvision", "caffe"] = "torchvision"
    """Of ResNet-50 and -101. "caffe": stride 2 on the first 1x1 convolution of a stage instead of its 3x3 one, and a
    first pooling without padding that rounds up, as Caffe's ImageNet weights and the official code have it."""
    prediction_blocks: bool = False
    """A residual block (256, 256, 1024, with projection) before every ARM and ODM head (official ResNet-101 code; not
    in the paper)."""
    num_classes: int = 20
    """Object classes, background not counted."""
    image_size: tuple[int, int] = (320, 320)
    """Height and width in pixels that pictures are warped to; multiples of 64."""
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0)
    """Side of the square anchor of each level, in pixels of the network input; the same for 320 and 512
    (official code; the paper says "scales of 4 times the stride")."""
    aspect_ratios: tuple[float, ...] = (1.0, 2.0, 0.5)
    """Width / height of the anchors of a cell, in this order (paper, section 4)."""
    offset_std: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """Offsets are multiplied by this before they are applied to an anchor ("variance" in Caffe)."""
    tcb_channels: int = 256
    """Channels of the transfer connection blocks and of the ODM's feature maps (paper, figure 2)."""
    tcb_batch_norm: bool = False
    """Batch normalisation in the transfer connection blocks (official code: off for VGG-16, on for ResNet)."""
    tcb_deconv_kernel: int = 2
    """Side of the transfer connection blocks' deconvolution: 2 (official code), 3 (the dd604 port) or 4 (figure 2)."""
    fc6_dilation: int = 3
    """Dilation of VGG-16's fc6: 3 (official code) or 6 (SSD and some ports); no effect on other backbones."""
    tcb_attention: bool = False
    """Squeeze-and-excitation attention over the channels that a transfer connection block puts out (the paper,
    section 6, names attention as future work)."""
    tcb: bool = True
    """False cuts the transfer connection blocks and the ARM: one multi-class head on each map of the backbone, as in
    SSD (paper, Table 2, last column)."""
    two_step: bool = True
    """False lets the ODM start from the tiled anchors instead of the refined ones; the ARM still filters (paper,
    Table 2, "two-step cascaded regression")."""
    backbone_norm: Literal["batch", "frozen"] = "batch"
    """"frozen" keeps the backbone's batch-norm statistics and scales as they were imported; no effect on VGG-16."""
    frozen_stages: int = 0
    """Leading stages of a ResNet that are not trained: 1 is the stem, 2 the stem and layer1, and so on."""
    negative_threshold: float = 0.99
    """Theta: an anchor whose negative confidence in the ARM exceeds this is filtered (paper, section 3; 1.0 filters
    nothing)."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from pixel values in 0..255, in the order of ``channel_order``. Default: torchvision's ImageNet."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides the result. (104, 117, 123) with std 1 and "bgr" is what Caffe-born weights want."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the network input."""
    resize: Literal["bilinear", "antialias"] = "bilinear"
    """How a picture is warped to ``image_size``: plain bilinear, as the official models want, or antialiased."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """Post-processing."""

    def __post_init__(self) -> None:
        _require(self.num_classes >= 1, "num_classes", self.num_classes, "at least 1")
        timm = self.backbone == "timm"
        _require(bool(self.timm_name) == timm, "timm_name", self.timm_name, "given with the backbone 'timm', and only")
        _require(
            self.backbone_layout == "torchvision" or self.backbone in ("resnet50", "resnet101"),
            "backbone_layout",
            self.backbone_layout,
            f"'torchvision' for the backbone {self.backbone}",
        )
        _require(not timm or self.backbone_norm == "batch", "backbone_norm", self.backbone_norm, "'batch' with timm")
        _require(not timm or self.frozen_stages == 0, "frozen_stages", self.frozen_stages, "0 with timm")
        _require(self.tcb or not self.tcb_attention, "tcb_attention", self.tcb_attention, "False without tcb")
        height, width = self.image_size
        _require(
            height >= 64 and width >= 64 and height % 64 == 0 and width % 64 == 0,
            "image_size",
            self.image_size,
            "two multiples of 64",
        )
        _require(len(self.anchor_sizes) == 4, "anchor_sizes", self.anchor_sizes, "one size for each of the 4 levels")
        _require(min(self.anchor_sizes) > 0, "anchor_sizes", self.anchor_sizes, "positive")
        _require(
            len(self.aspect_ratios) >= 1 and min(self.aspect_ratios) > 0,
            "aspect_ratios",
            self.aspect_ratios,
            "positive",
        )
        _require(min(self.offset_std) > 0, "offset_std", self.offset_std, "positive")
        _require(self.tcb_channels >= 1, "tcb_channels", self.tcb_channels, "at least 1")
        _require(self.tcb_deconv_kernel in (2, 3, 4), "tcb_deconv_kernel", self.tcb_deconv_kernel, "2, 3 or 4")
        _require(self.fc6_dilation >= 1, "fc6_dilation", self.fc6_dilation, "at least 1")
        _require(0 <= self.frozen_stages <= 5, "frozen_stages", self.frozen_stages, "between 0 and 5")
        _require(0 < self.negative_threshold <= 1, "negative_threshold", self.negative_threshold, "in (0, 1]")
        _require(min(self.std) > 0, "std", self.std, "positive")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The sampling law of the official code (annotated_data_layer, im_transforms, sampler). See data/augment.py."""

    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    expand_probability: float = 0.5
    """Chance that a picture is placed on a larger canvas of the mean colour."""
    expand_ratio: float = 4.0
    """Largest side of that canvas, in sides of the picture."""
    crop: bool = True
    """The seven batch samplers."""
    flip_probability: float = 0.5
    """Chance of a horizontal flip."""
    interpolations: tuple[Literal["linear", "area", "nearest", "cubic", "lanczos"], ...] = (
        "linear",
        "area",
        "nearest",
        "cubic",
        "lanczos",
    )
    """One is drawn for every picture."""
    mosaic_probability: float = 0.0
    """Chance that an input is put together from four pictures that meet in a random point, each cropped, distorted and
    flipped on its own but not expanded (not in the paper; for small data sets)."""
    mixup_probability: float = 0.0
    """Chance that a second input, made by the same law from another picture, shines through and both keep their targets
    (not in the paper; for long trainings on small data sets)."""

    def __post_init__(self) -> None:
        _require(0 <= self.expand_probability <= 1, "expand_probability", self.expand_probability, "in [0, 1]")
        _require(self.expand_ratio >= 1, "expand_ratio", self.expand_ratio, "at least 1")
        _require(0 <= self.flip_probability <= 1, "flip_probability", self.flip_probability, "in [0, 1]")
        _require(len(self.interpolations) >= 1, "interpolations", self.interpolations, "at least one name")
        _require(0 <= self.mosaic_probability <= 1, "mosaic_probability", self.mosaic_probability, "in [0, 1]")
        _require(0 <= self.mixup_probability <= 1, "mixup_probability", self.mixup_probability, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Matching, mining and the loss (paper, section 4; official code's multibox_loss_param)."""

    arm_positive_iou: float = 0.5
    """An anchor is positive for the ARM if its best overlap reaches this (the greedy step comes first)."""
    arm_negative_iou: float = 0.5
    """An unmatched anchor may be mined as a negative of the ARM if its best overlap is below this."""
    odm_positive_iou: float = 0.5
    """The same for the ODM, on refined anchors."""
    odm_negative_iou: float = 0.5
    """The same for the ODM, on refined anchors."""
    negatives_per_positive: float = 3.0
    """Hard negatives kept for each positive of an image (paper, section 4)."""
    classification: Literal["mining", "focal"] = "mining"
    """Cross-entropy over positives and hard negatives (the paper), or focal loss over all anchors that are neither
    ignored nor filtered (named by the paper, section 5.3; Lin et al., "Focal Loss for Dense Object Detection")."""
    focal_gamma: float = 2.0
    """How much focal loss turns away from easy anchors; 0, or at least 1."""
    focal_alpha: float = 0.25
    """Weight of objects in focal loss; background weighs 1 - alpha."""
    label_smoothing: float = 0.0
    """Share of each target of the ODM's classification that is spread evenly over all classes and background. Not for
    the ARM, whose background could then not reach the confidence that filtering asks for. Not in the paper."""

    def __post_init__(self) -> None:
        for name in ("arm", "odm"):
            positive, negative = getattr(self, f"{name}_positive_iou"), getattr(self, f"{name}_negative_iou")
            _require(0 < positive <= 1, f"{name}_positive_iou", positive, "in (0, 1]")
            _require(0 <= negative <= positive, f"{name}_negative_iou", negative, f"between 0 and {positive}")
        _require(
            self.negatives_per_positive >= 0, "negatives_per_positive", self.negatives_per_positive, "not negative"
        )
        # Between 0 and 1 the slope of (1 - p) ** gamma is infinite at p = 1, where easy anchors end up.
        _require(self.focal_gamma == 0 or self.focal_gamma >= 1, "focal_gamma", self.focal_gamma, "0 or at least 1")
        _require(0 < self.focal_alpha < 1, "focal_alpha", self.focal_alpha, "in (0, 1)")
        focal = self.classification == "focal"
        _require(
            0 <= self.label_smoothing < 1 and not (focal and self.label_smoothing),
            "label_smoothing",
            self.label_smoothing,
            "0 with focal loss" if focal else "in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, schedule and the running of a training."""

    iterations: int = 120_000
    """Updates of the weights."""
    batch_size: int = 32
    """Images per update, over all processes and accumulation steps."""
    accumulation_steps: int = 1
    """Each update is the mean of this many backward passes (Caffe's iter_size)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum (the paper), or AdamW (Loshchilov and Hutter, betas 0.9 and 0.999), which wants a smaller rate
    and a larger ``weight_decay``."""
    learning_rate: float = 1e-3
    """Rate of the weights; see ``bias_learning_rate_factor``."""
    schedule: Literal["milestones", "cosine"] = "milestones"
    """Multiply by ``gamma`` at each milestone, or follow a half cosine down to ``final_learning_rate_factor``."""
    milestones: tuple[int, ...] = (80_000, 100_000)
    """Iterations at which the rate drops."""
    gamma: float = 0.1
    """Factor of a drop."""
    final_learning_rate_factor: float = 0.01
    """Where the cosine ends, as a share of ``learning_rate``."""
    warmup_iterations: int = 0
    """Linear rise of the rate from nearly 0; the paper has none."""
    momentum: float = 0.9
    """Of SGD (paper, section 4)."""
    weight_decay: float = 5e-4
    """Paper, section 4; not applied to biases."""
    bias_learning_rate_factor: float = 2.0
    """Official code: lr_mult 2, decay_mult 0 for biases of convolutions."""
    backbone_learning_rate_factor: float = 1.0
    """Multiple of the rate for what ImageNet weights come with: less than 1 keeps more of what they know, 0 all of it.
    Not used where a training starts from random numbers. The paper has one rate."""
    gradient_clip_norm: float | None = None
    """Largest norm of the whole gradient; the paper does not clip."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay and evaluate and save that."""
    size_schedule: tuple[tuple[int, int], ...] = ()
    """Pairs (first iteration, side): train on smaller squares first, which is faster; anchors keep their pixel
    sizes. Before the first pair, and without any, the model's ``image_size`` is used."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the network; losses and box arithmetic stay in fp32."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on every current device."""
    compile: bool = False
    """torch.compile the network."""
    seed: int = 0
    """Of the weights, the order and the augmentation."""
    workers: int = 2
    """Processes per trainer that load and augment pictures."""
    keep_images: bool = False
    """Keep every decoded picture in memory, in each loading process; 0.6 MB each at 500x375 pixels. Saves decoding from
    the second epoch on, and most with mosaics, which take four pictures each."""
    log_every: int = 20
    """Iterations between lines of metrics.csv."""
    save_every: int = 1_000
    """Iterations between checkpoints (last/ and last.ckpt)."""
    evaluate_every: int = 5_000
    """Iterations between evaluations on the evaluation split; 0 evaluates only at the end."""
    evaluate_limit: int | None = None
    """Evaluate on the first so many pictures of the split while training; the end uses all."""
    train_split: str = "trainval"
    """Split to train on, where the data has splits."""
    evaluate_split: str = "test"
    """Split to evaluate on; never trained on."""
    metric: Literal["voc07", "voc", "coco"] = "voc07"
    """Which figure decides what "best" is."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the training pictures."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Matching and loss."""

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "accumulation_steps", "log_every", "save_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "warmup_iterations",
            "workers",
            "evaluate_every",
            "weight_decay",
            "bias_learning_rate_factor",
            "backbone_learning_rate_factor",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        _require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            "learning_rate",
            self.learning_rate,
            "positive",
        )
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(
            0 <= self.final_learning_rate_factor <= 1,
            "final_learning_rate_factor",
            self.final_learning_rate_factor,
            "in [0, 1]",
        )
        _require(
            self.gradient_clip_norm is None or self.gradient_clip_norm > 0,
            "gradient_clip_norm",
            self.gradient_clip_norm,
            "positive or none",
        )
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1) or none")
        _require(
            self.evaluate_limit is None or self.evaluate_limit >= 1,
            "evaluate_limit",
            self.evaluate_limit,
            "at least 1 or none",
        )
        _require(
            all(first >= 0 and side >= 64 and side % 64 == 0 for first, side in self.size_schedule),
            "size_schedule",
            self.size_schedule,
            "pairs of an iteration and a multiple of 64",
        )
        _require(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulation_steps ({self.accumulation_steps})",
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and how it is trained, under one name."""

    model: ModelConfig
    """The network."""
    train: TrainConfig
    """Its training."""
    summary: str
    """One line for ``refinedet models``."""


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UsageError(f"{name} must be {wanted}, not {value!r}")


ConfigT = TypeVar("ConfigT")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings of a config, ready for JSON."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"not a config: {config!r}")
    return dataclasses.asdict(config)


def from_dict(kind: type[ConfigT], values: Any, *, source: str = "config") -> ConfigT:
    """The config of class ``kind`` that ``to_dict`` wrote. Missing keys take their defaults.

    Raises:
        RefineDetError: an unknown key (the nearest one is suggested) or a value of the wrong type; ``source`` is
            named in the message.
    """
    result = _convert(kind, values, source)
    return typing.cast(ConfigT, result)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RefineDetError(f"{where}: expected an object with named values, found {value!r}")
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        for key in value:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                raise RefineDetError(f"{where}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))
        arguments = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()}
        try:
            return kind(**arguments)
        except RefineDetError as error:
            raise RefineDetError(f"{where}: {error}") from None
        except TypeError as error:
            raise RefineDetError(f"{where}: {str(error).split('() ')[-1]}") from None
    origin, arguments_of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments_of:
            return value
        raise RefineDetError(f"{where}: must be one of {', '.join(map(repr, arguments_of))}, not {value!r}")
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments_of:
            return None
        return _convert(next(a for a in arguments_of if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RefineDetError(f"{where}: expected a list, found {value!r}")
        kinds = [arguments_of[0]] * len(value) if arguments_of[-1] is Ellipsis else list(arguments_of)
        if len(kinds) != len(value):
            raise RefineDetError(f"{where}: expected {len(kinds)} values, found {len(value)}")
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RefineDetError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def save_json(config: Any, path: Path) -> None:
    """Write a config as indented JSON.

    Raises:
        RefineDetError: no permission, a full disk; what ``path`` held before is still there.
    """
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_json(kind: type[ConfigT], path: Path) -> ConfigT:
    """Read what ``save_json`` wrote.

    Raises:
        RefineDetError: the file is missing, is no JSON, or holds an unknown key; the message names the file.
    """
    return from_dict(kind, read_json(path), source=str(path))
