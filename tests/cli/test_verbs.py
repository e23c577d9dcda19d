from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import refinedet
from refinedet import cli
from refinedet.dataclass_json import save_json
from refinedet.presets import PRESETS
from refinedet.training.run import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "command",
    ["predict stub PHOTO --json PHOTO", "predict stub PHOTO --json NOTES", "predict stub --json PHOTO OTHER",
     "inspect DATA --mosaic PHOTO", "evaluate stub DATA --submission NOTES.zip", "evaluate stub DATA --report REPORT",
     "convert NOTES.zip --preset smoke --out REPORT"],
)  # fmt: skip
def test_nothing_of_the_user_is_replaced(
    command: str, stub: Any, photo: Callable[..., Path], voc_folder: Callable[..., Path], tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    names = {"PHOTO": photo("a.jpg"), "OTHER": photo("b.jpg"), "DATA": voc_folder(), "NOTES.zip": tmp_path / "n.zip",
             "NOTES": tmp_path / "notes.json", "REPORT": tmp_path / "report"}  # fmt: skip
    names["REPORT"].mkdir()
    for path in (names["NOTES"], names["NOTES.zip"], names["REPORT"] / "report.json", names["REPORT"] / "config.json"):
        path.write_text('{"mine": true}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = refused([str(names.get(word, word)) for word in command.split()])
    assert "is an input of this command" in message or "was not written by this command" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_training_replaces_nothing_of_the_user(
    voc_folder: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    from refinedet.detector import RefineDet

    data, model = voc_folder(), RefineDet(PRESETS["smoke"].model, ("a",) * 20).save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ["train", "smoke", "--data", data, "--out"]
    assert "is an input" in refused([*command, data, "--init-weights", "random"])
    assert "is an input" in refused([*command, model, "--init", model])
    assert "config.json: exists" in refused([*command, model, "--init-weights", "random"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "name",
    ["config.json", "data.json", "metrics.csv", "last.ckpt", "last/model.safetensors", "best/README.md", "best",
     "report/detections.json", "report/images/good-03.jpg", "split/train.txt"],
)  # fmt: skip
def test_a_run_folder_with_a_foreign_file_is_refused(
    name: str, voc_folder: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    data, out = voc_folder(), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    code = 1 if name in ("last.ckpt", "best") else 2
    message = refused(["train", "smoke", "--data", data, "--out", out, "--init-weights", "random"], code)
    assert Path(name).name in message
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"preset": 1}', "\x00"])
def test_a_run_with_a_damaged_config_is_called_damaged(
    content: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "config.json").write_text(content)
    message = refused(["train", "--resume", tmp_path], 1)
    assert "config.json: " in message
    assert "exists" not in message


@pytest.mark.parametrize("name", ["report.json", "per_class.csv", "index.html", "images/good-07-small.jpg"])
def test_a_report_folder_with_a_foreign_file_is_refused(
    name: str, stub: Any, voc_folder: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    assert f"{name}: exists" in refused(["evaluate", "stub", voc_folder(), "--report", out])
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]


def test_home_is_expanded_in_every_output(
    stub: Any, photo: Callable[..., Path], voc_folder: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "stub", str(photo("a.jpg")), "--save", "~/drawn", "--json", "~/r.json"]) == 0
    assert cli.main(["evaluate", "stub", str(voc_folder()), "--report", "~/report"]) == 0
    assert cli.main(["inspect", str(tmp_path / "voc"), "--mosaic", "~/m.png"]) == 0
    assert sorted(path.name for path in home.iterdir()) == ["drawn", "m.png", "r.json", "report"]
    assert not (tmp_path / "~").exists()


def test_evaluate_prints_table_and_figure(
    stub: Any, voc_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = voc_folder()
    command = ["evaluate", "stub", str(data), "--report", str(tmp_path / "report"), "--limit", "2", "--metric", "voc"]
    assert cli.main(command) == 0
    output = capsys.readouterr()
    assert "cat" in output.out
    assert "\nmAP " in output.out
    assert f"report: {tmp_path / 'report'}" in output.out
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (saved["split"], saved["images"], saved["metric"]) == ("test", 2, "voc")
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"{100 * saved['figures']['mAP']:.1f}" in page
    assert "over iterations" not in page


@pytest.mark.parametrize("weights", ["run", "run/best", "run/last/"])
def test_the_page_of_a_run_folder_has_its_learning_curves(
    weights: str, stub: Any, voc_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["refinedet.detector"].RefineDet, "from_pretrained", lambda name, device: stub)
    for name in ("best", "last"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "metrics.csv").write_text("iteration,total\n1,2\n2,1\n")
    data, report = voc_folder(), tmp_path / "report"
    save_json(RunConfig(PRESETS["smoke"], (str(data),), stub.class_names, "random"), tmp_path / "run" / "config.json")
    assert cli.main(["evaluate", f"{tmp_path}/{weights}", str(data), "--report", str(report)]) == 0
    assert "Loss over iterations" in (report / "index.html").read_text()


def test_evaluate_takes_everything_of_undivided_data(
    stub: Any, voc_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "stub", str(voc_folder(splits={}))]) == 0
    assert "6 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stub"], "DATA is missing"),
        (["stub", "nowhere"], "nowhere"),
        (["stub", "DATA", "--split", "tset"], "no split 'tset'"),
        (["stub", "DATA", "--metric", "map"], "must be one of voc07, voc, coco"),
        (["stub", "DATA", "--shared-classes", "--submission", "a.zip"], "--submission takes neither --shared-classes"),
        (["stub", "DATA", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["stub", "DATA", "--batch-size", "-1"], "--batch-size must be at least 1, not -1"),
    ],
)
def test_wrong_evaluation_calls(
    arguments: list[str], message: str, stub: Any, voc_folder: Callable[..., Path],
    refused: Callable[..., str],
) -> None:  # fmt: skip
    data = str(voc_folder())
    assert message in refused(["evaluate", *(data if a == "DATA" else a for a in arguments)])


def test_inspect(
    voc_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    data = voc_folder()
    assert cli.main(["inspect", str(data), "--mosaic", str(tmp_path / "sheets" / "m.png")]) == 0
    assert "cat" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheets" / "m.png").width > 100
    image = data / "JPEGImages" / "000001.jpg"
    image.write_bytes(image.read_bytes()[:300])
    assert cli.main(["inspect", str(data)]) == 1
    output = capsys.readouterr()
    assert "000001.jpg" in output.out
    assert output.err == ""
    assert "nowhere" in refused(["inspect", "nowhere"])
    for sheet in ("sheet.txt", "/dev/null"):
        assert cli.main(["inspect", str(data), "--mosaic", sheet]) == 2
        output = capsys.readouterr()
        assert "name a .jpg or .png file" in output.err
        assert output.out == ""  # said before the work, not after it


def test_images_outside_of_the_data_are_read_only_where_it_is_allowed(
    coco_folder: Callable[..., Path], stub: Any, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    data = coco_folder()
    (data / "val").rename(data.parent / "private")
    listing = data / "annotations" / "instances_val.json"
    document = json.loads(listing.read_text())
    for image in document["images"]:
        image["file_name"] = str(data.parent / "private" / image["file_name"])
    listing.write_text(json.dumps(document))
    assert cli.main(["inspect", str(data), "--split", "val"]) == 1
    assert "outside the folder of the data" in capsys.readouterr().out
    assert cli.main(["inspect", str(data), "--split", "val", "--allow-outside"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(data), "--allow-outside"]) == 0
    assert "splits             train 3, val 3" in capsys.readouterr().out
    assert "outside the folder of the data" in refused(["evaluate", "stub", str(data), "--split", "val"], 1)
    assert cli.main(["evaluate", "stub", str(data), "--split", "val", "--allow-outside"]) == 0


def test_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, metrics in (("good", {"mAP": 0.3712, "data": "VOC 2007", "split": "val"}), ("bare", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        (tmp_path / name / "config.json").write_text(json.dumps({"metrics": metrics}))
    monkeypatch.setattr(refinedet.weights, "_HERE", tmp_path)
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(maxsplit=1) == ["good", "mAP 37.1 on VOC 2007 val"] for line in lines)
    assert any(line.split(maxsplit=1) == ["bare", "accuracy not measured"] for line in lines)
    for name, preset in PRESETS.items():
        assert any(line.strip().startswith(name) and line.endswith(preset.summary) for line in lines)
