"""refinedet benchmark: the times add up, the figures are those of Table 1's columns, and wrong calls end in a line."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet import cli
from refinedet.benchmark import TURN, Speed, comparison_table, measure_speeds
from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.runtime import Runtime

TINY = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8)


def test_every_run_is_timed_and_the_steps_make_the_total() -> None:
    torch.manual_seed(0)
    (speed,) = measure_speeds([("tiny", RefineDet(TINY))], np.zeros((30, 50, 3), dtype=np.uint8), runs=3, warmup=1)
    steps = ("preprocess", "network", "post-process", "total")
    assert tuple(speed.milliseconds) == steps
    assert all(len(values) == 3 and min(values) > 0 for values in speed.milliseconds.values())
    for parts in zip(*(speed.milliseconds[step] for step in steps), strict=True):
        assert sum(parts[:3]) == pytest.approx(parts[3])
    assert (speed.boxes, speed.image_size, speed.input_size) == (3 * (64 + 16 + 4 + 1), (50, 30), (64, 64))
    assert speed.device.startswith("PyTorch, CPU, ")


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


def speed_of(name: str, totals: list[float]) -> Speed:
    return Speed({"preprocess": [1.0] * len(totals), "total": totals}, None, 3, (320, 320), (500, 375), "CPU", name)


def test_ratios_are_those_of_neighbouring_turns() -> None:
    """The machine is three times slower during the second turn: the ratio does not notice, the medians would."""
    slow = speed_of("slow", [20.0] * TURN + [90.0] * TURN + [40.0] * TURN)
    fast = speed_of("fast", [10.0] * TURN + [30.0] * TURN + [20.0] * TURN)
    assert fast.times_faster_than(slow) == (2.0, 2.0, 3.0)
    lines = comparison_table([slow, fast]).splitlines()
    assert lines[1].split() == ["slow", "40.00", "20.00", "90.00", "25.0", "1.00x", "(1.00", "to", "1.00)", "CPU"]
    assert lines[2].split() == ["fast", "20.00", "10.00", "30.00", "50.0", "2.00x", "(2.00", "to", "3.00)", "CPU"]
    assert lines[3].startswith("15 runs each on a 500x375 image")


def test_models_take_turns() -> None:
    order: list[str] = []

    class Named(Runtime):
        """Notes when it runs, and finds nothing."""

        config, threads, engine = TINY, 1, "test"  # type: ignore[assignment]

        def __init__(self, name: str) -> None:
            self.name = name

        def inputs(self, images: Any, size: Any = None) -> Any:
            return images

        def run(self, images: Any) -> Any:
            order.append(self.name)
            return SimpleNamespace(num_detections=[0])

    speeds = measure_speeds([(name, Named(name)) for name in "ab"], np.zeros((8, 8, 3), np.uint8), runs=7, warmup=1)
    # One run before each turn does not count.
    assert "".join(order) == "ab" + "a" * 6 + "b" * 6 + "a" * 3 + "b" * 3
    assert [len(speed.milliseconds["total"]) for speed in speeds] == [7, 7]
    assert [set(speed.milliseconds) for speed in speeds] == [{"preprocess", "graph", "total"}] * 2


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
    assert cli.main(["benchmark", str(tmp_path / "model"), "smoke", *arguments]) == 0
    table = capsys.readouterr().out
    assert f"{tmp_path / 'model'}  " in table
    assert "2 runs each on a 500x375 image" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WEIGHTS"),
        (["nothing"], "no model 'nothing'"),
        (["nothing.onnx"], "nothing.onnx: no such file"),
        (["smoke", "--runs", "0"], "--runs must be at least 1"),
        (["smoke", "--warmup", "9" * 400], "--warmup must be at most 1,000,000, not 9999"),
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
