from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import FullDisk
from refinedet import cli
from refinedet.presets import PRESETS

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_predict_table_copies_and_json(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [photo("one/a.jpg"), photo("two/a.jpg", (60, 20)), photo("two/b.png")]
    before = [path.read_bytes() for path in paths]
    out, result = tmp_path / "out", tmp_path / "deep" / "r.json"
    arguments = ["predict", "stub", paths[0], tmp_path / "two", "--save", out, "--json", result, "--batch-size", "2"]
    for _ in range(2):  # again: the copies are replaced, not multiplied
        assert cli.main([str(a) for a in arguments]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["a-2.jpg", "a.jpg", "b.png"]
    assert stub.batches == [2, 1] * 2
    assert [path.read_bytes() for path in paths] == before
    assert np.asarray(Image.open(out / "a-2.jpg")).shape == (20, 60, 3)
    values = json.loads(result.read_text())
    assert [image["source"] for image in values["images"]] == [str(path) for path in paths]
    assert values["images"][0]["detections"] == [
        {"label": 1, "name": "dog", "score": 0.75, "box": [0.0, 0.0, 20.0, 30.0]}
    ]
    assert (values["model"], values["threshold"], values["failed"]) == ("stub", 0.4, [])
    output = capsys.readouterr()
    assert output.err == ""
    assert f"{paths[0]}  40x30  1 object\n" in output.out
    assert "dog" in output.out
    assert f"drawn: 3 images in {out}" in output.out


def test_predict_threshold(stub: Any, photo: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "stub", str(photo("a.jpg")), "--threshold", "0.8"]) == 0
    assert "0 objects" in capsys.readouterr().out


def test_predict_never_touches_originals_or_other_files(stub: Any, photo: Callable[..., Path], tmp_path: Path) -> None:
    original, other = photo("photos/a.jpg"), photo("photos/b.jpg")
    elsewhere = photo("more/b.jpg")
    before = original.read_bytes(), other.read_bytes()
    assert cli.main(["predict", "stub", str(original), str(elsewhere), "--save", str(tmp_path / "photos")]) == 0
    assert (original.read_bytes(), other.read_bytes()) == before
    names = sorted(file.name for file in (tmp_path / "photos").iterdir())
    assert names == ["a-2.jpg", "a.jpg", "b-2.jpg", "b.jpg"]


def test_predict_goes_on_after_a_broken_image(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut, text = photo("a.jpg"), photo("b.jpg", (200, 200)), tmp_path / "c.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    text.write_text("not a picture")
    also_good = photo("d.jpg")
    files = [str(path) for path in (good, cut, text, also_good)]
    assert cli.main(["predict", "stub", *files, "--json", str(tmp_path / "r.json")]) == 1
    output = capsys.readouterr()
    assert [line.split(": ")[:2] for line in output.err.splitlines()] == [["error", str(cut)], ["error", str(text)]]
    assert output.out.count("1 object\n") == 2
    values = json.loads((tmp_path / "r.json").read_text())
    assert [image["source"] for image in values["images"]] == [str(good), str(also_good)]
    assert [failure["source"] for failure in values["failed"]] == [str(cut), str(text)]


def test_predict_coco_ids(stub: Any, photo: Callable[..., Path], tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    files = [str(photo("000000000139.jpg")), str(photo("285.jpg"))]
    assert cli.main(["predict", "stub", *files, "--json", str(result), "--json-format", "coco"]) == 0
    assert json.loads(result.read_text())[0] == {
        "image_id": 139, "category_id": 18, "bbox": [0.0, 0.0, 20.0, 30.0], "score": 0.75, "file_name": files[0]
    }  # fmt: skip
    assert [one["image_id"] for one in json.loads(result.read_text())] == [139, 285]
    files.append(str(photo("holiday.jpg")))
    assert cli.main(["predict", "stub", *files, "--json", str(result), "--json-format", "coco"]) == 0
    assert [one["image_id"] for one in json.loads(result.read_text())] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WEIGHTS"),
        (["stub"], "no images given"),
        (["stub", "nope.jpg"], "nope.jpg: no such file"),
        (["stub", "PHOTO", "--threshold", "2"], "--threshold must be between 0 and 1, not 2.0"),
        (["stub", "PHOTO", "--threshold", "nan"], "--threshold must be between 0 and 1, not nan"),
        (["stub", "PHOTO", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["stub", "PHOTO", "--device", "gpu"], "unknown device 'gpu'"),
        (["stub", "PHOTO", "--theshold", "1"], "did you mean '--threshold'?"),
        (["stub", "PHOTO", "--json-format", "xml"], "'refinedet', 'coco'"),
        (["stub", "PHOTO", "--json", "FOLDER"], "is a folder"),
    ],
)
def test_wrong_prediction_calls(
    arguments: list[str], message: str, stub: Any, photo: Callable[..., Path], tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    given = {"PHOTO": str(photo("a.jpg")), "FOLDER": str(tmp_path)}
    assert message in refused(["predict", *(given.get(argument, argument) for argument in arguments)])
    assert not stub.batches


def test_predict_failures_of_the_work(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = photo("a.jpg")
    assert "other: corrupt" in refused(["predict", "other", path], 1)
    message = refused(["predict", "stub", path, "--save", path / "x"], 1)
    assert "the folder cannot be made" in message
    assert "there is a file of that name" in refused(["predict", "stub", path, "--save", path], 1)


def test_full_disk_keeps_the_previous_json(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    full_disk: FullDisk,
) -> None:  # fmt: skip
    result = tmp_path / "r.json"
    picture = photo("a.jpg")
    command = ["predict", "stub", str(picture), "--json", str(result)]
    assert cli.main(command) == 0
    earlier = result.read_text()
    with full_disk(20):
        assert cli.main(command) == 1
    reason = "cannot be saved (disk full, or the file is larger than allowed); the previous file is untouched"
    assert f"error: {result}: {reason}\n" == capsys.readouterr().err
    assert result.read_text() == earlier


def test_a_real_model_finds_its_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from refinedet.detector import RefineDet

    model = RefineDet(PRESETS["smoke"].model)
    model.save_pretrained(tmp_path / "model")
    command = ["predict", str(tmp_path / "model"), str(EXAMPLES), "--threshold", "0", "--save", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "chelsea.jpg  451x300  " in capsys.readouterr().out
