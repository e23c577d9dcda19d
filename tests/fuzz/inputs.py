"""Hostile inputs by kind: each builder writes a few files into a folder and returns the arguments of a command.

Valid material (a small model, a run that was stopped) is made once by ``prepare``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.fuzz.mutations import ARGUMENTS, VALUES, mutate_bytes, mutate_json, mutate_words

Builder = Callable[[np.random.Generator, Path, Path], list[str]]
"""(rng, empty folder for the files, folder of the valid material) -> arguments after ``refinedet``."""

XML = """<annotation>
  <folder>images</folder>
  <filename>a.jpg</filename>
  <size><width>96</width><height>64</height><depth>3</depth></size>
  <object>
    <name>cat</name>
    <difficult>0</difficult>
    <bndbox><xmin>10</xmin><ymin>12</ymin><xmax>60</xmax><ymax>50</ymax></bndbox>
  </object>
  <object>
    <name>dog</name>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>
  </object>
</annotation>
"""
YAML = "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
ROWS = "0 0.5 0.5 0.4 0.5\n1 0.3 0.3 0.2 0.2\n"
COCO = {
    "info": {"year": 2024},
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 96, "height": 64},
        {"id": 2, "file_name": "b.jpg", "width": 96, "height": 64},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 12, 40, 30], "area": 1200, "iscrowd": 0},
        {
            "id": 2,
            "image_id": 2,
            "category_id": 3,
            "bbox": [1, 1, 30, 30],
            "area": 900,
            "iscrowd": 0,
            "segmentation": [[1, 1, 31, 1, 31, 31, 1, 31]],
        },
    ],
    "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}, {"id": 3, "name": "dog"}],
}


NO_IMAGES = (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\x00" * 64, b"\xff\xd8\xff")


def photo(rng: np.random.Generator, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A valid small image file."""
    pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format=kind)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file whose header promises so many pixels, with next to no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


TINY = "--workers 0 --batch-size 2 --model.image-size 64 64 --model.tcb-channels 8 --init-weights random"


def prepare(folder: Path) -> None:
    """Make a model of 64x64 pixels and a run that has a checkpoint."""
    import dataclasses

    from refinedet import RefineDet
    from refinedet.cli import main
    from refinedet.presets import PRESETS

    torch.set_num_threads(1)
    config = dataclasses.replace(PRESETS["smoke"].model, image_size=(64, 64), tcb_channels=8, num_classes=2)
    RefineDet(config, ("cat", "dog")).save_pretrained(folder / "model")
    write_yolo(np.random.default_rng(0), folder / "data")
    flags = f"{TINY} --iterations 4 --save-every 2"
    code = main(["train", "smoke", "--data", str(folder / "data"), "--out", str(folder / "run"), *flags.split()])
    if code:
        raise RuntimeError(f"the material could not be made: exit code {code}")


def write_voc(rng: np.random.Generator, root: Path) -> list[Path]:
    """A valid dataset; returns the annotation files."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    files = []
    for stem in ("a", "b", "c"):
        (root / "JPEGImages" / f"{stem}.jpg").write_bytes(photo(rng))
        file = root / "Annotations" / f"{stem}.xml"
        file.write_text(XML.replace("a.jpg", f"{stem}.jpg"))
        files.append(file)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Main/test.txt").write_text("c\n")
    return files


def write_yolo(rng: np.random.Generator, root: Path) -> list[Path]:
    """A valid dataset; returns its yaml and label files."""
    files = [root / "data.yaml"]
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for stem in ("a", "b"):
            (root / "images" / split / f"{split}_{stem}.jpg").write_bytes(photo(rng))
            files.append(root / "labels" / split / f"{split}_{stem}.txt")
            files[-1].write_text(ROWS)
    files[0].write_text(YAML)
    return files


def write_coco(rng: np.random.Generator, root: Path) -> Path:
    """A valid dataset; returns its JSON file."""
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    for stem in ("a", "b"):
        (root / "train" / f"{stem}.jpg").write_bytes(photo(rng))
    file = root / "annotations" / "instances_train.json"
    file.write_text(json.dumps(COCO))
    return file


def _look(rng: np.random.Generator, folder: Path, material: Path, data: Path, split: str) -> list[str]:
    """One of the commands that read a dataset."""
    kind = int(rng.integers(4))
    if kind == 0:
        return ["inspect", str(data)]
    if kind == 1:
        return ["inspect", str(data), "--mosaic", str(folder / "out" / "look.png")]
    model = str(material / "model")
    if kind == 2:
        extra = ["--report", str(folder / "out" / "report")] if rng.random() < 0.3 else []
        return ["evaluate", model, str(data), "--split", split, "--metric", str(rng.choice(["voc07", "coco"])), *extra]
    out = ["--out", str(folder / "out" / "run"), "--train-split", split, "--evaluate-split", "none"]
    return ["train", "smoke", "--data", str(data), "--iterations", "1", *TINY.split(), *out]


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


def images(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
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
            file.write_bytes(
                bytes([b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\x00" * 64][number % 4])
            )
        elif choice == 6:
            os.mkfifo(file)
        else:
            with open(os.fsencode(target) + b"/\xff\x1b[1m%d.png" % number, "wb") as stream:
                stream.write(data)
    arguments = ["predict", str(material / "model"), str(target), "--threshold", "0.01"]
    if rng.random() < 0.5:
        arguments += ["--save", str(folder / "out" / "drawn")]
    if rng.random() < 0.5:
        arguments += ["--json", str(folder / "out" / "found.json")]
        arguments += ["--json-format", "coco"] if rng.random() < 0.5 else []
    return arguments


def models(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    model = folder / "model"
    shutil.copytree(material / "model", model)
    config = model / "config.json"
    kind = int(rng.integers(4))
    if kind < 2:
        config.write_bytes(mutate_json(rng, json.loads(config.read_text())))
    elif kind == 2:
        config.write_bytes(mutate_bytes(rng, config.read_bytes()))
    else:
        _damage_file(rng, model / "model.safetensors")
    (folder / "a.jpg").write_bytes(photo(rng))
    return ["predict", str(model), str(folder / "a.jpg"), "--json", str(folder / "out.json")]


def _damage_file(rng: np.random.Generator, file: Path) -> None:
    """A change of few bytes in a large file."""
    size = file.stat().st_size
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


def resume(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    run = folder / "run"
    shutil.copytree(material / "run", run)
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and "tensorboard" not in file.parts]
    for _ in range(int(rng.integers(1, 3))):
        file = files[int(rng.integers(len(files)))]
        if not file.exists():
            continue
        kind = int(rng.integers(4))
        if kind == 0:
            file.unlink()
        elif kind == 1:
            _damage_file(rng, file) if file.stat().st_size else None
        elif file.suffix == ".json" and kind == 2:
            file.write_bytes(mutate_json(rng, json.loads(file.read_text())))
        elif file.stat().st_size < 100_000:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        else:
            _damage_file(rng, file)
    return ["train", "--resume", str(run)]


FLAGS: dict[str, tuple[str, ...]] = {
    "predict": ("--threshold", "--batch-size", "--device", "--save", "--json", "--json-format"),
    "evaluate": ("--split", "--metric", "--limit", "--batch-size", "--device", "--report", "--submission"),
    "inspect": ("--split", "--class-names", "--mosaic"),
    "benchmark": ("--runs", "--warmup", "--threads", "--image", "--device"),
    "convert": ("--preset", "--out", "--class-names", "--channel-order"),
    "train": (
        "--iterations",
        "--batch-size",
        "--learning-rate",
        "--weight-decay",
        "--gamma",
        "--momentum",
        "--seed",
        "--warmup-iterations",
        "--gradient-clip-norm",
        "--ema-decay",
        "--size-schedule",
        "--milestones",
        "--train-split",
        "--evaluate-split",
        "--class-names",
        "--init-weights",
        "--init",
        "--device",
        "--out",
        "--model.anchor-sizes",
        "--model.aspect-ratios",
        "--model.image-size",
        "--model.std",
        "--model.mean",
        "--model.num-classes",
        "--model.negative-threshold",
        "--augment.expand-ratio",
        "--loss.focal-gamma",
    ),
}


def values(rng: np.random.Generator, folder: Path, material: Path) -> list[str]:
    """Odd values on the command line, over valid files."""
    data = folder / "data"
    write_yolo(rng, data)
    (folder / "a.jpg").write_bytes(photo(rng))
    model, run = str(material / "model"), str(folder / "out" / "run")
    verb = sorted(FLAGS)[int(rng.integers(len(FLAGS)))]
    start = {
        "predict": ["predict", model, str(folder / "a.jpg")],
        "evaluate": ["evaluate", model, str(data), "--split", "val"],
        "inspect": ["inspect", str(data)],
        "benchmark": ["benchmark", model, "--runs", "1", "--warmup", "0"],
        "convert": ["convert", str(folder / "a.jpg"), "--preset", "voc07-320-vgg16", "--out", str(folder / "out")],
        "train": [
            "train",
            "smoke",
            "--data",
            str(data),
            "--out",
            run,
            "--iterations",
            "1",
            *TINY.split(),
        ],
    }[verb]
    for _ in range(int(rng.integers(1, 3))):
        flag = FLAGS[verb][int(rng.integers(len(FLAGS[verb])))]
        start += [flag] + [ARGUMENTS[int(rng.integers(len(ARGUMENTS)))] for _ in range(1 if rng.random() < 0.85 else 2)]
    return start


BUILDERS: dict[str, Builder] = {
    "images": images,
    "voc": voc,
    "coco": coco,
    "yolo": yolo,
    "models": models,
    "convert": convert,
    "values": values,
    "resume": resume,
}
"""Kind of input -> its builder."""
