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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refinedet.config import ModelConfig, Preset
from refinedet.dataclass_json import save_json
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.report import Report, names_of_report
from refinedet.files import check_output_folder, user_path, write_text
from refinedet.loggers import Logger
from refinedet.model.network import RefineDetNetwork
from refinedet.schedule import iterations_of_minutes, with_iterations
from refinedet.training.briefing import describe, doubts
from refinedet.training.data import DataChoice, TrainingData, open_training_data, reopen_training_data
from refinedet.training.data_check import describe_changes, image_digests
from refinedet.training.distributed import World, join_world, launch_command
from refinedet.training.loss import set_background_prior
from refinedet.training.plan import (
    DEFAULT_PRESET,
    OWN_NETWORK,
    Call,
    Ends,
    check_data,
    chosen_preset,
    name_of,
    texts,
)
from refinedet.training.run import (
    BEST_FOLDER,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    LAST_FOLDER,
    RUN_FILES,
    RunConfig,
    RunFolder,
    is_run,
    read_run_config,
)
from refinedet.training.session import Session, comparable, extended, first_difference, is_out_of_patience
from refinedet.training.start import find_start
from refinedet.training.stopping import SignalGuard, TrainingStopped

_LOG = logging.getLogger(__name__)
_MEASURED_FROM = 50  # iterations from which on the time that a training will take is measured before it starts


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
    """False if it was asked to stop early; then there is no report, and ``resume`` continues."""


def train(
    preset: Preset | str = DEFAULT_PRESET,
    data: str | Path | Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    init_weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    evaluate_data: str | Path | Sequence[str | Path] = (),
    group_by: str | None = None,
    skip_broken: bool = False,
    epochs: float | None = None,
    minutes: float | None = None,
    device: str = "auto",
    init: str | Path | None = None,
    network: Callable[[ModelConfig], RefineDetNetwork] | None = None,
    criterion: Callable[[ModelConfig], nn.Module] | None = None,
    loggers: Sequence[Logger | str] = (),
    on_log: Callable[[int, Mapping[str, float]], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> Run:
    """Train a detector, or go on with a training of the same settings.

    ``train(data="photos")`` uses the preset "finetune": the bundled model, a length that fits the number of images.
    Data without a split for evaluation is divided (see ``data.holdout``). SIGINT, SIGTERM, SIGUSR1 and SIGHUP save, say
    how to continue, and raise ``TrainingStopped``, a SystemExit with the code 128 + signal; a second Ctrl-C is at once.

    Args:
        preset: model and training, or the name of a preset; ``num_classes`` is replaced by the number of classes of
            the data.
        data: one or several folders in VOC, COCO or YOLO layout; several are joined and must have the same classes.
        out: run folder, by default runs/ and the name of the preset. A run of the same settings in it continues from
            its last checkpoint, so giving the same command again is enough after any stop.
        init_weights: a file with ImageNet weights of the backbone (see docs/weights.md), or "random". "torchvision" (or
            None) lets torchvision download them. Mean, std and channel order become those of the weights.
        class_names: in label order; by default they come from the data.
        classes: the classes to train on, in label order; by default all. Objects of others are left out.
        evaluate_data: other folders to evaluate on.
        group_by: a regular expression; images whose file names have the same match are held out together or not at all.
        skip_broken: go on without images that cannot be read; they are listed.
        epochs: length of the training in place of ``iterations``.
        minutes: the same; the time of the first iterations gives the number of iterations.
        device: "cpu", "cuda" or "auto".
        init: a model to start from instead of ImageNet weights (see ``RefineDet.from_pretrained``). Classes are
            carried over by name (see ``weights.transfer``), the others start from random weights.
            Mean, std, channel order and the like come from the model. By default what the preset says.
        network: makes a network of your own from the model's configuration; it starts with the weights it is made with,
            or from ``init``. See examples/own_backbone.py.
        criterion: makes a loss of your own; see ``training.trainer.Criterion``.
        loggers: receive the numbers of metrics.csv, in the first process only; closed at the end. Objects, or the names
            "wandb", "mlflow" and "tensorboard", which ``resume`` goes on with.
        on_log: called with the iteration and the numbers of each line of metrics.csv.
        stop: asked after every iteration but the last; once it says True (the time is up, say), everything is saved
            for ``resume`` and the call returns.
        settings: other values for fields of the preset's configuration, by their names: ``iterations=500``,
            ``image_size=512``, ``learning_rate=3e-4``. With ``iterations`` the schedule keeps its shares.

    Returns:
        The run, finished unless ``stop`` said otherwise.

    Raises:
        UsageError: the call or the data's layout is wrong, ``out`` holds a run of other settings, or another training
            is writing there.
        RefineDetError: bad files, nothing to learn from, a full disk, a loss, gradient or weights that are not finite.

    Example:
        >>> from refinedet import train
        >>> run = train("smoke", "photos", out="runs/a", init_weights="random", iterations=1, evaluate_split="none")
        >>> run.finished, run.model.class_names
        (True, ('cat', 'dog'))
    """
    chosen = chosen_preset(preset, settings)
    ends = Ends.of(stop, loggers, on_log)
    call = Call(
        preset=chosen,
        given=frozenset(settings) | (frozenset({"workers"}) if isinstance(preset, Preset) else frozenset()),
        choice=DataChoice(
            paths=_absolute(data),
            evaluate_paths=_absolute(evaluate_data),
            class_names=None if class_names is None else tuple(class_names),
            classes=None if classes is None else tuple(classes),
            group_by=group_by,
            skip_broken=skip_broken,
            given=frozenset(settings) & {"train_split", "evaluate_split"},
            prefer_trainval=chosen.fit_to_data,
            allow_outside=chosen.train.allow_outside,
        ),
        epochs=epochs,
        minutes=minutes,
        init_weights=init_weights,
        init=init,
        network=network,
        criterion=criterion,
        loggers=ends.names,
    )
    folder = RunFolder(user_path(Path("runs") / name_of(preset) if out is None else out))
    read = call.inputs
    with join_world(device) as world, SignalGuard() as signals, _told(folder, world), _writing(folder, world, read):
        return _train(call, folder, world, signals, ends)


def _train(call: Call, folder: RunFolder, world: World, signals: SignalGuard, ends: Ends) -> Run:
    """Open the data, make the model, and hand both to a session."""
    # One process parses the annotations: many that read them at once would burden a shared file system.
    data = world.on_main(lambda: open_training_data(call.choice, call.preset.train))
    check_data(data, call.preset, world)
    preset = call.fitted(data, world.device)
    model_config = dataclasses.replace(preset.model, num_classes=len(data.train.class_names))
    start = find_start(call, model_config)
    if start.adopted and world.is_main:
        _LOG.info("%s", start.adopted)
    preset = dataclasses.replace(preset, model=start.config)
    config = call.run_config(preset, data.train.class_names, start.source, world.device)
    if folder.has_checkpoint():
        if call.minutes is not None:
            # How long it takes was measured when the run began.
            config = dataclasses.replace(config, preset=read_run_config(folder.config).preset)
        return _go_on(folder, config, data, world, signals, ends)
    torch.manual_seed(preset.train.seed)
    network = call.own_network(start.config)
    model = RefineDet(start.config, data.train.class_names, network=network, category_ids=data.train.category_ids)
    if preset.train.loss.classification == "focal":
        set_background_prior(model.network)
    transfer = start.fill(model)
    if transfer is not None and world.is_main:
        _LOG.info("init: %s", transfer.summary())
    session = Session(folder, config, model, data, world, call.own_criterion(start.config))
    seconds = session.seconds_per_iteration() if call.minutes or preset.train.iterations >= _MEASURED_FROM else None
    if call.minutes is not None and seconds is not None:
        length = with_iterations(preset.train, iterations_of_minutes(call.minutes, seconds))
        config = dataclasses.replace(config, preset=dataclasses.replace(preset, train=length))
        session = Session(folder, config, model, data, world, call.own_criterion(start.config))
    world.on_main(lambda: _describe(folder, config, data))
    if world.is_main:
        data.save_lists(folder.path)
        _LOG.info("%s", describe(config.preset, data, model.network, config.init_weights, world.device, seconds))
        for doubt in doubts(config.preset, data.train, world.device):
            _LOG.warning("%s", doubt)
    return _run(session, signals, ends)


def resume(
    run_folder: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    workers: int | None = None,
    iterations: int | None = None,
    epochs: float | None = None,
    device: str = "auto",
    loggers: Sequence[Logger | str] = (),
    on_log: Callable[[int, Mapping[str, float]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Continue a training from its last checkpoint, with the outcome of one that was never stopped.

    Args:
        run_folder: what ``train`` was given as ``out``.
        data: where the data has moved to; it must be the same.
        workers: loading processes, instead of as many as the run began with.
        iterations: another length, also of a run that is finished. The schedule keeps its shares: the learning rate
            goes on as if the run had had this length from the beginning.
        epochs: the same in epochs.
        device: "cpu", "cuda" or "auto".
        loggers: as for ``train``, besides those of the run.
        on_log: as for ``train``.
        stop: as for ``train``.

    Raises:
        UsageError: no run there, or it is longer already.
        RefineDetError: a corrupt file in it, or the data has changed.
    """
    folder = RunFolder(user_path(run_folder))
    if not folder.config.exists():
        raise UsageError(f"{folder.path}: no run there ({CONFIG_FILE} is missing)")
    config = read_run_config(folder.config)  # before the lock: a damaged file is called damaged, not foreign
    ends = Ends.of(stop, loggers, on_log, begun=config.loggers)
    config = dataclasses.replace(config, loggers=ends.names)
    with join_world(device) as world, SignalGuard() as signals, _told(folder, world), _writing(folder, world):
        if data is not None:
            config = dataclasses.replace(config, data=texts(_absolute(data)))
        if workers is not None:
            settings = dataclasses.replace(config.preset.train, workers=workers)
            config = dataclasses.replace(config, preset=dataclasses.replace(config.preset, train=settings))
        for path in config.data:
            if not Path(path).exists():
                raise UsageError(
                    f"{path}: no such folder; if the data has moved: refinedet train --resume {folder.path} --data NEW"
                )
        choice, settings = DataChoice.of_run(config), config.preset.train
        opened = world.on_main(lambda: reopen_training_data(choice, settings, folder.path))
        check_data(opened, config.preset, world)
        if iterations is not None or epochs is not None:
            config = extended(folder, config, iterations, epochs, len(opened.train), world)
        return _go_on(folder, config, opened, world, signals, ends)


def _go_on(
    folder: RunFolder, config: RunConfig, data: TrainingData, world: World, signals: SignalGuard, ends: Ends
) -> Run:
    """Continue from the last checkpoint that is whole, if config, data and checkpoint belong together."""
    state, warning = folder.load_checkpoint()
    if warning is not None and world.is_main:
        _LOG.warning("%s", warning)
    difference = first_difference(state.get("config"), comparable(config))
    if difference is not None:
        raise UsageError(
            f"{folder.path}: holds a run of other settings ({difference}); continue it with --resume {folder.path}, or "
            "choose another --out"
        )
    if state.get("data") != data.train.digest():
        changes = describe_changes(folder.recorded_images("train"), image_digests(data.train, config.data))
        raise RefineDetError(
            f"{folder.path}: the data has changed since this run began: {changes or 'its order or its class names'}; "
            f"restore it, or start a new run with --init {folder.path} and another --out"
        )
    if config.init_weights == OWN_NETWORK:
        raise UsageError(f"{folder.path}: trains a network of its caller's own, which cannot be made again here")
    model = RefineDet(config.preset.model, config.class_names, category_ids=data.train.category_ids)
    iterations = config.preset.train.iterations
    measured = data.evaluation is None or (folder.report / "index.html").exists()
    ended = is_out_of_patience(config.preset.train, state.get("without_gain", 0))
    if (state["iteration"] == iterations or ended) and measured:
        if world.is_main:
            done = f"all {iterations}" if state["iteration"] == iterations else f"{state['iteration']} of {iterations}"
            _LOG.warning("%s: finished before, %s iterations; nothing was changed", folder.path, done)
        return Run(folder.path, RefineDet.from_pretrained(folder.path / LAST_FOLDER), None, {})
    session = Session(folder, config, model, data, world)
    try:
        session.load_state(state)
    except (RefineDetError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RefineDetError(f"{folder.path / CHECKPOINT_FILE}: does not fit the run's config ({reason})") from None
    if data.evaluation is not None and world.is_main:
        recorded, now = folder.recorded_images("evaluation"), image_digests(data.evaluation, config.data)
        changes = describe_changes(recorded, now) if recorded else None
        if changes is not None:
            _LOG.warning("the evaluation split has changed since this run began: %s", changes)
    world.on_main(lambda: _describe(folder, config, data))
    if world.is_main:
        _LOG.info("going on from iteration %d of %d", session.trainer.iteration, iterations)
    return _run(session, signals, ends)


def _run(session: Session, signals: SignalGuard, ends: Ends) -> Run:
    try:
        finished = session.run(signals, ends.stop, ends.loggers)
    except TrainingStopped as stopped:
        if session.saved is not None:
            stopped.where = f"at {session.saved}/{session.settings.iterations}, saved"
        raise
    if finished and session.report is not None and session.world.is_main:
        folder = session.folder
        _LOG.info("%s\nbest weights: %s", session.report.table(), folder.path / BEST_FOLDER)
        _LOG.info("report: %s", folder.report / "index.html")
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
            for part in (folder.path, folder.path / BEST_FOLDER, folder.path / LAST_FOLDER, folder.report):
                names = {folder.path: RUN_FILES, folder.report: names_of_report(part)}.get(part, ())
                check_output_folder(part, names, inputs=inputs, ours=lambda _: is_run(folder.path))
            folder.clear()

        world.on_main(lock)
        yield


def _absolute(data: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    paths = tuple(data) if isinstance(data, Sequence) and not isinstance(data, str) else (data,)
    return tuple(Path(os.path.abspath(user_path(path))) for path in paths)


def _describe(folder: RunFolder, config: RunConfig, data: TrainingData) -> None:
    """Write what is trained, and on what."""
    save_json(config, folder.config)
    sets = {"train": data.train} if data.evaluation is None else {"train": data.train, "evaluation": data.evaluation}
    images = {name: image_digests(dataset, config.data) for name, dataset in sets.items()}
    write_text(folder.data, json.dumps(images, indent=0) + "\n")
