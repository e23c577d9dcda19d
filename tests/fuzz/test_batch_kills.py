"""A short form of the program that kills batch predictions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # several starts of torch
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_batch_predictions_that_are_killed_end_as_one_that_is_not(engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    call = [sys.executable, "-m", "tests.fuzz.batch_kills", "--engine", engine, "--images", "60", "--worker-kills", "2"]
    done = subprocess.run(
        [*call, "--command-kills", "1", "--pause", "2", "--seed", "1"], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 things wrong" in done.stdout
