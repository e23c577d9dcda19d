"""Trains the light model in the box with a long schedule: on train, measured on val, then on trainval, to be shipped.

    python -m experiments.light_model --data VOCdevkit --weights resnet18.safetensors --state runs/light --out out

Runs in steps (``--minutes``) and goes on where it was stopped or killed: the same call again continues. Each finished
model is written into ``--out`` with float16 kernels, its weights cut into parts; ``experiments.pack join`` makes a
model folder of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

import torch

from experiments.pack import pack_note, write_weights
from experiments.steps import Deadline, add_run_arguments, machine, precision_of, run_main, train_on
from refinedet.device import pick_device
from refinedet.files import write_text
from refinedet.presets import get_preset


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing until the time is up; returns the exit code.

    Raises:
        RefineDetError: bad data or weights, a state of other settings, a loss that is no finite number.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--weights", required=True, help="ImageNet weights of ResNet-18 (.safetensors), or random")
    parser.add_argument("--preset", default="voc07-320-resnet18")
    parser.add_argument("--iterations", type=int, default=16_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: the preset's")
    chosen = parser.parse_args(arguments)
    stop = Deadline(chosen.minutes)
    device = pick_device(chosen.device)
    torch.backends.cudnn.benchmark = True
    preset = get_preset(chosen.preset)
    for split, measured_on in (("train", "val"), ("trainval", "none")):
        folder = chosen.state / split
        if (chosen.out / split / "config.json").exists():
            continue
        if stop():
            print(f"time is up; the same call again goes on with {split}")
            return 0
        training = dataclasses.replace(
            preset.train,
            iterations=chosen.iterations,
            batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate or preset.train.learning_rate,
            size_schedule=(),  # Small pictures first was for a CPU.
            precision=precision_of(chosen, device),
            compile=chosen.compile,
            workers=chosen.workers,
            train_split=split,
            evaluate_split=measured_on,
            evaluate_every=0,
            evaluate_limit=None,
            log_every=max(1, chosen.iterations // 50),
            save_every=1_000,
        )
        wanted = dataclasses.replace(preset, train=training)
        run = train_on(wanted, chosen.data, folder, weights=chosen.weights, device=str(device), stop=stop)
        if not run.finished:
            print(f"time is up; the same call again goes on with {split}")
            return 0
        if run.report is not None:
            figures = {"mAP": run.report["mAP"], "per_class": run.report.to_dict()["per_class"]}
            facts = {"iterations": chosen.iterations, "batch": chosen.batch_size, "photos": pack_note(chosen.data)}
            text = json.dumps({**facts, **figures, "machine": machine()}, indent=1)
            write_text(chosen.out / "light.json", text + "\n")
            print(f"trained on {split}: {100 * run.report['mAP']:.2f} mAP on {measured_on} ({pack_note(chosen.data)})")
        write_weights(run.model, chosen.out / split)
    print(f"both models are in {chosen.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
