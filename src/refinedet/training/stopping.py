"""Signals that ask a training to stop: it saves first, and leaves with a code that says which signal it was."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANDLED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
"""Ctrl-C; the end that a scheduler announces; what Slurm sends ahead of a time limit (--signal=USR1@120); the end
of the terminal, unless nohup has it ignored."""
_ECHO = 1.0
"""Seconds in which the same signal counts as one: a terminal sends it to every process, and torchrun passes it on."""


class TrainingStopped(SystemExit):
    """A signal ended the training. ``code`` is 128 and the signal's number: 130, 143, 129 (SIGHUP), 138 (SIGUSR1)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.where = "before it began"
        """How far it came, in words."""


class SignalGuard:
    """Takes the signals of ``HANDLED`` while it is entered, in the main thread only; called, it says if one has come.

    A signal raises ``TrainingStopped`` at once, but within ``held`` it only leaves a note, so that a save is never cut
    short. A second Ctrl-C there raises KeyboardInterrupt. Signals that the process ignores stay ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._came = 0.0
        self._holding = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for name in HANDLED:
                number = getattr(signal, name, None)
                # None: the handler was installed by other than Python code and could not be given back.
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, signals wait until somebody asks for them."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within ``held``: work that may be cut short, because all is saved.

        Raises:
            TrainingStopped: a signal comes, or has come before.
        """
        if self.number is not None:
            raise TrainingStopped(self.number)
        self._holding = False
        try:
            yield
        finally:
            self._holding = True

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            if number == signal.SIGINT and time.monotonic() - self._came > _ECHO:
                raise KeyboardInterrupt
        else:
            self.number, self._came = number, time.monotonic()
        if not self._holding:
            raise TrainingStopped(self.number)


def either(first: Callable[[], bool], second: Callable[[], bool] | None) -> Callable[[], bool]:
    """Asks both; the second not at all if the first says True or there is none."""
    return first if second is None else lambda: first() or second()
