"""Files that must not be lost or misread: written aside, flushed, renamed; JSON with one clear line when it is bad."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def write_bytes(path: Path, data: bytes) -> None:
    """``write_atomically`` of bytes.

    Raises:
        RefineDetError: as ``write_atomically``.
    """

    def write(aside: Path) -> None:
        aside.write_bytes(data)

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` of UTF-8 text.

    Raises:
        RefineDetError: as ``write_atomically``.
    """
    write_bytes(path, text.encode())


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RefineDetError: the file is missing, unreadable or no JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RefineDetError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise RefineDetError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise RefineDetError(f"{path}: not valid JSON ({error}); it may be cut off: restore it") from None
