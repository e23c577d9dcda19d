"""The run folder: the names of its files, the lock on it, and how they are written so that no stop costs anything.

A run folder holds

* config.json: all that decides the outcome of the training; paths are absolute;
* data.json: the names and digests of the images, by which a resumed run sees whether the data is still the same;
* metrics.csv, and folders of TensorBoard and of other loggers (``trackers.py``);
* last.ckpt and previous.ckpt: the last two checkpoints, each with all that ``resume`` needs and a checksum;
* last/ and best/: weights with config and model card, replaced as a whole;
* report/: the final evaluation.

One training writes in it. What a killed one left unfinished is removed when the next one starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from refinedet.config import Preset
from refinedet.dataclass_json import from_dict
from refinedet.errors import RefineDetError
from refinedet.files import read_json, remove_stale_parts, write_atomically
from refinedet.locks import lock_folder
from refinedet.provenance import Provenance
from refinedet.weights import MODEL_FILES

CONFIG_FILE, DATA_FILE, METRICS_FILE = "config.json", "data.json", "metrics.csv"
CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE = "last.ckpt", "previous.ckpt"
TRAIN_LIST, HELD_OUT_LIST = "split/train.txt", "split/held_out.txt"
LAST_FOLDER, BEST_FOLDER, REPORT_FOLDER = "last", "best", "report"
RUN_FILES = (
    *(CONFIG_FILE, DATA_FILE, METRICS_FILE, TRAIN_LIST, HELD_OUT_LIST),
    *(f"{folder}/{name}" for folder in (LAST_FOLDER, BEST_FOLDER) for name in MODEL_FILES),
)
"""What a training replaces without looking at it; checkpoints are read, and the report has its own names."""
_SEAL = b"sha256:"
_END_OF_ZIP = b"PK\x05\x06"


@dataclass(frozen=True)
class RunConfig:
    """config.json of a run folder: all that decides the outcome of a training."""

    preset: Preset
    """Model and training, flags included."""
    data: tuple[str, ...]
    """Data folders, as absolute paths."""
    class_names: tuple[str, ...]
    """In label order."""
    init_weights: str
    """Where the weights came from: a file, a model, "torchvision", "random", or "own" for a network of the caller's."""
    evaluate_data: tuple[str, ...] = ()
    """Other data to evaluate on, as absolute paths; empty: the same as ``data``."""
    classes: tuple[str, ...] | None = None
    """The classes of the data that are trained on, in label order; None: all."""
    group_by: str | None = None
    """How images were kept together when some were held out."""
    skip_broken: bool = False
    """Whether images that cannot be read are left out."""
    loggers: tuple[str, ...] = ()
    """Names of loggers in ``trackers.TRACKERS`` that were asked for, which ``resume`` goes on with."""
    provenance: Provenance = field(default_factory=Provenance)
    """Program, machine, command and time of the start."""


def read_run_config(path: Path) -> RunConfig:
    """config.json of a run, also of one that calls ``init_weights`` by its former name "initial_weights".

    Raises:
        RefineDetError: missing, no JSON, or not the config of a run.
    """
    values = read_json(path)
    if isinstance(values, dict) and "initial_weights" in values:
        values["init_weights"] = values.pop("initial_weights")
    return from_dict(RunConfig, values, source=str(path))


def is_run(folder: Path) -> bool:
    """Whether a folder holds the settings of a run, which one that saved nothing yet may replace."""
    try:
        return "preset" in read_json(folder / CONFIG_FILE)
    except (RefineDetError, TypeError):
        return False


class RunFolder:
    """A folder that one training writes in.

    Args:
        path: made by ``lock`` if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_is_sound = True

    @property
    def config(self) -> Path:
        """The file of ``RunConfig``."""
        return self.path / CONFIG_FILE

    @property
    def data(self) -> Path:
        """The file of names and digests of the images."""
        return self.path / DATA_FILE

    @property
    def metrics(self) -> Path:
        """The log."""
        return self.path / METRICS_FILE

    @property
    def report(self) -> Path:
        """Folder of the final evaluation."""
        return self.path / REPORT_FOLDER

    def recorded_images(self, part: str) -> dict[str, str]:
        """Digests of the images of "train" or "evaluation" when the run began; nothing if they cannot be read."""
        try:
            images: Any = read_json(self.data)[part]
        except (RefineDetError, KeyError, TypeError):
            return {}
        return images if isinstance(images, dict) else {}

    def has_checkpoint(self) -> bool:
        """Whether a training has saved something there."""
        return any((self.path / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other trainings out of the folder.

        The lock is on the folder itself, leaves no file, and ends with this process however that ends.

        Raises:
            UsageError: another training is writing there.
            RefineDetError: the folder cannot be made.
        """
        with lock_folder(self.path, "training"):
            yield

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write last.ckpt; the one before becomes previous.ckpt.

        Raises:
            RefineDetError: no permission, a full disk; both checkpoints are as before.
        """
        last = self.path / CHECKPOINT_FILE

        def keep_previous() -> None:
            if self._last_is_sound and last.exists():
                _keep_as(last, self.path / PREVIOUS_CHECKPOINT_FILE)

        save_checkpoint(last, state, before=keep_previous)
        self._last_is_sound = True

    def load_checkpoint(self) -> tuple[dict[str, Any], str | None]:
        """The last checkpoint that is whole, and a line to show if it is the previous one.

        Raises:
            RefineDetError: there is none.
        """
        last, previous = self.path / CHECKPOINT_FILE, self.path / PREVIOUS_CHECKPOINT_FILE
        try:
            return load_checkpoint(last), None
        except RefineDetError as error:
            try:
                state = load_checkpoint(previous)
            except RefineDetError:
                raise error from None
            self._last_is_sound = False
            return state, f"{error}; going on from {previous.name}, iteration {state['iteration']}"

    def clear(self) -> None:
        """Remove what killed trainings left unfinished, and nothing else; needs the lock, for no writer may live."""
        from refinedet.weights.folder import clear_unfinished  # which needs torch

        for folder in (self.path, *(self.path / name for name in (LAST_FOLDER, BEST_FOLDER, REPORT_FOLDER))):
            remove_stale_parts(folder, settled=0.0)  # under the lock of the run nobody is about to write
        for name in (LAST_FOLDER, BEST_FOLDER):
            clear_unfinished(self.path / name, alone=True)


def _keep_as(last: Path, previous: Path) -> None:
    """Give the file ``last`` a second name, which replaces ``previous``."""
    handle, name = tempfile.mkstemp(dir=last.parent, prefix=f".{previous.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        part.unlink()
        try:
            os.link(last, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, part)
        part.replace(previous)
    finally:
        # If both are names of one file already, replacing does nothing.
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any], *, before: Callable[[], None] | None = None) -> None:
    """Write tensors and plain types so that ``torch.load(..., weights_only=True)`` reads them, with a checksum.

    Args:
        path: the file.
        state: what is saved.
        before: called when the new file is complete, just before it takes the name.

    Raises:
        RefineDetError: no permission, a full disk; what ``path`` held before is still there.
    """

    def write(part: Path) -> None:
        import torch  # only here and where it is read: the names above are wanted without PyTorch too

        # Through Python's own file: a full disk is then an OSError of write(), not an abort inside the zip writer.
        with part.open("wb") as stream:
            torch.save(state, stream)
        with part.open("r+b") as stream:
            _seal(stream)
            os.fsync(stream.fileno())
        if before is not None:
            before()

    write_atomically(path, write)


def _seal(stream: BinaryIO) -> None:
    """Append a checksum of the whole file: as the archive's comment, so that it stays a valid one."""
    size = stream.seek(0, os.SEEK_END)
    length = len(_SEAL) + 64
    stream.seek(size - 22)
    if stream.read(4) != _END_OF_ZIP:
        raise RuntimeError("torch.save wrote no zip file")
    stream.seek(size - 2)
    stream.write(struct.pack("<H", length))
    digest = _digest(stream, size)
    stream.seek(size)
    stream.write(_SEAL + digest)


def _digest(stream: BinaryIO, size: int) -> bytes:
    total, left = hashlib.sha256(), size
    stream.seek(0)
    while left:
        block = stream.read(min(left, 1 << 20))
        if not block:
            break
        total.update(block)
        left -= len(block)
    return total.hexdigest().encode()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote, on the CPU, without running any code that the file may hold.

    Raises:
        RefineDetError: missing, cut, damaged, or not such a file.
    """
    import torch

    if not path.exists():
        raise RefineDetError(f"{path}: no checkpoint there; --resume wants the folder of a run that has saved one")
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END) - len(_SEAL) - 64
            stream.seek(max(0, size))
            seal = stream.read()
            if seal != _SEAL + _digest(stream, size):
                raise RefineDetError(f"{path}: not a readable checkpoint (damaged: its checksum is wrong)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except RefineDetError:
        raise
    except Exception:
        # torch raises anything from EOFError to UnpicklingError here; to the user all mean the same.
        raise RefineDetError(
            f"{path}: not a readable checkpoint (cut, corrupt, or pickled by another program)"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("iteration"), int) or "network" not in state:
        raise RefineDetError(f"{path}: not a checkpoint of a refinedet training")
    return state
