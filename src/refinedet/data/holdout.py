"""Dividing images into a part to train on and a part held out, for datasets without a split to evaluate on.

The division depends on the images, the share and the seed alone. It keeps together what shows the same thing: copies of
one image, and images whose names share a group. It keeps every class that it can on both sides.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from refinedet.data.problems import shorten
from refinedet.data.records import DetectionDataset
from refinedet.errors import RefineDetError, UsageError

SHARE, SEED = 0.15, 0
HELD_OUT = "held out"
"""Name of the split that ``hold_out`` makes."""
_COPY = re.compile(r"(?P<original>.+)\.rf\.[0-9A-Za-z]{8,}$")
"""Stem of an exported version of an image, as in "cat_jpg.rf.1f0c...": Roboflow names several versions of one so."""


@dataclass(frozen=True)
class Division:
    """A dataset in two parts."""

    train: DetectionDataset
    """To train on."""
    held_out: DetectionDataset
    """To evaluate on; at least one image."""
    seed: int
    """Which of the possible divisions it is."""

    def summary(self) -> str:
        """One line: ``"split: 51 train, 9 held out (seed 0, every class in both)"``."""
        train, held_out = (_counts(dataset) > 0 for dataset in (self.train, self.held_out))
        parts = []
        for where, missing in (("train", held_out & ~train), ("held out", train & ~held_out)):
            if missing.any():
                names = [self.train.class_names[label] for label in np.flatnonzero(missing)]
                parts.append(f"{shorten(names, 5)} not in {where}")
        classes = "; ".join(parts) or "every class in both"
        return f"split: {len(self.train)} train, {len(self.held_out)} held out (seed {self.seed}, {classes})"


def hold_out(
    dataset: DetectionDataset, share: float = SHARE, seed: int = SEED, group_by: str | None = None
) -> Division:
    """Divide a dataset by chance.

    Images stay together that have the same content, that are exported versions of one (``name.rf.<hash>.jpg``), or
    whose file names agree in ``group_by``. Of every class that occurs in two or more such groups, at least one goes to
    each side, as long as no more than twice the share is held out.

    Args:
        dataset: at least two images.
        share: of the images to hold out, between 0 and 1; at least one image is.
        seed: chooses one of the possible divisions; the order of the records does not matter.
        group_by: a regular expression that is searched for in each file name; images with the same match (of its first
            group, if it has one) are kept together. For frames of a video or images of one patient.

    Raises:
        UsageError: the expression is none, or matches no file name.
        RefineDetError: fewer than two images or groups, so nothing can be held out.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out must be between 0 and 1, not {share}")
    groups = _groups(dataset, group_by)
    if len(groups) < 2:
        what = f"its {len(dataset)} images belong together" if len(dataset) > 1 else f"it has {len(dataset)} image"
        raise RefineDetError(
            f"{dataset.path}: nothing can be held out: {what}; add images, or train without evaluation "
            f"(--evaluate-split none)"
        )
    chosen = _choose(dataset, groups, share, seed)
    held = sorted(index for number in chosen for index in groups[number])
    kept = sorted(set(range(len(dataset))) - set(held))
    return Division(dataset.subset(kept), replace(dataset.subset(held), split=HELD_OUT), seed)


def image_names(dataset: DetectionDataset) -> list[str]:
    """A name for each image that survives moving the dataset: its path below the folder, else the whole path."""
    folder = Path(os.path.abspath(dataset.path if dataset.path.is_dir() else dataset.path.parent))
    paths = [Path(os.path.abspath(record.image_path)) for record in dataset.records]
    return [(path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix() for path in paths]


def indices_by_names(dataset: DetectionDataset, names: Iterable[str]) -> list[int]:
    """The positions of the images of these ``image_names``, in their order.

    Raises:
        RefineDetError: one is not there.
    """
    index = {name: number for number, name in enumerate(image_names(dataset))}
    wanted = list(names)
    lost = [name for name in wanted if name not in index]
    if lost:
        raise RefineDetError(f"{dataset.path}: images that the run's lists name are missing: {shorten(lost, 3)}")
    return [index[name] for name in wanted]


def divide_by_names(dataset: DetectionDataset, held_out: Iterable[str], seed: int = SEED) -> Division:
    """Divide a dataset as it was divided before, by the ``image_names`` of the part that was held out.

    Raises:
        RefineDetError: a name is not among the images, or all are.
    """
    held = set(indices_by_names(dataset, held_out))
    kept = [number for number in range(len(dataset)) if number not in held]
    if not kept or not held:
        raise RefineDetError(f"{dataset.path}: {len(held)} of {len(dataset)} images are held out; nothing is left")
    return Division(dataset.subset(kept), replace(dataset.subset(sorted(held)), split=HELD_OUT), seed)


def _groups(dataset: DetectionDataset, group_by: str | None) -> list[list[int]]:
    """Indices of the images that stay together, in an order that does not depend on the order of the records."""
    keys = [_named_groups(dataset, group_by), _copies(dataset), _same_content(dataset)]
    parent = list(range(len(dataset)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for key in keys:
        first: dict[str, int] = {}
        for index, value in enumerate(key):
            if value is not None:
                parent[root(index)] = root(first.setdefault(value, index))
    members: dict[int, list[int]] = defaultdict(list)
    names = image_names(dataset)
    for index in sorted(range(len(dataset)), key=names.__getitem__):
        members[root(index)].append(index)
    return list(members.values())


def _named_groups(dataset: DetectionDataset, group_by: str | None) -> Sequence[str | None]:
    if group_by is None:
        return []
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UsageError(f"--group-by '{group_by}': not a regular expression ({error})") from None
    matches = [pattern.search(record.image_path.name) for record in dataset.records]
    if not any(matches):
        example = dataset.records[0].image_path.name if dataset.records else "no image"
        raise UsageError(f"--group-by '{group_by}': matches no file name, such as '{example}'")
    return [None if match is None else match[min(1, pattern.groups)] for match in matches]


def _copies(dataset: DetectionDataset) -> list[str | None]:
    matches = [(_COPY.match(record.image_path.stem), record.image_path.parent) for record in dataset.records]
    return [None if match is None else f"{folder}/{match['original']}" for match, folder in matches]


def _same_content(dataset: DetectionDataset) -> list[str | None]:
    """A hash of each file that shares its size with another."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, record in enumerate(dataset.records):
        try:
            by_size[record.image_path.stat().st_size].append(index)
        except OSError:
            continue  # reading the image will say what is wrong with it
    result: list[str | None] = [None] * len(dataset)
    for indices in by_size.values():
        if len(indices) > 1:
            for index in indices:
                result[index] = _file_hash(dataset[index].image_path)
    return result


def _file_hash(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _choose(dataset: DetectionDataset, groups: Sequence[Sequence[int]], share: float, seed: int) -> list[int]:
    """Numbers of the groups to hold out: the rarest classes first, each by its share, then any until it is enough.

    This is stratification for images with several labels: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
    Multi-Label Data", 2011, for two parts. Images without objects count as a class of their own.
    """
    presence = _presence(dataset, groups)
    sizes = np.array([len(group) for group in groups])
    target = max(1, round(share * int(sizes.sum())))
    limit = max(target, round(2 * share * int(sizes.sum())), 1)
    order = np.random.default_rng([seed, len(groups)]).permutation(len(groups))
    left = presence.sum(axis=0)
    demand = np.where(left >= 2, np.maximum(1, np.floor(share * left)), 0).astype(int)
    held = np.zeros(len(groups), dtype=np.bool_)
    met = np.zeros_like(demand)

    def take(number: int, most: int) -> bool:
        # A class that has one group left to train on keeps it.
        if held[number] or sizes[held].sum() + sizes[number] > most or held.sum() + 1 == len(groups):
            return False
        if (left[presence[number]] <= 1).any():
            return False
        held[number] = True
        left[presence[number]] -= 1
        met[presence[number]] += 1
        return True

    for label in np.argsort(left, kind="stable"):
        if met[label] >= demand[label]:
            continue
        candidates = order[presence[order, label]]
        if demand[label] == 1:
            # Where classes are rare, one image that shows several of them saves others for training.
            unmet = (met == 0) & (demand == 1)
            candidates = candidates[np.argsort(-presence[np.ix_(candidates, unmet)].sum(axis=1), kind="stable")]
        for number in candidates:
            if met[label] >= demand[label]:
                break
            take(int(number), limit)
    for number in order:
        if sizes[held].sum() >= target:
            break
        take(int(number), limit if not held.any() else target)
    if not held.any():  # every group holds the last of some class
        held[order[np.argmin(sizes[order])]] = True
    return np.flatnonzero(held).tolist()


def _presence(dataset: DetectionDataset, groups: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """(groups, C + 1): whether an image of the group shows the class, and last whether one shows no object."""
    count = len(dataset.class_names)
    result = np.zeros((len(groups), count + 1), dtype=np.bool_)
    for number, group in enumerate(groups):
        for index in group:
            labels = dataset[index].labels[~dataset[index].crowd]
            result[number, labels if len(labels) else count] = True
    return result


def _counts(dataset: DetectionDataset) -> npt.NDArray[np.int64]:
    """(C,) objects of each class, crowds not counted."""
    labels = [record.labels[~record.crowd] for record in dataset.records]
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(dataset.class_names))
