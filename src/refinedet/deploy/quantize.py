"""Eight-bit weights and activations, calibrated on images by NNCF.

Only what lies between the first convolution and the last ones is quantised. Pixels, decoding, suppression and sorting
stay float32: they cost little, and their numbers need all digits.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refinedet.data import open_dataset
from refinedet.data.layouts import detect_layout, list_splits
from refinedet.errors import UsageError
from refinedet.evaluation.run_data import RunData, find_run
from refinedet.files import user_path
from refinedet.images import read_image
from refinedet.pixels import Pixels
from refinedet.runtime import import_package
from refinedet.sources import find_images

CALIBRATION_IMAGES = 300
"""Images that ranges of activations are measured on; more change little."""
_SPLITS = ("train", "trainval")

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def calibration_files(
    model: object, source: Sequence[str] | str | Path | None, split: str | None = None
) -> tuple[str | Path, ...]:
    """At most 300 images to calibrate on, drawn with a fixed seed.

    Args:
        model: what is exported; of a run folder, the images that it was trained on are the default.
        source: annotated data, or a folder, pattern or list of images; labels are not used.
        split: of annotated data; default: train, else trainval, else all images.

    Raises:
        UsageError: nothing to calibrate on.
        RefineDetError: the data cannot be read.
    """
    if source is None:
        run = find_run(model) if isinstance(model, (str, Path)) else None
        if run is None:
            raise UsageError("int8 needs images to calibrate on: a folder of photos like those it will see")
        files: list[str | Path] = [record.image_path for record in RunData.of(run).train().records]
    elif isinstance(source, (str, Path)) and (split is not None or _is_dataset(source)):
        chosen = split or next((name for name in _SPLITS if name in list_splits(source)), "all")
        files = [record.image_path for record in open_dataset(source, chosen, require_annotations=False).records]
    else:
        images = [source] if isinstance(source, (str, Path)) else source
        files = list(find_images([str(image) for image in images], recursive=True).files)
    if not files:
        raise UsageError(f"{source}: no images to calibrate on")
    return tuple(random.Random(0).sample(files, min(CALIBRATION_IMAGES, len(files))))


def _is_dataset(source: str | Path) -> bool:
    try:
        detect_layout(source)
    except UsageError:
        return False
    return user_path(source).exists()


def quantize(
    model: Any, files: Sequence[str | Path], inputs: Callable[[list[Pixels]], Any], progress: Progress | None = None
) -> Any:
    """Quantise a graph.

    Args:
        model: an ``onnx.ModelProto`` with one input. OpenVINO's files are converted from its result: calibrated on
            OpenVINO's own graphs, NNCF quantises more operations, at a loss and no gain in speed.
        files: images to calibrate on.
        inputs: (1, H, W, 3) input of the graph for a list of one image.
        progress: called after each image.

    Returns:
        An ``onnx.ModelProto``.
    """
    with _quiet():
        nncf = import_package("nncf", "int8")
    name = model.graph.input[0].name
    done = 0

    def read(file: str | Path) -> Any:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, len(files)), len(files))
        return {name: inputs([read_image(file)])}

    nncf.set_log_level(logging.ERROR)
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(files, read),
            subset_size=len(files),
            preset=nncf.QuantizationPreset.MIXED,  # symmetric weights, asymmetric activations
            ignored_scope=nncf.IgnoredScope(names=outside_of_the_network(_nodes(model))),
            # Processors without VNNI add products of eight bits in sixteen, which overflow unless weights use seven.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


class Node(NamedTuple):
    """An operation of a graph."""

    name: str
    kind: str
    parents: tuple[str, ...]
    """Names of the operations that it takes values from."""


def outside_of_the_network(nodes: Sequence[Node]) -> list[str]:
    """Names of the operations before the first convolutions and behind the last ones.

    Args:
        nodes: all operations, each behind its parents.
    """
    convolutions = {node.name for node in nodes if node.kind.startswith("Conv")}
    behind: set[str] = set()
    for node in nodes:
        if any(parent in behind or parent in convolutions for parent in node.parents):
            behind.add(node.name)
    before: set[str] = set()
    for node in reversed(nodes):
        if node.name in before or node.name in convolutions:
            before.update(node.parents)
    inside = convolutions | (behind & before)
    return [node.name for node in nodes if node.name not in inside]


def _nodes(model: Any) -> list[Node]:
    maker = {value: node.name for node in model.graph.node for value in node.output}
    return [
        Node(node.name, node.op_type, tuple(maker[value] for value in node.input if value in maker))
        for node in model.graph.node
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's progress bars, and what torch says when NNCF looks for a CUDA compiler."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
