"""The verb that shows a page."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import tyro

from refinedet.cli.flags import Device, flag, verb
from refinedet.cli.terminal import note, say
from refinedet.errors import UsageError


@verb
def demo(
    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")] = "voc07-320-resnet18",
    /,
    *,
    host: Annotated[str, flag("ADDRESS", None)] = "127.0.0.1",
    port: int = 7860,
    device: Device = "auto",
) -> int:
    """Try a model on a page in the browser: boxes, and the steps to them.

    Only this machine reaches the page unless --host says otherwise. It runs until Ctrl-C.

    Args:
        weights: A bundled model (`refinedet models`), an exported file, a run folder, a folder of weights, or
            hf:owner/name.
        host: Address on which the page is served; 0.0.0.0 lets everybody in who reaches this machine.
        port: Port on which it is served.
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    if not 1 <= port <= 65_535:
        raise UsageError(f"--port must be from 1 to 65,535, not {port}")

    from refinedet.demo import build_page, serve
    from refinedet.loading import load_detector

    page = build_page(load_detector(weights, device=device), Path(weights).name)
    stop = threading.Event()
    before = [(number, signal.signal(number, lambda *_: stop.set())) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        say(f"{serve(page, host=host, port=port)}  (Ctrl-C ends)")
        if host not in ("127.0.0.1", "localhost", "::1"):
            note(f"note: whoever reaches {host} can use this page; it asks for no password")
        stop.wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        page.close(verbose=False)
    return 0
