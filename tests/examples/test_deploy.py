"""The recipes of docs/deploy.md do what they say."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refinedet import export
from refinedet.images import read_image
from refinedet.runtime import Runtime

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples/deploy"
CAT = ROOT / "examples/chelsea.jpg"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as an ONNX file, verified on one image only."""
    pytest.importorskip("onnxscript")
    file = tmp_path_factory.mktemp("deploy") / "model.onnx"
    export("voc07-320-resnet18", file, images=[read_image(CAT)])
    return file


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_onnx_runtime_alone(exported: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['refinedet', 'torch', 'torchvision']))"
    program = f"{blocked}; import runpy; runpy.run_path(sys.argv.pop(1))"
    for photo in (CAT, CAT.with_name("astronaut.jpg")):
        call = [sys.executable, "-c", program, str(RECIPES / "onnxruntime_only.py"), str(exported), str(photo)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [line.split() for line in done.stdout.splitlines()]
        expected = Runtime(exported).predict(photo).filter(threshold=0.5)
        assert [one[0] for one in found] == expected.names
        numbers = np.array([one[1:] for one in found], dtype=float)
        # They are printed with three digits and with one.
        np.testing.assert_allclose(numbers[:, 0], expected.scores, atol=0.0006)
        np.testing.assert_allclose(numbers[:, 1:], expected.boxes, atol=0.06)


def test_the_server_answers_and_keeps_its_limits(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("multipart")
    client_module = pytest.importorskip("starlette.testclient")
    monkeypatch.setenv("MODEL", str(exported))
    client = client_module.TestClient(load("serve", monkeypatch).app)
    photo = CAT.read_bytes()

    def post(*images: bytes, threshold: float = 0.5) -> Any:
        files = [("images", ("a.jpg", image)) for image in images]
        return client.post(f"/detect?threshold={threshold}", files=files)

    answer = post(photo, photo)
    assert answer.status_code == 200
    assert [one["detections"][0]["name"] for one in answer.json()] == ["cat", "cat"]
    large = Image.new("1", (6000, 5000))
    large.save(exported.with_name("large.png"))
    assert post(*[photo] * 9).status_code == 400
    assert post(b"no image").status_code == 422
    assert post(exported.with_name("large.png").read_bytes()).status_code == 422
    assert post(photo, threshold=2).status_code == 422
    assert client.post("/detect", content=bytes(20_000_001)).status_code == 413
    assert client.post("/detect", content=iter([b"of unknown length"])).status_code == 411


def test_cpp(exported: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    package = Path(openvino.__file__).parent
    libraries = sorted((package / "libs").glob("libopenvino.so.*"))
    if shutil.which("g++") is None or not libraries or not (package / "include").is_dir():
        pytest.skip("needs g++ and the headers of OpenVINO")
    flags = [f"-I{package}/include", f"-L{package}/libs", f"-l:{libraries[0].name}", f"-Wl,-rpath,{package}/libs"]
    program = tmp_path / "detect"
    subprocess.run(["g++", "-std=c++17", str(RECIPES / "detect.cpp"), *flags, "-o", str(program)], check=True)
    Image.fromarray(read_image(CAT)).save(tmp_path / "cat.ppm")
    done = subprocess.run([str(program), str(exported), str(tmp_path / "cat.ppm")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    label, score, *box = map(float, done.stdout.split())
    expected = Runtime(exported).predict(CAT)
    assert label == expected.labels[0]
    assert score == pytest.approx(expected.scores[0], abs=1e-3)
    np.testing.assert_allclose(np.maximum(box, 0), expected.boxes[0], atol=0.2)
    (tmp_path / "cut.ppm").write_bytes(b"P5 1 1 255\n0")
    assert subprocess.run([str(program), str(exported), str(tmp_path / "cut.ppm")]).returncode == 1


@pytest.mark.parametrize("package", ["supervision", "sahi"])
def test_slices_find_a_small_cat(exported: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    slices = load("slices", monkeypatch)
    photo = Image.open(CAT).convert("RGB").resize((120, 80))
    sheet = Image.new("RGB", (1000, 800), (128, 128, 128))
    sheet.paste(photo, (620, 480))
    model = Runtime(exported)
    sliced = slices.Sliced(model, getattr(slices, f"by_{package}"), side=400, overlap=80)
    found = sliced.predict_arrays([np.asarray(sheet)], threshold=0.5)[0]
    assert set(found.names) == {"cat"}
    np.testing.assert_allclose(found.boxes[0], [620, 480, 740, 560], atol=25)
    assert model.predict(np.asarray(sheet)).names == []
