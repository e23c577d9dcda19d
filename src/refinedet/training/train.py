"""The call of a training: from a preset and a data folder to a run folder with the best and the last weights.

``train`` and ``resume`` put together the data, the network and the loss of a RefineDet, give them to the loop of
``training/trainer.py``, and evaluate and save on its behalf. What a run folder holds stands in ``training/run.py``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from refinedet.config import Preset
from refinedet.data.layouts import open_joined
from refinedet.data.records import DetectionDataset
from refinedet.dataclass_json import save_json
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.evaluate import collect_detections, evaluate_detections
from refinedet.evaluation.page import write_page
from refinedet.evaluation.report import Report
from refinedet.evaluation.settings import EvaluationSettings
from refinedet.files import check_output_folder, user_path
from refinedet.loggers import ConsoleLogger, CsvLogger, Logger, LoggerGroup, TensorBoardLogger
from refinedet.model.network import RefineDetNetwork
from refinedet.provenance import Provenance
from refinedet.training.batches import training_batches
from refinedet.training.distributed import World, join_world
from refinedet.training.loss import RefineDetLoss, set_background_prior
from refinedet.training.optim import build_optimizer
from refinedet.training.run import (
    BEST_FOLDER,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    LAST_FOLDER,
    METRICS_FILE,
    REPORT_FOLDER,
    TENSORBOARD_FOLDER,
    RunConfig,
    is_run,
    load_checkpoint,
    model_card,
    read_run_config,
    save_checkpoint,
)
from refinedet.training.trainer import Trainer
from refinedet.weights.convert import Fitted, fit_backbone
from refinedet.weights.store import load_weights
from refinedet.weights.transfer import Transfer, adopt_config, changed_fields, transfer_classes

_LOG = logging.getLogger(__name__)


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


def train(
    preset: Preset,
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path = "runs/refinedet",
    init_weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "auto",
    init: str | Path | None = None,
    loggers: Sequence[Logger] = (),
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Train a detector.

    Args:
        preset: model and training; ``num_classes`` is replaced by the number of classes of the data.
        data: one or several folders in VOC, COCO or YOLO layout; several are joined and must have the same classes.
        out: run folder; must not hold a run yet.
        init_weights: a file with ImageNet weights of the backbone (see docs/weights.md), or "random". "torchvision" (or
            None) lets torchvision download them. Mean, std and channel order become those of the weights.
        class_names: in label order; by default they come from the data.
        device: "cpu", "cuda" or "auto".
        init: a model to start from instead of ImageNet weights (see ``RefineDet.from_pretrained``). Classes are
            carried over by name (see ``weights.transfer``), others start anew; what was done is printed. Mean, std,
            channel order and the like come from the model, whatever the preset says.
        loggers: receive the same numbers as metrics.csv and the console; closed at the end. Used by the first process
            only.
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
    read = [path for path in (*paths, init, init_weights) if path is not None]
    for part in (folder, folder / BEST_FOLDER, folder / LAST_FOLDER):
        check_output_folder(part, (CONFIG_FILE, METRICS_FILE), inputs=read, ours=lambda _: is_run(folder))
    if init is not None and init_weights is not None:
        raise UsageError("give either a model to start from or backbone weights, not both")
    with join_world(device) as world:
        dataset = open_joined(paths, preset.train.train_split, class_names, allow_outside=preset.train.allow_outside)
        model_config = dataclasses.replace(preset.model, num_classes=len(dataset.class_names))
        start = None if init is None else RefineDet.from_pretrained(init)
        if start is not None:
            model_config, adopted = adopt_config(model_config, start.config)
            if adopted and world.is_main:
                _LOG.info("init: %s as %s has them", ", ".join(adopted), init)
        fitted = None if start is not None else fit_backbone(model_config, init_weights)
        if fitted is not None:
            adopted = changed_fields(model_config, fitted.config)
            model_config = fitted.config
            if adopted and world.is_main:
                _LOG.info("init weights: %s as %s needs them", ", ".join(adopted), fitted.file.source)
        preset = dataclasses.replace(preset, model=model_config)
        torch.manual_seed(preset.train.seed)
        model = RefineDet(model_config, dataset.class_names, category_ids=dataset.category_ids)
        if preset.train.loss.classification == "focal":
            set_background_prior(model.network)
        source, transfer = _initialise(model, init, start, fitted)
        if transfer is not None and world.is_main:
            _LOG.info("init: %s", transfer.summary())
        config = RunConfig(preset, tuple(str(user_path(path)) for path in paths), dataset.class_names, source)
        if world.is_main:
            save_json(config, folder / CONFIG_FILE)
        return _Training(folder, config, model, dataset, world, loggers).run(stop)


def resume(
    run_folder: str | Path,
    *,
    device: str = "auto",
    loggers: Sequence[Logger] = (),
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Continue a training from its last checkpoint, with the outcome of one that was never stopped.

    Args:
        run_folder: what ``train`` was given as ``out``.
        device: "cpu", "cuda" or "auto".
        loggers: as for ``train``.
        stop: as for ``train``.

    Raises:
        RefineDetError: no run there, or a corrupt file in it.
    """
    folder = user_path(run_folder)
    if not (folder / CONFIG_FILE).exists():
        raise UsageError(f"{folder}: no run there ({CONFIG_FILE} is missing)")
    config = read_run_config(folder / CONFIG_FILE)
    state = load_checkpoint(folder / CHECKPOINT_FILE)
    with join_world(device) as world:
        dataset = open_joined(
            config.data,
            config.preset.train.train_split,
            config.class_names,
            allow_outside=config.preset.train.allow_outside,
        )
        model = RefineDet(config.preset.model, config.class_names, category_ids=dataset.category_ids)
        training = _Training(folder, config, model, dataset, world, loggers)
        try:
            training.load_state(state)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise RefineDetError(f"{folder / CHECKPOINT_FILE}: does not fit the run's config ({reason})") from None
        return training.run(stop)


def _initialise(
    model: RefineDet, init: str | Path | None, start: RefineDet | None, fitted: Fitted | None
) -> tuple[str, Transfer | None]:
    """Fill the network with its first weights; say where they came from and what became of the classes."""
    if start is not None:
        own = model.network.state_dict()
        state, transfer = transfer_classes(own, start.network.state_dict(), model.class_names, start.class_names)
        load_weights(model.network, state, str(init))
        return str(init), transfer
    if fitted is None:
        return "random", None
    fitted.fill(model.network)
    return Path(fitted.file.source).name, None


class _Training:
    """A RefineDet in training: the loop, what it evaluates on, and what it leaves in the run folder."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        model: RefineDet,
        dataset: DetectionDataset,
        world: World,
        loggers: Sequence[Logger],
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
            raise UsageError("batch normalisation needs more than one image of side 64: raise --batch-size or the size")
        self.folder, self.config, self.model, self.dataset, self.world = folder, config, model, dataset, world
        self.settings, self.own_loggers = settings, loggers
        self.evaluation_set = self._open_evaluation_set()
        self.also_trained_on = self._count_shared_images()
        criterion = RefineDetLoss(
            model.config, settings.loss, normalizer=world.mean_divisor if world.size > 1 else None
        )
        model.to(world.device)
        # A slow backbone is for keeping what it knows; with random numbers it knows nothing.
        random = config.init_weights == "random"
        even = dataclasses.replace(settings, backbone_learning_rate_factor=1.0)
        optimizer = build_optimizer(model.network, even if random else settings)
        self.trainer = Trainer(model.network, criterion.to(world.device), settings, world, optimizer)
        self.best = -1.0

    def state(self) -> dict[str, Any]:
        """The checkpoint: tensors and plain types only."""
        return {**self.trainer.state(), "best": self.best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self.trainer.load_state(state)
        self.best = state["best"]

    def run(self, stop: Callable[[], bool] | None = None) -> Run:
        """Train to the last iteration or until ``stop`` says True, evaluating and saving on the way."""
        trainer, world = self.trainer, self.world
        batches = training_batches(
            self.dataset,
            self.model.config,
            self.settings,
            start=trainer.iteration,
            rank=world.rank,
            world=world.size,
            pin_memory=world.device.type == "cuda",
        )
        with self._loggers() as loggers:

            def evaluate() -> None:
                report = self._evaluate(self.settings.evaluate_limit, loggers)
                self._log_report(loggers, report)
                self._save(report)

            if not trainer.run(batches, loggers, save=lambda: self._save(None), evaluate=evaluate, stop=stop):
                return Run(self.folder, self._current(), None, trainer.losses, finished=False)
            return self._finish(loggers)

    def _open_evaluation_set(self) -> DetectionDataset | None:
        split = self.settings.evaluate_split
        if split in ("", "none"):
            return None
        if split == self.settings.train_split:
            raise UsageError(
                f"'{split}' is the training split; evaluate on another, or on none with --evaluate-split none"
            )
        return open_joined(self.config.data, split, self.config.class_names, allow_outside=self.settings.allow_outside)

    def _count_shared_images(self) -> int:
        """How many images are both trained and evaluated on; a note if there are any."""
        if self.evaluation_set is None:
            return 0
        trained_on = {record.image_path for record in self.dataset.records}
        both = sum(record.image_path in trained_on for record in self.evaluation_set.records)
        if both and self.world.is_main:
            _LOG.warning(
                "%d of the %d images of '%s' are trained on too, so its figure does not say how good the model is on "
                "others",
                both,
                len(self.evaluation_set),
                self.settings.evaluate_split,
            )
        return both

    def _loggers(self) -> LoggerGroup:
        if not self.world.is_main:
            return LoggerGroup([])
        iteration = self.trainer.iteration
        step = iteration or None
        self.folder.mkdir(parents=True, exist_ok=True)
        loggers: list[Logger] = [
            ConsoleLogger(self.settings.iterations, start=iteration),
            CsvLogger(self.folder / METRICS_FILE, resume_step=step),
        ]
        with suppress(UsageError):  # TensorBoard is an extra; metrics.csv has the same numbers
            loggers.append(TensorBoardLogger(self.folder / TENSORBOARD_FOLDER, resume_step=step))
        return LoggerGroup([*loggers, *self.own_loggers])

    def _current(self) -> RefineDet:
        """The weights worth evaluating and keeping, sharing memory with the training."""
        average = self.trainer.average
        network = self.model.network if average is None else cast(RefineDetNetwork, average.network)
        return RefineDet(
            self.model.config, self.model.class_names, network=network, category_ids=self.model.category_ids
        )

    def _evaluate(self, limit: int | None, loggers: LoggerGroup) -> Report | None:
        """Evaluate over all processes: each takes every n-th image, so none counts twice."""
        dataset, world = self.evaluation_set, self.world
        if dataset is None:
            return None
        count = len(dataset) if limit is None else min(limit, len(dataset))
        own = range(world.rank, count, world.size)
        show = partial(loggers.progress, "evaluating")
        detections = collect_detections(self._current(), dataset, own, on_progress=show)
        merged = {index: one for part in world.gather(detections) for index, one in part.items()}
        settings = EvaluationSettings(
            model=self.model.config,
            iteration=self.trainer.iteration,
            limit=limit,
            trained_on=self.also_trained_on if limit is None else None,
            provenance=Provenance.now(world.device),
        )
        return evaluate_detections(dataset, merged, self.settings.metric, settings=settings)

    def _log_report(self, loggers: LoggerGroup, report: Report | None) -> None:
        if report is not None:
            loggers.log(self.trainer.iteration, {"mAP": report["mAP"]})

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
        iteration = self.trainer.iteration
        card = model_card(self.config.preset, self.model.class_names, self.folder.name, iteration, current.metrics)
        # The weights first: whoever resumes from last.ckpt finds files that are as old or newer, never missing ones.
        current.save_pretrained(self.folder / LAST_FOLDER, card=card)
        if better:
            current.save_pretrained(self.folder / BEST_FOLDER, card=card)
        save_checkpoint(self.folder / CHECKPOINT_FILE, self.state())

    def _measured(self, report: Report) -> dict[str, Any]:
        return {
            "mAP": round(report["mAP"], 6),
            "metric": report.metric,
            "data": report.data,
            "split": report.split,
            "images": report.images,
            "iteration": self.trainer.iteration,
            "seed": self.settings.seed,
            **({"also_trained_on": self.also_trained_on} if self.also_trained_on else {}),
        }

    def _finish(self, loggers: LoggerGroup) -> Run:
        """Evaluate the last weights on the whole split and save everything."""
        report = self._evaluate(None, loggers)
        self._log_report(loggers, report)
        self._save(report)
        if report is not None and self.world.is_main:
            write_page(report, report.save(self.folder / REPORT_FOLDER), metrics_csv=self.folder / METRICS_FILE)
        self.world.barrier()
        self.model.network.eval()
        model = self._current()
        if report is not None:
            model.metrics = self._measured(report)
        return Run(self.folder, model, report, self.trainer.losses)
