"""Training without a preset, splits or a length: what the call chooses, and what can be said instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import refinedet
from conftest import FolderFactory
from refinedet.dataclass_json import load_json
from refinedet.errors import UsageError
from refinedet.training.run import RunConfig
from refinedet.training.session import Session
from refinedet.training.train import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "image_size": 64, "batch_size": 4, "tcb_channels": 8, "workers": 0, "precision": "fp32", "log_every": 1,
    "device": "cpu", "init_weights": "random",
}  # fmt: skip


def config_of(folder: Path) -> RunConfig:
    return load_json(RunConfig, folder / "config.json")


def test_data_alone_is_enough(voc_folder: FolderFactory, tmp_path: Path) -> None:
    seen: list[tuple[int, Mapping[str, float]]] = []
    run = train(
        data=voc_folder(images=8, splits={}),
        out=tmp_path / "run",
        iterations=2,
        on_log=lambda step, values: seen.append((step, values)),
        **QUICK,
    )
    assert run.report is not None
    assert (run.report.images, run.report.metric) == (1, "coco")
    config = config_of(run.folder)
    assert (config.provenance.device, config.provenance.version) == ("cpu", refinedet.__version__)
    assert (config.preset.train.iterations, config.preset.train.batch_size) == (2, 8 // 2)
    assert (config.preset.train.train_split, config.preset.train.evaluate_split) == ("all", "held out")
    listed = [(run.folder / "split" / f"{name}.txt").read_text().splitlines() for name in ("train", "held_out")]
    assert [len(names) for names in listed] == [7, 1]
    assert [step for step, values in seen if "total" in values] == [1, 2]


def test_a_stopped_run_keeps_its_division(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=8, splits={})
    whole = train(data=data, out=tmp_path / "whole", iterations=4, **QUICK)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 2

    assert not train(data=data, out=tmp_path / "run", iterations=4, stop=stop, **QUICK).finished
    run = resume(tmp_path / "run", device="cpu")
    assert run.report is not None
    assert whole.report is not None
    assert run.report["mAP"] == whole.report["mAP"]
    assert run.losses == whole.losses


def test_a_finished_run_can_be_made_longer(voc_folder: FolderFactory, tmp_path: Path) -> None:
    train(data=voc_folder(images=8, splits={}), out=tmp_path / "run", iterations=2, **QUICK)
    assert resume(tmp_path / "run", iterations=4, device="cpu").finished
    config = config_of(tmp_path / "run")
    assert config.preset.train.iterations == 4
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:] if row.split(",")[1]] == ["1", "2", "3", "4"]
    with pytest.raises(UsageError, match="has done 4 iterations already"):
        resume(tmp_path / "run", iterations=3, device="cpu")


def test_minutes_become_iterations_that_stay(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "seconds_per_iteration", lambda self: 1.0)
    data = voc_folder(images=8, splits={})
    run = train(data=data, out=tmp_path / "run", minutes=0.05, **QUICK)
    assert config_of(run.folder).preset.train.iterations == 3
    # The same command on a slower day goes on with the run as it is.
    monkeypatch.setattr(Session, "seconds_per_iteration", lambda self: 3.0)
    assert train(data=data, out=tmp_path / "run", minutes=0.05, **QUICK).finished
    assert config_of(run.folder).preset.train.iterations == 3


def test_some_classes_make_a_model_of_these(voc_folder: FolderFactory, tmp_path: Path) -> None:
    run = train(data=voc_folder(images=8, splits={}), out=tmp_path / "run", iterations=1, classes=["dog"], **QUICK)
    assert run.model.class_names == ("dog",)
    assert json.loads((run.folder / "last/config.json").read_text())["class_names"] == ["dog"]
    assert resume(run.folder, iterations=2, device="cpu").model.class_names == ("dog",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "nothing to train on"),
        ({"iterations": 5, "epochs": 5}, "one of --iterations, --epochs and --minutes"),
        ({"minutes": 0}, "--minutes must be greater than 0"),
        ({"epoch": 5}, "unknown setting 'epoch'"),
        ({"preset": "finetun"}, "did you mean 'finetune'"),
        ({"init": "voc07-320-resnet18"}, "either a model to start from or backbone weights"),
    ],
)
def test_calls_that_contradict_themselves_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(**{"data": tmp_path, "out": tmp_path / "run", **QUICK, **changes})
    assert not (tmp_path / "run").exists()
