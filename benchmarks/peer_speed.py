"""Seconds per image, network and post-processing, beside torchvision's SSD300-VGG16 in the same run.

The two take turns, so that a machine that slows down slows both; the ratio is taken pair by pair. Weights are random: a
convolution costs the same with any, and thresholds are set so that both post-processings are busy.

    python benchmarks/peer_speed.py --runs 20
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torchvision.models.detection import ssd300_vgg16

from refinedet.config import InferenceConfig
from refinedet.detector import RefineDet
from refinedet.model.postprocess import postprocess
from refinedet.presets import PRESETS


def refinedet(preset: str, device: str) -> Callable[[], object]:
    """One image through a RefineDet with random weights."""
    config = dataclasses.replace(PRESETS[preset].model, inference=InferenceConfig(score_threshold=0.01))
    model = RefineDet(config).to(device)
    image = torch.randn(1, 3, *config.image_size, device=device).contiguous(memory_format=torch.channels_last)
    model.network.to(memory_format=torch.channels_last)
    return lambda: postprocess(model.network(image), config)


def peer(device: str) -> Callable[[], object]:
    """One image through torchvision's SSD300, its own resizing included (the image has the right size)."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, score_thresh=0.01).eval().to(device)
    model.to(memory_format=torch.channels_last)
    image = torch.rand(3, 300, 300, device=device)
    return lambda: model([image])


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--presets", nargs="+", default=["voc07-320-vgg16", "voc07-320-resnet18"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, batch 1, float32")
    other = peer(arguments.device)
    with torch.inference_mode():
        for preset in arguments.presets:
            own = refinedet(preset, arguments.device)
            pairs = [
                (seconds(own, arguments.device), seconds(other, arguments.device)) for _ in range(arguments.runs + 3)
            ]
            pairs = pairs[3:]  # the first calls choose algorithms and fill caches
            ratios = sorted(a / b for a, b in pairs)
            print(
                f"{preset}: median {1e3 * statistics.median(a for a, _ in pairs):.0f} ms; ssd300_vgg16: median "
                f"{1e3 * statistics.median(b for _, b in pairs):.0f} ms; ratio min {ratios[0]:.2f} median "
                f"{statistics.median(ratios):.2f} max {ratios[-1]:.2f}"
            )


if __name__ == "__main__":
    main()
