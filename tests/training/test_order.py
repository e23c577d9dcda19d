"""The endless order of images: permutations, shares of processes, and images of rare classes."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet.config import TrainConfig
from refinedet.training.order import Draw, EndlessOrder, repeat_factors

SIZE = (64, 64)


def order_of(length: int, config: TrainConfig, **settings: int) -> list[list[Draw]]:
    return list(EndlessOrder(np.ones(length), config, SIZE, **settings))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 30), batch=st.integers(1, 12), iterations=st.integers(1, 12), seed=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(length: int, batch: int, iterations: int, seed: int) -> None:
    config = TrainConfig(iterations=iterations, batch_size=batch, seed=seed)
    passes = order_of(length, config)
    assert [len(one) for one in passes] == [batch] * iterations
    draws = [draw for one in passes for draw in one]
    assert [draw.number for draw in draws] == list(range(batch * iterations))
    indices = [draw.index for draw in draws]
    for start in range(0, len(indices), length):
        epoch = indices[start : start + length]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(length))


def test_epochs_and_seeds_differ() -> None:
    config = TrainConfig(iterations=4, batch_size=50)
    indices = [draw.index for one in order_of(100, config) for draw in one]
    assert indices[:100] != indices[100:]
    assert indices[:100] != list(range(100))
    other = [draw.index for one in order_of(100, dataclasses.replace(config, seed=1)) for draw in one]
    assert indices != other


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 25), world=st.sampled_from([1, 2, 3]), steps=st.sampled_from([1, 2]), start=st.integers(0, 5)
)  # fmt: skip
def test_ranks_and_steps_share_out_the_batch(length: int, world: int, steps: int, start: int) -> None:
    config = TrainConfig(iterations=6, batch_size=12, accumulation_steps=steps, seed=3)
    whole = [draw for one in order_of(length, dataclasses.replace(config, accumulation_steps=1)) for draw in one]
    ranks = [order_of(length, config, rank=rank, world=world, start=start) for rank in range(world)]
    assert {len(passes) for passes in ranks} == {(6 - start) * steps}
    assert len(EndlessOrder(np.ones(length), config, SIZE, world=world, start=start)) == (6 - start) * steps
    assert {len(one) for passes in ranks for one in passes} == {12 // steps // world}
    dealt = [draw for number in range(len(ranks[0])) for passes in ranks for draw in passes[number]]
    assert dealt == whole[12 * start :]


def test_size_schedule() -> None:
    config = TrainConfig(iterations=6, batch_size=1, size_schedule=((1, 128), (3, 192)))
    sizes = [one[0].side for one in order_of(4, config)]
    assert sizes == [(64, 64), (128, 128), (128, 128), (192, 192), (192, 192), (192, 192)]
    assert [one[0].side for one in order_of(4, config, start=4)] == sizes[4:]
    assert EndlessOrder(np.ones(4), TrainConfig(), (64, 128)).size_at(0) == (64, 128)


def of_classes(*labels: list[int], crowd: int = -1) -> Any:
    """A stand-in for a data set of two classes: the labels of each image; those equal to ``crowd`` are crowds."""
    records = [
        types.SimpleNamespace(labels=np.array(image, dtype=np.int64), crowd=np.array(image, dtype=np.int64) == crowd)
        for image in labels
    ]
    return types.SimpleNamespace(records=records, class_names=("common", "rare"))


def test_repeat_factors_by_hand() -> None:
    # Class 0 is in 8 of 10 images, class 1 in 2; at a threshold of a half only class 1 is rare: sqrt(0.5 / 0.2).
    images = of_classes([0], [0, 0], [0], [0], [0], [0], [0], [0, 1, 1], [1], [])
    rare = math.sqrt(2.5)
    np.testing.assert_allclose(repeat_factors(images, 0.5), [1, 1, 1, 1, 1, 1, 1, rare, rare, 1])
    np.testing.assert_allclose(repeat_factors(images, 0.1), np.ones(10))
    np.testing.assert_allclose(repeat_factors(images, 1.0)[:2], [math.sqrt(1 / 0.8)] * 2)
    # Crowds are not learned from, so they make no image worth repeating.
    crowds = repeat_factors(of_classes([0], [1], [1, 0], crowd=1), 1.0)
    np.testing.assert_allclose(crowds, [math.sqrt(1.5), 1, math.sqrt(1.5)])


@pytest.mark.parametrize("seed", [0, 1])
def test_images_come_as_often_as_their_factors_say(seed: int) -> None:
    factors = np.array([1.0, 1.0, 1.0, 3.0, 1.5, 1.0, 1.0])
    epochs = 600
    config = TrainConfig(iterations=epochs, batch_size=7, seed=seed)
    draws = np.array([[draw.index for draw in one] for one in EndlessOrder(factors, config, SIZE)])
    counts = np.stack([np.bincount(epoch, minlength=7) for epoch in draws])
    wanted = factors / factors.sum() * 7
    # Never further away than rounding, in any epoch; and on average just so often.
    assert (np.abs(counts - wanted) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), wanted, atol=0.06)
    assert len({tuple(epoch) for epoch in draws.tolist()}) > epochs * 0.9


def test_equal_factors_change_nothing_and_a_stop_neither() -> None:
    config = TrainConfig(iterations=6, batch_size=5, seed=2)
    assert list(EndlessOrder(np.full(8, 1.7), config, SIZE)) == order_of(8, config)
    factors = np.linspace(1, 4, 8)
    assert list(EndlessOrder(factors, config, SIZE, start=4)) == list(EndlessOrder(factors, config, SIZE))[4:]


def test_single_images_from_the_share_on() -> None:
    config = TrainConfig(iterations=10, batch_size=2, mosaic_until=0.75)
    single = [draw.single for one in order_of(4, config) for draw in one]
    assert single == [False] * 16 + [True] * 4
    assert not any(draw.single for one in order_of(4, TrainConfig(iterations=10, batch_size=2)) for draw in one)
