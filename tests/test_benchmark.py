"""refinedet benchmark: the times add up, the figures are those of Table 1's columns, and wrong calls end in a line."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet import cli
from refinedet.benchmark import STEPS, Speed, measure_speed
from refinedet.config import ModelConfig
from refinedet.detector import RefineDet

TINY = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8)


def test_every_run_is_timed_and_the_steps_make_the_total() -> None:
    torch.manual_seed(0)
    speed = measure_speed(RefineDet(TINY), np.zeros((30, 50, 3), dtype=np.uint8), runs=3, warmup=1)
    assert set(speed.milliseconds) == set(STEPS)
    assert all(len(values) == 3 and min(values) > 0 for values in speed.milliseconds.values())
    for parts in zip(*(speed.milliseconds[step] for step in STEPS), strict=True):
        assert sum(parts[:3]) == pytest.approx(parts[3])
    assert (speed.boxes, speed.image_size, speed.input_size) == (3 * (64 + 16 + 4 + 1), (50, 30), (64, 64))
    assert speed.device.startswith("CPU, ")


def test_figures_come_from_medians() -> None:
    milliseconds = {"preprocess": [1.0, 2.0, 9.0], "network": [20.0, 10.0, 40.0], "post-process": [5.0, 5.0, 10.0]}
    milliseconds["total"] = [sum(parts) for parts in zip(*milliseconds.values(), strict=True)]
    speed = Speed(milliseconds, 6375, 200, (320, 320), (500, 375), "a GPU")
    assert speed.fps == pytest.approx(1000 / 26)
    assert speed.network_fps == pytest.approx(1000 / 25)
    lines = speed.table().splitlines()
    assert lines[1].split() == ["preprocess", "2.00", "1.00", "9.00"]
    assert lines[4].split() == ["total", "26.00", "17.00", "59.00"]
    assert lines[5].startswith("FPS 38.5 at batch 1 (40.0 without preprocessing), 6375 boxes, input 320x320")
    assert lines[6] == "3 runs on a 500x375 image with 200 detections; a GPU"


def test_the_command_measures_weights_and_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RefineDet(TINY, ("a", "b")).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    arguments = ["--runs", "2", "--warmup", "0", "--device", "cpu"]
    threads = torch.get_num_threads()
    try:
        image = ["--image", str(tmp_path / "a.png"), "--threads", "1"]
        assert cli.main(["benchmark", str(tmp_path / "model"), *image, *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "255 boxes" in shown
    assert "2 runs on a 40x30 image" in shown
    assert "CPU, 1 threads" in shown
    assert cli.main(["benchmark", "smoke", *arguments]) == 0
    assert "1020 boxes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no model 'nothing'"),
        (["smoke", "--runs", "0"], "--runs must be at least 1"),
        (["smoke", "--warmup", "-1"], "--warmup must be at least 0"),
        (["smoke", "--threads", "0"], "--threads must be at least 1"),
        (["smoke", "--device", "tpu9"], "unknown device"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("verb", ["ablate", "benchmark"])
def test_help_is_quick_and_light(verb: str) -> None:
    program = (
        "import sys\nfrom refinedet.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as error: assert not error.code\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, verb, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time: the clock on the wall also counts what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
