"""Several processes, one training: what torchrun sets up, and the few values that processes share."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from refinedet.device import pick_device
from refinedet.errors import RefineDetError, UsageError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others, when it joins them and in every exchange."""
_SPOKEN = "refinedet/spoken"


@dataclass(frozen=True)
class World:
    """This process among the processes of a training."""

    rank: int
    """Number of this process, 0 is the one that writes."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the processes' tensors, as a new tensor."""
        if self.size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values

    def mean_divisor(self, positives: Tensor) -> Tensor:
        """What each process divides its sums by: all positives, at least 1, over the number of processes.

        The mean of the gradients over the processes is then the gradient of one process that holds the whole batch.
        """
        return self.sum(positives).clamp(min=1.0) / self.size

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank; plain Python objects of our own making."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return [value for value in values if value is not None]

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the first process do something; all get its result, or raise its error.

        Raises:
            UsageError, RefineDetError: what ``work`` raised.
        """
        if self.size == 1:
            return work()
        outcome: list[tuple[T | None, RefineDetError | None]] = [(None, None)]
        if self.is_main:
            try:
                outcome = [(work(), None)]
            except RefineDetError as error:
                # Subclasses with other arguments cannot be made again by the processes that receive them.
                kind = UsageError if isinstance(error, UsageError) else RefineDetError
                outcome = [(None, kind(str(error)))]
        dist.broadcast_object_list(outcome)
        result, failure = outcome[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str = "auto", timeout: datetime.timedelta = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun started (gloo on the CPU, nccl on GPUs), or be the only one.

    What goes wrong in the block is told by one process; the others leave with its exit code and without a word.

    Args:
        device: "cpu", "cuda" or "auto"; with several processes "cuda" is the GPU of LOCAL_RANK.
        timeout: how long to wait for the others, now and in every exchange.

    Raises:
        RefineDetError: the others cannot be reached, or one of them has ended or no longer answers.
    """
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        return
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        # torchrun may keep one store over all restarts: without a name of its own, a restart would find the addresses
        # of processes that are dead.
        own = PrefixStore(f"refinedet/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        kind = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=own, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RefineDetError(
            f"the processes of this training do not find each other within {timeout.total_seconds():.0f} s "
            f"({_first_line(error)}); start all of them with one torchrun command"
        ) from None
    world = World(dist.get_rank(), dist.get_world_size(), chosen)
    try:
        yield world
    except RefineDetError as error:
        if _spoken():
            raise SystemExit(error.exit_code) from None
        raise
    except RuntimeError as error:
        # An exchange that failed: torch has its own class for it, but gloo raises the plain one.
        if not isinstance(error, dist.DistError) and not any(
            word in str(error) for word in ("gloo", "NCCL", "onnection")
        ):
            raise
        if _spoken():
            raise SystemExit(RefineDetError.exit_code) from None
        raise RefineDetError(
            f"another of the {world.size} processes of this training has ended, or has not answered for "
            f"{timeout.total_seconds():.0f} s ({_first_line(error)})"
        ) from None
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def launch_command(arguments: str) -> str:
    """What to type to call refinedet as this process was called: with torchrun, if it was."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return f"torchrun --nproc-per-node {size} -m refinedet {arguments}" if size > 1 else f"refinedet {arguments}"


def share_of(count: int, rank: int, size: int) -> range:
    """Which of ``count`` images of a pass a process takes; shares differ by one at most.

    Raises:
        UsageError: fewer images than processes.
    """
    if count < size:
        raise UsageError(f"a pass of {count} images cannot be shared by {size} processes; raise --batch-size")
    return range(rank * count // size, (rank + 1) * count // size)


def _spoken() -> bool:
    """Whether another process has told what went wrong; if not, this one has the word now."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(_SPOKEN, 1) > 1
    except (RuntimeError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
