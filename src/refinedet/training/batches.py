"""Training batches: an endless, seeded order of pictures, each augmented by a random state of its own.

What picture number n of a training is, and how it is augmented, depends on the seed and n alone: not on the number of
workers, nor on where a run was stopped. So a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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
from refinedet.errors import RefineDetError
from refinedet.preprocess import normalize
from refinedet.training.matching import Targets


@dataclass(frozen=True)
class Batch:
    """What one process feeds to the network in one pass."""

    images: Tensor
    """(B, 3, H, W) float32, normalised."""
    targets: Targets
    """In pixels of ``images``."""
    names: list[str]
    """File of each picture, for messages."""


@dataclass(frozen=True)
class Draw:
    """One picture of the endless order."""

    number: int
    """Position in the training: picture ``number`` belongs to iteration ``number // batch_size``."""
    index: int
    """Index in the data set."""
    side: tuple[int, int]
    """Height and width to render at."""


class EndlessOrder(Sampler[list[Draw]]):
    """Draws of each pass of one process: a new permutation every epoch, pictures dealt out evenly over processes.

    Args:
        length: pictures in the data set.
        config: batch size, accumulation, seed, size schedule.
        image_size: height and width of the input where the schedule says nothing.
        start: first iteration.
        rank: number of this process.
        world: number of processes; divides the batch of a pass.
    """

    def __init__(
        self,
        length: int,
        config: TrainConfig,
        image_size: tuple[int, int],
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.config, self.image_size = length, config, image_size
        self.start, self.rank, self.world = start, rank, world

    def size_at(self, iteration: int) -> tuple[int, int]:
        """Height and width of the input at that iteration."""
        size = self.image_size
        for first, side in self.config.size_schedule:
            if iteration >= first:
                size = (side, side)
        return size

    def __iter__(self) -> Iterator[list[Draw]]:
        config = self.config
        per_pass = config.batch_size // config.accumulation_steps
        share = per_pass // self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for iteration in range(self.start, config.iterations):
            size = self.size_at(iteration)
            for step in range(config.accumulation_steps):
                first = iteration * config.batch_size + step * per_pass + self.rank * share
                draws = []
                for number in range(first, first + share):
                    if number // self.length != epoch:
                        epoch = number // self.length
                        order = np.random.default_rng([config.seed, epoch]).permutation(self.length)
                    draws.append(Draw(number, int(order[number % self.length]), size))
                yield draws

    def __len__(self) -> int:
        return (self.config.iterations - self.start) * self.config.accumulation_steps


Sample = tuple[npt.NDArray[np.uint8], Tensor, Tensor, str]
"""(H, W, 3) uint8 picture, (G, 4) boxes in its pixels, (G,) labels, file."""


class _Loaded(NamedTuple):
    """A batch as it comes from a loading process.

    Only the pictures are a tensor: for each tensor the trainer has to ask that process for its memory, and waits until
    the process finds time to answer. Arrays come along by value.
    """

    images: Tensor
    """As in ``Batch``."""
    boxes: list[npt.NDArray[np.float32]]
    """(G, 4) of each picture."""
    labels: list[npt.NDArray[np.int64]]
    """(G,) of each picture."""
    names: list[str]
    """As in ``Batch``."""

    def batch(self, *, pin_memory: bool) -> Batch:
        """What the trainer works on."""
        targets = Targets.collate([torch.from_numpy(a) for a in self.boxes], [torch.from_numpy(a) for a in self.labels])
        return Batch(self.images, targets.pin_memory() if pin_memory else targets, self.names)


class AugmentedPictures(Dataset[Sample | RefineDetError]):
    """Loads and augments one picture per draw.

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
            first = self._input(rng, draw.index, draw.side)
            if self.augment.mixup_probability and rng.random() < self.augment.mixup_probability:
                return self._mixed(rng, first)
            return first
        except RefineDetError as error:
            return RefineDetError(str(error))

    def _input(self, rng: np.random.Generator, index: int, size: tuple[int, int]) -> Sample:
        """A mosaic that begins with that picture, or the picture alone."""
        if self.augment.mosaic_probability and rng.random() < self.augment.mosaic_probability:
            return self._mosaic(rng, index, size)
        return self._augmented(rng, index, size, self.augment)

    def _mixed(self, rng: np.random.Generator, first: Sample) -> Sample:
        """That input with a second one shining through, the targets of both and the name of the first."""
        picture, boxes, labels, name = first
        other = int(rng.integers(len(self.dataset)))
        height, width = picture.shape[:2]
        second, more_boxes, more_labels, _ = self._input(rng, other, (height, width))
        share = rng.beta(MIXUP_BETA, MIXUP_BETA)
        return mix(picture, second, share), torch.cat([boxes, more_boxes]), torch.cat([labels, more_labels]), name

    def _augmented(self, rng: np.random.Generator, index: int, size: tuple[int, int], augment: AugmentConfig) -> Sample:
        record, image = self.dataset[index], self._load(index)
        used = ~record.crowd
        boxes, labels = record.boxes[used], record.labels[used]
        photometric = sample_photometric(rng) if augment.photometric else Photometric()
        geometry = sample_geometry(rng, image.shape[1], image.shape[0], boxes, augment)
        moved, kept = transform_boxes(boxes, geometry, size)
        picture = render(image, geometry, photometric, size, self.fill)
        return picture, torch.from_numpy(moved), torch.from_numpy(labels[kept]), str(record.image_path)

    def _load(self, index: int) -> npt.NDArray[np.uint8]:
        image = self._kept.get(index)
        if image is None:
            image = self.dataset.load_image(index)
            if self.keep:
                self._kept[index] = image
        return image

    def _mosaic(self, rng: np.random.Generator, index: int, size: tuple[int, int]) -> Sample:
        """That picture and three others, each in a tile of its own; the first names the sample."""
        augment = dataclasses.replace(self.augment, expand_probability=0.0)
        tiles = sample_mosaic(rng, size)
        indices = [index, *(int(i) for i in rng.integers(len(self.dataset), size=3))]
        canvas = np.empty((*size, 3), dtype=np.uint8)
        boxes, labels, names = [], [], []
        for index, place in zip(indices, rng.permutation(4), strict=True):
            x1, y1, x2, y2 = tiles[place]
            picture, moved, kinds, name = self._augmented(rng, index, (y2 - y1, x2 - x1), augment)
            canvas[y1:y2, x1:x2] = picture
            boxes.append(moved + torch.tensor([x1, y1, x1, y1], dtype=torch.float32))
            labels.append(kinds)
            names.append(name)
        return canvas, torch.cat(boxes), torch.cat(labels), names[0]

    def collate(self, items: list[Sample | RefineDetError]) -> _Loaded | RefineDetError:
        """Stack pictures; the first error instead, if there is one."""
        samples: list[Sample] = []
        for item in items:
            if isinstance(item, RefineDetError):
                return item
            samples.append(item)
        pictures, boxes, labels, names = zip(*samples, strict=True)
        images = torch.from_numpy(np.stack([normalize(picture, self.model) for picture in pictures]))
        return _Loaded(images, [one.numpy() for one in boxes], [one.numpy() for one in labels], list(names))


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
) -> Iterator[Batch]:
    """One batch for every pass of this process, from iteration ``start`` to the last.

    ``image_size``, height and width, replaces that of ``model``: another network may have another input.

    Raises:
        RefineDetError: a picture cannot be read; its file is named.
    """
    pictures = AugmentedPictures(dataset, model, config.augment, config.seed, keep=config.keep_images)
    size = image_size or model.image_size
    order = EndlessOrder(len(dataset), config, size, start=start, rank=rank, world=world)
    loader = DataLoader(
        pictures,
        batch_sampler=order,
        num_workers=config.workers,
        collate_fn=pictures.collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if config.workers else None,
    )
    for loaded in loader:
        if isinstance(loaded, RefineDetError):
            raise loaded
        yield loaded.batch(pin_memory=pin_memory)
