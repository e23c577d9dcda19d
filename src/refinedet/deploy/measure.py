"""What an export costs and gains: mAP and speed of the files beside PyTorch, in one run, and a card for each file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import refinedet
from refinedet.benchmark import Speed, comparison_table, measure_speeds
from refinedet.data import DetectionDataset
from refinedet.deploy.verify import Verification, example_photos
from refinedet.detector import RefineDet
from refinedet.evaluation.evaluate import Progress, evaluate
from refinedet.evaluation.report import Metric, data_name
from refinedet.images import read_image
from refinedet.runtime import Runtime

CARD_SIGNATURE = "exported by refinedet"
"""Stands in every card, by which it may be replaced."""


@dataclass(frozen=True)
class Measured:
    """Figures of PyTorch, which comes first, and of exported files."""

    speeds: tuple[Speed, ...]
    """On an example photo, in turns."""
    average_precisions: tuple[float, ...] = ()
    """mAP in 0..1; empty where there is no annotated data."""
    data: str = ""
    """What the mAP is of."""

    def table(self) -> str:
        """Speeds, then the mAP of each file and how much it lost."""
        lines = [comparison_table(self.speeds)]
        if self.average_precisions:
            before = self.average_precisions[0]
            figures = [f"PyTorch {100 * before:.2f}"]
            for speed, value in zip(self.speeds[1:], self.average_precisions[1:], strict=True):
                figures.append(f"{speed.name} {100 * value:.2f} ({100 * (value - before):+.2f})")
            lines.append(f"mAP ({self.data}): {', '.join(figures)}")
        return "\n".join(lines)


def measure(
    detector: RefineDet,
    files: Sequence[Path],
    dataset: DetectionDataset | None = None,
    metric: Metric = "voc07",
    *,
    runs: int = 30,
    on_progress: Progress | None = None,
) -> Measured:
    """Compare exported files with the detector that they were made of.

    All use as many CPU threads as PyTorch.

    Args:
        detector: in PyTorch, on the CPU.
        files: exported of it.
        dataset: annotated images to measure the mAP on.
        metric: see ``evaluate``.
        runs: timed runs of each.
        on_progress: called with (images done, images in all) of each evaluation.
    """
    exported = [(file.name, Runtime(file, threads=torch.get_num_threads())) for file in files]
    models: list[tuple[str, RefineDet | Runtime]] = [("PyTorch", detector), *exported]
    figures: list[float] = []
    if dataset is not None:
        figures = [evaluate(model, dataset, metric=metric, on_progress=on_progress)["mAP"] for _, model in models]
    speeds = measure_speeds(models, read_image(example_photos()[0]), runs=runs, warmup=3)
    where = "" if dataset is None else f"{metric}, {len(dataset)} images of {data_name(dataset)}"
    return Measured(tuple(speeds), tuple(figures), where)


def card(file: Path, source: str, checked: Verification, measured: Measured | None) -> str:
    """Markdown that tells what an exported file is, how it was verified and what was measured.

    Args:
        file: the file.
        source: the model that it was made of, as the user named it.
        checked: what its verification found.
        measured: figures, if there are any.
    """
    model = Runtime(file)
    height, width = model.config.image_size
    parts = [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]
    size = sum(part.stat().st_size for part in parts)
    summary = checked.summary()
    lines = [
        f"# {file.name}",
        "",
        f"RefineDet, {model.config.backbone} at {height}x{width}, {len(model.class_names)} classes, {model.precision}, "
        f"{size / 1e6:.1f} MB; {CARD_SIGNATURE} {refinedet.__version__} from `{source}`.",
        "",
        f"Input `images` (batch, height, width, 3), {model.input_type}, RGB in 0..255"
        + (", sides are multiples of 64." if model.dynamic_size else "."),
        "",
        f"{summary[0].upper()}{summary[1:]}.",
        "",
        *(["## Measured", "", *(f"    {line}" for line in measured.table().splitlines()), ""] if measured else []),
        "## Use",
        "",
        "    from refinedet.runtime import Runtime",
        f'    detections = Runtime("{file.name}").predict("photo.jpg")',
        "",
        "## Classes",
        "",
        ", ".join(model.class_names),
        "",
    ]
    return "\n".join(lines)
