"""From files to a trained detector and back through the command line, good input and bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import FolderFactory
from refinedet.cli import main

SMALL = ["--iterations", "2", "--batch-size", "2", "--workers", "0", "--init-weights", "random", "--device", "cpu",
         "--model.tcb-channels", "8", "--model.image-size", "128", "128"]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of standard error that tell of an error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error" in line.lower() or "Traceback" in line]
    return code, captured.out, errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two iterations behind it, of classes cat and dog."""
    from conftest import make_scene, voc_xml

    root = tmp_path_factory.mktemp("trained")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "data" / folder).mkdir(parents=True)
    for index in range(4):
        scene = make_scene(index)
        Image.fromarray(scene.image).save(root / f"data/JPEGImages/{index}.jpg")
        objects = [
            (("cat", "dog")[label], box.tolist(), False) for box, label in zip(scene.boxes, scene.labels, strict=True)
        ]
        (root / f"data/Annotations/{index}.xml").write_text(voc_xml(f"{index}.jpg", (96, 64), objects))
    for split, stems in (("train", "0\n2\n3\n"), ("val", "1\n")):
        (root / f"data/ImageSets/Main/{split}.txt").write_text(stems)
    assert main(["train", "smoke", "--data", str(root / "data"), "--out", str(root / "run"), *SMALL]) == 0
    return root / "run"


@pytest.mark.parametrize("layout", ["voc_folder", "coco_folder", "yolo_folder"])
def test_every_layout_trains_and_evaluates(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = request.getfixturevalue(layout)()
    metric = "coco" if layout == "coco_folder" else "voc07"
    code, _, errors = run(capsys, "train", "smoke", "--data", data, "--out", tmp_path / "r", "--metric", metric, *SMALL)
    assert (code, errors) == (0, [])
    code, out, _ = run(
        capsys, "evaluate", tmp_path / "r", data, "--split", "val", "--metric", metric, "--report", tmp_path / "report"
    )
    assert code == 0
    assert "cat" in out
    assert "dog" in out
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["images"] == 3


def test_several_data_sets_are_trained_on_together(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = voc_folder(name="a"), voc_folder(name="b", first=6)
    code, _, errors = run(capsys, "train", "smoke", "--data", first, second, "--out", tmp_path / "r", *SMALL)
    assert (code, errors) == (0, [])
    assert json.loads((tmp_path / "r/last/config.json").read_text())["metrics"]["images"] == 6
    third = voc_folder(name="c", class_names=("zebu", "ant"))
    code, _, errors = run(capsys, "train", "smoke", "--data", first, third, "--out", tmp_path / "q", *SMALL)
    assert code == 2
    assert "its classes differ" in errors[0]


ImageMaker = Callable[[Path, np.ndarray], None]


def _exif(path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(path, exif=exif)


ODD_IMAGES: dict[str, ImageMaker] = {
    "gray.png": lambda path, pixels: Image.fromarray(pixels).convert("L").save(path),
    "cmyk.jpg": lambda path, pixels: Image.fromarray(pixels).convert("CMYK").save(path),
    "palette.png": lambda path, pixels: Image.fromarray(pixels).convert("P").save(path),
    "deep.png": lambda path, pixels: Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path),
    "alpha.png": lambda path, pixels: Image.fromarray(pixels).convert("RGBA").save(path),
    "rotated.jpg": _exif,
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_are_images(name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    ODD_IMAGES[name](tmp_path / name, pixels)
    code, _, errors = run(
        capsys, "predict", trained, tmp_path / name, "--threshold", "0", "--save", tmp_path / "o", "--json",
        tmp_path / "o.json",
    )  # fmt: skip
    assert (code, errors) == (0, [])
    with Image.open(next((tmp_path / "o").iterdir())) as drawn:
        assert drawn.size == (540, 360), "small images are enlarged, so that names can be read"
        assert drawn.mode == "RGB"


def check_refusal(outcome: tuple[int, str, list[str]], named: str, *codes: int) -> None:
    code, _, errors = outcome
    assert code in (codes or (1, 2))
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert named in errors[0]
    assert "Traceback" not in errors[0]


def test_no_such_data(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(run(capsys, "train", "smoke", "--data", tmp_path / "none", *SMALL), str(tmp_path / "none"), 2)
    check_refusal(run(capsys, "evaluate", trained, tmp_path / "none"), str(tmp_path / "none"), 2)
    check_refusal(run(capsys, "inspect", tmp_path / "none"), str(tmp_path / "none"), 2)
    check_refusal(run(capsys, "predict", trained, tmp_path / "none.jpg"), str(tmp_path / "none.jpg"))


def test_an_empty_split(voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = voc_folder(splits={"train": [], "val": [0]})
    check_refusal(run(capsys, "train", "smoke", "--data", data, "--out", tmp_path / "r", *SMALL), "train", 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_while_training(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    data = voc_folder(splits={"train": [0, 1, 2], "val": [4]})
    for stem in ("000000", "000001", "000002"):
        path = data / f"JPEGImages/{stem}.jpg"
        path.write_bytes(path.read_bytes()[:900])
    settings = [*SMALL, "--workers", str(workers)]
    check_refusal(run(capsys, "train", "smoke", "--data", data, "--out", tmp_path / "r", *settings), "JPEGImages", 1)


def test_images_that_are_none(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    check_refusal(run(capsys, "predict", trained, tmp_path / "text.jpg"), "text.jpg", 1)
    Image.new("RGB", (200, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    check_refusal(run(capsys, "predict", trained, tmp_path / "cut.jpg"), "cut.jpg", 1)


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
    "<annotation><filename>&b;</filename></annotation>"
)


@pytest.mark.parametrize(
    ("content", "said"),
    [("<annotation><obj", "000000.xml"), (BOMB, "000000.xml"), ("", "000000.xml")],
    ids=["cut", "entity bomb", "empty"],
)
def test_faulty_annotations(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    data = voc_folder()
    (data / "Annotations/000000.xml").write_text(content)
    check_refusal(run(capsys, "train", "smoke", "--data", data, "--out", tmp_path / "r", *SMALL), said, 1)


def test_boxes_outside_without_area_and_no_size_do_not_stop_a_training(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import voc_xml

    data = voc_folder()
    boxes = [("cat", (50.0, 30, 300, 300), False), ("dog", (10.0, 10, 10, 40), False), ("cat", (5.0, 5, 40, 40), False)]
    (data / "Annotations/000000.xml").write_text(voc_xml("000000.jpg", None, boxes))
    assert main(["train", "smoke", "--data", str(data), "--out", str(tmp_path / "r"), *SMALL]) == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        "note: 1 image size filled in from the image file, 1 box clipped to its image, 1 box without an area dropped"
    )
    code, out, _ = run(capsys, "inspect", data)
    assert code == 0
    assert out.count("000000.xml") >= 2, "the clipped and the dropped box are named"


def test_an_unknown_class(
    voc_folder: FolderFactory, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = voc_folder(class_names=("cat", "dogg"))
    names = ["--class-names", "cat,dog"]
    check_refusal(run(capsys, "train", "smoke", "--data", data, "--out", tmp_path / "r", *SMALL, *names), "dogg", 1)
    check_refusal(run(capsys, "evaluate", trained, data, "--split", "val"), "dogg", 1)


def test_coco_without_one_of_its_images(
    coco_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco_folder()
    gone = next(iter(sorted((data / "train").glob("*.jpg"))))
    gone.unlink()
    check_refusal(run(capsys, "train", "smoke", "--data", data, "--out", tmp_path / "r", *SMALL), gone.name, 1)


def test_weights_that_do_not_fit(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((trained / "last" / name).read_bytes())
    content = json.loads((folder / "config.json").read_text())
    content["model"]["num_classes"] = 3
    content["class_names"].append("owl")
    (folder / "config.json").write_text(json.dumps(content))
    check_refusal(run(capsys, "predict", folder, "examples"), "model.safetensors", 1)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    check_refusal(run(capsys, "predict", folder, "examples"), "model.safetensors", 1)
    torch.save({"model": Path("x")}, folder / "model.safetensors")
    check_refusal(run(capsys, "predict", folder, "examples"), "model.safetensors", 1)


def test_a_damaged_checkpoint(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((trained / "config.json").read_bytes())
    (folder / "last.ckpt").write_bytes((trained / "last.ckpt").read_bytes()[:-500])
    check_refusal(run(capsys, "train", "--resume", folder), "last.ckpt", 1)
    torch.save(Path("pickled"), folder / "last.ckpt")
    check_refusal(run(capsys, "train", "--resume", folder), "last.ckpt", 1)


def test_an_unknown_preset(capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(run(capsys, "train", "voc07-320-vgg", "--data", "x"), "did you mean 'voc07-320-vgg16'?", 2)
