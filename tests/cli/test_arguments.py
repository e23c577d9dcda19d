from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from refinedet import cli
from refinedet.cli.training import SHORT_HELP


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_fits_80_columns_and_says_nothing_empty(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for option in ("--help", "--help-all") if name in SHORT_HELP else ("--help",):
        text = help_of([name, option], capsys)
        assert text.startswith(f"usage: refinedet {name}")
        assert [line for line in text.splitlines() if len(line) > 80] == []
        assert "default: None" not in text
        assert "default: )" not in text


@pytest.mark.parametrize("name", SHORT_HELP)
def test_short_help_names_flags_that_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    short, whole = help_of([name, "--help"], capsys), help_of([name, "--help-all"], capsys)
    flags = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert len(flags) <= 11
    assert all(f"{flag} " in whole for flag in flags)
    assert "examples" in short or "example" in short
    assert len(short.splitlines()) < 35


def test_help_needs_no_tty_and_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "refinedet", "predict", "-h"], capture_output=True, text=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, check=True,
    )  # fmt: skip
    assert "--threshold FLOAT" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict", "missing: WEIGHTS"),
        ("predict a b --threshold", "--threshold needs a value: --threshold FLOAT"),
        ("predict a b --threshold x", "--threshold must be a number, not 'x'"),
        ("predict a b --threshold None", "--threshold must be a number, not 'None'"),
        ("predict a b --threshold inf", "--threshold must be between 0 and 1, not inf"),
        ("predict a b --threshold 40", "--threshold must be between 0 and 1, not 40.0"),
        ("predict a b --batch-size 1.5", "--batch-size must be a whole number, not '1.5'"),
        ("predict a b --batch-size -1", "--batch-size must be at least 1, not -1"),
        ("predict a b --json-format xml", "--json-format must be one of 'refinedet', 'coco', not 'xml'"),
        ("predict a b --thresh 1", "unknown option '--thresh': did you mean '--threshold'?"),
        ("predict a b --zzz=1", "unknown option '--zzz';"),
        ("evaluate a b --limit None", "--limit must be a whole number, not 'None'"),
        ("evaluate a b c", "unexpected argument 'c'"),
        ("benchmark a --threads nan", "--threads must be a whole number, not 'nan'"),
        ("train smoke --data a --lr 1", "unknown option '--lr': here it is --learning-rate"),
        ("train smoke --data a --imgsz 320", "here it is --model.image-size HEIGHT WIDTH"),
        ("predict a b --conf 0.5", "here it is --threshold"),
        ("predict --weights a --source b", "here it is WEIGHTS as the first argument, without a flag"),
    ],
)
def test_one_line_names_the_argument(command: str, message: str, refused: Callable[..., str]) -> None:
    line = refused(command.split())
    assert message in line
    assert line.count("error") == 1


@pytest.mark.parametrize(
    "command",
    [
        "predict a b --batch-size",
        "predict a b --threshold",
        "predict a b --json-format",
        "evaluate a b",
        "models",
        "--",
    ],
)
def test_long_values_are_cut(command: str, refused: Callable[..., str]) -> None:
    for value in ("x/" * 3000, "9" * 6000, "-" * 5000):
        assert len(refused([*command.split(), value])) < 400


def test_flags_are_as_the_annotations_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def models(*, names: tuple[str, ...] = (), count: int = 3) -> int:
        """Models.

        Args:
            names: Names.
            count: How many.
        """
        seen.append((names, count))
        return 7

    monkeypatch.setitem(cli.VERBS, "models", models)
    assert cli.main(["models", "--names", "a", "b", "--count=5"]) == 7
    assert seen == [(("a", "b"), 5)]


def test_a_flag_of_ours_goes_before_a_word_of_others(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def models(*, source: str = "") -> int:
        """Models.

        Args:
            source: Where from.
        """
        return 0

    monkeypatch.setitem(cli.VERBS, "models", models)
    assert cli.main(["models", "--source", "a"]) == 0
    assert "unknown option '--sorce': did you mean '--source'?" in refused(["models", "--source", "a", "--sorce", "b"])
