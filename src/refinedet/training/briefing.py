"""What a training says before its first iteration: data, model, device and length, and doubts about choices."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from refinedet.config import Preset, TrainConfig
from refinedet.data.problems import shorten
from refinedet.data.records import DetectionDataset
from refinedet.model.network import count_parameters
from refinedet.schedule import epochs_of
from refinedet.training.data import TrainingData
from refinedet.training.pace import choose_precision

_FEW_OBJECTS = 5
_MANY_EPOCHS = 300


def describe(
    preset: Preset, data: TrainingData, network: nn.Module, source: str, device: torch.device, seconds: float | None
) -> str:
    """The paragraph before the first iteration: data, model, device, length.

    Args:
        preset: what will be trained, and how.
        data: the images.
        network: that will be trained.
        source: where its first weights come from.
        device: where it is trained.
        seconds: of an iteration, if it was measured.
    """
    train = preset.train
    height, width = preset.model.image_size
    parameters = count_parameters(network) / 1e6
    learned = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) / 1e6
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    time = "" if seconds is None else f", about {_duration(seconds * train.iterations)}"
    lines = [
        f"data: {_describe_images(data.train, data.train_split)}",
        f"model: {preset.model.backbone} at {height}x{width}, {parameters:.1f} million parameters ({learned:.1f} "
        f"learn), from {source}",
        f"device: {name}{threads}, {train.precision}",
        f"training: {train.iterations} iterations of {train.batch_size} images = "
        f"{epochs_of(train, len(data.train)):.3g} epochs{time}",
    ]
    if data.evaluation is None:
        lines.insert(1, "evaluation: none")
    else:
        lines.insert(1, f"evaluation: {_describe_images(data.evaluation, data.evaluate_split)}")
    return "\n".join([*data.notes, *lines])


def _describe_images(dataset: DetectionDataset, split: str) -> str:
    counts = _objects_of_classes(dataset)
    named = shorten([f"{name} {count}" for name, count in zip(dataset.class_names, counts, strict=True)])
    empty = sum(not len(record.labels) for record in dataset.records)
    layout = dataset.layout.upper()
    return (
        f"{layout}, split '{split}', {len(dataset)} images ({empty} without objects), {len(counts)} "
        f"class{'es' * (len(counts) != 1)} ({named})"
    )


def _objects_of_classes(dataset: DetectionDataset) -> list[int]:
    """Objects of each class that are learned from."""
    labels = [record.labels[~record.crowd] for record in dataset.records]
    both = np.concatenate([np.zeros(0, np.int64), *labels])
    return [int(count) for count in np.bincount(both, minlength=len(dataset.class_names))]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def doubts(preset: Preset, images: DetectionDataset, device: torch.device) -> list[str]:
    """Notes on choices that are known to hurt."""
    train, notes = preset.train, []
    if train.warmup_iterations >= train.iterations:
        notes.append(
            f"all {train.iterations} iterations are warm-up, so the full learning rate is never reached; lower "
            f"--warmup-iterations ({train.warmup_iterations})"
        )
    last = _last_size(train, preset.model.image_size)
    if last != preset.model.image_size:
        (height, width), (tested_height, tested_width) = last, preset.model.image_size
        notes.append(
            f"trained at {height}x{width} in the end, but tested at {tested_height}x{tested_width}; end "
            f"--size-schedule with {tested_height}, or leave it out"
        )
    epochs = epochs_of(train, len(images))
    if epochs > _MANY_EPOCHS:
        notes.append(f"{epochs:.0f} epochs: more than {_MANY_EPOCHS} rarely help; fewer --iterations save time")
    if train.precision == "bf16" and choose_precision("auto", device) != "bf16":
        notes.append(f"{device.type} has no fast bf16 here and may be many times slower with it; use --precision auto")
    if train.batch_size > len(images):
        notes.append(f"batches of {train.batch_size} exceed the {len(images)} images; lower --batch-size")
    counts = _objects_of_classes(images)
    few = [f"{name} ({n})" for name, n in zip(images.class_names, counts, strict=True) if n < _FEW_OBJECTS]
    if few:
        notes.append(f"fewer than {_FEW_OBJECTS} objects to learn from: {shorten(few)}")
    return notes


def _last_size(train: TrainConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    size = image_size
    for first, side in train.size_schedule:
        if train.iterations > first:
            size = (side, side)
    return size
