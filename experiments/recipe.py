"""Finds out what pays for small data: one change of the recipe at a time, equal budget, held-out images of train.

    python -m experiments.recipe --data VOCdevkit --weights resnet18.safetensors --out runs/recipe

Every trial trains the light model on the first four fifths of train and is measured on the rest, so val is left alone.
The same call again goes on where it was stopped or killed; trials that are finished are only looked up.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from refinedet.ablations import TABLE_FILE, markdown_table, train_variants
from refinedet.cli.terminal import run
from refinedet.config import Preset
from refinedet.data.layouts import open_dataset
from refinedet.dataclass_json import from_dict, to_dict
from refinedet.device import pick_device
from refinedet.files import write_text
from refinedet.presets import get_preset

TRAIN_SPLIT, HELD_OUT_SPLIT = "train[:80%]", "train[80%:]"
_ADAMW = {"train.optimizer": "adamw", "train.learning_rate": 5e-4, "train.weight_decay": 0.05}
_MOSAICS = {**_ADAMW, "train.augment.expand_ratio": 2.0, "train.augment.mosaic_probability": 0.5}
_OWN_RATE = "train.backbone_learning_rate_factor"
TRIALS: dict[str, dict[str, Any]] = {
    "base": {},
    "rate-half": {"train.learning_rate": 0.005},
    "rate-double": {"train.learning_rate": 0.02},
    "adamw": _ADAMW,
    "adamw-rate-half": {**_ADAMW, "train.learning_rate": 2.5e-4},
    "adamw-rate-double": {**_ADAMW, "train.learning_rate": 1e-3},
    "no-clipping": {"train.gradient_clip_norm": None},
    "no-average": {"train.ema_decay": None},
    "batch-32": {"train.batch_size": 32},
    "milestones": {"train.schedule": "milestones"},
    "expand-2": {"train.augment.expand_ratio": 2.0},
    "mosaic": {"train.augment.mosaic_probability": 0.5},
    "mixup": {"train.augment.mixup_probability": 0.5},
    "label-smoothing": {"train.loss.label_smoothing": 0.1},
    "arm-0.7-0.3": {"train.loss.arm_positive_iou": 0.7, "train.loss.arm_negative_iou": 0.3},
    "tcb-256": {"model.tcb_channels": 256},
    "adamw+expand-2": {**_ADAMW, "train.augment.expand_ratio": 2.0},
    "adamw-rate-half+expand-2": {**_ADAMW, "train.learning_rate": 2.5e-4, "train.augment.expand_ratio": 2.0},
    "adamw+expand-2+mosaic": _MOSAICS,
    "adamw+expand-2+mosaic-always": {**_MOSAICS, "train.augment.mosaic_probability": 1.0},
    "adamw+expand-2+mosaic+mixup": {**_MOSAICS, "train.augment.mixup_probability": 0.5},
    "adamw+expand-2+mosaic+backbone-0.2": {**_MOSAICS, _OWN_RATE: 0.2},
    "adamw-rate-double+expand-2+mosaic+backbone-0.1": {**_MOSAICS, "train.learning_rate": 1e-3, _OWN_RATE: 0.1},
    "adamw-rate-double+expand-2+mosaic+backbone-0.03": {**_MOSAICS, "train.learning_rate": 1e-3, _OWN_RATE: 0.03},
    "adamw-rate-double+expand-2+mosaic+backbone-0.01": {**_MOSAICS, "train.learning_rate": 1e-3, _OWN_RATE: 0.01},
    "adamw-rate-4+expand-2+mosaic+backbone-0.005": {**_MOSAICS, "train.learning_rate": 2e-3, _OWN_RATE: 0.005},
    "adamw-rate-double+expand-2+mosaic+backbone-0": {**_MOSAICS, "train.learning_rate": 1e-3, _OWN_RATE: 0.0},
}
"""What each trial does unlike the base, which ``base_recipe`` gives: SGD of 0.01 with a cosine, batch of 16, average of
the weights, one rate, expansion up to 4, no mosaics, no mixup."""


def changed(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """The preset with some of its numbers replaced.

    A trial sees as many images as the others: a batch twice as large means half the iterations, warm-up included.

    Args:
        preset: the base.
        changes: values by their path, such as "train.augment.expand_ratio".

    Raises:
        RefineDetError: no such path, or a value of the wrong type.
    """
    values = to_dict(preset)
    for path, value in changes.items():
        *parents, name = path.split(".")
        part = values
        for parent in parents:
            part = part[parent]
        part[name] = value
    trial = from_dict(Preset, values, source="trial")
    old, new = preset.train, trial.train
    iterations = old.iterations * old.batch_size // new.batch_size
    warmup = old.warmup_iterations * old.batch_size // new.batch_size
    train = dataclasses.replace(
        new,
        iterations=iterations,
        warmup_iterations=warmup,
        # The paper's drops for VOC 2007, for the trial that has them: after 80k and 100k of 120k.
        milestones=(iterations * 2 // 3, iterations * 5 // 6),
    )
    return dataclasses.replace(trial, train=train)


def table(figures: Mapping[tuple[str, int], float], settings: Mapping[str, Any]) -> str:
    """A Markdown table: mAP of each trial and what it gave over the base of the same seeds.

    Args:
        figures: mAP (0..1) by trial and seed.
        settings: what they were made with, for the line below.
    """
    trials: dict[str, dict[int, float]] = {}
    for (name, seed), figure in figures.items():
        trials.setdefault(name, {})[seed] = 100 * figure
    base = trials.get("base", {})
    rows = []
    for name, by_seed in trials.items():
        changes = ", ".join(f"{path.rsplit('.', 1)[-1]} {value}" for path, value in TRIALS[name].items()) or "nothing"
        gains = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
        gain = f"{statistics.mean(gains):+.2f}" if gains and name != "base" else "-"
        seeds = ", ".join(map(str, sorted(by_seed)))
        rows.append([name, changes, seeds, f"{statistics.mean(by_seed.values()):.2f}", gain])
    facts = ", ".join(f"{name} {value}" for name, value in settings.items())
    text = markdown_table(["trial", "what is changed", "seeds", "mAP (%)", "against the base"], rows)
    return f"{text}\n11-point mAP. Settings: {facts}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the trials that are missing, then print the table; returns the exit code.

    Raises:
        RefineDetError: bad data or weights, runs of other settings, a loss that is no finite number.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--weights", required=True, help="ImageNet weights of the backbone (.safetensors), or random")
    parser.add_argument("--preset", default="voc07-320-resnet18", help="the base")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--iterations", type=int, default=500, help="of the base's batch; all see as many images")
    parser.add_argument("--warmup-iterations", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=192, help="of the network's input, a multiple of 64")
    chosen = parser.parse_args(arguments)
    device = pick_device(chosen.device)
    counts = [len(open_dataset(chosen.data, split)) for split in (TRAIN_SPLIT, HELD_OUT_SPLIT)]
    base = base_recipe(get_preset(chosen.preset), chosen, device)
    presets = {
        (name, seed): changed(base, {**TRIALS[name], "train.seed": seed})
        for seed in chosen.seeds
        for name in chosen.trials
    }
    figures = train_variants(
        {f"{name}-{seed}": preset for (name, seed), preset in presets.items()},
        chosen.data,
        out=chosen.out,
        init_weights=chosen.weights,
        device=str(device),
    )
    settings = {
        "preset": chosen.preset,
        "iterations": chosen.iterations,
        "warm-up": chosen.warmup_iterations,
        "batch size": base.train.batch_size,
        "side": chosen.side,
        "precision": base.train.precision,
        "weights": Path(chosen.weights).name,
        "trained on": f"{TRAIN_SPLIT} ({counts[0]} images)",
        "measured on": f"{HELD_OUT_SPLIT} ({counts[1]} images)",
    }
    text = table(dict(zip(presets, figures.values(), strict=True)), settings)
    write_text(chosen.out / TABLE_FILE, text)
    print(text)
    return 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every program that trains variants."""
    parser.add_argument("--data", type=Path, required=True, help="VOCdevkit, or one year of it")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the run folders and {TABLE_FILE}")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="loading processes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")


def precision_of(chosen: argparse.Namespace, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision asked for by a flag of ``add_run_arguments``, or the device's default."""
    asked: Literal["fp32", "bf16"] | None = chosen.precision
    return asked or ("bf16" if device.type == "cuda" else "fp32")


def base_recipe(preset: Preset, chosen: argparse.Namespace, device: torch.device) -> Preset:
    """What every trial has in common, and the trials' own changes start from."""
    base = {
        "model.image_size": (chosen.side, chosen.side),
        "train.optimizer": "sgd",
        "train.learning_rate": 0.01,
        "train.schedule": "cosine",
        "train.weight_decay": 5e-4,
        "train.backbone_learning_rate_factor": 1.0,
        "train.gradient_clip_norm": 10.0,
        "train.ema_decay": 0.998,
        "train.batch_size": chosen.batch_size,
        "train.augment.expand_ratio": 4.0,
        "train.augment.mosaic_probability": 0.0,
        "train.augment.mixup_probability": 0.0,
        "train.iterations": chosen.iterations,
        "train.warmup_iterations": chosen.warmup_iterations,
        "train.size_schedule": (),
        "train.precision": precision_of(chosen, device),
        "train.compile": chosen.compile,
        "train.workers": chosen.workers,
        "train.log_every": max(1, chosen.iterations // 10),
        "train.save_every": max(1, chosen.iterations // 5),
        "train.evaluate_every": 0,
        "train.evaluate_limit": None,
        "train.train_split": TRAIN_SPLIT,
        "train.evaluate_split": HELD_OUT_SPLIT,
    }
    # The preset's own numbers belong to its own iterations.
    scale = {"batch_size": chosen.batch_size, "iterations": chosen.iterations}
    return changed(dataclasses.replace(preset, train=dataclasses.replace(preset.train, **scale)), base)


if __name__ == "__main__":
    sys.exit(run(lambda: main()))
