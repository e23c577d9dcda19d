"""The hostile inputs in a short form: a few of each kind, always the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.hostile import BUILDERS

EACH = 3
"""Inputs of each kind."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hostile_inputs_end_in_one_line(tmp_path: Path) -> None:
    # In a process of its own: a process in which autograd has run cannot be forked and train.
    command = ["-m", "tests.fuzz.hostile", "--count", str(EACH * len(BUILDERS)), "--seconds", "300"]
    call = [sys.executable, *command, "--keep", str(tmp_path / "keep"), "--material", str(tmp_path / "material")]
    (tmp_path / "material").mkdir()
    done = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{EACH * len(BUILDERS)} inputs, 0 faults" in done.stdout
    for kind in BUILDERS:
        assert f"\n{kind} " in f"\n{done.stdout}"
