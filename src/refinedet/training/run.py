"""The run folder: the names of its files, its config, its checkpoint and the model cards in it.

A run folder holds config.json (what was asked for), metrics.csv, best/ and last/ (weights with config and model card),
last.ckpt (all that ``resume`` needs), report/ (the final evaluation) and events for TensorBoard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refinedet.config import Preset
from refinedet.dataclass_json import from_dict
from refinedet.errors import RefineDetError
from refinedet.files import read_json, write_atomically

CONFIG_FILE, METRICS_FILE, CHECKPOINT_FILE = "config.json", "metrics.csv", "last.ckpt"
LAST_FOLDER, BEST_FOLDER, REPORT_FOLDER, TENSORBOARD_FOLDER = "last", "best", "report", "tensorboard"


@dataclass(frozen=True)
class RunConfig:
    """config.json of a run folder: all that decides the outcome of a training."""

    preset: Preset
    """Model and training, flags included."""
    data: tuple[str, ...]
    """Data folders."""
    class_names: tuple[str, ...]
    """In label order."""
    init_weights: str
    """Where the weights came from: a file, a model, "torchvision" or "random"."""


def read_run_config(path: Path) -> RunConfig:
    """config.json of a run, also of one that calls ``init_weights`` by its former name "initial_weights".

    Raises:
        RefineDetError: missing, no JSON, or not the config of a run.
    """
    values = read_json(path)
    if isinstance(values, dict) and "initial_weights" in values:
        values["init_weights"] = values.pop("initial_weights")
    return from_dict(RunConfig, values, source=str(path))


def is_run(folder: Path) -> bool:
    """Whether a folder holds the settings of a run, which one that saved nothing yet may replace."""
    try:
        return "preset" in read_json(folder / CONFIG_FILE)
    except (RefineDetError, TypeError):
        return False


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain types so that ``torch.load(..., weights_only=True)`` reads them."""

    def write(aside: Path) -> None:
        # Through Python's own file: a full disk is then an OSError of write(), not an abort inside the zip writer.
        with aside.open("wb") as stream:
            torch.save(state, stream)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote, on the CPU, without running any code that the file may hold.

    Raises:
        RefineDetError: missing, cut, or not such a file.
    """
    if not path.exists():
        raise RefineDetError(f"{path}: no checkpoint there; --resume wants the folder of a run that has saved one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # torch raises anything from EOFError to UnpicklingError here; to the user all mean the same.
        raise RefineDetError(
            f"{path}: not a readable checkpoint (cut, corrupt, or pickled by another program)"
        ) from None
    if not isinstance(state, dict) or "iteration" not in state or "network" not in state:
        raise RefineDetError(f"{path}: not a checkpoint of a refinedet training")
    return state


def model_card(
    preset: Preset, class_names: Sequence[str], name: str, iteration: int, metrics: Mapping[str, Any]
) -> str:
    """Text of a model card.

    Args:
        preset: model and training.
        class_names: in label order.
        name: title.
        iteration: updates that the weights have seen.
        metrics: what was measured ("mAP", "metric", "data", "split", "images" and, if any of these was trained on,
            "also_trained_on"), or empty.
    """
    model, train = preset.model, preset.train
    if metrics:
        both = metrics.get("also_trained_on", 0)
        figure = (
            f"mAP {100 * metrics['mAP']:.2f} ({metrics['metric']}) on {metrics['data']}, split {metrics['split']}, "
            f"{metrics['images']} images, {f'{both} of which were' if both else 'none of which was'} trained on."
        )
    else:
        figure = "Not evaluated."
    height, width = model.image_size
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}[train.optimizer]
    return f"""---
library_name: refinedet
pipeline_tag: object-detection
---

# {name}

RefineDet ("Single-Shot Refinement Neural Network for Object Detection", CVPR 2018), {model.backbone} at
{height}x{width}, {len(class_names)} classes.

## Measured

{figure}

## Training

{iteration} of {train.iterations} iterations of {train.batch_size} images from split `{train.train_split}`, {optimizer}
with learning rate {train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}, precision
{train.precision}, seed {train.seed}{", moving average of the weights" if train.ema_decay else ""}.

## Classes

{", ".join(class_names)}

## Use

    from refinedet import RefineDet
    model = RefineDet.from_pretrained("<this folder>")
    print(model.predict("photo.jpg").table())
"""
