"""Speed at batch 1, as the paper's Table 1 gives it, split into preprocess, network and post-process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from refinedet.detector import RefineDet
from refinedet.model.postprocess import postprocess
from refinedet.preprocess import preprocess

STEPS = ("preprocess", "network", "post-process", "total")


@dataclass(frozen=True)
class Speed:
    """What ``measure_speed`` found."""

    milliseconds: dict[str, list[float]]
    """Of each step and the total, one number for each run."""
    boxes: int
    """Anchors, the paper's "#Boxes"."""
    detections: int
    """What post-processing kept of the image; it takes longer where there is more to suppress."""
    input_size: tuple[int, int]
    """Height and width of the network input."""
    image_size: tuple[int, int]
    """Width and height of the image."""
    device: str
    """Name of the processor or GPU and, for a CPU, its threads."""

    @property
    def fps(self) -> float:
        """Images per second, from the median of the totals."""
        return 1000 / statistics.median(self.milliseconds["total"])

    @property
    def network_fps(self) -> float:
        """Images per second of network and post-processing, which is what the paper timed."""
        network, after = self.milliseconds["network"], self.milliseconds["post-process"]
        return 1000 / statistics.median(a + b for a, b in zip(network, after, strict=True))

    def table(self) -> str:
        """Aligned text: each step's median, least and largest milliseconds, then frames per second and boxes."""
        lines = [f"{'step':<14}{'median ms':>10}{'min':>9}{'max':>9}"]
        for step in STEPS:
            values = self.milliseconds[step]
            lines.append(f"{step:<14}{statistics.median(values):>10.2f}{min(values):>9.2f}{max(values):>9.2f}")
        height, width = self.input_size
        lines += [
            f"FPS {self.fps:.1f} at batch 1 ({self.network_fps:.1f} without preprocessing), {self.boxes} boxes, "
            f"input {width}x{height}",
            f"{len(self.milliseconds['total'])} runs on a {self.image_size[0]}x{self.image_size[1]} image with "
            f"{self.detections} detections; {self.device}",
        ]
        return "\n".join(lines)


def measure_speed(
    model: RefineDet,
    image: npt.NDArray[np.uint8] | None = None,
    *,
    runs: int = 50,
    warmup: int = 10,
) -> Speed:
    """Time a detector on one image, again and again.

    Args:
        model: on the device to be measured.
        image: (H, W, 3) uint8 RGB; by default noise of 500x375, VOC's usual size, decoded already.
        runs: how many are timed.
        warmup: how many come before them.

    Returns:
        Every time. Preprocessing includes the copy to the device, post-processing the copy back.
    """
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    device = model.device
    wait: Callable[[], Any] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    model.network.eval()
    times: dict[str, list[float]] = {step: [] for step in STEPS}
    count = 0
    with torch.inference_mode():
        for number in range(warmup + runs):
            marks = [time.perf_counter()]
            inputs = torch.from_numpy(preprocess(image, model.config))[None].to(device)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            wait()
            marks.append(time.perf_counter())
            predictions = model.network(inputs)
            wait()
            marks.append(time.perf_counter())
            found = postprocess(predictions, model.config)
            count = int(found.counts.cpu()[0])
            marks.append(time.perf_counter())
            if number < warmup:
                continue
            for step, before, after in zip(STEPS, marks, marks[1:], strict=False):
                times[step].append(1000 * (after - before))
            times["total"].append(1000 * (marks[-1] - marks[0]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Speed(
        milliseconds=times,
        boxes=model.num_anchors,
        detections=count,
        input_size=model.config.image_size,
        image_size=(image.shape[1], image.shape[0]),
        device=name,
    )
