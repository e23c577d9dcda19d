"""The comparison of exported files with PyTorch prints its table, and has networks of the kinds that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.exported import CASES, detector_of, main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_networks_have_the_classes_and_sizes_of_their_names() -> None:
    for case in CASES[:3]:
        model = detector_of(case)
        assert model.config.image_size == case.size
        assert len(model.class_names) == (len(case.class_names) or 20)
    assert detector_of(CASES[1]).predict(EXAMPLES / "astronaut.jpg").names == ["person"]


@pytest.mark.slow
def test_it_prints_a_row_for_each_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(EXAMPLES), "--count", "2", "--only", "resnet18 320x320, 1 class"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| resnet18")]
    assert [row.split(" | ")[1] for row in rows] == ["ONNX Runtime", "OpenVINO"]
    assert all(int(row.split(" | ")[2]) == 4 and int(row.split(" | ")[3]) > 0 for row in rows)
