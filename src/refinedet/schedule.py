"""How long a training takes and what follows from it: iterations from images, epochs or minutes, and the schedule.

The presets state their schedule in iterations, as the paper does. Each number of it is meant as a share of the run: a
training of another length keeps the shares. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from refinedet.config import AugmentConfig, InferenceConfig, LossConfig, ModelConfig, Preset, TrainConfig
from refinedet.errors import UsageError, did_you_mean

_OWNERS: dict[str, tuple[str, ...]] = {
    **{field.name: ("model",) for field in dataclasses.fields(ModelConfig)},
    **{field.name: ("train",) for field in dataclasses.fields(TrainConfig)},
    **{field.name: ("model", "inference") for field in dataclasses.fields(InferenceConfig)},
    **{field.name: ("train", "augment") for field in dataclasses.fields(AugmentConfig)},
    **{field.name: ("train", "loss") for field in dataclasses.fields(LossConfig)},
}
"""Where each field of a preset lies; no two configurations have a field of the same name."""


def with_iterations(train: TrainConfig, iterations: int) -> TrainConfig:
    """The same training in another number of iterations: warm-up, milestones and sizes keep their share of the run.

    Example:
        >>> with_iterations(TrainConfig(), 12_000).milestones
        (8000, 10000)
    """

    def moved(at: int) -> int:
        return round(at * iterations / train.iterations)

    return dataclasses.replace(
        train,
        iterations=iterations,
        warmup_iterations=moved(train.warmup_iterations),
        milestones=tuple(moved(at) for at in train.milestones),
        size_schedule=tuple((moved(first), side) for first, side in train.size_schedule),
    )


def iterations_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """Iterations that show every image ``epochs`` times, rounded up.

    Raises:
        UsageError: not a positive, finite number of epochs.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise UsageError(f"--epochs must be greater than 0, not {epochs:g}")
    return max(1, math.ceil(round(epochs * images / batch_size, 6)))


def iterations_of_minutes(minutes: float, seconds_per_iteration: float) -> int:
    """Iterations that fit into so many minutes, at least one.

    Raises:
        UsageError: not a positive, finite number of minutes.
    """
    check_minutes(minutes)
    return max(1, int(60 * minutes / seconds_per_iteration))


def check_minutes(minutes: float) -> None:
    """Refuse what is no length of time.

    Raises:
        UsageError: not a positive, finite number of minutes.
    """
    if not (math.isfinite(minutes) and minutes > 0):
        raise UsageError(f"--minutes must be greater than 0, not {minutes:g}")


def epochs_of(train: TrainConfig, images: int) -> float:
    """How often a training shows every image."""
    return train.iterations * train.batch_size / images


def change_preset(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """A preset with other values for some fields of its configuration, each given by its name alone.

    Another number of iterations takes the schedule along (``with_iterations``), except for what is given itself. One
    number for ``image_size`` means a square; of lists, tuples are made.

    Args:
        preset: where all other values come from.
        changes: values by field name, such as ``{"iterations": 500, "image_size": 512, "flip_probability": 0.0}``.

    Raises:
        UsageError: an unknown name (the nearest one is suggested) or a value that is refused.
    """
    for name in changes:
        if name not in _OWNERS:
            hint = did_you_mean(name, _OWNERS, otherwise="see TrainConfig and ModelConfig")
            raise UsageError(f"unknown setting '{name}': {hint}")
    if "iterations" in changes:
        # Made by the dataclass first, which refuses what is no number of iterations.
        length = dataclasses.replace(preset.train, iterations=changes["iterations"]).iterations
        preset = dataclasses.replace(preset, train=with_iterations(preset.train, length))
    by_owner: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, value in changes.items():
        if name == "image_size" and isinstance(value, int):
            value = (value, value)
        by_owner.setdefault(_OWNERS[name], {})[name] = _as_tuple(value)
    # The inner configurations first: an outer one is replaced with its inner ones as they then are.
    for owner in sorted(by_owner, key=len, reverse=True):
        preset = _replaced(preset, owner, by_owner[owner])
    return preset


def values_of(preset: Preset, names: Iterable[str]) -> dict[str, Any]:
    """The values of those fields that the names name; other names are passed over."""
    values = {}
    for name in names:
        config: Any = preset
        for part in _OWNERS.get(name, ()):
            config = getattr(config, part)
        if name in _OWNERS:
            values[name] = getattr(config, name)
    return values


def _replaced(config: Any, owner: tuple[str, ...], values: Mapping[str, Any]) -> Any:
    if not owner:
        return dataclasses.replace(config, **values)
    inner = _replaced(getattr(config, owner[0]), owner[1:], values)
    return dataclasses.replace(config, **{owner[0]: inner})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value
