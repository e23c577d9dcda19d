"""Parameter groups, learning-rate law and the moving average of weights (reference: official solver settings)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from refinedet.config import TrainConfig


def parameter_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Biases of convolutions (double rate, no decay) and everything else that learns.

    Source: official code, lr_mult 2 and decay_mult 0 for biases; scales of L2Norm and batch norm are decayed.
    Each group carries ``factor``, its multiple of the learning rate. Where the backbone has a rate of its own, what it
    has from ImageNet makes two groups more.
    """
    own = config.backbone_learning_rate_factor
    pretrained = _pretrained(network) if own != 1 else set()
    # Weights and biases of a rate, in the order of their first appearance here.
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {1.0: ([], [])}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            weights, biases = groups.setdefault(own if id(parameter) in pretrained else 1.0, ([], []))
            convolution = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
            (biases if convolution and name == "bias" else weights).append(parameter)
    decay, bias = config.weight_decay, config.bias_learning_rate_factor
    return [
        group
        for factor, (weights, biases) in groups.items()
        for group in (
            {"params": weights, "weight_decay": decay, "factor": factor},
            {"params": biases, "weight_decay": 0.0, "factor": factor * bias},
        )
    ]


def _pretrained(network: nn.Module) -> set[int]:
    """Identities of the parameters that ImageNet weights come with."""
    backbone = getattr(network, "backbone", None)
    if backbone is None:
        return set()
    return {
        id(parameter)
        for name, parameter in backbone.named_parameters()
        if name.partition(".")[0] not in backbone.new_modules
    }


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over ``parameter_groups``."""
    groups = parameter_groups(network, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def learning_rate_at(config: TrainConfig, iteration: int) -> float:
    """Learning rate of the update number ``iteration`` (from 0)."""
    rate = config.learning_rate
    if config.schedule == "milestones":
        rate *= config.gamma ** sum(iteration >= milestone for milestone in config.milestones)
    else:
        span = max(1, config.iterations - config.warmup_iterations)
        progress = min(1.0, max(0.0, (iteration - config.warmup_iterations) / span))
        low = config.final_learning_rate_factor
        rate *= low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if iteration < config.warmup_iterations:
        rate *= (iteration + 1) / config.warmup_iterations
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


class MovingAverage:
    """Exponential moving average of a network's parameters and floating-point buffers.

    The decay starts small, (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move a step towards ``network``."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        own, new = _tensors(self.network), _tensors(network)
        floating = [(a, b) for a, b in zip(own, new, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], weight)
        for a, b in zip(own, new, strict=True):
            if not a.is_floating_point():
                a.copy_(b)


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    both: Iterable[torch.Tensor] = [*network.parameters(), *network.buffers()]
    return [tensor.detach() for tensor in both]
