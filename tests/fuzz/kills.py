"""Kills a small training again and again, at random moments and inside its saves, and compares how it ends.

    python -m tests.fuzz.kills --kills 100 --seed 0

The same command is started until so many of its processes have been killed by SIGKILL. Half of the kills come at a
random moment, half at a random step of a save: the process counts the system calls that a save consists of (flushing,
linking, renaming, removing) and kills itself before one of them. After every kill the run folder must be usable:
checkpoints readable, best/ and last/ whole if they are there. In the end the training must equal one that was never
killed, bit for bit: network, optimiser, random state, weights, metrics; and no other file may be there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tests.conftest import make_scene, voc_xml

from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.detector import RefineDet
from refinedet.training.run import BEST_FOLDER, CHECKPOINT_FILE, LAST_FOLDER, PREVIOUS_CHECKPOINT_FILE, load_checkpoint
from refinedet.training.train import train

STEPS_OF_A_SAVE = 60
"""About as many counted calls as three saves have."""
PRESET = Preset(
    model=ModelConfig(
        backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True,
        anchor_sizes=(16, 24, 32, 48), frozen_stages=4, backbone_norm="frozen",
    ),
    train=TrainConfig(
        iterations=12, batch_size=2, learning_rate=1e-3, milestones=(8,), workers=0, log_every=1, save_every=2,
        evaluate_every=5, train_split="train", evaluate_split="val", gradient_clip_norm=10.0, ema_decay=0.9,
    ),
    summary="for kills",
)  # fmt: skip
_COUNTED = ("fsync", "link", "rename", "replace", "unlink", "rmdir")


def start(data: Path, out: Path, step: int = 0) -> int:
    """Start the training in a process of its own; with ``step`` it kills itself before that step of its saves.

    The process is forked, which spares it the seconds that importing torch takes.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        left = step

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **rest: Any) -> Any:
                nonlocal left
                if left and (out / "config.json").exists():
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **rest)

            return wrapper

        for name in _COUNTED:
            setattr(os, name, counted(getattr(os, name)))
        train(PRESET, data, out=out, init_weights="random", device="cpu")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(data: Path, out: Path) -> None:
    """Run the training to its end, from wherever it is."""
    status = os.waitpid(start(data, out), 0)[1]
    if status:
        raise AssertionError(f"it ended with {status}:\n{out.with_suffix('.log').read_text()[-3000:]}")


def content(out: Path) -> dict[str, Any]:
    """All that must be equal in the end."""
    state = load_checkpoint(out / CHECKPOINT_FILE)
    with (out / "metrics.csv").open() as stream:
        rows = [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(stream)]
    files = sorted(
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    )
    weights = {name: (out / name / "model.safetensors").read_bytes() for name in (BEST_FOLDER, LAST_FOLDER)}
    report = json.loads((out / "report/report.json").read_text(), object_hook=_without_place_and_time)
    state["random_state"] = None if state["random_state"] is None else state["random_state"].tolist()
    return {"state": state, "rows": rows, "files": files, "weights": weights, "report": report}


def _without_place_and_time(members: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in members.items() if key not in ("weights", "run", "seconds_per_image", "date")}


def make_data(root: Path, images: int = 12) -> Path:
    """A VOC folder of synthetic images, half of them for training."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for number in range(images):
        scene, name = make_scene(number), f"{number:06d}"
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{name}.png")
        objects = [
            (("cat", "dog")[int(label)], [float(value) for value in box], False)
            for box, label in zip(scene.boxes, scene.labels, strict=True)
        ]
        (root / "Annotations" / f"{name}.xml").write_text(voc_xml(f"{name}.png", (96, 64), objects))
    for first, split in enumerate(("train", "val")):
        lines = [f"{number:06d}\n" for number in range(first, images, 2)]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(lines))
    return root


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Places in which two nested values are not equal to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [name]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            place for n, pair in enumerate(zip(one, other, strict=True)) for place in differences(*pair, f"{name}.{n}")
        ]
    return [] if type(one) is type(other) and one == other else [name]


def check_folder(out: Path) -> list[str]:
    """What is wrong with a run folder just after a kill; unfinished files do not count, the next start removes them."""
    wrong = []
    for name in (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE):
        if (out / name).exists():
            try:
                load_checkpoint(out / name)
            except ValueError as error:
                wrong.append(str(error))
    for name in (BEST_FOLDER, LAST_FOLDER):
        if (out / name).exists():
            try:
                RefineDet.from_pretrained(out / name)
            except ValueError as error:
                wrong.append(str(error))
    return wrong


def kill_once(data: Path, out: Path, rng: random.Random, longest: float) -> tuple[bool, str]:
    """Start the training and kill it; whether it was killed before its end, and how it was to be."""
    inside = rng.random() < 0.5
    child = start(data, out, rng.randrange(1, STEPS_OF_A_SAVE) if inside else 0)
    if not inside:
        time.sleep(rng.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)  # a child that has ended is still there until it is waited for
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise AssertionError(f"it ended with {status}:\n{out.with_suffix('.log').read_text()[-3000:]}")
    return status != 0, "inside a save" if inside else "at random"


def run(data: Path, folder: Path, kills: int, seed: int, seconds: float) -> list[str]:
    """Kill until enough; what was wrong, in words.

    Args:
        data: a VOC folder with the splits train and val.
        folder: for the run folders.
        kills: how many.
        seed: of moments and steps.
        seconds: after which no further kill is begun.
    """
    rng, began = random.Random(seed), time.monotonic()
    undisturbed, out = folder / "undisturbed", folder / "killed"
    torch.set_num_threads(1)
    finish(data, undisturbed)
    longest = 0.6 * (time.monotonic() - began)
    wanted = content(undisturbed)
    wrong: list[str] = []
    counts = {"inside a save": 0, "at random": 0}
    runs = 0
    while sum(counts.values()) < kills and time.monotonic() - began < seconds:
        killed, how = kill_once(data, out, rng, longest)
        counts[how] += killed
        if out.exists():
            wrong += check_folder(out)
        if not killed:
            finish(data, out)
            wrong += [f"run {runs}: {place} differs" for place in differences(wanted, content(out))]
            wrong += [f"{path} was left" for path in out.rglob(".*")]
            shutil.rmtree(out)
            runs += 1
    if out.exists():
        finish(data, out)
        wrong += [f"last run: {place} differs" for place in differences(wanted, content(out))]
        wrong += [f"{path} was left" for path in out.rglob(".*")]
        runs += 1
    print(
        f"{sum(counts.values())} kills ({', '.join(f'{n} {how}' for how, n in counts.items())}) of {runs} trainings: "
        f"{len(wrong)} things wrong, {time.monotonic() - began:.0f} s"
    )
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no further kill after so long")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "voc")
        wrong = run(data, Path(folder), chosen.kills, chosen.seed, chosen.seconds)
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
