"""Tests what the paper claims: the whole RefineDet against its ablations (Table 2) and against SSD300 (Table 1).

All variants start from the same ImageNet VGG-16 weights and see the same photos, augmentation, number of iterations,
batch size and optimiser; all are measured by our evaluator. Runs unattended, in steps (``--minutes``), and goes on
where it was stopped or killed: the same call again continues.

    python -m experiments.paper_claims --data VOCdevkit --weights vgg16.safetensors --state runs/claims --out out

``--state`` holds the runs with their checkpoints. ``--out`` holds results.json, rewritten after each finished variant,
and table.md; a variant that stands in results.json is not trained again, even if its run is lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.pack import pack_note
from experiments.ssd_peer import SSDPeer, build_ssd, train_ssd
from experiments.steps import (
    Deadline,
    add_run_arguments,
    check_settings,
    machine,
    precision_of,
    read_results,
    run_main,
    train_on,
    write_results,
)
from refinedet.ablations import VARIANTS, variant_of
from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.data.layouts import open_dataset
from refinedet.device import pick_device
from refinedet.draw import read_curves
from refinedet.errors import RefineDetError
from refinedet.evaluation.evaluate import evaluate
from refinedet.evaluation.report import Report
from refinedet.files import write_text
from refinedet.presets import get_preset
from refinedet.training.run import METRICS_FILE
from refinedet.weights.store import open_weights

SETTINGS_FILE = "settings.json"
SSD = "ssd300"
FULL_512 = "full-512"
PAPER = {**{variant.name: variant.paper for variant in VARIANTS}, SSD: 77.2, FULL_512: 81.8}
"""mAP in percent on VOC 2007 test, trained on 07+12 (paper, Tables 1 and 2)."""


@dataclass(frozen=True)
class Claim:
    """``better`` beats ``worse`` by ``margin`` or more, in percent of mAP; by anything at all if it is 0."""

    better: str
    worse: str
    margin: float = 0.0


CLAIMS = (
    Claim("full", SSD, 2.5),
    Claim("full", "no-filtering"),
    Claim("no-filtering", "one-step"),
    Claim("one-step", "no-tcb"),
)
"""Section 5.1: RefineDet320 is 2.5 % or more above SSD300, and each part that Table 2 takes away costs something."""


def model_of(name: str, model: ModelConfig) -> ModelConfig:
    """The model config of a variant, from that of the full one."""
    if name == FULL_512:
        return dataclasses.replace(model, image_size=(512, 512))
    changes = [variant for variant in VARIANTS if variant.name == name]
    return variant_of(model, changes[0]) if changes else model


def train_variant(
    name: str,
    preset: Preset,
    data: Path,
    folder: Path,
    *,
    weights: str,
    device: str,
    stop: Callable[[], bool],
) -> Report | None:
    """Train one variant to its end, or on from its checkpoint, and measure it; None if ``stop`` came first."""
    torch.compiler.reset()  # Or the eighth network would run uncompiled.
    if name != SSD:
        preset = dataclasses.replace(preset, model=model_of(name, preset.model))
        return train_on(preset, data, folder, weights=weights, device=device, stop=stop).report
    settings = preset.train
    dataset = open_dataset(data, settings.train_split)
    torch.manual_seed(settings.seed)
    imagenet = None if weights == "random" else open_weights(weights).read()
    network = build_ssd(len(dataset.class_names), imagenet, weights)
    peer = SSDPeer(network, preset.model, dataset.class_names)
    if not train_ssd(peer, settings, dataset, folder, device=pick_device(device), stop=stop):
        return None
    return evaluate(peer, open_dataset(data, settings.evaluate_split, dataset.class_names), metric="voc07")


def learning_curve(folder: Path) -> list[list[float]]:
    """[iteration, total loss] of each logged iteration of a run."""
    steps, totals = read_curves(folder / METRICS_FILE).get("total", ([], []))
    return [[step, total] for step, total in zip(steps, totals, strict=True)]


def table(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Two Markdown tables: mAP of each variant, and whether the claims hold.

    Args:
        results: "variant", "seed" and "mAP" (0..1) of each finished run; runs with an "error" instead of "mAP" are
            listed below.
        settings: what they were made with, for the line below the tables.
    """
    figures: dict[str, list[float]] = {}
    for result in results:
        if "mAP" in result:
            figures.setdefault(result["variant"], []).append(100 * result["mAP"])
    lines = ["| variant | seeds | mAP (%), mean | least to most | paper, other data |", "|---|---|---|---|---|"]
    for name, values in figures.items():
        spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "-"
        lines.append(f"| {name} | {len(values)} | {statistics.mean(values):.2f} | {spread} | {PAPER[name]:.1f} |")
    lines += ["", "| claim | paper | here | holds |", "|---|---|---|---|"]
    for claim in CLAIMS:
        said = f"{claim.better} > {claim.worse}" + (f" by {claim.margin} or more" if claim.margin else "")
        paper = PAPER[claim.better] - PAPER[claim.worse]
        better, worse = figures.get(claim.better), figures.get(claim.worse)
        here, holds = "-", "not measured"
        if better and worse:
            difference = statistics.mean(better) - statistics.mean(worse)
            here, holds = f"{difference:+.2f}", "yes" if _exceeds(difference, claim.margin) else "no"
            noise = max(max(values) - min(values) for values in (better, worse))
            if abs(difference - claim.margin) <= noise:
                holds += ", within the spread of the seeds"
        lines.append(f"| {said} | {paper:+.1f} | {here} | {holds} |")
    lines += [f"\n{r['variant']}, seed {r['seed']}, failed: {r['error']}" for r in results if "error" in r]
    facts = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in ("", None))
    return "\n".join([*lines, "", f"11-point mAP. Settings: {facts}."]) + "\n"


def _exceeds(difference: float, margin: float) -> bool:
    return difference >= margin if margin else difference > 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--weights", required=True, help="ImageNet weights of VGG-16 (.safetensors), or random")
    parser.add_argument("--preset", default="voc07-320-vgg16", help="the full RefineDet")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=list(PAPER), default=[names[0], SSD, *names[1:]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--iterations", type=int, default=6_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-iterations", type=int, default=0, help="the paper has none")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--evaluate-split", default="val")
    parser.add_argument("--save-every", type=int, default=1_000, help="iterations between checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing until the time is up, then print the table.

    Raises:
        RefineDetError: bad data or weights, or results of other settings. What goes wrong in a variant is written
            down instead, and the next one is trained.

    Returns:
        The exit code: 1 if a variant failed.
    """
    chosen = parse(arguments)
    stop = Deadline(chosen.minutes)
    device = pick_device(chosen.device)
    precision = precision_of(chosen, device)
    torch.backends.cudnn.benchmark = True  # Sizes stay the same, so the fastest algorithms are worth looking for.
    model = get_preset(chosen.preset).model
    # What goes wrong for all variants goes wrong here, before the first of them.
    counts = [len(open_dataset(chosen.data, split)) for split in (chosen.train_split, chosen.evaluate_split)]
    if chosen.weights != "random":
        open_weights(chosen.weights)
    iterations = chosen.iterations
    settings = {
        "preset": chosen.preset,
        "iterations": iterations,
        "batch size": chosen.batch_size,
        "learning rate": chosen.learning_rate,
        "warm-up": chosen.warmup_iterations,
        "precision": precision,
        "compiled": chosen.compile,
        "weights": Path(chosen.weights).name,
        "train": f"{chosen.train_split} ({counts[0]} photos)",
        "measured on": f"{chosen.evaluate_split} ({counts[1]} photos)",
        "photos": pack_note(chosen.data),
    }
    known = read_results(chosen.out, settings)
    check_settings(chosen.state / SETTINGS_FILE, settings)
    write_text(chosen.state / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    done: dict[tuple[str, int], dict[str, Any]] = {(one["variant"], one["seed"]): one for one in known}

    def keep() -> None:
        results = list(done.values())
        write_results(chosen.out, settings, results, table(results, settings))

    waiting = []
    for seed in chosen.seeds:
        for name in chosen.variants:
            if "mAP" in done.get((name, seed), {}):
                continue
            if stop():
                waiting.append(f"{name} (seed {seed})")
                continue
            folder = chosen.state / f"{name}-{seed}"
            training = TrainConfig(
                iterations=iterations,
                batch_size=chosen.batch_size,
                learning_rate=chosen.learning_rate,
                warmup_iterations=chosen.warmup_iterations,
                # The paper's drops for VOC 2007: after 80k and 100k of 120k.
                milestones=(iterations * 2 // 3, iterations * 5 // 6),
                precision=precision,
                compile=chosen.compile,
                seed=seed,
                workers=chosen.workers,
                train_split=chosen.train_split,
                evaluate_split=chosen.evaluate_split,
                evaluate_every=0,
                log_every=max(1, iterations // 50),
                save_every=chosen.save_every,
            )
            preset = Preset(model=model, train=training, summary=f"{name} of experiments/paper_claims.py")
            print(f"== {name}, seed {seed}", file=sys.stderr, flush=True)
            began = time.monotonic()
            try:
                report = train_variant(
                    name, preset, chosen.data, folder, weights=chosen.weights, device=str(device), stop=stop
                )
            except Exception as error:  # One variant that fails must not cost the others their turn.
                if not isinstance(error, RefineDetError):
                    traceback.print_exc()
                done[name, seed] = {"variant": name, "seed": seed, "error": f"{error or type(error).__name__}"}
                keep()
                continue
            if report is None:
                waiting.append(f"{name} (seed {seed})")
                continue
            done[name, seed] = {
                "variant": name,
                "seed": seed,
                "mAP": report["mAP"],
                "per_class": report.to_dict()["per_class"],
                "minutes of the last step": round((time.monotonic() - began) / 60, 2),
                "curve": learning_curve(folder),
            }
            keep()
    keep()
    if waiting:
        print(f"time is up; the same call again goes on with {', '.join(waiting)}")
    print(f"\n{table(list(done.values()), settings)}\n{machine()}")
    return int(any("error" in one for one in done.values()))


if __name__ == "__main__":
    run_main(main)
