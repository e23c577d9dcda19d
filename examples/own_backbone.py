"""Train a RefineDet on a backbone of your own, with a loss of your own.

A backbone is a module that says the channels of its four feature maps, at strides 8, 16, 32 and 64, in
``out_channels``, and which of its children are not pretrained in ``new_modules``.

    python examples/own_backbone.py DATA runs/own
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from torch import Tensor, nn

from refinedet import train
from refinedet.config import ModelConfig
from refinedet.model.network import Predictions, RefineDetNetwork
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets


class PlainBackbone(nn.Module):
    """Six convolutions that halve the size, the last four of which give the feature maps."""

    out_channels = (32, 64, 64, 64)
    new_modules = ("stages",)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 16, *self.out_channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four maps of ``out_channels`` channels, at strides 8, 16, 32 and 64."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps[2:]


class HeavyBoxes(nn.Module):
    """RefineDet's loss with twice the weight on the boxes of the second stage."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.loss = RefineDetLoss(config)

    def forward(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Named losses; the network learns from "total"."""
        losses = self.loss(predictions, targets)
        return {**losses, "total": losses["total"] + losses["odm_localization"]}


def make_network(config: ModelConfig) -> RefineDetNetwork:
    """A RefineDet on this backbone; the configuration brings the number of classes and all else."""
    return RefineDetNetwork(config, backbone=PlainBackbone())


def main(data: str, out: str, **settings: object) -> Path:
    """Train, and give the run folder."""
    run = train("finetune", data, out=out, network=make_network, criterion=HeavyBoxes, **settings)
    return run.folder


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
