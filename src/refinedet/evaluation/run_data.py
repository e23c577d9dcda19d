"""The images of a run: those that it trained on, and those that it held out.

They follow from the run folder: its config names the data and the splits; where images were held out of undivided data,
``split/train.txt`` and ``split/held_out.txt`` list them, one name a line, relative to the folder of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import refinedet.weights
from refinedet.data import DetectionDataset
from refinedet.data.layouts import open_joined
from refinedet.data.problems import shorten
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.report import Metric
from refinedet.files import user_path
from refinedet.training.run import (
    BEST_FOLDER,
    CONFIG_FILE,
    HELD_OUT_LIST,
    LAST_FOLDER,
    TRAIN_LIST,
    RunConfig,
    is_run,
    read_run_config,
)

_HELD_OUT = "held out"


def find_run(weights: str | Path) -> Path | None:
    """The run folder that the weights are, or lie in (best/, last/); None if they are no run's."""
    # A bundled model goes before a folder of the same name.
    if refinedet.weights.folder_of(str(weights)) is not None:
        return None
    path = user_path(weights)
    folder = path.parent if path.name in (BEST_FOLDER, LAST_FOLDER) else path
    return folder if is_run(folder) else None


@dataclass(frozen=True)
class RunData:
    """What a run folder says about its data."""

    folder: Path
    """The run folder."""
    config: RunConfig
    """Its config.json."""

    @classmethod
    def of(cls, folder: Path) -> RunData:
        """Read a run folder.

        Raises:
            UsageError: it is none.
            RefineDetError: its config cannot be read.
        """
        if not is_run(folder):
            raise UsageError(f"{folder}: no run folder ({CONFIG_FILE} of a training is missing)")
        return cls(folder, read_run_config(folder / CONFIG_FILE))

    @property
    def metric(self) -> Metric:
        """The figure by which the run chose its best weights."""
        return self.config.preset.train.metric

    def held_out(self) -> DetectionDataset:
        """The images that the run evaluated on.

        Raises:
            UsageError: it evaluated on none.
            RefineDetError: the data cannot be read, or has lost some of them.
        """
        split = self.config.preset.train.evaluate_split
        if split in ("", "none"):
            raise UsageError(f"{self.folder}: this run held no images out; name the data to evaluate on")
        if split == _HELD_OUT:
            return replace(self._listed(HELD_OUT_LIST), split=_HELD_OUT)
        return self._open(self.config.evaluate_data or self.config.data, split)

    def train(self) -> DetectionDataset:
        """The images that the run trained on.

        Raises:
            RefineDetError: the data cannot be read.
        """
        if (self.folder / TRAIN_LIST).is_file():
            return self._listed(TRAIN_LIST)
        return self._open(self.config.data, self.config.preset.train.train_split)

    def count_trained_on(self, dataset: DetectionDataset, indices: Iterable[int]) -> int | None:
        """How many of some images the run trained on; None if its data is not there any more."""
        try:
            trained_on = {os.path.realpath(record.image_path) for record in self.train().records}
        except RefineDetError:
            return None
        return sum(os.path.realpath(dataset[index].image_path) in trained_on for index in indices)

    def _open(self, paths: Sequence[str], split: str) -> DetectionDataset:
        classes = self.config.classes
        allowed = self.config.preset.train.allow_outside
        if not classes:
            return open_joined(paths, split, self.config.class_names, allow_outside=allowed)
        # Only some of the data's classes were trained on.
        dataset = open_joined(paths, split, allow_outside=allowed)
        return dataset.only_classes([dataset.class_names.index(name) for name in classes])

    def _listed(self, name: str) -> DetectionDataset:
        """The images of a list in the run folder."""
        path = self.folder / name
        try:
            lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError as error:
            raise RefineDetError(f"{path}: cannot be read ({error.strerror}); it lists images of the run") from None
        dataset = self._open(self.config.data, self.config.preset.train.train_split)
        folder = Path(os.path.abspath(dataset.path if dataset.path.is_dir() else dataset.path.parent))
        index = {os.path.abspath(record.image_path): number for number, record in enumerate(dataset.records)}
        wanted = [line for line in lines if line]
        lost = [line for line in wanted if str(folder / line) not in index]
        if lost:
            raise RefineDetError(f"{dataset.path}: images that {path} lists are missing: {shorten(lost, 3)}")
        return dataset.subset(index[str(folder / line)] for line in wanted)
