"""RefineDet: a single-shot refinement detector (Zhang et al., CVPR 2018) to train, evaluate and use.

The public names are imported on first use, so that ``import refinedet`` and ``refinedet --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refinedet.bulk.parts import read_batch
    from refinedet.bulk.run import batch
    from refinedet.deploy.export import export
    from refinedet.detections import Detections
    from refinedet.detector import RefineDet
    from refinedet.errors import RefineDetError, UsageError
    from refinedet.evaluation.evaluate import evaluate
    from refinedet.presets import PRESETS
    from refinedet.training.train import train
    from refinedet.video import Video

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Detections",
    "RefineDet",
    "RefineDetError",
    "UsageError",
    "Video",
    "batch",
    "evaluate",
    "export",
    "read_batch",
    "train",
]

_HOMES = {
    "PRESETS": "refinedet.presets",
    "Detections": "refinedet.detections",
    "RefineDet": "refinedet.detector",
    "RefineDetError": "refinedet.errors",
    "UsageError": "refinedet.errors",
    "batch": "refinedet.bulk.run",
    "evaluate": "refinedet.evaluation.evaluate",
    "export": "refinedet.deploy.export",
    "read_batch": "refinedet.bulk.parts",
    "Video": "refinedet.video",
    "train": "refinedet.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
