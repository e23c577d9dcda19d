"""The engine of a cluster: workers are actors of Ray, on any of its machines (extra ``refinedet[ray]``).

Ray starts the actors where there is room, and notices when one or its machine dies. The rows come back to the command
that asked, which alone writes the parts, so a stop means the same as with the processes of one machine.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from refinedet.bulk.worker import Worker, WorkerSettings
from refinedet.bulk.workers import WorkerDiedError, run_workers
from refinedet.errors import RefineDetError, UsageError


def run_ray(
    settings: WorkerSettings, tasks: Iterable[list[str]], workers: int | None, address: str | None
) -> Generator[Any, None, None]:
    """``run_workers`` with actors of Ray.

    Args:
        settings: for the workers; each takes ``threads`` CPUs, and a GPU where its device is "cuda".
        tasks: lists of paths.
        workers: number of actors; by default one for each GPU, or for each CPU but one, which Ray and the command need.
        address: of a running cluster, or "auto" for the one that this machine is part of; None starts Ray here and ends
            it with the call.

    Raises:
        UsageError: Ray is not installed, there is no cluster at the address, or it has no room for so many workers.
        RefineDetError: as ``run_workers``.
    """
    tasks = iter(tasks)
    first = next(tasks, None)
    if first is None:
        return
    with _connected(address) as ray:
        resources = ray.cluster_resources()
        if settings.device == "auto":
            settings = replace(settings, device="cuda" if resources.get("GPU", 0) >= 1 else "cpu")
        gpu = settings.device == "cuda"
        available = int(resources.get("GPU", 0)) if gpu else int(resources.get("CPU", 0)) // settings.threads
        count = workers or (available if gpu else max(1, available - 1))
        if count > available:
            kind = "GPUs" if gpu else "CPUs"
            raise UsageError(f"--workers {count}, but Ray has only {available} {kind} for them")
        actor = ray.remote(num_cpus=settings.threads, num_gpus=int(gpu), max_restarts=0, max_task_retries=0)(_Actor)
        yield from run_workers(lambda _: _Handle(ray, actor, settings), count, settings, chain([first], tasks))


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected; it is left as it was found."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'refinedet[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False,
                 logging_level=logging.ERROR)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--address {address}: no Ray cluster there ({reason}); start one with 'ray start'") from None
    if main:
        signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process at once
    try:
        yield ray
    finally:
        ray.shutdown()


class _Actor:
    """A worker in a process of Ray."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings

    def load(self) -> str | None:
        """Load the model; returns what went wrong."""
        try:
            self._worker = Worker(self._settings)
        except RefineDetError as error:
            return str(error)
        return None

    def detect(self, paths: list[str]) -> Any:
        return self._worker.detect(paths)


class _Handle:
    """An actor, seen from the command."""

    def __init__(self, ray: Any, actor: Any, settings: WorkerSettings) -> None:
        self._ray = ray
        self._actor = actor.remote(settings)
        error = self._get(self._actor.load.remote())
        if error is not None:
            self.kill()
            raise RefineDetError(f"a worker of Ray cannot load the model ({error}); every machine must see its files")

    def ask(self, task: list[str]) -> Any:
        return self._get(self._actor.detect.remote(task))

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def close(self) -> None:
        """Nothing: Ray takes back what a dead actor had."""

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise RefineDetError(f"a worker of Ray failed ({' '.join(str(error.cause).split())[:300]})") from None
        except errors.RayError:
            raise WorkerDiedError from None
