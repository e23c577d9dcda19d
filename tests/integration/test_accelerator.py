"""Another device than the CPU: outputs, loss and gradients are those of the CPU, in float64, float32 and bf16.

The loss and the backward pass are compared on equal inputs each: which anchors are matched and mined is a matter of
the last digit now and then, and one anchor more or less would say nothing about the arithmetic. In the same way a
value near 0 may pass a ReLU on one device only; in float32 that moves the gradients of some weights by thousandths (on
the CPU they are that far from those in float64), so they are held tightly in float64 alone. Without a GPU the CPU
stands in for the device, so that the comparison itself is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from benchmarks.speed import random_targets
from torch import Tensor

from refinedet.model.network import Predictions, RefineDetNetwork
from refinedet.presets import get_preset
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets
from refinedet.training.optim import build_optimizer

TOLERANCE = 1e-3
GRADIENT_TOLERANCE = {torch.float32: 0.02, torch.float64: 1e-7}
"""Of the gradients of the weights."""
STEP_TOLERANCE = 0.05
"""How far the loss of bf16 outputs may be from that of float32 ones: other negatives are mined."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESETS = ["smoke"] if DEVICE.type == "cpu" else ["smoke", "voc07-320-resnet18", "voc07-320-vgg16"]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    if DEVICE.type == "cpu":  # which has no such switches
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Length of the difference over that of ``wanted``; nan if ``value`` has any."""
    difference = (value.detach().cpu().double() - wanted.detach().cpu().double()).norm()
    return float(difference / wanted.detach().cpu().double().norm().clamp(min=1e-12))


class Case:
    """A network with random weights, a batch, and its loss, on the CPU and on the device."""

    def __init__(self, preset: str, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.config = get_preset(preset).model
        self.train = get_preset(preset).train
        self.device = device
        self.network = RefineDetNetwork(self.config).train().to(dtype)
        self.images = torch.randn(batch, 3, *self.config.image_size).to(dtype)
        self.targets = random_targets(batch, self.config.image_size[0], self.config.num_classes)
        self.criterion = RefineDetLoss(self.config)

    def on_device(self) -> tuple[RefineDetNetwork, Tensor, Targets, RefineDetLoss]:
        """Copies there."""
        network = copy.deepcopy(self.network).to(self.device)
        criterion = copy.deepcopy(self.criterion).to(self.device)
        return network, self.images.to(self.device), self.targets.to(self.device), criterion


def measure_errors(case: Case) -> dict[str, float]:
    """Largest relative errors of outputs, losses, and gradients of outputs and parameters, device against CPU."""
    network, images, targets, criterion = case.on_device()
    wanted = case.network(case.images)
    outputs = network(images)
    errors = {"outputs": max(relative_error(a, b) for a, b in zip(outputs, wanted, strict=True))}
    # The same outputs for both losses, as leaves of their own.
    here = Predictions(*(one.detach().clone().requires_grad_(one.requires_grad) for one in wanted))
    there = Predictions(*(one.detach().to(case.device).requires_grad_(one.requires_grad) for one in here))
    losses, losses_there = case.criterion(here, case.targets), criterion(there, targets)
    errors["loss"] = max(relative_error(losses_there[name], losses[name]) for name in losses)
    torch.autograd.backward(losses["total"])
    torch.autograd.backward(losses_there["total"])
    slopes = [(one, other) for one, other in zip(here, there, strict=True) if one.grad is not None]
    errors["gradient of the loss"] = max(relative_error(_grad(b), _grad(a)) for a, b in slopes)
    # The same slopes into both networks.
    learned = [(one, a) for one, a in zip(wanted, here, strict=True) if a.grad is not None]
    torch.autograd.backward([one for one, _ in learned], [_grad(a) for _, a in learned])
    learned = [(one, a) for one, a in zip(outputs, here, strict=True) if a.grad is not None]
    torch.autograd.backward([one for one, _ in learned], [_grad(a).to(case.device) for _, a in learned])
    pairs = [(a, b) for a, b in zip(case.network.parameters(), network.parameters(), strict=True) if a.grad is not None]
    errors["gradient of the weights"] = max(relative_error(_grad(b), _grad(a)) for a, b in pairs)
    return errors


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def train_one_step(case: Case) -> tuple[float, float, bool]:
    """One bf16 channels_last training step: the loss, that of the CPU in float32, whether all weights are sound."""
    network, images, targets, criterion = case.on_device()
    network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(network, case.train)
    with torch.autocast(case.device.type, torch.bfloat16):
        predictions = network(images.contiguous(memory_format=torch.channels_last))
    total = criterion(predictions, targets)["total"]
    torch.autograd.backward(total)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True)]
    # Not every one must: a level without a positive anchor gives its offsets no slope.
    finite = all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    with torch.no_grad():
        wanted = case.criterion(case.network(case.images), case.targets)["total"]
    return total.item(), wanted.item(), finite and sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_device_computes_as_the_cpu_does(preset: str, dtype: torch.dtype) -> None:
    errors = measure_errors(Case(preset, 2, DEVICE, dtype))
    assert errors.pop("gradient of the weights") < GRADIENT_TOLERANCE[dtype]
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_in_bf16_and_channels_last(preset: str) -> None:
    loss, loss_in_float32, sound = train_one_step(Case(preset, 2, DEVICE))
    assert sound
    assert loss == pytest.approx(loss_in_float32, rel=STEP_TOLERANCE)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compiles for minutes on a CPU, and tests/training compiles there")
def test_compiled_as_eager() -> None:
    network, images, targets, criterion = Case("smoke", 2, DEVICE).on_device()
    eager = criterion(network(images), targets)["total"]
    compiled = torch.compile(criterion)(torch.compile(network)(images), targets)["total"]
    assert relative_error(compiled, eager) < TOLERANCE


def test_a_device_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Case.on_device

    def broken(self: Case) -> object:
        network, *rest = original(self)
        with torch.no_grad():
            network.odm[0].offsets.bias += 0.1
        return (network, *rest)

    monkeypatch.setattr(Case, "on_device", broken)
    assert measure_errors(Case("smoke", 2, DEVICE))["outputs"] > TOLERANCE


def test_nan_never_passes() -> None:
    assert not relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) < 1
    assert relative_error(torch.tensor([1.1]), torch.ones(1)) == pytest.approx(0.1, rel=1e-5)
