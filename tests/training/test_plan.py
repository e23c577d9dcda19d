from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FolderFactory
from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset
from refinedet.errors import UsageError
from refinedet.presets import PRESETS
from refinedet.training import plan
from refinedet.training.briefing import describe, doubts
from refinedet.training.data import DataChoice, open_training_data
from refinedet.training.plan import chosen_preset, fitted, iterations_for, name_of
from refinedet.training.run import CONFIG_FILE, read_run_config
from refinedet.training.train import train

FINETUNE, CPU = PRESETS["finetune"], torch.device("cpu")


@pytest.fixture
def images(voc_folder: FolderFactory) -> DetectionDataset:
    return open_dataset(voc_folder(images=12, splits={}))


def many(dataset: DetectionDataset, count: int) -> DetectionDataset:
    return dataset.subset([index % len(dataset) for index in range(count)])


def test_a_preset_is_named_or_given() -> None:
    assert chosen_preset("finetune", {}) is not None
    assert chosen_preset("finetune", {"seed": 4}).train.seed == 4
    assert chosen_preset(FINETUNE, {"image_size": 128}).model.image_size == (128, 128)
    with pytest.raises(UsageError, match="unknown preset 'finetun': did you mean 'finetune'"):
        chosen_preset("finetun", {})
    assert (name_of("smoke"), name_of(PRESETS["smoke"])) == ("smoke", "smoke")
    assert name_of(chosen_preset("smoke", {"seed": 9})) == "custom"


def test_finetune_starts_from_the_bundled_model_and_tests_at_the_size_it_trains_at() -> None:
    assert FINETUNE.init == "voc07-320-resnet18"
    assert FINETUNE.model == PRESETS["voc07-320-resnet18"].model
    assert FINETUNE.train.size_schedule == ()
    assert 0 < FINETUNE.train.warmup_iterations < FINETUNE.train.iterations / 5


def test_the_length_follows_the_images(images: DetectionDataset) -> None:
    assert [iterations_for(count) for count in (1, 6, 20, 60, 160, 300, 5000)] == [20, 112, 150, 180, 300, 410, 3125]
    lengths = [iterations_for(count) for count in range(1, 4000)]
    assert lengths == sorted(lengths)
    train = fitted(FINETUNE, many(images, 640), ()).train
    assert (train.iterations, train.warmup_iterations, train.batch_size) == (600, 60, 16)


def test_what_is_given_stays(images: DetectionDataset) -> None:
    data = many(images, 640)
    given = {"iterations": 50, "batch_size": 8, "keep_images": False}
    train = fitted(chosen_preset(FINETUNE, given), data, given).train
    assert (train.iterations, train.batch_size, train.keep_images) == (50, 8, False)
    longer = {"warmup_iterations": 7}
    train = fitted(chosen_preset(FINETUNE, longer), data, longer).train
    assert (train.iterations, train.warmup_iterations) == (600, 7)
    # Half the batch, twice the iterations: the images are shown as often.
    half = {"batch_size": 8}
    assert fitted(chosen_preset(FINETUNE, half), data, half).train.iterations == 1200


def test_a_batch_is_not_larger_than_the_data(images: DetectionDataset) -> None:
    assert fitted(FINETUNE, images, ()).train.batch_size == 8
    assert fitted(FINETUNE, many(images, 3), ()).train.batch_size == 4


def test_images_are_kept_in_memory_while_they_fit(images: DetectionDataset) -> None:
    assert fitted(FINETUNE, images, ()).train.keep_images
    huge = dataclasses.replace(
        images, records=[dataclasses.replace(r, width=20000, height=20000) for r in images.records]
    )
    assert not fitted(FINETUNE, huge, ()).train.keep_images


def test_other_presets_are_not_fitted(images: DetectionDataset) -> None:
    for name in ("smoke", "voc07-320-vgg16", "voc07-320-resnet18"):
        assert fitted(PRESETS[name], images, ()) == PRESETS[name]


def test_epochs_give_the_length(images: DetectionDataset) -> None:
    train = fitted(PRESETS["voc07-320-resnet18"], many(images, 160), (), epochs=20).train
    assert (train.iterations, train.batch_size) == (200, 16)
    assert train.size_schedule == ((0, 192), (54, 256), (129, 320))
    with pytest.raises(UsageError, match="--epochs must be greater than 0"):
        fitted(FINETUNE, images, (), epochs=0)


def preset(**changes: Any) -> Preset:
    settings: dict[str, Any] = {"iterations": 10, "batch_size": 4, "milestones": ()}
    return Preset(model=ModelConfig(image_size=(128, 128)), train=TrainConfig(**{**settings, **changes}), summary="")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"warmup_iterations": 10}, "all 10 iterations are warm-up"),
        ({"size_schedule": ((0, 64),)}, "trained at 64x64 in the end, but tested at 128x128"),
        ({"size_schedule": ((0, 64), (10, 128))}, "trained at 64x64 in the end"),
        ({"iterations": 1000}, "333 epochs: more than 300 rarely help"),
        ({"batch_size": 16}, "batches of 16 exceed the 12 images"),
    ],
)
def test_choices_that_hurt_are_told(images: DetectionDataset, change: dict[str, Any], expected: str) -> None:
    assert [line for line in doubts(preset(**change), images, CPU) if line.startswith(expected)]


def test_good_choices_give_no_notes(images: DetectionDataset) -> None:
    assert doubts(preset(warmup_iterations=2, size_schedule=((0, 64), (5, 128))), images, CPU) == []
    assert doubts(fitted(FINETUNE, images, ()), images, CPU) == []


def test_bf16_on_a_processor_without_it_is_told(images: DetectionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = preset(precision="bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert [note for note in doubts(chosen, images, CPU) if note.startswith("cpu has no fast bf16")]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert doubts(chosen, images, CPU) == []


def test_classes_with_few_objects_are_named(images: DetectionDataset) -> None:
    few = images.subset([0, 1])
    counts = [sum(int((record.labels == label).sum()) for record in few.records) for label in (0, 1)]
    expected = f"fewer than 5 objects to learn from: cat ({counts[0]}), dog ({counts[1]})"
    assert expected in doubts(preset(batch_size=2, iterations=5), few, CPU)


def test_the_paragraph_tells_data_model_device_and_length(voc_folder: FolderFactory) -> None:
    data = open_training_data(DataChoice((voc_folder(images=12, splits={}),)), FINETUNE.train)
    network = torch.nn.Conv2d(1000, 500, 1)
    text = describe(preset(), data, network, "voc07-320-resnet18", torch.device("cpu"), seconds=12.0)
    lines = text.splitlines()
    assert lines[0] == "split: 10 train, 2 held out (seed 0, every class in both)"
    assert lines[1].startswith("data: VOC, split 'all', 10 images (1 without objects), 2 classes (cat ")
    assert lines[2].startswith("evaluation: VOC, split 'held out', 2 images")
    assert lines[3] == "model: vgg16 at 128x128, 0.5 million parameters (0.5 learn), from voc07-320-resnet18"
    assert lines[4].startswith("device: cpu, ")
    assert lines[4].endswith(", fp32")
    assert lines[5] == "training: 10 iterations of 4 images = 4 epochs, about 2 minutes"


def test_loading_processes_are_chosen_where_nobody_said_how_many(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "choose_workers", lambda settings, size, device: settings.workers + 1)
    folder = voc_folder()

    def workers(out: str, preset: Preset | str, **given: Any) -> int:
        given |= {"iterations": 1, "evaluate_split": "none"}
        run = train(preset, folder, out=tmp_path / out, init_weights="random", **given)
        return read_run_config(run.folder / CONFIG_FILE).preset.train.workers

    assert workers("a", "smoke") == 1
    assert workers("b", "smoke", workers=0) == 0
    assert workers("c", PRESETS["smoke"]) == 0  # a preset of one's own says how many
