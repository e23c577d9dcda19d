"""A RefineDet in training: what the loop is given, what it evaluates on, and what it leaves in the run folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from refinedet.config import TrainConfig
from refinedet.dataclass_json import save_json, to_dict
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.evaluate import BATCH_SIZE, collect_detections, evaluate_detections
from refinedet.evaluation.page import write_page
from refinedet.evaluation.report import Report
from refinedet.evaluation.run_data import count_shared
from refinedet.evaluation.settings import EvaluationSettings
from refinedet.loggers import ConsoleLogger, CsvLogger, Logger, LoggerGroup
from refinedet.model.network import RefineDetNetwork
from refinedet.schedule import change_preset, iterations_of_epochs
from refinedet.trackers import open_trackers
from refinedet.training.batches import Batch, explain_loader, training_batches
from refinedet.training.card import model_card
from refinedet.training.data import TrainingData
from refinedet.training.distributed import World, share_of
from refinedet.training.loss import RefineDetLoss
from refinedet.training.optim import build_optimizer
from refinedet.training.pace import seconds_per_iteration
from refinedet.training.run import BEST_FOLDER, LAST_FOLDER, RunConfig, RunFolder
from refinedet.training.stopping import SignalGuard, TrainingStopped, either
from refinedet.training.trainer import Trainer

_LOG = logging.getLogger(__name__)


class Session:
    """A RefineDet, its data and its run folder, brought together with the loop.

    Args:
        folder: where it writes; locked by the first process.
        config: of the run.
        model: with its first weights.
        data: to train on, and to measure on if there is any.
        world: this process among the processes of the training.
        criterion: the loss in place of RefineDet's; see ``trainer.Criterion``.

    Raises:
        UsageError: the batch cannot be shared by so many processes, or is too small for batch normalisation.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        model: RefineDet,
        data: TrainingData,
        world: World,
        criterion: nn.Module | None = None,
    ) -> None:
        settings = config.preset.train
        smallest = len(share_of(settings.batch_size // settings.accumulation_steps, 0, world.size))
        sides = [*model.config.image_size, *(side for _, side in settings.size_schedule)]
        if settings.patience and data.evaluation is None:
            raise UsageError("patience needs images to measure on: give --evaluate-split, or leave --patience out")
        if smallest == 1 and min(sides) == 64 and any(isinstance(m, nn.BatchNorm2d) for m in model.network.modules()):
            raise UsageError("batch normalisation needs more than one image of side 64: raise --batch-size or the size")
        self.folder, self.config, self.model, self.world, self.settings = folder, config, model, world, settings
        self.dataset, self.evaluation_set = data.train, data.evaluation
        self.also_trained_on = self._count_shared_images()
        self.data_digest = data.train.digest()
        if criterion is None:
            normalizer = world.mean_divisor if world.size > 1 else None
            criterion = RefineDetLoss(model.config, settings.loss, normalizer=normalizer)
        model.to(world.device)
        # A slow backbone is for keeping what it knows; with random numbers it knows nothing.
        random = config.init_weights == "random"
        even = dataclasses.replace(settings, backbone_learning_rate_factor=1.0)
        optimizer = build_optimizer(model.network, even if random else settings)
        self.trainer = Trainer(model.network, criterion.to(world.device), settings, world, optimizer)
        self.best = -1.0
        self.without_gain = 0  # evaluations since the best one
        self.report: Report | None = None
        self.saved: int | None = None
        self.signals = SignalGuard()

    def state(self) -> dict[str, Any]:
        """The checkpoint: tensors and plain types only, with the config and the data that it belongs to."""
        return {
            **self.trainer.state(),
            "best": self.best,
            "without_gain": self.without_gain,
            "config": comparable(self.config),
            "data": self.data_digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave; nothing is changed if it does not fit.

        Raises:
            RefineDetError: it does not fit.
        """
        if not isinstance(state.get("best"), float):
            raise RefineDetError("'best' is no number")
        self.trainer.load_state(state)
        self.best = state["best"]
        self.without_gain = int(state.get("without_gain", 0))  # checkpoints of older versions do not have it
        self.saved = self.trainer.iteration

    def run(self, signals: SignalGuard, stop: Callable[[], bool] | None = None, loggers: Sequence[Logger] = ()) -> bool:
        """Train to the last iteration or until ``stop`` says True, evaluating and saving on the way.

        Returns:
            Whether the training is at its end and evaluated.

        Raises:
            TrainingStopped: a signal came to one of the processes; all is saved.
        """
        trainer, world, self.signals = self.trainer, self.world, signals
        batches = self.batches(self.settings, start=trainer.iteration)
        with self._loggers(loggers) as group, signals.held():

            def evaluate() -> bool:
                return self._evaluate(group)

            try:
                finished = trainer.run(
                    batches,
                    group,
                    save=self._save,
                    evaluate=None if self.evaluation_set is None else evaluate,
                    stop=either(signals, stop),
                )
            except RuntimeError as error:
                raise explain_loader(error) from None
            finally:
                batches.close()
        if not finished:
            came = [number for number in world.gather(signals.number or 0) if number]
            if came:
                raise TrainingStopped(came[0])
        self.model.network.eval()
        return finished

    def batches(self, settings: TrainConfig, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of this process from iteration ``start`` on."""
        world = self.world
        return training_batches(
            self.dataset,
            self.model.config,
            settings,
            start=start,
            rank=world.rank,
            world=world.size,
            pin_memory=world.device.type == "cuda",
        )

    def seconds_per_iteration(self) -> float:
        """Measured by a few iterations that leave no trace."""
        return seconds_per_iteration(
            self.model.network, self.trainer.criterion, self.settings, self.batches, self.world
        )

    def current(self) -> RefineDet:
        """The weights worth evaluating and keeping, sharing memory with the training."""
        average = self.trainer.average
        network = self.model.network if average is None else cast(RefineDetNetwork, average.network)
        model = RefineDet(
            self.model.config, self.model.class_names, network=network, category_ids=self.model.category_ids
        )
        if self.report is not None:
            model.metrics = self._measured(self.report)
        return model

    def _count_shared_images(self) -> int:
        """How many images are both trained and evaluated on; a note if there are any."""
        if self.evaluation_set is None:
            return 0
        both = count_shared(self.dataset, self.evaluation_set, range(len(self.evaluation_set)))
        if both and self.world.is_main:
            _LOG.warning(
                "%d of the %d images of '%s' are trained on too, so its figure does not say how good the model is on "
                "others",
                both,
                len(self.evaluation_set),
                self.settings.evaluate_split,
            )
        return both

    def _loggers(self, others: Sequence[Logger]) -> LoggerGroup:
        if not self.world.is_main:
            return LoggerGroup([])
        iteration = self.trainer.iteration
        step = iteration or None
        # The trackers first: one that cannot be reached ends the training before the bar is on the screen.
        trackers = open_trackers(self.config.loggers, self.folder.path, step, to_dict(self.config.preset))
        console = ConsoleLogger(self.settings.iterations, start=iteration)
        return LoggerGroup([console, CsvLogger(self.folder.metrics, resume_step=step), *trackers, *others])

    def _save(self) -> None:
        """Write last/ and last.ckpt."""
        self.world.on_main(self._write)
        self.saved = self.trainer.iteration

    def _write(self) -> None:
        # The weights first: whoever resumes from last.ckpt finds files that are as old or newer, never missing ones.
        self._write_model(LAST_FOLDER)
        self.folder.save_checkpoint(self.state())

    def _write_model(self, name: str) -> None:
        model = self.current()
        preset, iteration = self.config.preset, self.trainer.iteration
        card = model_card(preset, model.class_names, self.folder.path.name, iteration, model.metrics)
        model.save_pretrained(self.folder.path / name, card=card)

    def _evaluate(self, logger: LoggerGroup) -> bool:
        """Evaluate and keep the best weights; says whether the training is at its end.

        At the end all images count, and the report is written.
        """
        dataset, settings = self.evaluation_set, self.settings
        assert dataset is not None
        last = self.trainer.iteration == settings.iterations
        few = None if last else settings.evaluate_limit
        better = self._measure(logger, few)
        self.without_gain = 0 if better else self.without_gain + 1
        ended = not last and is_out_of_patience(settings, self.without_gain)
        if ended:
            if few is not None and few < len(dataset):
                # As after the last iteration, the figure over all images is compared with the best one on the way.
                better = self._measure(logger, None)
            if self.world.is_main:
                times = f"{self.without_gain} evaluation{'s' * (self.without_gain > 1)}"
                _LOG.info("%s without a new best figure: the training ends here (--patience)", times)
        self.world.on_main(lambda: self._write_measured(better, last or ended))
        if not last and not ended:
            self.report = None
        return last or ended

    def _measure(self, logger: LoggerGroup, limit: int | None) -> bool:
        """Evaluate over all processes, each taking every n-th image; says whether the figure is the best so far."""
        dataset, world = self.evaluation_set, self.world
        assert dataset is not None
        count = len(dataset) if limit is None else min(limit, len(dataset))
        self.report = None
        with self.signals.at_once():
            own = range(world.rank, count, world.size)
            show = partial(logger.progress, "evaluating")
            began = time.perf_counter()
            detections = collect_detections(self.current(), dataset, own, batch_size=BATCH_SIZE, on_progress=show)
            merged = {index: found for part in world.gather(detections) for index, found in part.items()}
            seconds = time.perf_counter() - began
        details = dataclasses.replace(
            EvaluationSettings.of(self.model),
            weights=str(self.folder.path / LAST_FOLDER),
            batch_size=BATCH_SIZE,
            iteration=self.trainer.iteration,
            limit=limit,
            run=str(self.folder.path),
            trained_on=self.also_trained_on if limit is None else None,
            seconds_per_image=seconds / count,
        )
        self.report = evaluate_detections(dataset, merged, self.settings.metric, settings=details)
        logger.log(self.trainer.iteration, {"mAP": self.report["mAP"]})
        better = self.report["mAP"] > self.best
        self.best = max(self.best, self.report["mAP"])
        return better

    def _write_measured(self, better: bool, last: bool) -> None:
        self._write_model(LAST_FOLDER)
        if better:
            self._write_model(BEST_FOLDER)
        if last and self.report is not None:
            write_page(self.report, self.report.save(self.folder.report), metrics_csv=self.folder.metrics)

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


def is_out_of_patience(settings: TrainConfig, without_gain: int) -> bool:
    """Whether so many evaluations in a row without a new best figure end a training."""
    return 0 < settings.patience <= without_gain


def comparable(config: RunConfig) -> dict[str, Any]:
    """What must be equal for a training to go on: all that decides its outcome, but not where the data lies."""
    content: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    del content["data"], content["preset"]["summary"]
    for name in ("evaluate_data", "group_by", "loggers", "provenance"):
        del content[name]
    for name in ("workers", "keep_images"):
        del content["preset"]["train"][name]
    return content


def first_difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first setting that differs, in words: "train.learning_rate is 0.01, was 0.002"; None if none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            inner = f"{name}.{key}" if name not in ("", "preset") else key
            difference = first_difference(before.get(key), now.get(key), inner)
            if difference is not None:
                return difference
        return None
    return None if before == now else f"{name} is {now}, was {before}"


def extended(
    folder: RunFolder, config: RunConfig, iterations: int | None, epochs: float | None, images: int, world: World
) -> RunConfig:
    """The config of a run with another length, which is written into its checkpoint too."""
    state, _ = folder.load_checkpoint()
    train = config.preset.train
    if epochs is not None:
        iterations = iterations_of_epochs(epochs, images, train.batch_size)
    preset = change_preset(config.preset, {"iterations": iterations})
    if preset.train.iterations < state["iteration"]:
        raise UsageError(
            f"{folder.path}: has done {state['iteration']} iterations already; give a larger number than "
            f"{preset.train.iterations}"
        )
    longer = dataclasses.replace(config, preset=preset)
    # Only a checkpoint of this very run is changed; of another, _go_on says what is wrong.
    if first_difference(state.get("config"), comparable(config)) is None:

        def save() -> None:
            # A training that patience had ended goes on.
            folder.save_checkpoint({**state, "without_gain": 0, "config": comparable(longer)})
            save_json(longer, folder.config)

        world.on_main(save)
    return longer
