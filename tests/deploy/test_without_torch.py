"""``refinedet-runtime`` installed in an environment of its own, which has no torch: the same detections as here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import FolderFactory
from refinedet import RefineDet
from refinedet.deploy.export import export

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_runtime_is_installed_and_works_without_torch(tmp_path: Path, yolo_folder: FolderFactory) -> None:
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), f"{ROOT / 'runtime'}[openvino]"], check=True)
    model = RefineDet.from_pretrained("voc07-320-resnet18")
    files = [tmp_path / "model.onnx", tmp_path / "model.xml"]
    for file in files:
        export(model, file)
    photo = ROOT / "examples/chelsea.jpg"
    expected = model.predict(photo)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        arguments = [str(python), "-m", "refinedet", *map(str, words)]
        return subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)

    torch = subprocess.run([str(python), "-c", "import torch"], cwd=tmp_path, env=environment, capture_output=True)
    assert b"No module named 'torch'" in torch.stderr
    for file in files:
        done = call("predict", file, photo, "--json", file.with_suffix(".json"))
        assert done.returncode == 0, done.stderr
        (found,) = json.loads(file.with_suffix(".json").read_text())["images"]
        assert [one["name"] for one in found["detections"]] == expected.names == ["cat"]
        np.testing.assert_allclose([one["box"] for one in found["detections"]], expected.boxes, atol=0.1)
        np.testing.assert_allclose([one["score"] for one in found["detections"]], expected.scores, atol=1e-4)
    data = yolo_folder(4, size=(64, 64))
    done = call("evaluate", files[0], data, "--split", "all", "--shared-classes", "--report", "report")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report/index.html").is_file()
    done = call("predict", "voc07-320-resnet18", photo)
    assert done.returncode == 2
    assert "error: " in done.stderr
