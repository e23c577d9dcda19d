"""Exported detectors without PyTorch: the same ``predict`` and ``stream``, the same ``Detections``.

Needs ONNX Runtime, or OpenVINO for ``.xml`` files: the distribution ``refinedet-runtime``, or extras of ``refinedet``.
Imports neither torch nor torchvision.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from refinedet.config import DEFAULT_THRESHOLD, ModelConfig
from refinedet.dataclass_json import from_dict
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import user_path
from refinedet.model.padded import PaddedArrays, finish, unpad
from refinedet.prediction import predict_ahead, predict_all
from refinedet.preprocess import resize
from refinedet.text import reason

METADATA_KEY = "refinedet"
"""Under this name the file holds everything about the model, as JSON."""
DIGEST_KEY = "refinedet_weights"
"""Under this name a .xml file holds the digest of its .bin file."""
SUFFIXES = (".onnx", ".xml")
"""Endings of exported models."""


def is_exported(name: str | Path) -> bool:
    """Whether the name of a model is that of an exported file."""
    path = user_path(name)
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


class Outputs(NamedTuple):
    """What a graph returns, as arrays; see ``deploy.graph.GraphDetections``."""

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    num_detections: npt.NDArray[np.int64]
    settled: npt.NDArray[np.bool_]
    finite: npt.NDArray[np.bool_]


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def graph_inputs(
    images: Sequence[npt.NDArray[np.uint8]], config: ModelConfig, input_type: str, size: tuple[int, int] | None = None
) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
    """(B, H, W, 3) input of an exported graph for (h, w, 3) RGB images."""
    height, width = size or config.image_size
    batch = np.stack([resize(image, height, width, config.resize) for image in images])
    return batch if input_type == "float32" else np.rint(batch).astype(np.uint8)


class _Engine(Protocol):
    """A loaded file: its metadata, and arrays in and out."""

    name: str
    metadata: str

    def run(self, images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """All outputs in the order of the graph."""


class Runtime:
    """A detector in an exported file.

    Args:
        path: a ``.onnx`` or ``.xml`` file that ``refinedet export`` wrote.
        threads: CPU threads; all that the machine has if None.
        precision: "f32" computes as the file says. OpenVINO also takes "bf16", which is faster on some processors and
            changes boxes and scores.

    Raises:
        UsageError: no such file, or the engine for it is not installed.
        RefineDetError: the file is damaged, or was not written by ``refinedet export``.

    Example:
        >>> model = Runtime("deploy/model.onnx")  # doctest: +SKIP
        >>> model.predict("street.jpg", threshold=0.5).names  # doctest: +SKIP
        ['car', 'person']
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, precision: str = "f32") -> None:
        file = user_path(path)
        if file.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{file}: an exported model ends in .onnx or .xml")
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        self.threads = threads
        engine = _OnnxRuntime if file.suffix.lower() == ".onnx" else _OpenVino
        self._engine: _Engine = engine(file, threads, precision)
        self.path = file
        try:
            facts = json.loads(self._engine.metadata)
            self.config = from_dict(ModelConfig, facts["model"], source=str(file))
            self.class_names = tuple(map(str, facts["class_names"]))
            self.input_type = str(facts["input_type"])
            self.dynamic_size, self.raw = bool(facts["dynamic_size"]), bool(facts["raw"])
            self.precision = str(facts.get("precision", "fp32"))
        except (ValueError, KeyError, TypeError) as error:
            raise RefineDetError(
                f"{file}: was not written by 'refinedet export' ({METADATA_KEY} metadata is missing or damaged: "
                f"{type(error).__name__})"
            ) from None
        if len(self.class_names) != self.config.num_classes:
            raise RefineDetError(
                f"{file}: its metadata names {len(self.class_names)} of {self.config.num_classes} classes"
            )
        identifiers = facts.get("category_ids")
        self.category_ids: tuple[int, ...] | None = None if identifiers is None else tuple(map(int, identifiers))
        self.metrics: dict[str, Any] = facts.get("metrics") or {}

    @property
    def engine(self) -> str:
        """What computes: "ONNX Runtime" or "OpenVINO"."""
        return self._engine.name

    def __repr__(self) -> str:
        """File, classes, input size, precision."""
        height, width = self.config.image_size
        return f"Runtime({str(self.path)!r}, {len(self.class_names)} classes, {width}x{height}, {self.precision})"

    def run(self, images: npt.NDArray[Any]) -> Outputs:
        """Run the graph.

        Args:
            images: (B, H, W, 3) RGB in 0..255, resized to the input; float32, or uint8 where the file asks for it.

        Raises:
            UsageError: the file was exported without post-processing.
            RefineDetError: the graph refused the images.
        """
        if self.raw:
            raise UsageError(f"{self.path}: was exported with --raw, so it returns no detections")
        values = self._engine.run(images)
        if len(values) != len(Outputs._fields):
            raise RefineDetError(f"{self.path}: was exported by another version of refinedet; export the model again")
        return Outputs(*values)

    def run_raw(self, images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """All outputs of the graph as they are, for files that were exported without post-processing."""
        return self._engine.run(images)

    def inputs(
        self, images: Sequence[npt.NDArray[np.uint8]], size: tuple[int, int] | None = None
    ) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
        """(B, H, W, 3) input of the graph for (h, w, 3) RGB images."""
        return graph_inputs(images, self.config, self.input_type, size)

    def predict(
        self,
        source: Any,
        *,
        threshold: float | None = DEFAULT_THRESHOLD,
        batch_size: int = 8,
        max_pixels: int | None = None,
    ) -> Any:
        """Detect objects in one image (a ``Detections``) or many (a list); arguments as of ``RefineDet.predict``."""
        return predict_all(self, source, threshold=threshold, batch_size=batch_size, max_pixels=max_pixels)

    __call__ = predict

    def stream(
        self,
        sources: Any,
        *,
        threshold: float | None = DEFAULT_THRESHOLD,
        batch_size: int = 8,
        max_pixels: int | None = None,
    ) -> Iterator[Detections]:
        """Detect objects in any number of images with flat memory; see ``RefineDet.stream``."""
        for detections, _ in predict_ahead(
            self, sources, threshold=threshold, batch_size=batch_size, max_pixels=max_pixels
        ):
            yield detections

    def predict_arrays(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        threshold: float | None = None,
        sources: Sequence[str | None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Detections]:
        """Run the graph once over all ``images``; see ``RefineDet.predict_arrays``.

        Raises:
            UsageError: another size than that of the file, which was exported for one size.
            RefineDetError: the network's outputs are not finite, or suppression did not settle within the rounds of
                the graph.
        """
        if not images:
            return []
        input_size = size or self.config.image_size
        if tuple(input_size) != self.config.image_size and not self.dynamic_size:
            raise UsageError(f"{self.path}: was exported for {self.config.image_size} only; export with --dynamic-size")
        if any(side < 64 or side % 64 for side in input_size):
            raise UsageError(f"size must be two multiples of 64, not {size!r}")
        outputs = self.run(self.inputs(images, size))
        if not outputs.finite.all():
            raise RefineDetError(f"{self.path}: the network's outputs are not finite: its weights are ruined")
        if not outputs.settled.all():
            row = int(np.argmin(outputs.settled))
            name = (sources[row] if sources else None) or f"image {row + 1} of the batch"
            raise RefineDetError(f"{name}: needs more rounds of suppression than {self.path} has; use the model itself")
        padded = PaddedArrays(outputs.boxes, outputs.scores, outputs.labels, outputs.num_detections)
        results = unpad(padded, images, input_size, self.class_names, self.config.inference)
        return finish(results, threshold=threshold, sources=sources)


def import_package(name: str, what: object) -> Any:
    """Import an engine or a tool for engines.

    OpenVINO and NNCF report over the network that they are imported, unless openvino_telemetry is missing: so it is.

    Args:
        name: of the package.
        what: what needs it, for the message.

    Raises:
        UsageError: it is not installed.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "openvino_telemetry" not in modules
    if hidden:
        modules["openvino_telemetry"] = None
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"{what}: needs {name}: pip install {name}") from None
    finally:
        if hidden:
            del modules["openvino_telemetry"]


class _OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name = "ONNX Runtime"

    def __init__(self, file: Path, threads: int | None, precision: str) -> None:
        onnxruntime = import_package("onnxruntime", file)
        if precision != "f32":
            raise UsageError(f"precision {precision!r} is for OpenVINO; ONNX Runtime computes as the file says")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class but Exception
            raise RefineDetError(f"{file}: not a readable ONNX file ({reason(error, 200)})") from None
        self._file = file
        self._input = self._session.get_inputs()[0].name
        self.metadata = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")

    def run(self, images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        try:
            results: list[npt.NDArray[Any]] = self._session.run(None, {self._input: images})
        except Exception as error:
            raise RefineDetError(f"{self._file}: the graph refused {_kind(images)} ({reason(error, 200)})") from None
        return results


class _OpenVino:
    """OpenVINO on the CPU."""

    name = "OpenVINO"

    def __init__(self, file: Path, threads: int | None, precision: str) -> None:
        openvino = import_package("openvino", file)
        if not file.with_suffix(".bin").is_file():
            raise RefineDetError(f"{file.with_suffix('.bin')}: no such file; the weights of {file.name} belong there")
        settings = {"INFERENCE_PRECISION_HINT": precision}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            core = openvino.Core()
            model = core.read_model(file)
            self._compiled = core.compile_model(model, "CPU", settings)
            facts = {key: str(model.get_rt_info([key]).value) for key in model.get_rt_info()}
        except Exception as error:
            raise RefineDetError(f"{file}: not a readable OpenVINO model ({reason(error, 200)})") from None
        self.metadata = facts.get(METADATA_KEY, "")
        weights = file.with_suffix(".bin")
        if facts.get(DIGEST_KEY) not in (None, digest_of(weights)):
            raise RefineDetError(f"{weights}: damaged, or not the weights of {file.name}; export the model again")
        self._file = file

    def run(self, images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        try:
            results = self._compiled([images])
        except Exception as error:
            raise RefineDetError(f"{self._file}: the graph refused {_kind(images)} ({reason(error, 200)})") from None
        return [np.array(results[output]) for output in self._compiled.outputs]


def _kind(images: npt.NDArray[Any]) -> str:
    return f"a batch of shape {'x'.join(map(str, images.shape))} and type {images.dtype}"
