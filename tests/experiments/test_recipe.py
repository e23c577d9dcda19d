"""The trials of the recipe: what each changes, what the table says, and what is done is not done again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from experiments.recipe import TRIALS, changed, main, table

from conftest import FolderFactory
from refinedet.errors import RefineDetError, UsageError
from refinedet.presets import get_preset

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = get_preset("smoke")


def test_a_change_goes_where_its_path_says() -> None:
    trial = changed(SMOKE, {"train.augment.expand_ratio": 2.0, "model.tcb_channels": 48})
    assert (trial.train.augment.expand_ratio, trial.model.tcb_channels) == (2.0, 48)
    undone = changed(trial, {"train.augment.expand_ratio": 4.0, "model.tcb_channels": 32})
    assert undone == dataclasses.replace(SMOKE, train=dataclasses.replace(SMOKE.train, milestones=(13, 16)))


def test_twice_the_batch_is_half_the_iterations() -> None:
    trial = changed(SMOKE, {"train.batch_size": 10}).train
    assert (trial.iterations, trial.warmup_iterations) == (8, 2)  # 20 and 5 iterations of 4 images
    assert trial.milestones == (5, 6)


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_a_recipe_unlike_the_base(name: str) -> None:
    trial = changed(get_preset("voc07-320-resnet18"), TRIALS[name])
    base = changed(get_preset("voc07-320-resnet18"), {"train.optimizer": "sgd", "train.learning_rate": 0.3})
    assert trial != base


def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RefineDetError, match="did you mean 'momentum'"):
        changed(SMOKE, {"train.momentun": 0.5})


def test_the_table_compares_seed_by_seed() -> None:
    text = table(
        {("base", 0): 0.10, ("base", 1): 0.20, ("adamw", 1): 0.26, ("mosaic", 2): 0.50, ("expand-2", 0): 0.08,
         ("expand-2", 1): 0.19},
        {"iterations": 3},
    )  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| base | nothing | 0, 1 | 15.00 | - |" in rows
    assert "| adamw | optimizer adamw, learning_rate 0.0005, weight_decay 0.05 | 1 | 26.00 | +6.00 |" in rows
    assert "| expand-2 | expand_ratio 2.0 | 0, 1 | 13.50 | -1.50 |" in rows
    assert "| mosaic | mosaic_probability 0.5 | 2 | 50.00 | - |" in rows, "no base of that seed"
    assert text.endswith("Settings: iterations 3.\n")


def test_trials_are_trained_once(voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [
        "--data", str(voc_folder(images=12, name="VOC2007")), "--weights", "random", "--preset", "smoke",
        "--trials", "base", "adamw", "--iterations", "2", "--warmup-iterations", "1", "--batch-size", "4",
        "--side", "64", "--workers", "0", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "| base | nothing | 0 |" in text
    assert "trained on train[:80%]" in text
    assert (out / "table.md").read_text().strip() == text.strip()
    configs = [json.loads((out / f"{name}-0" / "config.json").read_text()) for name in ("base", "adamw")]
    assert [config["preset"]["train"].pop("optimizer") for config in configs] == ["sgd", "adamw"]
    checkpoints = {path: path.stat().st_mtime_ns for path in out.glob("*/last.ckpt")}
    assert main(arguments) == 0
    assert len(checkpoints) == 2
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints, "what is done is not done again"
    with pytest.raises(UsageError, match="holds a run of other settings"):
        main([*arguments, "--iterations", "3"])
