"""What a training will do: the call of its user, and the preset fitted to the data.

A preset says with ``fit_to_data`` that it does not know the length of the training and the batch size: they follow from
the images, unless the user names them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.data.records import DetectionDataset
from refinedet.errors import UsageError
from refinedet.loggers import Logger
from refinedet.model.network import RefineDetNetwork
from refinedet.presets import PRESETS, get_preset
from refinedet.provenance import Provenance
from refinedet.schedule import change_preset, check_minutes, iterations_of_epochs, with_iterations
from refinedet.trackers import check_trackers
from refinedet.training.batches import choose_workers
from refinedet.training.data import DataChoice, TrainingData
from refinedet.training.data_check import require_few_repairs, require_measurable, require_objects
from refinedet.training.distributed import World
from refinedet.training.pace import choose_precision
from refinedet.training.run import RunConfig

_LOG = logging.getLogger(__name__)
DEFAULT_PRESET = "finetune"
OWN_NETWORK = "own"
"""``RunConfig.init_weights`` of a network that the caller made."""
_KEPT_BYTES = 2**30
"""Decoded images are kept in memory up to this size."""
_SCHEDULE = ("warmup_iterations", "milestones", "size_schedule")


def chosen_preset(preset: Preset | str, changes: Mapping[str, Any]) -> Preset:
    """The preset that a call means, with other values for the fields that it names.

    Raises:
        UsageError: an unknown preset or field, or a value that is refused.
    """
    return change_preset(get_preset(preset) if isinstance(preset, str) else preset, changes)


def name_of(preset: Preset | str) -> str:
    """Name of a preset, "custom" if it has none."""
    if isinstance(preset, str):
        return preset
    return next((name for name, other in PRESETS.items() if other == preset), "custom")


def fitted(preset: Preset, images: DetectionDataset, given: Collection[str], epochs: float | None = None) -> Preset:
    """A preset whose batch size and length fit the images, where the preset leaves that to the data.

    Args:
        preset: as the user changed it.
        images: to train on.
        given: names of the fields that the user gave; they stay.
        epochs: length of the training instead of iterations.

    Raises:
        UsageError: no number of epochs.
    """
    train = preset.train
    if preset.fit_to_data:
        if "batch_size" not in given:
            train = dataclasses.replace(train, batch_size=_batch_size(len(images), train))
        if "keep_images" not in given:
            size = sum(record.width * record.height * 3 for record in images.records)
            train = dataclasses.replace(train, keep_images=size <= _KEPT_BYTES)
        if "iterations" not in given and epochs is None:
            train = _with_length(train, iterations_for(len(images)) * 16 // train.batch_size, given)
    if epochs is not None:
        train = _with_length(train, iterations_of_epochs(epochs, len(images), train.batch_size), given)
    return dataclasses.replace(preset, train=train)


def _with_length(train: TrainConfig, iterations: int, given: Collection[str]) -> TrainConfig:
    """``with_iterations``, but what the user gave of the schedule stays as it is."""
    kept = {name: getattr(train, name) for name in _SCHEDULE if name in given}
    return dataclasses.replace(with_iterations(train, iterations), **kept)


def _batch_size(images: int, train: TrainConfig) -> int:
    """The preset's batch size, halved until the images fill it."""
    size = train.batch_size
    while size > 4 and size > images:
        size //= 2
    return size


def iterations_for(images: int) -> int:
    """Iterations of 16 images for a fine-tuning on so many images.

    Few images are shown more often: 160 images 30 times, 60 images 48 times, 20 images 120 times, but none more than
    300 times; and from 1,440 images on ten times (docs/results.md, "Fine-tuning on small datasets").
    """
    wanted = max(150, 10 * round(30 * math.sqrt(images / 160)), round(10 * images / 16))
    return min(wanted, max(20, 300 * images // 16))


@dataclass(frozen=True)
class Call:
    """A training as its user asked for it."""

    preset: Preset
    """With the values that the user gave."""
    given: frozenset[str]
    """Names of the fields that the user gave."""
    choice: DataChoice
    """The data."""
    epochs: float | None
    """Length of the training, if it was given in epochs."""
    minutes: float | None
    """Length of the training, if it was given in minutes."""
    init_weights: str | Path | None
    """See ``train``."""
    init: str | Path | None
    """See ``train``; what the preset says is filled in."""
    network: Callable[[ModelConfig], RefineDetNetwork] | None
    """See ``train``."""
    criterion: Callable[[ModelConfig], nn.Module] | None
    """See ``train``."""
    loggers: tuple[str, ...] = ()
    """Those that were given by name."""

    def __post_init__(self) -> None:
        """Fill in the start of the preset, and refuse contradictions.

        Raises:
            UsageError: no data, two starts, or two lengths.
        """
        if not self.choice.paths:
            raise UsageError("nothing to train on: give the folder of the annotated images as data (--data DATA)")
        if self.init is not None and self.init_weights is not None:
            raise UsageError("give either a model to start from or backbone weights, not both")
        lengths = [self.epochs is not None, self.minutes is not None, "iterations" in self.given]
        if sum(lengths) > 1:
            raise UsageError("give one of --iterations, --epochs and --minutes")
        if self.minutes is not None:
            check_minutes(self.minutes)
        if self.init is None and self.init_weights is None and self.network is None:
            object.__setattr__(self, "init", self.preset.init)

    @property
    def inputs(self) -> list[str | Path]:
        """Every file and folder that is read."""
        paths = (*self.choice.paths, *self.choice.evaluate_paths, self.init, self.init_weights)
        return [path for path in paths if path is not None]

    def fitted(self, data: TrainingData, device: torch.device) -> Preset:
        """The preset with the splits, the length, the precision and the loading that fit the data and the device."""
        preset = fitted(self.preset, data.train, self.given, self.epochs)
        workers = preset.train.workers
        if "workers" not in self.given:
            workers = choose_workers(preset.train, preset.model.image_size, device)
        train = dataclasses.replace(
            preset.train,
            train_split=data.train_split,
            evaluate_split=data.evaluate_split,
            precision=choose_precision(preset.train.precision, device),
            workers=workers,
        )
        return dataclasses.replace(preset, train=train)

    def run_config(self, preset: Preset, class_names: tuple[str, ...], source: str, device: torch.device) -> RunConfig:
        """What config.json of the run will say."""
        choice = self.choice
        return RunConfig(
            preset=preset,
            data=texts(choice.paths),
            class_names=class_names,
            init_weights=source,
            evaluate_data=texts(choice.evaluate_paths),
            classes=choice.classes,
            group_by=choice.group_by,
            skip_broken=choice.skip_broken,
            loggers=self.loggers,
            provenance=Provenance.now(device),
        )

    def own_network(self, config: ModelConfig) -> RefineDetNetwork | None:
        """The user's network, if there is one."""
        return None if self.network is None else self.network(config)

    def own_criterion(self, config: ModelConfig) -> nn.Module | None:
        """The user's loss, if there is one."""
        return None if self.criterion is None else self.criterion(config)


def texts(paths: Sequence[Path]) -> tuple[str, ...]:
    """Paths as config.json holds them."""
    return tuple(map(str, paths))


def check_data(data: TrainingData, preset: Preset, world: World) -> None:
    """Refuse data from which nothing can be learned, or on which nothing can be measured."""
    require_objects(data.train, preset.model.image_size)
    repaired = require_few_repairs(data.train)
    if repaired is not None and world.is_main:
        _LOG.warning("%s", repaired)
    evaluation = data.evaluation
    if evaluation is not None:
        world.on_main(lambda: require_measurable(evaluation))


class CallbackLogger:
    """A function as a logger."""

    def __init__(self, function: Callable[[int, Mapping[str, float]], None]) -> None:
        """Call ``function`` with iteration and values."""
        self._function = function

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on."""
        self._function(step, values)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class Ends:
    """What a training reports to and asks from its caller."""

    stop: Callable[[], bool] | None
    """See ``train``."""
    loggers: tuple[Logger, ...]
    """Those that were given as objects."""
    names: tuple[str, ...]
    """Of the loggers that were given by name."""

    @classmethod
    def of(
        cls,
        stop: Callable[[], bool] | None,
        loggers: Sequence[Logger | str],
        on_log: Callable[[int, Mapping[str, float]], None] | None,
        begun: Sequence[str] = (),
    ) -> Ends:
        """Of the arguments of ``train``, and the names of the loggers that a run began with.

        Raises:
            UsageError: a logger is unknown, or its package is missing.
        """
        given = [loggers] if isinstance(loggers, str) else loggers
        names = tuple(dict.fromkeys([*begun, *(logger for logger in given if isinstance(logger, str))]))
        check_trackers(names)
        objects = [logger for logger in given if not isinstance(logger, str)]
        return cls(stop, (*objects, *(() if on_log is None else (CallbackLogger(on_log),))), names)
