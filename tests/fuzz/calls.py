"""Hostile calls by kind: odd values of flags over valid files, and outputs that would replace what is not ours."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import socket
from pathlib import Path

import numpy as np
from tests.fuzz.material import RANDOM_WEIGHTS, TINY, copy_folder, photo, write_yolo
from tests.fuzz.mutations import ARGUMENTS

from refinedet.cli import VERBS, main

LEFT_OUT = ("--help", "--help-all", "--minutes", "--no-skip-broken")
"""Flags that get no odd values; --minutes with a good one takes minutes."""
FOREIGN = (
    b"my notes\n",
    b'{"a": 1}\n',
    b"[1, 2]\n",
    b'{"note": "detections written by refinedet"}\n',
    b"PK\x03\x04 no archive",
    b"\x89PNG\r\n\x1a\n my drawing",
    b"<html>my page</html>\n",
)
"""Files that this package did not write, some of which look as if it had."""


@functools.cache
def flags_of(verb: str) -> tuple[str, ...]:
    """All flags of a verb, as its help lists them."""
    capture = io.StringIO()
    with contextlib.redirect_stdout(capture):
        main([verb, "smoke", "--help-all"] if verb in ("train", "ablate") else [verb, "--help"])
    found = dict.fromkeys(re.findall(r"--[a-z][a-z0-9.-]*", capture.getvalue()))
    return tuple(flag for flag in found if flag not in LEFT_OUT and not flag.startswith("--no-"))


def _valid_call(verb: str, folder: Path, material: Path) -> list[str]:
    """A call of the verb that would succeed or, where it takes minutes, fail early."""
    data, image, out = str(folder / "data"), str(folder / "a.jpg"), folder / "out"
    model, run = str(material / "model"), str(material / "run")
    one = ["--data", data, "--out", str(out), "--iterations", "1", *TINY, *RANDOM_WEIGHTS]
    calls = {
        "predict": ["predict", model, image],
        "evaluate": ["evaluate", model, data, "--split", "val"],
        "inspect": ["inspect", data],
        "compare": ["compare", run, run],
        "benchmark": ["benchmark", model, "--runs", "1", "--warmup", "0"],
        "convert": ["convert", str(material / "weights.safetensors"), "--preset", "smoke", "--out", str(out)],
        "train": ["train", "smoke", *one],
        "ablate": ["ablate", "smoke", "--data", str(folder / "none"), *one[2:]],
        "models": ["models"],
        "export": ["export", str(folder / "none"), "--out", str(out)],
    }
    return calls.get(verb, [verb])


def values(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """Odd values on the command line, over valid files."""
    _write_inputs(rng, folder)
    verb = sorted(VERBS)[int(rng.integers(len(VERBS)))]
    call, flags = _valid_call(verb, folder, material), flags_of(verb)
    for _ in range(int(rng.integers(1, 3))):
        words = [ARGUMENTS[int(rng.integers(len(ARGUMENTS)))] for _ in range(1 if rng.random() < 0.85 else 2)]
        if not flags or rng.random() < 0.1:
            call[1 + int(rng.integers(len(call))) :] = words
        else:
            call += [flags[int(rng.integers(len(flags)))], *words]
    return call


def _target(rng: np.random.Generator, folder: Path) -> Path:
    """A file that no output may replace: an input, somebody else's file, or another name of one."""
    kept = folder / "kept"
    kept.mkdir()
    foreign = kept / f"foreign{rng.choice(['.json', '.png', '.html', '.zip', '.tar.gz', '.jpg', ''])}"
    foreign.write_bytes(FOREIGN[int(rng.integers(len(FOREIGN)))])
    kind = int(rng.integers(9))
    if kind < 3:
        return foreign
    inputs = (folder / "a.jpg", folder / "data/data.yaml", next((folder / "data/labels/train").iterdir()))
    if kind == 3:
        return inputs[int(rng.integers(len(inputs)))]
    if kind == 4:
        return kept
    link = folder / "kept" / f"link{foreign.suffix}"
    if kind == 5:
        link.symlink_to(foreign)
    elif kind == 6:
        link.symlink_to(inputs[0])
    elif kind == 7:
        os.link(inputs[0], link)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(link))
    return link


FOLDER_FILES = {
    "train": (
        "config.json", "data.json", "metrics.csv", "last.ckpt", "previous.ckpt", "last/model.safetensors",
        "last/config.json", "last/README.md", "best/config.json", "best/model.safetensors", "best/README.md",
        "report/index.html", "report/report.json", "report/images/good-05.jpg", "split/train.txt", "split/held_out.txt",
    ),
    "evaluate": ("index.html", "report.json", "detections.json", "per_class.csv", "images/good-05.jpg"),
    "predict": ("a.jpg", "a.png", "a-2.jpg", "A.JPG"),
    "convert": ("model.safetensors", "config.json", "README.md"),
    "ablate": ("table.md",),
    "export": ("model.onnx",),
}  # fmt: skip
"""Names that a verb writes in its output folder."""


def targets(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """An output whose target is an input or a foreign file."""
    data, image, model = _write_inputs(rng, folder), folder / "a.jpg", str(material / "model")
    target = str(_target(rng, folder))
    calls = [
        ["predict", model, str(image), "--json", target],
        ["predict", model, str(image), "--json", target, "--json-format", "coco"],
        ["predict", model, str(image), "--jsonl", target],
        ["inspect", str(data), "--mosaic", target],
        ["evaluate", model, str(data), "--split", "val", "--submission", target, "--metric", "coco"],
    ]
    if not Path(target).is_dir():  # a name at which folders are wanted
        calls += [
            ["predict", model, str(image), "--save", target],
            ["evaluate", model, str(data), "--split", "val", "--report", target],
            [*_valid_call("convert", folder, material), "--out", target],
            [*_valid_call("train", folder, material), "--out", target],
        ]
    return calls[int(rng.integers(len(calls)))]


def folders(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """A folder for the outputs that holds foreign files of their names: to be refused, or left as they are."""
    data = _write_inputs(rng, folder)
    verbs = sorted(FOLDER_FILES.keys() & VERBS.keys())
    verb = verbs[int(rng.integers(len(verbs)))]
    kept = folder / "kept"
    if rng.random() < 0.15 and verb != "export":  # an export takes minutes
        kept = data
    elif rng.random() < 0.15 and verb != "export":
        copy_folder(material / "model", kept)
    else:
        names = FOLDER_FILES[verb]
        file = kept / names[int(rng.integers(len(names)))]
        file.parent.mkdir(parents=True)
        file.write_bytes(FOREIGN[int(rng.integers(len(FOREIGN)))])
        if rng.random() < 0.3:
            real = file.rename(folder / "real")
            file.symlink_to(real)
    flag = "--report" if verb == "evaluate" else "--save" if verb == "predict" else "--out"
    call = _valid_call(verb, folder, material)
    if verb == "export":
        call[1] = str(material / "model")
    if verb == "predict" and rng.random() < 0.5:
        return [*call[:2], str(kept), *call[2:], flag, str(kept)]
    return [*call, flag, str(kept)]


def _write_inputs(rng: np.random.Generator, folder: Path) -> Path:
    (folder / "a.jpg").write_bytes(photo(rng))
    write_yolo(rng, folder / "data")
    return folder / "data"


CALLS = {"values": values, "targets": targets, "folders": folders}
"""Kind of call -> its builder."""
