"""Table 2 of the paper: four variants trained and evaluated under equal conditions.

The paper takes its parts away one after the other, so each row of ``VARIANTS`` lacks what the row before it lacks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinedet.config import ModelConfig, Preset
from refinedet.dataclass_json import load_json
from refinedet.errors import UsageError
from refinedet.files import user_path
from refinedet.training.run import CHECKPOINT_FILE, CONFIG_FILE, RunConfig
from refinedet.training.train import resume, train

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

    All have the preset's schedule, data, seed and backbone weights. A run that was stopped goes on where it was.

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
    if preset.train.evaluate_split in ("", "none"):
        raise UsageError("an ablation compares figures: give a split to measure them on with --evaluate-split")
    folder = user_path(out)
    paths = (data,) if isinstance(data, (str, Path)) else tuple(data)
    found: dict[str, float] = {}
    for variant in VARIANTS:
        target = folder / variant.name
        wanted = dataclasses.replace(preset, model=variant_of(preset.model, variant))
        figure = _finished(target)
        if (target / CONFIG_FILE).exists():
            _check_same(target, wanted, paths)
        if figure is None and (target / CHECKPOINT_FILE).exists():
            run = resume(target, device=device)
        elif figure is None:
            run = train(
                wanted,
                paths,
                out=target,
                init_weights=init_weights,
                class_names=class_names,
                device=device,
            )
        if figure is None:
            assert run.report is not None
            figure = run.report["mAP"]
        found[variant.name] = figure
    return found


def variant_of(model: ModelConfig, variant: Variant) -> ModelConfig:
    """The model of that variant; attention goes with the blocks it is part of."""
    changes = dict(variant.changes)
    if not changes.get("tcb", True):
        changes["tcb_attention"] = False
    return dataclasses.replace(model, **changes)


def table(found: dict[str, float], preset: Preset) -> str:
    """Table 2 as Markdown: the paper's figures and those found, with the budget they were found at.

    Args:
        found: what ``ablate`` returned.
        preset: what it trained.
    """
    train = preset.train
    rows = [
        ("negative anchor filtering", [v.changes.get("negative_threshold", 0.0) < 1.0 for v in VARIANTS]),
        ("two-step cascaded regression", [v.changes.get("two_step", True) for v in VARIANTS]),
        ("transfer connection block", [v.changes.get("tcb", True) for v in VARIANTS]),
    ]
    lines = [
        "| component | " + " | ".join(variant.name for variant in VARIANTS) + " |",
        "|---|" + "---|" * len(VARIANTS),
        *("| " + " | ".join([name, *("yes" if has else "" for has in flags)]) + " |" for name, flags in rows),
        "| paper: mAP (%), 120,000 iterations of 32 on 07+12, VOC 2007 test | "
        + " | ".join(f"{variant.paper:.1f}" for variant in VARIANTS)
        + " |",
        f"| here: mAP (%, {train.metric}), {train.iterations:,} iterations of {train.batch_size} on "
        f"{train.train_split}, {train.evaluate_split} | "
        + " | ".join(_percent(found.get(variant.name)) for variant in VARIANTS)
        + " |",
    ]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _finished(folder: Path) -> float | None:
    """The final figure of a run, None if it has not come to its end."""
    path = folder / "report" / "report.json"
    if not path.exists():
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["figures"]["mAP"])
    except (OSError, ValueError, KeyError, TypeError):
        # Stopped while it was written: the checkpoint is complete, and resuming evaluates again.
        return None


def _check_same(folder: Path, wanted: Preset, data: Sequence[str | Path]) -> None:
    run = load_json(RunConfig, folder / CONFIG_FILE)
    # The number of classes came from the data.
    model = dataclasses.replace(wanted.model, num_classes=run.preset.model.num_classes)
    same_data = run.data == tuple(str(user_path(part)) for part in data)
    if run.preset.model != model or run.preset.train != wanted.train or not same_data:
        raise UsageError(f"{folder}: holds a run of other settings or data; choose another --out")
