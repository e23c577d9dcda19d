"""How fast training and inference are on this machine, beside the paper's 40.3 and 24.1 FPS.

    python -m benchmarks.speed --data VOCdevkit --out out
    python -m benchmarks.speed --skip training --models runs/claims/full-0 voc07-512-vgg16

* training: images per second of the data alone (loading processes), of network, loss, backward pass and update alone
  (on one batch that stays on the device), and of ``refinedet train`` itself; and the hours that the paper's 120,000
  iterations of 32 would take at that rate;
* inference: images per second of network and post-processing, as the paper timed it, at batch 1 and at the best of
  ``--batches``; eager, compiled, and with the network replayed as a CUDA graph; float32 and bf16.

A preset's name times random weights, whose many equal scores keep post-processing busier than trained ones do.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from refinedet.cli.terminal import run
from refinedet.config import Preset
from refinedet.data.layouts import open_dataset
from refinedet.detector import RefineDet
from refinedet.device import pick_device
from refinedet.draw import read_curves
from refinedet.files import write_text
from refinedet.model.network import Predictions
from refinedet.model.postprocess import postprocess
from refinedet.presets import PRESETS, get_preset
from refinedet.training.batches import training_batches
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets
from refinedet.training.optim import build_optimizer
from refinedet.training.run import METRICS_FILE
from refinedet.training.train import train

PAPER_FPS = {320: 40.3, 512: 24.1}
"""Batch 1, Titan X (Maxwell), network and post-processing (paper, Table 1), by the side of the input."""
PAPER_IMAGES = 120_000 * 32
"""What the paper's VOC 2007 schedule sees."""
MODES = ("eager", "compiled", "graph")


def machine() -> str:
    """Device and versions, for the line below a table."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}"


def random_targets(batch: int, side: int, num_classes: int, seed: int = 0) -> Targets:
    """One to six boxes of 16 pixels to the whole image for each of ``batch`` images."""
    rng = np.random.default_rng(seed)
    boxes, labels = [], []
    for _ in range(batch):
        count = int(rng.integers(1, 7))
        size = rng.uniform(16, side, (count, 2))
        corner = rng.uniform(0, side - size)
        boxes.append(torch.tensor(np.concatenate([corner, corner + size], axis=1), dtype=torch.float32))
        labels.append(torch.tensor(rng.integers(0, num_classes, count)))
    return Targets.collate(boxes, labels)


def clock(work: Callable[[], Any], device: torch.device, *, seconds: float, warmup: int = 3) -> float:
    """Median wall time in seconds of a call, the device's work included, over about ``seconds``."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < warmup + 3 or time.perf_counter() - began < seconds:
        mark = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - mark)
    return statistics.median(times[warmup:])


def time_step(preset: Preset, data: Path | None, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds of the parts of an iteration on a batch that stays on the device: network, loss, backward, update.

    The batch is the first of ``data``; without data it is noise with one to six boxes in each image, which makes
    matching faster than it is on real images.
    """
    settings, config = preset.train, preset.model
    network = RefineDet(config).to(device).network.train()
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    forward: Callable[[Tensor], Predictions] = torch.compile(network) if settings.compile else network
    criterion = RefineDetLoss(config, settings.loss).to(device)
    optimizer = build_optimizer(network, settings)
    if data is None:
        batch_images = torch.randn(settings.batch_size, 3, *config.image_size)
        boxes = random_targets(settings.batch_size, config.image_size[0], config.num_classes)
    else:
        one = dataclasses.replace(settings, workers=0, iterations=1)
        batch = next(training_batches(open_dataset(data, settings.train_split), config, one))
        batch_images, boxes = batch.images, batch.targets
    images, targets = batch_images.to(device).contiguous(memory_format=torch.channels_last), boxes.to(device)
    names = ("network", "loss", "backward", "update")
    marks: dict[str, list[float]] = {name: [] for name in names}

    def step() -> None:
        times = [time.perf_counter()]

        def mark() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter())

        half = torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()
        with half:
            predictions = forward(images)
        mark()
        total = criterion(predictions, targets)["total"]
        mark()
        optimizer.zero_grad(set_to_none=True)
        # Random weights would diverge on the same batch again and again.
        torch.autograd.backward(total * 1e-6)
        mark()
        optimizer.step()
        mark()
        for name, before, after in zip(names, times, times[1:], strict=False):
            marks[name].append(after - before)

    clock(step, device, seconds=seconds)
    return {name: statistics.median(values[3:]) for name, values in marks.items()}


def time_data(preset: Preset, data: Path, batches: int) -> float:
    """Images per second that the loading processes deliver to a trainer that does nothing."""
    dataset = open_dataset(data, preset.train.train_split)
    # The first batches wait for the processes to start; they have as many ahead by then.
    warmup = 4 * max(1, preset.train.workers)
    settings = dataclasses.replace(preset.train, iterations=warmup + batches)
    began = 0.0
    for number, _ in enumerate(training_batches(dataset, preset.model, settings)):
        if number == warmup - 1:
            began = time.perf_counter()
    return batches * settings.batch_size / (time.perf_counter() - began)


def time_training(preset: Preset, data: Path, device: torch.device, iterations: int) -> float:
    """Images per second of ``refinedet train`` after its first third."""
    every = max(1, iterations // 3)
    settings = dataclasses.replace(
        preset.train,
        iterations=3 * every,
        learning_rate=1e-9,  # Random weights must not diverge.
        log_every=every,
        save_every=10**9,
        evaluate_every=0,
        evaluate_split="none",
    )
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(preset, train=settings), data, out=folder, init_weights="random", device=str(device))
        _, rates = read_curves(Path(folder) / METRICS_FILE)["images_per_second"]
    return statistics.mean(rates[1:])


def time_inference(
    model: RefineDet, batch: int, precision: str, mode: str, device: torch.device, seconds: float
) -> float:
    """Images per second of network and post-processing at that batch size."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    network = copy.deepcopy(model.network).eval().to(device, kind).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, *model.config.image_size, device=device, dtype=kind)
    images = images.contiguous(memory_format=torch.channels_last)
    forward: Callable[[Tensor], Predictions] = torch.compile(network) if mode == "compiled" else network

    with torch.inference_mode():
        if mode == "graph":
            replay, outputs = _capture(lambda: forward(images))

            def work() -> None:
                replay()
                postprocess(outputs, model.config).counts.cpu()
        else:

            def work() -> None:
                postprocess(forward(images), model.config).counts.cpu()

        return batch / clock(work, device, seconds=seconds)


def _capture(run: Callable[[], Predictions]) -> tuple[Callable[[], None], Predictions]:
    """The network's work as a CUDA graph; post-processing looks at its results on the way and cannot be part of it."""
    # The anchors are constants that come from the CPU, and a graph holds no copies from there.
    with mock.patch("refinedet.model.network.tile_anchors", return_value=run().anchors):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
    return graph.replay, outputs


def report_training(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure one preset's training and print its table."""
    preset = get_preset(chosen.preset)
    settings = dataclasses.replace(
        preset.train,
        batch_size=chosen.batch_size,
        precision="bf16" if device.type == "cuda" else "fp32",
        compile=chosen.compile,
        workers=chosen.workers,
        train_split="train",
        seed=0,
    )
    preset = dataclasses.replace(preset, train=settings)
    parts = time_step(preset, chosen.data, device, chosen.seconds)
    batch = settings.batch_size
    print(f"\n| training, {chosen.preset}, batch {batch}, {settings.precision} | ms | images/s | share |")
    print("|---|---|---|---|")
    for name, value in parts.items():
        share = 100 * value / sum(parts.values())
        print(f"| {name} | {1e3 * value:.1f} | {batch / value:.0f} | {share:.0f} % |")
    alone = batch / sum(parts.values())
    print(f"| all four | {1e3 * sum(parts.values()):.1f} | {alone:.0f} | 100 % |")
    figures = {"parts": parts, "images_per_second_without_data": alone}
    rate = alone
    if chosen.data is not None:
        delivered = time_data(preset, chosen.data, chosen.iterations)
        rate = time_training(preset, chosen.data, device, chosen.iterations)
        print(f"| data alone, {settings.workers} processes | {1e3 * batch / delivered:.1f} | {delivered:.0f} | |")
        print(f"| `refinedet train` | {1e3 * batch / rate:.1f} | {rate:.0f} | |")
        figures |= {"data_images_per_second": delivered, "train_images_per_second": rate}
    print(f"\n120,000 iterations of 32 would take {PAPER_IMAGES / rate / 3600:.1f} hours at this rate.")
    return figures


def report_inference(chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure inference of each model and print the table."""
    print("\n| model | side | type | mode | FPS at batch 1 | best FPS | at batch | paper, batch 1 |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in chosen.models:
        model = RefineDet(PRESETS[name].model) if name in PRESETS else RefineDet.from_pretrained(name)
        side = model.config.image_size[0]
        for precision in ("fp32", "bf16"):
            for mode in chosen.modes:
                torch.compiler.reset()
                rates: dict[int, float] = {}
                for batch in sorted({1, *chosen.batches}):
                    rates[batch] = time_inference(model, batch, precision, mode, device, chosen.seconds)
                best = max(rates, key=lambda batch: rates[batch])
                paper = PAPER_FPS.get(side, "-")
                fps = f"{rates[1]:.1f} | {rates[best]:.1f} | {best} | {paper}"
                print(f"| {name} | {side} | {precision} | {mode} | {fps} |", flush=True)
                rows.append({"model": name, "side": side, "precision": precision, "mode": mode, "fps": rates})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write speed.json; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="VOCdevkit; without it, training is timed without data")
    parser.add_argument("--out", type=Path, help="folder for speed.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=15, help="loading processes")
    parser.add_argument("--preset", default="voc07-320-vgg16", help="whose training is timed")
    parser.add_argument("--batch-size", type=int, default=32, help="of the training")
    parser.add_argument("--iterations", type=int, default=150, help="of the training, and batches of data")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network of the training")
    parser.add_argument("--models", nargs="*", default=["voc07-320-vgg16", "voc07-512-vgg16"], help="to infer with")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each figure")
    parser.add_argument("--skip", nargs="*", choices=("training", "inference"), default=[])
    chosen = parser.parse_args(arguments)
    device = pick_device(chosen.device)
    if device.type != "cuda":
        chosen.modes = [mode for mode in chosen.modes if mode != "graph"]
    torch.backends.cudnn.benchmark = True
    figures: dict[str, Any] = {"machine": machine()}
    if "training" not in chosen.skip:
        figures["training"] = report_training(chosen, device)
    if "inference" not in chosen.skip:
        figures["inference"] = report_inference(chosen, device)
    if chosen.out is not None:
        write_text(chosen.out / "speed.json", json.dumps(figures, indent=1) + "\n")
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main()))
