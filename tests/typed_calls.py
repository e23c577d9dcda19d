"""Calls that have to pass the type checker as they stand; ``mypy`` reads this file, nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from refinedet import Detections, RefineDet, RefineDetError, UsageError, Video
from refinedet.images import ImageSource
from refinedet.pixels import Pixels


def single(model: RefineDet, array: Pixels, tensor: torch.Tensor, image: Image.Image) -> list[Detections]:
    with Path("a.jpg").open("rb") as file:
        return [model.predict(array), model.predict(tensor), model.predict(image), model.predict(b""), model(file)]


def path(model: RefineDet) -> int:
    return len(model.predict("a.jpg").names) + len(model.predict(Path("folder")))


def many(model: RefineDet, arrays: list[Pixels], images: list[Image.Image]) -> list[Detections]:
    paths: list[Path] = [Path("a.jpg")]
    names: tuple[str, ...] = ("a.jpg",)

    def generated() -> Iterator[Image.Image]:
        yield from images

    mixed: list[ImageSource] = [paths[0], images[0], arrays[0]]
    results: list[Detections] = model.predict(images)
    results += model.predict(arrays) + model.predict(paths) + model.predict(names) + model.predict(generated())
    return results + list(model.stream(mixed, threshold=0.5, batch_size=2))


def videos(model: RefineDet) -> list[Detections]:
    clip = Video("clip.mp4", every=5, start=1.5)
    return [*model.stream(clip), *model.stream(0), *model.stream(["a.jpg", clip]), *model.predict(clip)]


def use(found: Detections) -> tuple[str, float, Detections]:
    try:
        first = found[0]
        return first.name, first.score, found[found.scores > 0.5] + found[:1] + found.filter(labels="cat")
    except (UsageError, RefineDetError) as error:
        raise SystemExit(str(error)) from None
