"""The first look at a GPU, rehearsed with the CPU as the device."""

from __future__ import annotations

import pytest
import torch
from experiments.gpu_check import Case, check_arithmetic, check_step, random_targets, relative_error

from experiments import gpu_check, speed


def test_a_device_that_computes_the_same_passes_and_another_does_not() -> None:
    case = Case("smoke", 2, torch.device("cpu"))
    assert max(check_arithmetic(case).values()) < 1e-5
    found, wanted, sound = check_step(Case("smoke", 2, torch.device("cpu")))
    assert sound
    assert abs(found - wanted) < gpu_check.STEP_TOLERANCE * wanted

    original = Case.on_device

    def broken(self: Case) -> object:
        network, *rest = original(self)
        with torch.no_grad():
            network.odm[0].offsets.bias += 0.1
        return (network, *rest)

    case = Case("smoke", 2, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "on_device", broken)
        assert check_arithmetic(case)["outputs"] > gpu_check.TOLERANCE


def test_nan_never_passes() -> None:
    assert not relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) < 1
    assert relative_error(torch.tensor([1.1]), torch.ones(1)) == pytest.approx(0.1, rel=1e-5)


def test_random_targets_are_boxes_inside_the_picture() -> None:
    targets = random_targets(8, 128, 20)
    boxes = targets.boxes[targets.valid]
    assert bool((boxes[:, 2:] - boxes[:, :2] >= 15.9).all())
    assert bool(((boxes >= 0) & (boxes <= 128.001)).all())


def test_speed_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(
        ["--device", "cpu", "--preset", "smoke", "--models", "smoke", "--batches", "1", "--modes", "eager",
         "--batch-size", "2", "--seconds", "0"]
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "| backward |" in out
    assert "120,000 iterations of 32 would take" in out
    assert out.count("| smoke | 128 |") == 2
