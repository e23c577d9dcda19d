"""Files of lower precision: what is quantised, what is calibrated on, and what verification then demands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import FolderFactory
from deploy.test_export import SMALL, detector
from refinedet import RefineDet, export
from refinedet.cli import main
from refinedet.deploy.export import Precision
from refinedet.deploy.quantize import CALIBRATION_IMAGES, Node, calibration_files, outside_of_the_network
from refinedet.deploy.verify import example_photos, verification_images, verify
from refinedet.errors import RefineDetError, UsageError
from refinedet.runtime import Runtime

EXAMPLES = example_photos()[0].parent


def test_only_what_lies_between_convolutions_is_quantised() -> None:
    nodes = [
        Node("subtract", "Sub", ()),
        Node("first", "Conv", ("subtract",)),
        Node("relu", "Relu", ("first",)),
        Node("upper", "ConvTranspose", ("relu",)),
        Node("sum", "Add", ("relu", "upper")),
        Node("head", "Conv", ("sum",)),
        Node("softmax", "Softmax", ("head",)),
        Node("overlaps", "MatMul", ("softmax", "softmax")),
    ]
    assert outside_of_the_network(nodes) == ["subtract", "softmax", "overlaps"]


def test_calibration_takes_images_from_folders_and_datasets(tmp_path: Path, yolo_folder: FolderFactory) -> None:
    for number in range(CALIBRATION_IMAGES + 7):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    chosen = calibration_files("model", tmp_path)
    assert len(set(chosen)) == CALIBRATION_IMAGES
    assert chosen == calibration_files("model", tmp_path)
    assert sorted(calibration_files("model", [str(EXAMPLES)])) == sorted(map(str, example_photos()))
    data = yolo_folder(6, size=(64, 64), splits={"train": [0, 1, 2], "val": [3, 4, 5]})
    train, val = calibration_files("model", data), calibration_files("model", data, "val")
    assert len(train) == len(val) == 3
    assert not set(train) & set(val)
    with pytest.raises(UsageError, match="images to calibrate on"):
        calibration_files("voc07-320-resnet18", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.xml", "model.onnx"])
def test_an_int8_file_is_small_and_agrees(tmp_path: Path, name: str) -> None:
    pytest.importorskip("nncf")
    model = RefineDet.from_pretrained("voc07-320-resnet18")  # random weights amplify the least rounding
    done: list[tuple[int, int]] = []
    checked = export(
        model, tmp_path / name, precision="int8", calibration=EXAMPLES, on_progress=lambda *count: done.append(count)
    )
    assert done[-1] == (3, 3)
    assert 0.9 <= checked.agreement <= 1
    assert checked.summary().startswith("int8, verified on")
    runtime = Runtime(tmp_path / name)
    assert runtime.precision == "int8"
    weights = name.replace(".xml", ".bin")
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    assert (tmp_path / weights).stat().st_size < 1.2 * parameters
    # Eight bits are no copy: scores differ, but not by much.
    photo = Image.open(example_photos()[0])
    full, low = (one.predict(photo, threshold=None) for one in (model, runtime))
    assert 0 < np.abs(full.scores[:10] - low.scores[:10]).max() < 0.2


@pytest.mark.slow
def test_half_weights(tmp_path: Path) -> None:
    checked = export(detector(), tmp_path / "model.xml", precision="fp16")
    assert checked.summary().startswith("fp16, verified on")
    assert checked.agreement >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision_that_finds_something_else_is_refused(tmp_path: Path, precision: Precision) -> None:
    export(detector(), tmp_path / "model.onnx")
    other = Runtime(tmp_path / "model.onnx")
    other.precision = precision
    with pytest.raises(RefineDetError, match=f"detections of the {precision} file agree with PyTorch"):
        verify(detector(seed=1), other, verification_images(None))


@pytest.mark.slow
def test_the_command_measures_what_int8_costs(
    tmp_path: Path, voc_folder: FolderFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nncf")
    data = voc_folder(4, size=(64, 64))
    out = tmp_path / "deploy"
    words = ["export", "voc07-320-resnet18", "--to", "openvino", "--int8", "--calibration", str(EXAMPLES / "*.jpg")]
    assert main([*words, "--evaluate", str(data), "--split", "all", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "model-int8.xml: int8, verified on" in shown
    assert "mAP (voc07, 4 images of" in shown
    assert {file.name for file in out.iterdir()} == {"model-int8.xml", "model-int8.bin", "model-int8.xml.md"}
    card = (out / "model-int8.xml.md").read_text(encoding="utf-8")
    assert all(line in card for line in shown.splitlines() if line.startswith(("model", "mAP", "PyTorch")))
    assert "aeroplane, bicycle" in card


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    with pytest.raises(UsageError, match="precision"):
        export(detector(SMALL), tmp_path / "a.onnx", precision="int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="without post-processing"):
        export(detector(SMALL), tmp_path / "a.onnx", precision="int8", raw=True)
    for words, reason in (
        (["--int8", "--half"], "exclude each other"),
        (["--calibration", "photos"], "go with --int8"),
        (["--split", "val"], "goes with --evaluate"),
        (["--int8", "--calibration", str(tmp_path / "none")], "none"),
        (["--int8"], "images to calibrate on"),
    ):
        assert main(["export", "voc07-320-resnet18", "--out", str(tmp_path / "deploy"), *words]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert not (tmp_path / "deploy").exists()


def test_openvino_and_nncf_report_nothing(tmp_path: Path) -> None:
    """Both would leave an identifier in the home folder and send that they were imported."""
    pytest.importorskip("nncf")
    program = (
        "import sys; from refinedet.runtime import import_package; "
        "import_package('openvino', 'a file'); import_package('nncf', 'a file'); "
        "assert 'openvino_telemetry' not in sys.modules"
    )
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists()
