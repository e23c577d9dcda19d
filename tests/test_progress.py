from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest

from refinedet.progress import ProgressBar, duration

PARTS = {"loss": "loss 7.83", "speed": "22 img/s", "mAP": "mAP 62.8"}


def shown(width: int, **options: bool) -> str:
    bar = ProgressBar("training", 11200)
    bar(420, parts=PARTS)
    return "".join(bar.line(width, seconds=214.0, **options))


def test_everything_fits_80_columns() -> None:
    line = shown(80)
    assert line.startswith("training ━━━")
    assert line.endswith("━ 420/11200  loss 7.83  22 img/s  mAP 62.8  left 1:31:33")
    assert len(line) == 80


def test_parts_go_from_the_right_and_count_and_time_never() -> None:
    kept = []
    for width in range(120, 25, -1):
        line = shown(width)
        assert "420/11200" in line
        assert line.endswith("left 1:31:33")
        assert len(line) <= width
        kept.append([part for part in PARTS.values() if part in line])
    assert kept[0] == list(PARTS.values())
    assert kept[-1] == []
    assert all(parts == list(PARTS.values())[: len(parts)] for parts in kept)
    assert [len(parts) for parts in kept] == sorted((len(parts) for parts in kept), reverse=True)


def test_bar_shows_the_share_that_is_done() -> None:
    bar = ProgressBar("predicting", 4)
    bar(1)
    done, rest, _ = bar.line(80, seconds=1)
    assert (done.count("━"), len(rest)) == (round(30 / 4), 30 - round(30 / 4))
    assert shown(80, ascii_only=True).isascii()


def test_time_counts_from_where_a_run_went_on() -> None:
    bar = ProgressBar("training", 100, done=40)
    assert "left -:--:--" in bar.line(80, seconds=0)[2]
    bar(50)
    assert "left 0:00:50" in bar.line(80, seconds=10)[2]


def test_other_work_in_between() -> None:
    bar = ProgressBar("training", 100)
    bar(10)
    bar.aside("evaluating", 40, 250)
    assert "".join(bar.line(60, seconds=4)).startswith("evaluating ━")
    assert "40/250" in bar.line(60, seconds=4)[2]
    bar(11)
    assert "11/100" in bar.line(60, seconds=4)[2]


def test_unknown_total() -> None:
    bar = ProgressBar("reading")
    bar(7)
    assert "".join(bar.line(80, seconds=1)).endswith(" 7")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (5483, "1:31:23"), (360000, "100:00:00"), (None, "-:--:--")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def on_terminal(program: str, columns: int) -> str:
    """What a program writes to a terminal of that many columns."""
    main, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=terminal, stdout=terminal, stderr=terminal,
        env={**environment, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(terminal)
    written = b""
    while True:
        try:
            select.select([main], [], [], 30)
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(main)
    assert process.wait(30) == 0
    return written.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_training_on_a_terminal(columns: int) -> None:
    program = """
import time
from refinedet.loggers import ConsoleLogger, LoggerGroup
with LoggerGroup([ConsoleLogger(11200, start=400)]) as loggers:
    loggers.log(420, {"total": 7.83, "arm_localization": 1.0, "learning_rate": 1e-3, "images_per_second": 22.04})
    loggers.log(420, {"mAP": 0.628})
    time.sleep(0.4)
    loggers.progress("evaluating", 40, 250)
    time.sleep(0.4)
    loggers.progress("training", 421, 11200)
"""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal(program, columns))
    lines = re.split(r"[\r\n]+", plain)
    assert max(map(len, lines)) <= columns
    wanted = r"training ━{8,30} 420/11200  loss 7.83  22 img/s  mAP 62.8  left \d+:\d\d:\d\d"
    assert any(re.fullmatch(wanted, line.strip()) for line in lines)
    assert any(re.match(r"evaluating ━{8,30} 40/250 ", line) for line in lines)
    assert any("421/11200" in line for line in lines)


def test_nothing_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("predicting", 3) as bar:
        bar(1)
    assert capfd.readouterr() == ("", "")
