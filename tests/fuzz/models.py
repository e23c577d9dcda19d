"""Hostile models, weight files and run folders by kind; builders as in ``inputs.py``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.fuzz.inputs import Builder, one_iteration
from tests.fuzz.material import copy_folder, photo, write_yolo
from tests.fuzz.mutations import change, mutate_bytes, mutate_json

from refinedet.cli import training
from refinedet.training.run import CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE, load_checkpoint, save_checkpoint


def models(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """A model whose config or weights are damaged; half of the time without the checksum that would tell."""
    model = folder / "model"
    copy_folder(material / "model", model)
    config, weights = model / "config.json", model / "model.safetensors"
    document = json.loads(config.read_text())
    if rng.random() < 0.5:
        document.pop("sha256", None)
        config.write_text(json.dumps(document))
    kind = int(rng.integers(6))
    if kind < 2:
        config.write_bytes(mutate_json(rng, document))
    elif kind == 2:
        config.write_bytes(mutate_bytes(rng, config.read_bytes()))
    elif kind < 5:
        tensors = load_file(weights)
        name = sorted(tensors)[int(rng.integers(len(tensors)))]
        hostile: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
            lambda tensor: tensor * float("nan"),
            lambda tensor: tensor.to(torch.float64) * 1e300,
            lambda tensor: tensor.flatten(),
            lambda tensor: tensor.flatten()[:0],
            lambda tensor: tensor.to(torch.float8_e4m3fn),
            lambda tensor: tensor.to(torch.complex64),
            lambda tensor: torch.tensor(1),
        )
        tensors[name] = hostile[int(rng.integers(len(hostile)))](tensors[name]).contiguous()
        if rng.random() < 0.3:
            tensors[f"{name}.x"] = tensors.pop(name)
        weights.unlink()
        save_file(tensors, weights)
    else:
        damage_file(rng, weights)
    (folder / "a.jpg").write_bytes(photo(rng))
    return ["predict", str(model), str(folder / "a.jpg"), "--json", str(folder / "out.json")]


def damage_file(rng: np.random.Generator, file: Path) -> None:
    """A change of few bytes in a large file."""
    size = file.stat().st_size
    content = file.read_bytes()
    file.unlink()  # it may be a second name of a file of the material
    file.write_bytes(content)
    with file.open("r+b") as stream:
        kind = int(rng.integers(3))
        if kind == 0:
            stream.truncate(int(rng.integers(size)))
        elif kind == 1:
            stream.seek(int(rng.integers(min(size, 2000))))
            stream.write(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8).tobytes())
        else:
            at = int(rng.integers(size))
            stream.seek(at)
            byte = stream.read(1)
            stream.seek(at)
            stream.write(bytes([byte[0] ^ (1 << int(rng.integers(8)))]))


def convert(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    keys = (
        "features.0.weight",
        "classifier.0.weight",
        "conv1.weight",
        "layer1.0.conv1.weight",
        "bn1.weight",
        "arm_loc.0.weight",
    )
    tensors: dict[str, Any] = {key: torch.zeros(8, 3, 3, 3) for key in keys}
    key = keys[int(rng.integers(len(keys)))]
    hostile: tuple[Callable[[], Any], ...] = (
        lambda: torch.zeros(1).expand(4096, 25088),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(3, 3, device="meta"),
        lambda: torch.zeros(64, 3, 7, 7, dtype=torch.complex64),
        lambda: torch.zeros(64, 3, 7, 7).to(torch.float8_e4m3fn),
        lambda: torch.full((64, 3, 7, 7), float("nan")),
        lambda: torch.eye(3).to_sparse(),
        lambda: "text",
        lambda: {"a": {"b": torch.zeros(2)}},
        lambda: [1, 2, 3],
        lambda: None,
    )
    tensors[key] = hostile[int(rng.integers(len(hostile)))]()
    content: Any = {"state_dict": tensors} if rng.random() < 0.3 else tensors
    file = folder / f"weights{rng.choice(['.pth', '.bin', '.pth.tar', '.caffemodel', '.safetensors'])}"
    if rng.random() < 0.05:
        content = Path  # pickled code, which must not run
    torch.save(content, file)
    if rng.random() < 0.4:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    preset = str(rng.choice(["voc07-320-vgg16", "voc07-320-resnet18", "coco-320-resnet101"]))
    return ["convert", str(file), "--preset", preset, "--out", str(folder / "out")]


def _damage_run(rng: np.random.Generator, run: Path) -> None:
    """One or two files of a run folder removed, changed or cut."""
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and "tensorboard" not in file.parts]
    for _ in range(int(rng.integers(1, 3))):
        # A run has few JSON files; they decide most.
        chosen = [file for file in files if file.suffix == ".json"] if rng.random() < 0.5 else files
        file = chosen[int(rng.integers(len(chosen)))]
        if not file.exists():
            continue
        kind = int(rng.integers(4))
        if kind == 0:
            file.unlink()
        elif file.suffix == ".json" and kind < 3:
            try:
                document = json.loads(file.read_text())
            except ValueError:
                continue
            file.write_bytes(mutate_json(rng, document))
        elif file.stat().st_size < 100_000:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        else:
            damage_file(rng, file)


def resume(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """A stopped run, damaged, that is to go on; one in six is whole and must reach its end."""
    run = folder / "out-run"
    copy_folder(material / str(rng.choice(["stopped", "stopped", "run"])), run)
    kind = rng.random()
    if kind < 0.2:
        state = load_checkpoint(run / CHECKPOINT_FILE)
        save_checkpoint(run / CHECKPOINT_FILE, change(rng, state))  # with a right checksum
        (run / PREVIOUS_CHECKPOINT_FILE).unlink(missing_ok=True)
    elif kind < 0.85:
        _damage_run(rng, run)
    extra = []
    if "iterations" in inspect.signature(training.resume_run).parameters and rng.random() < 0.3:
        extra = ["--iterations", str(rng.choice(["6", "1", "4", "0"]))]
    if rng.random() < 0.2:
        data = folder / "data"
        files = write_yolo(rng, data)
        files[1].write_bytes(mutate_bytes(rng, files[1].read_bytes()))
        extra += ["--data", str(data)]
    return ["train", "--resume", str(run), *extra]


def runs(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """A finished run, damaged, that other commands read."""
    run = folder / "run"
    copy_folder(material / "run", run)
    _damage_run(rng, run)
    (folder / "a.jpg").write_bytes(photo(rng))
    other = str(material / "run")
    calls = (
        ["compare", str(run), other],
        ["compare", other, str(run)],
        ["evaluate", str(run)],
        ["evaluate", str(run), "--report", str(folder / "out")],
        ["predict", str(run), str(folder / "a.jpg")],
        ["train", "smoke", "--data", str(material / "data"), *one_iteration(folder / "out"), "--init", str(run)],
    )
    return calls[int(rng.integers(len(calls)))]


MODELS: dict[str, Builder] = {"models": models, "convert": convert, "resume": resume, "runs": runs}
"""Kind of input -> its builder."""
