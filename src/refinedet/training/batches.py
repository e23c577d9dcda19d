"""Training batches: an endless, seeded order of images, each augmented by a random state of its own.

What image number n of a training is, and how it is augmented, depends on the seed and n alone: not on the number of
workers, nor on where a run was stopped. So a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from refinedet.config import AugmentConfig, ModelConfig, TrainConfig
from refinedet.data.augment import (
    MIXUP_BETA,
    Photometric,
    mix,
    render,
    sample_geometry,
    sample_mosaic,
    sample_photometric,
    transform_boxes,
)
from refinedet.data.records import DetectionDataset
from refinedet.errors import RefineDetError, UsageError
from refinedet.preprocess import normalize
from refinedet.training.distributed import share_of
from refinedet.training.matching import Targets
from refinedet.training.order import Draw, EndlessOrder, repeat_factors

LOADER_TIMEOUT = 300
"""Seconds without a batch after which the loading processes are given up."""
MOST_WORKERS = 8
"""Loading processes for each GPU, where their number is not given."""
_SHARED_MEMORY = "/dev/shm"
_ADVICE = "load in the trainer itself with --workers 0, or, in a container, give it more (docker run --shm-size 8g)"


@dataclass(frozen=True)
class Batch:
    """What one process feeds to the network in one pass."""

    images: Tensor
    """(B, 3, H, W) float32, normalised."""
    targets: Targets
    """In pixels of ``images``."""
    names: list[str]
    """File of each image, for messages."""


Sample = tuple[npt.NDArray[np.uint8], Tensor, Tensor, str]
"""(H, W, 3) uint8 image, (G, 4) boxes in its pixels, (G,) labels, file."""


class _Loaded(NamedTuple):
    """A batch as it comes from a loading process.

    Only the images are a tensor: for each tensor the trainer has to ask that process for its memory, and waits until
    the process finds time to answer. Arrays come along by value.
    """

    images: Tensor
    """As in ``Batch``."""
    boxes: list[npt.NDArray[np.float32]]
    """(G, 4) of each image."""
    labels: list[npt.NDArray[np.int64]]
    """(G,) of each image."""
    names: list[str]
    """As in ``Batch``."""

    def batch(self, *, pin_memory: bool) -> Batch:
        """What the trainer works on."""
        targets = Targets.collate([torch.from_numpy(a) for a in self.boxes], [torch.from_numpy(a) for a in self.labels])
        return Batch(self.images, targets.pin_memory() if pin_memory else targets, self.names)


class AugmentedImages(Dataset[Sample | RefineDetError]):
    """Loads and augments one image per draw.

    A file that cannot be read is returned as its error, not raised: the data loader would wrap what a worker raises
    into a traceback, and the user is to see one line.
    """

    def __init__(
        self, dataset: DetectionDataset, model: ModelConfig, augment: AugmentConfig, seed: int, *, keep: bool = False
    ) -> None:
        self.dataset, self.model, self.augment, self.seed = dataset, model, augment, seed
        self.keep = keep
        self._kept: dict[int, npt.NDArray[np.uint8]] = {}
        mean = model.mean if model.channel_order == "rgb" else model.mean[::-1]
        self.fill = (mean[0], mean[1], mean[2])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Sample | RefineDetError:
        rng = np.random.default_rng([self.seed, 1, draw.number])
        try:
            if draw.single:
                return self._augmented(rng, draw.index, draw.side, self.augment)
            first = self._input(rng, draw.index, draw.side)
            if self.augment.mixup_probability and rng.random() < self.augment.mixup_probability:
                return self._mixed(rng, first)
            return first
        except RefineDetError as error:
            return RefineDetError(str(error))

    def _input(self, rng: np.random.Generator, index: int, size: tuple[int, int]) -> Sample:
        """A mosaic that begins with that image, or the image alone."""
        if self.augment.mosaic_probability and rng.random() < self.augment.mosaic_probability:
            return self._mosaic(rng, index, size)
        return self._augmented(rng, index, size, self.augment)

    def _mixed(self, rng: np.random.Generator, first: Sample) -> Sample:
        """That input with a second one shining through, the targets of both and the name of the first."""
        image, boxes, labels, name = first
        other = int(rng.integers(len(self.dataset)))
        height, width = image.shape[:2]
        second, more_boxes, more_labels, _ = self._input(rng, other, (height, width))
        share = rng.beta(MIXUP_BETA, MIXUP_BETA)
        return mix(image, second, share), torch.cat([boxes, more_boxes]), torch.cat([labels, more_labels]), name

    def _augmented(self, rng: np.random.Generator, index: int, size: tuple[int, int], augment: AugmentConfig) -> Sample:
        record, image = self.dataset[index], self._load(index)
        used = ~record.crowd
        boxes, labels = record.boxes[used], record.labels[used]
        photometric = sample_photometric(rng) if augment.photometric else Photometric()
        geometry = sample_geometry(rng, image.shape[1], image.shape[0], boxes, augment)
        moved, kept = transform_boxes(boxes, geometry, size)
        augmented = render(image, geometry, photometric, size, self.fill)
        return augmented, torch.from_numpy(moved), torch.from_numpy(labels[kept]), str(record.image_path)

    def _load(self, index: int) -> npt.NDArray[np.uint8]:
        image = self._kept.get(index)
        if image is None:
            image = self.dataset.load_image(index)
            if self.keep:
                self._kept[index] = image
        return image

    def _mosaic(self, rng: np.random.Generator, index: int, size: tuple[int, int]) -> Sample:
        """That image and three others, each in a tile of its own; the first names the sample."""
        augment = dataclasses.replace(self.augment, expand_probability=0.0)
        tiles = sample_mosaic(rng, size)
        indices = [index, *(int(i) for i in rng.integers(len(self.dataset), size=3))]
        canvas = np.empty((*size, 3), dtype=np.uint8)
        boxes, labels, names = [], [], []
        for index, place in zip(indices, rng.permutation(4), strict=True):
            x1, y1, x2, y2 = tiles[place]
            tile, moved, kinds, name = self._augmented(rng, index, (y2 - y1, x2 - x1), augment)
            canvas[y1:y2, x1:x2] = tile
            boxes.append(moved + torch.tensor([x1, y1, x1, y1], dtype=torch.float32))
            labels.append(kinds)
            names.append(name)
        return canvas, torch.cat(boxes), torch.cat(labels), names[0]

    def collate(self, items: list[Sample | RefineDetError]) -> _Loaded | RefineDetError:
        """Stack images; the first error instead, if there is one."""
        samples: list[Sample] = []
        for item in items:
            if isinstance(item, RefineDetError):
                return item
            samples.append(item)
        pixels, boxes, labels, names = zip(*samples, strict=True)
        images = torch.from_numpy(np.stack([normalize(image, self.model) for image in pixels]))
        if get_worker_info() is not None:
            # On its way to the trainer it would go there in any case, but in a thread of the loading process, where a
            # failure only prints a traceback and the trainer waits for ever.
            try:
                images.share_memory_()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                return RefineDetError(f"a loading process cannot pass on a batch ({_first_line(error)}); {_ADVICE}")
        return _Loaded(
            images, [of_image.numpy() for of_image in boxes], [of_image.numpy() for of_image in labels], list(names)
        )


def training_batches(
    dataset: DetectionDataset,
    model: ModelConfig,
    config: TrainConfig,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    image_size: tuple[int, int] | None = None,
) -> Generator[Batch, None, None]:
    """One batch for every pass of this process, from iteration ``start`` to the last.

    ``image_size``, height and width, replaces that of ``model``: another network may have another input.

    Raises:
        RefineDetError: an image cannot be read (its file is named), or a loading process ended or no longer answers.
    """
    images = AugmentedImages(dataset, model, config.augment, config.seed, keep=config.keep_images)
    size = image_size or model.image_size
    repeats = repeat_factors(dataset, config.repeat_threshold)
    order = EndlessOrder(repeats, config, size, start=start, rank=rank, world=world)
    sides = [size[0] * size[1], *(side * side for _, side in config.size_schedule)]
    share = share_of(config.batch_size // config.accumulation_steps, rank, world)
    loader = DataLoader(
        images,
        batch_sampler=order,
        num_workers=config.workers,
        collate_fn=images.collate,
        pin_memory=pin_memory,
        prefetch_factor=_batches_ahead(config.workers, len(share) * 3 * 4 * max(sides)),
        timeout=LOADER_TIMEOUT if config.workers else 0,
        worker_init_fn=_start_worker,
        # The loader draws a seed for its processes, from the global generator if it has none of its own; how often
        # depends on how often a training was stopped.
        generator=torch.Generator(),
    )
    others = set(multiprocessing.active_children())
    workers: list[multiprocessing.process.BaseProcess] = []
    loaded_batches: Iterator[_Loaded | RefineDetError] | None = None
    try:
        loaded_batches = iter(loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        while True:
            try:
                loaded = next(loaded_batches, None)
            except RuntimeError as error:
                raise explain_loader(error) from None
            if loaded is None:
                return
            if isinstance(loaded, RefineDetError):
                raise loaded
            yield loaded.batch(pin_memory=pin_memory)
    finally:
        # Before they are killed the loader must know that it has ended. It asks them to leave and terminates them, but
        # they do not hear SIGTERM, which the whole group of processes may get, and one that is stopped hears nothing.
        with contextlib.suppress(RuntimeError):
            getattr(loaded_batches, "_shutdown_workers", int)()
        for worker in workers:
            worker.kill()


def choose_workers(config: TrainConfig, image_size: tuple[int, int], device: torch.device) -> int:
    """How many loading processes a training gets whose number nobody has given.

    The network on a CPU needs the cores itself, so it is the preset's number. A GPU would wait for its images: it has a
    process for each core that no trainer of this machine uses, at most 8, and no more than shared memory has room for.
    """
    if device.type == "cpu" or not config.workers:
        return config.workers
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pixels = max([image_size[0] * image_size[1], *(side * side for _, side in config.size_schedule)])
    images = math.ceil(config.batch_size / config.accumulation_steps / trainers)
    room = _free_shared_memory() // (images * 3 * 4 * pixels * trainers) - 1
    return max(config.workers, min(MOST_WORKERS, cores // trainers - 1, room))


def _start_worker(_: int) -> None:
    """Signals go to the trainer, which saves; a loading process that left before it would cost it the iteration.

    Batches are handed over by the name of their shared memory: to take over an open file, torch's default, the trainer
    has to talk to the loading process, and would wait for ever for one that is stopped.
    """
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def _batches_ahead(workers: int, batch_bytes: int) -> int | None:
    """How many batches each loading process prepares: as many as the shared memory holds, 4 at most.

    Raises:
        UsageError: it does not hold even one for each process.
    """
    if not workers:
        return None
    free = _free_shared_memory()
    for ahead in (4, 3, 2, 1):
        # One batch more is with the trainer.
        if (workers * ahead + 1) * batch_bytes <= free:
            return ahead
    raise UsageError(
        f"{_SHARED_MEMORY} has {free / 2**20:.0f} MB free, {workers} loading processes need at least "
        f"{(workers + 1) * batch_bytes / 2**20:.0f} MB; {_ADVICE}"
    )


def _free_shared_memory() -> int:
    """Bytes; more than anybody needs where batches take another way than Linux's."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return 1 << 62


def explain_loader(error: RuntimeError) -> Exception:
    """What torch's data loader reports in many lines, in one; other errors as they are.

    It reports the death of a loading process wherever the trainer happens to be.
    """
    text = str(error)
    if "timed out" in text:
        return RefineDetError(
            f"no batch came from the loading processes for {LOADER_TIMEOUT} s: one is stopped, the disk does not "
            f"answer, or {_SHARED_MEMORY} is full; {_ADVICE}"
        )
    if "DataLoader worker" in text or "Pin memory thread" in text:
        what = "was killed" if "kill" in text.lower() else "ended"
        if "Bus error" in text:
            what = f"ran out of shared memory ({_SHARED_MEMORY})"
        return RefineDetError(f"a loading process {what} (is the memory used up?); {_ADVICE}")
    return error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
