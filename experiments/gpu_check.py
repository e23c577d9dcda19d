"""Does everything work on this GPU? A first look at a machine, a few minutes long.

    python -m experiments.gpu_check                      (outputs, loss, gradients, bf16, torch.compile, quick tests)
    python -m experiments.gpu_check --device cpu --presets smoke --skip tests

* outputs, loss and gradients on the device against the CPU, float32 without TF32, relative error below 1e-3;
* one training step in bf16 with channels_last;
* torch.compile of network and loss against eager;
* a part of the test suite, where pytest is there.

The loss and the backward pass are compared on equal inputs each: which anchors are matched and mined is a matter of
the last digit now and then, and one anchor more or less would say nothing about the arithmetic.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.steps import machine, run_main
from refinedet.device import pick_device
from refinedet.model.network import Predictions, RefineDetNetwork
from refinedet.presets import get_preset
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets
from refinedet.training.optim import build_optimizer

TOLERANCE = 1e-3
STEP_TOLERANCE = 0.05
"""How far the loss of bf16 outputs may be from that of float32 ones: other negatives are mined."""
TESTS = ("tests/model", "tests/training", "tests/evaluation", "tests/data")
NEEDED = (
    "torchvision", "PIL", "safetensors", "defusedxml", "yaml", "rich", "huggingface_hub", "tyro", "faster_coco_eval",
    "google.protobuf", "pytest", "pytest_timeout", "hypothesis",
)  # fmt: skip
"""Modules that the package or its tests import."""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Length of the difference over that of ``wanted``; nan if ``found`` has any."""
    difference = (found.detach().cpu().double() - wanted.detach().cpu().double()).norm()
    return float(difference / wanted.detach().cpu().double().norm().clamp(min=1e-12))


def random_targets(batch: int, side: int, num_classes: int, seed: int = 0) -> Targets:
    """One to six boxes of 16 pixels to the whole picture for each of ``batch`` pictures."""
    rng = np.random.default_rng(seed)
    boxes, labels = [], []
    for _ in range(batch):
        count = int(rng.integers(1, 7))
        size = rng.uniform(16, side, (count, 2))
        corner = rng.uniform(0, side - size)
        boxes.append(torch.tensor(np.concatenate([corner, corner + size], axis=1), dtype=torch.float32))
        labels.append(torch.tensor(rng.integers(0, num_classes, count)))
    return Targets.collate(boxes, labels)


class Case:
    """A network with random weights, a batch, and its loss, on the CPU and on the device."""

    def __init__(self, preset: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config = get_preset(preset).model
        self.train = get_preset(preset).train
        self.device = device
        self.network = RefineDetNetwork(self.config).train()
        self.images = torch.randn(batch, 3, *self.config.image_size)
        self.targets = random_targets(batch, self.config.image_size[0], self.config.num_classes)
        self.criterion = RefineDetLoss(self.config)

    def on_device(self) -> tuple[RefineDetNetwork, Tensor, Targets, RefineDetLoss]:
        """Copies there."""
        network = copy.deepcopy(self.network).to(self.device)
        criterion = copy.deepcopy(self.criterion).to(self.device)
        return network, self.images.to(self.device), self.targets.to(self.device), criterion


def check_arithmetic(case: Case) -> dict[str, float]:
    """Largest relative errors of outputs, losses, and gradients of outputs and parameters, device against CPU."""
    network, images, targets, criterion = case.on_device()
    wanted = case.network(case.images)
    found = network(images)
    errors = {"outputs": max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))}
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
    learned = [(one, a) for one, a in zip(found, here, strict=True) if a.grad is not None]
    torch.autograd.backward([one for one, _ in learned], [_grad(a).to(case.device) for _, a in learned])
    pairs = [(a, b) for a, b in zip(case.network.parameters(), network.parameters(), strict=True) if a.grad is not None]
    errors["gradient of the weights"] = max(relative_error(_grad(b), _grad(a)) for a, b in pairs)
    return errors


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def check_step(case: Case) -> tuple[float, float, bool]:
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


def check_compile(case: Case, backend: str) -> tuple[float, float]:
    """Relative error of the compiled network's and loss's total against eager, and the seconds that it took."""
    network, images, targets, criterion = case.on_device()
    eager = criterion(network(images), targets)["total"]
    began = time.perf_counter()
    compiled_network, compiled_loss = (torch.compile(module, backend=backend) for module in (network, criterion))
    total = compiled_loss(compiled_network(images), targets)["total"]
    torch.autograd.backward(total)
    return relative_error(total, eager), time.perf_counter() - began


def run_tests(timeout: float) -> str:
    """The summary line of the quick tests."""
    if importlib.util.find_spec("pytest") is None:
        return "skipped: no pytest"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *TESTS]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"FAILED: not done after {timeout:.0f} s"
    lines = done.stdout.strip().splitlines() or ["no output"]
    if done.returncode:
        print("\n".join(lines[-40:]) + done.stderr[-2000:])
    return ("" if done.returncode == 0 else "FAILED: ") + lines[-1].strip("= ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything, print a table, return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--presets", nargs="+", default=["voc07-320-vgg16", "voc07-320-resnet18"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager compiles nothing")
    parser.add_argument("--skip", nargs="*", choices=("compile", "tests"), default=[])
    parser.add_argument("--test-seconds", type=float, default=180, help="give the test suite so long")
    chosen = parser.parse_args(arguments)
    device = pick_device(chosen.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    shared = Path("/dev/shm")
    print(f"{machine()}; device {device}; missing modules: {', '.join(missing) or 'none'}")
    if shared.is_dir():
        # Loading processes hand batches over through it: about 40 MB for each batch of 32 at 320x320.
        print(
            f"{shutil.disk_usage(shared).free / 2**30:.1f} GiB free in {shared}, which the data loader's processes use"
        )
    rows: list[tuple[str, str, bool]] = []

    def check(what: str, work: Callable[[], tuple[str, bool]]) -> None:
        try:
            rows.append((what, *work()))
        except Exception as error:  # The other checks still tell something.
            reason = (str(error).strip() or "no message").splitlines()[0]
            rows.append((what, f"{type(error).__name__}: {reason}", False))
        print(*rows[-1], flush=True)

    def arithmetic(case: Case) -> tuple[str, bool]:
        errors = check_arithmetic(case)
        text = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        return text, all(value < TOLERANCE for value in errors.values())

    def step(case: Case) -> tuple[str, bool]:
        found, wanted, sound = check_step(case)
        good = sound and abs(found - wanted) < STEP_TOLERANCE * wanted
        return f"loss {found:.4f}, CPU in float32 {wanted:.4f}, weights {'sound' if sound else 'NOT sound'}", good

    def compiled(case: Case) -> tuple[str, bool]:
        error, seconds = check_compile(case, chosen.backend)
        return f"relative error of the loss {error:.1e}, {seconds:.0f} s", error < TOLERANCE

    for preset in chosen.presets:
        case = Case(preset, chosen.batch_size, device)
        check(f"{preset}: {device} against CPU", lambda case=case: arithmetic(case))  # type: ignore[misc]
        check(f"{preset}: bf16 channels_last step", lambda case=case: step(case))  # type: ignore[misc]
        if "compile" not in chosen.skip:
            check(f"{preset}: torch.compile", lambda case=case: compiled(case))  # type: ignore[misc]
    if "tests" not in chosen.skip:
        summary = run_tests(chosen.test_seconds)
        rows.append(("tests", summary, not summary.startswith("FAILED")))
    print("\n| check | found | good |\n|---|---|---|")
    for what, found, good in rows:
        print(f"| {what} | {found} | {'yes' if good else 'NO'} |")
    return int(not all(good for _, _, good in rows))


if __name__ == "__main__":
    run_main(main)
