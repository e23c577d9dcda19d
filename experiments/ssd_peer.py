"""torchvision's SSD under our conditions: our backbone, batches, optimiser and evaluator; its own loss and NMS.

torchvision counts background as label 0 and the classes from 1; here classes count from 0 and background comes last.
``ssd_targets`` and ``SSDPeer.predict_arrays`` are the only two places that translate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from refinedet.config import ModelConfig, TrainConfig
from refinedet.data.records import DetectionDataset
from refinedet.detections import Detections
from refinedet.loggers import ConsoleLogger, CsvLogger, LoggerGroup
from refinedet.model.anchors import STRIDES
from refinedet.model.backbones import VGG16, ResNet
from refinedet.preprocess import preprocess
from refinedet.training.batches import training_batches
from refinedet.training.distributed import World
from refinedet.training.matching import Targets
from refinedet.training.optim import build_optimizer
from refinedet.training.run import CHECKPOINT_FILE, METRICS_FILE, load_checkpoint, save_checkpoint
from refinedet.training.trainer import Trainer
from refinedet.weights.convert import Fitted, fit
from refinedet.weights.store import WeightFile

SIZE = (300, 300)
"""Height and width of SSD300's input."""


class _Prepared(nn.Module):
    """In place of torchvision's resizing and normalising: our batches are both already."""

    def forward(
        self, images: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """(B, 3, H, W) and targets, unchanged."""
        return ImageList(images, [(images.shape[-2], images.shape[-1])] * len(images)), targets

    def postprocess(
        self, found: list[dict[str, Tensor]], _: list[tuple[int, int]], __: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes stay in pixels of the input."""
        return found


LEVEL_SCALES = (0.1, 0.2, 0.4, 0.8, 1.05)
"""Sides of the default boxes of strides 8 to 64 as a share of the input: those of RefineDet320's anchors, and the last
scale of torchvision's SSD300."""
LEVEL_RATIOS = ((2,), (2, 3), (2, 3), (2,))
"""Aspect ratios beside 1 of each of these levels; each ratio comes with its inverse, as in SSD300."""


class _Levels(ResNet):
    """RefineDet's ResNet, its maps by name as torchvision's SSD wants them."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """(B, 3, H, W) to four maps of strides 8, 16, 32 and 64."""
        return {str(level): x for level, x in enumerate(super().forward(images))}


def build_ssd(model: ModelConfig, weights: Mapping[str, Tensor] | None, source: str = "") -> SSD:
    """SSD over the backbone of a RefineDet.

    SSD300 as torchvision builds it if the backbone is VGG-16; over a ResNet, torchvision's heads, default boxes,
    matching, loss and NMS on the maps of strides 8, 16, 32 and 64 that RefineDet uses.

    Args:
        model: num_classes, backbone, backbone_norm, frozen_stages, image_size.
        weights: ImageNet weights of the backbone; VGG-16's in torchvision's layout, fc6 and fc7 subsampled as in
            RefineDet's backbone where they are there; None starts from random numbers.
        source: where they are from, for messages.

    Raises:
        RefineDetError: these are not weights of this backbone.
    """
    fitted = None if weights is None else fit(WeightFile.of_state(weights, source), model)
    if model.backbone == "vgg16":
        network = _build_ssd300(model.num_classes, fitted)
    else:
        levels = _Levels(model.backbone, norm=model.backbone_norm, frozen_stages=model.frozen_stages)
        if fitted is not None:
            fitted.fill(nn.ModuleDict({"backbone": levels}))
        boxes = DefaultBoxGenerator([list(ratios) for ratios in LEVEL_RATIOS], scales=[*LEVEL_SCALES], steps=[*STRIDES])
        network = SSD(levels, boxes, model.image_size, num_classes=model.num_classes + 1)
    network.transform = _Prepared()
    return network


def _build_ssd300(num_classes: int, fitted: Fitted | None) -> SSD:
    """SSD300-VGG16, every layer trained."""
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes + 1)
    if fitted is not None:
        own = VGG16()
        fitted.fill(nn.ModuleDict({"backbone": own}))
        body, (*rest, fully_connected) = network.backbone.features, network.backbone.extra[0]
        pairs = list(zip(_convolutions(own.features), _convolutions([*body, *rest]), strict=True))
        if "backbone.fc6" not in fitted.untrained:
            pairs += zip([own.fc6, own.fc7], _convolutions(fully_connected), strict=True)
        for ours, theirs in pairs:
            theirs.load_state_dict(ours.state_dict())
    return network


def _convolutions(layers: Sequence[nn.Module] | nn.Sequential) -> list[nn.Conv2d]:
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def ssd_targets(targets: Targets, device: torch.device) -> list[dict[str, Tensor]]:
    """Targets of a batch as torchvision wants them: classes from 1, no padding, no box without an area (it refuses)."""
    kept = targets.valid & (targets.boxes[..., 2:] > targets.boxes[..., :2]).all(dim=-1)
    return [
        {
            "boxes": boxes[keep].to(device, non_blocking=True),
            "labels": (labels[keep] + 1).to(device, non_blocking=True),
        }
        for boxes, labels, keep in zip(targets.boxes, targets.labels, kept, strict=True)
    ]


class SSDPeer:
    """A trained SSD as our evaluator wants it.

    Args:
        network: from ``build_ssd``.
        config: mean, std, channel order and resizing of its input; the rest says nothing about it.
        class_names: in label order, background not among them.
        size: height and width of its input.
    """

    def __init__(
        self, network: SSD, config: ModelConfig, class_names: Sequence[str], size: tuple[int, int] = SIZE
    ) -> None:
        self.network, self.config, self.class_names, self.size = network, config, tuple(class_names), size

    @torch.inference_mode()
    def predict_arrays(
        self, images: Sequence[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        """One ``Detections`` for each (H, W, 3) RGB image, boxes in its pixels, best first."""
        device = next(self.network.parameters()).device
        inputs = torch.from_numpy(np.stack([preprocess(image, self.config, self.size) for image in images]))
        self.network.eval()
        results = []
        for image, found in zip(images, self.network(inputs.to(device)), strict=True):
            rows, columns = image.shape[:2]
            factor = np.array([columns / self.size[1], rows / self.size[0]] * 2, dtype=np.float32)
            one = Detections(
                boxes=found["boxes"].cpu().numpy() * factor,
                scores=found["scores"].cpu().numpy(),
                labels=found["labels"].cpu().numpy() - 1,
                class_names=self.class_names,
                image_size=(columns, rows),
            )
            results.append(one if threshold is None else one.filter(threshold=threshold))
        return results


class SSDOutputs(nn.Module):
    """The raw outputs of an SSD: torchvision's own ``forward`` gives losses or detections, depending on its mode."""

    def __init__(self, network: SSD) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Outputs of the heads and the anchors of each image, from (B, 3, H, W)."""
        maps = self.network.backbone(images)
        features = [maps] if isinstance(maps, Tensor) else list(maps.values())
        batch = ImageList(images, [(images.shape[-2], images.shape[-1])] * len(images))
        return self.network.head(features), self.network.anchor_generator(batch, features)


def ssd_loss(network: SSD) -> Callable[[tuple[dict[str, Tensor], list[Tensor]], Targets], dict[str, Tensor]]:
    """Torchvision's matching and loss of ``SSDOutputs``, as the trainer wants them."""

    def criterion(outputs: tuple[dict[str, Tensor], list[Tensor]], targets: Targets) -> dict[str, Tensor]:
        heads = {name: value.float() for name, value in outputs[0].items()}
        anchors = outputs[1]
        wanted = ssd_targets(targets, anchors[0].device)
        matches = [
            network.proposal_matcher(box_iou(target["boxes"], own))
            if len(target["boxes"])
            else torch.full((len(own),), -1, dtype=torch.int64, device=own.device)
            for target, own in zip(wanted, anchors, strict=True)
        ]
        losses: dict[str, Tensor] = network.compute_loss(wanted, heads, anchors, matches)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    return criterion


def train_ssd(
    peer: SSDPeer,
    settings: TrainConfig,
    dataset: DetectionDataset,
    folder: Path,
    *,
    device: torch.device,
    stop: Callable[[], bool],
) -> bool:
    """Train with the loop, the batches, the optimiser and the schedule of a RefineDet of the same settings.

    Args:
        peer: with its first weights; trained in place.
        settings: iterations, batch, rates, precision, seed, workers, save_every.
        dataset: to train on.
        folder: receives metrics.csv and last.ckpt; a checkpoint that is there is continued, bit for bit on the same
            machine and number of threads.
        device: where to train.
        stop: asked after every iteration; True saves and ends the call.

    Returns:
        Whether the last iteration is done.

    Raises:
        RefineDetError: a loss that is no finite number, a bad checkpoint, a full disk.
    """
    outputs = SSDOutputs(peer.network)
    # The optimiser looks for a backbone in what it is given: pretrained layers may have a rate of their own.
    optimizer = build_optimizer(peer.network.to(device), settings)
    trainer = Trainer(outputs, ssd_loss(peer.network), settings, World(0, 1, device), optimizer)
    checkpoint = folder / CHECKPOINT_FILE
    if checkpoint.exists():
        trainer.load_state(load_checkpoint(checkpoint))

    def save() -> None:
        save_checkpoint(checkpoint, trainer.state())

    batches = training_batches(
        dataset,
        peer.config,
        settings,
        start=trainer.iteration,
        pin_memory=device.type == "cuda",
        image_size=peer.size,
    )
    folder.mkdir(parents=True, exist_ok=True)
    log = CsvLogger(folder / METRICS_FILE, resume_step=trainer.iteration or None)
    with LoggerGroup([ConsoleLogger(settings.iterations, start=trainer.iteration), log]) as loggers:
        if not trainer.run(batches, loggers, save=save, stop=stop):
            return False
        save()
    if trainer.average is not None:
        outputs.load_state_dict(trainer.average.network.state_dict())
    return True
