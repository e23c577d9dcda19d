"""The loop with a network of four numbers: what it computes, when it saves and evaluates, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refinedet.config import TrainConfig
from refinedet.errors import RefineDetError
from refinedet.loggers import LoggerGroup
from refinedet.training.distributed import World
from refinedet.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


@dataclass
class Batch:
    images: Tensor
    targets: Tensor
    names: list[str]


@dataclass
class Memory:
    """A logger that remembers."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, {name: value for name, value in values.items() if name != "images_per_second"}))

    def close(self) -> None:
        pass


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{
        "iterations": 6, "batch_size": 2, "learning_rate": 0.1, "milestones": (), "momentum": 0.0, "weight_decay": 0.0,
        "bias_learning_rate_factor": 1.0, "log_every": 2, "save_every": 100, "evaluate_every": 0,
        "channels_last": False, **changes,
    })  # fmt: skip


def batches(start: int = 0, steps: int = 1) -> Iterator[Batch]:
    number = start * steps
    while True:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(2, 3, 2, 2, generator=generator)
        yield Batch(images, images.sum(dim=1, keepdim=True), [f"{number}.jpg"])
        number += 1


def network() -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(3, 1, 1)


def squared(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"total": ((outputs - targets) ** 2).mean()}


def make(criterion: Any = squared, **changes: Any) -> Trainer:
    return Trainer(network(), criterion, settings(**changes), ALONE)


def test_the_updates_are_those_of_a_loop_written_out() -> None:
    trainer, log = make(learning_rate=0.05, gradient_clip_norm=1.0, momentum=0.9), Memory()
    assert trainer.run(batches(), log, save=lambda: None)
    by_hand, losses = network(), []
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    source = batches()
    for _ in range(6):
        batch = next(source)
        loss = squared(by_hand(batch.images), batch.targets)["total"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.equal(a, b) for a, b in zip(trainer.network.parameters(), by_hand.parameters(), strict=True))
    assert [step for step, _ in log.rows] == [2, 4, 6]
    assert [row["total"] for _, row in log.rows] == pytest.approx(
        [(losses[n] + losses[n + 1]) / 2 for n in (0, 2, 4)], abs=0
    )


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stop_anywhere_changes_nothing(stop_at: int, optimizer: str) -> None:
    changes: dict[str, Any] = {"momentum": 0.9, "ema_decay": 0.9, "optimizer": optimizer, "learning_rate": 0.01}
    whole, whole_log = make(**changes), Memory()
    whole.run(batches(), whole_log, save=lambda: None)
    log, saved = Memory(), []
    first = make(**changes)
    assert not first.run(
        batches(), log, save=lambda: saved.append(first.state()), stop=lambda: first.iteration + 1 == stop_at
    )
    assert [one["iteration"] for one in saved] == [stop_at]
    second = make(**changes)
    nn.init.zeros_(second.network.weight)  # type: ignore[arg-type]
    second.load_state(saved[0])
    assert second.run(batches(stop_at), log, save=lambda: None)
    for one, other in ((whole.network, second.network), (whole.average.network, second.average.network)):  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert log.rows == whole_log.rows


@pytest.mark.parametrize(("rate", "words"), [(1e6, "the loss is"), (1e19, "the loss is (inf|nan)")])
def test_an_update_that_ruins_the_weights_is_not_saved_even_if_it_is_the_last(rate: float, words: str) -> None:
    saved: list[int] = []
    trainer = make(iterations=1, learning_rate=rate)
    with pytest.raises(RefineDetError, match=f"after iteration 1 {words}.*the learning rate has ruined them"):
        trainer.run(batches(), LoggerGroup([]), save=lambda: saved.append(trainer.iteration))
    trainer = make(iterations=4, learning_rate=1e-3, save_every=1)

    def save() -> None:
        saved.append(trainer.iteration)
        if trainer.iteration == 2:
            trainer.settings = settings(iterations=4, learning_rate=rate, save_every=1)

    with pytest.raises(RefineDetError, match=f"after iteration 3 {words}"):
        trainer.run(batches(), LoggerGroup([]), save=save)
    assert saved == [1, 2]


def test_looking_at_the_weights_before_a_save_changes_nothing() -> None:
    def trained(save_every: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
        trainer = Trainer(layers, squared, settings(iterations=5, learning_rate=0.01, save_every=save_every), ALONE)
        trainer.run(batches(), LoggerGroup([]), save=lambda: None)
        return trainer.network.state_dict(), torch.get_rng_state()

    (seldom, after_seldom), (often, after_often) = trained(5), trained(1)
    assert seldom.keys() == often.keys()
    assert all(torch.equal(seldom[name], often[name]) for name in seldom)
    assert torch.equal(after_seldom, after_often)


def test_it_saves_before_it_evaluates_and_evaluates_after_a_stop_between_the_two() -> None:
    events: list[str] = []
    trainer = make(iterations=5, save_every=3, evaluate_every=2)
    trainer.run(
        batches(), LoggerGroup([]), save=lambda: events.append(f"save {trainer.iteration}"),
        evaluate=lambda: events.append(f"evaluate {trainer.iteration}"),
    )  # fmt: skip
    assert events == ["save 2", "evaluate 2", "save 3", "save 4", "evaluate 4", "save 5", "evaluate 5"]
    state: dict[str, Any] = {}
    first = make(iterations=5, evaluate_every=2)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(batches(), LoggerGroup([]), save=lambda: state.update(first.state()), evaluate=killed)
    events.clear()
    second = make(iterations=5, evaluate_every=2)
    second.load_state(state)
    second.run(
        batches(2), LoggerGroup([]), save=lambda: events.append(f"save {second.iteration}"),
        evaluate=lambda: events.append(f"evaluate {second.iteration}"),
    )  # fmt: skip
    assert events == ["evaluate 2", "save 4", "evaluate 4", "save 5", "evaluate 5"]


def test_an_evaluation_may_end_the_training() -> None:
    events: list[str] = []
    trainer = make(iterations=9, evaluate_every=2)

    def evaluate() -> bool:
        events.append(f"evaluate {trainer.iteration}")
        return trainer.iteration == 4

    assert trainer.run(
        batches(), LoggerGroup([]), save=lambda: events.append(f"save {trainer.iteration}"), evaluate=evaluate
    )
    assert events == ["save 2", "evaluate 2", "save 4", "evaluate 4", "save 4"], "saved again: it has ended"
    assert trainer.iteration == 4


class _BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.nan


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("at", [3, 6])
def test_a_gradient_that_is_no_number_is_never_applied(clip: float | None, at: int) -> None:
    trainer = make(gradient_clip_norm=clip)

    def criterion(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        total = squared(outputs, targets)["total"]
        return {"total": _BadGradient.apply(total) if trainer.iteration + 1 == at else total}

    trainer.criterion = criterion
    with pytest.raises(RefineDetError, match=rf"the gradient of iteration {at} is not finite.*Images: {at - 1}\.jpg"):
        trainer.run(batches(), LoggerGroup([]), save=lambda: None)
    assert trainer.iteration == at - 1
    assert all(bool(one.isfinite().all()) for one in trainer.network.parameters())


def test_a_loss_that_is_no_number_names_its_images() -> None:
    def criterion(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"part": outputs.sum() * math.inf, "total": squared(outputs, targets)["total"]}

    trainer = make(criterion)
    before = trainer.network.weight.clone()  # type: ignore[operator, union-attr]
    with pytest.raises(RefineDetError, match=r"the loss of iteration 1 is not finite \(part .*inf.*Images: 0\.jpg"):
        trainer.run(batches(), LoggerGroup([]), save=lambda: None)
    assert torch.equal(trainer.network.weight, before)  # type: ignore[arg-type]


def test_a_rate_that_ruins_the_weights_stops() -> None:
    trainer = make(learning_rate=30.0, iterations=50)
    with pytest.raises(RefineDetError, match=r"the loss of iteration \d+ is .* and began with .*ruined the weights"):
        trainer.run(batches(), LoggerGroup([]), save=lambda: None)
    assert trainer.iteration < 10


def test_weights_that_are_no_numbers_are_not_saved() -> None:
    saves: list[int] = []
    trainer = make(iterations=1, learning_rate=1e20, gradient_clip_norm=None)
    trainer.criterion = lambda outputs, targets: {"total": 3e18 * squared(outputs, targets)["total"]}
    with pytest.raises(RefineDetError, match="weights are not finite after iteration 1; they were not saved"):
        trainer.run(batches(), LoggerGroup([]), save=lambda: saves.append(trainer.iteration))
    assert saves == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("iteration", "3", "'iteration' is no finite number"),
        ("iteration", 99, "iteration 99 is not one of 6"),
        ("network.weight", torch.zeros(2), "'network.weight'"),
        ("network.weight", torch.full((1, 3, 1, 1), math.nan), "'network.weight' is not finite"),
        ("network.bias", 3, "'network.bias' is int"),
        ("optimizer.param_groups", 3, "'optimizer.param_groups' has another length"),
        ("optimizer.state", [], "'optimizer"),
        ("optimizer.state", {0: {"momentum_buffer": torch.zeros(7)}}, r"optimizer.state.0.momentum_buffer"),
        ("optimizer.state", {9: {}}, r"optimizer.state.9"),
        ("average", 5, "'average' has other entries"),
        ("average_updates", 1.5, "'average_updates' is no whole number"),
        ("sums", {"total": "x"}, "'sums.total'"),
        ("sums", None, "'sums'"),
        ("random_state", torch.zeros(3), "'random_state'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(path: str, value: Any, message: str) -> None:
    source = make(momentum=0.9, ema_decay=0.5)
    states: list[dict[str, Any]] = []
    source.run(batches(), LoggerGroup([]), save=lambda: states.append(source.state()))
    state = states[0]
    *parents, name = path.split(".")
    place = state
    for parent in parents:
        place[parent] = dict(place[parent])
        place = place[parent]
    target = make(momentum=0.9, ema_decay=0.5)
    before = {name: one.clone() for name, one in target.network.state_dict().items()}
    random = torch.get_rng_state()
    place[name] = value
    with pytest.raises(RefineDetError, match=message):
        target.load_state(state)
    del place[name]
    with pytest.raises(RefineDetError):
        target.load_state(state)
    assert target.iteration == 0
    assert not target.optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, before[name]) for name, one in target.network.state_dict().items())
