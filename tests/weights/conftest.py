"""The package's networks as narrow as the files that ``formats.py`` writes."""

from __future__ import annotations

from typing import Any

import pytest
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from refinedet.model import backbones
from weights import formats


class NarrowResNet(torchvision.models.ResNet):
    """A torchvision ResNet with an eighth of the channels behind its stem."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Bottleneck, [3, 4, 23, 3], **options)
        self.fc = nn.Linear(2048 // formats.NARROW, 1000)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // formats.NARROW, *arguments, **options)


def narrow_resnet101(*, weights: None = None, **options: Any) -> NarrowResNet:
    return NarrowResNet(**options)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG-16 and ResNet-101 with an eighth of their channels."""
    vgg = backbones.VGG16
    monkeypatch.setattr(vgg, "widths", tuple(width // formats.NARROW for width in vgg.widths))
    monkeypatch.setattr(vgg, "fc_width", formats.FC)
    monkeypatch.setattr(vgg, "conv6_widths", (formats.CONV6_1, formats.CONV6_2))
    resnet = backbones.RESNETS["resnet101"]
    monkeypatch.setitem(backbones.RESNETS, "resnet101", resnet._replace(build=narrow_resnet101))
