"""Hostile files by kind: each builder writes a few files into a folder and returns the arguments of a command.

What a command may write lies in ``folder / "out..."``; all other files must stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.fuzz.material import (
    COCO,
    RANDOM_WEIGHTS,
    ROWS,
    TINY,
    XML,
    YAML,
    photo,
    png_of_size,
    write_coco,
    write_voc,
    write_yolo,
)
from tests.fuzz.mutations import VALUES, mutate_bytes, mutate_json, mutate_words

Builder = Callable[[np.random.Generator, Path, Path], list[str]]
"""(rng, empty folder for the files, folder of the valid material) -> arguments after ``refinedet``."""
NO_IMAGES = (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", bytes(64), b"\xff\xd8\xff")


def _look(rng: np.random.Generator, folder: Path, material: Path, data: Path, split: str) -> list[str]:
    """One of the commands that read a dataset."""
    kind = int(rng.integers(6))
    model, out = str(material / "model"), folder / "out"
    if kind == 0:
        return ["inspect", str(data), *(["--split", split] if rng.random() < 0.3 else [])]
    if kind == 1:
        return ["inspect", str(data), "--mosaic", str(out / "look.png")]
    if kind == 2:
        extra = ["--report", str(out / "report")] if rng.random() < 0.5 else []
        extra += ["--shared-classes"] if rng.random() < 0.3 else []
        return ["evaluate", model, str(data), "--split", split, "--metric", str(rng.choice(["voc07", "coco"])), *extra]
    if kind == 3:
        file = f"submission{rng.choice(['.zip', '.tar.gz', '.json'])}"
        metric = "coco" if file.endswith("json") else str(rng.choice(["voc07", "coco"]))
        return ["evaluate", model, str(data), "--split", split, "--metric", metric, "--submission", str(out / file)]
    splits = ["--train-split", split, "--evaluate-split", "none"]
    if kind == 4:
        # The images of a valid dataset are joined with these.
        return [
            "train",
            "smoke",
            "--data",
            str(data),
            str(material / "data"),
            *RANDOM_WEIGHTS,
            *one_iteration(out),
            *splits,
        ]
    return ["train", "smoke", "--data", str(data), *RANDOM_WEIGHTS, *one_iteration(out), *splits]


def one_iteration(out: Path) -> list[str]:
    return ["--iterations", "1", *TINY, "--out", str(out / "run")]


def voc(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    data = folder / "data"
    files = write_voc(rng, data)
    victim = files[int(rng.integers(2))]
    words = [str(value) for value in VALUES if not isinstance(value, (list, dict))]
    kind = int(rng.integers(4))
    if kind == 0:
        victim.write_bytes(mutate_bytes(rng, victim.read_bytes()))
    elif kind == 1:
        text = mutate_words(rng, victim.read_text(), words)
        victim.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == 2:
        file = data / "ImageSets/Main/train.txt"
        file.write_bytes(mutate_words(rng, file.read_text(), words).encode("utf-8", "surrogatepass"))
    else:
        _disturb(rng, data)
    return _look(rng, folder, material, data, "train")


def yolo(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    data = folder / "data"
    files = write_yolo(rng, data)
    words = [str(value) for value in VALUES] + ["!!int ''", "&a [*a]", "<<: *a", "/", "..", "images"]
    kind = int(rng.integers(4))
    victim = files[0] if kind == 1 or rng.random() < 0.4 else files[int(rng.integers(1, len(files)))]
    if kind == 0:
        victim.write_bytes(mutate_bytes(rng, victim.read_bytes()))
    elif kind < 3:
        victim.write_bytes(mutate_words(rng, victim.read_text(), words).encode("utf-8", "surrogatepass"))
    else:
        _disturb(rng, data)
    return _look(rng, folder, material, data, "train")


def coco(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    data = folder / "data"
    file = write_coco(rng, data)
    kind = int(rng.integers(4))
    if kind == 0:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    elif kind < 3:
        file.write_bytes(mutate_json(rng, COCO))
    else:
        _disturb(rng, data)
    return _look(rng, folder, material, data, "train")


def _disturb(rng: np.random.Generator, data: Path) -> None:
    """Damage among the files themselves: removed, renamed, linked in a circle, made a pipe or a folder."""
    paths = sorted(data.rglob("*"))
    victim = paths[int(rng.integers(len(paths)))]
    kind = int(rng.integers(7))
    if victim.is_dir():
        if kind < 3:
            shutil.rmtree(victim)
        elif kind < 5:
            victim.rename(victim.with_name(victim.name.upper()))
        else:
            (victim / "loop").symlink_to(victim)
        return
    if kind == 0:
        victim.unlink()
    elif kind == 1:
        victim.rename(victim.with_suffix(victim.suffix.upper()))
    elif kind == 2:
        victim.unlink()
        os.mkfifo(victim)
    elif kind == 3:
        victim.unlink()
        victim.mkdir()
    elif kind == 4:
        victim.unlink()
        victim.symlink_to(victim.name)
    elif kind == 5:
        victim.write_bytes(mutate_bytes(rng, victim.read_bytes()))
    else:
        os.rename(victim, os.fsencode(victim.parent) + b"/caf\xe9" + os.fsencode(victim.suffix))


def layouts(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """One to three datasets of any layout in one folder, of which pieces were removed, renamed or moved."""
    data = folder / "data"
    data.mkdir()
    for number in range(int(rng.integers(1, 4))):
        root = data / str(rng.choice(["", "VOC2007", "coco", "train", "a b", "Data\\set", ".hidden", "été"]))
        try:
            (write_voc, write_yolo, write_coco)[int(rng.integers(3))](rng, root)
        except FileExistsError:
            (write_voc, write_yolo, write_coco)[int(rng.integers(3))](rng, data / f"part{number}")
    names = ["images", "labels", "train", "val", "Annotations", "JPEGImages", "ImageSets", "annotations", "x", "a.jpg"]
    for _ in range(int(rng.integers(0, 5))):
        paths = [path for path in sorted(data.rglob("*")) if not path.is_symlink()]
        if not paths:
            break
        path = paths[int(rng.integers(len(paths)))]
        target = path.with_name(str(rng.choice(names)) + (path.suffix if rng.random() < 0.5 else ""))
        kind = int(rng.integers(6))
        if kind == 0:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif kind < 3 and not target.exists():
            path.rename(target)
        elif kind == 3 and not (data / path.name).exists():
            path.rename(data / path.name)
        elif kind == 4 and not target.exists():
            target.symlink_to(path)
        elif path.is_file():
            (path.parent / f"{path.stem}{rng.choice(['.txt', '.xml', '.json', '.yaml', '.png'])}").write_bytes(
                (ROWS, XML, json.dumps(COCO), YAML, "")[int(rng.integers(5))].encode()
            )
    split = str(rng.choice(["train", "val", "test", "all", "trainval", "train[:50%]"]))
    if rng.random() < 0.1:
        (folder / "a.jpg").write_bytes(photo(rng))
        return ["predict", str(material / "model"), str(data), "--recursive", "--save", str(folder / "out" / "drawn")]
    return _look(rng, folder, material, data, split)


def images(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """Damaged, huge and odd images and names, and annotation files that say their ids."""
    target = folder / "photos"
    target.mkdir()
    kinds = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    for number in range(int(rng.integers(1, 4))):
        kind = kinds[int(rng.integers(len(kinds)))]
        mode = str(rng.choice(["RGB", "L", "P", "RGBA", "CMYK", "1", "I", "F", "LA"]))
        try:
            data = photo(rng, kind, mode)
        except (OSError, ValueError):
            data = photo(rng)
        ending = str(rng.choice([".jpg", ".png", ".gif", ".bmp", ".tif", ".webp", ".JPEG"]))
        file = target / f"{number}{ending}"
        choice = int(rng.integers(8))
        if choice < 4:
            file.write_bytes(mutate_bytes(rng, data))
        elif choice == 4:
            sides = (0, 1, 2, 64, 10_000, 30_000, 2**31 - 1)
            file.write_bytes(png_of_size(int(rng.choice(sides)), int(rng.choice(sides))))
        elif choice == 5:
            file.write_bytes(NO_IMAGES[int(rng.integers(len(NO_IMAGES)))])
        elif choice == 6:
            os.mkfifo(file)
        else:
            with open(os.fsencode(target) + b"/\xff\x1b[1m%d.png" % number, "wb") as stream:
                stream.write(data)
    out = folder / "out"
    arguments = ["predict", str(material / "model"), str(target), "--threshold", "0.01"]
    if rng.random() < 0.5:
        arguments += ["--save", str(out / "drawn")]
    if rng.random() < 0.4:
        arguments += ["--json", str(out / "all.json")]
        if rng.random() < 0.5:
            arguments += ["--json-format", "coco"]
            if rng.random() < 0.5:
                document = {**COCO, "images": [{"id": 7, "file_name": file.name} for file in target.iterdir()]}
                (folder / "ids.json").write_bytes(mutate_json(rng, document))
                arguments += ["--coco-images", str(folder / "ids.json")]
    if rng.random() < 0.3:
        arguments += ["--jsonl", str(rng.choice([str(out / "lines.jsonl"), "-"]))]
    if rng.random() < 0.2:
        arguments += ["--max-pixels", str(rng.choice([1, 5000, 2**40]))]
    if rng.random() < 0.1:
        import refinedet.fonts

        (folder / "letters.ttf").write_bytes(
            mutate_bytes(rng, (Path(refinedet.fonts.__file__).parent / "DejaVuSans.ttf").read_bytes())
        )
        arguments += ["--font", str(folder / "letters.ttf"), "--save", str(out / "drawn")]
    return arguments


FILES: dict[str, Builder] = {
    "images": images,
    "voc": voc,
    "coco": coco,
    "yolo": yolo,
    "layouts": layouts,
}
"""Kind of input -> its builder."""
