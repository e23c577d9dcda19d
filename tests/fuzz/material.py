"""Valid files that hostile inputs are made of: images, datasets, a model, and runs, one of them stopped half-way."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

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


TINY = ("--workers", "0", "--batch-size", "2", "--model.image-size", "64", "64", "--model.tcb-channels", "8")
"""Flags of a training that takes a second."""
RANDOM_WEIGHTS = ("--init-weights", "random")
MODULES_FILE = "modules.txt"
LARGE = 1_000_000
"""Bytes from which on a file is linked and not copied, and told apart by its time and not by its content."""


def prepare(folder: Path) -> None:
    """Fill a folder with all that is made once.

    * data/: a YOLO dataset; model/: an untrained model of 64x64 pixels;
    * stopped/: a run that was stopped after 2 of 4 iterations; run/: the same run, finished, with a report;
    * weights.safetensors: weights of a backbone, as torchvision names them;
    * modules.txt: the modules that the verbs import, one a line, so that a process that forks can import them once.
    """
    import torch
    from safetensors.torch import save_file

    from refinedet import RefineDet
    from refinedet.cli import main
    from refinedet.presets import PRESETS
    from refinedet.training.train import resume, train

    torch.set_num_threads(1)
    smoke = PRESETS["smoke"]
    model = dataclasses.replace(smoke.model, image_size=(64, 64), tcb_channels=8, num_classes=2)
    detector = RefineDet(model, ("cat", "dog"))
    detector.save_pretrained(folder / "model")
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, folder / "weights.safetensors")
    write_yolo(np.random.default_rng(0), folder / "data")
    settings = dataclasses.replace(
        smoke.train, iterations=4, save_every=2, batch_size=2, workers=0, train_split="train", evaluate_split="val"
    )
    preset = dataclasses.replace(smoke, model=model, train=settings)
    answers = iter((False, True))
    train(
        preset, folder / "data", out=folder / "stopped", init_weights="random", device="cpu", stop=lambda: next(answers)
    )
    shutil.copytree(folder / "stopped", folder / "run")
    resume(folder / "run", device="cpu")
    photo_file, out = folder / "photo.jpg", folder / "scratch"
    photo_file.write_bytes(photo(np.random.default_rng(0)))
    for call in (
        ["predict", folder / "model", photo_file, "--save", out / "drawn", "--json", out / "a.json", "--threshold", 0],
        ["evaluate", folder / "model", folder / "data", "--split", "val", "--report", out / "report"],
        ["inspect", folder / "data", "--mosaic", out / "mosaic.png"],
        ["compare", folder / "run", folder / "run"],
        ["models"],
    ):
        if code := main([str(argument) for argument in call]):
            raise RuntimeError(f"the material could not be made: {call[0]} ended with exit code {code}")
    shutil.rmtree(out)
    (folder / MODULES_FILE).write_text("".join(f"{name}\n" for name in sorted(sys.modules) if "__" not in name))


def copy_folder(source: Path, target: Path) -> None:
    """A copy in which large files are second names of the same files, as copying 300 MB takes long."""

    def copy(file: str, to: str) -> str:
        (os.link if os.path.getsize(file) > LARGE else shutil.copyfile)(file, to)
        return to

    shutil.copytree(source, target, copy_function=copy)


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
