"""A short form of the kill program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # each kill is the start of a training
@pytest.mark.timeout(1500)
def test_trainings_that_are_killed_end_as_one_that_is_not() -> None:
    # In a process of its own: a process in which autograd has run cannot be forked and train.
    call = [sys.executable, "-m", "tests.fuzz.kills", "--kills", "12", "--seed", "3", "--seconds", "600"]
    done = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 things wrong" in done.stdout
