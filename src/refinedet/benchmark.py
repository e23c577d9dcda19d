"""Speed at batch 1: of one detector step by step, or of several that take turns on the same image.

PyTorch is needed only for detectors that run in it; exported files are timed without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from refinedet.preprocess import preprocess
from refinedet.runtime import Runtime

if TYPE_CHECKING:
    from refinedet.detector import RefineDet
    from refinedet.pixels import Pixels

TOTAL = "total"
TURN = 5
"""Runs of a detector before it is the turn of the next: threads of an engine that wait for work busily for a moment
after a run would slow the next engine down, so an untimed run comes before each turn."""


@dataclass(frozen=True)
class Speed:
    """Times of a detector on one image."""

    milliseconds: dict[str, list[float]]
    """Of each step and the total, one number for each run."""
    boxes: int | None
    """Anchors, the paper's "#Boxes"; None for an exported file."""
    detections: int
    """What post-processing kept of the image; it takes longer where there is more to suppress."""
    input_size: tuple[int, int]
    """Height and width of the network input."""
    image_size: tuple[int, int]
    """Width and height of the image."""
    device: str
    """What computed: the name of a GPU, or the engine of an exported file, and the threads of a CPU."""
    name: str = ""
    """What the detector is called in a comparison."""

    @property
    def fps(self) -> float:
        """Images per second, from the median of the totals."""
        return 1000 / statistics.median(self.milliseconds[TOTAL])

    @property
    def network_fps(self) -> float:
        """Images per second of network and post-processing, which is what the paper timed."""
        before, all_steps = self.milliseconds["preprocess"], self.milliseconds[TOTAL]
        return 1000 / statistics.median(whole - part for whole, part in zip(all_steps, before, strict=True))

    def table(self) -> str:
        """Aligned text: each step's median, least and largest milliseconds, then frames per second and boxes."""
        lines = [f"{'step':<14}{'median ms':>10}{'min':>9}{'max':>9}"]
        for step, values in self.milliseconds.items():
            lines.append(f"{step:<14}{statistics.median(values):>10.2f}{min(values):>9.2f}{max(values):>9.2f}")
        height, width = self.input_size
        boxes = "" if self.boxes is None else f"{self.boxes} boxes, "
        lines += [
            f"FPS {self.fps:.1f} at batch 1 ({self.network_fps:.1f} without preprocessing), {boxes}input "
            f"{width}x{height}",
            f"{len(self.milliseconds[TOTAL])} runs on a {self.image_size[0]}x{self.image_size[1]} image with "
            f"{self.detections} detections; {self.device}",
        ]
        return "\n".join(lines)

    def times_faster_than(self, other: Speed) -> tuple[float, float, float]:
        """How many times the speed of another detector that took turns with this one: median, least and largest.

        Each is a ratio of two neighbouring turns, so what slows the machine for a while concerns both alike.
        """
        own, others = (
            [statistics.median(values[first : first + TURN]) for first in range(0, len(values), TURN)]
            for values in (self.milliseconds[TOTAL], other.milliseconds[TOTAL])
        )
        ratios = [theirs / ours for ours, theirs in zip(own, others, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def comparison_table(speeds: Sequence[Speed]) -> str:
    """Aligned text: total milliseconds of detectors that took turns, and their speed relative to the first."""
    width = max(len("model"), *(len(speed.name) for speed in speeds)) + 2
    lines = [f"{'model':<{width}}{'median ms':>10}{'min':>9}{'max':>9}{'FPS':>8}{'speed':>8}  (range)         engine"]
    for speed in speeds:
        values = speed.milliseconds[TOTAL]
        ratio, low, high = speed.times_faster_than(speeds[0])
        spread = f"({low:.2f} to {high:.2f})"
        lines.append(
            f"{speed.name:<{width}}{statistics.median(values):>10.2f}{min(values):>9.2f}{max(values):>9.2f}"
            f"{speed.fps:>8.1f}{ratio:>7.2f}x  {spread:<16}{speed.device}"
        )
    first = speeds[0]
    runs, (columns, rows) = len(first.milliseconds[TOTAL]), first.image_size
    lines.append(
        f"{runs} runs each on a {columns}x{rows} image at batch 1, preprocessing included, in turns of {TURN}; speed "
        "is relative to the first model"
    )
    return "\n".join(lines)


def measure_speeds(
    models: Sequence[tuple[str, RefineDet | Runtime]],
    image: Pixels | None = None,
    *,
    runs: int = 50,
    warmup: int = 10,
) -> list[Speed]:
    """Time detectors that take turns on one image.

    Preprocessing includes the copy to the device, post-processing the copy back. Of an exported file, network and
    post-processing are one step, the graph.

    Args:
        models: names, and detectors on the devices to be measured.
        image: (H, W, 3) uint8 RGB; by default noise of 500x375, VOC's usual size, decoded already.
        runs: how many of each are timed.
        warmup: how many of each come before them.
    """
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    timers = [_exported_timer(model) if isinstance(model, Runtime) else _torch_timer(model) for _, model in models]
    times: list[list[dict[str, float]]] = [[] for _ in timers]
    counts = [0] * len(timers)
    for timer in timers:
        for _ in range(warmup):
            timer.run(image)
    for first in range(0, runs, TURN):
        for number, timer in enumerate(timers):
            if len(timers) > 1:
                timer.run(image)
            for _ in range(min(TURN, runs - first)):
                steps, counts[number] = timer.run(image)
                times[number].append(steps | {TOTAL: sum(steps.values())})
    return [
        Speed(
            milliseconds={step: [run[step] for run in times[number]] for step in times[number][0]},
            boxes=timer.boxes,
            detections=counts[number],
            input_size=model.config.image_size,
            image_size=(image.shape[1], image.shape[0]),
            device=timer.device,
            name=name,
        )
        for number, (timer, (name, model)) in enumerate(zip(timers, models, strict=True))
    ]


@dataclass(frozen=True)
class _Timer:
    """A detector whose steps can be timed."""

    run: Callable[[npt.NDArray[np.uint8]], tuple[dict[str, float], int]]
    """Milliseconds of each step on an image, and the number of detections."""
    device: str
    boxes: int | None


def _exported_timer(model: Runtime) -> _Timer:
    def run(image: npt.NDArray[np.uint8]) -> tuple[dict[str, float], int]:
        marks = [time.perf_counter()]
        inputs = model.inputs([image])
        marks.append(time.perf_counter())
        count = int(model.run(inputs).num_detections[0])
        marks.append(time.perf_counter())
        return _between(("preprocess", "graph"), marks), count

    return _Timer(run, f"{model.engine}, CPU, {model.threads or 'all'} threads", None)


def _torch_timer(model: RefineDet) -> _Timer:
    import torch

    from refinedet.model.postprocess import postprocess

    device = model.device
    wait: Callable[[], Any] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    model.network.eval()

    def run(image: npt.NDArray[np.uint8]) -> tuple[dict[str, float], int]:
        with torch.inference_mode():
            marks = [time.perf_counter()]
            inputs = torch.from_numpy(preprocess(image, model.config))[None].to(device)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            wait()
            marks.append(time.perf_counter())
            predictions = model.network(inputs)
            wait()
            marks.append(time.perf_counter())
            count = int(postprocess(predictions, model.config).counts.cpu()[0])
            marks.append(time.perf_counter())
        return _between(("preprocess", "network", "post-process"), marks), count

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return _Timer(run, f"PyTorch, {where}", model.num_anchors)


def _between(steps: Sequence[str], marks: Sequence[float]) -> dict[str, float]:
    """Milliseconds from each mark to the next."""
    return {step: 1000 * (after - before) for step, before, after in zip(steps, marks, marks[1:], strict=False)}
