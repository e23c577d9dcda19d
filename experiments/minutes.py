"""How good a detector is after how many minutes of training on your images, from three starts.

    python -m experiments.minutes --data BCCD --weights resnet18.safetensors --out runs/minutes

The starts are ``refinedet train --data DATA`` as it is (from the bundled model), the same from ImageNet weights, and
torchvision's SSD over the same ResNet-18 from the same ImageNet weights, with the same images, augmentation, optimiser
and input. Every figure is a training of its own whose learning rate comes down within these minutes. Minutes are those
of the iterations: the time of the first ones gives their number; starting and measuring come on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from experiments.ssd_peer import SSDOutputs, SSDPeer, build_ssd, ssd_loss, train_ssd
from refinedet.ablations import TABLE_FILE, markdown_table
from refinedet.cli.terminal import run
from refinedet.config import TrainConfig
from refinedet.device import pick_device
from refinedet.evaluation.charts import Line, LineChart
from refinedet.evaluation.evaluate import evaluate
from refinedet.evaluation.run_data import RunData
from refinedet.files import read_json, write_text
from refinedet.schedule import iterations_of_minutes, with_iterations
from refinedet.training.batches import training_batches
from refinedet.training.distributed import World
from refinedet.training.pace import seconds_per_iteration
from refinedet.training.run import REPORT_FOLDER
from refinedet.training.train import train
from refinedet.weights.store import open_weights

STARTS = {"bundled": "refinedet train --data DATA", "imagenet": "the same from ImageNet weights", "ssd": "SSD"}
"""Name to what the table says."""
CURVES = {"bundled": "RefineDet, bundled", "imagenet": "RefineDet, ImageNet", "ssd": "SSD, ImageNet"}
"""Name to what stands at the end of its line."""
_COLOURS = ("#0b62a4", "#c2571a", "#5c7f2a")
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.line{fill:none;stroke-width:2.5}.grid{stroke:#ddd}"
    ".middle{text-anchor:middle}.end{text-anchor:end}"
    + "".join(
        f".line-{n}{{stroke:{colour}}}.mark-{n}{{fill:{colour}}}.name-{n}{{fill:{colour}}}"
        for n, colour in enumerate(_COLOURS, 1)
    )
)
"""A chart that stands alone takes its colours from here."""
_PAPER = '<rect width="100%" height="100%" fill="#fff"/>'


def train_refinedet(start: str, minutes: float, chosen: argparse.Namespace, folder: Path) -> None:
    """Train and measure from the bundled model or from ImageNet weights; the report is in the folder."""
    splits = {"train_split": chosen.train_split, "evaluate_split": chosen.evaluate_split}
    train(
        "finetune",
        chosen.data,
        out=folder,
        minutes=minutes,
        init_weights=chosen.weights if start == "imagenet" else None,
        device=chosen.device,
        workers=chosen.workers,
        seed=chosen.seed,
        **{name: split for name, split in splits.items() if split is not None},
    )


def train_peer(minutes: float, pattern: Path, chosen: argparse.Namespace, folder: Path) -> None:
    """Train and measure SSD with the data and settings of a run of RefineDet.

    Args:
        minutes: of its iterations.
        pattern: the run folder whose data, splits, batch and rates it takes.
        chosen: the command line.
        folder: receives the report.
    """
    known = RunData.of(pattern)
    dataset, held_out = known.train(), known.held_out()
    device = pick_device(chosen.device)
    settings = known.config.preset.train
    if chosen.ssd_learning_rate is not None:
        settings = dataclasses.replace(settings, learning_rate=chosen.ssd_learning_rate)
    model = dataclasses.replace(known.config.preset.model, num_classes=len(dataset.class_names))
    torch.manual_seed(chosen.seed)
    weights = None if chosen.weights == "random" else open_weights(chosen.weights).read()
    peer = SSDPeer(build_ssd(model, weights, chosen.weights), model, dataset.class_names, model.image_size)

    def batches(short: TrainConfig):  # type: ignore[no-untyped-def]
        return training_batches(dataset, model, short, image_size=peer.size)

    outputs, criterion = SSDOutputs(peer.network.to(device)), ssd_loss(peer.network)
    seconds = seconds_per_iteration(outputs, criterion, settings, batches, World(0, 1, device))
    settings = with_iterations(settings, iterations_of_minutes(minutes, seconds))
    train_ssd(peer, settings, dataset, folder, device=device, stop=lambda: False)
    evaluate(peer, held_out, metric="coco").save(folder / REPORT_FOLDER)


def table(figures: Mapping[tuple[str, float], Mapping[str, float]]) -> str:
    """A row for each start, a column for each number of minutes: COCO AP (AP50) in percent.

    Args:
        figures: those of the report by start and minutes.
    """
    minutes = sorted({each for _, each in figures})
    rows = []
    for start, words in STARTS.items():
        cells = [
            f"{100 * found['AP']:.1f} ({100 * found['AP50']:.1f})" if (found := figures.get((start, each))) else "-"
            for each in minutes
        ]
        if set(cells) != {"-"}:
            rows.append([words, *cells])
    return markdown_table(["start", *(f"{each:g} minute{'s' * (each != 1)}" for each in minutes)], rows)


def curve(figures: Mapping[tuple[str, float], Mapping[str, float]]) -> str:
    """COCO AP over minutes, a line for each start, as SVG of its own."""
    lines = []
    for start, words in CURVES.items():
        points = sorted((minutes, 100 * found["AP"]) for (name, minutes), found in figures.items() if name == start)
        if points:
            lines.append(Line(words, *zip(*points, strict=True)))
    longest = max(minutes for _, minutes in figures)
    highest = max(100 * found["AP"] for found in figures.values())
    chart = LineChart(
        lines=lines,
        title="AP on held-out images after so many minutes of training",
        description="Each point is a training of its own; the start is written at the end of its line.",
        axes=("minutes of training", "COCO AP (%)"),
        x_range=(0.0, longest),
        y_range=(0.0, 10 * math.ceil(highest / 10) or 10.0),
        named=True,
        marked=True,
        size_wh=(560, 300),
    )
    return chart.svg().replace("<title>", f"<style>{_STYLE}</style>{_PAPER}<title>", 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="annotated images, as for refinedet train")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the run folders and {TABLE_FILE}")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=1, help="loading processes")
    parser.add_argument("--weights", required=True, help="ImageNet weights of ResNet-18 (.safetensors), or random")
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 3, 10])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--train-split", help="default: what refinedet train chooses")
    parser.add_argument("--evaluate-split", help="the same")
    parser.add_argument("--ssd-learning-rate", type=float, help="default: that of RefineDet")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    figures: dict[tuple[str, float], Mapping[str, float]] = {}
    pattern: Path | None = None
    for minutes in chosen.minutes:
        for start in chosen.starts:
            folder = chosen.out / f"{start}-{minutes:g}"
            if not (folder / REPORT_FOLDER).is_dir():
                if start != "ssd":
                    train_refinedet(start, minutes, chosen, folder)
                else:
                    train_peer(minutes, pattern or chosen.out / f"imagenet-{minutes:g}", chosen, folder)
            if start != "ssd":
                pattern = folder
            figures[start, minutes] = read_json(folder / REPORT_FOLDER / "report.json")["figures"]
            write_text(chosen.out / TABLE_FILE, table(figures))
            write_text(chosen.out / "curve.svg", curve(figures))
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main()))
