"""What a run folder says about its images, and what an evaluation makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refinedet import PRESETS, RefineDet, cli, evaluate
from refinedet.data import open_dataset
from refinedet.dataclass_json import to_dict
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.run_data import RunData, find_run
from refinedet.training.run import RunConfig

FolderFactory = Callable[..., Path]
NAMES = ("lynx", "otter")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with random weights in best/, as if it had trained on some data."""

    def make(data: Path, name: str = "run", **train: object) -> Path:
        preset = PRESETS["smoke"]
        model = replace(preset.model, num_classes=2)
        run = tmp_path / name
        RefineDet(model, NAMES).save_pretrained(run / "best")
        settings = {**to_dict(preset.train), "train_split": "train", "evaluate_split": "val", "metric": "coco", **train}
        config = {
            "preset": {"model": to_dict(model), "train": settings, "summary": ""},
            "data": [str(data)],
            "class_names": list(NAMES),
            "initial_weights": "random",
        }
        (run / "config.json").write_text(json.dumps(config))
        return run

    return make


def test_a_run_evaluates_what_it_held_out(voc_folder: FolderFactory, make_run: Callable[..., Path]) -> None:
    run = make_run(voc_folder(class_names=NAMES))
    report = evaluate(run)
    assert (report.metric, report.split, report.images) == ("coco", "val", 3)
    assert (report.settings.trained_on, report.settings.run) == (0, str(run))
    assert "trained on" not in report.table()
    assert evaluate(str(run / "best"), metric="voc").metric == "voc"


def test_images_that_the_run_trained_on_are_counted(voc_folder: FolderFactory, make_run: Callable[..., Path]) -> None:
    data = voc_folder(class_names=NAMES)
    run = make_run(data)
    report = evaluate(run, data, "trainval")
    assert report.metric == "voc07"
    assert report.settings.trained_on == 3
    assert f"3 of these 6 images were trained on ({run})" in report.table().splitlines()
    # The data is elsewhere now: nothing is known, nothing is said.
    moved = data.rename(data.with_name("moved"))
    report = evaluate(run, moved, "trainval")
    assert report.settings.trained_on is None
    assert "trained on" not in report.table()


def test_lists_of_undivided_data(voc_folder: FolderFactory, make_run: Callable[..., Path]) -> None:
    data = voc_folder(class_names=NAMES, splits={})
    run = make_run(data, train_split="all", evaluate_split="held out")
    (run / "split").mkdir()
    for name, numbers in (("train", (0, 2, 3, 5)), ("held_out", (4, 1))):
        (run / "split" / f"{name}.txt").write_text("".join(f"JPEGImages/{n:06d}.jpg\n" for n in numbers))
    own = RunData.of(run)
    assert [record.image_id for record in own.held_out().records] == ["000004", "000001"]
    assert [record.image_id for record in own.train().records] == ["000000", "000002", "000003", "000005"]
    assert evaluate(run, data).settings.trained_on == 4
    report = evaluate(run)
    assert (report.images, report.split, report.settings.trained_on) == (2, "held out", 0)
    (data / "JPEGImages" / "000004.jpg").unlink()
    (data / "Annotations" / "000004.xml").unlink()
    with pytest.raises(RefineDetError, match=r"images that the run's lists name are missing: JPEGImages/000004\.jpg"):
        evaluate(run)


def test_which_folder_is_a_run(
    voc_folder: FolderFactory, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(voc_folder(class_names=NAMES), name="voc07-320-resnet18")
    assert find_run(run) == find_run(run / "best") == run
    assert find_run(tmp_path) is None
    # The bundled model goes before a folder of its name.
    monkeypatch.chdir(tmp_path)
    assert find_run("voc07-320-resnet18") is None
    with pytest.raises(UsageError, match="only a run folder knows which images it held out"):
        evaluate("voc07-320-resnet18")
    with pytest.raises(UsageError, match="no run folder"):
        RunData.of(tmp_path)


def test_a_run_that_held_nothing_out(voc_folder: FolderFactory, make_run: Callable[..., Path]) -> None:
    run = make_run(voc_folder(class_names=NAMES), evaluate_split="none")
    with pytest.raises(UsageError, match="held no images out; name the data"):
        evaluate(run)


def test_one_default_split(voc_folder: FolderFactory, make_run: Callable[..., Path]) -> None:
    data = voc_folder(class_names=NAMES)
    model = RefineDet.from_pretrained(make_run(data))
    assert evaluate(model, data).split == "test"
    others = voc_folder(class_names=NAMES, name="others", splits={"train": [0, 1], "val": [2, 4]})
    assert evaluate(model, others).split == "val"
    whole = voc_folder(class_names=NAMES, name="whole", splits={})
    assert evaluate(model, whole).images == len(open_dataset(whole)) == 6
    assert np.isfinite(evaluate(model, whole)["mAP"])
    alone = voc_folder(class_names=NAMES, name="alone", splits={"train": [0, 1]})
    with pytest.raises(UsageError, match="no split 'test'"):
        evaluate(model, alone)


def test_command_line_without_data(
    voc_folder: FolderFactory, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(voc_folder(class_names=NAMES))
    assert cli.main(["evaluate", str(run)]) == 0
    assert "COCO AP, IoU 0.50:0.95; 3 images of voc val" in capsys.readouterr().out
    assert cli.main(["evaluate", "voc07-320-resnet18"]) == 2
    assert "DATA is missing" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--metric", "map"]) == 2
    assert "must be one of voc07, voc, coco" in capsys.readouterr().err


@pytest.mark.parametrize("data", [[["a"]], "a", [3]])
def test_a_config_with_values_of_another_kind_is_one_line(tmp_path: Path, data: object) -> None:
    run = to_dict(RunConfig(PRESETS["smoke"], ("a",), ("cat",), "random"))
    (tmp_path / "config.json").write_text(json.dumps(run | {"data": data}))
    with pytest.raises(RefineDetError, match=r"config\.json: data: expected"):
        RunData.of(tmp_path)
