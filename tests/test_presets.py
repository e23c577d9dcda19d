"""The presets against the figures of the paper and of the official solver files, and two iterations of each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from conftest import FolderFactory
from refinedet import cli
from refinedet.config import TrainConfig
from refinedet.data.layouts import open_dataset
from refinedet.model.network import RefineDetNetwork, count_parameters
from refinedet.presets import PRESETS
from refinedet.training.optim import learning_rate_at

# Preset: batch, iterations, (first iteration, learning rate) of each period.
PERIODS = {
    "voc07": (32, 120_000, [(0, 1e-3), (80_000, 1e-4), (100_000, 1e-5)]),
    "voc12": (32, 240_000, [(0, 1e-3), (160_000, 1e-4), (200_000, 1e-5)]),
    "coco": (32, 400_000, [(0, 1e-3), (280_000, 1e-4), (360_000, 1e-5)]),
    "voc07-from-coco": (32, 120_000, [(0, 5e-5), (80_000, 1e-5)]),
    "voc12-from-coco": (32, 160_000, [(0, 5e-5), (120_000, 1e-5)]),
}
PAPER = {
    "voc07-320-vgg16": "voc07",
    "voc07-512-vgg16": "voc07",
    "voc12-320-vgg16": "voc12",
    "voc12-512-vgg16": "voc12",
    "coco-320-vgg16": "coco",
    "coco-512-vgg16": "coco",
    "coco-320-resnet101": "coco",
    "voc07-320-vgg16-from-coco": "voc07-from-coco",
    "voc07-512-vgg16-from-coco": "voc07-from-coco",
    "voc12-320-vgg16-from-coco": "voc12-from-coco",
    "voc12-512-vgg16-from-coco": "voc12-from-coco",
    "voc07-320-resnet101": "voc07",
    "voc12-320-resnet101": "voc12",
}
OF_THE_PAPER = [name for name in PRESETS if name not in ("smoke", "finetune", "voc07-320-resnet18")]


def check_periods(train: TrainConfig, iterations: int, periods: list[tuple[int, float]]) -> None:
    assert train.iterations == iterations
    assert (train.schedule, train.warmup_iterations, train.gradient_clip_norm) == ("milestones", 0, None)
    for (first, rate), following in zip(periods, [*periods[1:], (iterations, 0.0)], strict=True):
        for iteration in (first, following[0] - 1):
            assert learning_rate_at(train, iteration) == pytest.approx(rate), iteration


@pytest.mark.parametrize("name", PAPER)
def test_schedules(name: str) -> None:
    train = PRESETS[name].train
    batch, iterations, periods = PERIODS[PAPER[name]]
    assert train.batch_size == batch
    assert (train.momentum, train.weight_decay, train.bias_learning_rate_factor) == (0.9, 5e-4, 2.0)
    check_periods(train, iterations, periods)


def test_resnet_512_has_batch_20_and_a_longer_schedule() -> None:
    train = PRESETS["coco-512-resnet101"].train
    assert train.batch_size == 20
    check_periods(train, 540_000, [(0, 1e-3), (400_000, 1e-4), (480_000, 1e-5)])


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_models_data_and_metric(name: str) -> None:
    preset = PRESETS[name]
    data, side, backbone = name.split("-")[:3]
    assert preset.model.backbone == backbone
    assert preset.model.image_size == (int(side), int(side))
    assert preset.model.anchor_sizes == (32, 64, 128, 256)
    assert preset.model.num_classes == (80 if data == "coco" else 20)
    assert preset.model.prediction_blocks == preset.model.tcb_batch_norm == (backbone == "resnet101")
    assert (preset.model.tcb, preset.model.two_step, preset.model.negative_threshold) == (True, True, 0.99)
    assert preset.train.metric == {"voc07": "voc07", "voc12": "voc", "coco": "coco"}[data]
    assert preset.train.loss.classification == "mining"


def test_preset_names_are_all_there() -> None:
    matrix = {f"{d}-{s}-{b}" for d in ("voc07", "voc12", "coco") for s in (320, 512) for b in ("vgg16", "resnet101")}
    from_coco = {f"{d}-{s}-vgg16-from-coco" for d in ("voc07", "voc12") for s in (320, 512)}
    assert set(OF_THE_PAPER) == matrix | from_coco


@pytest.mark.parametrize(
    ("name", "parameters", "anchors"),
    [
        ("voc07-320-vgg16", 34_440_884, 6375),
        ("voc12-512-vgg16", 34_440_884, 16320),
        ("coco-512-vgg16", 36_100_484, 16320),
        ("coco-320-resnet101", 82_451_588, 6375),
        ("coco-512-resnet101", 82_451_588, 16320),
    ],
)
def test_parameters_and_anchors(name: str, parameters: int, anchors: int) -> None:
    model = PRESETS[name].model
    with torch.device("meta"):
        network = RefineDetNetwork(model)
        predictions = network(torch.zeros(1, 3, *model.image_size))
    assert count_parameters(network) == parameters
    assert predictions.odm_logits.shape == (1, anchors, model.num_classes + 1)


@pytest.fixture
def devkit(voc_folder: FolderFactory, tmp_path: Path) -> Path:
    """VOC2007 with test, VOC2012 whose test has no annotations here."""
    names = ("cat", "dog")
    voc_folder(images=4, class_names=names, name="devkit/VOC2007", splits={"trainval": [0, 1], "test": [2, 3]})
    voc_folder(images=2, class_names=names, name="devkit/VOC2012", first=4, splits={"trainval": [4, 5]})
    return tmp_path / "devkit"


def test_voc07_presets_train_on_07_and_12(devkit: Path) -> None:
    train = PRESETS["voc07-320-vgg16"].train
    ids = [record.image_id for record in open_dataset(devkit, train.train_split).records]
    assert ids == ["000000", "000001", "000004", "000005"]
    assert ids == [record.image_id for record in open_dataset(devkit, "2007:trainval+2012:trainval").records]
    assert [record.image_id for record in open_dataset(devkit, train.evaluate_split).records] == ["000002", "000003"]


def test_voc12_presets_train_on_07_plus_plus_12_and_evaluate_on_the_server(devkit: Path) -> None:
    train = PRESETS["voc12-320-vgg16"].train
    ids = {record.image_id for record in open_dataset(devkit, train.train_split).records}
    assert ids == {f"{index:06d}" for index in range(6)}
    assert train.evaluate_split == "none"


def smoke(name: str, devkit: Path, coco_folder: FolderFactory, out: Path) -> None:
    """Two iterations and an evaluation, by the commands of docs/paper.md."""
    splits = {"train2017": [0, 1, 2], "val2017": [4, 5]}
    data = coco_folder(images=6, splits=splits) if name.startswith("coco") else devkit
    batch = ["--batch-size", "2", "--workers", "0", "--iterations", "2", "--device", "cpu"]
    assert cli.main(["train", name, "--data", str(data), "--out", str(out), "--init-weights", "random", *batch]) == 0
    assert (out / "last/model.safetensors").is_file()
    split, metric = ("val", "coco") if name.startswith("coco") else ("2007:test", "voc")
    evaluate = ["evaluate", str(out), str(data), "--split", split, "--metric", metric, "--limit", "1"]
    assert cli.main([*evaluate, "--batch-size", "1", "--device", "cpu"]) == 0
    shutil.rmtree(out)  # most of a gigabyte


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_every_preset_trains_and_evaluates(name: str, devkit: Path, coco_folder: FolderFactory, tmp_path: Path) -> None:
    smoke(name, devkit, coco_folder, tmp_path / "run")


def test_the_smallest_preset_trains_and_evaluates(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data, out = str(voc_folder(images=4)), str(tmp_path / "run")
    arguments = ["--init-weights", "random", "--iterations", "2", "--device", "cpu"]
    assert cli.main(["train", "smoke", "--data", data, "--out", out, *arguments]) == 0
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) >= 3
    assert cli.main(["evaluate", out, data, "--split", "val", "--device", "cpu"]) == 0
    assert cli.main(["train", "smoke", "--data", data, "--out", out + "2", "--iterations", "0"]) == 2
