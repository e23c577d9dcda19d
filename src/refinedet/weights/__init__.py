"""Weights that ship in the box: one folder each with model.safetensors, config.json and README.md."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the models in the box."""
    return sorted(folder.name for folder in _HERE.iterdir() if (folder / "model.safetensors").is_file())


def folder_of(name: str) -> Path | None:
    """Folder of the model in the box of that name, None if there is none."""
    return _HERE / name if name in names() else None
