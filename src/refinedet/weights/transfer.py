"""Starting a training from a detector of other classes: what the two have in common is carried over, by class name.

Source: official examples/convert_model_320.ipynb ("subsampling the parameters" of a COCO model for PASCAL VOC): only
the ODM's classifiers change; for each anchor, the rows of the wanted classes and of the background are copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from refinedet.config import ModelConfig
from refinedet.data.classes import match_classes
from refinedet.errors import UsageError

ADOPTED = (
    "mean",
    "std",
    "channel_order",
    "resize",
    "offset_std",
    "backbone_layout",
    "fc6_dilation",
    "tcb_deconv_kernel",
)
"""Fields of the config that belong to weights and have no shape to tell them by."""


@dataclass(frozen=True)
class Transfer:
    """What became of the classes."""

    carried: tuple[tuple[str, str], ...]
    """Pairs (class of the new model, class of the old one whose rows it got), in label order."""
    new: tuple[str, ...]
    """Classes that start from random numbers."""
    dropped: tuple[str, ...]
    """Classes of the old model that the new one does not have."""

    untrained: tuple[str, ...] = ()
    """Parts of the old model that were random themselves, so that no class could be carried over."""

    def summary(self) -> str:
        """One line: which classes were carried over, and which start from random weights."""
        if self.untrained:
            return f"no classes carried over: the model to start from has random {', '.join(self.untrained)}"
        names = ", ".join(name if name == old else f"{name} (from {old})" for name, old in self.carried)
        line = f"{len(self.carried)} classes carried over" + (f": {names}" if names else "")
        line += f"; {len(self.new)} start from random weights" + (f": {', '.join(self.new)}" if self.new else "")
        return line


def is_classifier(name: str) -> bool:
    """Whether a tensor of that name has rows per class: the last convolutions of the ODM's classifiers."""
    return name.startswith("odm.") and ".logits." in name


def transfer_classes(
    state: Mapping[str, Tensor],
    start_state: Mapping[str, Tensor],
    names: Sequence[str],
    start_names: Sequence[str],
    untrained: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], Transfer]:
    """The weights of a detector of ``start_names`` for a network of ``names``.

    Args:
        state: tensors of the new network; read for classes without a counterpart and for batch norm's counters,
            which frozen norms do not have.
        start_state: tensors of the old one.
        names: classes of the new network, in label order.
        start_names: classes of the old one, in label order.
        untrained: parts of the old one that are random, as its config.json says; then no class is carried over.

    Returns:
        New tensors for every name of ``start_state``, and what became of the classes. Rows of a classifier are anchor
        by anchor, each with the classes in label order and the background last, which is carried over as well.
    """
    labels = [None] * len(names) if untrained else match_classes(names, start_names)
    result = {name: tensor.clone() for name, tensor in start_state.items()}
    for name, own in state.items():
        if name.endswith("num_batches_tracked"):
            result.setdefault(name, own.clone())
        if not is_classifier(name) or name not in start_state:
            continue
        old = start_state[name].reshape(-1, len(start_names) + 1, *own.shape[1:])
        rows = own.clone().reshape(-1, len(names) + 1, *own.shape[1:])
        if len(old) != len(rows):
            continue  # another number of anchors per cell; the caller finds the shape wrong
        for label, old_label in enumerate((*labels, len(start_names))):
            if old_label is not None:
                rows[:, label] = old[:, old_label]
        result[name] = rows.reshape(own.shape)
    for name in [n for n in result if n.endswith("num_batches_tracked") and n not in state]:
        del result[name]
    carried = tuple((name, start_names[label]) for name, label in zip(names, labels, strict=True) if label is not None)
    new = tuple(name for name, label in zip(names, labels, strict=True) if label is None)
    dropped = tuple(name for label, name in enumerate(start_names) if label not in labels)
    return result, Transfer(carried, new, dropped, untrained)


def changed_fields(before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    """Names of the fields in which two configs differ."""
    names = (entry.name for entry in dataclasses.fields(before))
    return tuple(name for name in names if getattr(before, name) != getattr(after, name))


def adopt_config(config: ModelConfig, start: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """``config`` with the input and the form of the network that the weights of ``start`` were made for.

    Returns:
        The config, and the names of the fields that changed.

    Raises:
        UsageError: they are of different backbones.
    """
    if config.backbone != start.backbone:
        raise UsageError(
            f"the model to start from has the backbone {start.backbone}, the one to train {config.backbone}; choose a "
            f"preset of the same backbone"
        )
    changed = tuple(name for name in ADOPTED if getattr(config, name) != getattr(start, name))
    return dataclasses.replace(config, **{name: getattr(start, name) for name in changed}), changed
