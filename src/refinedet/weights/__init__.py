"""Bundled weights: one folder each with model.safetensors, config.json and README.md."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
MODEL_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
"""What the folder of a model holds."""
_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled models."""
    return sorted(folder.name for folder in _HERE.iterdir() if (folder / WEIGHTS_FILE).is_file())


def folder_of(name: str) -> Path | None:
    """Folder of the bundled model of that name, None if there is none."""
    return _HERE / name if name in names() else None


def measured(name: str) -> str:
    """The accuracy of a bundled model that its configuration records, and on what; for `refinedet models`."""
    folder = folder_of(name)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) if folder is not None else {}
        metrics = config["metrics"]
        figure = f"mAP {100 * metrics['mAP']:.1f}"
    except (OSError, ValueError, KeyError, TypeError):
        return "accuracy not measured"
    where = " ".join(str(metrics[key]) for key in ("data", "split") if metrics.get(key))
    return figure + (f" on {where}" if where else "")
