"""Data sets: reading VOC, COCO and YOLO folders, and checking their health. Importing this never imports torch."""

from __future__ import annotations

from refinedet.data.dataset import (
    DetectionDataset,
    Problem,
    Record,
    detect_layout,
    list_splits,
    open_dataset,
)
from refinedet.data.health import HealthReport, inspect_dataset

__all__ = [
    "DetectionDataset",
    "HealthReport",
    "Problem",
    "Record",
    "detect_layout",
    "inspect_dataset",
    "list_splits",
    "open_dataset",
]
