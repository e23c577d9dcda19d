from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refinedet import RefineDet
from refinedet.bulk import run
from refinedet.bulk.worker import Worker, WorkerSettings
from refinedet.config import ModelConfig


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of a network for 64x64 pixels; its best scores are about 0.3."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True)
    folder = tmp_path_factory.mktemp("tiny")
    RefineDet(config, ("cat", "dog")).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny: Path) -> WorkerSettings:
    return WorkerSettings(str(tiny), "digest", "cpu", threads=1, threshold=0.1, batch_size=2, max_pixels=None)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Tasks are done here, without worker processes; returns the tasks as they come."""
    came: list[list[str]] = []

    def run_here(settings: Any, tasks: Iterator[list[str]], devices: list[str]) -> Iterator[Any]:
        worker = None
        for task in tasks:
            came.append(task)
            worker = worker or Worker(settings)
            yield worker.detect(task)

    monkeypatch.setattr(run, "run_local", run_here)
    return came
