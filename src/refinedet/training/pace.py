"""How fast a training goes on this machine, and in which precision."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from refinedet.config import Precision, TrainConfig
from refinedet.training.distributed import World
from refinedet.training.trainer import Criterion, Trainer, TrainingBatch

_ITERATIONS = 4
"""Iterations of a measurement; the first one, which loads and allocates, does not count."""


class _Clock:
    """A logger that remembers when each iteration ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.times.append(time.perf_counter())

    def close(self) -> None:
        pass


def seconds_per_iteration(
    network: nn.Module,
    criterion: Criterion,
    settings: TrainConfig,
    batches: Callable[[TrainConfig], Iterable[TrainingBatch]],
    world: World,
) -> float:
    """Median time of an iteration, measured on a copy of the network, which is thrown away.

    Neither the network nor the random state changes, so a training gives the same weights with and without it. Measured
    at the size of the last iterations; what the size schedule saves before is counted by the number of pixels.

    Args:
        network: the network that will be trained, on the device of ``world``.
        criterion: its loss.
        settings: of the training.
        batches: gives the batches of a training with these settings.
        world: this process; the slowest process counts.
    """
    full = [(0, side) for _, side in settings.size_schedule[-1:]]
    short = dataclasses.replace(
        settings, iterations=_ITERATIONS * settings.accumulation_steps, log_every=1, compile=False,
        size_schedule=tuple(full), warmup_iterations=0, evaluate_every=0, patience=0, save_every=10**9, ema_decay=None,
    )  # fmt: skip
    clock = _Clock()
    alone = World(rank=0, size=1, device=world.device)
    with torch.random.fork_rng(devices=[]):
        trial = Trainer(copy.deepcopy(network), criterion, short, alone)
        trial.run(batches(short), clock, save=lambda: None)
    steps = sorted(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))
    slowest = max(world.gather([steps[len(steps) // 2]]), default=[0.0])[0]
    return slowest * _mean_area(settings)


def _mean_area(settings: TrainConfig) -> float:
    """Pixels of a mean iteration, as a share of those of the last."""
    if not settings.size_schedule:
        return 1.0
    starts = [first for first, _ in settings.size_schedule] + [settings.iterations]
    last = settings.size_schedule[-1][1] ** 2
    pixels = sum(
        (min(later, settings.iterations) - min(first, settings.iterations)) * side**2
        for (first, side), later in zip(settings.size_schedule, starts[1:], strict=True)
    )
    before = min(settings.size_schedule[0][0], settings.iterations) * last
    return (pixels + before) / (last * settings.iterations)


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision that "auto" stands for on a device: "bf16" where it is fast at it, else "fp32".

    A CPU is fast at bf16 if it has instructions for it; one without computes it in fp32 and converts all the time.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _fast_at_bf16() else "fp32"


def _fast_at_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
