"""The call of a training: from a preset and a data folder to a run folder with the best and the last weights.

``train`` and ``resume`` open the data, find or make the first weights, and hand both to a ``Session``
(``training/session.py``), which gives them to the loop (``training/trainer.py``). What a run folder holds stands in
``training/run.py``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refinedet.config import Preset
from refinedet.data.layouts import open_joined
from refinedet.data.records import DetectionDataset
from refinedet.dataclass_json import save_json
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.report import Report
from refinedet.files import check_output_folder, read_json, user_path, write_text
from refinedet.loggers import Logger
from refinedet.training.data_check import (
    describe_changes,
    image_digests,
    require_few_repairs,
    require_measurable,
    require_objects,
)
from refinedet.training.distributed import World, join_world, launch_command
from refinedet.training.loss import set_background_prior
from refinedet.training.run import (
    BEST_FOLDER,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    LAST_FOLDER,
    METRICS_FILE,
    RunConfig,
    RunFolder,
    is_run,
    read_run_config,
)
from refinedet.training.session import Session, comparable, first_difference
from refinedet.training.stopping import SignalGuard, TrainingStopped
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
    """Evaluation of ``model`` on the whole evaluation split; None if there is no such split, or if the run was
    finished before this call (then report/report.json has the figures)."""
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
    """Train a detector, or go on with a training of the same settings.

    SIGINT, SIGTERM and SIGUSR1 end it early: it saves, says how to go on, and raises ``TrainingStopped``, a SystemExit
    with the code 128 + the signal's number. A second Ctrl-C stops at once.

    Args:
        preset: model and training; ``num_classes`` is replaced by the number of classes of the data.
        data: one or several folders in VOC, COCO or YOLO layout; several are joined and must have the same classes.
        out: run folder. A run of the same settings that is in it goes on from its last checkpoint, so that a command
            that is simply given again survives any stop; before the first checkpoint it begins anew.
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
        UsageError: the call or the data's layout is wrong, ``out`` holds a run of other settings, or another training
            is writing there.
        RefineDetError: bad files, nothing to learn from, a full disk, a loss, gradient or weights that are not finite.
    """
    folder = RunFolder(user_path(out))
    paths = _absolute((data,) if isinstance(data, (str, Path)) else tuple(data))
    if init is not None and init_weights is not None:
        raise UsageError("give either a model to start from or backbone weights, not both")
    read = [path for path in (*paths, init, init_weights) if path is not None]
    with SignalGuard() as signals, join_world(device) as world, _told(folder, world), _writing(folder, world, read):
        dataset = _open_training_set(paths, preset, class_names, world)
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
        config = RunConfig(preset, paths, dataset.class_names, _source(init, fitted))
        if folder.has_checkpoint():
            return _go_on(folder, config, dataset, world, signals, (stop, loggers))
        torch.manual_seed(preset.train.seed)
        model = RefineDet(model_config, dataset.class_names, category_ids=dataset.category_ids)
        if preset.train.loss.classification == "focal":
            set_background_prior(model.network)
        transfer = _initialise(model, init, start, fitted)
        if transfer is not None and world.is_main:
            _LOG.info("init: %s", transfer.summary())
        evaluation_set = _open_evaluation_set(config, world)
        session = Session(folder, config, model, dataset, evaluation_set, world)
        world.on_main(lambda: _describe(folder, config, dataset, evaluation_set))
        return _run(session, signals, stop, loggers)


def resume(
    run_folder: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    workers: int | None = None,
    device: str = "auto",
    loggers: Sequence[Logger] = (),
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Continue a training from its last checkpoint, with the outcome of one that was never stopped.

    Args:
        run_folder: what ``train`` was given as ``out``.
        data: where the data has moved to; it must be the same.
        workers: loading processes, instead of as many as the run began with.
        device: "cpu", "cuda" or "auto".
        loggers: as for ``train``.
        stop: as for ``train``.

    Raises:
        UsageError: no run there.
        RefineDetError: a corrupt file in it, or the data has changed.
    """
    folder = RunFolder(user_path(run_folder))
    if not folder.config.exists():
        raise UsageError(f"{folder.path}: no run there ({CONFIG_FILE} is missing)")
    with SignalGuard() as signals, join_world(device) as world, _told(folder, world), _writing(folder, world):
        config = read_run_config(folder.config)
        if data is not None:
            moved = _absolute((data,) if isinstance(data, (str, Path)) else tuple(data))
            config = dataclasses.replace(config, data=moved)
        if workers is not None:
            settings = dataclasses.replace(config.preset.train, workers=workers)
            config = dataclasses.replace(config, preset=dataclasses.replace(config.preset, train=settings))
        for path in config.data:
            if not Path(path).exists():
                raise UsageError(
                    f"{path}: no such folder; if the data has moved: refinedet train --resume {folder.path} --data NEW"
                )
        dataset = _open_training_set(config.data, config.preset, config.class_names, world)
        return _go_on(folder, config, dataset, world, signals, (stop, loggers))


def _go_on(
    folder: RunFolder,
    config: RunConfig,
    dataset: DetectionDataset,
    world: World,
    signals: SignalGuard,
    rest: tuple[Callable[[], bool] | None, Sequence[Logger]],
) -> Run:
    """Continue from the last checkpoint that is whole, if config, data and checkpoint belong together."""
    checkpoint = folder.path / CHECKPOINT_FILE
    state, warning = folder.load_checkpoint()
    if warning is not None and world.is_main:
        _LOG.warning("%s", warning)
    difference = first_difference(state.get("config"), comparable(config))
    if difference is not None:
        raise UsageError(
            f"{folder.path}: holds a run of other settings ({difference}); continue it with --resume {folder.path}, or "
            "choose another --out"
        )
    if state.get("data") != dataset.digest():
        changes = describe_changes(_recorded_images(folder, "train"), image_digests(dataset, config.data))
        raise RefineDetError(
            f"{folder.path}: the data has changed since this run began: {changes or 'its order or its class names'}; "
            f"restore it, or begin anew with --init {folder.path} and another --out"
        )
    model = RefineDet(config.preset.model, config.class_names, category_ids=dataset.category_ids)
    iterations = config.preset.train.iterations
    measured = config.preset.train.evaluate_split in ("", "none") or (folder.report / "index.html").exists()
    if state["iteration"] == iterations and measured:
        if world.is_main:
            _LOG.warning("%s: finished before, all %d iterations; nothing was changed", folder.path, iterations)
        return Run(folder.path, RefineDet.from_pretrained(folder.path / LAST_FOLDER), None, {})
    evaluation_set = _open_evaluation_set(config, world)
    session = Session(folder, config, model, dataset, evaluation_set, world)
    try:
        session.load_state(state)
    except (RefineDetError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RefineDetError(f"{checkpoint}: does not fit the run's config ({reason})") from None
    if evaluation_set is not None and world.is_main:
        recorded, now = _recorded_images(folder, "evaluation"), image_digests(evaluation_set, config.data)
        changes = describe_changes(recorded, now) if recorded else None
        if changes is not None:
            _LOG.warning("the evaluation split has changed since this run began: %s", changes)
    world.on_main(lambda: _describe(folder, config, dataset, evaluation_set))
    if world.is_main:
        _LOG.info("going on from iteration %d of %d", session.trainer.iteration, iterations)
    return _run(session, signals, *rest)


def _run(session: Session, signals: SignalGuard, stop: Callable[[], bool] | None, loggers: Sequence[Logger]) -> Run:
    try:
        finished = session.run(signals, stop, loggers)
    except TrainingStopped as stopped:
        if session.saved is not None:
            stopped.where = f"at {session.saved}/{session.settings.iterations}, saved"
        raise
    return Run(session.folder.path, session.current(), session.report, session.trainer.losses, finished)


@contextmanager
def _told(folder: RunFolder, world: World) -> Iterator[None]:
    """Say what to type to go on, after a signal, and when one of several processes fails."""
    try:
        yield
    except TrainingStopped as stopped:
        if world.is_main:
            how = f"go on with: {_resume_command(folder)}" if folder.has_checkpoint() else "nothing was saved"
            print(f"stopped {stopped.where}; {how}", file=sys.stderr, flush=True)
        raise
    except UsageError:
        raise
    except RefineDetError as error:
        if world.size > 1 and folder.has_checkpoint():
            raise type(error)(f"{error}; go on with: {_resume_command(folder)}") from None
        raise


def _resume_command(folder: RunFolder) -> str:
    return launch_command(f"train --resume {shlex.quote(str(folder.path))}")


@contextmanager
def _writing(folder: RunFolder, world: World, inputs: Sequence[str | Path] = ()) -> Iterator[None]:
    """The run folder, locked by the first process and cleared of what a killed training left.

    Raises:
        UsageError: it is an input of the call, holds files of somebody else, or another training is writing there.
    """
    with ExitStack() as stack:

        def lock() -> None:
            check_output_folder(folder.path, inputs=inputs, ours=lambda _: is_run(folder.path))
            stack.enter_context(folder.lock())
            for part in (folder.path, folder.path / BEST_FOLDER, folder.path / LAST_FOLDER):
                names = (CONFIG_FILE, METRICS_FILE)
                check_output_folder(part, names, inputs=inputs, ours=lambda _: is_run(folder.path))
            folder.clear()

        world.on_main(lock)
        yield


def _absolute(paths: Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(os.path.abspath(user_path(path)) for path in paths)


def _open_training_set(
    paths: Sequence[str], preset: Preset, class_names: Sequence[str] | None, world: World
) -> DetectionDataset:
    """The data to train on, if there is something to learn from it.

    Raises:
        RefineDetError: there is not, or more than half of it had to be repaired.
    """
    settings = preset.train
    dataset = open_joined(paths, settings.train_split, class_names, allow_outside=settings.allow_outside)
    require_objects(dataset, preset.model.image_size)
    repaired = require_few_repairs(dataset)
    if repaired is not None and world.is_main:
        _LOG.warning("%s", repaired)
    return dataset


def _open_evaluation_set(config: RunConfig, world: World) -> DetectionDataset | None:
    split = config.preset.train.evaluate_split
    if split in ("", "none"):
        return None
    if split == config.preset.train.train_split:
        raise UsageError(f"'{split}' is the training split; evaluate on another, or on none with --evaluate-split none")
    outside = config.preset.train.allow_outside
    dataset = open_joined(config.data, split, config.class_names, allow_outside=outside)
    world.on_main(lambda: require_measurable(dataset))
    return dataset


def _describe(
    folder: RunFolder, config: RunConfig, dataset: DetectionDataset, evaluation_set: DetectionDataset | None
) -> None:
    """Write what is trained, and on what."""
    save_json(config, folder.config)
    sets = {"train": dataset} if evaluation_set is None else {"train": dataset, "evaluation": evaluation_set}
    images = {name: image_digests(one, config.data) for name, one in sets.items()}
    write_text(folder.data, json.dumps(images, indent=0) + "\n")


def _recorded_images(folder: RunFolder, name: str) -> dict[str, str]:
    """Digests of the images as they were when the run began; nothing if they cannot be read."""
    try:
        images: Any = read_json(folder.data)[name]
    except (RefineDetError, KeyError, TypeError):
        return {}
    return images if isinstance(images, dict) else {}


def _initialise(
    model: RefineDet, init: str | Path | None, start: RefineDet | None, fitted: Fitted | None
) -> Transfer | None:
    """Fill the network with its first weights; say what became of the classes, if they come from a detector."""
    if start is not None:
        own = model.network.state_dict()
        state, transfer = transfer_classes(own, start.network.state_dict(), model.class_names, start.class_names)
        load_weights(model.network, state, str(init))
        return transfer
    if fitted is not None:
        fitted.fill(model.network)
    return None


def _source(init: str | Path | None, fitted: Fitted | None) -> str:
    """Where the first weights come from, as config.json says it."""
    if init is not None:
        return str(init)
    return "random" if fitted is None else Path(fitted.file.source).name
