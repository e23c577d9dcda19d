"""What the experiments share: a clock, a training that goes on, settings that must not mix, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from refinedet.config import Preset
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import read_json, write_text
from refinedet.training.run import CHECKPOINT_FILE
from refinedet.training.train import Run, resume, train

RESULTS_FILE, TABLE_FILE = "results.json", "table.md"


class Deadline:
    """True once so many minutes have passed since it was made; never without minutes."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def __call__(self) -> bool:
        """Whether the time is up."""
        return self.end is not None and time.monotonic() >= self.end


def train_on(preset: Preset, data: Path, folder: Path, *, weights: str, device: str, stop: Callable[[], bool]) -> Run:
    """Train a preset in ``folder``, or go on from the checkpoint there, until it is done or ``stop`` says so."""
    if (folder / CHECKPOINT_FILE).exists():
        return resume(folder, device=device, stop=stop)
    return train(preset, data, out=folder, init_weights=weights, device=device, stop=stop)


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to mix runs of different settings.

    Raises:
        UsageError: the JSON file at ``path`` holds others; the first that differs is named.
    """
    if not path.exists():
        return
    found = read_json(path)
    found = found.get("settings", found)
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise UsageError(
                f"{path}: made with {name} {found.get(name)}, not {settings.get(name)}; choose another folder, or call "
                f"with the old setting"
            )


def read_results(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``write_results`` has kept in ``out``, or nothing.

    Raises:
        UsageError: it was made with other settings.
    """
    path = out / RESULTS_FILE
    check_settings(path, settings)
    results: list[dict[str, Any]] = read_json(path)["results"] if path.exists() else []
    return results


def write_results(out: Path, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]], table: str) -> None:
    """Keep the results so far, with their settings and the machine, and their table."""
    content = {"settings": settings, "machine": machine(), "results": results}
    write_text(out / RESULTS_FILE, json.dumps(content, indent=1) + "\n")
    write_text(out / TABLE_FILE, table)


def precision_of(chosen: argparse.Namespace, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision asked for by a flag of ``add_run_arguments``, or the device's default."""
    asked: Literal["fp32", "bf16"] | None = chosen.precision
    return asked or ("bf16" if device.type == "cuda" else "fp32")


def run_main(main: Callable[[Sequence[str] | None], int]) -> None:
    """Leave the program with what ``main`` returns; a user's mistake is one line on standard error."""
    try:
        sys.exit(main(None))
    except RefineDetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def machine() -> str:
    """Device and versions, for the line below a table."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every program that trains in steps."""
    parser.add_argument("--data", type=Path, required=True, help="VOCdevkit, or one year of it")
    parser.add_argument("--state", type=Path, required=True, help="folder of runs and checkpoints; kept between calls")
    parser.add_argument("--out", type=Path, required=True, help="folder of the small files that are to be kept")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same call again goes on")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="loading processes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
