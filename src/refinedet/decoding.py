"""Images decoded in threads while the caller works on those that came before, within a bound on pixels held at once.

Prediction, the command line and evaluation all use it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from refinedet.errors import RefineDetError, UsageError
from refinedet.pixels import Pixels

PIXELS_AHEAD = 64_000_000
"""Pixels that are decoded or being decoded at once; a larger image is decoded alone."""
DECODE_THREADS = 2

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Decoded(Generic[ItemT]):
    """One image that has come through ``decode_ahead``."""

    item: ItemT
    """What the caller gave."""
    pixels: Pixels | None
    """(H, W, 3) uint8 RGB; None if the image could not be read."""
    error: RefineDetError | None = None
    """Why it could not be read."""


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things.

    Raises:
        UsageError: not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")


def decode_ahead(
    items: Iterable[ItemT],
    count: Callable[[ItemT], int],
    read: Callable[[ItemT], Pixels],
    *,
    batch_size: int,
    threads: int = DECODE_THREADS,
    pixels_ahead: int | None = None,
) -> Generator[list[Decoded[ItemT]], None, None]:
    """Batches of decoded images in the order of ``items``; the next ones are decoded while the caller works.

    A batch has fewer than ``batch_size`` images where more would exceed ``pixels_ahead``. An image that cannot be read
    comes with its error and takes its place in the batch.

    Args:
        items: whatever ``count`` and ``read`` understand; taken one by one, only as far ahead as needed.
        count: width times height of an item; called in a thread.
        read: pixels of an item; called in a thread.
        batch_size: largest number of images in a batch.
        threads: that decode.
        pixels_ahead: bound on the pixels that are held at once, the caller's batch included (clear it when it is
            done); ``PIXELS_AHEAD`` if None. A larger image is decoded alone.

    Raises:
        UsageError: batch size or number of threads below 1.
    """
    check_count("batch_size", batch_size)
    check_count("threads", threads)
    pipeline = _Pipeline(iter(items), count, read, batch_size, threads, pixels_ahead)
    try:
        while batch := pipeline.next_batch(batch_size):
            yield batch
    finally:
        pipeline.pool.shutdown(wait=True, cancel_futures=True)


class _Pipeline(Generic[ItemT]):
    """Items whose pixels are being counted, then items that are being decoded, in order."""

    def __init__(
        self,
        items: Iterator[ItemT],
        count: Callable[[ItemT], int],
        read: Callable[[ItemT], Pixels],
        batch_size: int,
        threads: int,
        pixels_ahead: int | None,
    ) -> None:
        self._items = items
        self._count, self._read = count, read
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._counting: deque[tuple[ItemT, Future[int]]] = deque()
        self._decoding: deque[tuple[ItemT, int, Future[Pixels] | RefineDetError]] = deque()
        self._longest, self._threads = batch_size + threads, threads
        self._bound = PIXELS_AHEAD if pixels_ahead is None else pixels_ahead
        self._held = 0
        """Pixels that are decoded, being decoded, or in the caller's batch."""
        self._in_batch = 0

    def next_batch(self, size: int) -> list[Decoded[ItemT]]:
        """The next images, at most ``size``; none when all are done. The batch before counts as given up."""
        self._held -= self._in_batch
        self._in_batch = 0
        batch: list[Decoded[ItemT]] = []
        while len(batch) < size:
            self._fill()
            if not self._decoding:
                break
            item, pixels, decoding = self._decoding.popleft()
            self._in_batch += pixels
            batch.append(_decoded(item, decoding))
        self._fill(wait=True)
        return batch

    def _fill(self, *, wait: bool = False) -> None:
        """Start what fits. Something is being decoded afterwards unless all is done or the batch takes all room.

        With ``wait`` the sizes of the next images are waited for, so that threads have work while the caller works.
        """
        while len(self._decoding) < self._longest:
            while len(self._counting) <= self._threads:
                for item in itertools.islice(self._items, 1):
                    self._counting.append((item, self.pool.submit(self._count, item)))
                    break
                else:
                    break
            if not self._counting:
                return
            item, counting = self._counting[0]
            if self._decoding and not wait and not counting.done():
                return
            pixels, error = 0, None
            try:
                pixels = counting.result()
            except RefineDetError as caught:
                error = caught
            if self._held and self._held + pixels > self._bound:
                return
            self._counting.popleft()
            self._held += pixels
            # A very large image is alone anyway; in this thread its memory is used again for the next of its kind.
            run = self.pool.submit if pixels <= self._bound else _run_here
            self._decoding.append((item, pixels, error or run(self._read, item)))


def _run_here(read: Callable[[ItemT], Pixels], item: ItemT) -> Future[Pixels] | RefineDetError:
    future: Future[Pixels] = Future()
    try:
        future.set_result(read(item))
    except RefineDetError as error:
        return error
    return future


def _decoded(item: ItemT, decoding: Future[Pixels] | RefineDetError) -> Decoded[ItemT]:
    if isinstance(decoding, RefineDetError):
        return Decoded(item, None, decoding)
    try:
        return Decoded(item, decoding.result())
    except RefineDetError as error:
        return Decoded(item, None, error)
