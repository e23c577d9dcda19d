"""Files that a training leaves behind: written aside, flushed, renamed, so that a stop never costs the last one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refinedet.errors import RefineDetError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new file beside ``path``, flush it to the disk, and rename it into place.

    Raises:
        RefineDetError: no permission, a full disk; what ``path`` held before is still there.
    """
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        aside = Path(name)
        os.close(handle)
        write(aside)
        with aside.open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes the file private; give it the rights that open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)
        aside.replace(path)
        aside = None
        with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        kept = "; the previous file is untouched" if path.exists() else ""
        raise RefineDetError(f"{path}: cannot be saved ({reason}){kept}") from None
    finally:
        if aside is not None:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


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
