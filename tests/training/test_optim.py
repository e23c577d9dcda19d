"""Learning-rate law, parameter groups and moving average against their formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from refinedet.config import ModelConfig, TrainConfig
from refinedet.model.network import RefineDetNetwork
from refinedet.presets import get_preset
from refinedet.training.optim import (
    MovingAverage,
    build_optimizer,
    learning_rate_at,
    parameter_groups,
    set_learning_rate,
)

RESNET = ModelConfig(backbone="resnet18", tcb_channels=8, tcb_batch_norm=True, num_classes=2)


def network_of(config: ModelConfig = RESNET) -> RefineDetNetwork:
    torch.manual_seed(0)
    return RefineDetNetwork(config)


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        (
            "voc07-320-vgg16",  # paper: 1e-3 for 80k, 1e-4 for 20k, 1e-5 for 20k
            {0: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 99_999: 1e-4, 100_000: 1e-5, 119_999: 1e-5},
        ),
        (
            "voc12-320-vgg16",  # paper: 160k, 40k, 40k
            {0: 1e-3, 159_999: 1e-3, 160_000: 1e-4, 199_999: 1e-4, 200_000: 1e-5, 239_999: 1e-5},
        ),
    ],
)
def test_paper_schedules(preset: str, rates: dict[int, float]) -> None:
    config = get_preset(preset).train
    assert {iteration: pytest.approx(rate) for iteration, rate in rates.items()} == {
        iteration: learning_rate_at(config, iteration) for iteration in rates
    }
    assert config.iterations == max(rates) + 1
    assert (config.momentum, config.weight_decay, config.batch_size) == (0.9, 5e-4, 32)
    assert (config.warmup_iterations, config.gradient_clip_norm, config.ema_decay) == (0, None, None)


def test_warmup_rises_in_equal_steps() -> None:
    config = TrainConfig(learning_rate=0.4, warmup_iterations=4, milestones=(6,), iterations=8)
    rates = [learning_rate_at(config, iteration) for iteration in range(8)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.04, 0.04])


def test_cosine() -> None:
    config = TrainConfig(learning_rate=1.0, schedule="cosine", warmup_iterations=10, iterations=110,
                         final_learning_rate_factor=0.2)  # fmt: skip
    assert learning_rate_at(config, 4) == pytest.approx(0.5)
    assert learning_rate_at(config, 10) == pytest.approx(1.0)
    assert learning_rate_at(config, 60) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert learning_rate_at(config, 35) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(config, 110) == pytest.approx(0.2)
    rates = [learning_rate_at(config, iteration) for iteration in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("frozen", [0, 2])
def test_groups_are_complete_and_disjoint(frozen: int) -> None:
    config = ModelConfig(backbone="resnet18", tcb_channels=8, num_classes=2, frozen_stages=frozen)
    network = network_of(config)
    weights, biases = parameter_groups(network, TrainConfig())
    ids = [id(parameter) for group in (weights, biases) for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    expected = {
        f"{name}.bias"
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None
    }
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(parameter)] for parameter in biases["params"]} == expected
    assert (weights["weight_decay"], weights["factor"]) == (5e-4, 1.0)
    assert (biases["weight_decay"], biases["factor"]) == (0.0, 2.0)


def test_blocks_of_vgg_that_are_frozen_do_not_learn() -> None:
    with torch.device("meta"):
        network = RefineDetNetwork(ModelConfig(frozen_stages=3))
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    # conv1_1, conv1_2, conv2_1, conv2_2, conv3_1 to conv3_3: torchvision's numbers.
    assert frozen == {f"backbone.features.{n}.{kind}" for n in (0, 2, 5, 7, 10, 12, 14) for kind in ("weight", "bias")}
    weights, biases = parameter_groups(network, TrainConfig())
    assert len(biases["params"]) == 17 + 15 + 16 - 7
    assert len(weights["params"]) == len(biases["params"]) + 2


def test_vgg_biases_and_scales() -> None:
    with torch.device("meta"):
        network = RefineDetNetwork(ModelConfig())
    weights, biases = parameter_groups(network, TrainConfig())
    # 17 convolutions of the backbone, 11 + 3 + 1 of the TCBs (deconvolutions included), 16 of the heads.
    assert len(biases["params"]) == 17 + 15 + 16
    # The two scales of L2Norm are decayed like weights.
    assert len(weights["params"]) == len(biases["params"]) + 2


@pytest.mark.parametrize(
    ("config", "new"),
    [
        (RESNET, ("res6",)),
        (
            dataclasses.replace(RESNET, backbone="vgg16", tcb_batch_norm=False),
            ("fc6", "fc7", "conv6_1", "conv6_2", "conv4_3_norm", "conv5_3_norm"),
        ),
    ],
)
def test_what_comes_from_imagenet_may_have_a_rate_of_its_own(config: ModelConfig, new: tuple[str, ...]) -> None:
    network = network_of(config)
    groups = parameter_groups(network, TrainConfig(backbone_learning_rate_factor=0.2))
    factors = {id(parameter): group["factor"] for group in groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    seen = set()
    for name, parameter in network.named_parameters():
        part, _, rest = name.partition(".")
        pretrained = part == "backbone" and rest.partition(".")[0] not in new
        # Of convolutions: batch norm has weights and biases of one dimension alike, scales of L2Norm no bias.
        bias = name.endswith(".bias") and network.get_submodule(name[: -len(".bias")])._get_name().startswith("Conv")
        assert factors.pop(id(parameter)) == pytest.approx((0.2 if pretrained else 1.0) * (2.0 if bias else 1.0)), name
        assert decays[id(parameter)] == (0.0 if bias else 5e-4), name
        seen.add((pretrained, bias))
    assert not factors
    assert len(seen) >= 3


def test_only_the_new_layers_move_where_the_backbone_has_no_rate() -> None:
    network = network_of()
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    config = TrainConfig(optimizer="adamw", learning_rate=0.1, backbone_learning_rate_factor=0.0)
    optimizer = build_optimizer(network, config)
    set_learning_rate(optimizer, 0.1)
    sum(tensor.sum() for tensor in network.parameters()).backward()
    optimizer.step()
    for name, tensor in network.named_parameters():
        kept = name.startswith("backbone.") and not name.startswith("backbone.res6.")
        assert torch.equal(tensor, before[name]) == kept, name


def test_an_update_by_hand() -> None:
    """Two steps of momentum SGD with doubled, undecayed biases."""
    layer = nn.Conv2d(1, 1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 3.0)
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(layer, config)
    for _ in range(2):
        set_learning_rate(optimizer, 0.1)
        optimizer.zero_grad()
        (layer.weight.sum() + layer.bias.sum()).backward()
        optimizer.step()
    # Weight: 1 + 0.5 * 2 = 2; 2 - 0.1 * 2 = 1.8; then 0.9 * 2 + 1 + 0.5 * 1.8 = 3.7; 1.8 - 0.37 = 1.43.
    assert layer.weight.item() == pytest.approx(1.43)
    # Bias: 3 - 0.2 * 1 = 2.8; then 0.9 + 1 = 1.9; 2.8 - 0.2 * 1.9 = 2.42.
    assert layer.bias.item() == pytest.approx(2.42)


def test_an_update_of_adamw_by_hand() -> None:
    """One step: decay by rate * decay * weight, then a step of the rate against the gradient's sign."""
    layer = nn.Conv2d(1, 1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 3.0)
    config = TrainConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(layer, config)
    set_learning_rate(optimizer, 0.1)
    (7 * layer.weight.sum() - 0.01 * layer.bias.sum()).backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2 - 0.1 * 0.5 * 2 - 0.1)
    assert layer.bias.item() == pytest.approx(3 + 0.2, abs=1e-5)  # twice the rate, no decay


@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_moving_average_equals_the_formula(decay: float) -> None:
    network = network_of()
    average = MovingAverage(network, decay)
    name = "tcb.0.conv1.weight"
    statistics = "tcb.0.norm1.running_mean"
    state = network.state_dict()
    expected = {key: state[key].double().clone() for key in (name, statistics)}
    for update in range(1, 8):
        generator = torch.Generator().manual_seed(update)
        for key in expected:
            state[key].copy_(torch.randn(state[key].shape, generator=generator))
        state["tcb.0.norm1.num_batches_tracked"].fill_(update)
        average.update(network)
        kept = min(decay, (1 + update) / (10 + update))
        for key in expected:
            expected[key] = kept * expected[key] + (1 - kept) * state[key].double()
            torch.testing.assert_close(average.network.state_dict()[key].double(), expected[key], rtol=1e-5, atol=1e-6)
        assert average.network.state_dict()["tcb.0.norm1.num_batches_tracked"].item() == update
    assert average.updates == 7


def test_moving_average_is_a_copy_for_evaluation() -> None:
    network = network_of().train()
    average = MovingAverage(network, 0.99)
    assert not any(module.training for module in average.network.modules())
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
    average.update(network)
    for mine, theirs in zip(average.network.parameters(), network.parameters(), strict=True):
        assert theirs.eq(0.5).all()
        assert mine.data_ptr() != theirs.data_ptr()
