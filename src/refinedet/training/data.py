"""What a training trains and evaluates on: splits that fit the data, images held out where it has none for evaluation.

``open_training_data`` answers it for a new training and writes the lists of a division into the run folder;
``reopen_training_data`` reads them again, also where the data has moved.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from refinedet.config import TrainConfig
from refinedet.data.holdout import HELD_OUT, Division, divide_by_names, hold_out, image_names
from refinedet.data.layouts import list_splits, open_joined
from refinedet.data.problems import UNREADABLE, Problem, shorten
from refinedet.data.records import DetectionDataset
from refinedet.data.splits import choose_split
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import make_folder, write_text
from refinedet.training.run import HELD_OUT_LIST, TRAIN_LIST, RunConfig

NO_SPLIT = ("", "none")
"""Values of ``evaluate_split`` that evaluate on nothing."""
_USUAL = ("train", "val", "trainval", "test")
"""Splits that presets name: in data without them others are taken, unless the user asked for them himself."""


@dataclass(frozen=True)
class DataChoice:
    """The data of a training as its user gave it."""

    paths: tuple[Path, ...]
    """Datasets to train on, at least one."""
    evaluate_paths: tuple[Path, ...] = ()
    """Datasets to evaluate on; empty means those of ``paths``."""
    class_names: tuple[str, ...] | None = None
    """All names, in label order; None takes them from the data."""
    classes: tuple[str, ...] | None = None
    """The classes to train on; None trains on all."""
    group_by: str | None = None
    """See ``holdout.hold_out``."""
    skip_broken: bool = False
    """Go on without images and annotations that cannot be read."""
    given: frozenset[str] = frozenset()
    """Those of "train_split" and "evaluate_split" that the user named, which are then taken as they are."""
    allow_outside: bool = False
    """Whether files of the data may name images outside of its folder."""
    prefer_trainval: bool = False
    """Train on "trainval" and evaluate on "test" where the data has both."""

    @classmethod
    def of_run(cls, config: RunConfig) -> DataChoice:
        """The data of a run."""
        return cls(
            paths=tuple(map(Path, config.data)),
            evaluate_paths=tuple(map(Path, config.evaluate_data)),
            # With some classes left out, the names of the others are those of the data.
            class_names=config.class_names if config.classes is None else None,
            classes=config.classes,
            group_by=config.group_by,
            skip_broken=config.skip_broken,
            allow_outside=config.preset.train.allow_outside,
        )


@dataclass
class TrainingData:
    """The images of a training."""

    train: DetectionDataset
    """To train on."""
    evaluation: DetectionDataset | None
    """To evaluate on; None evaluates on nothing."""
    train_split: str
    """Split of ``train``, which opens it again; of a division, the split that was divided."""
    evaluate_split: str
    """Split of ``evaluation``; ``"held out"`` for a division, ``"none"`` for nothing."""
    division: Division | None = None
    """How the images were divided, if they were."""
    notes: list[str] = field(default_factory=list)
    """Lines that tell the user what was left out or chosen."""

    def save_lists(self, run_folder: Path) -> None:
        """Write the names of the images of both parts of a division into the run folder, one a line.

        Raises:
            RefineDetError: the files cannot be written.
        """
        if self.division is not None:
            for name, part in ((TRAIN_LIST, self.train), (HELD_OUT_LIST, self.division.held_out)):
                make_folder((run_folder / name).parent)
                write_text(run_folder / name, "".join(f"{image}\n" for image in image_names(part)))


def open_training_data(choice: DataChoice, settings: TrainConfig) -> TrainingData:
    """Open what a training needs.

    The splits are those of ``settings`` where the data has them. Data without splits is divided (``holdout.hold_out``),
    and so is the training split of data that has no other to evaluate on.

    Raises:
        UsageError: a named split or class is not there, or the data is none.
        RefineDetError: a faulty file, or nothing to learn from.
    """
    available = [list_splits(path) for path in choice.paths]
    train_split = _train_split(choice, settings, available)
    notes: list[str] = []
    train, choice = open_train(choice, train_split, notes)
    if "evaluate_split" in choice.given and settings.evaluate_split in NO_SPLIT:
        return TrainingData(train, None, train_split, "none", notes=notes)
    evaluate_split = _evaluate_split(choice, settings, train_split)
    if evaluate_split is None:
        division = hold_out(train, group_by=choice.group_by)
        notes.append(division.summary())
        return TrainingData(division.train, division.held_out, train_split, HELD_OUT, division, notes)
    if evaluate_split in NO_SPLIT:
        return TrainingData(train, None, train_split, "none", notes=notes)
    evaluation = open_evaluation(choice, evaluate_split, notes)
    return TrainingData(train, evaluation, train_split, evaluate_split, notes=notes)


def reopen_training_data(choice: DataChoice, settings: TrainConfig, run_folder: Path) -> TrainingData:
    """Open the data of a run again: the splits that its settings name, and its division by the lists it wrote.

    Raises:
        RefineDetError: the data or a list does not fit the run any more.
    """
    notes: list[str] = []
    train, choice = open_train(choice, settings.train_split, notes)
    if settings.evaluate_split in NO_SPLIT:
        return TrainingData(train, None, settings.train_split, "none", notes=notes)
    if settings.evaluate_split == HELD_OUT:
        division = divide_by_names(train, read_list(run_folder / HELD_OUT_LIST))
        return TrainingData(division.train, division.held_out, settings.train_split, HELD_OUT, division, notes)
    evaluation = open_evaluation(choice, settings.evaluate_split, notes)
    return TrainingData(train, evaluation, settings.train_split, settings.evaluate_split, notes=notes)


def open_train(choice: DataChoice, split: str, notes: list[str]) -> tuple[DetectionDataset, DataChoice]:
    """The images to train on, and the choice with the names of all classes; ``notes`` gets what was left out.

    Raises:
        UsageError: no such data, split or class.
        RefineDetError: a faulty file.
    """
    whole = _open(choice, choice.paths, split, notes)
    return _only(whole, choice.classes, notes), replace(choice, class_names=whole.class_names)


def open_evaluation(choice: DataChoice, split: str, notes: list[str]) -> DetectionDataset:
    """The images of a split to evaluate on; arguments and errors are those of ``open_train``."""
    return _only(_open(choice, choice.evaluate_paths or choice.paths, split, notes), choice.classes, [])


def read_list(path: Path) -> list[str]:
    """The ``image_names`` in one of the lists that ``TrainingData.save_lists`` wrote.

    Raises:
        RefineDetError: it cannot be read.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line]
    except OSError as error:
        raise RefineDetError(f"{path}: cannot be read ({error.strerror}); it lists images of the run") from None


def _train_split(choice: DataChoice, settings: TrainConfig, available: Sequence[tuple[str, ...]]) -> str:
    """Split to train on; "all" of data without splits."""
    asked = settings.train_split
    if "train_split" in choice.given or asked not in _USUAL:
        return asked
    if not any(available):
        return "all"
    if choice.prefer_trainval and all({"trainval", "test"} <= set(names) for names in available):
        return "trainval"
    for name in (asked, "train", "trainval"):
        name_there = _find(name, choice.paths, available)
        if name_there is not None:
            return name_there
    return asked  # opening it says what there is


def _evaluate_split(choice: DataChoice, settings: TrainConfig, train_split: str) -> str | None:
    """Split to evaluate on; None if images have to be held out for it."""
    asked = settings.evaluate_split
    if "evaluate_split" in choice.given or asked not in (*_USUAL, *NO_SPLIT) or asked == settings.train_split:
        if asked in (train_split, settings.train_split) and not choice.evaluate_paths:
            raise UsageError(
                f"'{asked}' is the training split; evaluate on another, or on none with --evaluate-split none"
            )
        return asked
    if asked in NO_SPLIT and not choice.evaluate_paths:
        return "none"
    paths = choice.evaluate_paths or choice.paths
    available = [list_splits(path) for path in paths]
    if not any(available):
        return "all" if choice.evaluate_paths else None
    # "trainval" holds the images of train and val.
    names = ("test",) if train_split == "trainval" and not choice.evaluate_paths else ("val", "test")
    for name in dict.fromkeys((asked, *names)):
        name_there = _find(name, paths, available)
        if name_there is None or (name_there in ("train", train_split) and not choice.evaluate_paths):
            continue
        if choice.evaluate_paths or train_split != "trainval" or name_there not in ("val", "valid"):
            return name_there
    return "all" if choice.evaluate_paths else None


def _find(name: str, paths: Sequence[Path], available: Sequence[tuple[str, ...]]) -> str | None:
    """The split that all datasets have for that name; None if one has not."""
    try:
        there = {choose_split(path, name, splits) for path, splits in zip(paths, available, strict=True)}
    except UsageError:
        return None
    return there.pop() if len(there) == 1 else name


def _open(choice: DataChoice, paths: Sequence[Path], split: str, notes: list[str]) -> DetectionDataset:
    dataset = open_joined(paths, split, choice.class_names, allow_outside=choice.allow_outside)
    return _without_broken(dataset, notes) if choice.skip_broken else dataset


def _without_broken(dataset: DetectionDataset, notes: list[str]) -> DetectionDataset:
    """The images that can be read, found by reading all of them once; a line for each of the others."""

    def failure(index: int) -> str | None:
        try:
            dataset.load_image(index)
        except RefineDetError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        failures = list(pool.map(failure, range(len(dataset))))
    bad = [(record.image_path, text) for record, text in zip(dataset.records, failures, strict=True) if text]
    if not bad:
        return dataset
    notes.append(f"left out: {len(bad)} of {len(dataset)} images, which cannot be read (--skip-broken)")
    notes += [f"  {text}" for _, text in bad]
    readable = dataset.subset(index for index, text in enumerate(failures) if text is None)
    if not readable.records:
        raise RefineDetError(f"{dataset.path}: none of its images can be read")
    readable.problems += [Problem(path, text, fatal=False, kind=UNREADABLE) for path, text in bad]
    return readable


def _only(dataset: DetectionDataset, classes: Collection[str] | None, notes: list[str]) -> DetectionDataset:
    """The dataset with the objects of some classes only."""
    if classes is None:
        return dataset
    unknown = [name for name in classes if name not in dataset.class_names]
    if unknown or not classes or len(set(classes)) < len(classes):
        wrong = f"no class '{unknown[0]}'" if unknown else "each class once, and at least one"
        raise UsageError(f"--classes: {wrong}; the data has {shorten(dataset.class_names, 20)}")
    chosen = dataset.only_classes([dataset.class_names.index(name) for name in classes])
    others = [name for name in dataset.class_names if name not in classes]
    if others:
        objects = sum(len(record.labels) for record in dataset.records) - sum(len(r.labels) for r in chosen.records)
        notes.append(f"left out: {objects} objects of {len(others)} other classes ({shorten(others)})")
    return chosen
