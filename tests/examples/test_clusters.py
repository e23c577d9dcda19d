"""The examples for clusters: well-formed files, commands that exist, and Ray Train that survives killed workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import FolderFactory
from refinedet import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)


def test_kubernetes_file_is_well_formed() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job", "RayJob"]
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in documents[1]["spec"]["template"]["spec"]["volumes"]}


def test_commands_and_their_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("slurm.sh", "kubernetes.yaml"):
        text = (EXAMPLES / name).read_text()
        calls = re.findall(r"refinedet (train|batch) ([^&\n]*)", text)
        assert calls or name == "kubernetes.yaml"
        for verb, rest in calls:
            assert cli.main([verb, "--help-all" if verb == "train" else "--help"]) == 0
            known = capsys.readouterr().out
            assert [flag for flag in re.findall(r"--[a-z-]+", rest) if flag not in known] == []


_PROGRAM = """
import sys
import ray, ray_train
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
ray_train.main(sys.argv[1:], dict(
    iterations=12, batch_size=4, save_every=2, log_every=1, workers=0, init_weights="random", device="cpu",
    train_split="train", evaluate_split="none"))
"""


def trained(data: Path, out: Path, kills: int) -> dict[str, Any]:
    """The last checkpoint of a run by Ray Train of whose workers so many were killed, each after a save."""
    arguments = ["--preset", "smoke", "--data", str(data), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{EXAMPLES}"}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    checkpoint, killed = out / "last.ckpt", 0
    for number in range(kills):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.02)
        listed = subprocess.run(["pgrep", "-f", "ray::.*TrainWorker"], capture_output=True, text=True, check=False)
        if pids := listed.stdout.split():
            os.kill(int(pids[number % len(pids)]), signal.SIGKILL)
            killed += 1
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text[-3000:]
    assert killed == kills
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return content


@pytest.mark.slow  # starts Ray twice
@pytest.mark.timeout(900)
def test_a_worker_of_ray_train_that_is_killed_changes_nothing(voc_folder: FolderFactory, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    data = voc_folder(images=12)
    whole, killed = trained(data, tmp_path / "whole/run", 0), trained(data, tmp_path / "killed/run", 3)
    assert whole["iteration"] == killed["iteration"] == 12
    assert all(torch.equal(value, killed["network"][key]) for key, value in whole["network"].items())
