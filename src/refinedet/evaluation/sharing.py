"""A model on data of other classes: the classes that both have, and data and detections of just these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from refinedet.data import DetectionDataset
from refinedet.data.classes import match_classes
from refinedet.detections import Detections
from refinedet.errors import RefineDetError
from refinedet.evaluation.settings import LeftOut
from refinedet.text import printable


@dataclass(frozen=True, eq=False)
class SharedClasses:
    """The classes that a model and data have in common; made by ``share_classes``."""

    dataset: DetectionDataset
    """The data with these classes only, by the data's names in the model's order."""
    new_label: npt.NDArray[np.int64]
    """(C,) label of each class of the model in that data, -1 if the data lacks it."""
    left_out: LeftOut
    """What only one of them has."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The data's names of the shared classes."""
        return self.dataset.class_names

    def only_shared(self, detections: Detections) -> Detections:
        """Those of the model's detections that are of a shared class, with the labels of the data."""
        kept = detections.filter(labels=np.flatnonzero(self.new_label >= 0).tolist())
        return replace(kept, labels=self.new_label[kept.labels], class_names=self.class_names)


def share_classes(class_names: Sequence[str], dataset: DetectionDataset) -> SharedClasses:
    """Prepare a model and data of different classes for an evaluation of those that both have.

    Classes are equal by name but for case, spaces, underscores and hyphens; the words of VOC and COCO for the same
    thing count as equal (airplane, aeroplane). Objects and detections of any other class are left out.

    Args:
        class_names: of the model.
        dataset: the data with all of its classes.

    Raises:
        RefineDetError: they have no class in common.
    """
    matched = match_classes(class_names, dataset.class_names)
    shared = list(dict.fromkeys(label for label in matched if label is not None))
    if not shared:
        raise RefineDetError(
            f"{dataset.path}: the model has {list_classes(class_names)}, the data has "
            f"{list_classes(dataset.class_names)}; they share none, so nothing can be measured"
        )
    new_label = [-1 if label is None else shared.index(label) for label in matched]
    left_out = LeftOut(
        model=tuple(name for name, label in zip(class_names, matched, strict=True) if label is None),
        data=tuple(name for label, name in enumerate(dataset.class_names) if label not in shared),
    )
    return SharedClasses(dataset.only_classes(shared), np.array(new_label, dtype=np.int64), left_out)


def check_class_names(dataset: DetectionDataset, class_names: Sequence[str]) -> None:
    """Raise RefineDetError if data and model differ in their classes or the order of these; both lists are named."""
    of_data, of_model = tuple(dataset.class_names), tuple(class_names)
    if of_data == of_model:
        return
    shared = set(of_data) & set(of_model)
    used = {of_data[label] for record in dataset.records for label in record.labels.tolist()}
    if used <= set(of_model):
        fix = "open the data with class_names=model.class_names, every object of it is of a class of the model"
    else:
        fix = "evaluate a model that was trained on the classes of the data"
        if shared:
            fix += ", or measure those that both have (--shared-classes)"
    # What only one of them has comes first, or a long list would hide it.
    model_list, data_list = (list_classes(sorted(names, key=shared.__contains__)) for names in (of_model, of_data))
    raise RefineDetError(f"{dataset.path}: the model has {model_list}, the data has {data_list}; {fix}")


def list_classes(names: Sequence[str], shown: int = 6) -> str:
    """Such as ``3 classes (a, b, c)``."""
    listed = ", ".join(printable(name) for name in names[:shown]) + (", ..." if len(names) > shown else "")
    return f"{len(names)} class{'es' * (len(names) != 1)} ({listed})"
