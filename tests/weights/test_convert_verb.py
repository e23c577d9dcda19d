from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet import cli
from refinedet.data.classes import COCO_CLASSES, VOC_CLASSES
from refinedet.detector import RefineDet
from weights import formats

pytestmark = pytest.mark.usefixtures("narrow")


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    assert convert(*arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def caffe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caffe") / "official.caffemodel"
    return formats.write_caffemodel(path, formats.caffe_vgg_layers(20))


def test_convert_then_predict(caffe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights"
    assert convert(caffe_file, "--preset", "voc07-320-vgg16", "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{caffe_file}: an official RefineDet with VGG-16 (Caffe)"
    assert lines[1] == "input: bgr, mean 104 117 123, std 1 1 1"
    assert lines[-1] == f"converted: {out}  (try: refinedet predict {out} photo.jpg)"
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = RefineDet.from_pretrained(out)
    assert model.class_names == VOC_CLASSES
    assert model.config.channel_order == "bgr"
    weight = model.network.state_dict()["backbone.features.0.weight"]
    np.testing.assert_array_equal(weight.numpy(), formats.numbers("conv1_1/0", (8, 3, 3, 3)))
    card = (out / "README.md").read_text()
    assert "`official.caffemodel` (sha256 " in card
    assert "nothing was measured" in card
    found = model.predict(np.full((48, 64, 3), 90, np.uint8), threshold=None)
    assert np.isfinite(found.scores).all()
    again = refused(capsys, 2, caffe_file, "--preset", "voc07-320-vgg16", "--out", out)
    assert again == f"error: {out}: holds a model already; choose another --out"


def test_names_and_channel_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.pth"
    torch.save(formats.luuuyi_state(2), path)
    plain = [path, "--preset", "voc07-512-vgg16", "--out"]
    assert convert(*plain, tmp_path / "a", "--class-names", "cat, dog", "--channel-order", "bgr") == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["class_names"] == ["cat", "dog"]
    assert config["model"]["channel_order"] == "bgr"
    assert config["model"]["mean"] == [104.0, 117.0, 123.0]
    assert config["model"]["image_size"] == [512, 512]
    capsys.readouterr()
    message = refused(capsys, 2, *plain, tmp_path / "b", "--class-names", "cat,dog,cow")
    assert message == f"error: --class-names has 3 names; {path} has 2 classes"
    assert not (tmp_path / "b").exists()
    assert convert(*plain, tmp_path / "c") == 0
    assert "classes: 2, without names; give them with --class-names" in capsys.readouterr().out


def test_a_backbone_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = formats.write_caffemodel(tmp_path / "vgg.caffemodel", formats.caffe_backbone_layers())
    out = tmp_path / "out"
    assert convert(path, "--preset", "coco-320-vgg16", "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("not in the file, so still random: backbone.conv6_1, ")
    assert lines[3] == f"converted: {out}  (try: refinedet train coco-320-vgg16 --init {out} --data DATA)"
    assert json.loads((out / "config.json").read_text())["class_names"] == list(COCO_CLASSES)
    assert "Not a trained detector" in (out / "README.md").read_text()
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(image)]) == 0
    assert "note: this model's heads are untrained (backbone.conv6_1, " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "last.ckpt", "best/model.safetensors", "last/model.safetensors"])
def test_a_model_or_a_run_is_never_written_over(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pth"
    torch.save({"x": torch.zeros(1)}, path)
    there = tmp_path / "out" / name
    there.parent.mkdir(parents=True)
    there.write_bytes(b"precious")
    message = refused(capsys, 2, path, "--preset", "smoke", "--out", tmp_path / "out")
    assert "already; choose another --out" in message
    assert there.read_bytes() == b"precious"


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    rest = ("--preset", "voc07-320-vgg16", "--out", out)
    text = tmp_path / "notes.caffemodel"
    text.write_text("just words\n" * 100)
    assert "not a readable .caffemodel file" in refused(capsys, 1, text, *rest)
    assert "no such file; convert takes a weight file" in refused(capsys, 2, tmp_path / "nothing", *rest)
    assert "is a folder" in refused(capsys, 2, tmp_path, *rest)
    assert "unknown preset 'voc07-32-vgg16'" in refused(capsys, 2, text, "--preset", "voc07-32-vgg16", "--out", out)
    assert "--out" in refused(capsys, 2, text, "--preset", "voc07-320-vgg16")
    state = {f"vgg.{number}.weight": torch.zeros(1) for number in range(98)}
    torch.save(state, tmp_path / "a.pth")
    assert "no known format" in refused(capsys, 1, tmp_path / "a.pth", *rest)
    assert not out.exists()
