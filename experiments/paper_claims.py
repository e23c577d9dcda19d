"""Tests what the paper claims: the whole RefineDet against its ablations (Table 2) and against SSD300 (Table 1).

All variants start from the same ImageNet VGG-16 weights and see the same images, augmentation, number of iterations,
batch size and optimiser; all are measured by our evaluator. The same call again goes on where it was stopped or
killed; variants that are finished are only looked up.

    python -m experiments.paper_claims --data VOCdevkit --weights vgg16.safetensors --out runs/claims

``--out`` holds a run folder for each variant and seed, and table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.recipe import add_run_arguments, precision_of
from experiments.ssd_peer import SSDPeer, build_ssd, train_ssd
from refinedet.ablations import (
    TABLE_FILE,
    VARIANTS,
    markdown_table,
    recorded_figure,
    train_variants,
    variant_of,
)
from refinedet.cli.terminal import run
from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.data.layouts import open_dataset
from refinedet.dataclass_json import load_json, save_json
from refinedet.device import pick_device
from refinedet.errors import UsageError
from refinedet.evaluation.evaluate import evaluate
from refinedet.files import write_text
from refinedet.presets import get_preset
from refinedet.training.run import REPORT_FOLDER
from refinedet.weights.store import open_weights

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


def measure_ssd(preset: Preset, data: Path, folder: Path, *, weights: str, device: torch.device) -> float:
    """Train SSD300 to its end, or on from its checkpoint, and measure it; what is finished is only looked up.

    Returns:
        mAP in 0..1.

    Raises:
        UsageError: the folder holds a run of other settings.
    """
    written = folder / "preset.json"
    if written.exists() and load_json(Preset, written) != preset:
        raise UsageError(f"{folder}: holds a run of other settings; choose another --out")
    if (folder / REPORT_FOLDER).is_dir():
        return recorded_figure(folder)
    settings = preset.train
    dataset = open_dataset(data, settings.train_split)
    torch.manual_seed(settings.seed)
    imagenet = None if weights == "random" else open_weights(weights).read()
    peer = SSDPeer(build_ssd(len(dataset.class_names), imagenet, weights), preset.model, dataset.class_names)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(preset, written)
    train_ssd(peer, settings, dataset, folder, device=device, stop=lambda: False)
    report = evaluate(peer, open_dataset(data, settings.evaluate_split, dataset.class_names), metric="voc07")
    report.save(folder / REPORT_FOLDER)
    return float(report["mAP"])


def table(figures: Mapping[tuple[str, int], float], settings: Mapping[str, Any]) -> str:
    """Two Markdown tables: mAP of each variant, and whether the claims hold.

    Args:
        figures: mAP (0..1) by variant and seed.
        settings: what they were made with, for the line below the tables.
    """
    variants: dict[str, list[float]] = {}
    for (name, _), figure in figures.items():
        variants.setdefault(name, []).append(100 * figure)
    rows = []
    for name, values in variants.items():
        spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "-"
        rows.append([name, f"{len(values)}", f"{statistics.mean(values):.2f}", spread, f"{PAPER[name]:.1f}"])
    measured = markdown_table(["variant", "seeds", "mAP (%), mean", "least to most", "paper, other data"], rows)
    claims = markdown_table(["claim", "paper", "here", "holds"], [_verdict(claim, variants) for claim in CLAIMS])
    facts = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{measured}\n{claims}\n11-point mAP. Settings: {facts}.\n"


def _verdict(claim: Claim, variants: Mapping[str, Sequence[float]]) -> list[str]:
    """A row of the table of claims, from the figures of each variant in percent."""
    words = f"{claim.better} > {claim.worse}" + (f" by {claim.margin} or more" if claim.margin else "")
    paper = f"{PAPER[claim.better] - PAPER[claim.worse]:+.1f}"
    better, worse = variants.get(claim.better), variants.get(claim.worse)
    if not better or not worse:
        return [words, paper, "-", "not measured"]
    difference = statistics.mean(better) - statistics.mean(worse)
    holds = difference >= claim.margin if claim.margin else difference > 0
    noise = max(max(values) - min(values) for values in (better, worse))
    uncertain = ", within the spread of the seeds" if abs(difference - claim.margin) <= noise else ""
    return [words, paper, f"{difference:+.2f}", ("yes" if holds else "no") + uncertain]


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
    """Train what is missing, then print the table; returns the exit code.

    Raises:
        RefineDetError: bad data or weights, runs of other settings, a loss that is no finite number.
    """
    chosen = parse(arguments)
    device = pick_device(chosen.device)
    torch.backends.cudnn.benchmark = True  # Sizes stay the same, so the fastest algorithms are worth looking for.
    # What goes wrong for all variants goes wrong here, before the first of them.
    counts = [len(open_dataset(chosen.data, split)) for split in (chosen.train_split, chosen.evaluate_split)]
    if chosen.weights != "random":
        open_weights(chosen.weights)
    presets = {(name, seed): preset_of(name, seed, chosen, device) for seed in chosen.seeds for name in chosen.variants}
    figures = {}
    # One at a time, so that the variants of a seed are measured in the order in which they are named.
    for (name, seed), preset in presets.items():
        folder = f"{name}-{seed}"
        if name == SSD:
            figures[name, seed] = measure_ssd(
                preset, chosen.data, chosen.out / folder, weights=chosen.weights, device=device
            )
        else:
            figures[name, seed] = train_variants(
                {folder: preset}, chosen.data, out=chosen.out, init_weights=chosen.weights, device=str(device)
            )[folder]
    settings = {
        "preset": chosen.preset,
        "iterations": chosen.iterations,
        "batch size": chosen.batch_size,
        "learning rate": chosen.learning_rate,
        "warm-up": chosen.warmup_iterations,
        "precision": precision_of(chosen, device),
        "compiled": chosen.compile,
        "weights": Path(chosen.weights).name,
        "train": f"{chosen.train_split} ({counts[0]} images)",
        "measured on": f"{chosen.evaluate_split} ({counts[1]} images)",
    }
    text = table(figures, settings)
    write_text(chosen.out / TABLE_FILE, text)
    print(text)
    return 0


def preset_of(name: str, seed: int, chosen: argparse.Namespace, device: torch.device) -> Preset:
    """What a variant trains: the model that is its own, and the schedule that it shares with the others."""
    iterations = chosen.iterations
    settings = TrainConfig(
        iterations=iterations,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        warmup_iterations=chosen.warmup_iterations,
        # The paper's drops for VOC 2007: after 80k and 100k of 120k.
        milestones=(iterations * 2 // 3, iterations * 5 // 6),
        precision=precision_of(chosen, device),
        compile=chosen.compile,
        seed=seed,
        workers=chosen.workers,
        train_split=chosen.train_split,
        evaluate_split=chosen.evaluate_split,
        evaluate_every=0,
        log_every=max(1, iterations // 50),
        save_every=chosen.save_every,
    )
    model = model_of(name, get_preset(chosen.preset).model)
    return Preset(model=model, train=settings, summary=f"{name} of experiments/paper_claims.py")


if __name__ == "__main__":
    sys.exit(run(lambda: main()))
