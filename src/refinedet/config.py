"""Configuration: frozen dataclasses whose annotations state the range of every number.

Standard library only, so that ``--help`` answers without torch. The named presets are in ``presets.py``, their JSON in
``dataclass_json.py``. "Official code" means the Caffe code of the authors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from refinedet.ranges import (
    Checked,
    Count,
    CountOrZero,
    Deviation,
    Factor,
    Level,
    Mean,
    Offset,
    Overlap,
    Range,
    Share,
    Side,
    require,
)

DEFAULT_THRESHOLD = 0.4
"""Lowest score of the detections that prediction returns, in Python and on the command line."""

BackboneName = Literal[
    "vgg16", "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d", "timm"
]
Precision = Literal["fp32", "bf16", "fp16", "auto"]
Interpolation = Literal["linear", "area", "nearest", "cubic", "lanczos"]


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Checked):
    """How raw outputs become detections (paper, section 4 "Inference")."""

    score_threshold: Annotated[float, Range(0, 1, below=True)] = 0.01
    """Class scores at or below this are dropped before NMS (official code: confidence_threshold 0.01)."""
    candidates: Annotated[int, Range(1, 10**6)] = 400
    """Number of (anchor, class) pairs with the highest scores that enter NMS (paper: 400; official code: 1000)."""
    candidates_per: Literal["image", "class"] = "image"
    """Whether ``candidates`` counts pairs of the whole image (the paper) or of each class (the official code)."""
    nms_iou: Share = 0.45
    """Within a class, a box that overlaps a better one by more than this is dropped (paper, section 4)."""
    max_detections: Annotated[int, Range(1, 10**6)] = 200
    """Detections kept per image (paper: 200; official code: 500)."""
    soft_nms_iou: Share | None = None
    """Lower the score of a box to ``score * (1 - IoU)`` where it overlaps a better one of its class by more than this
    (linear Soft-NMS); None switches it off. The official code uses 0.3 for COCO at a single scale."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The network and everything its weights depend on, input normalisation included."""

    backbone: BackboneName = "vgg16"
    """Feature extractor with outputs at strides 8, 16, 32 and 64. "timm" takes the network that ``timm_name`` names."""
    timm_name: str = ""
    """With backbone "timm": a timm model with feature maps of stride 8, 16 and 32, such as "inception_resnet_v2"."""
    backbone_layout: Literal["torchvision", "caffe"] = "torchvision"
    """Variant of ResNet-50 and -101. "caffe" has stride 2 on the first 1x1 convolution of a stage instead of its 3x3
    one, and a first pooling without padding that rounds up, as Caffe's ImageNet weights and the official code."""
    prediction_blocks: bool = False
    """A residual block (256, 256, 1024, with projection) before every ARM and ODM head (official ResNet-101 code; not
    in the paper)."""
    num_classes: Annotated[int, Range(1, 10_000)] = 20
    """Object classes, background not counted."""
    image_size: tuple[Side, Side] = (320, 320)
    """Height and width in pixels that images are warped to; multiples of 64."""
    anchor_sizes: tuple[Level, ...] = (32.0, 64.0, 128.0, 256.0)
    """Side of the square anchor of each level, in pixels of the network input; the same for 320 and 512
    (official code; the paper says "scales of 4 times the stride")."""
    aspect_ratios: tuple[Annotated[float, Range(0.01, 100)], ...] = (1.0, 2.0, 0.5)
    """Width / height of the anchors of a cell, in this order (paper, section 4)."""
    offset_std: tuple[Offset, Offset, Offset, Offset] = (0.1, 0.1, 0.2, 0.2)
    """Offsets are multiplied by this before they are applied to an anchor ("variance" in Caffe)."""
    tcb_channels: Annotated[int, Range(1, 1024)] = 256
    """Channels of the transfer connection blocks and of the ODM's feature maps (paper, figure 2)."""
    tcb_batch_norm: bool = False
    """Batch normalisation in the transfer connection blocks (official code: off for VGG-16, on for ResNet)."""
    tcb_deconv_kernel: Annotated[int, Range(2, 4)] = 2
    """Side of the transfer connection blocks' deconvolution: 2 (official code), 3 (the dd604 port) or 4 (figure 2)."""
    fc6_dilation: Annotated[int, Range(1, 32)] = 3
    """Dilation of VGG-16's fc6: 3 (official code) or 6 (SSD and some ports); no effect on other backbones."""
    tcb_attention: bool = False
    """Squeeze-and-excitation over the output channels of the transfer connection blocks (future work in section 6)."""
    tcb: bool = True
    """False removes the transfer connection blocks and the ARM: one multi-class head on each feature map of the
    backbone, as in SSD (paper, Table 2, last column)."""
    two_step: bool = True
    """False lets the ODM start from the tiled anchors instead of the refined ones; the ARM still filters (paper,
    Table 2, "two-step cascaded regression")."""
    backbone_norm: Literal["batch", "frozen"] = "batch"
    """"frozen" keeps the backbone's batch-norm statistics and scales as they were imported; no effect on VGG-16."""
    frozen_stages: Annotated[int, Range(0, 5)] = 0
    """Leading stages that are not trained: of a ResNet 1 is the stem, 2 the stem and layer1, and so on; of VGG-16 the
    blocks conv1 to conv5."""
    negative_threshold: Overlap = 0.99
    """Theta: an anchor whose negative confidence in the ARM exceeds this is filtered (paper, section 3; 1.0 filters
    nothing)."""
    mean: tuple[Mean, Mean, Mean] = (123.675, 116.28, 103.53)
    """Mean that is subtracted from pixel values in 0..255, in the order of ``channel_order``."""
    std: tuple[Deviation, Deviation, Deviation] = (58.395, 57.12, 57.375)
    """Divisor after the mean is subtracted. Weights from Caffe need mean (104, 117, 123), std 1 and "bgr"."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the network input."""
    resize: Literal["bilinear", "antialias"] = "bilinear"
    """How an image is resized to ``image_size``: bilinear without antialiasing, as in the official code, or with it."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """Post-processing."""

    def _check_together(self) -> None:
        timm = self.backbone == "timm"
        require(bool(self.timm_name) == timm, "timm_name", self.timm_name, "given with the backbone 'timm', and only")
        require(
            self.backbone_layout == "torchvision" or self.backbone in ("resnet50", "resnet101"),
            "backbone_layout",
            self.backbone_layout,
            f"'torchvision' for the backbone {self.backbone}",
        )
        require(not timm or self.backbone_norm == "batch", "backbone_norm", self.backbone_norm, "'batch' with timm")
        require(not timm or self.frozen_stages == 0, "frozen_stages", self.frozen_stages, "0 with timm")
        require(self.tcb or not self.tcb_attention, "tcb_attention", self.tcb_attention, "False without tcb")
        require(len(self.anchor_sizes) == 4, "anchor_sizes", self.anchor_sizes, "one size for each of the 4 levels")
        require(1 <= len(self.aspect_ratios) <= 32, "aspect_ratios", self.aspect_ratios, "1 to 32 ratios")
        # Each of the four levels has a 3x3 convolution of nine times so many weights for the classes.
        head = (self.num_classes + 1) * len(self.aspect_ratios) * self.tcb_channels
        require(head <= 10**7, "num_classes", self.num_classes, "less with so many aspect ratios and channels")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Checked):
    """The sampling law of the official code (annotated_data_layer, im_transforms, sampler). See data/augment.py."""

    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    expand_probability: Share = 0.5
    """Chance that an image is placed on a larger canvas of the mean colour."""
    expand_ratio: Annotated[float, Range(1, 100)] = 4.0
    """Largest side of that canvas, in sides of the image."""
    crop: bool = True
    """Random crops by the seven batch samplers of the official code."""
    flip_probability: Share = 0.5
    """Chance of a horizontal flip."""
    interpolations: tuple[Interpolation, ...] = ("linear", "area", "nearest", "cubic", "lanczos")
    """Interpolation methods, one of which is drawn for every image."""
    mosaic_probability: Share = 0.0
    """Chance that an input is put together from four images, each cropped, distorted and flipped on its own but not
    expanded (not in the paper; for small datasets)."""
    mixup_probability: Share = 0.0
    """Chance that a second input is blended in and both keep their targets (not in the paper; for long trainings)."""

    def _check_together(self) -> None:
        require(len(self.interpolations) >= 1, "interpolations", self.interpolations, "at least one name")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
    """Matching, mining and the loss (paper, section 4; official code's multibox_loss_param)."""

    arm_positive_iou: Overlap = 0.5
    """An anchor is positive for the ARM if its best overlap reaches this (the greedy step comes first)."""
    arm_negative_iou: Share = 0.5
    """An unmatched anchor may be mined as a negative of the ARM if its best overlap is below this."""
    odm_positive_iou: Overlap = 0.5
    """An anchor is positive for the ODM if the best overlap of its refined anchor reaches this."""
    odm_negative_iou: Share = 0.5
    """An unmatched anchor may be a hard negative of the ODM if its refined anchor overlaps less than this."""
    negatives_per_positive: Annotated[float, Range(0, 1e6)] = 3.0
    """Hard negatives kept for each positive of an image (paper, section 4)."""
    negatives_of_empty_images: Annotated[int, Range(0, 10**6)] = 0
    """Hard negatives kept in an image without positives; the official code keeps none."""
    classification: Literal["mining", "focal"] = "mining"
    """Cross-entropy over positives and hard negatives (the paper), or focal loss over all anchors that are neither
    ignored nor filtered (named by the paper, section 5.3; Lin et al., "Focal Loss for Dense Object Detection")."""
    focal_gamma: Annotated[float, Range(0, 100)] = 2.0
    """How strongly focal loss lowers the weight of easy anchors; 0, or at least 1."""
    focal_alpha: Annotated[float, Range(0, 1, above=True, below=True)] = 0.25
    """Weight of objects in focal loss; background weighs 1 - alpha."""
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of each target of the ODM's classification that is spread evenly over all classes and background. Not for
    the ARM, whose background could then not reach the confidence that filtering asks for. Not in the paper."""

    def _check_together(self) -> None:
        for stage in ("arm", "odm"):
            positive, negative = getattr(self, f"{stage}_positive_iou"), getattr(self, f"{stage}_negative_iou")
            require(negative <= positive, f"{stage}_negative_iou", negative, f"at most {stage}_positive_iou {positive}")
        # Between 0 and 1 the slope of (1 - p) ** gamma is infinite at p = 1, where easy anchors end up.
        require(self.focal_gamma == 0 or self.focal_gamma >= 1, "focal_gamma", self.focal_gamma, "0 or at least 1")
        mining = self.classification == "mining"
        require(mining or not self.label_smoothing, "label_smoothing", self.label_smoothing, "0 with focal loss")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """Optimisation, schedule and the running of a training."""

    iterations: Count = 120_000
    """Updates of the weights."""
    batch_size: Annotated[int, Range(1, 10**6)] = 32
    """Images per update, over all processes and accumulation steps."""
    accumulation_steps: Annotated[int, Range(1, 10**6)] = 1
    """Each update is the mean of this many backward passes (Caffe's iter_size)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum (the paper), or AdamW (Loshchilov and Hutter, betas 0.9 and 0.999), which needs a smaller rate
    and a larger ``weight_decay``."""
    learning_rate: Annotated[float, Range(0, 1e20, above=True)] = 1e-3
    """Highest learning rate of the weights; biases have ``bias_learning_rate_factor`` times this."""
    schedule: Literal["milestones", "cosine"] = "milestones"
    """Multiply by ``gamma`` at each milestone, or follow a half cosine down to ``final_learning_rate_factor``."""
    milestones: tuple[CountOrZero, ...] = (80_000, 100_000)
    """Iterations at which the rate drops."""
    gamma: Annotated[float, Range(0, 10)] = 0.1
    """Factor by which the rate drops at a milestone."""
    final_learning_rate_factor: Share = 0.01
    """Final learning rate of the cosine, as a share of ``learning_rate``."""
    warmup_iterations: CountOrZero = 0
    """Iterations of a linear rise of the rate from nearly 0; the paper has none."""
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Momentum of SGD (paper, section 4); ignored with AdamW."""
    weight_decay: Factor = 5e-4
    """Weight decay (paper, section 4); not applied to biases."""
    bias_learning_rate_factor: Factor = 2.0
    """Factor of the rate of convolution biases, which have no weight decay (official code: lr_mult 2, decay_mult 0)."""
    backbone_learning_rate_factor: Factor = 1.0
    """Factor of the rate of the backbone's pretrained layers (of VGG-16 conv1_1 to conv5_3): below 1 they change less.
    Not used in a training from random weights. The paper has one rate."""
    gradient_clip_norm: Annotated[float, Range(0, 1e9, above=True)] | None = None
    """Largest norm of the whole gradient; larger ones are scaled down to it. The paper does not clip."""
    ema_decay: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated and saved."""
    size_schedule: tuple[tuple[CountOrZero, Side], ...] = ()
    """Pairs (first iteration, side): train on smaller squares first, which is faster; anchors keep their pixel sizes.
    Before the first pair, and without any, the model's ``image_size`` is used."""
    precision: Precision = "fp32"
    """Autocast type of the network, not of the losses; "auto" is bf16 where the device is fast at it, else fp32."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on every current device."""
    compile: bool = False
    """Compile the network with torch.compile."""
    repeat_threshold: Share = 0.0
    """Draw images of rare classes more often: those of a class that is in a share f of the images,
    ``sqrt(repeat_threshold / f)`` times as often if f is smaller (Gupta et al., "LVIS", section 5.2, repeat factor
    sampling). 0 draws all images equally often."""
    mosaic_until: Share = 1.0
    """Share of the iterations with mosaics and mixup (see ``augment``); in the rest all inputs are single images."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seed of the weights, the order and the augmentation."""
    workers: Annotated[int, Range(0, 1024)] = 2
    """Processes per trainer that load and augment images. Not given, a training on a GPU has up to 8, one for each
    core that is free."""
    keep_images: bool = False
    """Keep every decoded image in memory, in each loading process; 0.6 MB each at 500x375 pixels. Saves decoding."""
    log_every: Count = 20
    """Iterations between lines of metrics.csv."""
    save_every: Count = 1_000
    """Iterations between checkpoints (last/ and last.ckpt)."""
    evaluate_every: CountOrZero = 5_000
    """Iterations between evaluations on the evaluation split; 0 evaluates only at the end."""
    evaluate_limit: Count | None = None
    """Use only so many images of the split in evaluations during training; the last evaluation uses all."""
    patience: CountOrZero = 0
    """End the training after this many evaluations in a row without a new best figure; 0 never does. Best with an
    average of the weights (``ema_decay``), because the learning rate has not come down by then."""
    train_split: str = "trainval"
    """Split to train on, where the data has splits."""
    evaluate_split: str = "test"
    """Split to evaluate on, or 'none'."""
    allow_outside: bool = False
    """Whether entries of annotation files and lists may name images outside the folder of the data."""
    metric: Literal["voc07", "voc", "coco"] = "voc07"
    """Metric by which the best weights are selected."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the training images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Matching and loss."""

    def _check_together(self) -> None:
        require(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulation_steps ({self.accumulation_steps})",
        )
        require(
            self.patience == 0 or self.evaluate_every > 0,
            "patience",
            self.patience,
            "0 without evaluations on the way (evaluate_every 0)",
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
    init: str | None = None
    """The model to start from by default; None starts from ImageNet weights of the backbone."""
    fit_to_data: bool = False
    """Let the data decide what is not given: iterations, batch size, splits, whether images are kept in memory."""
