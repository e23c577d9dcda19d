"""The benchmark of training and inference prints its tables, on images whose boxes make sense."""

from __future__ import annotations

import pytest
from benchmarks.speed import main, random_targets


def test_random_targets_are_boxes_inside_the_image() -> None:
    targets = random_targets(8, 128, 20)
    boxes = targets.boxes[targets.valid]
    assert bool((boxes[:, 2:] - boxes[:, :2] >= 15.9).all())
    assert bool(((boxes >= 0) & (boxes <= 128.001)).all())


def test_speed_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(
        ["--device", "cpu", "--preset", "smoke", "--models", "smoke", "--batches", "1", "--modes", "eager",
         "--batch-size", "2", "--seconds", "0"]
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "| backward |" in out
    assert "120,000 iterations of 32 would take" in out
    assert out.count("| smoke | 128 |") == 2
