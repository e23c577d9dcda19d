"""The training loop, for any network, criterion, batches and loggers; nothing here knows RefineDet.

A network maps images to outputs, a criterion maps outputs and targets to named losses. ``training/train.py`` trains a
RefineDet with it, ``experiments/ssd_peer.py`` torchvision's SSD.
"""

from __future__ import annotations

import math
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
LARGEST_GROWTH = 1000.0
"""A loss this many times the first one (or 1, if that is more) does not come back."""
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
        self._batch: TrainingBatch | None = None  # the last one that was learned from
        # Everything that a resumed run must find again stands in the next lines, in state() and in load_state().
        self.iteration = 0
        self.optimizer = optimizer or build_optimizer(self.network, settings)
        self.average = MovingAverage(self.network, settings.ema_decay) if settings.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.first_loss = 0.0
        self.evaluated = -1

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
            "sums": dict(self.sums),
            "summed": self.summed,
            "first_loss": self.first_loss,
            "evaluated": self.evaluated,
            "random_state": torch.get_rng_state(),
            "random_state_cuda": cuda,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave; nothing is changed if it does not fit.

        Raises:
            RefineDetError: a value is missing, of another type or shape, or not finite; it is named.
        """
        self._check_state(state)
        self.iteration = state["iteration"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        self.scaler.load_state_dict(state["scaler"])
        self.sums, self.summed = dict(state["sums"]), state["summed"]
        self.first_loss, self.evaluated = state["first_loss"], state["evaluated"]
        torch.set_rng_state(state["random_state"])
        if state["random_state_cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_state_cuda"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        # Two parts depend on how far a training is, the rest is laid out as it is here.
        own = {name: value for name, value in self.state().items() if name not in ("sums", "random_state_cuda")}
        own["optimizer"] = {"param_groups": own["optimizer"]["param_groups"]}
        missing = [name for name in (*own, "sums", "random_state_cuda") if name not in state]
        if missing:
            raise RefineDetError(f"'{missing[0]}' is missing")
        sums, optimizer = state["sums"], state["optimizer"]
        buffers = optimizer.get("state") if isinstance(optimizer, dict) else None
        if not isinstance(sums, dict) or not isinstance(buffers, dict):
            raise RefineDetError("'sums' or 'optimizer' is of the wrong type")
        optimizer = {name: value for name, value in optimizer.items() if name != "state"}
        for name, value in own.items():
            require_like(value, optimizer if name == "optimizer" else state[name], name)
        require_like(dict.fromkeys(sums, 0.0), sums, "sums")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, values in buffers.items():
            if not isinstance(index, int) or not 0 <= index < len(parameters) or not isinstance(values, dict):
                raise RefineDetError(f"'optimizer.state.{index}' is not a parameter of this network")
            if values.keys() != next(iter(buffers.values())).keys():
                raise RefineDetError(f"'optimizer.state.{index}' has other entries")
            for name, value in values.items():
                if not isinstance(value, Tensor) and value is not None:
                    raise RefineDetError(f"'optimizer.state.{index}.{name}' is no tensor")
                if isinstance(value, Tensor) and value.ndim:
                    require_like(parameters[index].detach(), value, f"optimizer.state.{index}.{name}")
        if not 0 <= state["iteration"] <= self.settings.iterations:
            raise RefineDetError(f"iteration {state['iteration']} is not one of {self.settings.iterations}")

    def run(
        self,
        batches: Iterable[TrainingBatch],
        logger: Logger,
        *,
        save: Callable[[], None],
        evaluate: Callable[[], bool | None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Train to the last iteration, or until ``stop`` says True.

        Args:
            batches: one for every pass of this process, from the present iteration on.
            logger: receives the mean losses, the learning rate and the speed every ``log_every`` iterations.
            save: called every ``save_every`` iterations, before every evaluation and before the end, whichever it is;
                only with weights that are finite and whose loss is.
            evaluate: called every ``evaluate_every`` iterations and after the last one, when all is saved; True ends
                the training there, after another save.
            stop: asked after every iteration but the last; the processes leave together as soon as it says True in one.

        Returns:
            Whether the training is at its end: the last iteration is done, or ``evaluate`` ended it.

        Raises:
            RefineDetError: a loss, the gradient or the weights are not finite, or the loss has grown a thousandfold,
                be it by the update before a save; what was saved before stays.
        """
        settings = self.settings
        forward, passes = self._forward_module(), iter(batches)
        # A training may have been stopped between the save and the evaluation of this iteration.
        missed = self.evaluated < self.iteration and self._evaluation_due()
        if evaluate and missed and self._evaluate_now(evaluate, save):
            return True
        began, done = time.perf_counter(), 0
        self.network.train()
        while self.iteration < settings.iterations:
            asked = self._update(forward, passes, stop)
            done += settings.batch_size
            show_progress(logger, "training", self.iteration, settings.iterations)
            finished = self.iteration == settings.iterations
            if self.iteration % settings.log_every == 0 or finished:
                self.losses = self._mean_losses()
                rate = learning_rate_at(settings, self.iteration - 1)
                speed = done / (time.perf_counter() - began)
                logger.log(self.iteration, {**self.losses, "learning_rate": rate, "images_per_second": speed})
                began, done = time.perf_counter(), 0
            due = evaluate is not None and self._evaluation_due()
            if due or asked or finished or self.iteration % settings.save_every == 0:
                self._check_weights()
                save()
            if asked:
                return False
            if evaluate and due:
                if self._evaluate_now(evaluate, save):
                    return True
                self.network.train()
                began, done = time.perf_counter(), 0
        return True

    def _evaluate_now(self, evaluate: Callable[[], bool | None], save: Callable[[], None]) -> bool:
        """Evaluate; says whether that ends the training before its last iteration, which is saved then."""
        ended = bool(evaluate()) and self.iteration < self.settings.iterations
        self.evaluated = self.iteration
        if ended:
            save()
        return ended

    def _evaluation_due(self) -> bool:
        every = self.settings.evaluate_every
        regular = every > 0 and self.iteration > 0 and self.iteration % every == 0
        return regular or self.iteration == self.settings.iterations

    def _update(
        self, forward: Callable[[Tensor], Any], batches: Iterator[TrainingBatch], stop: Callable[[], bool] | None
    ) -> bool:
        """One update of the weights, from all passes of all processes; says whether one of them wants to stop."""
        settings, world = self.settings, self.world
        set_learning_rate(self.optimizer, learning_rate_at(settings, self.iteration))
        self.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        sums: dict[str, Tensor] = {}
        for step in range(settings.accumulation_steps):
            self._batch = batch = next(batches)
            names += batch.names
            last = step == settings.accumulation_steps - 1
            quiet = forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
            with quiet:
                losses = self._losses(forward, batch)
                torch.autograd.backward(self.scaler.scale(losses["total"] / settings.accumulation_steps))
            for name, loss in losses.items():
                value = loss.detach().double() / settings.accumulation_steps
                sums[name] = sums[name] + value if name in sums else value
        norm = self._clipped_norm()
        last_one = self.iteration + 1 == settings.iterations
        asked = torch.tensor(float(stop is not None and not last_one and stop()), device=world.device)
        own = torch.stack([*sums.values(), asked.double()])
        # A process's losses are its sums over the shared divisor: their mean over the processes is the batch's loss.
        # One exchange and one wait for the device serve the guards, the log and the wish to stop.
        *means, wishes, length = torch.cat([world.sum(own), norm.double().reshape(1)]).tolist()
        shared = {name: mean / world.size for name, mean in zip(sums, means, strict=True)}
        self._check_update(shared, length, own, names)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        if self.average is not None:
            self.average.update(self.network)
        for name, mean in shared.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean
        self.summed += 1
        return bool(wishes)

    def _clipped_norm(self) -> Tensor:
        """Norm of the whole gradient before it is clipped, if it is."""
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.gradient_clip_norm
        if limit is not None:
            return nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        return nn.utils.get_total_norm(gradients).to(self.world.device)

    def _losses(self, forward: Callable[[Tensor], Any], batch: TrainingBatch) -> Mapping[str, Tensor]:
        device, kind = self.world.device, _AUTOCAST[self.settings.precision]
        images = batch.images.to(device, non_blocking=True)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=kind) if kind is not None else nullcontext():
            outputs = forward(images)
        return self.criterion(outputs, batch.targets.to(device))

    def _check_update(self, losses: Mapping[str, float], norm: float, own: Tensor, names: list[str]) -> None:
        """Refuse an update that would ruin the weights.

        Args:
            losses: means over the processes.
            norm: of the gradient, the same in all processes.
            own: losses of this process.
            names: images of this process.
        """
        number = self.iteration + 1
        values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        advice = "nothing was updated. Lower --learning-rate, or set --warmup-iterations or --gradient-clip-norm."
        finite = all(math.isfinite(value) for value in losses.values())
        # In fp16 a gradient that overflows is ordinary: the scaler leaves the update out and scales less from then on.
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0
        if not finite or not (math.isfinite(norm) or overflow):
            what = "the gradient" if finite else "the loss"
            guilty = names if finite or not bool(own.isfinite().all()) else []
            images = ", ".join(name for part in self.world.gather(guilty) for name in part)
            raise RefineDetError(f"{what} of iteration {number} is not finite ({values}); {advice} Images: {images}")
        if self.first_loss == 0.0:
            self.first_loss = losses["total"]
        if losses["total"] > self._largest_loss():
            raise RefineDetError(
                f"the loss of iteration {number} is {losses['total']:.4g} and began with {self.first_loss:.4g}: "
                f"the learning rate has ruined the weights; {advice} Start a new run in another --out"
            )

    def _check_weights(self) -> None:
        networks = [self.network] if self.average is None else [self.network, self.average.network]
        states = (tensor for network in networks for tensor in network.state_dict().values())
        tensors = [tensor for tensor in states if tensor.is_floating_point()]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise RefineDetError(
                f"the weights are not finite after iteration {self.iteration}; they were not saved, and what was saved "
                "before stays. Lower --learning-rate, or set --warmup-iterations or --gradient-clip-norm"
            )
        if self._batch is not None and not (loss := self._loss_now(self._batch)) <= self._largest_loss():
            # No later iteration would notice, were this the last one.
            raise RefineDetError(
                f"with the weights after iteration {self.iteration} the loss is {loss:.4g}, and it began with "
                f"{self.first_loss:.4g}: the learning rate has ruined them; they were not saved, and what was saved "
                "before stays. Lower --learning-rate, or set --warmup-iterations or --gradient-clip-norm"
            )

    def _loss_now(self, batch: TrainingBatch) -> float:
        """Mean loss over the processes with the present weights; nothing of the training changes by looking."""
        kept = [buffer.clone() for buffer in self.network.buffers()]
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            total = self._losses(self.network, batch)["total"].double().reshape(1)
            for buffer, value in zip(self.network.buffers(), kept, strict=True):
                buffer.copy_(value)
        return float(self.world.sum(total)) / self.world.size

    def _largest_loss(self) -> float:
        return LARGEST_GROWTH * max(1.0, self.first_loss)

    def _forward_module(self) -> Callable[[Tensor], Any]:
        module: nn.Module = self.network
        if self.settings.compile:
            module = torch.compile(module)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=ids)
        return module

    def _mean_losses(self) -> dict[str, float]:
        means = {name: value / max(1, self.summed) for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means


def require_like(wanted: Any, given: Any, name: str) -> None:
    """Check that a value from a file is laid out like our own: types, keys, lengths, shapes, finite numbers.

    Raises:
        RefineDetError: it is not; ``name`` is given with the place in it.
    """
    if isinstance(wanted, Tensor):
        if not isinstance(given, Tensor) or given.shape != wanted.shape or given.dtype != wanted.dtype:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise RefineDetError(f"'{name}' is {shape}, not a tensor of {wanted.dtype} and shape {tuple(wanted.shape)}")
        if given.is_floating_point() and not bool(given.isfinite().all()):
            raise RefineDetError(f"'{name}' is not finite")
    elif isinstance(wanted, Mapping):
        if not isinstance(given, Mapping) or wanted.keys() != given.keys():
            raise RefineDetError(f"'{name}' has other entries")
        for key, value in wanted.items():
            require_like(value, given[key], f"{name}.{key}")
    elif isinstance(wanted, (list, tuple)):
        if not isinstance(given, (list, tuple)) or len(given) != len(wanted):
            raise RefineDetError(f"'{name}' has another length")
        for index, pair in enumerate(zip(wanted, given, strict=True)):
            require_like(*pair, f"{name}.{index}")
    elif isinstance(wanted, (bool, str)) or wanted is None:
        if type(given) is not type(wanted):
            raise RefineDetError(f"'{name}' is {type(given).__name__}, not {type(wanted).__name__}")
    elif isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise RefineDetError(f"'{name}' is no finite number")
    elif isinstance(wanted, int) and not isinstance(given, int):
        raise RefineDetError(f"'{name}' is no whole number")
