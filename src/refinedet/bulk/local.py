"""The engine of one machine: worker processes that are asked over pipes."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from refinedet.bulk.worker import WorkerSettings
from refinedet.bulk.workers import WorkerDiedError, run_workers
from refinedet.errors import RefineDetError

WORKER = (sys.executable, "-m", "refinedet.bulk.worker")
"""The command of a worker process."""


def run_local(
    settings: WorkerSettings, tasks: Iterable[list[str]], devices: Sequence[str]
) -> Generator[Any, None, None]:
    """``run_workers`` with processes of this machine.

    Args:
        settings: for the workers.
        tasks: lists of paths.
        devices: where each of the processes computes.

    Raises:
        RefineDetError: as ``run_workers``.
    """
    return run_workers(
        lambda number: _Process(replace(settings, device=devices[number])), len(devices), settings, tasks
    )


class _Process:
    """A worker process."""

    def __init__(self, settings: WorkerSettings) -> None:
        threads = str(settings.threads)
        self._process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0 if os.name == "posix" else None,  # Ctrl-C is for the command, not for its workers
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        try:
            self._exchange(settings)
        except WorkerDiedError:
            self.close()
            raise WorkerDiedError(f" (exit code {self._process.returncode})") from None
        except BaseException:
            self.close()
            raise

    def ask(self, task: list[str]) -> Any:
        return self._exchange(task)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be written to a process that is gone
                    stream.close()

    def _exchange(self, message: object) -> Any:
        """Send something to the worker and wait for what it says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise WorkerDiedError from None
        if isinstance(answer, RefineDetError):
            raise answer
        if isinstance(answer, Exception):
            raise RefineDetError(f"a worker process failed ({str(answer)[:300]})")
        return answer
