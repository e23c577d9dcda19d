from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from refinedet.errors import RefineDetError, UsageError
from refinedet.loggers import ConsoleLogger, CsvLogger, LoggerGroup


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLogger(path)
    log.log(1, {"loss": 2.5, "learning_rate": 1e-3})
    log.log(2, {"loss": float("nan")})
    assert (
        path.read_text() == "iteration,loss,learning_rate\n1,2.5,0.001\n2,nan,\n"
    )  # before close: a crash loses nothing
    log.close()
    log.close()
    with pytest.raises(UsageError, match="closed"):
        log.log(3, {"loss": 1.0})


def test_csv_new_names_widen_the_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLogger(path)
    log.log(1, {"loss": 2})
    log.log(2, {"mAP": 0.5, "loss": 1})
    log.log(3, {"loss": 0.5})
    assert path.read_text() == "iteration,loss,mAP\n1,2,\n2,1,0.5\n3,0.5,\n"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_same_iteration_joins_its_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLogger(path)
    log.log(1, {"loss": 3})
    log.log(2, {"loss": 2})
    log.log(2, {"mAP": 0.5})
    log.log(2, {"mAP": 0.75})
    log.log(3, {"loss": 1})
    assert path.read_text() == "iteration,loss,mAP\n1,3,\n2,2,0.75\n3,1,\n"


def test_csv_resume_drops_what_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with LoggerGroup([CsvLogger(path)]) as log:
        for step in range(1, 7):
            log.log(step, {"loss": step, "seconds": 10 * step})
    path.write_text(path.read_text() + "7,0.")  # cut short by a crash
    with LoggerGroup([CsvLogger(path, resume_step=4)]) as log:
        log.log(4, {"mAP": 0.5})
        log.log(5, {"seconds": 1, "loss": 2})
    assert path.read_text().splitlines() == [
        "iteration,loss,seconds,mAP", "1,1,10,", "2,2,20,", "3,3,30,", "4,4,40,0.5", "5,2,1,"
    ]  # fmt: skip


def test_csv_resume_of_nothing_and_new_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CsvLogger(path, resume_step=10).log(11, {"loss": 1})
    assert path.read_text() == "iteration,loss\n11,1\n"
    CsvLogger(path).log(1, {"loss": 2})
    assert path.read_text() == "iteration,loss\n1,2\n"


def test_csv_names_with_commas(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CsvLogger(path).log(1, {"AP of cat, small": 0.5})
    CsvLogger(path, resume_step=1).log(2, {"AP of cat, small": 0.25})
    assert path.read_text() == 'iteration,"AP of cat, small"\n1,0.5\n2,0.25\n'


def test_csv_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("name,price\nbread,3\n")
    with pytest.raises(RefineDetError, match=r"metrics\.csv: not a log of a training"):
        CsvLogger(path, resume_step=1)
    assert path.read_text() == "name,price\nbread,3\n"


def test_csv_without_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefineDetError, match=r"metrics\.csv: cannot be saved \(there is a file of that name\)"):
        CsvLogger(tmp_path / "file" / "metrics.csv")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_csv_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLogger(path)
    log.log(1, {"loss": 1})
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), log._file.fileno())  # type: ignore[union-attr]
    with pytest.raises(RefineDetError, match=r"metrics\.csv: cannot be written \(disk full\)"):
        log.log(2, {"loss": 1})
    assert path.read_text() == "iteration,loss\n1,1\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_does_not_end_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = CsvLogger(tmp_path / "metrics.csv")
    log.log(0, {"loss": 1})
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), log._file.fileno())  # type: ignore[union-attr]
    stream = io.StringIO()
    with LoggerGroup([log, ConsoleLogger(10, stream=stream)]) as loggers:
        loggers.log(1, {"loss": 1})
        loggers.log(2, {"loss": 1})
    assert stream.getvalue().count("iteration") == 2
    assert caplog.messages == [
        f"{tmp_path / 'metrics.csv'}: cannot be written (disk full); the training continues without this log"
    ]


def test_console_whose_reader_went_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        log = ConsoleLogger(10, stream=stream)
        log.log(1, {"loss": 1})
        log.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered


def test_console_plain() -> None:
    stream = io.StringIO()
    log = ConsoleLogger(100, start=40, stream=stream)
    log.log(50, {"loss": 1.23456, "learning_rate": 0.001})
    log.close()
    line = stream.getvalue()
    assert line.startswith("iteration 50/100  loss 1.235  learning_rate 0.001  left 0:00:")
    assert line.count("\n") == 1


def test_console_bar() -> None:
    stream = Terminal()
    log = ConsoleLogger(10, stream=stream)
    log.log(5, {"loss": 1.5})
    log.log(10, {"mAP": 0.25})
    log.close()
    assert "10/10" in stream.getvalue()
    assert "loss 1.50  mAP 25.0" in stream.getvalue()
