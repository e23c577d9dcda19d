"""Datasets: reading VOC, COCO and YOLO folders, and checking their health. Importing this never imports torch."""

from __future__ import annotations

from refinedet.data.health import HealthReport, inspect_dataset
from refinedet.data.layouts import LAYOUTS, detect_layout, list_splits, open_dataset, open_joined
from refinedet.data.problems import Problem
from refinedet.data.records import DetectionDataset, Record

__all__ = [
    "LAYOUTS",
    "DetectionDataset",
    "HealthReport",
    "Problem",
    "Record",
    "detect_layout",
    "inspect_dataset",
    "list_splits",
    "open_dataset",
    "open_joined",
]
