"""Weight files: found, downloaded, read and checked.

No code that a file may hold is ever run. What kind of file it is shows in its first bytes, not in its name. Its header
(names, shapes and types of the tensors) is read before its numbers, so that a file that does not fit is refused before
memory is taken for it or for a network.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import refinedet.weights
from refinedet.config import ModelConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import user_path
from refinedet.model.backbones import RESNETS, create_timm
from refinedet.model.network import RefineDetNetwork
from refinedet.weights import CONFIG_FILE, WEIGHTS_FILE
from refinedet.weights.caffemodel import read_caffemodel
from refinedet.weights.hub import HUB_PREFIX, download, is_hub_id

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
"""Number types that are read, by their names in safetensors; integers only occur as counters."""
_NOT_READABLE = (
    "not a readable file of tensors (cut, corrupt, or a pickled object, which is never run); save the model's "
    "state_dict()"
)


# Finding -------------------------------------------------------------------------------------------------------------


def find_model(name: str | Path, hub: str | Path | None = None) -> Path:
    """The folder that a model's name stands for; see ``RefineDet.from_pretrained``.

    Raises:
        UsageError: nothing of that name.
        RefineDetError: a model of the hub that cannot be downloaded.
    """
    text = str(name)
    bundled = refinedet.weights.folder_of(text)
    if bundled is not None:
        return bundled
    if text.startswith(HUB_PREFIX):
        return download(text.removeprefix(HUB_PREFIX), None if hub is None else user_path(hub))
    path = user_path(name)
    for folder in (path, path / "best", path / "last"):
        # Whoever writes a model renames the folder that it replaces; a kill at that moment leaves it under this name.
        for whole in (folder, previous_folder(folder)):
            if (whole / WEIGHTS_FILE).is_file():
                return whole
    if path.is_file():
        if path.name == WEIGHTS_FILE:
            return path.parent
        raise UsageError(f"{path}: give the folder that holds {WEIGHTS_FILE} and {CONFIG_FILE}, not a single file")
    if path.is_dir():
        raise UsageError(f"{path}: no {WEIGHTS_FILE} in this folder, nor in best/ or last/ under it")
    known = ", ".join(refinedet.weights.names()) or "none"
    hint = f"; if it is a model on the Hugging Face hub, write {HUB_PREFIX}{text}" if is_hub_id(text) else ""
    raise UsageError(f"no model '{text}': neither a folder nor a bundled model (there is: {known}){hint}")


def previous_folder(folder: Path) -> Path:
    """Where the previous state of a model's folder is while a new one takes its place."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.previous") if target.name else target


def refuse_occupied(folder: Path) -> None:
    """Find out, before the work starts, that nothing would be lost by writing a model or a run into ``folder``.

    Raises:
        UsageError: it holds a model or a run.
    """
    for name in (WEIGHTS_FILE, "last.ckpt", f"best/{WEIGHTS_FILE}", f"last/{WEIGHTS_FILE}"):
        if (folder / name).exists():
            kind = "model" if name == WEIGHTS_FILE else "run"
            raise UsageError(f"{folder}: holds a {kind} already; choose another --out")


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightFile:
    """A file of weights whose header has been read and whose numbers have not."""

    source: str
    """The file's path, or who provides the weights; for messages."""
    header: dict[str, Tensor]
    """For each key a tensor of its shape and type without numbers (device "meta")."""
    load: Callable[[], Mapping[str, Tensor]]
    """Reads the numbers."""
    dilations: dict[str, int] = field(default_factory=dict)
    """Dilations of convolutions, which a Caffe file states, by layer."""

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], source: str) -> WeightFile:
        """Tensors that are in memory already."""
        return cls(source, {key: tensor.to("meta") for key, tensor in state.items()}, lambda: state)

    def read(self) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Raises:
            RefineDetError: corrupt, changed since the header was read, or with numbers that are not finite.
        """
        tensors = dict(self.load())
        if {key: tensor.shape for key, tensor in tensors.items()} != {k: t.shape for k, t in self.header.items()}:
            raise RefineDetError(f"{self.source}: the file was changed while it was read")
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise RefineDetError(f"{self.source}: '{key}' has a shape but no numbers (it was saved on device meta)")
            if not is_finite(tensor):
                raise RefineDetError(f"{self.source}: '{key}' holds numbers that are not finite")
        return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; NaN and infinity show in its smallest and largest number."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def open_weights(path: str | Path) -> WeightFile:
    """Read the header of a weight file of any known kind.

    Args:
        path: .safetensors, .pth / .pt / .pth.tar / .bin (also a checkpoint with the weights under "state_dict",
            "model_state_dict" or "model") or .caffemodel.

    Raises:
        RefineDetError: missing, cut, corrupt, of another kind, or with tensors that are not plain numbers.
    """
    file = user_path(path)
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except (OSError, ValueError) as error:
        raise RefineDetError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return open_safetensors(file)
    # A zip archive, or a pickle of protocol 2 to 5: torch's present and former file formats.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        header = _state_dict(_load_torch(file, "meta"), file)
        return WeightFile(
            str(file),
            {key: tensor.to("meta") for key, tensor in header.items()},
            lambda: _state_dict(_load_torch(file, "cpu"), file),
        )
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise RefineDetError(f"{file}: HDF5 files are not read; give a .caffemodel, .pth or .safetensors file")
    if not head:
        raise RefineDetError(f"{file}: the file is empty")
    if file.suffix == ".safetensors":
        raise RefineDetError(f"{file}: not a readable safetensors file (its header is damaged)")
    model = read_caffemodel(file)
    header = {key: tensor.to("meta") for key, tensor in model.blobs.items()}
    return WeightFile(str(file), header, lambda: model.blobs, model.dilations)


def open_safetensors(file: Path) -> WeightFile:
    """Read the header of a safetensors file.

    Raises:
        RefineDetError: missing, cut, of another kind, or with numbers of a type that weights do not have.
    """

    def load() -> Mapping[str, Tensor]:
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise RefineDetError(f"{file}: not a readable safetensors file ({error})") from None

    header: dict[str, Tensor] = {}
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - this is no dict
                entry = opened.get_slice(key)
                name = entry.get_dtype()
                if name not in _TYPES:
                    raise RefineDetError(f"{file}: {key!a:.80} holds numbers of type {name}, which weights do not have")
                header[key] = torch.empty(entry.get_shape(), dtype=_TYPES[name], device="meta")
    except FileNotFoundError:
        raise RefineDetError(f"{file}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, OverflowError) as error:
        raise RefineDetError(f"{file}: not a readable safetensors file ({error})") from None
    if not header:
        raise RefineDetError(f"{file}: no tensors in it")
    return WeightFile(str(file), header, load)


def _load_torch(file: Path, device: str) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
            # torch.save compresses nothing, so an archive that unpacks to more than its own size is not from there.
            if sum(part.file_size for part in parts) > file.stat().st_size:
                raise RefineDetError(f"{file}: a compressed archive, which torch.save does not write; {_NOT_READABLE}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensor types that are refused below
            return torch.load(file, map_location=device, weights_only=True)
    except RefineDetError:
        raise
    except Exception:
        # torch raises anything from EOFError to UnpicklingError here, with many lines of advice to switch safety off.
        raise RefineDetError(f"{file}: {_NOT_READABLE}") from None


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    """The tensors in what was loaded: out of a checkpoint's dict, without the prefix of DataParallel."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise RefineDetError(f"{file}: no state dict (a mapping from names to tensors) in it")
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    tensors = {}
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise RefineDetError(f"{file}: {str(key)!a:.80} is no tensor, so this is no state dict")
        fault = _not_plain(tensor)
        if fault:
            raise RefineDetError(f"{file}: {str(key)!a:.80} is not a plain tensor of numbers ({fault})")
        tensors[str(key)[len(prefix) :]] = tensor.detach()
    return tensors


def _not_plain(tensor: Tensor) -> str:
    """Why a tensor cannot be weights; "" if it can."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        return "nested, sparse or quantized"
    if tensor.dtype not in _TYPES.values():
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"shape {tuple(tensor.shape)}, but not as many numbers in the file"
    return ""


# Downloading ---------------------------------------------------------------------------------------------------------


def imagenet_weights(config: ModelConfig) -> WeightFile:
    """ImageNet weights of the config's backbone, downloaded by torchvision or timm (or found in their caches).

    Raises:
        UsageError: the backbone has Caffe's layout, whose weights neither has.
        RefineDetError: the download failed; the message says how to give a file instead.
    """
    name = config.backbone
    if config.backbone_layout == "caffe":
        raise UsageError(
            f"torchvision's weights of {name} are of another network than backbone_layout 'caffe': give Caffe's with "
            f"--init-weights FILE, or say --model.backbone-layout torchvision"
        )
    provider = "timm" if name == "timm" else "torchvision"
    try:
        if name == "timm":
            state = create_timm(config.timm_name, pretrained=True).state_dict()
        else:
            from torchvision.models import VGG16_Weights

            weights = VGG16_Weights.IMAGENET1K_V1 if name == "vgg16" else RESNETS[name].weights
            state = weights.get_state_dict(progress=True, check_hash=True)
    except UsageError:
        raise
    except Exception as error:
        # The hub's client raises HTTP, cache and name errors of its own and of two libraries, urllib others.
        reason = getattr(error, "reason", None) or type(error).__name__
        raise RefineDetError(
            f"ImageNet weights of {config.timm_name or name} could not be downloaded ({reason}); give a file with "
            f"--init-weights"
        ) from None
    return WeightFile.of_state(state, provider)


# Filling -------------------------------------------------------------------------------------------------------------


def network_shell(config: ModelConfig) -> RefineDetNetwork:
    """The config's network without numbers (device "meta"), which costs no memory whatever the config says.

    Networks of timm may need numbers to be built, so these are complete.
    """
    if config.backbone == "timm":
        with torch.random.fork_rng(devices=[]):
            return RefineDetNetwork(config)
    with torch.device("meta"):
        return RefineDetNetwork(config)


def check_fit(network: nn.Module, header: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes with those of the network.

    Raises:
        RefineDetError: a tensor is missing, unexpected, or of another shape; ``source`` and the tensor are named.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in header]
    unexpected = [name for name in header if name not in own]
    if missing or unexpected:
        first = f"'{missing[0]}' is missing" if missing else f"{unexpected[0]!a:.80} is not part of this network"
        raise RefineDetError(
            f"{source}: does not fit its config: {first} ({len(missing)} missing, {len(unexpected)} unexpected)"
        )
    for name, tensor in own.items():
        if tensor.shape != header[name].shape:
            hint = "; was it trained with another number of classes?" if ".logits." in name else ""
            raise RefineDetError(
                f"{source}: '{name}' has shape {tuple(header[name].shape)}, its config needs "
                f"{tuple(tensor.shape)}{hint}"
            )


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the network, each of its own shape, float16 widened to float32.

    Args:
        network: with numbers or without (see ``network_shell``).
        state: a tensor for each name of the network's state dict.
        source: what the tensors are from, for messages.

    Raises:
        RefineDetError: as ``check_fit``.
    """
    check_fit(network, state, source)
    own = network.state_dict()
    copies = {name: state[name].to(tensor.dtype, copy=True) for name, tensor in own.items()}
    network.load_state_dict(copies, assign=any(tensor.is_meta for tensor in own.values()))
