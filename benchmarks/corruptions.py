"""What a model has left on pictures that are small, blurred, noisy, compressed, dark or pale: mAP at three strengths.

    python -m benchmarks.corruptions voc07-320-resnet18 VOCdevkit --split 'val[-250:]'
    python -m benchmarks.corruptions runs/a runs/b COCO --split all --shared-classes

The kinds follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions" (ICLR 2019);
the strengths are ours, in pixels of the image and grey levels of 0..255, and written in the table. An image is
corrupted at its own size, before the model resizes it; noise depends on the image alone, so all models see the same.
"""

from __future__ import annotations

import argparse
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from refinedet import evaluate
from refinedet.ablations import markdown_table
from refinedet.cli.terminal import run
from refinedet.config import ModelConfig
from refinedet.data import open_dataset
from refinedet.detections import Detections
from refinedet.evaluation.detector import Detector
from refinedet.loading import load_detector

Pixels = npt.NDArray[np.uint8]


def low_resolution(image: Pixels, factor: float) -> Pixels:
    """An image that had ``factor`` times fewer pixels a side and was enlarged again."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(1, round(width / factor)), max(1, round(height / factor))), Image.BOX)
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def blur(image: Pixels, deviation: float) -> Pixels:
    """Gaussian blur of that standard deviation in pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(deviation)))


def noise(image: Pixels, deviation: float) -> Pixels:
    """Gaussian noise of that standard deviation in grey levels, independent in every channel."""
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return _grey_levels(image + rng.normal(0.0, deviation, image.shape))


def jpeg(image: Pixels, quality: float) -> Pixels:
    """Compressed as JPEG of that quality."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", quality=int(quality))
    return np.asarray(Image.open(stream).convert("RGB"))


def light(image: Pixels, factor: float) -> Pixels:
    """All values times ``factor``: below 1 dark, above 1 bright, with what exceeds white cut off."""
    return _grey_levels(image * factor)


def contrast(image: Pixels, factor: float) -> Pixels:
    """Distances from the mean of the image times ``factor``."""
    mean = image.mean()
    return _grey_levels((image - mean) * factor + mean)


def _grey_levels(values: npt.NDArray[np.floating]) -> Pixels:
    return np.rint(values).clip(0, 255).astype(np.uint8)


CORRUPTIONS: dict[str, tuple[Callable[[Pixels, float], Pixels], tuple[float, float, float]]] = {
    "low resolution (factor)": (low_resolution, (2, 4, 8)),
    "blur (pixels)": (blur, (1.5, 3, 6)),
    "noise (grey levels)": (noise, (12, 25, 50)),
    "JPEG (quality)": (jpeg, (25, 12, 6)),
    "dark (factor)": (light, (0.5, 0.25, 0.12)),
    "bright (factor)": (light, (1.5, 2.25, 3.5)),
    "low contrast (factor)": (contrast, (0.5, 0.25, 0.12)),
}
"""Kind to its function and three strengths, from weak to strong."""


@dataclass(frozen=True)
class Corrupted:
    """A detector that sees every image corrupted."""

    detector: Detector
    corrupt: Callable[[Pixels, float], Pixels]
    strength: float

    @property
    def config(self) -> ModelConfig:
        """The detector's."""
        return self.detector.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The detector's."""
        return self.detector.class_names

    def predict_arrays(self, images: Sequence[Pixels], *, threshold: float | None = None) -> list[Detections]:
        """What the detector finds; corruptions keep the size, so boxes are those of the image."""
        corrupted = [self.corrupt(image, self.strength) for image in images]
        return self.detector.predict_arrays(corrupted, threshold=threshold)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="all")
    parser.add_argument("--shared-classes", action="store_true", help="measure by the classes that both have")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    for name in chosen.models:
        model = load_detector(name, threads=chosen.threads)
        dataset = open_dataset(chosen.data, chosen.split, None if chosen.shared_classes else model.class_names)

        def measure(detector: Detector) -> float:
            report = evaluate(detector, dataset, metric="voc07", shared_classes=chosen.shared_classes)  # noqa: B023
            return 100 * float(report["mAP"])

        clean = measure(model)
        print(f"{name}, {len(dataset)} images of {chosen.data.name} {chosen.split}: VOC mAP {clean:.2f}", flush=True)
        rows = []
        for kind, (corrupt, strengths) in CORRUPTIONS.items():
            found = [measure(Corrupted(model, corrupt, strength)) for strength in strengths]
            cells = [f"{figure:.1f} ({strength:g})" for figure, strength in zip(found, strengths, strict=True)]
            share = f"{100 * sum(found) / len(found) / clean:.0f} %" if clean else "-"
            rows.append([kind, *cells, share])
            print(" | ".join(rows[-1]), flush=True)
        print(markdown_table(["corruption", "weak", "medium", "strong", "mean, of the clean mAP"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
