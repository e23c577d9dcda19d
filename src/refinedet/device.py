"""The device that a name stands for."""

from __future__ import annotations

import torch

from refinedet.errors import UsageError


def pick_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one, else the CPU.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': say cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{name}': this torch sees no CUDA device; use --device cpu")
    return device
