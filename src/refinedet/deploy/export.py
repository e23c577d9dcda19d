"""``export``: a detector as one ONNX or OpenVINO file, verified on real images before it is handed over."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

import refinedet
from refinedet.dataclass_json import to_dict
from refinedet.deploy.graph import OUTPUTS, RAW_OUTPUTS, DetectorGraph, InputType
from refinedet.deploy.verify import Verification, verification_images, verify
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import check_output, failure_reason, make_folder, user_path
from refinedet.runtime import METADATA_KEY, SUFFIXES, Runtime

if TYPE_CHECKING:
    from refinedet.pixels import Pixels

OPSET = 20
"""Of the exported ONNX files."""
LARGEST_BATCH = 1024
MARK = "refinedet exported detector"
"""Stands in the metadata of every exported file, by which it may be replaced."""


def export(
    model: RefineDet | str | Path,
    path: str | Path,
    *,
    input_type: InputType = "float32",
    dynamic_size: bool = False,
    raw: bool = False,
    half: bool = False,
    images: Sequence[Pixels] | str | Path | None = None,
) -> Verification:
    """Write a detector to a file that runs without PyTorch, post-processing included.

    The graph takes ``images (batch, height, width, 3)``, RGB in 0..255, resized to the model's input, and returns
    ``boxes (batch, D, 4)`` in pixels of that input, ``scores (batch, D)``, ``labels (batch, D)``,
    ``num_detections (batch,)`` and ``settled (batch,)`` (see ``deploy.graph.GraphDetections``). The batch is dynamic.
    Class names, thresholds and the rest of the configuration are in the file's metadata, so that ``Runtime`` needs
    nothing else.

    Args:
        model: a detector, or what ``RefineDet.from_pretrained`` takes.
        path: ends in ``.onnx``, or in ``.xml`` for OpenVINO's format (with a ``.bin`` file beside it).
        input_type: "float32" gives the boxes of PyTorch; "uint8" rounds resized pixels to whole numbers and needs a
            quarter of the memory.
        dynamic_size: let height and width be any multiples of 64.
        raw: leave out post-processing; the outputs are those of ``model.network.Predictions``.
        half: OpenVINO only: store weights as float16.
        images: what the file is verified on: pixels, or a folder of images. Default: the example photos and crowded
            scenes made of them. A raw file is compared by its outputs.

    Returns:
        The largest differences from PyTorch.

    Raises:
        UsageError: another ending, an existing file that is no export, or a package that is not installed.
        RefineDetError: the file's detections differ from those of PyTorch, or the disk is full; nothing is left behind.

    Example:
        >>> from refinedet import export
        >>> print(export("voc07-320-resnet18", "deploy/model.onnx").summary())  # doctest: +SKIP
        verified on 8 images at batch 1, 2, 5: 4332 detections equal, boxes within 0.00037 px, scores within 1.1e-06,
        ties: 0
    """
    target = check_target(user_path(path), half=half)
    if input_type not in get_args(InputType):
        raise UsageError(f"input_type must be 'float32' or 'uint8', not {input_type!r}")
    detector = model if isinstance(model, RefineDet) else RefineDet.from_pretrained(model)
    scenes = verification_images(images)
    make_folder(target.parent)
    try:
        write = partial(_write, detector, input_type=input_type, dynamic_size=dynamic_size, raw=raw, half=half)
        return _replace(target, detector, scenes, write)
    except OSError as error:  # of libraries that write without naming the file
        raise RefineDetError(f"{target}: cannot be saved ({failure_reason(error)})") from None


def _replace(target: Path, detector: RefineDet, scenes: Any, write: Callable[[Path], object]) -> Verification:
    """Write beside the target, verify, and move the finished file into place in one step."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as name:
        aside = Path(name) / target.name
        write(aside)
        checked = verify(detector, Runtime(aside), scenes)
        for written in sorted(aside.parent.glob(f"{target.stem}.*"), key=lambda file: file.suffix == target.suffix):
            os.replace(written, target.with_suffix(written.suffix))  # the .bin before the .xml that names it
    return checked


def check_target(path: Path, *, half: bool = False) -> Path:
    """Find out, before the work starts, whether a model can be exported to ``path``; returns it.

    Raises:
        UsageError: another ending, a package that is not installed, a file there that is no exported model.
        RefineDetError: the file cannot be written there.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: an exported model ends in .onnx, or in .xml for OpenVINO")
    if half and path.suffix != ".xml":
        raise UsageError(f"{path}: weights of float16 are for OpenVINO's .xml only")
    packages = ("onnx", "onnxscript", "onnxruntime", *(("openvino",) if path.suffix == ".xml" else ()))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed: pip install 'refinedet[export]'")
    check_output(path, ours=_is_export)
    if path.suffix == ".xml" and path.with_suffix(".bin").exists() and not path.exists():
        raise UsageError(f"{path.with_suffix('.bin')}: exists without {path.name}; choose another name or remove it")
    return path


def _is_export(path: Path) -> bool:
    """Whether ``export`` wrote a file: its metadata name this package."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 100_000))
        return MARK.encode() in stream.read()


def metadata(detector: RefineDet, input_type: InputType, *, dynamic_size: bool, raw: bool) -> str:
    """What ``Runtime`` reads from the file, as JSON."""
    return json.dumps(
        {
            "generator": MARK,
            "version": refinedet.__version__,
            "class_names": list(detector.class_names),
            "category_ids": detector.category_ids,
            "input_type": input_type,
            "dynamic_size": dynamic_size,
            "raw": raw,
            "model": to_dict(detector.config),
            "metrics": detector.metrics,
        }
    )


def _write(
    detector: RefineDet, path: Path, *, input_type: InputType, dynamic_size: bool, raw: bool, half: bool
) -> None:
    """Trace, translate and save."""
    import onnx

    graph = DetectorGraph(detector, raw=raw)
    height, width = detector.config.image_size
    if dynamic_size:  # a map of one cell would be traced as a size that never changes
        height, width = max(height, 192), max(width, 192)
    example = torch.zeros(2, height, width, 3, dtype=getattr(torch, input_type))
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    if dynamic_size:
        shapes |= {axis: 64 * torch.export.Dim(name, min=1, max=64) for axis, name in ((1, "rows"), (2, "columns"))}
    names = RAW_OUTPUTS if raw else OUTPUTS
    with torch.no_grad(), _quiet():
        traced = torch.export.export(graph, (example,), dynamic_shapes={"images": shapes}, strict=False)
        program = torch.onnx.export(
            traced, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=list(names)
        )
    if program is None:
        raise RefineDetError("this model could not be translated to ONNX")
    document = program.model_proto
    _name_axes(document, dynamic_size=dynamic_size)
    text = metadata(detector, input_type, dynamic_size=dynamic_size, raw=raw)
    onnx.helper.set_model_props(document, {METADATA_KEY: text})
    document.producer_name, document.producer_version = "refinedet", refinedet.__version__
    if path.suffix == ".onnx":
        onnx.save_model(document, path)
        return
    import openvino

    source = path.with_suffix(".source.onnx")
    onnx.save_model(document, source)
    converted = openvino.convert_model(source)
    converted.set_rt_info(text, METADATA_KEY)
    openvino.save_model(converted, path, compress_to_fp16=half)
    source.unlink()


def _name_axes(document: Any, *, dynamic_size: bool) -> None:
    """Call the free axes "batch", "height" and "width"."""
    names = {0: "batch", **({1: "height", 2: "width"} if dynamic_size else {})}
    for axis, name in names.items():
        document.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    for output in document.graph.output:
        first = output.type.tensor_type.shape.dim[0]
        if first.dim_param:
            first.dim_param = "batch" if output.name != "anchors" else first.dim_param


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the progress lines and warnings of torch's exporter, which speak to its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
