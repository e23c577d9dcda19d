from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest

from refinedet.config import AugmentConfig, InferenceConfig, LossConfig, ModelConfig, Preset, TrainConfig
from refinedet.dataclass_json import from_dict, load_json, save_json, to_dict
from refinedet.errors import RefineDetError, UsageError
from refinedet.presets import PRESETS, get_preset
from refinedet.ranges import Range


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    save_json(preset, tmp_path / "config.json")
    again = load_json(Preset, tmp_path / "config.json")
    assert again == preset
    assert isinstance(again.model.image_size, tuple)
    assert isinstance(again.train.augment.interpolations, tuple)


def test_nondefault_values_survive_json(tmp_path: Path) -> None:
    config = TrainConfig(
        iterations=7,
        batch_size=6,
        accumulation_steps=3,
        milestones=(),
        gradient_clip_norm=2.0,
        ema_decay=0.99,
        evaluate_limit=5,
        precision="fp16",
        augment=AugmentConfig(photometric=False, interpolations=("area",)),
        loss=LossConfig(arm_negative_iou=0.4),
    )
    save_json(config, tmp_path / "c.json")
    assert load_json(TrainConfig, tmp_path / "c.json") == config


def test_whole_numbers_become_floats() -> None:
    config = from_dict(ModelConfig, {"negative_threshold": 1, "mean": [104, 117, 123]})
    assert config.mean == (104.0, 117.0, 123.0)
    assert isinstance(config.negative_threshold, float)


def test_missing_keys_take_defaults() -> None:
    assert from_dict(ModelConfig, {"backbone": "resnet18"}) == ModelConfig(backbone="resnet18")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbon": "vgg16"}, "unknown key 'backbon', did you mean 'backbone'?"),
        ({"inference": {"nms_io": 0.5}}, "inference: unknown key 'nms_io', did you mean 'nms_iou'?"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"backbone": "vgg17"}, "backbone: must be one of 'vgg16'"),
        ({"num_classes": "20"}, "num_classes: expected int, found '20'"),
        ({"num_classes": True}, "num_classes: expected int, found True"),
        ({"num_classes": 1.5}, "num_classes: expected int, found 1.5"),
        ({"image_size": [320]}, "image_size: expected 2 values, found 1"),
        ({"image_size": 320}, "image_size: expected a list"),
        ({"image_size": [320, 321]}, "image_size must be a multiple of 64, not 321 in (320, 321)"),
        ({"inference": 3}, "inference: expected an object"),
        ([], "expected an object"),
    ],
)
def test_bad_json_is_refused_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(RefineDetError, match=re.escape(message)) as caught:
        from_dict(ModelConfig, values, source="some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(RefineDetError, match=r"config\.json: cannot be read"):
        load_json(ModelConfig, path)
    path.write_text('{"backbone": ')
    with pytest.raises(RefineDetError, match=r"config\.json: not valid JSON"):
        load_json(ModelConfig, path)
    path.write_text(json.dumps({"num_classes": 0}))
    with pytest.raises(RefineDetError, match=r"config\.json: num_classes must be at least 1, not 0"):
        load_json(ModelConfig, path)


def test_missing_required_key_is_refused() -> None:
    with pytest.raises(RefineDetError, match="missing 1 required"):
        from_dict(Preset, {"model": {}, "train": {}})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ModelConfig, {"num_classes": 0}),
        (ModelConfig, {"image_size": (320, 0)}),
        (ModelConfig, {"anchor_sizes": (32.0,)}),
        (ModelConfig, {"aspect_ratios": ()}),
        (ModelConfig, {"negative_threshold": 0.0}),
        (ModelConfig, {"std": (1.0, 0.0, 1.0)}),
        (ModelConfig, {"frozen_stages": 6}),
        (InferenceConfig, {"nms_iou": 1.5}),
        (InferenceConfig, {"candidates": 0}),
        (AugmentConfig, {"expand_ratio": 0.5}),
        (AugmentConfig, {"flip_probability": 2.0}),
        (AugmentConfig, {"mosaic_probability": -0.1}),
        (AugmentConfig, {"mixup_probability": 1.1}),
        (LossConfig, {"arm_positive_iou": 0.4}),
        (LossConfig, {"label_smoothing": 1.0}),
        (LossConfig, {"label_smoothing": 0.1, "classification": "focal"}),
        (TrainConfig, {"backbone_learning_rate_factor": -0.1}),
        (TrainConfig, {"iterations": 0}),
        (TrainConfig, {"learning_rate": float("nan")}),
        (TrainConfig, {"momentum": 1.0}),
        (TrainConfig, {"ema_decay": 1.0}),
        (TrainConfig, {"batch_size": 4, "accumulation_steps": 3}),
        (TrainConfig, {"workers": -1}),
        (TrainConfig, {"weight_decay": float("inf")}),
        (TrainConfig, {"gamma": float("nan")}),
        (TrainConfig, {"gradient_clip_norm": float("inf")}),
        (TrainConfig, {"seed": -1}),
        (TrainConfig, {"seed": 2**64}),
        (TrainConfig, {"learning_rate": 10**400}),
        (TrainConfig, {"iterations": 10**400}),
        (TrainConfig, {"iterations": 2.5}),
        (TrainConfig, {"batch_size": True}),
        (TrainConfig, {"milestones": (5, -5)}),
        (TrainConfig, {"milestones": 5}),
        (TrainConfig, {"size_schedule": ((0, 100),)}),
        (TrainConfig, {"size_schedule": ((0, 128, 5),)}),
        (TrainConfig, {"metric": "voc7"}),
        (TrainConfig, {"train_split": 3}),
        (TrainConfig, {"augment": None}),
        (AugmentConfig, {"expand_ratio": float("inf")}),
        (AugmentConfig, {"crop": "yes"}),
        (LossConfig, {"focal_gamma": 0.5}),
        (ModelConfig, {"anchor_sizes": (32.0, 64.0, float("inf"), 256.0)}),
        (ModelConfig, {"anchor_sizes": (32.0, 64.0, 0.0, 256.0)}),
        (ModelConfig, {"aspect_ratios": (1.0,) * 20_000}),
        (ModelConfig, {"std": (1.0, 1e-30, 1.0)}),
        (ModelConfig, {"mean": (float("nan"), 0.0, 0.0)}),
        (ModelConfig, {"tcb_channels": 4_000}),
        (ModelConfig, {"num_classes": 300_000_000}),
        (ModelConfig, {"num_classes": 10_000, "aspect_ratios": (1.0,) * 32}),
        (ModelConfig, {"image_size": (64, 6_400_000)}),
    ],
)
def test_impossible_values_are_refused(kind: type[Any], values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be") as caught:
        kind(**values)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", [ModelConfig, InferenceConfig, AugmentConfig, LossConfig, TrainConfig])
def test_every_number_has_a_range(kind: type[Any]) -> None:
    """A number whose annotation states no range would let any finite value pass."""

    def without_range(hint: Any) -> bool:
        if typing.get_origin(hint) is Annotated:
            return not any(isinstance(extra, Range) for extra in hint.__metadata__)
        return hint in (int, float) or any(
            without_range(part) for part in typing.get_args(hint) if part is not Ellipsis
        )

    hints = typing.get_type_hints(kind, include_extras=True)
    assert [name for name, hint in hints.items() if without_range(hint)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, not inf"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"momentum": 1.0}, "momentum must be less than 1, not 1.0"),
        ({"milestones": (5, -5)}, "milestones must be at least 0, not -5 in (5, -5)"),
        ({"metric": "voc7"}, "metric must be one of 'voc07', 'voc', 'coco', not 'voc7'"),
        ({"iterations": 2.5}, "iterations must be a whole number, not 2.5"),
    ],
)
def test_messages_name_field_rule_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        TrainConfig(**change)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().num_classes = 3  # type: ignore[misc]


def test_unknown_preset_suggests_the_nearest() -> None:
    assert get_preset("smoke") is PRESETS["smoke"]
    with pytest.raises(UsageError, match="unknown preset 'voc07-320-vgg61': did you mean 'voc07-320-vgg16'"):
        get_preset("voc07-320-vgg61")
    with pytest.raises(UsageError, match="known: voc07-320-vgg16"):
        get_preset("@@@@")


def test_only_configs_become_dicts() -> None:
    with pytest.raises(TypeError, match="not a config"):
        to_dict(ModelConfig)


def test_errors_are_value_errors() -> None:
    assert issubclass(RefineDetError, ValueError)
    assert (RefineDetError.exit_code, UsageError.exit_code) == (1, 2)
