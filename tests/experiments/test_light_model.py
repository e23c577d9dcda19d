"""The long training of the light model, in steps, until both of its models lie in parts in the out folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiments.pack import join

from conftest import FolderFactory
from experiments import light_model
from refinedet.detector import RefineDet


def test_two_models_in_steps(voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--data", str(voc_folder(images=4, name="VOC2007")), "--weights", "random", "--preset", "smoke",
        "--iterations", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--learning-rate", "0.0001",
        "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert light_model.main([*arguments, "--minutes", "0"]) == 0
    assert "goes on with train" in capsys.readouterr().out
    assert light_model.main(arguments) == 0
    assert "mAP on val" in capsys.readouterr().out
    assert 0 <= json.loads((tmp_path / "out/light.json").read_text())["mAP"] <= 1
    for name in ("train", "trainval"):
        join(tmp_path / "out" / name)
        assert len(RefineDet.from_pretrained(tmp_path / "out" / name).class_names) == 20
