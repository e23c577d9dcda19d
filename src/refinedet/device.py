"""The device that a name stands for."""

from __future__ import annotations

import torch

from refinedet.errors import UsageError

_KINDS = "cpu, cuda, cuda:1, mps or auto"


def pick_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one, else the CPU.

    Raises:
        UsageError: another kind of device than cpu, cuda and mps, or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
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
    elif device.type != "cpu":
        raise UsageError(f"device '{name}' is not supported: say {_KINDS}")
    return device
