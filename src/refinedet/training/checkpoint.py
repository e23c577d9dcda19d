"""Files that a training leaves behind: written aside, flushed, renamed, so that a stop never costs the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from refinedet.errors import RefineDetError
from refinedet.files import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain types so that ``torch.load(..., weights_only=True)`` reads them."""

    def write(aside: Path) -> None:
        # Through Python's own file: a full disk is then an OSError of write(), not an abort inside the zip writer.
        with aside.open("wb") as stream:
            torch.save(state, stream)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote, on the CPU, without running any code that the file may hold.

    Raises:
        RefineDetError: missing, cut, or not such a file.
    """
    if not path.exists():
        raise RefineDetError(f"{path}: no checkpoint there; --resume wants the folder of a run that has saved one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # torch raises anything from EOFError to UnpicklingError here; to the user all mean the same.
        raise RefineDetError(
            f"{path}: not a readable checkpoint (cut, corrupt, or pickled by another program)"
        ) from None
    if not isinstance(state, dict) or "iteration" not in state or "network" not in state:
        raise RefineDetError(f"{path}: not a checkpoint of a refinedet training")
    return state
