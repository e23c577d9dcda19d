"""Tests what the paper claims: the whole RefineDet against its ablations (Table 2) and against SSD (Table 1).

All variants start from the same ImageNet weights and see the same images, augmentation, number of iterations, batch
size and optimiser; all are measured by our evaluator on images that none was trained on. The same call again goes on
where it was stopped or killed; variants that are finished are only looked up.

    python -m experiments.claims --data VOCdevkit --weights resnet18.safetensors --out runs/claims

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

import numpy as np
import torch

from experiments.recipe import HELD_OUT_SPLIT, TRAIN_SPLIT, add_run_arguments, precision_of
from experiments.ssd_peer import SIZE, SSDPeer, build_ssd, train_ssd
from refinedet.ablations import (
    TABLE_FILE,
    VARIANTS,
    markdown_table,
    recorded_figure,
    train_variants,
    variant_of,
)
from refinedet.cli.terminal import run
from refinedet.config import ModelConfig, Preset
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset
from refinedet.dataclass_json import load_json, save_json
from refinedet.device import pick_device
from refinedet.errors import UsageError
from refinedet.evaluation.compare import drawn_differences, saved_detections
from refinedet.evaluation.evaluate import evaluate
from refinedet.evaluation.outcomes import Outcomes, match_objects
from refinedet.files import write_text
from refinedet.presets import get_preset
from refinedet.training.run import REPORT_FOLDER
from refinedet.weights.store import open_weights

SSD = "ssd"
PAPER = {**{variant.name: variant.paper for variant in VARIANTS}, SSD: 77.2}
"""mAP in percent on VOC 2007 test, trained on 07+12 (paper, Tables 1 and 2; SSD300)."""


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
    Claim("full", "no-tcb"),
)
"""Section 5.1: RefineDet320 is 2.5 % or more above SSD300, and each part that Table 2 takes away costs something."""


@dataclass(frozen=True)
class Difference:
    """What one claim came to, in percent of mAP."""

    seeds: tuple[int, ...]
    """Seeds with which both variants were trained."""
    mean: float
    """Mean difference over these seeds."""
    low: float
    """2.5th percentile when the images are drawn again (paired bootstrap)."""
    high: float
    """97.5th percentile."""


def model_of(name: str, model: ModelConfig) -> ModelConfig:
    """The model config of a variant, from that of the full one; SSD has the same backbone."""
    changes = [variant for variant in VARIANTS if variant.name == name]
    return variant_of(model, changes[0]) if changes else model


def measure_ssd(preset: Preset, data: Path, folder: Path, *, weights: str, device: torch.device) -> float:
    """Train SSD to its end, or on from its checkpoint, and measure it; what is finished is only looked up.

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
    model = dataclasses.replace(preset.model, num_classes=len(dataset.class_names))
    size = SIZE if model.backbone == "vgg16" else model.image_size
    peer = SSDPeer(build_ssd(model, imagenet, weights), model, dataset.class_names, size)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(preset, written)
    train_ssd(peer, settings, dataset, folder, device=device, stop=lambda: False)
    report = evaluate(peer, open_dataset(data, settings.evaluate_split, dataset.class_names), metric="voc07")
    report.save(folder / REPORT_FOLDER)
    return float(report["mAP"])


def differences(folders: Mapping[tuple[str, int], Path], dataset: DetectionDataset) -> dict[Claim, Difference]:
    """Mean difference and its interval for each claim whose two variants share a seed.

    Args:
        folders: run folder by variant and seed, each with the report of its evaluation on ``dataset``.
        dataset: the held-out images.
    """
    outcomes: dict[tuple[str, int], Outcomes] = {}
    for key, folder in folders.items():
        by_id = saved_detections(folder, dataset)
        found = [by_id[record.image_id] for record in dataset.records]
        outcomes[key] = match_objects(found, dataset.records, len(dataset.class_names))
    result = {}
    for claim in CLAIMS:
        seeds = tuple(seed for name, seed in outcomes if name == claim.better and (claim.worse, seed) in outcomes)
        if not seeds:
            continue
        pairs = [(outcomes[claim.worse, seed], outcomes[claim.better, seed]) for seed in seeds]
        low, high = np.nanpercentile(drawn_differences(pairs, "11-point")[:, -1], [2.5, 97.5])
        gains = [recorded_figure(folders[claim.better, s]) - recorded_figure(folders[claim.worse, s]) for s in seeds]
        result[claim] = Difference(seeds, 100 * statistics.mean(gains), 100 * float(low), 100 * float(high))
    return result


def table(
    figures: Mapping[tuple[str, int], float], found: Mapping[Claim, Difference], settings: Mapping[str, Any]
) -> str:
    """Two Markdown tables: mAP of each variant, and whether the claims hold.

    Args:
        figures: mAP (0..1) by variant and seed.
        found: what the claims came to.
        settings: what they were made with, for the line below the tables.
    """
    variants: dict[str, list[float]] = {}
    for (name, _), figure in figures.items():
        variants.setdefault(name, []).append(100 * figure)
    rows = []
    for name, values in variants.items():
        deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        each = ", ".join(f"{value:.2f}" for value in values)
        rows.append([name, each, f"{statistics.mean(values):.2f}", deviation, f"{PAPER[name]:.1f}"])
    measured = markdown_table(["variant", "mAP (%) of each seed", "mean", "standard deviation", "paper"], rows)
    header = ["claim", "paper", "here, mean of the seeds", "95 % interval over the images", "holds"]
    claims = markdown_table(header, [_verdict(claim, found.get(claim)) for claim in CLAIMS])
    facts = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{measured}\n{claims}\n11-point mAP. Settings: {facts}.\n"


def _verdict(claim: Claim, difference: Difference | None) -> list[str]:
    """A row of the table of claims."""
    words = f"{claim.better} > {claim.worse}" + (f" by {claim.margin} or more" if claim.margin else "")
    paper = f"{PAPER[claim.better] - PAPER[claim.worse]:+.1f}"
    if difference is None:
        return [words, paper, "-", "-", "not measured"]
    holds = difference.mean >= claim.margin if claim.margin else difference.mean > 0
    open_question = difference.low <= claim.margin <= difference.high
    interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
    verdict = ("yes" if holds else "no") + (", not settled by these images" if open_question else "")
    return [words, paper, f"{difference.mean:+.2f} ({len(difference.seeds)})", interval, verdict]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--weights", required=True, help="ImageNet weights of the backbone (.safetensors), or random")
    parser.add_argument("--preset", default="voc07-320-resnet18", help="the full RefineDet and its recipe")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=list(PAPER), default=[names[0], SSD, *names[1:]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=2_500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sides", nargs="+", type=int, default=[192, 256], help="of the input, in equal parts")
    parser.add_argument("--ssd-learning-rate", type=float, help="default: the preset's")
    parser.add_argument("--ssd-backbone-factor", type=float, help="the backbone's share of it; default: the preset's")
    parser.add_argument("--train-split", default=TRAIN_SPLIT)
    parser.add_argument("--evaluate-split", default=HELD_OUT_SPLIT)
    parser.add_argument("--save-every", type=int, default=250, help="iterations between checkpoints")
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
    train_on, measure_on = (open_dataset(chosen.data, split) for split in (chosen.train_split, chosen.evaluate_split))
    if chosen.weights != "random":
        open_weights(chosen.weights)
    presets = {(name, seed): preset_of(name, seed, chosen, device) for seed in chosen.seeds for name in chosen.variants}
    folders = {(name, seed): chosen.out / f"{name}-{seed}" for name, seed in presets}
    facts = _settings(chosen, device, len(train_on), len(measure_on))
    figures: dict[tuple[str, int], float] = {}
    text = ""
    # Seed after seed, so that a comparison exists before the last seed is done.
    for (name, seed), preset in presets.items():
        folder = folders[name, seed]
        finished_before = (folder / REPORT_FOLDER).is_dir()
        if name == SSD:
            figures[name, seed] = measure_ssd(preset, chosen.data, folder, weights=chosen.weights, device=device)
        else:
            figures[name, seed] = train_variants(
                {folder.name: preset}, chosen.data, out=chosen.out, init_weights=chosen.weights, device=str(device)
            )[folder.name]
        if finished_before and len(figures) < len(presets):
            continue  # The intervals take seconds to minutes.
        found = differences({key: folders[key] for key in figures}, measure_on)
        text = table(figures, found, facts)
        write_text(chosen.out / TABLE_FILE, text)
    print(text)
    return 0


def _settings(chosen: argparse.Namespace, device: torch.device, trained: int, measured: int) -> dict[str, Any]:
    """What the figures were made with."""
    ssd = [f"{word} {value}" for word, value in _ssd_changes(chosen).items()]
    return {
        "preset": chosen.preset,
        "iterations": chosen.iterations,
        "batch size": chosen.batch_size,
        "sides": " then ".join(map(str, chosen.sides)),
        "rates of SSD": " and ".join(ssd) or "the same",
        "precision": precision_of(chosen, device),
        "weights": Path(chosen.weights).name,
        "train": f"{chosen.train_split} ({trained} images)",
        "measured on": f"{chosen.evaluate_split} ({measured} images)",
    }


def _ssd_changes(chosen: argparse.Namespace) -> dict[str, float]:
    asked = {
        "learning_rate": chosen.ssd_learning_rate,
        "backbone_learning_rate_factor": chosen.ssd_backbone_factor,
    }
    return {name: value for name, value in asked.items() if value is not None}


def preset_of(name: str, seed: int, chosen: argparse.Namespace, device: torch.device) -> Preset:
    """What a variant trains: the model that is its own, and the recipe that it shares with the others.

    The recipe is that of the preset; its drops and its warm-up are moved in proportion to the iterations.
    """
    preset = get_preset(chosen.preset)
    share = chosen.iterations / preset.train.iterations
    starts = [chosen.iterations * part // len(chosen.sides) for part in range(len(chosen.sides))]
    side = chosen.sides[-1]
    settings = dataclasses.replace(
        preset.train,
        iterations=chosen.iterations,
        batch_size=chosen.batch_size,
        # A tenth at most, so that short trainings learn at the full rate too.
        warmup_iterations=min(preset.train.warmup_iterations, chosen.iterations // 10),
        milestones=tuple(round(milestone * share) for milestone in preset.train.milestones),
        size_schedule=tuple(zip(starts, chosen.sides, strict=True)) if len(chosen.sides) > 1 else (),
        precision=precision_of(chosen, device),
        compile=chosen.compile,
        keep_images=True,
        seed=seed,
        workers=chosen.workers,
        train_split=chosen.train_split,
        evaluate_split=chosen.evaluate_split,
        evaluate_every=0,
        evaluate_limit=None,
        log_every=max(1, chosen.iterations // 50),
        save_every=chosen.save_every,
        metric="voc07",
        **(_ssd_changes(chosen) if name == SSD else {}),
    )
    model = dataclasses.replace(model_of(name, preset.model), image_size=(side, side))
    return Preset(model=model, train=settings, summary=f"{name} of experiments/claims.py")


if __name__ == "__main__":
    sys.exit(run(lambda: main()))
