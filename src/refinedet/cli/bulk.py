"""The verb for any number of images."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from refinedet.cli.flags import Device, OptionalCount, OptionalText, Weights, check_at_least, check_share, flag, verb
from refinedet.cli.terminal import note, say, terminable
from refinedet.config import DEFAULT_THRESHOLD
from refinedet.files import user_path
from refinedet.progress import ProgressBar


@verb
def batch(
    weights: Weights,
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")],
    /,
    *,
    out: Annotated[Path, flag("FOLDER", None)],
    threshold: float = DEFAULT_THRESHOLD,
    engine: Literal["local", "ray"] = "local",
    address: OptionalText = None,
    workers: OptionalCount = None,
    batch_size: int = 16,
    rows_per_part: int = 10_000,
    max_pixels: OptionalCount = None,
    to: tyro.conf.DisallowNone[Annotated[Literal["voc", "coco", "yolo"] | None, flag("{voc,coco,yolo}")]] = None,
    labels_out: Annotated[Path, flag("FOLDER", None)] = Path("labels"),
    device: Device = "auto",
) -> int:
    """Detect objects in any number of images: Parquet files, resumable.

    The same command again goes on where it stopped, and does nothing when all images are done. An image that cannot be
    read is a row with its error, and the exit code is 1.

    Args:
        weights: A bundled model (`refinedet models`), a run folder, a folder of weights, hf:owner/name, or an exported
            model (.onnx, .xml).
        images: Files, folders (subfolders too) and quoted patterns; or one list of images: a .txt file with a path in
            each line, or a .parquet file with a column 'path'.
        out: Folder for the Parquet files.
        threshold: Keep detections that score at least this.
        engine: What runs the workers: 'local' is processes of this machine, 'ray' a cluster whose machines all see the
            images and the model under the same paths.
        address: Of a running Ray cluster, or 'auto' for the one that this machine is part of (default: Ray is started
            here and ended again).
        workers: Number of workers (default: one for each CPU core or GPU).
        batch_size: Images that go through the network at once.
        rows_per_part: Images of a Parquet file, about; fewer where they take more than five minutes.
        max_pixels: Largest width times height of an image that is read (default: 178,956,970).
        to: Write the detections as label files too, when all images are done.
        labels_out: New or empty folder for the label files.
        device: cpu, cuda (all GPUs), mps, or auto (GPUs if there are any).
    """
    for name, value in (("--batch-size", batch_size), ("--workers", workers), ("--rows-per-part", rows_per_part),
                        ("--max-pixels", max_pixels)):  # fmt: skip
        check_at_least(name, value)
    check_share("--threshold", threshold)

    from refinedet.bulk.results import write_labels
    from refinedet.bulk.run import batch as run
    from refinedet.labels import LabelFolder

    labels = user_path(labels_out)
    if to is not None:
        LabelFolder(labels, to, (), ())  # finds out before the work starts whether they may be written there

    with contextlib.ExitStack() as stack:
        stack.enter_context(terminable())
        result = run(
            weights,
            images,
            out,
            threshold=threshold,
            engine=engine,
            address=address,
            workers=workers,
            batch_size=batch_size,
            rows_per_part=rows_per_part,
            max_pixels=max_pixels,
            device=device,
            on_progress=_Progress(stack),
        )
    for error in result.errors:
        note(f"error: {error}")
    speed = f", {result.new / result.seconds:.1f} images/s" if result.new else ""
    say(f"{result.images} images in {result.folder}: {result.new} new{speed}, {result.failed} failed")
    if to is not None:
        say(f"labels of {write_labels(result.folder, to, labels)} images: {labels}")
    return 1 if result.failed else 0


class _Progress:
    """A bar that begins at what earlier commands did, with the speed of this one."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._bar: ProgressBar | None = None
        self._began, self._before = time.monotonic(), 0

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(ProgressBar("predicting", total, done=done))
            self._began, self._before = time.monotonic(), done
        speed = (done - self._before) / max(1e-9, time.monotonic() - self._began)
        self._bar(done, total, {"speed": f"{speed:.1f} images/s" if speed else ""})
