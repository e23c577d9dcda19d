"""Several processes, one training: what torchrun sets up, and the few sums that processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from refinedet.device import pick_device

T = TypeVar("T")


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
        return [one for one in values if one is not None]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started (gloo on the CPU, nccl on GPUs), or be the only one."""
    chosen = pick_device(device)
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield World(0, 1, chosen)
        return
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()
