"""How the detections of a report were made, as a dataclass that can be saved as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from refinedet.config import ModelConfig
from refinedet.dataclass_json import to_dict
from refinedet.evaluation.detector import Detector
from refinedet.provenance import Provenance


@dataclass(frozen=True)
class LeftOut:
    """Names of classes that were left out because only shared classes were measured."""

    model: tuple[str, ...] = ()
    """Classes of the model that the data lacks."""
    data: tuple[str, ...] = ()
    """Classes of the data that the model lacks."""

    def __str__(self) -> str:
        """Such as ``1 of the model, 2 of the data``."""
        return f"{len(self.model)} of the model, {len(self.data)} of the data"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the detections of a report were made; None and empty values stand for what is not known."""

    model: ModelConfig | None = None
    """The model's config."""
    weights: str = ""
    """Name of the model or folder that was evaluated."""
    score_threshold: float | None = None
    """Detections that score less do not take part in AP."""
    batch_size: int | None = None
    """Images that went through the network at once."""
    limit: int | None = None
    """Only the first so many images of the split were taken."""
    multi_scale: bool = False
    """Whether the images were tested at several scales."""
    passes: tuple[str, ...] = ()
    """The passes of testing at several scales."""
    left_out: LeftOut | None = None
    """Set where only the classes that model and data share were measured."""
    iteration: int | None = None
    """Of the training, where it was evaluated on the way."""
    seconds_per_image: float | None = None
    """Wall time from the file to the detections."""
    run: str = ""
    """The run folder of the weights, where it is known."""
    trained_on: int | None = None
    """How many of the images the run was trained on; None where that is not known."""
    repaired: str = ""
    """What reading the data clipped, dropped, filled in or left out, in words."""
    data_digest: str = ""
    """SHA-256 over names, sizes, boxes and labels of the data."""
    provenance: Provenance = field(default_factory=Provenance)
    """Program, machine, command and time."""

    @classmethod
    def of(cls, detector: Detector, threshold: float | None = None) -> EvaluationSettings:
        """What a detector says of itself, with the least score of its detections if that is not the model's own."""
        own = detector.config.inference.score_threshold
        return cls(
            model=detector.config,
            score_threshold=own if threshold is None else threshold,
            provenance=Provenance.now(getattr(detector, "device", "")),
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``dataclass_json.from_dict(EvaluationSettings, ...)`` gives it back."""
        return to_dict(self)
