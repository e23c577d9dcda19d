"""Files that are no exported models end in one line; the runtime itself needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinedet.config import ModelConfig
from refinedet.dataclass_json import to_dict
from refinedet.errors import RefineDetError, UsageError
from refinedet.loading import load_detector
from refinedet.runtime import Runtime
from refinedet.video import Video

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


def constant_model(path: Path, **changed: Any) -> Path:
    """A file whose graph returns the same two detections for any image, without a network."""
    outputs = {
        "boxes": np.array([[[8, 16, 24, 64], [-9, 0, 32, 70]]], np.float32),
        "scores": np.array([[0.9, 0.25]], np.float32),
        "labels": np.array([[1, 0]]),
        "num_detections": np.array([2]),
        "settled": np.array([True]),
        "finite": np.array([True]),
    } | changed
    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    outputs = {name: value for name, value in outputs.items() if value is not None}
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in outputs.items()}
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [name], value=tensor(value)) for name, value in outputs.items()],
        "constant",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 64, 64, 3])],
        [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    facts = {
        "class_names": ["cat", "dog"],
        "input_type": "float32",
        "dynamic_size": False,
        "raw": False,
        "model": to_dict(ModelConfig(num_classes=2, image_size=(64, 64))),
    }
    onnx.helper.set_model_props(model, {"refinedet": json.dumps(facts)})
    onnx.save_model(model, path)
    return path


def test_outputs_become_detections(tmp_path: Path) -> None:
    model = Runtime(constant_model(tmp_path / "a.onnx"), threads=1)
    photo = np.zeros((128, 32, 3), np.uint8)
    found = model.predict(photo, threshold=None)
    np.testing.assert_array_equal(found.boxes, [[4, 32, 12, 128], [0, 0, 16, 128]])  # scaled, then clipped
    assert found.names == ["dog", "cat"]
    assert [len(one) for one in model.stream([photo, photo], batch_size=1)] == [1, 1]  # of the usual threshold


def test_outputs_that_are_no_answer_are_refused(tmp_path: Path) -> None:
    for changed, reason in (
        ({"finite": np.array([False])}, "outputs are not finite"),
        ({"settled": np.array([False])}, "more rounds of suppression"),
        ({"finite": None}, "export the model again"),
    ):
        model = Runtime(constant_model(tmp_path / "a.onnx", **changed))
        with pytest.raises(RefineDetError, match=reason):
            model.predict(np.zeros((64, 64, 3), np.uint8))


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
    photo = np.zeros((64, 64, 3), np.uint8)
    constant, dynamic, raw = (Runtime(constant_model(tmp_path / "b.onnx")) for _ in range(3))
    dynamic.dynamic_size = raw.raw = True
    for call, reason in (
        (lambda: Runtime(tmp_path / "none.onnx"), "no such file"),
        (lambda: Runtime(tmp_path / "a.pt"), "ends in .onnx or .xml"),
        (lambda: Runtime(tmp_path / "a.onnx", threads=0), "threads"),
        (lambda: Runtime(tmp_path / "a.onnx", precision="bf16"), "OpenVINO"),
        (lambda: load_detector(tmp_path / "a.onnx", device="cuda"), "run on the CPU"),
        (lambda: constant.predict_arrays([photo], size=(128, 64)), "export with --dynamic-size"),
        (lambda: dynamic.predict_arrays([photo], size=(100, 64)), "multiples of 64"),
        (lambda: raw.predict(photo), "exported with --raw"),
    ):
        with pytest.raises(UsageError, match=reason):
            call()


def test_a_size_that_the_graph_refuses(tmp_path: Path) -> None:
    model = Runtime(constant_model(tmp_path / "a.onnx"))
    for images in (np.zeros((1, 64, 32, 3), np.float32), np.zeros((1, 64, 64, 3), np.uint8)):
        with pytest.raises(RefineDetError, match=r"a\.onnx: the graph refused a batch of shape 1x64x") as raised:
            model.run(images)
        assert "\n" not in str(raised.value)


def test_names_of_models_still_load(tmp_path: Path) -> None:
    assert np.isclose(load_detector("voc07-320-resnet18", device="cpu").config.negative_threshold, 0.99)
    with pytest.raises(UsageError):
        load_detector("no-such-model")


def test_the_runtime_never_imports_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None; "
        "import refinedet.runtime, refinedet.loading, refinedet.cli, refinedet.bulk.run, refinedet.benchmark; "
        "import refinedet.evaluation.evaluate, refinedet.evaluation.page; "
        "import refinedet.evaluation.submission, refinedet.evaluation.compare"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_torch_says_so() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from refinedet.cli import main; "
        "sys.exit(main(['predict', 'voc07-320-resnet18', sys.argv[1]]))"
    )
    photo = str(Path(__file__).parents[1] / "examples/chelsea.jpg")
    done = subprocess.run([sys.executable, "-c", program, photo], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this command needs PyTorch")
    assert done.stderr.count("\n") == 1


def test_videos(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from clips import write_clip

    write_clip(tmp_path / "clip.mp4", 6)
    model = Runtime(constant_model(tmp_path / "a.onnx"), threads=1)
    found = list(model.stream(Video(tmp_path / "clip.mp4", every=2), batch_size=1))
    assert [one.time for one in found] == pytest.approx([0, 0.2, 0.4])
    assert [one.names for one in found] == [["dog"]] * 3
    assert found[0].image_size == (160, 96)
