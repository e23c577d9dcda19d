"""Slow tests on real photos: the detector learns, and the model in the box does what its card says."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path

import pytest

from refinedet.config import AugmentConfig, Preset, TrainConfig
from refinedet.data.layouts import open_dataset
from refinedet.detector import RefineDet
from refinedet.evaluation.evaluate import evaluate
from refinedet.presets import PRESETS
from refinedet.training import data as training_data
from refinedet.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.shared_data]


def test_eight_photos_are_learned_by_heart(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without augmentation eight photos must be fitted nearly perfectly: mAP above 0.95 on the same eight."""
    everything = open_dataset(shared_data / "VOCdevkit", "train")
    small = [i for i, record in enumerate(everything.records) if 1 <= len(record.boxes) <= 4]
    eight = everything.subset(small[:8])
    monkeypatch.setattr(training_data, "open_joined", lambda *_, **__: eight)
    still = AugmentConfig(
        photometric=False, expand_probability=0.0, crop=False, flip_probability=0.0, interpolations=("linear",)
    )
    base = PRESETS["voc07-320-resnet18"]
    preset = Preset(
        model=dataclasses.replace(base.model, image_size=(192, 192)),
        train=TrainConfig(
            iterations=160,
            batch_size=8,
            learning_rate=0.01,
            milestones=(120,),
            warmup_iterations=20,
            gradient_clip_norm=10.0,
            precision="auto",
            workers=1,
            evaluate_every=0,
            train_split="train",
            evaluate_split="none",
            augment=still,
        ),
        summary="eight photos",
    )
    run = train(
        preset,
        shared_data / "VOCdevkit",
        out=tmp_path / "run",
        init_weights=shared_data / "../weights/resnet18_imagenet.safetensors",
        device="cpu",
    )
    assert evaluate(run.model, eight)["mAP"] > 0.95


def test_the_model_in_the_box_is_as_good_as_its_card_says(shared_data: Path) -> None:
    """On the last 250 photos of val, which were held out of its training; what the card says is what is printed."""
    model = RefineDet.from_pretrained("voc07-320-resnet18")
    assert model.metrics["split"] == "val[-250:]"
    assert model.metrics["images"] == 250
    assert model.metrics["mAP"] >= 0.65
    report = evaluate(model, shared_data / "VOCdevkit", model.metrics["split"])
    assert report["mAP"] == pytest.approx(model.metrics["mAP"], abs=0.005)
    card = files("refinedet").joinpath("weights/voc07-320-resnet18/README.md").read_text(encoding="utf-8")
    assert f"mAP {100 * model.metrics['mAP']:.2f} " in card
