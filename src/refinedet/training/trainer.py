"""Training, from a preset and a data folder to a run folder with the best and the last weights.

A run folder holds config.json (what was asked for), metrics.csv, best/ and last/ (weights with config and model card),
last.ckpt (all that ``resume`` needs), report/ (the final evaluation) and events for TensorBoard.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from refinedet.config import Preset, TrainConfig, load_json, save_json, to_dict
from refinedet.data.layouts import open_joined
from refinedet.data.records import DetectionDataset
from refinedet.detector import RefineDet, load_weights, read_safetensors
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.page import write_page
from refinedet.evaluation.report import Report, collect_detections, evaluate_detections
from refinedet.files import check_output_folder, read_json, user_path
from refinedet.loggers import METRICS_FILE, ConsoleLogger, CsvLogger, Logger, LoggerGroup, TensorBoardLogger
from refinedet.model.backbones import imagenet_state
from refinedet.training.batches import Batch, training_batches
from refinedet.training.card import model_card
from refinedet.training.checkpoint import load_checkpoint, save_checkpoint
from refinedet.training.distributed import World, join_world
from refinedet.training.loss import RefineDetLoss, set_background_prior
from refinedet.training.optim import MovingAverage, build_optimizer, learning_rate_at, set_learning_rate
from refinedet.weights.transfer import Transfer, adopt_config, transfer_classes

CONFIG_FILE, CHECKPOINT_FILE = "config.json", "last.ckpt"
LOSSES = ("arm_classification", "arm_localization", "odm_classification", "odm_localization", "total")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Run:
    """What a training left behind."""

    folder: Path
    """The run folder."""
    model: RefineDet
    """The last weights (their moving average, where the preset keeps one)."""
    report: Report | None
    """Evaluation of ``model`` on the whole evaluation split; None if there is no such split."""
    losses: dict[str, float]
    """Means of the last logged iterations."""
    finished: bool = True
    """False if it was asked to stop early; then there is no report, and ``resume`` goes on."""


@dataclass(frozen=True)
class RunConfig:
    """config.json of a run folder: all that decides the outcome of a training."""

    preset: Preset
    """Model and training, flags included."""
    data: tuple[str, ...]
    """Data folders."""
    class_names: tuple[str, ...]
    """In label order."""
    initial_weights: str
    """Where the weights came from: a file, a model, "torchvision" or "random"."""


def train(
    preset: Preset,
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path = "runs/refinedet",
    backbone_weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "auto",
    init: str | Path | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Train a detector.

    Args:
        preset: model and training; ``num_classes`` is replaced by the number of classes of the data.
        data: one or several folders in VOC, COCO or YOLO layout; several are joined and must have the same classes.
        out: run folder; must not hold a run yet.
        backbone_weights: ImageNet weights of the backbone in torchvision's layout (.safetensors, or .pth read with
            weights_only), or "random". "torchvision" (or None) lets torchvision download them.
        class_names: in label order; by default they come from the data.
        device: "cpu", "cuda" or "auto".
        init: a model to start from instead of ImageNet weights (see ``RefineDet.from_pretrained``). Classes are
            carried over by name (see ``weights.transfer``), others start anew; what was done is printed. Mean, std,
            channel order and the like come from the model, whatever the preset says.
        stop: asked after every iteration but the last; once it says True (the time is up, say), everything is saved
            for ``resume`` and the call returns.

    Returns:
        The run, finished unless ``stop`` said otherwise.

    Raises:
        UsageError: the call or the data's layout is wrong, or ``out`` holds a run.
        RefineDetError: bad files, a full disk, a loss that is no finite number.
    """
    folder = user_path(out)
    # A run that stopped before its first checkpoint has nothing to lose, and nothing to resume from.
    if (folder / CHECKPOINT_FILE).exists():
        raise UsageError(f"{folder}: holds a run already; continue it with --resume {folder} or choose another --out")
    paths = (data,) if isinstance(data, (str, Path)) else tuple(data)
    read = [path for path in (*paths, init, backbone_weights) if path is not None]
    for part in (folder, folder / "best", folder / "last"):
        check_output_folder(part, (CONFIG_FILE, METRICS_FILE), inputs=read, ours=lambda _: _is_run(folder))
    if init is not None and backbone_weights is not None:
        raise UsageError("give either a model to start from or backbone weights, not both")
    with join_world(device) as world:
        dataset = open_joined(paths, preset.train.train_split, class_names)
        model_config = dataclasses.replace(preset.model, num_classes=len(dataset.class_names))
        start = None if init is None else RefineDet.from_pretrained(init)
        if start is not None:
            model_config, adopted = adopt_config(model_config, start.config)
            if adopted and world.is_main:
                print(f"init: {', '.join(adopted)} as {init} has them")
        preset = dataclasses.replace(preset, model=model_config)
        torch.manual_seed(preset.train.seed)
        model = RefineDet(model_config, dataset.class_names)
        if preset.train.loss.classification == "focal":
            set_background_prior(model.network)
        source, transfer = _initialise(model, backbone_weights, init, start)
        if transfer is not None and world.is_main:
            print(f"init: {transfer.summary()}")
        config = RunConfig(preset, tuple(str(Path(p).expanduser()) for p in paths), dataset.class_names, source)
        if world.is_main:
            save_json(config, folder / CONFIG_FILE)
        return _Trainer(folder, config, model, dataset, world).run(stop)


def resume(run_folder: str | Path, *, device: str = "auto", stop: Callable[[], bool] | None = None) -> Run:
    """Continue a training from its last checkpoint, with the outcome of one that was never stopped.

    Args:
        run_folder: what ``train`` was given as ``out``.
        device: "cpu", "cuda" or "auto".
        stop: as for ``train``.

    Raises:
        RefineDetError: no run there, or a corrupt file in it.
    """
    folder = Path(run_folder).expanduser()
    if not (folder / CONFIG_FILE).exists():
        raise UsageError(f"{folder}: no run there ({CONFIG_FILE} is missing)")
    config = load_json(RunConfig, folder / CONFIG_FILE)
    state = load_checkpoint(folder / CHECKPOINT_FILE)
    with join_world(device) as world:
        dataset = open_joined(config.data, config.preset.train.train_split, config.class_names)
        model = RefineDet(config.preset.model, config.class_names)
        trainer = _Trainer(folder, config, model, dataset, world)
        try:
            trainer.load_state(state)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise RefineDetError(f"{folder / CHECKPOINT_FILE}: does not fit the run's config ({reason})") from None
        return trainer.run(stop)


def _is_run(folder: Path) -> bool:
    """Whether a folder holds the settings of a run, which one that saved nothing yet may replace."""
    try:
        return "preset" in read_json(folder / CONFIG_FILE)
    except (RefineDetError, TypeError):
        return False


def _initialise(
    model: RefineDet,
    backbone_weights: str | Path | None,
    init: str | Path | None,
    start: RefineDet | None,
) -> tuple[str, Transfer | None]:
    """Fill the network with its first weights; say where they came from and what became of the classes."""
    if start is not None:
        own = model.network.state_dict()
        state, transfer = transfer_classes(own, start.network.state_dict(), model.class_names, start.class_names)
        load_weights(model.network, state, str(init))
        return str(init), transfer
    if backbone_weights == "random":
        return "random", None
    if backbone_weights is None or backbone_weights == "torchvision":
        model.network.backbone.load_imagenet(imagenet_state(model.config), "torchvision")
        return "torchvision", None
    path = Path(backbone_weights).expanduser()
    if path.suffix in (".pth", ".pt"):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RefineDetError(f"{path}: no such file") from None
        except Exception:
            raise RefineDetError(
                f"{path}: not a readable file of tensors (cut, corrupt, or a pickled object)"
            ) from None
    else:
        tensors = read_safetensors(path)
    with torch.no_grad():
        model.network.backbone.load_imagenet(tensors, str(path))
    return path.name, None


class _Trainer:
    """The state of a training and its loop."""

    def __init__(
        self, folder: Path, config: RunConfig, model: RefineDet, dataset: DetectionDataset, world: World
    ) -> None:
        settings = config.preset.train
        if settings.batch_size % (settings.accumulation_steps * world.size):
            raise UsageError(
                f"batch_size {settings.batch_size} does not divide into {settings.accumulation_steps} accumulation "
                f"steps on {world.size} processes"
            )
        sides = [*model.config.image_size, *(side for _, side in settings.size_schedule)]
        per_pass = settings.batch_size // (settings.accumulation_steps * world.size)
        if per_pass == 1 and min(sides) == 64 and any(isinstance(m, nn.BatchNorm2d) for m in model.network.modules()):
            raise UsageError(
                "batch normalisation needs more than one picture of side 64: raise --batch-size or the size"
            )
        self.folder, self.config, self.world, self.dataset = folder, config, world, dataset
        self.settings: TrainConfig = settings
        self.evaluation_set = self._open_evaluation_set()
        self.also_trained_on = self._count_shared_pictures()
        self.model = model.to(world.device)
        self.network = model.network
        if settings.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.criterion = RefineDetLoss(
            model.config, settings.loss, total=world.mean_divisor if world.size > 1 else None
        ).to(world.device)
        # Everything that a resumed run must find again stands in the next lines, in state() and in load_state().
        self.iteration = 0
        # A slow backbone is for keeping what it knows; with random numbers it knows nothing.
        random = config.initial_weights == "random"
        even = dataclasses.replace(settings, backbone_learning_rate_factor=1.0)
        self.optimizer = build_optimizer(self.network, even if random else settings)
        self.average = MovingAverage(self.network, settings.ema_decay) if settings.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
        self.best = -1.0
        self.sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=world.device)
        self.summed = 0

    def state(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        cuda = torch.cuda.get_rng_state() if self.world.device.type == "cuda" else None
        return {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "average_updates": self.average.updates if self.average else 0,
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "sums": self.sums,
            "summed": self.summed,
            "random_state": torch.get_rng_state(),
            "random_state_cuda": cuda,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self.iteration = state["iteration"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        self.sums.copy_(state["sums"])
        self.summed = state["summed"]
        torch.set_rng_state(state["random_state"])
        if state["random_state_cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_state_cuda"])

    def run(self, stop: Callable[[], bool] | None = None) -> Run:
        """Train to the last iteration or until ``stop`` says True, evaluating and saving on the way."""
        settings, world = self.settings, self.world
        batches = training_batches(
            self.dataset,
            self.model.config,
            settings,
            start=self.iteration,
            rank=world.rank,
            world=world.size,
            pin_memory=world.device.type == "cuda",
        )
        forward = self._forward_module()
        losses: dict[str, float] = {}
        with self._loggers() as loggers:
            began, done = time.perf_counter(), 0
            self.network.train()
            while self.iteration < settings.iterations:
                self._update(forward, batches)
                done += settings.batch_size
                finished = self.iteration == settings.iterations
                if self.iteration % settings.log_every == 0 or finished:
                    losses = self._mean_losses()
                    rate = learning_rate_at(settings, self.iteration - 1)
                    speed = done / (time.perf_counter() - began)
                    loggers.log(self.iteration, {**losses, "learning_rate": rate, "images_per_second": speed})
                    began, done = time.perf_counter(), 0
                if settings.evaluate_every and self.iteration % settings.evaluate_every == 0 and not finished:
                    report = self._evaluate(settings.evaluate_limit)
                    self._log_report(loggers, report)
                    self._save(report)
                    began, done = time.perf_counter(), 0
                elif self.iteration % settings.save_every == 0 and not finished:
                    self._save(None)
                # One process's clock is enough: all leave at the same iteration.
                if stop and not finished and world.sum(torch.tensor(float(stop()), device=world.device)).item():
                    self._save(None)
                    return Run(self.folder, self._current(), None, losses, finished=False)
            return self._finish(loggers, losses)

    def _update(self, forward: Callable[[Tensor], Any], batches: Iterator[Batch]) -> None:
        """One update of the weights, from all passes of all processes."""
        settings, world = self.settings, self.world
        set_learning_rate(self.optimizer, learning_rate_at(settings, self.iteration))
        self.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        iteration_losses = torch.zeros_like(self.sums)
        for step in range(settings.accumulation_steps):
            batch = next(batches)
            names += batch.names
            last = step == settings.accumulation_steps - 1
            quiet = forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
            with quiet:
                losses = self._losses(forward, batch)
                torch.autograd.backward(self.scaler.scale(losses["total"] / settings.accumulation_steps))
            values = torch.stack([losses[name].detach() for name in LOSSES]).double()
            iteration_losses += values / settings.accumulation_steps
        self._stop_if_not_finite(iteration_losses, names)
        if settings.gradient_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), settings.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        if self.average is not None:
            self.average.update(self.network)
        # A process's losses are its sums over the shared divisor: their mean over the processes is the batch's loss.
        self.sums += world.sum(iteration_losses) / world.size
        self.summed += 1

    def _losses(self, forward: Callable[[Tensor], Any], batch: Batch) -> dict[str, Tensor]:
        device, kind = self.world.device, _AUTOCAST[self.settings.precision]
        images = batch.images.to(device, non_blocking=True)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=kind) if kind is not None else nullcontext():
            predictions = forward(images)
        losses: dict[str, Tensor] = self.criterion(predictions, batch.targets.to(device))
        return losses

    def _stop_if_not_finite(self, losses: Tensor, names: list[str]) -> None:
        bad = (~torch.isfinite(losses)).any().to(torch.float32)
        if self.world.sum(bad).item() == 0:
            return
        mine = names if bad.item() else []
        guilty = [name for part in self.world.gather(mine) for name in part]
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(LOSSES, losses.tolist(), strict=True))
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
        means = (self.sums / max(1, self.summed)).tolist()
        self.sums.zero_()
        self.summed = 0
        return dict(zip(LOSSES, means, strict=True))

    def _open_evaluation_set(self) -> DetectionDataset | None:
        split = self.settings.evaluate_split
        if split in ("", "none"):
            return None
        if split == self.settings.train_split:
            raise UsageError(
                f"'{split}' is the training split; evaluate on another, or on none with --evaluate-split none"
            )
        return open_joined(self.config.data, split, self.config.class_names)

    def _count_shared_pictures(self) -> int:
        """How many pictures are both trained and evaluated on; a note if there are any."""
        if self.evaluation_set is None:
            return 0
        trained_on = {record.image_path for record in self.dataset.records}
        both = sum(record.image_path in trained_on for record in self.evaluation_set.records)
        if both and self.world.is_main:
            print(
                f"note: {both} of the {len(self.evaluation_set)} pictures of '{self.settings.evaluate_split}' are "
                f"trained on too, so its figure does not say how good the model is on others"
            )
        return both

    def _loggers(self) -> LoggerGroup:
        if not self.world.is_main:
            return LoggerGroup([])
        step = self.iteration or None
        self.folder.mkdir(parents=True, exist_ok=True)
        loggers: list[Logger] = [
            ConsoleLogger(self.settings.iterations, start=self.iteration),
            CsvLogger(self.folder / METRICS_FILE, resume_step=step),
        ]
        with suppress(UsageError):  # TensorBoard is an extra; metrics.csv has the same numbers
            loggers.append(TensorBoardLogger(self.folder / "tensorboard", resume_step=step))
        return LoggerGroup(loggers)

    def _current(self) -> RefineDet:
        """The weights worth evaluating and keeping, sharing memory with the training."""
        network = self.average.network if self.average is not None else self.network
        return RefineDet(self.model.config, self.model.class_names, network=network)

    def _evaluate(self, limit: int | None) -> Report | None:
        """Evaluate over all processes: each takes every n-th picture, so none counts twice."""
        dataset, world = self.evaluation_set, self.world
        if dataset is None:
            return None
        count = len(dataset) if limit is None else min(limit, len(dataset))
        own = range(world.rank, count, world.size)
        found = collect_detections(self._current(), dataset, own)
        merged = {index: one for part in world.gather(found) for index, one in part.items()}
        self.network.train()
        settings = {"model": to_dict(self.model.config), "iteration": self.iteration, "limit": limit}
        return evaluate_detections(dataset, merged, self.settings.metric, settings=settings)

    def _log_report(self, loggers: LoggerGroup, report: Report | None) -> None:
        if report is not None:
            loggers.log(self.iteration, {"mAP": report["mAP"]})

    def _save(self, report: Report | None) -> None:
        """Write last.ckpt and last/, and best/ if the report says so."""
        better = report is not None and report["mAP"] > self.best
        if report is not None and better:
            self.best = report["mAP"]
        if not self.world.is_main:
            return
        current = self._current()
        if report is not None:
            current.metrics = self._measured(report)
        card = model_card(self.config.preset, self.model.class_names, self.folder.name, self.iteration, current.metrics)
        # The weights first: whoever resumes from last.ckpt finds files that are as old or newer, never missing ones.
        current.save_pretrained(self.folder / "last", card=card)
        if better:
            current.save_pretrained(self.folder / "best", card=card)
        save_checkpoint(self.folder / CHECKPOINT_FILE, self.state())

    def _measured(self, report: Report) -> dict[str, Any]:
        return {
            "mAP": round(report["mAP"], 6),
            "metric": report.metric,
            "data": report.data,
            "split": report.split,
            "images": report.images,
            "iteration": self.iteration,
            "seed": self.settings.seed,
            **({"also_trained_on": self.also_trained_on} if self.also_trained_on else {}),
        }

    def _finish(self, loggers: LoggerGroup, losses: dict[str, float]) -> Run:
        """Evaluate the last weights on the whole split and save everything."""
        report = self._evaluate(None)
        self._log_report(loggers, report)
        self._save(report)
        if report is not None and self.world.is_main:
            write_page(report, report.save(self.folder / "report"), metrics_csv=self.folder / METRICS_FILE)
        self.world.barrier()
        self.network.eval()
        model = self._current()
        if report is not None:
            model.metrics = self._measured(report)
        return Run(self.folder, model, report, losses)
