"""How a command behaves towards the terminal: what it prints, how it fails, and with which exit code.

Whatever happens, a command ends with an exit code and at most one line about it on standard error: 0 done, 1 the work
failed, 2 the call was wrong, 130 interrupted, 143 terminated, 129 the terminal was closed, 141 the reader of the output
went away. A traceback is
shown only where the environment variable ``REFINEDET_DEBUG`` is 1.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from refinedet.errors import RefineDetError
from refinedet.files import failure_reason
from refinedet.text import printable

OUT_OF_MEMORY = "out of memory; try a smaller --batch-size or smaller images"
_LONGEST = 2000
"""Characters of an error message; what a file or an argument holds may be longer."""
_LIBRARIES = {"PIL": "Pillow", "torch": "torch", "torchvision": "torchvision", "numpy": "numpy"}


def run(command: Callable[[], int]) -> int:
    """Run a command; what goes wrong becomes one line on standard error and an exit code."""
    with _prepared():
        try:
            code = command()
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except RefineDetError as error:
            return fail(str(error), error.exit_code)
        except KeyboardInterrupt as interrupt:
            number = interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT
            what = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
            return fail(what + (f": {interrupt}" if str(interrupt) else ""), 128 + number)
        except BrokenPipeError:
            _discard(sys.stdout)
            return 141
        except MemoryError:
            return fail(OUT_OF_MEMORY, 1)
        except Exception as error:
            return _unexpected(error)


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM, SIGHUP); what catches an interrupt catches this too."""

    def __init__(self, message: str = "", *, number: int = signal.SIGTERM) -> None:
        super().__init__(*([message] if message else []))
        self.number = number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP raise ``Terminated`` instead of ending the process at once."""

    def end(number: int, frame: object) -> None:
        raise Terminated(number=number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield
        return
    numbers = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]
    # nohup has SIGHUP ignored, and so it stays.
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unexpected(error: Exception) -> int:
    # torch.OutOfMemoryError is recognised by its name because torch must not be imported for it.
    if type(error).__name__ == "OutOfMemoryError":
        return fail(f"out of GPU memory; try a smaller --batch-size ({' '.join(str(error).split())[:120]})", 1)
    if isinstance(error, RuntimeError) and re.search(r"can't allocate memory|not enough memory", str(error)):
        return fail(OUT_OF_MEMORY, 1)  # so says torch on a CPU
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "torchvision"):
        return fail("this command needs PyTorch, which refinedet-runtime does without; install refinedet for it", 2)
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return fail("the current folder was removed; change to one that exists", 2)
    if isinstance(error, OSError) and error.filename is not None:
        return fail(f"{os.fsdecode(error.filename)}: {failure_reason(error)}", 1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG):
        # All files are written in a way that names them; what is left is standard output.
        _discard(sys.stdout)
        return fail(f"standard output: cannot be written ({failure_reason(error)})", 1)
    if os.environ.get("REFINEDET_DEBUG") == "1":
        raise error
    text = " ".join(str(error).split())[:300]
    return fail(
        f"unexpected {type(error).__name__}{f' ({text})' if text else ''}; this is a fault of refinedet: please report "
        "it to the project with what the same command prints when REFINEDET_DEBUG=1 is set",
        1,
    )


def say(text: str) -> None:
    """Print a result to standard output; control characters in it are shown as escapes.

    Raises:
        OSError: standard output is full, or nobody reads it any more.
    """
    print("\n".join(printable(line) for line in text.split("\n")), flush=True)


def note(text: str) -> None:
    """Print one line to standard error, which may be closed or full."""
    _print_line(" ".join(text.split()))


def _print_line(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(printable(line), file=sys.stderr, flush=True)


def fail(message: str, code: int) -> int:
    """Print why a command or an image failed; returns ``code``."""
    note(f"error: {message if len(message) <= _LONGEST else message[:_LONGEST] + '...'}")
    return code


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    """Standard streams that take any text, each warning of a library as one line, and the log on standard error."""
    # A closed standard stream would be given to the first file that is opened, and error messages written into it.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            # An ASCII terminal shows escapes, and so does any for names that are not UTF-8.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logger, handler = logging.getLogger("refinedet"), _Notes()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            told: set[str] = set()

            def show(
                message: Warning | str, category: type[Warning], filename: str, lineno: int,
                file: TextIO | None = None, line: str | None = None,
            ) -> None:  # fmt: skip
                parts = re.split(r"[\\/]", filename)
                library = next((name for part, name in _LIBRARIES.items() if part in parts), "a library")
                text = f"note: {library} says: {' '.join(str(message).split())[:200]}"
                if text not in told:
                    told.add(text)
                    note(text)

            if os.environ.get("REFINEDET_DEBUG") != "1":
                warnings.showwarning = show
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Notes(logging.Handler):
    """Shows the package's log, as it comes, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            note(f"note: {record.getMessage()}")
        else:
            for line in record.getMessage().splitlines():  # a table keeps its lines and columns
                _print_line(line)


def _discard(stream: TextIO | None) -> None:
    """Let the rest of the output go nowhere; Python would complain once more while closing the stream."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
