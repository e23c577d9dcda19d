"""Batch prediction: images per second beside a plain loop over ``predict``, and memory over many images.

    python -m benchmarks.batch --images 200 --rounds 3              # speed, in turns
    python -m benchmarks.batch --memory 20000                       # memory at 10 % and at 100 %

Images are links to the photos in ``examples/``. Speed is that of the bundled model, start of the workers included;
memory is measured with a small network, so that most of the time goes into reading images and writing rows.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from refinedet import RefineDet, batch
from refinedet.bulk.run import Engine
from refinedet.config import ModelConfig

MODEL = "voc07-320-resnet18"
PHOTOS = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))


def link_images(folder: Path, count: int) -> Path:
    """A folder of so many names of the few photos."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:06d}.jpg").symlink_to(PHOTOS[index % len(PHOTOS)])
    return folder


def resident_megabytes() -> float:
    """Memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def measure_memory(work: Path, count: int) -> str:
    """Memory of the command at 10 % and at 100 % of the images."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True)
    RefineDet(config, ("cat", "dog")).save_pretrained(work / "model")
    marks: dict[int, float] = {}

    def note(done: int, total: int) -> None:
        for share in (10, 100):
            if 100 * done >= share * total:
                marks.setdefault(share, resident_megabytes())

    result = batch(
        work / "model", link_images(work / "many", count), work / "found", threshold=0.2, rows_per_part=1000,
        device="cpu", on_progress=note,
    )  # fmt: skip
    return (
        f"{count} images: {marks[10]:.0f} MB at 10 %, {marks[100]:.0f} MB at 100 % ({marks[100] / marks[10]:.3f}), "
        f"{count / result.seconds:.1f} images/s"
    )


def measure_speed(work: Path, count: int, rounds: int, ways: Sequence[tuple[Engine, int]]) -> str:
    """Images per second of a plain loop and of engines with so many workers, in turns."""
    images = link_images(work / "some", count)
    speeds: dict[str, list[float]] = {}
    for number in range(rounds):
        began = time.monotonic()
        model = RefineDet.from_pretrained(MODEL)
        for path in sorted(images.iterdir()):
            model.predict(path, threshold=0.4)
        speeds.setdefault("loop over predict", []).append(count / (time.monotonic() - began))
        for engine, workers in ways:
            began = time.monotonic()
            batch(MODEL, images, work / f"{engine}-{workers}-{number}", engine=engine, workers=workers, device="cpu")
            speeds.setdefault(f"{engine}, {workers} workers", []).append(count / (time.monotonic() - began))
    loop = speeds["loop over predict"]
    lines = [f"{count} images, {MODEL}, {rounds} rounds: images/s (least to most), ratio to the loop of the same round"]
    for name, values in speeds.items():
        ratio = statistics.median(value / other for value, other in zip(values, loop, strict=True))
        lines.append(
            f"  {name:<20} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})  {ratio:.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ray", type=int, nargs="*", default=[], help="numbers of workers of Ray")
    parser.add_argument("--memory", type=int, help="measure the memory over so many images instead")
    chosen = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="batch-"))
    try:
        if chosen.memory is not None:
            print(measure_memory(work, chosen.memory))
        else:
            ways: list[tuple[Engine, int]] = [("local", count) for count in chosen.workers]
            print(measure_speed(work, chosen.images, chosen.rounds, [*ways, *(("ray", count) for count in chosen.ray)]))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
