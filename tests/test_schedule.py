from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from refinedet.config import AugmentConfig, InferenceConfig, LossConfig, ModelConfig, TrainConfig
from refinedet.errors import UsageError
from refinedet.presets import PRESETS
from refinedet.schedule import (
    change_preset,
    epochs_of,
    iterations_of_epochs,
    iterations_of_minutes,
    with_iterations,
)

LIGHT = PRESETS["voc07-320-resnet18"]


def test_the_schedule_keeps_its_shares() -> None:
    train = with_iterations(TrainConfig(iterations=1000, warmup_iterations=100, milestones=(600, 900)), 50)
    assert (train.iterations, train.warmup_iterations, train.milestones) == (50, 5, (30, 45))
    sized = with_iterations(LIGHT.train, 112)
    assert (sized.warmup_iterations, sized.size_schedule) == (1, ((0, 192), (30, 256), (72, 320)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_its_own_length_stays_as_it_is(name: str) -> None:
    preset = PRESETS[name]
    assert change_preset(preset, {"iterations": preset.train.iterations}) == preset


def test_forty_iterations_do_not_end_in_the_warmup_at_a_small_size() -> None:
    train = change_preset(LIGHT, {"iterations": 40}).train
    assert train.warmup_iterations < 10
    assert train.size_schedule[-1][0] < 40
    assert train.size_schedule[-1][1] == 320


def test_what_is_given_itself_is_taken_as_it_is() -> None:
    train = change_preset(LIGHT, {"iterations": 400, "warmup_iterations": 50, "size_schedule": [[0, 320]]}).train
    assert (train.iterations, train.warmup_iterations, train.size_schedule) == (400, 50, ((0, 320),))


def test_fields_are_found_by_name_wherever_they_lie() -> None:
    changes: dict[str, Any] = {
        "image_size": 512,
        "candidates": 77,
        "seed": 5,
        "flip_probability": 0.25,
        "negatives_per_positive": 2.0,
    }
    preset = change_preset(LIGHT, changes)
    assert preset.model.image_size == (512, 512)
    assert preset.model.inference.candidates == 77
    assert preset.train.seed == 5
    assert preset.train.augment.flip_probability == 0.25
    assert preset.train.loss.negatives_per_positive == 2.0
    # Nothing else changed.
    back = {"image_size": (320, 320), "candidates": 1000, "seed": 0, "flip_probability": 0.5}
    assert change_preset(preset, {**back, "negatives_per_positive": 3.0}) == LIGHT


def test_whole_inner_configurations_can_be_given() -> None:
    augment = AugmentConfig(crop=False)
    train = change_preset(LIGHT, {"augment": augment, "seed": 3}).train
    assert train.augment == augment
    assert train.seed == 3


def test_no_two_configurations_share_a_field_name() -> None:
    kinds = (ModelConfig, TrainConfig, InferenceConfig, AugmentConfig, LossConfig)
    names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration": 5}, "unknown setting 'iteration': did you mean 'iterations'?"),
        ({"zzzz": 5}, "unknown setting 'zzzz'"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"iterations": "many"}, "iterations must be a whole number, not 'many'"),
        ({"image_size": 300}, "image_size must be a multiple of 64, not 300"),
        ({"flip_probability": 2}, "flip_probability must be at most 1, not 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        change_preset(LIGHT, changes)


def test_epochs_and_minutes_become_iterations() -> None:
    assert iterations_of_epochs(10, 160, 16) == 100
    assert iterations_of_epochs(1, 161, 16) == 11
    assert iterations_of_epochs(0.1, 16, 16) == 1
    assert epochs_of(TrainConfig(iterations=100, batch_size=16), 160) == 10
    assert iterations_of_minutes(2, 0.5) == 240
    assert iterations_of_minutes(0.001, 5.0) == 1


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_no_length_of_time_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="--epochs must be greater than 0"):
        iterations_of_epochs(value, 100, 16)
    with pytest.raises(UsageError, match="--minutes must be greater than 0"):
        iterations_of_minutes(value, 1.0)
