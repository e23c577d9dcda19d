"""The program that says how good a detector is after how many minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments.minutes import STARTS, curve, main, table

from conftest import FolderFactory

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_table_has_a_row_for_each_start_and_a_column_for_each_length() -> None:
    text = table({("bundled", 3): {"AP": 0.5, "AP50": 0.75}, ("bundled", 1): {"AP": 0.25, "AP50": 0.5},
                  ("ssd", 3): {"AP": 0.125, "AP50": 0.3}})  # fmt: skip
    assert text.splitlines() == [
        "| start | 1 minute | 3 minutes |",
        "|---|---|---|",
        "| refinedet train --data DATA | 25.0 (50.0) | 50.0 (75.0) |",
        "| SSD | - | 12.5 (30.0) |",
    ]


def test_the_curve_has_a_line_for_each_start() -> None:
    text = curve({("bundled", 1): {"AP": 0.25}, ("bundled", 10): {"AP": 0.5}, ("ssd", 1): {"AP": 0.1}})
    assert text.count('<path class="line') == 2
    assert "RefineDet, bundled</text>" in text
    assert "SSD, ImageNet</text>" in text
    assert "RefineDet, ImageNet</text>" not in text


@pytest.mark.slow  # three trainings at 320x320
def test_three_starts_are_trained_once(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=6)
    arguments = ["--data", str(data), "--weights", "random", "--out", str(tmp_path), "--minutes", "0.001",
                 "--workers", "0", "--device", "cpu", "--train-split", "train", "--evaluate-split", "val"]  # fmt: skip
    assert main(arguments) == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/report/report.json")}
    assert {path.parent.parent.name for path in files} == {f"{start}-0.001" for start in STARTS}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(STARTS)
