"""Files that are no exported models end in one line; the runtime itself needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refinedet.errors import RefineDetError, UsageError
from refinedet.loading import load_detector
from refinedet.runtime import Runtime

onnx = pytest.importorskip("onnx")


def foreign_model(path: Path, properties: dict[str, str] | None = None) -> Path:
    """A valid ONNX file of somebody else: the identity."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.helper.set_model_props(model, properties or {})
    onnx.save_model(model, path)
    return path


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.xml").write_text("<net/>")
    (tmp_path / "text.bin").write_bytes(b"")
    (tmp_path / "alone.xml").write_text("<net/>")
    whole = foreign_model(tmp_path / "foreign.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    foreign_model(tmp_path / "odd.onnx", {"refinedet": "[1]"})
    for name, reason in (
        ("text.onnx", "not a readable ONNX file"),
        ("empty.onnx", "not a readable ONNX file|not written by"),
        ("cut.onnx", "not a readable ONNX file|not written by"),
        ("foreign.onnx", "not written by 'refinedet export'"),
        ("odd.onnx", "not written by 'refinedet export'"),
        ("text.xml", "not a readable OpenVINO model"),
        ("alone.xml", "alone.bin: no such file"),
    ):
        with pytest.raises(RefineDetError, match=reason) as raised:
            Runtime(tmp_path / name)
        assert "\n" not in str(raised.value)
        assert str(tmp_path) in str(raised.value)


def test_wrong_calls(tmp_path: Path) -> None:
    foreign_model(tmp_path / "a.onnx")
    for call, reason in (
        (lambda: Runtime(tmp_path / "none.onnx"), "no such file"),
        (lambda: Runtime(tmp_path / "a.pt"), "ends in .onnx or .xml"),
        (lambda: Runtime(tmp_path / "a.onnx", threads=0), "threads"),
        (lambda: Runtime(tmp_path / "a.onnx", precision="bf16"), "OpenVINO"),
        (lambda: load_detector(tmp_path / "a.onnx", device="cuda"), "run on the CPU"),
    ):
        with pytest.raises(UsageError, match=reason):
            call()


def test_names_of_models_still_load(tmp_path: Path) -> None:
    assert np.isclose(load_detector("voc07-320-resnet18", device="cpu").config.negative_threshold, 0.99)
    with pytest.raises(UsageError):
        load_detector("no-such-model")


def test_the_runtime_never_imports_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None; "
        "import refinedet.runtime, refinedet.loading, refinedet.cli, refinedet.bulk.run; "
        "from refinedet.runtime import Runtime"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
