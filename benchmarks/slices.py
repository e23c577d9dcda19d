"""What slices gain: COCO's AP of a model alone and by slices, on the images of a dataset or on several joined to one.

    python -m benchmarks.slices deploy/model.onnx VOCdevkit --split 'val[-180:]' --columns 3
    python -m benchmarks.slices deploy/model.onnx coco --side 320 --overlap 64

``--columns 3`` joins each nine images in a row, at their full size, to one image with the objects of all. Seconds are
those of the processor, over all threads, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from examples.deploy.slices import Sliced, by_sahi, by_supervision
from PIL import Image

from refinedet import evaluate
from refinedet.cli.terminal import run
from refinedet.data import DetectionDataset, Record, open_dataset
from refinedet.loading import load_detector

GRAY = (124, 116, 104)


def join(dataset: DetectionDataset, indices: Sequence[int], columns: int, file: Path) -> Record:
    """Write the images at ``indices`` as one and return its record; each lies in a cell of the size of the largest."""
    parts = [dataset[index] for index in indices]
    width, height = max(part.width for part in parts), max(part.height for part in parts)
    sheet = Image.new("RGB", (width * columns, height * columns), GRAY)
    boxes = []
    for position, (index, part) in enumerate(zip(indices, parts, strict=True)):
        corner = position % columns * width, position // columns * height
        sheet.paste(Image.fromarray(dataset.load_image(index)), corner)
        boxes.append(part.boxes + np.array(corner * 2, dtype=np.float32))
    sheet.save(file, quality=95)
    fields = ("labels", "difficult", "crowd", "areas")
    return Record(
        image_path=file,
        image_id=file.stem,
        width=sheet.width,
        height=sheet.height,
        boxes=np.concatenate(boxes),
        **{field: np.concatenate([getattr(part, field) for part in parts]) for field in fields},
    )


def main() -> int:
    """Print a row for the model alone and for each way of slicing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="all")
    parser.add_argument("--columns", type=int, default=1, help="of images in a joined image, as many rows")
    parser.add_argument("--side", type=int, default=640, help="of a slice")
    parser.add_argument("--overlap", type=int, default=128, help="of neighbouring slices")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    model = load_detector(arguments.model, threads=arguments.threads)
    dataset = open_dataset(arguments.data, arguments.split)
    with tempfile.TemporaryDirectory() as folder:
        if (columns := arguments.columns) > 1:
            count = columns**2
            groups = [range(first, first + count) for first in range(0, len(dataset) - count + 1, count)]
            records = [join(dataset, group, columns, Path(folder, f"{group[0]}.jpg")) for group in groups]
            dataset = replace(dataset, records=records)
        sides = np.array([(record.width, record.height) for record in dataset.records])
        print(f"{len(dataset)} images, {sides[:, 0].mean():.0f}x{sides[:, 1].mean():.0f} pixels on average")
        print("| detector | AP | AP50 | small | medium | large | CPU s per image |")
        print("|---|---|---|---|---|---|---|")
        slices = {"side": arguments.side, "overlap": arguments.overlap}
        for name, detector in (
            ("the model alone", model),
            ("supervision", Sliced(model, by_supervision, **slices)),
            ("SAHI", Sliced(model, by_sahi, **slices)),
        ):
            began = time.process_time()
            report = evaluate(detector, dataset, metric="coco", shared_classes=True, batch_size=1)
            seconds = (time.process_time() - began) / len(dataset)
            figures = " | ".join(f"{100 * report[figure]:.1f}" for figure in ("AP", "AP50", "APs", "APm", "APl"))
            print(f"| {name} | {figures} | {seconds:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
