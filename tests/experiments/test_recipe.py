"""The trials of the recipe: what each changes, what the table says, and that a stop changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from experiments.recipe import TRIALS, changed, main, table

from conftest import FolderFactory
from refinedet.errors import RefineDetError, UsageError
from refinedet.presets import get_preset

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = get_preset("smoke")


def test_a_change_goes_where_its_path_says() -> None:
    found = changed(SMOKE, {"train.augment.expand_ratio": 2.0, "model.tcb_channels": 48})
    assert (found.train.augment.expand_ratio, found.model.tcb_channels) == (2.0, 48)
    undone = changed(found, {"train.augment.expand_ratio": 4.0, "model.tcb_channels": 32})
    assert undone == dataclasses.replace(SMOKE, train=dataclasses.replace(SMOKE.train, milestones=(13, 16)))


def test_twice_the_batch_is_half_the_iterations() -> None:
    found = changed(SMOKE, {"train.batch_size": 10}).train
    assert (found.iterations, found.warmup_iterations) == (8, 2)  # 20 and 5 iterations of 4 pictures
    assert found.milestones == (5, 6)


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_a_recipe_unlike_the_base(name: str) -> None:
    found = changed(get_preset("voc07-320-resnet18"), TRIALS[name])
    base = changed(get_preset("voc07-320-resnet18"), {"train.optimizer": "sgd", "train.learning_rate": 0.3})
    assert found != base


def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RefineDetError, match="did you mean 'momentum'"):
        changed(SMOKE, {"train.momentun": 0.5})


def test_the_table_compares_seed_by_seed() -> None:
    def result(trial: str, seed: int, figure: float) -> dict[str, Any]:
        return {"trial": trial, "seed": seed, "mAP": figure / 100}

    text = table(
        [result("base", 0, 10), result("base", 1, 20), result("adamw", 1, 26), result("mosaic", 2, 50),
         result("expand-2", 0, 8), result("expand-2", 1, 19)],
        {"iterations": 3},
    )  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| base | nothing | 0, 1 | 15.00 | - |" in rows
    assert "| adamw | optimizer adamw, learning_rate 0.0005, weight_decay 0.05 | 1 | 26.00 | +6.00 |" in rows
    assert "| expand-2 | expand_ratio 2.0 | 0, 1 | 13.50 | -1.50 |" in rows
    assert "| mosaic | mosaic_probability 0.5 | 2 | 50.00 | - |" in rows, "no base of that seed"
    assert text.endswith("Settings: iterations 3.\n")


def test_trials_in_steps(voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--data", str(voc_folder(images=12, name="VOC2007")), "--weights", "random", "--preset", "smoke",
        "--trials", "base", "adamw", "--iterations", "2", "--warmup-iterations", "1", "--batch-size", "4",
        "--side", "64", "--workers", "0", "--device", "cpu", "--state", str(tmp_path / "state"),
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main([*arguments, "--minutes", "0"]) == 0
    assert "goes on with base (seed 0)" in capsys.readouterr().out
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "| base | nothing | 0 |" in text
    assert "trained on train[:80%]" in text
    found = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [one["trial"] for one in found] == ["base", "adamw"]
    assert all(0 <= one["mAP"] <= 1 for one in found)
    configs = [json.loads((tmp_path / "state" / f"{name}-0" / "config.json").read_text()) for name in ("base", "adamw")]
    optimizers = [config["preset"]["train"].pop("optimizer") for config in configs]
    assert optimizers == ["sgd", "adamw"]
    # What is there is not done again; other settings are not mixed in.
    (tmp_path / "state").rename(tmp_path / "gone")
    assert main(arguments) == 0
    assert not (tmp_path / "state").exists()
    with pytest.raises(UsageError, match=r"results\.json: made with iterations 2, not 3"):
        main([*arguments, "--iterations", "3"])
