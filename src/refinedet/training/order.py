"""Which image each draw of a training shows: an endless, seeded order.

Image number n depends on the seed and n alone, not on the number of processes, nor on where a run was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from refinedet.config import TrainConfig
from refinedet.data.records import DetectionDataset
from refinedet.training.distributed import share_of


def repeat_factors(dataset: DetectionDataset, threshold: float) -> npt.NDArray[np.float64]:
    """How often each image is drawn so that rare classes are seen more often.

    Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", section 5.2: a class in a share
    f of the images has the factor ``max(1, sqrt(threshold / f))``, an image the largest factor of its classes.

    Args:
        dataset: the training images; crowds do not count as objects.
        threshold: share of the images under which a class is rare, 0 to 1.

    Returns:
        (N,) factors, at least 1; 1 for an image without objects.
    """
    classes = [np.unique(record.labels[~record.crowd]) for record in dataset.records]
    images = np.bincount(np.concatenate([np.zeros(0, np.int64), *classes]), minlength=len(dataset.class_names))
    factors = np.maximum(1.0, np.sqrt(threshold * len(classes) / np.maximum(images, 1)))
    return np.array([factors[labels].max(initial=1.0) for labels in classes])


@dataclass(frozen=True)
class Draw:
    """One image of the endless order."""

    number: int
    """Position in the training: image ``number`` belongs to iteration ``number // batch_size``."""
    index: int
    """Index in the data set."""
    side: tuple[int, int]
    """Height and width to render at."""
    single: bool = False
    """Whether it stays a single image, whatever the augmentation says of mosaics and mixup."""


class EndlessOrder(Sampler[list[Draw]]):
    """Draws of each pass of one process: a new permutation every epoch, images dealt out over the processes.

    Where a pass does not divide by the processes, shares differ by one image. What image n is never depends on them.

    Args:
        repeats: (N,) how often each image of the data set is drawn, relative to the others.
        config: batch size, accumulation, seed, size schedule, mosaic_until.
        image_size: height and width of the input where the schedule says nothing.
        start: first iteration.
        rank: number of this process.
        world: number of processes; divides the batch of a pass.
    """

    def __init__(
        self,
        repeats: npt.NDArray[np.float64],
        config: TrainConfig,
        image_size: tuple[int, int],
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.repeats, self.length = repeats, len(repeats)
        self.config, self.image_size = config, image_size
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
        share = share_of(per_pass, self.rank, self.world)
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for iteration in range(self.start, config.iterations):
            size = self.size_at(iteration)
            single = iteration >= config.mosaic_until * config.iterations
            for step in range(config.accumulation_steps):
                first = iteration * config.batch_size + step * per_pass
                draws = []
                for number in range(first + share.start, first + share.stop):
                    if number // self.length != epoch:
                        epoch = number // self.length
                        order = self._epoch(epoch)
                    draws.append(Draw(number, int(order[number % self.length]), size, single))
                yield draws

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """The images of an epoch, in the order in which they are drawn."""
        rng = np.random.default_rng([self.config.seed, epoch])
        order = rng.permutation(self.length)
        if bool((self.repeats == self.repeats[0]).all()):
            return order
        # Systematic sampling: in every epoch an image comes as often as its share says, rounded up or down, and over
        # the epochs just so often. Neighbours of a permutation, so that no two images always share their rounding.
        bounds = np.cumsum(self.repeats[order]) / self.repeats.sum() * self.length
        picked = order[np.searchsorted(bounds, np.arange(self.length) + rng.random(), side="right") % self.length]
        return rng.permutation(picked)

    def __len__(self) -> int:
        return (self.config.iterations - self.start) * self.config.accumulation_steps
