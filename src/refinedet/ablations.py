"""Table 2 of the paper: four variants trained and evaluated under equal conditions.

The paper takes its parts away one after the other, so each row of ``VARIANTS`` lacks what the row before it lacks.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refinedet.config import ModelConfig, Preset
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import read_json, user_path
from refinedet.training.run import REPORT_FOLDER
from refinedet.training.train import train

_LOG = logging.getLogger(__name__)
TABLE_FILE = "table.md"
TABLE_SIGNATURE = "table written by refinedet"
"""Stands in ``TABLE_FILE``, so that a later table may replace it."""


@dataclass(frozen=True)
class Variant:
    """A column of Table 2."""

    name: str
    """Its run folder."""
    changes: dict[str, Any]
    """Fields of the model that differ from the full one."""
    paper: float
    """mAP in percent on VOC 2007 test, trained on 07+12 for 120k iterations."""


VARIANTS = (
    Variant("full", {}, 80.0),
    Variant("no-filtering", {"negative_threshold": 1.0}, 79.5),
    Variant("one-step", {"negative_threshold": 1.0, "two_step": False}, 77.3),
    Variant("no-tcb", {"negative_threshold": 1.0, "two_step": False, "tcb": False}, 76.2),
)


def ablate(
    preset: Preset,
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    init_weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """Train and evaluate the variants one after the other; what is done already is not done again.

    All have the preset's schedule, data, seed and backbone weights. A run that was stopped continues where it was.

    Args:
        preset: model and training of the full variant; needs a split to evaluate on.
        data: as for ``train``.
        out: folder of the four run folders and the table.
        init_weights: as for ``train``.
        class_names: as for ``train``.
        device: "cpu", "cuda" or "auto".

    Returns:
        mAP in 0..1 by the variant's name.

    Raises:
        UsageError: no split to evaluate on, or ``out`` holds runs of other settings.
    """
    presets = {
        variant.name: dataclasses.replace(preset, model=variant_of(preset.model, variant)) for variant in VARIANTS
    }
    return train_variants(
        presets, data, out=user_path(out), init_weights=init_weights, class_names=class_names, device=device
    )


def train_variants(
    presets: Mapping[str, Preset],
    data: str | Path | Sequence[str | Path],
    *,
    out: Path,
    init_weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """Train and evaluate presets one after the other, each in a folder of its name, and say which one runs.

    Called again, it continues the run that was stopped; those that are finished are only looked up.

    Returns:
        mAP in 0..1 by name.

    Raises:
        UsageError: a preset has no split to evaluate on, or ``out`` holds runs of other settings.
    """
    if any(preset.train.evaluate_split in ("", "none") for preset in presets.values()):
        raise UsageError("variants are compared by a figure: give a split to measure them on with --evaluate-split")
    figures: dict[str, float] = {}
    for number, (name, preset) in enumerate(presets.items(), 1):
        if os.environ.get("RANK", "0") == "0":
            _LOG.info("variant %s (%d of %d)", name, number, len(presets))
        if preset.train.compile:
            torch.compiler.reset()  # or the eighth network would run uncompiled
        run = train(preset, data, out=out / name, init_weights=init_weights, class_names=class_names, device=device)
        figures[name] = recorded_figure(run.folder) if run.report is None else run.report["mAP"]
    return figures


def recorded_figure(folder: Path) -> float:
    """Figure of a finished run, mAP in 0..1.

    Raises:
        RefineDetError: its report cannot be read.
    """
    path = folder / REPORT_FOLDER / "report.json"
    try:
        return float(read_json(path)["figures"]["mAP"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RefineDetError):
            raise
        raise RefineDetError(f"{path}: not the report of a training; remove it and train again") from None


def variant_of(model: ModelConfig, variant: Variant) -> ModelConfig:
    """The model of that variant; attention goes with the blocks it is part of."""
    changes = dict(variant.changes)
    if not changes.get("tcb", True):
        changes["tcb_attention"] = False
    return dataclasses.replace(model, **changes)


def table(figures: Mapping[str, float], preset: Preset) -> str:
    """Table 2 as Markdown: the paper's figures and those measured here, with the budget of these.

    Args:
        figures: what ``ablate`` returned.
        preset: what it trained.
    """
    train = preset.train
    rows = [
        ("negative anchor filtering", [v.changes.get("negative_threshold", 0.0) < 1.0 for v in VARIANTS]),
        ("two-step cascaded regression", [v.changes.get("two_step", True) for v in VARIANTS]),
        ("transfer connection block", [v.changes.get("tcb", True) for v in VARIANTS]),
    ]
    return markdown_table(
        ["component", *(variant.name for variant in VARIANTS)],
        [
            *([name, *("yes" if has else "" for has in flags)] for name, flags in rows),
            [
                "paper: mAP (%), 120,000 iterations of 32 on 07+12, VOC 2007 test",
                *(f"{variant.paper:.1f}" for variant in VARIANTS),
            ],
            [
                f"here: mAP (%, {train.metric}), {train.iterations:,} iterations of {train.batch_size} on "
                f"{train.train_split}, {train.evaluate_split}",
                *(_percent(figures.get(variant.name)) for variant in VARIANTS),
            ],
        ],
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, a line for each row, with a line break at the end."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
