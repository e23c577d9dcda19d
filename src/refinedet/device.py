"""The device that a name stands for, and how a CPU's memory is used again."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import torch

from refinedet.errors import UsageError

_KINDS = "cpu, cuda, cuda:1, mps or auto"
_OWN_MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one, else the CPU, for which ``keep_freed_memory`` is called.

    Raises:
        UsageError: another kind of device than cpu, cuda and mps, or one that is not there.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, ValueError):
        raise UsageError(f"unknown device '{name}': say {_KINDS}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(f"device '{name}': this torch sees no CUDA device; use --device cpu")
        if device.index is not None and device.index >= count:
            raise UsageError(f"device '{name}': there are only {count} CUDA devices, numbered from 0")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError(f"device '{name}': this torch sees no Apple GPU; use --device cpu")
    elif device.type == "cpu":
        keep_freed_memory()
    else:
        raise UsageError(f"device '{name}' is not supported: say {_KINDS}")
    return device


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next image instead of giving it back to the system.

    Each layer's output is memory of its own. The GNU C library gives what is free at the end of its heap back to the
    system, which clears page after page again for the next layer: a third of the time of a prediction
    (docs/results.md, "Speed"). Blocks above 32 MB, such as very large images, and all beyond 256 MB are still given
    back. Other C libraries are left alone, and so are settings of the environment (``MALLOC_TRIM_THRESHOLD_`` and
    the like).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_MALLOC_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
