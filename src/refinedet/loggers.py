"""Where the numbers of a training go: the console, a CSV file and other loggers, all behind one small protocol.

Those that send the numbers to other programs are in ``trackers.py``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from refinedet.errors import RefineDetError, UsageError
from refinedet.files import failure_reason, write_text
from refinedet.progress import ProgressBar, duration, is_terminal

_LOG = logging.getLogger(__name__)
_STEP = "iteration"


class Logger(Protocol):
    """Takes named numbers of an iteration."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` for iteration ``step``; steps never decrease."""
        ...

    def close(self) -> None:
        """Write out what is pending; calling it twice is harmless."""
        ...


class LoggerGroup:
    """Several loggers as one.

    Example:
        >>> with LoggerGroup([]) as loggers:
        ...     loggers.log(1, {"loss": 2.5})
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on to every logger, in order; one that cannot write is given up, which does not end the training."""
        for logger in self.loggers:
            try:
                logger.log(step, values)
            except (RefineDetError, OSError) as error:
                _LOG.warning("%s; the training continues without this log", error)
                self.loggers = tuple(other for other in self.loggers if other is not logger)

    def progress(self, title: str, done: int, total: int) -> None:
        """As ``show_progress``, for all of them."""
        for logger in self.loggers:
            show_progress(logger, title, done, total)

    def close(self) -> None:
        """Close every logger, in order."""
        for logger in self.loggers:
            with contextlib.suppress(RefineDetError, OSError):  # what could not be written before cannot be now
                logger.close()

    def __enter__(self) -> LoggerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def show_progress(logger: Logger, title: str, done: int, total: int) -> None:
    """Tell a logger that shows it how far the training is ("training"), or an evaluation in between ("evaluating")."""
    show = getattr(logger, "progress", None)
    if show is not None:
        show(title, done, total)


class ConsoleLogger:
    """Progress with the latest numbers and the time left.

    A live bar on a terminal; elsewhere (a file, a job's log) one plain line for each call of ``log``.

    Args:
        total: Iterations of the whole run.
        start: Iterations that were already done when this run was resumed.
        stream: Where to write; standard error by default, so that standard output stays for results.
    """

    def __init__(self, total: int, *, start: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._start, self._began = total, start, time.monotonic()
        self._latest: dict[str, float] = {}
        self._bar: ProgressBar | None = None
        if is_terminal(self._stream):
            self._bar = ProgressBar("training", total, done=start, stream=self._stream, keep=True).__enter__()

    def progress(self, title: str, done: int, total: int) -> None:
        """Move the bar to an iteration ("training"), or show an evaluation in between ("evaluating")."""
        if self._bar is None:
            return
        if title == "training":
            self._bar(done, total)
        else:
            self._bar.aside(title, done, total)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers; on a terminal those of earlier calls stay until they are replaced."""
        if self._bar is not None:
            self._latest.update(values)
            self._bar(
                step, parts={name: show(self._latest[name]) for name, show in _SHOWN.items() if name in self._latest}
            )
            return
        done = step - self._start
        left = ""
        if done > 0:
            left = f"  left {duration((time.monotonic() - self._began) / done * (self._total - step))}"
        with contextlib.suppress(OSError, ValueError):  # a log that nobody can read is not the end of a training
            print(f"{_STEP} {step}/{self._total}  {_sentence(values)}{left}", file=self._stream, flush=True)

    def close(self) -> None:
        """Stop the bar and leave its last state on the screen."""
        if self._bar is not None:
            self._bar.close()


_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.2f}".format,
    "total": "loss {:.2f}".format,
    "images_per_second": "{:.3g} img/s".format,
    "mAP": lambda value: f"mAP {100 * value:.1f}",
}
"""What the bar shows of the numbers that are logged, in this order; all of them are in the other logs."""


def _sentence(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class CsvLogger:
    """One row per iteration in a CSV file whose first column is ``iteration``.

    Numbers logged for the iteration of the last row join that row, and a name that is new widens the table (earlier
    rows stay empty there), so the columns never shift. Every call reaches the file before it returns.

    Args:
        path: The file; its folder is made if needed.
        resume_step: None starts a new table. Otherwise rows of later iterations are dropped, for a resumed run will
            write them again, and so is a last row that a crash cut short.

    Raises:
        RefineDetError: the file cannot be read or written, or holds another kind of table.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self._path = path
        self._names: list[str] = []
        self._last: tuple[int, dict[str, str]] | None = None
        self._last_offset = 0
        self._file: TextIO | None = None
        rows = [] if resume_step is None else self._rows_until(resume_step)
        self._rewrite(rows)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the row of iteration ``step``, or add to it.

        Raises:
            RefineDetError: the file cannot be written, for example because the disk is full.
        """
        if self._file is None:
            raise UsageError(f"{self._path}: the log is closed")
        row = {name: format(float(value), ".8g") for name, value in values.items()}
        same_row = self._last is not None and self._last[0] == step
        if same_row and self._last is not None:
            row = {**self._last[1], **row}
        new_names = [name for name in row if name not in self._names]
        try:
            if same_row:
                self._file.seek(self._last_offset)
                self._file.truncate()
            if new_names:
                self._file.flush()
                rows = self._rows_until(step) if self._names else []
                self._names += new_names
                self._rewrite(rows)
            self._last, self._last_offset = (step, row), self._file.tell()
            self._file.write(self._line(step, row))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, step: int, row: Mapping[str, str]) -> str:
        return _csv_line([str(step), *(row.get(name, "") for name in self._names)])

    def _rows_until(self, last_step: int) -> list[tuple[int, dict[str, str]]]:
        """The rows of the file up to an iteration; takes the names of the columns from its header."""
        try:
            with self._path.open(encoding="utf-8", newline="") as file:
                table = list(csv.reader(file))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, csv.Error) as error:
            raise RefineDetError(f"{self._path}: cannot be read ({error}); move it away to start a new log") from None
        if not table:
            return []
        if table[0][:1] != [_STEP]:
            raise RefineDetError(f"{self._path}: not a log of a training; move it away to start a new one")
        self._names = table[0][1:]
        rows = []
        for cells in table[1:]:
            if len(cells) == len(table[0]) and cells[0].isdecimal() and int(cells[0]) <= last_step:
                row = {name: cell for name, cell in zip(self._names, cells[1:], strict=True) if cell}
                rows.append((int(cells[0]), row))
        return rows

    def _rewrite(self, rows: Sequence[tuple[int, dict[str, str]]]) -> None:
        """Write the whole table aside and move it into place, then go on at its end."""
        self.close()
        lines = [_csv_line([_STEP, *self._names])] if self._names else []
        lines += [self._line(step, row) for step, row in rows]
        write_text(self._path, "".join(lines))
        try:
            self._file = self._path.open("r+", encoding="utf-8", newline="")
            self._last_offset = self._file.seek(0, os.SEEK_END) - (len(lines[-1].encode()) if rows else 0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._last = rows[-1] if rows else None

    def _unwritable(self, error: OSError) -> RefineDetError:
        return RefineDetError(f"{self._path}: cannot be written ({failure_reason(error)})")


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
