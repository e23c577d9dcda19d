"""The program that tests the paper's claims: its table, and that a stop anywhere changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from experiments.paper_claims import main, table
from experiments.steps import Deadline, check_settings

from conftest import FolderFactory
from experiments import paper_claims
from refinedet.errors import RefineDetError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def results(**figures: list[float]) -> list[dict[str, Any]]:
    return [
        {"variant": name.replace("_", "-"), "seed": seed, "mAP": value / 100}
        for name, values in figures.items()
        for seed, value in enumerate(values)
    ]


def test_the_table_says_which_claims_hold() -> None:
    text = table(
        results(full=[70.0, 71.0], ssd300=[66.0, 67.0], no_filtering=[70.6, 71.2], one_step=[60.0]),
        {"iterations": 100, "photos": ""},
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| full | 2 | 70.50 | 70.00 to 71.00 | 80.0 |" in rows
    assert "| one-step | 1 | 60.00 | - | 77.3 |" in rows
    assert "| full > ssd300 by 2.5 or more | +2.8 | +4.00 | yes |" in rows
    assert "| full > no-filtering | +0.5 | -0.40 | no, within the spread of the seeds |" in rows
    assert "| no-filtering > one-step | +2.2 | +10.90 | yes |" in rows
    assert "| one-step > no-tcb | +1.1 | - | not measured |" in rows
    assert text.endswith("11-point mAP. Settings: iterations 100.\n")


@pytest.mark.parametrize(
    ("ssd", "verdict"),
    [(67.5, "yes"), (67.6, "no"), (72.0, "no")],
)
def test_ssd_has_to_be_beaten_by_two_and_a_half(ssd: float, verdict: str) -> None:
    row = next(line for line in table(results(full=[70.0], ssd300=[ssd]), {}).splitlines() if "by 2.5" in line)
    # One seed each has no spread, so only a difference of exactly the margin lies within it.
    assert row.split("|")[4].strip().split(",")[0] == verdict


def test_equal_figures_do_not_hold_and_failures_are_listed() -> None:
    failed = {"variant": "no-tcb", "seed": 0, "error": "the loss of iteration 3 is not finite"}
    text = table([*results(full=[70.0], no_filtering=[70.0]), failed], {})
    assert "| full > no-filtering | +0.5 | +0.00 | no" in text
    assert "no-tcb, seed 0, failed: the loss of iteration 3 is not finite" in text


def test_a_deadline_passes_or_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("experiments.steps.time.monotonic", lambda: now)
    never, soon = Deadline(None), Deadline(0.5)
    assert not soon()
    now = 130.0
    assert soon()
    assert not never()


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", str(data), "--weights", "random", "--preset", "smoke", "--variants", "full", "one-step",
        "--iterations", "4", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--learning-rate", "0.0001",
        "--state", str(out / "state"), "--out", str(out / "out"), *more,
    ]  # fmt: skip


def test_steps_of_any_length_end_where_one_call_ends(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = voc_folder(images=4, name="VOC2007")
    assert main(arguments(data, tmp_path / "whole")) == 0

    class FourAnswers(Deadline):
        """The time is up at the fourth look at the clock."""

        def __init__(self, minutes: float | None) -> None:
            super().__init__(None)
            self.left = 4 if minutes else 1000

        def __call__(self) -> bool:
            self.left -= 1
            return self.left <= 0

    monkeypatch.setattr(paper_claims, "Deadline", FourAnswers)
    outputs = []
    for _ in range(12):
        assert main(arguments(data, tmp_path / "parts", "--minutes", "1")) == 0
        outputs.append(capsys.readouterr().out)
        if "time is up" not in outputs[-1]:
            break
    assert 2 < len(outputs) < 12
    assert "goes on with full (seed 0), one-step (seed 0)" in outputs[0]
    whole, parts = (json.loads((tmp_path / name / "out/results.json").read_text()) for name in ("whole", "parts"))
    assert [(one["variant"], one["mAP"]) for one in whole["results"]] == [
        (one["variant"], one["mAP"]) for one in parts["results"]
    ]
    assert [one["curve"] for one in whole["results"]] == [one["curve"] for one in parts["results"]]
    for run in ("full-0", "one-step-0"):
        weights = [tmp_path / name / "state" / run / "last/model.safetensors" for name in ("whole", "parts")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (tmp_path / "parts/out/table.md").read_text() == (tmp_path / "whole/out/table.md").read_text()

    # What stands in results.json needs no run; other settings are not mixed in.
    (tmp_path / "whole/state").rename(tmp_path / "gone")
    assert main(arguments(data, tmp_path / "whole")) == 0
    assert not (tmp_path / "whole/state/full-0").exists()
    with pytest.raises(UsageError, match=r"results\.json: made with iterations 4, not 7; choose another folder"):
        main(arguments(data, tmp_path / "whole", "--iterations", "7"))


def test_a_variant_that_fails_does_not_cost_the_others_their_turn(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def fail(name: str, *_: Any, **__: Any) -> None:
        trained.append(name)
        raise RefineDetError("the loss is not finite")

    monkeypatch.setattr(paper_claims, "train_variant", fail)
    data = voc_folder(images=4, name="VOC2007")
    for _ in range(2):
        assert main(arguments(data, tmp_path)) == 1
    assert trained == ["full", "one-step"] * 2, "and it gets another one"
    found = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [one["error"] for one in found] == ["the loss is not finite"] * 2


def test_bad_input_stops_before_the_first_variant(voc_folder: FolderFactory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        main(arguments(tmp_path / "nowhere", tmp_path))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(RefineDetError, match=r"bad\.safetensors: not a readable safetensors file"):
        main([*arguments(voc_folder(name="VOC2007"), tmp_path), "--weights", str(tmp_path / "bad.safetensors")])


def test_settings_are_compared_by_name(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    check_settings(path, {"a": 1})
    path.write_text('{"a": 1, "b": 2}')
    check_settings(path, {"a": 1, "b": 2})
    with pytest.raises(UsageError, match=r"settings\.json: made with b 2, not None"):
        check_settings(path, {"a": 1})
