from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refinedet import RefineDet
from refinedet.bulk.worker import WorkerSettings
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
