"""Milliseconds of suppression beside torchvision's, on crowded candidates of one image.

The two take turns, and the ratio of times is taken pair by pair; both must keep the same boxes.

    python benchmarks/suppression.py --candidates 1000 --runs 40
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from refinedet.model.nms import non_maximum_suppression


def crowd(count: int, objects: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (count, 4) around so many objects, labels, half of them of one class, and descending scores."""
    centre = torch.rand(objects, 2)[torch.randint(objects, (count,))] * 300 + torch.randn(count, 2) * 12
    half = 30 * torch.exp(torch.randn(count, 2) * 0.2)
    labels = torch.where(torch.rand(count) < 0.5, 3, torch.randint(classes, (count,)))
    return torch.cat([centre - half, centre + half], dim=1), labels, torch.rand(count).sort(descending=True).values


def milliseconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--objects", type=int, default=12)
    parser.add_argument("--runs", type=int, default=40)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    boxes, labels, scores = crowd(chosen.candidates, chosen.objects, 20)
    valid = torch.ones(1, chosen.candidates, dtype=torch.bool)

    def ours() -> Tensor:
        return non_maximum_suppression(boxes[None], labels[None], valid, 0.45)

    def theirs() -> Tensor:
        return batched_nms(boxes, scores, labels, 0.45)

    kept = ours()[0].nonzero()[:, 0]
    if not torch.equal(kept, theirs().sort().values):
        raise SystemExit("the two do not keep the same boxes")
    pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(chosen.runs)]
    ratios = sorted(own / other for own, other in pairs)
    own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{chosen.candidates} candidates around {chosen.objects} objects, {len(kept)} kept by both")
    print(f"ours {own:.2f} ms, torchvision {other:.2f} ms, ratio {statistics.median(ratios):.2f}", end="")
    print(f" ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
