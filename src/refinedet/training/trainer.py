"""The training loop, for any network, criterion, batches and loggers; nothing here knows RefineDet.

A network maps images to outputs, a criterion maps outputs and targets to named losses. ``training/train.py`` trains a
RefineDet with it, ``experiments/ssd_peer.py`` torchvision's SSD.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from refinedet.config import TrainConfig
from refinedet.errors import RefineDetError
from refinedet.loggers import Logger, show_progress
from refinedet.training.distributed import World
from refinedet.training.optim import MovingAverage, build_optimizer, learning_rate_at, set_learning_rate

Criterion = Callable[[Any, Any], Mapping[str, Tensor]]
"""Maps (outputs of the network, targets on the device) to scalar losses by name; the network learns from "total"."""
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingBatch(Protocol):
    """What one process feeds to the network in one pass."""

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) float32, normalised."""
        ...

    @property
    def targets(self) -> Any:
        """What the criterion compares the outputs with; has ``to(device)``."""
        ...

    @property
    def names(self) -> list[str]:
        """File of each image, for messages."""
        ...


class Trainer:
    """The state of a training and its loop.

    Args:
        network: maps images (B, 3, H, W) to outputs; moved to the device of ``world``.
        criterion: maps outputs and targets to named losses, in float32 whatever the network's autocast type.
        settings: iterations, batch size, optimiser, precision and the like; what is said there about data, augmentation
            and loss is not looked at.
        world: this process among the processes of the training.
        optimizer: of the network's parameters; by default what ``settings`` asks for.

    Attributes:
        iteration: updates that are done.
        losses: means of the losses over the last logged iterations.
        average: moving average of the weights, if ``settings`` asks for one.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        settings: TrainConfig,
        world: World,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.network = network.to(world.device)
        if settings.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.criterion, self.settings, self.world = criterion, settings, world
        self.losses: dict[str, float] = {}
        # Everything that a resumed run must find again stands in the next lines, in state() and in load_state().
        self.iteration = 0
        self.optimizer = optimizer or build_optimizer(self.network, settings)
        self.average = MovingAverage(self.network, settings.ema_decay) if settings.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
        self.sums: dict[str, Tensor] = {}
        self.summed = 0

    def state(self) -> dict[str, Any]:
        """All that ``load_state`` needs, as tensors and plain types only."""
        cuda = torch.cuda.get_rng_state() if self.world.device.type == "cuda" else None
        return {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "average_updates": self.average.updates if self.average else 0,
            "scaler": self.scaler.state_dict(),
            "sums": self.sums,
            "summed": self.summed,
            "random_state": torch.get_rng_state(),
            "random_state_cuda": cuda,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self.iteration = state["iteration"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        self.scaler.load_state_dict(state["scaler"])
        self.sums = {name: value.to(self.world.device) for name, value in state["sums"].items()}
        self.summed = state["summed"]
        torch.set_rng_state(state["random_state"])
        if state["random_state_cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_state_cuda"])

    def run(
        self,
        batches: Iterable[TrainingBatch],
        logger: Logger,
        *,
        save: Callable[[], None],
        evaluate: Callable[[], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Train to the last iteration, or until ``stop`` says True.

        Args:
            batches: one for every pass of this process, from the present iteration on.
            logger: receives the mean losses, the learning rate and the speed every ``log_every`` iterations.
            save: called every ``save_every`` iterations and before an early end; not after the last iteration.
            evaluate: called every ``evaluate_every`` iterations, in place of ``save``; not after the last iteration.
            stop: asked after every iteration but the last; the processes leave together as soon as it says True in one.

        Returns:
            Whether the last iteration is done.

        Raises:
            RefineDetError: a loss is not finite; nothing was updated then.
        """
        settings, world = self.settings, self.world
        forward, passes = self._forward_module(), iter(batches)
        began, done = time.perf_counter(), 0
        self.network.train()
        while self.iteration < settings.iterations:
            self._update(forward, passes)
            done += settings.batch_size
            show_progress(logger, "training", self.iteration, settings.iterations)
            finished = self.iteration == settings.iterations
            if self.iteration % settings.log_every == 0 or finished:
                self.losses = self._mean_losses()
                rate = learning_rate_at(settings, self.iteration - 1)
                speed = done / (time.perf_counter() - began)
                logger.log(self.iteration, {**self.losses, "learning_rate": rate, "images_per_second": speed})
                began, done = time.perf_counter(), 0
            if finished:
                break
            if evaluate and settings.evaluate_every and self.iteration % settings.evaluate_every == 0:
                evaluate()
                self.network.train()
                began, done = time.perf_counter(), 0
            elif self.iteration % settings.save_every == 0:
                save()
            # One process's clock is enough: all leave at the same iteration.
            if stop and world.sum(torch.tensor(float(stop()), device=world.device)).item():
                save()
                return False
        return True

    def _update(self, forward: Callable[[Tensor], Any], batches: Iterator[TrainingBatch]) -> None:
        """One update of the weights, from all passes of all processes."""
        settings, world = self.settings, self.world
        set_learning_rate(self.optimizer, learning_rate_at(settings, self.iteration))
        self.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        sums: dict[str, Tensor] = {}
        for step in range(settings.accumulation_steps):
            batch = next(batches)
            names += batch.names
            last = step == settings.accumulation_steps - 1
            quiet = forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
            with quiet:
                losses = self._losses(forward, batch)
                torch.autograd.backward(self.scaler.scale(losses["total"] / settings.accumulation_steps))
            for name, loss in losses.items():
                _add(sums, name, loss.detach().double() / settings.accumulation_steps)
        values = torch.stack(list(sums.values()))
        self._stop_if_not_finite(dict(zip(sums, values.unbind(), strict=True)), names)
        if settings.gradient_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), settings.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        if self.average is not None:
            self.average.update(self.network)
        # A process's losses are its sums over the shared divisor: their mean over the processes is the batch's loss.
        means = world.sum(values) / world.size
        for name, mean in zip(sums, means.unbind(), strict=True):
            _add(self.sums, name, mean)
        self.summed += 1

    def _losses(self, forward: Callable[[Tensor], Any], batch: TrainingBatch) -> Mapping[str, Tensor]:
        device, kind = self.world.device, _AUTOCAST[self.settings.precision]
        images = batch.images.to(device, non_blocking=True)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=kind) if kind is not None else nullcontext():
            outputs = forward(images)
        return self.criterion(outputs, batch.targets.to(device))

    def _stop_if_not_finite(self, losses: Mapping[str, Tensor], names: list[str]) -> None:
        bad = (~torch.isfinite(torch.stack(list(losses.values())))).any().to(torch.float32)
        if self.world.sum(bad).item() == 0:
            return
        mine = names if bad.item() else []
        guilty = [name for part in self.world.gather(mine) for name in part]
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        raise RefineDetError(
            f"the loss of iteration {self.iteration + 1} is not finite ({values}); nothing was updated. Lower "
            f"--learning-rate, or set --warmup-iterations or --gradient-clip-norm. Images: {', '.join(guilty)}"
        )

    def _forward_module(self) -> Callable[[Tensor], Any]:
        module: nn.Module = self.network
        if self.settings.compile:
            module = torch.compile(module)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=ids)
        return module

    def _mean_losses(self) -> dict[str, float]:
        means = {name: (value / max(1, self.summed)).item() for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
