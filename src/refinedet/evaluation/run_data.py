"""The images of a run: those that it trained on, and those that it held out.

They follow from the run folder: its config names the data and the splits; where images were held out of undivided data,
``split/train.txt`` and ``split/held_out.txt`` list them, one name a line, relative to the folder of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import refinedet.weights
from refinedet.data import DetectionDataset
from refinedet.data.holdout import HELD_OUT, indices_by_names
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.report import Metric
from refinedet.files import user_path
from refinedet.training.data import NO_SPLIT, DataChoice, open_evaluation, open_train, read_list
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


def find_run(weights: str | Path) -> Path | None:
    """The run folder that the weights are, or lie in (best/, last/); None if they are no run's."""
    # A bundled model goes before a folder of the same name.
    if refinedet.weights.folder_of(str(weights)) is not None:
        return None
    path = user_path(weights)
    folder = path.parent if path.name in (BEST_FOLDER, LAST_FOLDER) else path
    return folder if is_run(folder) else None


def count_shared(trained_on: DetectionDataset, dataset: DetectionDataset, indices: Iterable[int]) -> int:
    """How many of some images of ``dataset`` are images of ``trained_on``, wherever links lead."""
    paths = {os.path.realpath(record.image_path) for record in trained_on.records}
    return sum(os.path.realpath(dataset[index].image_path) in paths for index in indices)


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
        if split in NO_SPLIT:
            raise UsageError(f"{self.folder}: this run held no images out; name the data to evaluate on")
        if split == HELD_OUT:
            return replace(self._listed(HELD_OUT_LIST), split=HELD_OUT)
        return open_evaluation(DataChoice.of_run(self.config), split, [])

    def train(self) -> DetectionDataset:
        """The images that the run trained on; with ``--skip-broken``, those that it left out too.

        Raises:
            RefineDetError: the data cannot be read.
        """
        if (self.folder / TRAIN_LIST).is_file():
            return self._listed(TRAIN_LIST)
        choice = replace(DataChoice.of_run(self.config), skip_broken=False)  # else all are decoded
        return open_train(choice, self.config.preset.train.train_split, [])[0]

    def count_trained_on(self, dataset: DetectionDataset, indices: Iterable[int]) -> int | None:
        """How many of some images the run trained on; None if its data is not there any more."""
        try:
            return count_shared(self.train(), dataset, indices)
        except RefineDetError:
            return None

    def _listed(self, name: str) -> DetectionDataset:
        """The images of a list in the run folder."""
        choice = replace(DataChoice.of_run(self.config), skip_broken=False)  # broken ones are in no list
        whole, _ = open_train(choice, self.config.preset.train.train_split, [])
        return whole.subset(indices_by_names(whole, read_list(self.folder / name)))
