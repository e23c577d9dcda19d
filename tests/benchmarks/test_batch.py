"""The benchmark of batch prediction prints its figures."""

from __future__ import annotations

import re

import pytest
from benchmarks.batch import main


@pytest.mark.slow  # starts workers
def test_batch_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--memory", "6"]) == 0
    line = r"6 images: \d+ MB at 10 %, \d+ MB at 100 % \(\d\.\d+\), [\d.]+ images/s"
    assert re.match(line, capsys.readouterr().out)
    assert main(["--images", "2", "--rounds", "1", "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == ["loop over predict", "local, 1 workers"]
