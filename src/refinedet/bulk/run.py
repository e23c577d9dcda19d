"""The call: ``batch`` runs a model over any number of images and leaves Parquet parts, and goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from refinedet.bulk.local import run_local
from refinedet.bulk.parts import Manifest, PartFolder, path_text
from refinedet.bulk.worker import WorkerSettings
from refinedet.config import DEFAULT_THRESHOLD
from refinedet.dataclass_json import to_dict
from refinedet.detections import check_threshold
from refinedet.errors import UsageError
from refinedet.fetch import check_no_password, check_scheme, is_address, scheme_of
from refinedet.files import user_path
from refinedet.loading import load_detector
from refinedet.locks import lock_folder
from refinedet.runtime import SUFFIXES, Runtime
from refinedet.sources import find_images
from refinedet.text import reason

Engine: TypeAlias = Literal["local", "ray"]
Progress: TypeAlias = Callable[[int, int], None]
BATCHES_PER_TASK = 8
"""What a worker does at a time, and what is done again when it is killed."""
_MOST_ERRORS = 10


@dataclass(frozen=True)
class BatchResult:
    """What a batch prediction left."""

    folder: Path
    """The folder of the parts."""
    images: int
    """Rows in it."""
    failed: int
    """Rows with an error."""
    new: int
    """Rows that this call made."""
    seconds: float
    """That it took to make them, the start of the workers included."""
    errors: tuple[str, ...] = ()
    """The first errors of this call."""


def batch(
    model: str | Path,
    images: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    threshold: float | None = DEFAULT_THRESHOLD,
    batch_size: int = 16,
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    rows_per_part: int = 10_000,
    device: str = "auto",
    max_pixels: int | None = None,
    on_progress: Progress | None = None,
) -> BatchResult:
    """Detect objects in any number of images, with the results in a folder of Parquet parts.

    The same call again goes on where it stopped, whatever stopped it, and does nothing when all images are done. An
    image that cannot be read is a row with its error.

    Args:
        model: a bundled model, a run folder, a folder of weights, hf:owner/name, or an exported file.
        images: files, folders (with their subfolders), patterns, addresses, or one list of images: a ``.txt`` file with
            a path in each line, or a ``.parquet`` file with a column "path"; in lists, paths are relative to the list.
        out: folder of the parts; new, empty, or that of an earlier call with the same model and threshold.
        threshold: lowest score; None keeps all that post-processing keeps.
        batch_size: images that go through the network at once.
        engine: "local": processes of this machine; "ray": actors of Ray on one or many machines, all of which must see
            the images and the model under the same paths. Both give the same rows.
        address: for Ray: of a running cluster, or "auto" for the one that this machine is part of; by default Ray is
            started here.
        workers: number of processes; by default one for each CPU core, or for each GPU; with Ray one CPU is left free.
        rows_per_part: rows of a part, about; fewer where they take more than five minutes. A kill of this process loses
            the rows of the part that it was at.
        device: "cpu", "cuda", "mps" or "auto"; "cuda" without a number is all GPUs of the machine.
        max_pixels: largest width times height of an image that is read; ``images.MAX_PIXELS`` if None.
        on_progress: called with (images done, images in all).

    Returns:
        Counts; ``read_batch`` gives the detections.

    Raises:
        UsageError: no such model or images, or ``out`` holds something else.
        RefineDetError: a file cannot be written, or the workers cannot work; what is done is kept.

    Example:
        >>> from refinedet import batch
        >>> result = batch("voc07-320-resnet18", "examples", "found")
        >>> result.images, result.failed
        (3, 0)
    """
    check_threshold(threshold)
    for name, value in (("batch_size", batch_size), ("workers", workers), ("rows_per_part", rows_per_part)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if engine not in get_args(Engine):
        raise UsageError(f"engine must be one of {', '.join(get_args(Engine))}, not {engine!r}")
    if address is not None and engine != "ray":
        raise UsageError("address is that of a Ray cluster; it needs the engine 'ray'")
    wanted, weights = _identify(model, threshold)
    devices = _devices(weights, device, workers) if engine == "local" else [_device_of_ray(weights, device)]
    settings = WorkerSettings(
        weights=weights,
        digest=wanted.model_digest,
        device=devices[0],
        threads=max(1, _cores() // len(devices)) if engine == "local" else 1,
        threshold=threshold,
        batch_size=batch_size,
        max_pixels=max_pixels,
    )
    folder = PartFolder(out, rows_per_part)
    folder.check(wanted)
    paths = {path_text(path): path for path in list_paths(images)}
    with lock_folder(folder.path, "batch"):
        done = folder.start(wanted)
        rest = [path for text, path in sorted(paths.items()) if text not in done]
        del done, paths
        tasks = _tasks(rest, batch_size, rows_per_part)
        if engine == "local":
            rows = run_local(settings, tasks, devices)
        else:
            from refinedet.bulk.ray_engine import run_ray

            rows = run_ray(settings, tasks, workers, address)
        with closing(rows) as tables:
            return _collect(folder, tables, len(rest), on_progress)


def _collect(folder: PartFolder, tables: Iterator[Any], images: int, on_progress: Progress | None) -> BatchResult:
    """Write what the workers found, to the end."""
    began, before = time.monotonic(), folder.images
    errors: list[str] = []
    total = before + images
    try:
        if on_progress is not None:
            on_progress(before, total)
        for table in tables:
            if len(errors) < _MOST_ERRORS:
                errors += table["error"].drop_null().to_pylist()
            folder.add(table)
            if on_progress is not None:
                on_progress(folder.done, total)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"{folder.done} of {total} images are done; the same command goes on",)
        raise
    finally:
        folder.close(complete=folder.done == total)
    seconds = time.monotonic() - began
    return BatchResult(folder.path, folder.images, folder.failed, images, seconds, tuple(errors[:_MOST_ERRORS]))


def _tasks(paths: list[str], batch_size: int, rows_per_part: int) -> Iterator[list[str]]:
    """Whole batches, so that a resumed run gives the network the same groups of images as an undisturbed one."""
    size = batch_size * max(1, min(BATCHES_PER_TASK, rows_per_part // batch_size))
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(weights: str, device: str, workers: int | None) -> list[str]:
    """Where each worker computes."""
    if weights.lower().endswith(SUFFIXES):
        return ["cpu"] * (workers or _cores())
    import torch

    from refinedet.device import pick_device

    chosen = pick_device(device)
    if str(chosen) == "cuda":
        count = torch.cuda.device_count()
        return [f"cuda:{index % count}" for index in range(workers or count)]
    return [str(chosen)] * (workers or (_cores() if chosen.type == "cpu" else 1))


def _device_of_ray(weights: str, device: str) -> str:
    """Where the actors compute; "auto" is decided when the machines are known."""
    if weights.lower().endswith(SUFFIXES):
        return "cpu"
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"workers of Ray compute on 'cpu' or 'cuda', not on {device!r}")
    return device


def _identify(model: str | Path, threshold: float | None) -> tuple[Manifest, str]:
    """What makes the rows, and the weights as a worker in another folder finds them.

    Raises:
        UsageError: no model of that name, or one that returns no detections.
        RefineDetError: a file of it is damaged.
    """
    detector = load_detector(model, device="cpu")
    if isinstance(detector, Runtime) and detector.raw:
        raise UsageError(f"{model}: was exported with --raw, so it returns no detections")
    names, ids = detector.class_names, detector.category_ids
    if isinstance(detector, Runtime):
        weights = detector.path
        files = [file for file in (weights, weights.with_suffix(".bin")) if file.is_file()]
    else:
        from refinedet.weights import WEIGHTS_FILE
        from refinedet.weights.store import find_model

        weights = find_model(model)
        files = [weights / WEIGHTS_FILE]
    total = hashlib.sha256(json.dumps([to_dict(detector.config), names], sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return Manifest(str(model), total.hexdigest(), threshold, tuple(names), ids), os.path.abspath(weights)


def list_paths(images: str | Path | Iterable[str | Path]) -> list[str]:
    """The images that a call names, as absolute paths and addresses; see ``batch``.

    Raises:
        UsageError: nothing of that name, or a list that cannot be read.
    """
    named = [images] if isinstance(images, (str, Path)) else list(images)
    if len(named) == 1 and (text := str(named[0])).lower().endswith((".txt", ".parquet")) and not is_address(text):
        path = user_path(text)
        if path.is_file():
            return _listed(path)
    return [_absolute(file) for file in find_images(named, recursive=True).files]


def _listed(path: Path) -> list[str]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            names = [str(name) for name in pq.read_table(path, columns=["path"])["path"].to_pylist()]
        else:
            text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
            names = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise UsageError(f"{path}: no list of images ({reason(error, 200)})") from None
    except KeyError:
        names = []
    if not names:
        raise UsageError(f"{path}: names no images; a path in each line, or a column 'path', is expected")
    folder = str(path.parent)
    addresses = [name for name in names if is_address(name)]
    for address in addresses:
        check_no_password(address)
    for address in {scheme_of(address): address for address in addresses}.values():
        check_scheme(address)  # which opens the store
    return [_absolute(name, folder) for name in names]


def _absolute(name: str, folder: str = "") -> str:
    return name if is_address(name) else os.path.abspath(os.path.join(folder, name))
