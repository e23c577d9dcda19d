"""Milliseconds of matching the anchors of one image on a CPU, for few and for many objects.

    python benchmarks/matching.py --objects 3 30 300 1000 --image-size 512

``slow`` is the form that accelerators use, in which every object looks at all anchors in every round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from refinedet.config import ModelConfig
from refinedet.model.anchors import level_sizes, tile_anchors
from refinedet.training.matching import Match, Targets, match, match_together


def milliseconds(work: Callable[[], Match], runs: int) -> tuple[float, Match]:
    """Shortest time of several calls, and what they return."""
    shortest = float("inf")
    for _ in range(runs):
        began = time.perf_counter()
        outcome = work()
        shortest = min(shortest, 1000 * (time.perf_counter() - began))
    return shortest, outcome


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", default=[3, 30, 300, 1000])
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow", action="store_true", help="also time the slow form, and compare the outcome")
    chosen = parser.parse_args()
    side = chosen.image_size
    config = ModelConfig(image_size=(side, side))
    anchors = tile_anchors(level_sizes(side, side), (side, side), config.anchor_sizes, config.aspect_ratios)
    for count in chosen.objects:
        torch.manual_seed(0)
        corner = torch.rand(count, 2) * (side - 40)
        boxes = torch.cat([corner, corner + 4 + torch.rand(count, 2) * 36], dim=1)
        targets = Targets(boxes[None], torch.zeros(1, count, dtype=torch.int64))
        fast, outcome = milliseconds(lambda t=targets: match(anchors, t, 0.5), chosen.runs)  # type: ignore[misc]
        line = f"{count:5d} objects, {len(anchors)} anchors: {fast:8.2f} ms"
        if chosen.slow:
            began = time.perf_counter()
            expected = match_together(anchors[None], targets, 0.5)
            line += f", slow form {1000 * (time.perf_counter() - began):9.1f} ms"
            same = all(torch.equal(one, other) for one, other in zip(outcome, expected, strict=True))
            line += ", same outcome" if same else ", ANOTHER OUTCOME"
        print(line)


if __name__ == "__main__":
    main()
