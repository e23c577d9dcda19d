"""What the engines have in common: each worker has a task at a time, and what happens when a worker dies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

from refinedet.bulk.parts import failed_row, table_of
from refinedet.bulk.worker import WorkerSettings
from refinedet.errors import RefineDetError

ATTEMPTS = 3
"""How often a task is given to a worker before its images are tried in smaller groups, and in the end given up."""
MOST_GIVEN_UP = 20
"""Images on which workers died, after which the machine is at fault, not the images."""


class WorkerDiedError(Exception):
    """A worker is gone before it answered."""


class Channel(Protocol):
    """A worker as the engine that runs it sees it."""

    def ask(self, task: list[str]) -> Any:
        """The rows of a list of paths, as a ``pyarrow.Table``.

        Raises:
            WorkerDiedError: the worker is gone.
            RefineDetError: the worker says what went wrong.
        """

    def kill(self) -> None:
        """End the worker at once; a thread that waits for its answer gets ``WorkerDiedError``."""

    def close(self) -> None:
        """Take back what a worker that died had."""


Start: TypeAlias = Callable[[int], Channel]
"""Starts a worker, given the number of the thread that will ask it, which counts from 0; raises what ``ask`` raises,
``WorkerDiedError`` with a text such as " (exit code 9)" if it died while it loaded the model."""


def run_workers(
    start: Start, count: int, settings: WorkerSettings, tasks: Iterable[list[str]]
) -> Generator[Any, None, None]:
    """The rows of each task as a ``pyarrow.Table``, in the order of the tasks.

    Args:
        start: see there.
        count: number of workers.
        settings: for the rows of images on which workers die.
        tasks: lists of paths; taken only as far ahead as the workers need.

    Raises:
        RefineDetError: the model cannot be loaded, or the workers cannot work.
    """
    fleet = _Fleet(start, settings)
    pool = ThreadPoolExecutor(count, thread_name_prefix="worker")
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(fleet.run, task))
            if len(waiting) >= 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        fleet.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        fleet.close()


class _Fleet:
    """A worker for each thread that asks."""

    def __init__(self, start: Start, settings: WorkerSettings) -> None:
        self._start_worker, self._settings = start, settings
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: list[Channel] = []
        self._threads = self._given_up = 0
        self._stopped = False

    def run(self, task: list[str]) -> Any:
        """The rows of a task, whatever happens to the worker that makes them."""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(task)
            except WorkerDiedError:
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
        worker: Channel | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = self._start()
        try:
            return worker.ask(task)
        except WorkerDiedError:
            self._own.worker = None
            with self._lock:
                self._workers.remove(worker)
            worker.close()
            raise

    def _start(self) -> Channel:
        if not hasattr(self._own, "number"):
            with self._lock:
                self._own.number, self._threads = self._threads, self._threads + 1
        for attempt in range(1, ATTEMPTS + 1):
            if self._stopped:
                raise WorkerDiedError
            try:
                worker = self._start_worker(self._own.number)
                break
            except WorkerDiedError as error:
                if attempt == ATTEMPTS and not self._stopped:
                    raise RefineDetError(
                        f"a worker process ended while it loaded the model{error}; is the memory used up? try fewer "
                        "--workers"
                    ) from None
        with self._lock:
            self._workers.append(worker)
            if self._stopped:  # meanwhile, by another thread
                worker.kill()
        return worker

    def stop(self) -> None:
        """End all workers; threads that wait for an answer get none."""
        with self._lock:
            self._stopped = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()

    def close(self) -> None:
        """Take back what the workers had, when no thread asks any more."""
        for worker in self._workers:
            worker.close()
