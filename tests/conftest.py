"""Fixtures for all tests: the real data beside the checkout, and tiny synthetic datasets in each layout.

Every synthetic image is a dark noisy ground with bright rectangles, one colour per class, so that a detector can
learn them in a few iterations. Boxes have integer corners, so they survive every layout without loss.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

SHARED_DATA = Path(__file__).parents[1] / "../shared/data"
os.environ["REFINEDET_DEBUG"] = "1"  # a bug of a command keeps its traceback, in subprocesses too
COLOURS = ((230, 60, 50), (60, 220, 80), (70, 110, 240), (240, 220, 60), (220, 80, 220), (80, 230, 230))
FolderFactory = Callable[..., Path]
FullDisk = Callable[[int], AbstractContextManager[None]]


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and signals do what they do in a terminal."""
    # A job in the background, or under nohup, ignores them, and so would the commands that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "shared_data: reads the real data in ../shared/data, skipped where it is absent")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data")
    return SHARED_DATA.resolve()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums over threads may be ordered differently from run to run; with one thread they cannot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def full_disk() -> FullDisk:
    """``with full_disk(limit)``: no file may grow beyond so many bytes, so write() fails as it does on a full disk."""

    @contextmanager
    def limited(limit: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@dataclass(frozen=True)
class Scene:
    """A synthetic image: (H, W, 3) uint8 pixels, (G, 4) xyxy pixel-edge boxes, (G,) labels, (G,) flags."""

    image: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]


def make_scene(index: int, *, size: tuple[int, int] = (96, 64), classes: int = 2, objects: int | None = None) -> Scene:
    """The scene of that index, always the same; ``size`` is (width, height). Index 3 has no objects by default."""
    rng = np.random.default_rng(1000 + index)
    width, height = size
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    count = objects if objects is not None else (0 if index == 3 else 1 + index % 3)
    boxes = np.zeros((count, 4), dtype=np.float32)
    labels = np.zeros(count, dtype=np.int64)
    for row in range(count):
        box_width = int(rng.integers(width // 5, width // 2 + 1))
        box_height = int(rng.integers(height // 5, height // 2 + 1))
        left = int(rng.integers(0, width - box_width + 1))
        top = int(rng.integers(0, height - box_height + 1))
        labels[row] = (index + row) % classes
        boxes[row] = (left, top, left + box_width, top + box_height)
        image[top : top + box_height, left : left + box_width] = COLOURS[int(labels[row]) % len(COLOURS)]
    difficult = np.zeros(count, dtype=np.bool_)
    difficult[2:] = True
    return Scene(image, boxes, labels, difficult)


def voc_xml(
    filename: str,
    size: tuple[int, int] | None,
    objects: Sequence[tuple[str, Sequence[float], bool]],
) -> str:
    """A VOC annotation; objects are (class, continuous xyxy box, difficult)."""
    lines = ["<annotation>", f"  <filename>{filename}</filename>"]
    if size is not None:
        lines.append(f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for name, (x1, y1, x2, y2), difficult in objects:
        lines.append(
            f"  <object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{x1 + 1:g}</xmin>"
            f"<ymin>{y1 + 1:g}</ymin><xmax>{x2:g}</xmax><ymax>{y2:g}</ymax></bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>", ""])


def _default_splits(images: int) -> dict[str, list[int]]:
    first = list(range(0, images, 2)) or [0]
    second = list(range(1, images, 2)) or first
    return {"train": first, "val": second, "trainval": list(range(images)), "test": second}


@pytest.fixture
def voc_folder(tmp_path: Path) -> FolderFactory:
    """Factory of a VOC year folder: ``voc_folder(images=6, size=(96, 64), class_names=("cat", "dog"))``.

    ``splits`` maps split names to scene indices (default: train, val, trainval, test; {} writes no ImageSets), ``name``
    is the folder below tmp_path (such as "VOCdevkit/VOC2007"), ``first`` the index of the first scene. Stems are
    "000000", "000001", ... of the scene index; scene 3 has no objects; third objects are difficult.
    """

    def make(
        images: int = 6,
        *,
        size: tuple[int, int] = (96, 64),
        class_names: Sequence[str] = ("cat", "dog"),
        splits: Mapping[str, Sequence[int]] | None = None,
        name: str = "voc",
        first: int = 0,
        extension: str = "jpg",
    ) -> Path:
        root = tmp_path / name
        for folder in ("Annotations", "JPEGImages"):
            (root / folder).mkdir(parents=True)
        for index in range(first, first + images):
            scene = make_scene(index, size=size, classes=len(class_names))
            filename = f"{index:06d}.{extension}"
            Image.fromarray(scene.image).save(root / "JPEGImages" / filename, quality=95)
            objects = [
                (class_names[int(label)], [float(value) for value in box], bool(flag))
                for box, label, flag in zip(scene.boxes, scene.labels, scene.difficult, strict=True)
            ]
            (root / "Annotations" / f"{index:06d}.xml").write_text(voc_xml(filename, size, objects))
        if splits is None:
            splits = {key: [first + i for i in values] for key, values in _default_splits(images).items()}
        for key, indices in splits.items():
            main = root / "ImageSets" / "Main"
            main.mkdir(parents=True, exist_ok=True)
            (main / f"{key}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
        return root

    return make


@pytest.fixture
def coco_folder(tmp_path: Path) -> FolderFactory:
    """Factory of a COCO folder: annotations/instances_<split>.json and <split>/, splits train and val by default.

    Category ids are 3, 6, 9, ... (with gaps), image ids 100 + scene index, file names "000000.jpg" of the scene index.
    The last object of every second image that has several is a crowd.
    """

    def make(
        images: int = 6,
        *,
        size: tuple[int, int] = (96, 64),
        class_names: Sequence[str] = ("cat", "dog"),
        splits: Mapping[str, Sequence[int]] | None = None,
        name: str = "coco",
    ) -> Path:
        root = tmp_path / name
        if splits is None:
            splits = {key: value for key, value in _default_splits(images).items() if key in ("train", "val")}
        (root / "annotations").mkdir(parents=True)
        for split, indices in splits.items():
            (root / split).mkdir()
            document: dict[str, list[dict[str, object]]] = {
                # Written in reverse, so that nobody relies on the order of the file.
                "categories": [{"id": 3 * i + 3, "name": n} for i, n in reversed(list(enumerate(class_names)))],
                "images": [],
                "annotations": [],
            }
            for index in indices:
                scene = make_scene(index, size=size, classes=len(class_names))
                filename = f"{index:06d}.jpg"
                Image.fromarray(scene.image).save(root / split / filename, quality=95)
                document["images"].append(
                    {"id": 100 + index, "file_name": filename, "width": size[0], "height": size[1]}
                )
                for row, (box, label) in enumerate(zip(scene.boxes, scene.labels, strict=True)):
                    x1, y1, x2, y2 = (float(value) for value in box)
                    document["annotations"].append(
                        {
                            "id": 1000 * (index + 1) + row,
                            "image_id": 100 + index,
                            "category_id": 3 * int(label) + 3,
                            "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "area": 0.8 * (x2 - x1) * (y2 - y1),
                            "iscrowd": int(index % 2 == 0 and row > 0 and row == len(scene.boxes) - 1),
                        }
                    )
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        return root

    return make


@pytest.fixture
def yolo_folder(tmp_path: Path) -> FolderFactory:
    """Factory of a YOLO folder: data.yaml, images/<split>/, labels/<split>/, splits train and val by default.

    Images without objects have no label file.
    """

    def make(
        images: int = 6,
        *,
        size: tuple[int, int] = (96, 64),
        class_names: Sequence[str] = ("cat", "dog"),
        splits: Mapping[str, Sequence[int]] | None = None,
        name: str = "yolo",
    ) -> Path:
        root = tmp_path / name
        if splits is None:
            splits = {key: value for key, value in _default_splits(images).items() if key in ("train", "val")}
        lines = [f"{split}: images/{split}" for split in splits]
        for split, indices in splits.items():
            for folder in ("images", "labels"):
                (root / folder / split).mkdir(parents=True)
            for index in indices:
                scene = make_scene(index, size=size, classes=len(class_names))
                Image.fromarray(scene.image).save(root / "images" / split / f"{index:06d}.jpg", quality=95)
                rows = []
                for (x1, y1, x2, y2), label in zip(scene.boxes.astype(np.float64), scene.labels, strict=True):
                    numbers = (x1 + x2) / 2 / size[0], (y1 + y2) / 2 / size[1], (x2 - x1) / size[0], (y2 - y1) / size[1]
                    rows.append(f"{label} " + " ".join(f"{number:.9f}" for number in numbers) + "\n")
                if rows:
                    (root / "labels" / split / f"{index:06d}.txt").write_text("".join(rows))
        listed = ", ".join(f'"{class_name}"' for class_name in class_names)
        (root / "data.yaml").write_text("\n".join([*lines, f"names: [{listed}]", ""]))
        return root

    return make
