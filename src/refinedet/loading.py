"""A detector by name, whatever runs it: PyTorch or an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refinedet.errors import UsageError
from refinedet.runtime import Runtime, is_exported

if TYPE_CHECKING:
    from refinedet.detector import RefineDet


def load_detector(name: str | Path, *, device: str = "auto", threads: int | None = None) -> RefineDet | Runtime:
    """Load a model.

    Args:
        name: an exported file (.onnx, .xml), or what ``RefineDet.from_pretrained`` takes. Only the latter needs torch.
        device: see ``device.pick_device``; exported files run on the CPU.
        threads: CPU threads; for PyTorch, which has one number of them for the whole process, it is set here.

    Raises:
        UsageError: nothing of that name, or an exported file on another device.
        RefineDetError: a file is damaged or does not fit its configuration.
    """
    if is_exported(name):
        if device not in ("auto", "cpu"):
            raise UsageError(f"{name}: exported models run on the CPU here, not on '{device}'")
        return Runtime(name, threads=threads)
    from refinedet.detector import RefineDet
    from refinedet.device import pick_device

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return RefineDet.from_pretrained(name, device=pick_device(device))
