"""What becomes of a training whose loading processes die, stop, or find no shared memory."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import FolderFactory
from refinedet.config import ModelConfig, TrainConfig
from refinedet.data import open_dataset
from refinedet.errors import RefineDetError, UsageError
from refinedet.training import batches
from refinedet.training.batches import training_batches
from refinedet.training.order import EndlessOrder

MODEL = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64))
SETTINGS = TrainConfig(iterations=2000, batch_size=2, workers=2, milestones=(), train_split="train")


@given(batch=st.integers(1, 9), steps=st.integers(1, 3), world=st.integers(1, 4), seed=st.integers(0, 9))
def test_uneven_shares_are_the_images_of_one_process_in_order(batch: int, steps: int, world: int, seed: int) -> None:
    config = TrainConfig(iterations=3, batch_size=batch * steps, accumulation_steps=steps, seed=seed, milestones=())
    alone = list(EndlessOrder(np.ones(7), config, (64, 64)))
    if world > batch:
        with pytest.raises(UsageError, match="cannot be shared"):
            list(EndlessOrder(np.ones(7), config, (64, 64), rank=0, world=world))
        return
    shares = [list(EndlessOrder(np.ones(7), config, (64, 64), rank=rank, world=world)) for rank in range(world)]
    for number, draws in enumerate(alone):
        assert [draw for share in shares for draw in share[number]] == draws
        sizes = [len(share[number]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"a loading process (was killed|ended) .*--workers 0.*--shm-size"),
        (signal.SIGSTOP, r"no batch came from the loading processes for 3 s.*--workers 0.*--shm-size"),
    ],
)
def test_a_loading_process_that_dies_or_stops_is_one_line(
    voc_folder: FolderFactory, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    monkeypatch.setattr(batches, "LOADER_TIMEOUT", 3)
    before = set(multiprocessing.active_children())
    loaded = training_batches(open_dataset(voc_folder(), "train"), MODEL, SETTINGS)
    next(loaded)
    workers = [one for one in multiprocessing.active_children() if one not in before]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, number)

    def exhaust() -> None:
        for _ in loaded:
            pass

    with pytest.raises((RefineDetError, RuntimeError)) as caught:
        exhaust()
    error = caught.value
    if not isinstance(error, RefineDetError):  # reported by the signal handler while this process was elsewhere
        error = batches.explain_loader(error)  # type: ignore[arg-type, assignment]
    assert isinstance(error, RefineDetError)
    assert "\n" not in str(error)

    assert re.search(message, str(error))
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_little_shared_memory_means_fewer_batches_ahead_or_a_line(
    voc_folder: FolderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    batch = 3 * 4 * 64 * 64 * 2
    for free, ahead in ((100 * batch, 4), (9 * batch, 4), (7 * batch, 3), (3 * batch, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        assert batches._batches_ahead(2, batch) == ahead
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 * batch - 1))
    dataset = open_dataset(voc_folder(), "train")
    with pytest.raises(UsageError, match=r"/dev/shm has 0 MB free, 2 loading processes need.*--workers 0.*--shm-size"):
        next(training_batches(dataset, MODEL, SETTINGS))
    next(training_batches(dataset, MODEL, dataclasses.replace(SETTINGS, workers=0)))


@pytest.mark.parametrize(
    ("device", "preset", "cores", "trainers", "room", "workers"),
    [
        ("cpu", 1, 16, 1, 100, 1),
        ("cuda", 0, 16, 1, 100, 0),  # the preset loads in the trainer itself
        ("cuda", 1, 16, 1, 100, 8),
        ("cuda", 1, 4, 1, 100, 3),
        ("cuda", 1, 16, 4, 100, 3),  # four trainers leave twelve cores
        ("cuda", 1, 1, 1, 100, 1),
        ("cuda", 12, 16, 1, 100, 12),
        ("cuda", 1, 16, 1, 6.5, 5),  # a batch more is with the trainer
        ("cuda", 1, 16, 1, 0.5, 1),  # training_batches says what is missing
        ("cuda", 1, 16, 4, 16, 3),  # each of the four has a quarter of the room, and batches of a quarter
        ("cuda", 1, 16, 4, 3, 2),
    ],
)
def test_a_gpu_has_its_images_loaded_by_the_free_cores(
    device: str, preset: int, cores: int, trainers: int, room: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    batch = 8 * 3 * 4 * 128 * 128  # 16 images in two passes, at the largest side of the schedule
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, int(room * batch)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(trainers))
    settings = dataclasses.replace(
        SETTINGS, batch_size=16, accumulation_steps=2, workers=preset, size_schedule=((0, 64), (1, 128))
    )
    assert batches.choose_workers(settings, (64, 96), torch.device(device)) == workers
    if room == 100:
        fixed = dataclasses.replace(settings, size_schedule=())
        assert batches.choose_workers(fixed, (64, 96), torch.device(device)) == workers


def test_a_batch_that_shared_memory_does_not_take_is_one_line(
    voc_folder: FolderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nx")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RefineDetError, match=r"cannot pass on a batch \(unable to allocate.*--workers 0") as caught:
        next(training_batches(open_dataset(voc_folder(), "train"), MODEL, SETTINGS))
    assert "\n" not in str(caught.value)


def test_loading_processes_do_not_hear_the_signals_of_their_trainer(voc_folder: FolderFactory) -> None:
    before = set(multiprocessing.active_children())
    loaded = training_batches(open_dataset(voc_folder(), "train"), MODEL, SETTINGS)
    for _ in range(2 * SETTINGS.workers):
        next(loaded)  # batches come from all of them in turn, so all of them have started
    workers = [one for one in multiprocessing.active_children() if one not in before]
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid or 0, number)
    for _ in range(20):
        next(loaded)
    assert all(worker.is_alive() for worker in workers)
    loaded.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_the_folder_of_shared_memory_is_there() -> None:
    if os.uname().sysname == "Linux":
        assert Path(batches._SHARED_MEMORY).is_dir()
