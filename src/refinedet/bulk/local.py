"""The engine of one machine: worker processes, each with a task at a time, and what happens when one of them dies."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from typing import Any

from refinedet.bulk.parts import failed_row, table_of
from refinedet.bulk.worker import WorkerSettings
from refinedet.errors import RefineDetError

ATTEMPTS = 3
"""How often a task is given to a process before its images are tried in smaller groups, and in the end given up."""
MOST_GIVEN_UP = 20
"""Images on which workers died, after which the machine is at fault, not the images."""
WORKER = (sys.executable, "-m", "refinedet.bulk.worker")
"""The command of a worker process."""
_DIED = (EOFError, OSError, pickle.UnpicklingError)


def run_local(
    settings: WorkerSettings, tasks: Iterable[list[str]], devices: Sequence[str]
) -> Generator[Any, None, None]:
    """The rows of each task as a ``pyarrow.Table``, in the order of the tasks.

    Args:
        settings: for the workers.
        tasks: lists of paths; taken only as far ahead as the workers need.
        devices: where each of the processes computes.

    Raises:
        RefineDetError: the model cannot be loaded, or the workers cannot work.
    """
    fleet = _Fleet(settings, devices)
    pool = ThreadPoolExecutor(len(devices), thread_name_prefix="worker")
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(fleet.run, task))
            if len(waiting) >= 2 * len(devices):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        fleet.stop()
        pool.shutdown(wait=True, cancel_futures=True)


class _Fleet:
    """A process for each thread that asks."""

    def __init__(self, settings: WorkerSettings, devices: Sequence[str]) -> None:
        self._settings, self._devices = settings, cycle(devices)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        self._given_up = 0

    def run(self, task: list[str]) -> Any:
        """The rows of a task, whatever happens to the process that makes them."""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(task)
            except _DIED:
                if self._stopped:
                    raise RefineDetError("stopped") from None
        # Some image is deadly. The groups that the network takes at once stay together as long as possible, so that
        # the numbers of the others are those of an undisturbed run.
        size = self._settings.batch_size if len(task) > self._settings.batch_size else 1
        if len(task) > 1:
            groups = [task[start : start + size] for start in range(0, len(task), size)]
            return table_of([row for group in groups for row in self.run(group).to_pylist()])
        with self._lock:
            self._given_up += 1
            if self._given_up > MOST_GIVEN_UP:
                raise RefineDetError(
                    f"worker processes die again and again, the last time on {task[0]}; is the memory used up? try "
                    "fewer --workers"
                )
        error = f"{task[0]}: the process that read it died {ATTEMPTS} times"
        return table_of([failed_row(task[0], error, self._settings.digest)])

    def _ask(self, task: list[str]) -> Any:
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._start()
        try:
            return _exchange(process, task)
        except _DIED:
            self._own.process = None
            self._end(process)
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        threads = str(self._settings.threads)
        with self._lock:
            if self._stopped:
                raise EOFError
            process = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0 if os.name == "posix" else None,  # Ctrl-C is for the command, not for its workers
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            )
            self._processes.append(process)
            if not hasattr(self._own, "device"):
                self._own.device = next(self._devices)
        try:
            _exchange(process, replace(self._settings, device=self._own.device))
        except _DIED:
            self._end(process)
            if self._stopped:
                raise
            raise RefineDetError(
                f"a worker process ended while it loaded the model (exit code {process.returncode}); is the memory "
                "used up? try fewer --workers"
            ) from None
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        with self._lock:
            self._processes.remove(process)
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # what was still to be written to a process that is gone
                pass

    def stop(self) -> None:
        """End all processes; threads that wait for an answer get none."""
        with self._lock:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:
            process.kill()


def _exchange(process: subprocess.Popen[bytes], message: object) -> Any:
    """Send something to a worker and wait for what it says.

    Raises:
        RefineDetError: the worker says what went wrong.
        EOFError, OSError, pickle.UnpicklingError: it died.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    pickle.dump(message, process.stdin)
    process.stdin.flush()
    answer = pickle.load(process.stdout)
    if isinstance(answer, RefineDetError):
        raise answer
    if isinstance(answer, Exception):
        raise RefineDetError(f"a worker process failed ({str(answer)[:300]})")
    return answer
