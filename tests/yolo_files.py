"""Small YOLO folders of plain images, for tests of what tools and people really write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from refinedet.data import DetectionDataset

SIZE = (160, 120)
ROW = "0 0.25 0.33 0.25 0.33\n"
EDGES = [20, 19.8, 60, 59.4]
"""The box of ``ROW`` in pixels."""
YAML = "train: train/images\nval: valid/images\nnames: [cat, dog]\n"


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Write plain images; names may have folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (90, 120, 60)).save(folder / name)


def write_labels(folder: Path, names: Iterable[str], text: str = ROW) -> None:
    """Write label files of the same text; names may have folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_yolo(root: Path, images: Iterable[str], labels: Iterable[str], text: str = YAML, row: str = ROW) -> Path:
    """Write train/images and train/labels of the given names, valid/ with one image, and data.yaml."""
    write_images(root / "train/images", images)
    (root / "train/labels").mkdir(parents=True, exist_ok=True)
    write_labels(root / "train/labels", labels, row)
    write_images(root / "valid/images", ["v.jpg"])
    write_labels(root / "valid/labels", ["v.txt"])
    (root / "data.yaml").write_text(text)
    return root


def counts(dataset: DetectionDataset) -> dict[str, int]:
    """File name of each image -> number of its objects."""
    return {record.image_path.name: len(record.labels) for record in dataset.records}
