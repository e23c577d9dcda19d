"""``export``: a detector as one ONNX or OpenVINO file, verified on real images before it is handed over."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

import refinedet
from refinedet.dataclass_json import to_dict
from refinedet.deploy.graph import OUTPUTS, RAW_OUTPUTS, DetectorGraph, InputType
from refinedet.deploy.quantize import Progress, calibration_files, quantize
from refinedet.deploy.verify import Verification, verification_images, verify
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import check_output, failure_reason, user_path
from refinedet.images import read_image
from refinedet.locks import lock_folder
from refinedet.runtime import DIGEST_KEY, METADATA_KEY, SUFFIXES, Runtime, digest_of, graph_inputs, import_package

if TYPE_CHECKING:
    from refinedet.pixels import Pixels

Precision = Literal["fp32", "fp16", "int8"]

OPSET = 20
"""Of the exported ONNX files."""
LARGEST_BATCH = 1024
CALIBRATION_IMAGES_TO_VERIFY = 16
"""So many images of the calibration are verified on, too."""
MARK = "refinedet exported detector"
"""Stands in the metadata of every exported file, by which it may be replaced."""


def export(
    model: RefineDet | str | Path,
    path: str | Path,
    *,
    input_type: InputType = "float32",
    dynamic_size: bool = False,
    raw: bool = False,
    precision: Precision = "fp32",
    calibration: Sequence[str] | str | Path | None = None,
    calibration_split: str | None = None,
    images: Sequence[Pixels] | str | Path | None = None,
    on_progress: Progress | None = None,
) -> Verification:
    """Write a detector to a file that runs without PyTorch, post-processing included.

    The graph takes ``images (batch, height, width, 3)``, RGB in 0..255, resized to the model's input, and returns
    ``boxes (batch, D, 4)`` in pixels of that input, ``scores (batch, D)``, ``labels (batch, D)``,
    ``num_detections (batch,)``, ``settled (batch,)`` and ``finite (batch,)`` (see ``deploy.graph.GraphDetections``).
    The batch is dynamic. Class names, thresholds and the rest of the configuration are in the file's metadata, so that
    ``Runtime`` needs nothing else.

    Args:
        model: a detector, or what ``RefineDet.from_pretrained`` takes.
        path: ends in ``.onnx``, or in ``.xml`` for OpenVINO's format (with a ``.bin`` file beside it).
        input_type: "float32" gives the boxes of PyTorch; "uint8" rounds resized pixels to whole numbers and needs a
            quarter of the memory.
        dynamic_size: let height and width be any multiples of 64.
        raw: leave out post-processing; the outputs are those of ``model.network.Predictions``.
        precision: "fp32" keeps what PyTorch keeps. "fp16" stores the weights in half the space, for OpenVINO only.
            "int8" computes with eight bits, in a quarter of the space and faster, and changes boxes and scores a little
            (``deploy.quantize``).
        calibration: for "int8": images like those that the model will see, as ``quantize.calibration_files`` takes
            them; by default those that a run was trained on.
        calibration_split: split of annotated data to calibrate on.
        images: what the file is verified on: pixels, or a folder of images. Default: the example photos and crowded
            scenes made of them, for "int8" with images of the calibration. A raw file is compared by its outputs.
        on_progress: called with (images done, images in all) of the calibration.

    Returns:
        The largest differences from PyTorch.

    Raises:
        UsageError: another ending, an existing file that is no export, or a package that is not installed.
        RefineDetError: the file's detections differ from those of PyTorch (``verify.verify``), or the disk is full;
            nothing is left behind.

    Example:
        >>> from refinedet import export
        >>> print(export("voc07-320-resnet18", "deploy/model.onnx").summary())  # doctest: +SKIP
        verified on 8 images at batch 1, 2, 5: 4332 detections equal, boxes within 0.00037 px, scores within 1.1e-06,
        ties: 0
    """
    form = _Form(input_type, dynamic_size, raw, precision)
    target = check_target(user_path(path), precision=precision)
    form.check()
    detector = model if isinstance(model, RefineDet) else RefineDet.from_pretrained(model)
    files = calibration_files(model, calibration, calibration_split) if precision == "int8" else ()
    scenes = verification_images(images)
    if images is None:
        scenes += [read_image(file) for file in files[:CALIBRATION_IMAGES_TO_VERIFY]]
    try:
        with lock_folder(target.parent, "export"):
            return _replace(target, detector, scenes, partial(_write, detector, form, files, on_progress))
    except OSError as error:  # of libraries that write without naming the file
        raise RefineDetError(f"{target}: cannot be saved ({failure_reason(error)})") from None


@dataclass(frozen=True)
class _Form:
    """How a detector is written; see ``export``."""

    input_type: InputType
    dynamic_size: bool
    raw: bool
    precision: Precision

    def check(self) -> None:
        """Raise ``UsageError`` for what does not exist."""
        for name, value, known in (
            ("input_type", self.input_type, get_args(InputType)),
            ("precision", self.precision, get_args(Precision)),
        ):
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.raw and self.precision != "fp32":
            raise UsageError("a file without post-processing is exported in fp32 only")


def _replace(target: Path, detector: RefineDet, scenes: Any, write: Callable[[Path], object]) -> Verification:
    """Write beside the target, verify, and move the finished file into place in one step; needs the folder's lock."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):  # by exports that were killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".part") as name:
        aside = Path(name) / target.name
        write(aside)
        checked = verify(detector, Runtime(aside), scenes)
        # The .bin before the .xml that names it: killed in between, the digest in the .xml does not fit.
        for written in sorted(aside.parent.glob(f"{target.stem}.*"), key=lambda file: file.suffix == target.suffix):
            os.replace(written, target.with_suffix(written.suffix))
    return checked


def check_target(path: Path, *, precision: str = "fp32") -> Path:
    """Find out, before the work starts, whether a model can be exported to ``path``; returns it.

    Raises:
        UsageError: another ending, a package that is not installed, a file there that is no exported model.
        RefineDetError: the file cannot be written there.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: an exported model ends in .onnx, or in .xml for OpenVINO")
    if precision == "fp16" and path.suffix != ".xml":
        raise UsageError(f"{path}: weights of float16 are for OpenVINO's .xml only")
    packages = ["onnx", "onnxscript", "onnxruntime"]
    packages += ["openvino"] * (path.suffix == ".xml") + ["nncf"] * (precision == "int8")
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = "int8" if precision == "int8" else "export"
        raise UsageError(f"{', '.join(missing)} not installed: pip install 'refinedet[{extra}]'")
    check_output(path, ours=_is_export)
    if path.suffix == ".xml" and path.with_suffix(".bin").exists() and not path.exists():
        raise UsageError(f"{path.with_suffix('.bin')}: exists without {path.name}; choose another name or remove it")
    return path


def _is_export(path: Path) -> bool:
    """Whether ``export`` wrote a file: its metadata name this package."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 100_000))
        return MARK.encode() in stream.read()


def metadata(detector: RefineDet, form: _Form) -> str:
    """What ``Runtime`` reads from the file, as JSON."""
    return json.dumps(
        {
            "generator": MARK,
            "version": refinedet.__version__,
            "class_names": list(detector.class_names),
            "category_ids": detector.category_ids,
            **asdict(form),
            "model": to_dict(detector.config),
            "metrics": detector.metrics,
        }
    )


def _write(
    detector: RefineDet, form: _Form, calibration: Sequence[str | Path], progress: Progress | None, path: Path
) -> None:
    """Trace, translate, quantise and save."""
    import onnx

    document = _translate(detector, form)
    if form.precision == "int8":
        document = quantize(
            document, calibration, lambda images: graph_inputs(images, detector.config, form.input_type), progress
        )
    text = metadata(detector, form)
    onnx.helper.set_model_props(document, {METADATA_KEY: text})
    document.producer_name, document.producer_version = "refinedet", refinedet.__version__
    if path.suffix == ".onnx":
        onnx.save_model(document, path)
        return
    openvino = import_package("openvino", path)
    source = path.with_suffix(".source.onnx")
    onnx.save_model(document, source)
    converted = openvino.convert_model(source)
    source.unlink()
    converted.set_rt_info(text, METADATA_KEY)
    half = form.precision == "fp16"
    openvino.save_model(converted, path, compress_to_fp16=half)
    converted.set_rt_info(digest_of(path.with_suffix(".bin")), DIGEST_KEY)
    openvino.save_model(converted, path, compress_to_fp16=half)


def _translate(detector: RefineDet, form: _Form) -> Any:
    """The detector as an ``onnx.ModelProto``."""
    graph = DetectorGraph(detector, raw=form.raw)
    height, width = detector.config.image_size
    if form.dynamic_size:  # a map of one cell would be traced as a size that never changes
        height, width = max(height, 192), max(width, 192)
    example = torch.zeros(2, height, width, 3, dtype=getattr(torch, form.input_type))
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    if form.dynamic_size:
        shapes |= {axis: 64 * torch.export.Dim(name, min=1, max=64) for axis, name in ((1, "rows"), (2, "columns"))}
    names = RAW_OUTPUTS if form.raw else OUTPUTS
    with torch.no_grad(), _quiet():
        traced = torch.export.export(graph, (example,), dynamic_shapes={"images": shapes}, strict=False)
        program = torch.onnx.export(
            traced, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=list(names)
        )
    if program is None:
        raise RefineDetError("this model could not be translated to ONNX")
    document = program.model_proto
    _name_axes(document, dynamic_size=form.dynamic_size)
    return document


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
