"""A worker of a batch prediction: it turns paths into rows, as a process of its own or as an actor of Ray.

``python -m refinedet.bulk.worker`` reads pickled settings and then lists of paths from standard input, and answers on
standard output. It ends when its input does, so that nothing is left when the command that started it is killed.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from typing import Any

from refinedet.bulk.parts import failed_row, found_row, table_of
from refinedet.errors import RefineDetError
from refinedet.images import describe
from refinedet.loading import load_detector
from refinedet.prediction import predict_ahead
from refinedet.sources import OneImage


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know."""

    weights: str
    """What ``load_detector`` takes."""
    digest: str
    """Of the weights, for the rows."""
    device: str
    threads: int
    """CPU threads of a worker."""
    threshold: float | None
    batch_size: int
    max_pixels: int | None


class Worker:
    """A loaded detector.

    Args:
        settings: see there.

    Raises:
        RefineDetError: as ``load_detector``.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._detector = load_detector(settings.weights, device=settings.device, threads=settings.threads)

    def detect(self, paths: list[str]) -> Any:
        """A ``pyarrow.Table`` with a row for each path, in their order; an image that fails is a row with its error."""
        try:
            return table_of(self._rows(paths))
        except RefineDetError as error:  # not of reading an image, but of the detector with one of them
            if len(paths) == 1:
                return table_of([failed_row(paths[0], str(error), self._settings.digest)])
            return table_of([row for path in paths for row in self.detect([path]).to_pylist()])

    def _rows(self, paths: list[str]) -> list[dict[str, Any]]:
        settings = self._settings
        rows: dict[str, dict[str, Any]] = {}

        def failed(image: OneImage, error: RefineDetError) -> None:
            rows[image.file or ""] = failed_row(image.file or "", str(error), settings.digest)

        images = [OneImage(path, describe(path), path, settings.max_pixels) for path in paths]
        for found, _ in predict_ahead(
            self._detector,
            images,
            threshold=settings.threshold,
            batch_size=settings.batch_size,
            max_pixels=settings.max_pixels,
            on_error=failed,
        ):
            rows[found.source or ""] = found_row(found, settings.digest)
        return [rows[path] for path in paths]


def main() -> None:
    """Answer on standard output what comes in on standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    try:
        worker = Worker(pickle.load(sys.stdin.buffer))
        answer: object = None
    except RefineDetError as error:
        answer = error
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        if isinstance(answer, Exception):
            return
        try:
            paths = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = worker.detect(paths)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
