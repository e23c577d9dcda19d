"""A lock on a folder, so that two commands never write into the same one."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from refinedet.errors import UsageError
from refinedet.files import make_folder

if sys.platform != "win32":
    import fcntl

_locks: set[int] = set()


@contextlib.contextmanager
def lock_folder(folder: Path, writer: str) -> Iterator[None]:
    """Keep other commands out of a folder while the block runs.

    The lock is on the folder itself, leaves no file, and ends with this process however that ends. Folders that were
    made for it and are empty at the end, as after a call that was refused, are removed.

    Args:
        folder: made if it does not exist.
        writer: what the message calls whoever holds the lock: "training".

    Raises:
        UsageError: another one is writing there.
        RefineDetError: the folder cannot be made.
    """
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            if sys.platform != "win32":
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another {writer} is writing there; wait for its end or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        _locks.add(handle)
        yield
    finally:
        _locks.discard(handle)
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty
            for part in made:
                part.rmdir()


def _close_locks() -> None:
    """A lock must not live on in a loading process after its command was killed."""
    for handle in _locks:
        with contextlib.suppress(OSError):
            os.close(handle)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
