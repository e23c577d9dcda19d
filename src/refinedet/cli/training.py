"""The verbs that train: train and ablate. Their defaults come from a preset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from refinedet.cli.flags import (
    ClassNames,
    DataPaths,
    Device,
    Folder,
    LoggerNames,
    OptionalCount,
    OptionalFolder,
    OptionalNumber,
    OptionalText,
    PresetName,
    Switch,
    Training,
    class_names_in,
    flag,
    verb,
)
from refinedet.cli.terminal import say
from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.errors import UsageError
from refinedet.files import check_output_folder, user_path, write_text
from refinedet.presets import PRESETS
from refinedet.schedule import values_of

DEFAULT_PRESETS = {"train": "finetune", "ablate": "voc07-320-vgg16"}
"""The verbs whose defaults come from the preset that is their first argument, and the preset if none is named."""


SHORT_HELP = {
    "train": """usage: refinedet train [PRESET] --data DATA [options]
       refinedet train --resume RUN

Train a detector. Without PRESET it starts from the bundled model, takes as long
as suits the number of images, and holds 15 % of undivided data out to measure
on. PRESET sets the defaults of all options (refinedet models).

  --data DATA...           folders or files of annotated images (Pascal VOC,
                           COCO JSON or YOLO); several are joined
  --out FOLDER             run folder (default: runs/PRESET, runs/finetune)
  --init WEIGHTS           detector to start from: a bundled model, a run
                           folder, a folder of weights or hf:owner/name
  --epochs N               length of the training (or --iterations, --minutes)
  --batch-size INT         images per update
  --model.image-size H W   size that images are resized to, multiples of 64
  --classes A,B,...        train on some of the classes of the data
  --evaluate-data DATA     other data to measure on; or --evaluate-split SPLIT
  --loggers NAME...        also log to wandb (Weights & Biases) or mlflow
  --device DEVICE          cpu, cuda, mps, or auto (a GPU if there is one)
  --resume RUN             continue a run, bit for bit; longer with --iterations

examples:
  refinedet train --data photos/
  refinedet train --data photos/ --minutes 30 --out runs/a
  refinedet train voc07-320-vgg16 --data ~/VOCdevkit

refinedet train PRESET --help-all lists all options with their defaults.""",
    "ablate": """usage: refinedet ablate [PRESET] --data DATA [options]

Train and evaluate the four variants of the paper's Table 2 under equal
conditions. The options are those of refinedet train. The same command given
again continues where it was stopped, and prints the table at the end.

  --data DATA...           folders or files of annotated images
  --out FOLDER             folder of the four runs and table.md (default:
                           runs/ablations)
  --iterations INT         updates of the weights of each variant
  --evaluate-split SPLIT   split to measure on

example:
  refinedet ablate voc07-320-resnet18 --data ~/VOCdevkit --iterations 2000

refinedet ablate PRESET --help-all lists all options with their defaults.""",
}
"""What ``--help`` shows instead of the hundred options."""


@verb
def train(
    preset: PresetName = "",
    /,
    *,
    data: DataPaths = (),
    out: OptionalFolder = None,
    resume: OptionalFolder = None,
    init_weights: OptionalText = None,
    init: OptionalText = None,
    epochs: OptionalNumber = None,
    minutes: OptionalNumber = None,
    evaluate_data: DataPaths = (),
    classes: ClassNames = None,
    class_names: ClassNames = None,
    group_by: OptionalText = None,
    skip_broken: Switch = False,
    loggers: LoggerNames = (),
    device: Device = "auto",
    settings: Training = TrainConfig(),  # noqa: B008 (frozen)
    model: ModelConfig = ModelConfig(),  # noqa: B008
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> int:
    """Train a detector.

    The defaults of --iterations, --batch-size and so on (training) and of --model.* come from the preset, which is the
    first argument: refinedet train PRESET --data DATA. Without one it is 'finetune': the bundled model, as long as
    suits the number of images. A stopped run is continued, bit for bit, by refinedet train --resume RUN. On several
    GPUs: torchrun --nproc-per-node N -m refinedet train ...

    Args:
        preset: Where the defaults come from; `refinedet models` lists the presets.
        data: Folders or files of annotated images (Pascal VOC, COCO JSON or YOLO); several are trained on together.
        out: Run folder for configuration, metrics, weights and checkpoints (default: runs/PRESET).
        resume: Continue the training of this run folder; goes with --iterations, --epochs, --data, --workers and
            --device only.
        init_weights: ImageNet weights of the backbone: a file (docs/weights.md lists the formats), 'torchvision' to
            download them, or 'random'.
        init: A detector to start from instead: a bundled model, a run folder, a folder of weights, or hf:owner/name.
            Classes are carried over by name.
        epochs: Length of the training as a number of times that every image is shown, in place of --iterations.
        minutes: Length of the training in minutes, in place of --iterations; the first iterations are timed.
        evaluate_data: Other folders or files to evaluate on.
        classes: Names separated by commas of the classes to train on; objects of other classes are left out.
        class_names: Names separated by commas, in the order of their labels (default: those of the data).
        group_by: Regular expression. Images whose file names have the same match are held out together or not at all.
        skip_broken: Go on without images that cannot be read, and list them.
        loggers: Log to these too: wandb, mlflow, tensorboard. Each needs the extra of its name. A run that is resumed
            goes on with them.
        device: cpu, cuda, mps, or auto (a GPU if there is one).
        settings: Training.
        model: Model.
        given: Names of the fields of settings and model that were given.
    """
    name = preset or DEFAULT_PRESETS["train"]
    if not data:
        raise UsageError(f"nothing to train on: refinedet train{' ' * bool(preset)}{preset} --data DATA")
    if init is not None and init_weights is not None:
        raise UsageError("--init starts from a whole detector, --init-weights from a backbone: give one of them")
    weights = None if init_weights is None else _init_weights(init_weights)
    run_folder = Path("runs") / name if out is None else user_path(out)
    changes = values_of(Preset(model=model, train=settings, summary=""), given)

    from refinedet.training.train import train

    train(
        name,
        list(data),
        out=run_folder,
        init_weights=weights,
        class_names=class_names_in(class_names),
        classes=class_names_in(classes),
        evaluate_data=list(evaluate_data),
        group_by=group_by,
        skip_broken=skip_broken,
        epochs=epochs,
        minutes=minutes,
        device=device,
        init=init,
        loggers=loggers,
        **changes,
    )
    return _trained(run_folder)


def resume_run(
    *,
    resume: Folder,
    data: DataPaths = (),
    iterations: OptionalCount = None,
    epochs: OptionalNumber = None,
    workers: OptionalCount = None,
    device: Device = "auto",
) -> int:
    """Continue a training with the settings of its run folder.

    Args:
        resume: Run folder.
        data: Where the data has moved to since the run began.
        iterations: Another length of the training, also of one that is finished; the schedule keeps its shares.
        epochs: The same as a number of times that every image is shown.
        workers: Processes per trainer that load and augment images (default: as the run began).
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    folder = user_path(resume)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")

    from refinedet.training.train import resume as resume_training

    resume_training(folder, data=data or None, iterations=iterations, epochs=epochs, workers=workers, device=device)
    return _trained(folder)


def _init_weights(given: str) -> Path | str:
    if given in ("torchvision", "random"):
        return given
    path = user_path(given)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --init-weights takes a file, 'torchvision' or 'random'")
    return path


def _trained(run_folder: Path) -> int:
    # Under torchrun every process reaches this line; only one prints.
    if _is_first_process():
        say(f"trained: {run_folder}  (try: refinedet predict {run_folder} photo.jpg --save drawn)")
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@verb
def ablate(
    preset: PresetName = DEFAULT_PRESETS["ablate"],
    /,
    *,
    data: DataPaths = (),
    out: Folder = Path("runs/ablations"),
    init_weights: Annotated[str, flag("FILE", None)] = "torchvision",
    class_names: ClassNames = None,
    device: Device = "auto",
    settings: Training = TrainConfig(),  # noqa: B008
    model: ModelConfig = ModelConfig(),  # noqa: B008
) -> int:
    """Train and compare the four variants of the paper's Table 2.

    All have the same data, schedule, seed and weights to start from.

    The flags are those of refinedet train; a preset may come first (default: voc07-320-vgg16). Each variant has its
    run folder in --out. The same command given again continues where it was stopped, and prints the table at the end.

    Args:
        preset: Where the defaults come from; `refinedet models` lists the presets.
        data: Folders or files of annotated images (Pascal VOC, COCO JSON or YOLO); several are trained on together.
        out: Folder for the run folders and table.md.
        init_weights: ImageNet weights of the backbone: a file (docs/weights.md lists the formats), 'torchvision' to
            download them, or 'random'.
        class_names: Names separated by commas, in the order of their labels (default: those of the data).
        device: cpu, cuda, mps, or auto (a GPU if there is one).
        settings: Training.
        model: Model.
    """
    if preset not in PRESETS:
        raise UsageError("the preset comes first: refinedet ablate PRESET --data DATA")
    if not data:
        raise UsageError("nothing to train on: refinedet ablate --data DATA")
    weights, names, folder = _init_weights(init_weights), class_names_in(class_names), user_path(out)
    chosen = Preset(model=model, train=settings, summary=PRESETS[preset].summary)

    from refinedet.ablations import TABLE_FILE, TABLE_SIGNATURE, table
    from refinedet.ablations import ablate as train_variants

    check_output_folder(folder, [TABLE_FILE], ours=TABLE_SIGNATURE, inputs=data)
    figures = train_variants(chosen, list(data), out=folder, init_weights=weights, class_names=names, device=device)
    if _is_first_process():
        text = table(figures, chosen)
        write_text(folder / TABLE_FILE, f"<!-- {TABLE_SIGNATURE} -->\n\n{text}")
        say(text.rstrip("\n"))
    return 0
