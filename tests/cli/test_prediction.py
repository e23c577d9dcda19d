from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from conftest import FullDisk
from refinedet import cli
from refinedet.cli.prediction import image_ids_of
from refinedet.data import open_dataset
from refinedet.errors import RefineDetError
from refinedet.fonts import BUNDLED
from refinedet.presets import PRESETS

LOAD = ImageFile.ImageFile.load
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
    assert np.asarray(Image.open(out / "a-2.jpg")).shape == (160, 480, 3)  # very small images are enlarged
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


def test_how_copies_are_drawn(
    stub: Any,
    photo: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = photo("a.png", (300, 200))
    drawn = {}
    for name, flags in {"names": [], "plain": ["--no-labels"], "thick": ["--no-labels", "--line-width", "9"],
                        "font": ["--font", str(BUNDLED)]}.items():  # fmt: skip
        assert cli.main(["predict", "stub", str(image), "--save", str(tmp_path / name), *flags]) == 0
        with Image.open(tmp_path / name / "a.png") as opened:
            drawn[name] = (np.asarray(opened) != np.asarray(Image.open(image))).any(axis=2).sum()
    assert drawn["plain"] < drawn["names"] == drawn["font"]
    assert drawn["thick"] > 4 * drawn["plain"]
    capsys.readouterr()
    for flags, message in ((["--line-width", "0"], "--line-width must be at least 1"),
                           (["--max-pixels", "0"], "--max-pixels must be at least 1"),
                           (["--font", str(image)], "not a font that can be read")):  # fmt: skip
        assert message in refused(["predict", "stub", str(image), *flags])
    message = refused(["predict", "stub", str(image), "--max-pixels", "59999"], 1)
    assert "image is too large (300x200): more than 59,999 pixels" in message


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
    text.write_text("not an image")
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
    ("names", "ids", "label", "category", "said"),
    [
        (("cat", "dog"), None, 1, 18, False),  # COCO's own ids, of which there are 80 between 1 and 90
        (("person", "toothbrush"), None, 1, 90, False),
        (("aeroplane", "tvmonitor"), None, 1, 72, False),  # VOC's words for COCO's airplane and tv
        (("cat", "unicorn"), None, 1, 2, True),
        (("cat", "dog"), (7, 30), 1, 30, False),  # the ids of the training data go first
    ],
)
def test_predict_coco_categories(
    names: tuple[str, ...], ids: tuple[int, ...] | None, label: int, category: int, said: bool, stub: Any,
    photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stub.class_names, stub.category_ids = names, ids
    result = tmp_path / "r.json"
    assert cli.main(["predict", "stub", str(photo("a.jpg")), "--json", str(result), "--json-format", "coco"]) == 0
    assert [item["category_id"] for item in json.loads(result.read_text())] == [category]
    note = "note: the model does not know the category ids of its training data; they are 1 to 2 in label order\n"
    assert capsys.readouterr().err == (note if said else "")


def test_predict_coco_ids_count_inputs(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [photo("a.jpg"), tmp_path / "broken.jpg", photo("c.jpg")]
    files[1].write_text("no image")
    result = tmp_path / "r.json"
    command = ["predict", "stub", *map(str, files), "--json", str(result), "--json-format", "coco"]
    assert cli.main(command) == 1
    assert [item["image_id"] for item in json.loads(result.read_text())] == [1, 3]
    annotations = tmp_path / "instances.json"
    images = [
        {"id": 70, "file_name": "c.jpg"},
        {"id": 71, "file_name": "x\\a.jpg"},
        {"id": 9, "file_name": "broken.jpg"},
    ]
    annotations.write_text(json.dumps({"images": images}))
    assert cli.main([*command, "--coco-images", str(annotations)]) == 1
    assert [item["image_id"] for item in json.loads(result.read_text())] == [71, 70]


@pytest.mark.parametrize(
    ("content", "message", "code"),
    [
        ({"images": []}, "lists no images named a.jpg", 2),
        (
            {"images": [{"id": 1, "file_name": "1/a.jpg"}, {"id": 2, "file_name": "2/a.jpg"}]},
            "lists no images named",
            2,
        ),
        ({"images": [{"id": 1}]}, "no list of COCO images", 1),
        ([], "no list of COCO images", 1),
        ("nothing", "no list of COCO images", 1),
    ],
)
def test_wrong_coco_images(
    content: Any, message: str, code: int, stub: Any, photo: Callable[..., Path], tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(content))
    command = ["predict", "stub", photo("a.jpg"), "--json", tmp_path / "r.json", "--coco-images", annotations]
    assert message in refused([*command, "--json-format", "coco"], code)
    assert "goes with --json-format coco" in refused(command)
    assert not stub.batches


def test_predict_json_lines(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [photo("a.jpg"), tmp_path / "broken.jpg", photo("c.jpg", (60, 20))]
    files[1].write_text("no image")
    lines = tmp_path / "new" / "r.jsonl"
    for _ in range(2):  # the same command again starts anew
        assert cli.main(["predict", "stub", *map(str, files), "--jsonl", str(lines), "--batch-size", "1"]) == 1
        header, *rows = [json.loads(line) for line in lines.read_text().splitlines()]
        assert header == {
            "generator": "detections written by refinedet", "model": "stub", "class_names": ["cat", "dog"],
            "threshold": 0.4,
        }  # fmt: skip
        assert [row["source"] for row in rows] == [str(path) for path in files]
        assert rows[2]["detections"] == [{"label": 1, "name": "dog", "score": 0.75, "box": [0.0, 0.0, 30.0, 20.0]}]
        assert "not an image" in rows[1]["error"]
    assert f"jsonl: {lines}\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--jsonl"])
def test_json_to_standard_output_is_nothing_but_json(
    option: str, stub: Any, photo: Callable[..., Path], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["predict", "stub", str(photo("a.jpg")), option, "-", "--save", str(tmp_path / "out")]
    assert cli.main(command) == 0
    out, err = capfdbinary.readouterr()
    rows = [json.loads(out)] if option == "--json" else [json.loads(line) for line in out.splitlines()]
    assert rows[0]["generator"] == "detections written by refinedet"
    assert err == b""


def test_predict_quiet(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", "stub", str(photo("a.jpg")), "--json", str(tmp_path / "r.json"), "--quiet"]) == 0
    assert capsys.readouterr() == (f"json: {tmp_path / 'r.json'}\n", "")


def test_predict_recursive(stub: Any, photo: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    wanted = [photo("all/a.jpg"), photo("all/b/c.png"), photo("all/b/d/e.jpg")]
    photo("all/.hidden/f.jpg")
    (tmp_path / "all" / "b" / "loop").symlink_to(tmp_path / "all")
    result = tmp_path / "r.json"
    command = ["predict", "stub", str(tmp_path / "all"), "--json", str(result)]
    for options, expected in (([], wanted[:1]), (["--recursive"], wanted)):
        assert cli.main([*command, *options]) == 0
        assert [image["source"] for image in json.loads(result.read_text())["images"]] == [str(p) for p in expected]
    (tmp_path / "none" / "deep").mkdir(parents=True)
    assert "--recursive" in refused(["predict", "stub", tmp_path / "none"])
    assert "no images in this folder" in refused(["predict", "stub", tmp_path / "none", "--recursive"])


def test_predict_survives_an_image_that_fills_the_memory(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files = [photo("a.jpg"), photo("huge.jpg", (41, 30)), photo("c.jpg")]

    def full(image: ImageFile.ImageFile) -> Any:
        if image.size == (41, 30):
            raise MemoryError
        return LOAD(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    result = tmp_path / "r.json"
    assert cli.main(["predict", "stub", *map(str, files), "--json", str(result)]) == 1
    content = json.loads(result.read_text())
    assert [Path(image["source"]).name for image in content["images"]] == ["a.jpg", "c.jpg"]
    assert [Path(failure["source"]).name for failure in content["failed"]] == ["huge.jpg"]
    assert capsys.readouterr().err.count("\n") == 1


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
    image = photo("a.jpg")
    command = ["predict", "stub", str(image), "--json", str(result)]
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


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1.5", "null", "[1]", "{}"])
def test_ids_of_coco_images_are_whole_numbers_or_texts(number: str, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text(f'{{"images": [{{"file_name": "a.jpg", "id": {number}}}]}}')
    with pytest.raises(RefineDetError, match=r"ids\.json: the id of a\.jpg"):
        image_ids_of(["a.jpg"], file)


def test_predict_saves_labels_for_correction(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """The stub's dog covers the left half; each layout is read back by the reader of datasets."""
    paths = [photo("in/a.jpg"), photo("in/b.jpg", (60, 20))]
    for layout in ("voc", "coco", "yolo"):
        out = tmp_path / layout
        call = ["predict", "stub", str(tmp_path / "in"), "--save-labels", layout, "--labels-out", str(out), "--quiet"]
        assert cli.main(call) == 0
        assert "is not empty" in refused(call)  # labels that were corrected are never overwritten
        for folder in ("JPEGImages" if layout == "voc" else "images",):
            shutil.copytree(tmp_path / "in", out / folder)
        dataset = open_dataset(out)
        assert sorted(record.image_path.name for record in dataset.records) == [path.name for path in paths]
        for record in dataset.records:
            assert [dataset.class_names[label] for label in record.labels] == ["dog"]
            np.testing.assert_allclose(record.boxes, [[0, 0, record.width / 2, record.height]], atol=1e-4)


def test_labels_of_a_stopped_prediction_are_complete(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo("in/a.jpg"), photo("in/b.jpg")
    predict = stub.predict_arrays

    def stopped(images: list[Any], *, threshold: float | None = None) -> Any:
        if stub.batches:
            raise KeyboardInterrupt
        return predict(images, threshold=threshold)

    monkeypatch.setattr(stub, "predict_arrays", stopped)
    out, ranks = tmp_path / "labels", tmp_path / "next.csv"
    call = ["predict", "stub", str(tmp_path / "in"), "--batch-size", "1", "--save-labels", "coco"]
    assert cli.main([*call, "--labels-out", str(out), "--rank", str(ranks)]) == 130
    written = json.loads((out / "annotations.json").read_text())
    assert [image["file_name"] for image in written["images"]] == ["a.jpg"]
    assert ranks.read_text().count("\n") == 2


def test_predict_ranks_by_all_scores_and_shows_those_above_the_threshold(
    stub: Any, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any
) -> None:
    paths = [str(photo("a.jpg")), str(photo("b.jpg"))]
    table = tmp_path / "next.csv"
    for _ in range(2):  # a table of ours is replaced
        assert cli.main(["predict", "stub", *paths, "--threshold", "0.8", "--rank", str(table)]) == 0
    assert "0 objects" in capsys.readouterr().out
    lines = table.read_text().splitlines()
    assert lines == ["image,uncertainty,doubtful,detections", f"{paths[0]},0.25,1,1", f"{paths[1]},0.25,1,1"]
    other = tmp_path / "list.csv"
    other.write_text("image,comment\n")
    assert "was not written by this command" in refused(["predict", "stub", paths[0], "--rank", other])
