"""Exported files of several networks beside PyTorch, on real photos: the same boxes, one by one.

    python -m benchmarks.exported VOCdevkit/VOC2007/JPEGImages coco/images --count 98 --vgg16 vgg16_features.safetensors

Prints a row for each network and engine: how many photos, how many detections are equal at batch 1, 2, 5 and 8, the
largest differences, ties, and faults, which end the program with exit code 1. An image of 300 x 1 pixels and one on
which nothing is found come beside the photos.

The ResNet-18 networks have the weights of the bundled model, with its classes, with one of them, and with COCO's 80, of
which 18 are known to it and the others random. There are no weights of a VGG-16 detector: its heads are random, scaled
so that scores are as far from each other as those of a trained network; its backbone is that of ImageNet if given.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from refinedet import PRESETS, RefineDet, export
from refinedet.cli.terminal import run
from refinedet.config import ModelConfig
from refinedet.data.classes import COCO_CLASSES
from refinedet.deploy.verify import BOX_TOLERANCE, SCORE_TOLERANCE, blank_image, verify
from refinedet.errors import RefineDetError
from refinedet.images import read_image
from refinedet.pixels import Pixels
from refinedet.runtime import Runtime
from refinedet.sources import find_images
from refinedet.weights.convert import fit_backbone
from refinedet.weights.transfer import transfer_classes

BATCHES = (1, 2, 5, 8)
ENGINES = {"onnx": "ONNX Runtime", "xml": "OpenVINO"}


@dataclass(frozen=True)
class Case:
    """A network to export."""

    backbone: str
    size: tuple[int, int]
    class_names: tuple[str, ...] = ()
    """Empty: those of the bundled model."""

    @property
    def name(self) -> str:
        """Such as ``resnet18 320x512, 80 classes``."""
        classes = len(self.class_names) or 20
        return f"{self.backbone} {self.size[0]}x{self.size[1]}, {classes} class{'es' * (classes > 1)}"


CASES = (
    Case("resnet18", (320, 320)),
    Case("resnet18", (320, 320), ("person",)),
    Case("resnet18", (320, 320), COCO_CLASSES),
    Case("resnet18", (512, 512)),
    Case("resnet18", (320, 512)),
    Case("vgg16", (320, 320)),
    Case("vgg16", (320, 320), ("person",)),
    Case("vgg16", (320, 320), COCO_CLASSES),
    Case("vgg16", (512, 512)),
    Case("vgg16", (320, 512)),
)


def detector_of(case: Case, vgg16: Path | None = None) -> RefineDet:
    """The network of a case, with weights."""
    torch.manual_seed(0)
    bundled = RefineDet.from_pretrained("voc07-320-resnet18")
    names = case.class_names or bundled.class_names
    if case.backbone == "resnet18":
        model = RefineDet(replace(bundled.config, image_size=case.size, num_classes=len(names)), names)
        state, _ = transfer_classes(
            model.network.state_dict(), bundled.network.state_dict(), names, bundled.class_names
        )
        model.network.load_state_dict(state)
        return model
    preset = PRESETS["voc07-512-vgg16" if case.size == (512, 512) else "voc07-320-vgg16"].model
    config = replace(preset, image_size=case.size, num_classes=len(names))
    return _with_random_heads(config, names, vgg16)


def _with_random_heads(config: ModelConfig, names: tuple[str, ...], backbone: Path | None) -> RefineDet:
    fitted = None if backbone is None else fit_backbone(config, backbone)
    model = RefineDet(config if fitted is None else fitted.config, names)
    if fitted is not None:
        fitted.fill(model.network)
    with torch.no_grad():
        for head in (*model.network.odm, *model.network.arm):
            head.logits.weight.mul_(4)
            head.offsets.weight.mul_(5)
    return model


def photos_of(sources: list[str], count: int) -> list[Pixels]:
    """Photos drawn evenly from each source with a fixed seed, then a narrow and an empty image."""
    drawn = []
    for number, source in enumerate(sources):
        files = find_images([source], recursive=True).files
        share = count * (number + 1) // len(sources) - count * number // len(sources)
        drawn += random.Random(0).sample(files, min(share, len(files)))
    narrow = np.ascontiguousarray(np.broadcast_to(np.arange(300, dtype=np.uint8)[None, :, None], (1, 300, 3)))
    return [*(read_image(file) for file in drawn), narrow, blank_image()]


def compare(model: RefineDet, ending: str, images: list[Pixels]) -> list[str]:
    """Cells of a row of the table, and below it the ties.

    Raises:
        RefineDetError: the export keeps other boxes.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model.{ending}"
        export(model, file, images=images[:1])
        checked = verify(model, Runtime(file), images, BATCHES)
    found = [checked.images, checked.detections, f"{checked.box_difference:.2g}", f"{checked.score_difference:.2g}"]
    return [" | ".join(map(str, (*found, len(checked.ties)))), *checked.ties]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="folders or patterns of photos")
    parser.add_argument("--count", type=int, default=98, help="photos, drawn evenly from the sources")
    parser.add_argument("--few", type=int, default=8, help="photos for VGG-16, which is ten times as slow")
    parser.add_argument("--vgg16", type=Path, help="ImageNet weights of the VGG-16 backbone")
    parser.add_argument("--only", default="", help="only networks with this in their name")
    chosen = parser.parse_args(arguments)
    photos = photos_of(chosen.photos, chosen.count)
    sizes = ", ".join(map(str, BATCHES))
    print(f"batch {sizes}; boxes must agree within {BOX_TOLERANCE} px, scores within {SCORE_TOLERANCE}\n")
    print("| network | engine | images | detections equal | boxes within, px | scores within | ties |")
    print("|---|---|---|---|---|---|---|")
    faults = 0
    for case in CASES:
        if chosen.only not in case.name:
            continue
        model = detector_of(case, chosen.vgg16)
        images = photos if case.backbone == "resnet18" else [*photos[: chosen.few], *photos[-2:]]
        for ending, engine in ENGINES.items():
            try:
                first, *ties = compare(model, ending, images)
            except RefineDetError as error:
                faults += 1
                first, ties = f"FAULT: {error}", []
            print("\n".join((f"| {case.name} | {engine} | {first} |", *(f"  {tie}" for tie in ties))), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
