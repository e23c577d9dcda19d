from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from refinedet.config import TrainConfig
from refinedet.training import pace
from refinedet.training.distributed import World

CPU = torch.device("cpu")


class Items:
    """A batch of the loop's kind."""

    def __init__(self) -> None:
        self.images = torch.ones(2, 3, 8, 8)
        self.targets = torch.zeros(())
        self.names = ["a", "b"]


def test_a_measurement_changes_neither_weights_nor_random_numbers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    asked: list[TrainConfig] = []

    def batches(settings: TrainConfig) -> list[Items]:
        asked.append(settings)
        return [Items() for _ in range(settings.iterations)]

    def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        return {"total": outputs.square().mean()}

    settings = TrainConfig(
        iterations=1000, batch_size=2, warmup_iterations=10, milestones=(), evaluate_every=100, patience=3
    )
    state = torch.get_rng_state()
    seconds = pace.seconds_per_iteration(network, criterion, settings, batches, World(0, 1, CPU))
    assert seconds > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert asked[0].iterations == 4


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ((), 1.0),
        (((0, 320),), 1.0),
        (((0, 128), (50, 256)), 0.5 * 0.25 + 0.5),
        (((0, 128), (200, 256)), 0.25),
    ],
)
def test_smaller_sizes_count_by_their_pixels(schedule: tuple[tuple[int, int], ...], share: float) -> None:
    settings = TrainConfig(iterations=100, size_schedule=schedule, milestones=())
    assert pace._mean_area(settings) == pytest.approx(share)


def test_auto_precision_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pace.choose_precision("fp32", CPU) == "fp32"
    assert pace.choose_precision("fp16", CPU) == "fp16"
    for capabilities, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx2": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert pace.choose_precision("auto", CPU) == expected
    assert pace.choose_precision("auto", torch.device("mps")) == "fp32"
