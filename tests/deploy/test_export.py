"""Exported files against PyTorch, and what an export must refuse."""

from __future__ import annotations

import dataclasses
import errno
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refinedet import Detections, RefineDet
from refinedet.cli import main
from refinedet.config import InferenceConfig, ModelConfig
from refinedet.deploy import export as exporting
from refinedet.deploy.export import export
from refinedet.deploy.graph import DetectorGraph
from refinedet.deploy.verify import (
    Boxes,
    _near,
    blank_image,
    crowded_scene,
    example_photos,
    verification_images,
    verify,
)
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import read_image
from refinedet.presets import PRESETS
from refinedet.runtime import Runtime

SMALL = dataclasses.replace(PRESETS["smoke"].model, image_size=(64, 128), num_classes=3, tcb_channels=8)

PER_CLASS = InferenceConfig(candidates=50, candidates_per="class", soft_nms_iou=0.3)


def detector(config: ModelConfig = SMALL, seed: int = 0) -> RefineDet:
    """A network whose scores are far from each other, as those of a trained one are."""
    torch.manual_seed(seed)
    model = RefineDet(config)
    with torch.no_grad():
        for head in (*model.network.odm, *model.network.arm):
            head.logits.weight.mul_(4)
            head.offsets.weight.mul_(5)
    return model


def assert_same_detections(answer: Detections, expected: Detections) -> None:
    """Each detection has its equal; detections of nearly equal scores may stand in another order."""
    for row in range(len(expected)):
        near = (np.abs(answer.boxes - expected.boxes[row]) < 0.2).all(axis=1)
        near &= (np.abs(answer.scores - expected.scores[row]) < 1e-4) & (answer.labels == expected.labels[row])
        assert near.any(), expected[row]


@pytest.fixture(scope="module")
def photos() -> list[Any]:
    return [read_image(file) for file in example_photos()]


def test_scenes_are_real_photos_and_crowds(photos: list[Any]) -> None:
    scenes = verification_images(None)
    assert len(scenes) > len(photos)
    assert all(np.array_equal(scene, photo) for scene, photo in zip(scenes, photos, strict=False))
    assert np.array_equal(crowded_scene(photos, 3), crowded_scene(photos, 3))
    assert blank_image().shape == (300, 1, 3)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_graph_is_the_detector(photos: list[Any], order: Any) -> None:
    model = detector(dataclasses.replace(SMALL, channel_order=order, mean=(90.0, 100.0, 110.0)))
    graph = DetectorGraph(model)
    from refinedet.preprocess import resize

    inputs = torch.from_numpy(np.stack([resize(photo, 64, 128) for photo in photos]))
    with torch.no_grad():
        boxes, scores, labels, counts, settled, finite = graph(inputs)
    assert settled.all()
    assert finite.all()
    for row, (photo, expected) in enumerate(zip(photos, model.predict_arrays(photos), strict=True)):
        count = int(counts[row])
        factor = np.array([photo.shape[1] / 128, photo.shape[0] / 64] * 2, dtype=np.float32)
        limit = np.array([photo.shape[1], photo.shape[0]] * 2)
        assert count == len(expected) > 0
        np.testing.assert_allclose(np.clip(boxes[row, :count].numpy() * factor, 0, limit), expected.boxes, atol=0.01)
        np.testing.assert_allclose(scores[row, :count].numpy(), expected.scores, atol=1e-6)
        assert labels[row, :count].tolist() == expected.labels.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("model.onnx", {}, SMALL),
        ("model.onnx", {"input_type": "uint8"}, dataclasses.replace(SMALL, num_classes=1)),
        ("model.onnx", {"dynamic_size": True}, dataclasses.replace(SMALL, num_classes=80)),
        ("model.xml", {}, SMALL),
        (
            "model.onnx",
            {},
            dataclasses.replace(
                SMALL, inference=InferenceConfig(candidates=50, candidates_per="class", soft_nms_iou=0.3)
            ),
        ),
        ("model.onnx", {}, dataclasses.replace(SMALL, backbone="vgg16", tcb_batch_norm=False, tcb=False)),
    ],
    ids=["onnx", "uint8", "dynamic", "openvino", "per-class", "vgg16-without-tcb"],
)
def test_an_exported_file_gives_the_same_detections(
    tmp_path: Path, photos: list[Any], name: str, options: dict[str, Any], config: ModelConfig
) -> None:
    model = detector(config)
    checked = export(model, tmp_path / name, **options)
    assert checked.detections > 0
    assert not checked.faults
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        {name, *(["model.bin"] if ".xml" in name else [])}
    )
    runtime = Runtime(tmp_path / name)
    assert runtime.config == config
    assert runtime.class_names == model.class_names
    sizes = [None, (128, 192)] if options.get("dynamic_size") else [None]
    for batch in (photos, photos[:1], [*photos, *photos, *photos[:2]]):
        for size in sizes:
            answers = runtime.predict_arrays(batch, size=size)
            for answer, expected in zip(answers, model.predict_arrays(batch, size=size), strict=True):
                assert answer.image_size == expected.image_size
                if options.get("input_type") != "uint8":
                    assert len(answer) == len(expected)
                    assert_same_detections(answer, expected)
    assert len(runtime.predict(photos[0], threshold=0.0)) == len(runtime.predict_arrays(photos[:1])[0])


@pytest.mark.slow
def test_another_model_does_not_pass_verification(tmp_path: Path, photos: list[Any]) -> None:
    export(detector(), tmp_path / "model.onnx")
    with pytest.raises(RefineDetError, match="other detections than PyTorch"):
        verify(detector(seed=1), Runtime(tmp_path / "model.onnx"), photos)


def test_a_full_disk_is_named_and_nothing_is_left(
    tmp_path: Path, photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> None:
        arguments[-1].write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")  # the libraries do not say which file

    monkeypatch.setattr(exporting, "_write", write)
    with pytest.raises(RefineDetError, match=r"model\.onnx: cannot be saved \(disk full\)"):
        export(detector(), tmp_path / "model.onnx", images=photos)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_model_and_the_next_one_tidies_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, signal, sys\n"
        "from refinedet import RefineDet, export\n"
        "from refinedet.deploy import export as exporting\n"
        "def write(*arguments):\n"
        "    arguments[-1].write_bytes(b'half a file')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "exporting._write = write\n"
        "export('voc07-320-resnet18', sys.argv[1])\n"
    )
    target = tmp_path / "model.onnx"
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")

    class StoppedError(Exception):
        """Instead of writing."""

    def stop(*arguments: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(exporting, "_write", stop)
    with pytest.raises(StoppedError):
        export(detector(), target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("side", "difference", "same"), [(320, 0.04, True), (320, 0.06, False), (22_600, 0.11, True), (22_600, 0.3, False)]
)
def test_the_tolerance_grows_with_boxes_far_beyond_the_image(side: float, difference: float, same: bool) -> None:
    box, score, label = np.array([[-side, 0, side, 10]], np.float32), np.array([0.5], np.float32), np.array([1])
    moved = box + np.array([[difference, 0, 0, 0]], np.float32)
    assert _near(Boxes(box, score, label), 0, Boxes(moved, score, label))[2].tolist() == [same]


@pytest.mark.slow
def test_damaged_openvino_files_are_named(tmp_path: Path) -> None:
    model = detector()
    for name, config in (("a", model), ("b", detector(seed=1))):
        export(config, tmp_path / f"{name}.xml")
    whole = (tmp_path / "a.bin").read_bytes()
    for damaged in (
        (tmp_path / "b.bin").read_bytes(),  # of a model of the same form
        whole[:-1000] + bytes(1000),
        whole[: len(whole) // 2],
    ):
        (tmp_path / "a.bin").write_bytes(damaged)
        with pytest.raises(RefineDetError, match=r"a\.bin: damaged|not a readable") as raised:
            Runtime(tmp_path / "a.xml")
        assert "\n" not in str(raised.value)
    (tmp_path / "a.bin").write_bytes(whole)
    Runtime(tmp_path / "a.xml")


@pytest.mark.slow
def test_a_failed_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "DetectorGraph", lambda model, **options: DetectorGraph(detector(seed=1), **options))
    (tmp_path / "deploy").mkdir()
    with pytest.raises(RefineDetError, match="other detections than PyTorch"):
        export(detector(), tmp_path / "deploy" / "model.onnx")
    assert list((tmp_path / "deploy").iterdir()) == []


@pytest.mark.slow
def test_ruined_weights_are_not_exported(tmp_path: Path) -> None:
    model = detector()
    with torch.no_grad():
        model.network.odm[0].logits.bias[0] = torch.nan
    with pytest.raises(RefineDetError, match="outputs are not finite"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line_exports_predicts_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector().save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "deploy")]) == 0
    assert "verified on" in capsys.readouterr().out
    file, photo = str(tmp_path / "deploy" / "model.onnx"), str(example_photos()[0])
    assert main(["predict", file, photo]) == 0
    exported = capsys.readouterr().out
    assert main(["predict", str(tmp_path / "model"), photo]) == 0
    assert exported == capsys.readouterr().out
    # The same command again replaces its own file.
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "deploy")]) == 0


def test_wrong_targets_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").write_bytes(b"somebody's model")
    for name, reason in (("model.pt", "ends in .onnx"), ("mine.onnx", "was not written by this command")):
        with pytest.raises(UsageError, match=reason):
            export(RefineDet(SMALL), tmp_path / name)
    with pytest.raises(UsageError, match="OpenVINO"):
        export(RefineDet(SMALL), tmp_path / "a.onnx", precision="fp16")
    with pytest.raises(UsageError, match="input_type"):
        export(RefineDet(SMALL), tmp_path / "a.onnx", input_type="int8")  # type: ignore[arg-type]
    assert (tmp_path / "mine.onnx").read_bytes() == b"somebody's model"
