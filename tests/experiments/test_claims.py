"""The program that tests the paper's claims: its table, and that finished variants are not trained again."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments.paper_claims import main, table

from conftest import FolderFactory
from refinedet.errors import RefineDetError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def figures(**percents: list[float]) -> dict[tuple[str, int], float]:
    return {
        (name.replace("_", "-"), seed): value / 100
        for name, values in percents.items()
        for seed, value in enumerate(values)
    }


def test_the_table_says_which_claims_hold() -> None:
    text = table(
        figures(full=[70.0, 71.0], ssd300=[66.0, 67.0], no_filtering=[70.6, 71.2], one_step=[60.0]),
        {"iterations": 100},
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
    row = next(line for line in table(figures(full=[70.0], ssd300=[ssd]), {}).splitlines() if "by 2.5" in line)
    # One seed each has no spread, so only a difference of exactly the margin lies within it.
    assert row.split("|")[4].strip().split(",")[0] == verdict


def test_equal_figures_do_not_hold() -> None:
    assert "| full > no-filtering | +0.5 | +0.00 | no" in table(figures(full=[70.0], no_filtering=[70.0]), {})


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", str(data), "--weights", "random", "--preset", "smoke", "--variants", "full", "one-step",
        "--iterations", "4", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--learning-rate", "0.0001",
        "--out", str(out), *more,
    ]  # fmt: skip


def test_variants_are_trained_once(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = voc_folder(images=4, name="VOC2007")
    assert main(arguments(data, tmp_path)) == 0
    assert "| full > no-filtering | +0.5 | - | not measured |" in (tmp_path / "table.md").read_text()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0/last.ckpt")}
    assert {path.parent.name for path in files} == {"full-0", "one-step-0"}
    assert main(arguments(data, tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(UsageError, match="holds a run of other settings"):
        main(arguments(data, tmp_path, "--iterations", "7"))


def test_bad_input_stops_before_the_first_variant(voc_folder: FolderFactory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        main(arguments(tmp_path / "nowhere", tmp_path))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(RefineDetError, match=r"bad\.safetensors: not a readable"):
        main([*arguments(voc_folder(name="VOC2007"), tmp_path), "--weights", str(tmp_path / "bad.safetensors")])
