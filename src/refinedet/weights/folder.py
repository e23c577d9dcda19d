"""The folder of a model: model.safetensors, config.json and README.md (the model card).

A folder appears, or changes, whole or not at all: its files are written into a new folder beside it, which then takes
its place by renaming. config.json holds the checksum of model.safetensors, so that a damaged file is noticed.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from refinedet.config import ModelConfig
from refinedet.dataclass_json import from_dict, to_dict
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import failure_reason, flush_folder, read_json, write_bytes
from refinedet.model.network import RefineDetNetwork
from refinedet.weights import CARD_FILE, CONFIG_FILE, MODEL_FILES, WEIGHTS_FILE
from refinedet.weights.store import (
    check_fit,
    is_finite,
    load_weights,
    network_shell,
    open_safetensors,
    previous_folder,
)

_KEYS = {"format", "model", "class_names", "category_ids", "metrics", "untrained", "sha256"}
_WRITING = threading.Lock()

_LONGEST_CARD = 200_000
"""Bytes of a model card that are read."""


@dataclass(frozen=True)
class ModelInfo:
    """What config.json of a model says."""

    config: ModelConfig
    """The network and its input."""
    class_names: tuple[str, ...]
    """In label order."""
    category_ids: tuple[int, ...] | None = None
    """The ids that the training data had for the classes, in label order; for results in COCO's format."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured of these weights."""
    untrained: tuple[str, ...] = ()
    """Parts of the network that hold random numbers, as after importing a backbone."""


def check_class_names(names: Any, count: int) -> tuple[str, ...]:
    """Class names as they may be saved and shown.

    Raises:
        UsageError: no sequence of strings, another number of them than ``count``, or characters that break lines or
            cannot be written.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(f"class_names must be a list of names, not {str(names)!a:.60}")
    for name in names:
        if not isinstance(name, str):
            raise UsageError(f"class_names must be a list of names, but {str(name)!a:.60} is no string")
        if not name.strip() or any(ord(letter) < 32 or 0xD800 <= ord(letter) <= 0xDFFF for letter in name):
            raise UsageError(f"{name!a:.60} cannot be a class name: empty, or with characters that cannot be shown")
    if len(names) != count:
        raise UsageError(f"{len(names)} class names for a model of {count} classes")
    return tuple(names)


def check_category_ids(ids: Any, count: int) -> tuple[int, ...] | None:
    """Category ids as they may be saved; None stays None.

    Raises:
        UsageError: no sequence of different whole numbers, or another number of them than ``count``.
    """
    if ids is None:
        return None
    if not isinstance(ids, (list, tuple)) or any(isinstance(n, bool) or not isinstance(n, int) for n in ids):
        raise UsageError(f"category_ids must be a list of whole numbers, not {str(ids)!a:.60}")
    if len(ids) != count or len(set(ids)) != count:
        raise UsageError(f"category_ids must hold a different number for each of {count} classes")
    return tuple(ids)


# Reading -------------------------------------------------------------------------------------------------------------


def read_model(folder: Path) -> tuple[ModelInfo, RefineDetNetwork]:
    """The network of a model's folder, in evaluation mode on the CPU, and what its config.json says.

    Raises:
        RefineDetError: a file is missing, damaged or does not fit the other; the message names it.
    """
    info, checksum = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    file = open_safetensors(path)
    try:
        network = network_shell(info.config)
    except UsageError as error:
        raise RefineDetError(f"{folder / CONFIG_FILE}: {error}") from None
    check_fit(network, file.header, str(path))
    if checksum is not None:
        try:
            with path.open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise RefineDetError(f"{path}: cannot be read ({error.strerror})") from None
        if actual != checksum:
            raise RefineDetError(
                f"{path}: damaged, or not the file that {CONFIG_FILE} belongs to (its checksum differs); copy the "
                f"folder again"
            )
    load_weights(network, file.read(), str(path))
    return info, network.eval()


def read_card(folder: Path) -> str:
    """The text of a model's card; empty if there is none that can be read."""
    try:
        with (folder / CARD_FILE).open("rb") as file:
            return file.read(_LONGEST_CARD).decode("utf-8", "replace")
    except OSError:
        return ""


def _read_config(path: Path) -> tuple[ModelInfo, str | None]:
    values = read_json(path)
    if not isinstance(values, dict) or "model" not in values or "class_names" not in values:
        raise RefineDetError(f"{path}: not the config of a refinedet model (no 'model' or no 'class_names' in it)")
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise RefineDetError(f"{path}: not the config of a refinedet model (unknown key {unknown[0]!a:.60})")
    try:
        config = from_dict(ModelConfig, values["model"], source=str(path))
    except RefineDetError as error:
        # The message quotes the value, which may be a list of thousands of numbers.
        text = str(error)
        raise RefineDetError(text if len(text) < 500 else f"{text[:300]} ... {text[-100:]}") from None
    metrics, untrained, checksum = values.get("metrics") or {}, values.get("untrained") or [], values.get("sha256")
    try:
        if not isinstance(metrics, dict):
            raise UsageError("metrics must be an object with named values")
        if not isinstance(untrained, list) or not all(isinstance(part, str) for part in untrained):
            raise UsageError("untrained must be a list of parts of the network")
        if not (checksum is None or isinstance(checksum, str)):
            raise UsageError("sha256 must be a checksum in hexadecimal digits")
        info = ModelInfo(
            config,
            check_class_names(values["class_names"], config.num_classes),
            check_category_ids(values.get("category_ids"), config.num_classes),
            metrics,
            tuple(untrained),
        )
    except UsageError as error:
        raise RefineDetError(f"{path}: {error}") from None
    return info, checksum


# Writing -------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, info: ModelInfo, state: Mapping[str, torch.Tensor], *, card: str | None = None) -> None:
    """Write a model into ``folder``, whole or not at all.

    Args:
        folder: made if missing; if it holds a model, that is replaced; other files in it stay.
        info: for config.json.
        state: tensors by name, on the CPU.
        card: text of the model card; without it a card that is there stays.

    Raises:
        RefineDetError: a weight is not finite, the folder cannot be written to or the disk is full; what was there
            before still is.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise RefineDetError(f"{folder}: not saved: '{name}' holds numbers that are not finite")
    data = save(dict(state), metadata={"format": "pt"})
    content: dict[str, Any] = {
        "format": "refinedet",
        "model": to_dict(info.config),
        "class_names": list(info.class_names),
        "metrics": info.metrics,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if info.category_ids is not None:
        content["category_ids"] = list(info.category_ids)
    if info.untrained:
        content["untrained"] = list(info.untrained)
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise RefineDetError(f"{folder / CONFIG_FILE}: cannot be saved ({error})") from None
    files = {WEIGHTS_FILE: data, CONFIG_FILE: text.encode()}
    if card is not None:
        files[CARD_FILE] = card.encode(errors="replace")
    with _WRITING:
        _write_folder(folder, files)


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Let a folder hold these files; see the module's documentation."""
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise RefineDetError(f"{folder}: cannot be saved (a file of this name is there)")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(target)
        part.mkdir()
    except OSError as error:
        if not target.is_dir():
            raise RefineDetError(f"{folder}: cannot be saved ({failure_reason(error)})") from None
        part = target  # nothing may be made beside it, as where it is mounted: write in place, file by file
    # A folder in which this process stands would move away under its feet.
    if part != target and _stands_in(target):
        part.rmdir()
        part = target
    try:
        for name, data in files.items():
            write_bytes(part / name, data)
        if part != target:
            if CARD_FILE not in files and (target / CARD_FILE).is_file():
                write_bytes(part / CARD_FILE, (target / CARD_FILE).read_bytes())
            _take_place(part, target)
    except RefineDetError as error:
        raise RefineDetError(str(error).replace(str(part), str(folder))) from None
    except OSError as error:
        raise RefineDetError(f"{folder}: cannot be saved ({failure_reason(error)})") from None
    finally:
        if part != target:
            _discard(part, target)


def _stands_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # the current folder was removed
        return False


def _take_place(part: Path, target: Path) -> None:
    """Give a whole new folder the name ``target``; files of others in a folder that is there move into the new one."""
    if not target.exists():
        part.rename(target)
    elif not _exchange(part, target):
        # Until the second renaming no folder has the name; whoever looks for a model knows the other one.
        previous = previous_folder(target)
        target.rename(previous)
        try:
            part.rename(target)
        except OSError:
            previous.rename(target)
            raise
        _discard(previous, target)
    else:
        _discard(part, target)
    flush_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders swap their names in one step; False where the system has no such call."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE (Linux, renameat2(2))
    return bool(swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def clear_unfinished(folder: Path, *, alone: bool = False) -> None:
    """Bring to an end what processes that were killed left half-done while they saved a model into a folder.

    Args:
        folder: of the model.
        alone: no other process may be writing there, so what seems to belong to a living one is cleared too.
    """
    target, previous = Path(os.path.realpath(folder)), previous_folder(folder)
    if previous.is_dir() and not target.exists():
        previous.rename(target)
    _discard(previous, target)
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        number = part.name.removesuffix(".part").rpartition(".")[2]
        if number.isdecimal() and (alone or int(number) == os.getpid() or not _is_running(int(number))):
            _discard(part, target)


def _discard(folder: Path, successor: Path) -> None:
    """Remove a model's folder that is no longer needed; files of others in it go to its successor."""
    unfinished = tuple(f".{name}." for name in MODEL_FILES)  # by a kill while the file was written
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.name in MODEL_FILES or (entry.name.startswith(unfinished) and entry.suffix == ".part"):
                entry.unlink()
            elif successor.is_dir() and not (successor / entry.name).exists():
                entry.rename(successor / entry.name)
        folder.rmdir()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
