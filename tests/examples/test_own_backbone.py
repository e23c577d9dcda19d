"""The example of a network and a loss of one's own is run as its reader would run it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import FolderFactory

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_backbone.py"


@pytest.mark.usefixtures("one_thread")
def test_own_backbone_and_loss_are_trained(voc_folder: FolderFactory, tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    settings = {"iterations": 2, "batch_size": 2, "image_size": 128, "workers": 0, "precision": "fp32"}
    folder = example["main"](str(voc_folder(images=6, splits={})), str(tmp_path / "run"), **settings)
    saved = load_file(folder / "last" / "model.safetensors")
    network = example["make_network"]
    assert saved["backbone.stages.0.0.weight"].shape == (16, 3, 3, 3)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert (folder / "report" / "index.html").is_file()
    assert callable(network)
