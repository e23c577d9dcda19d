"""The training loop: resuming, the finite guard, run folders, and what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import FolderFactory
from refinedet import trackers
from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.data.records import DetectionDataset
from refinedet.detections import Detections
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.evaluate import evaluate
from refinedet.training import session
from refinedet.training.train import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes: Any) -> Preset:
    model = ModelConfig(
        backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True,
        anchor_sizes=(16, 24, 32, 48),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "iterations": 10,
        "batch_size": 4,
        "learning_rate": 0.002,
        "milestones": (7,),
        "ema_decay": 0.9,
        "gradient_clip_norm": 10.0,
        "workers": 0,
        "log_every": 3,
        "save_every": 100,
        "evaluate_every": 0,
        "train_split": "train",
        "evaluate_split": "val",
        "size_schedule": ((0, 128), (1, 64)),
    }
    return Preset(model=model, train=TrainConfig(**{**settings, **changes}), summary="for tests")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    flat = {f"network.{name}": value for name, value in state["network"].items()}
    flat |= {f"average.{name}": value for name, value in state["average"].items()}
    flat |= {
        f"optimizer.{index}.{name}": value
        for index, values in state["optimizer"]["state"].items()
        for name, value in values.items()
    }
    return flat


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(stream)]


def test_a_backbone_without_a_rate_keeps_what_it_knows_if_it_knows_anything(
    voc_folder: FolderFactory, tmp_path: Path
) -> None:
    data = voc_folder()
    preset = tiny(iterations=2, backbone_learning_rate_factor=0.0, ema_decay=None)
    first = train(preset, data, out=tmp_path / "first", init_weights="random", device="cpu")
    torch.manual_seed(preset.train.seed)
    random = RefineDet(first.model.config, first.model.class_names)
    name = "backbone.layer2.0.conv1.weight"
    assert not torch.equal(first.model.network.get_parameter(name), random.network.get_parameter(name))
    second = train(preset, data, out=tmp_path / "second", init=tmp_path / "first", device="cpu")
    for name, tensor in second.model.network.named_parameters():
        if name.startswith("backbone.") and not name.startswith("backbone.res6."):
            assert torch.equal(tensor, first.model.network.get_parameter(name)), name
    name = "tcb.0.conv1.weight"
    assert not torch.equal(second.model.network.get_parameter(name), first.model.network.get_parameter(name))


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_four_and_six_iterations_are_ten_bit_for_bit(voc_folder: FolderFactory, tmp_path: Path, optimizer: str) -> None:
    data = voc_folder(images=12)
    preset = tiny(optimizer=optimizer, save_every=4, size_schedule=((0, 128), (5, 64)))
    train(preset, data, out=tmp_path / "whole", init_weights="random", device="cpu")

    class PowerCutError(Exception):
        pass

    asked = iter(range(1, 10))

    def power_cut() -> bool:
        if next(asked) == 6:
            raise PowerCutError
        return False

    with pytest.raises(PowerCutError):
        train(preset, data, out=tmp_path / "parts", init_weights="random", device="cpu", stop=power_cut)
    torch.manual_seed(999)  # whatever happened in between must not matter
    run = resume(tmp_path / "parts", device="cpu")
    assert run.report is not None

    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert (tmp_path / "whole/last/model.safetensors").read_bytes() == (
        tmp_path / "parts/last/model.safetensors"
    ).read_bytes()


def test_a_signal_saves_and_the_same_call_goes_on(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "refinedet")
    data, out = voc_folder(images=6), tmp_path / "run"
    preset = tiny(iterations=4, log_every=1, batch_size=2)

    def call(folder: Path, **rest: Any) -> Any:
        return train(preset, data, out=folder, init_weights="random", device="cpu", **rest)

    asked = iter([False, True])

    def terminate() -> bool:
        if next(asked):
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(SystemExit) as caught:
        call(out, stop=terminate)
    assert caught.value.code == 143
    # The signal came while the second iteration was asked about; the third was the first to see it.
    assert "stopped at 3/4, saved; go on with: refinedet train --resume" in capsys.readouterr().err

    (out / "last.ckpt").write_bytes(b"damaged")
    shutil.copy(out / "last.ckpt", out / "previous.ckpt")
    with pytest.raises(RefineDetError, match=r"last\.ckpt: not a readable checkpoint"):
        call(out)
    shutil.rmtree(out)
    asked = iter([False, True])
    with pytest.raises(SystemExit):
        call(out, stop=terminate)
    assert call(out).report is not None
    assert "going on from iteration 3 of 4" in caplog.text
    call(tmp_path / "whole")
    one, other = tensors(out), tensors(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert rows(out) == rows(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert call(out).finished
    assert "finished before, all 4 iterations; nothing was changed" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_the_data_that_it_began_with(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data, out = voc_folder(images=6), tmp_path / "run"
    run = train(
        tiny(iterations=3, evaluate_split="none"), data, out=out, init_weights="random", device="cpu",
        stop=lambda: True,
    )  # fmt: skip
    assert not run.finished
    assert json.loads((out / "config.json").read_text())["data"] == [str(data)]
    moved = data.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"if the data has moved: refinedet train --resume .* --data NEW"):
        resume(out, device="cpu")
    names = moved / "ImageSets/Main/train.txt"
    text = names.read_text()
    names.write_text(text + "000001\n")
    with pytest.raises(RefineDetError, match=r"has changed.*1 image added \(JPEGImages/000001\.jpg\)"):
        resume(out, data=moved, device="cpu")
    names.write_text(text)
    assert resume(out, data=moved, device="cpu").finished
    assert json.loads((out / "config.json").read_text())["data"] == [str(moved)]


def test_what_went_wrong_in_a_log_is_one_warning(
    voc_folder: FolderFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, step: int, values: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    preset = tiny(iterations=3, log_every=1, evaluate_split="none")
    run = train(preset, voc_folder(), out=tmp_path / "run", init_weights="random", device="cpu", loggers=[Broken()])
    assert run.finished
    assert caplog.text.count("No space left on device; the training continues without this log") == 1


def test_a_resumed_run_goes_on_with_the_loggers_it_began_with(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Tracker:
        def __init__(self, folder: Path, *, resume_step: int | None, settings: Any) -> None:
            seen.append((folder, resume_step, settings["train"]["iterations"]))

        def log(self, step: int, values: Any) -> None:
            seen.append(step)

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Tracker)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    preset, data, out = tiny(iterations=2, log_every=1, evaluate_split="none"), voc_folder(), tmp_path / "run"
    with pytest.raises(UsageError, match="unknown logger 'wandbb': did you mean 'wandb'"):
        train(preset, data, out=out, loggers=["wandbb"])
    assert not out.exists()
    train(preset, data, out=out, init_weights="random", device="cpu", loggers=["wandb"])
    resume(out, iterations=3, device="cpu")
    assert seen == [(out / "wandb", None, 2), 1, 2, "closed", (out / "wandb", 2, 3), 3, "closed"]


def test_worker_processes_do_not_change_the_outcome(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=6)
    for workers in (0, 2):
        preset = tiny(iterations=3, workers=workers, evaluate_split="none")
        train(preset, data, out=tmp_path / str(workers), init_weights="random", device="cpu")
    one, other = tensors(tmp_path / "0"), tensors(tmp_path / "2")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_folder_holds_what_is_promised(voc_folder: FolderFactory, tmp_path: Path) -> None:
    run = train(
        tiny(iterations=4, evaluate_every=2, log_every=1), voc_folder(), out=tmp_path / "run",
        init_weights="random", device="cpu",
    )  # fmt: skip
    for name in ("config.json", "metrics.csv", "last.ckpt", "last/model.safetensors", "last/config.json",
                 "last/README.md", "best/model.safetensors", "report/report.json", "report/index.html"):  # fmt: skip
        assert (tmp_path / "run" / name).is_file(), name
    assert not list((tmp_path / "run").rglob(".*")), "files written aside are gone"
    page = (tmp_path / "run/report/index.html").read_text()
    assert "Loss over iterations" in page
    assert "mAP on the evaluation split" in page
    content = json.loads((tmp_path / "run/last/config.json").read_text())
    assert content["class_names"] == ["cat", "dog"]
    assert content["metrics"]["images"] == 3
    assert content["metrics"]["iteration"] == 4
    assert run.report is not None
    assert content["metrics"]["mAP"] == pytest.approx(run.report["mAP"], abs=1e-6)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4"]
    # The report of the training says what that of ``evaluate`` says.
    settings = json.loads((tmp_path / "run/report/report.json").read_text())["settings"]
    evaluated = evaluate(tmp_path / "run/last").to_dict()["settings"]
    assert (settings["weights"], settings["trained_on"]) == (str(tmp_path / "run/last"), 0)
    names = {name for name, value in evaluated.items() if settings[name] != value}
    # The two provenances are equal where both reports were made within one second.
    assert names - {"provenance"} == {"iteration", "seconds_per_image"}
    # A run folder is a model: its best weights, and the last ones under last/.
    assert RefineDet.from_pretrained(tmp_path / "run").class_names == ("cat", "dog")
    # A run that never reached a checkpoint may be started again.
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped/config.json").write_text('{"preset": {}}')
    train(
        tiny(iterations=1, evaluate_split="none"), voc_folder(name="once"), out=tmp_path / "stopped",
        init_weights="random", device="cpu",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"holds a run of other settings \(train.iterations is 10, was 4\)"):
        train(tiny(), voc_folder(name="again"), out=tmp_path / "run", init_weights="random", device="cpu")


def test_what_is_saved_is_the_moving_average(voc_folder: FolderFactory, tmp_path: Path) -> None:
    run = train(
        tiny(iterations=3, evaluate_split="none"), voc_folder(), out=tmp_path / "run", init_weights="random",
        device="cpu",
    )  # fmt: skip
    state = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    saved = RefineDet.from_pretrained(tmp_path / "run").network.state_dict()
    name = "odm.0.logits.weight"
    assert torch.equal(saved[name], state["average"][name])
    assert not torch.equal(saved[name], state["network"][name])
    assert torch.equal(run.model.network.state_dict()[name], saved[name])


def test_accumulated_steps_are_the_mean_of_their_losses(voc_folder: FolderFactory, tmp_path: Path) -> None:
    """Two passes of the same four images must move the weights exactly as one pass of them."""
    data = voc_folder(images=1, splits={"train": [0]})
    frozen = dataclasses.replace(tiny().model, tcb_batch_norm=False, backbone_norm="frozen")
    results = []
    for steps in (1, 2):
        still = dataclasses.replace(tiny().train.augment, photometric=False, expand_probability=0.0, crop=False,
                                    flip_probability=0.0, interpolations=("linear",))  # fmt: skip
        preset = tiny(
            iterations=2, batch_size=4, accumulation_steps=steps, augment=still, evaluate_split="none",
            gradient_clip_norm=None,
        )  # fmt: skip
        out = tmp_path / str(steps)
        train(dataclasses.replace(preset, model=frozen), data, out=out, init_weights="random", device="cpu")
        results.append(tensors(out))
    learned = {name for name, _ in RefineDet(frozen).network.named_parameters()}
    for name, value in results[0].items():
        # Running variances are corrected for the number of values, which differs; what is learned must not.
        if name.removeprefix("network.") in learned:
            torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_images(
    voc_folder: FolderFactory, tmp_path: Path
) -> None:
    data = voc_folder(images=12)
    preset = tiny(learning_rate=1e15, gradient_clip_norm=None, ema_decay=None, save_every=100, evaluate_split="none")
    with pytest.raises(RefineDetError, match=r"not finite.*Lower --learning-rate.*JPEGImages") as caught:
        train(preset, data, out=tmp_path / "run", init_weights="random", device="cpu")
    assert str(caught.value).count(".jpg") == 4
    # With a save after every iteration the first update is found out before anything of it is kept.
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, save_every=1))
    with pytest.raises(RefineDetError, match=r"after iteration 1 the loss is .*ruined them; they were not saved"):
        train(preset, data, out=tmp_path / "run", init_weights="random", device="cpu")
    assert not (tmp_path / "run/last.ckpt").exists()
    assert not (tmp_path / "run/last").exists()


def test_images_without_objects_alone_are_nothing_to_learn_from(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=6, splits={"train": [3], "val": [0, 1]})
    with pytest.raises(RefineDetError, match=r"nothing to learn from: 1 images, 0 objects.*1 images without objects"):
        train(tiny(iterations=2), data, out=tmp_path / "run", init_weights="random", device="cpu")


def test_one_class_and_a_batch_of_one(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=4, class_names=("widget",))
    preset = tiny(iterations=3, batch_size=1, size_schedule=())
    preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, image_size=(128, 128)))
    run = train(preset, data, out=tmp_path / "run", init_weights="random", device="cpu")
    assert run.model.class_names == ("widget",)
    assert all(np.isfinite(value) for value in run.losses.values())


def test_bf16_and_a_learning_rate_schedule_reach_the_log(voc_folder: FolderFactory, tmp_path: Path) -> None:
    train(
        tiny(iterations=4, precision="bf16", log_every=1, warmup_iterations=2, milestones=(3,), evaluate_split="none",
             batch_size=2, size_schedule=()),
        voc_folder(), out=tmp_path / "run", init_weights="random", device="cpu",
    )  # fmt: skip
    assert [float(row["learning_rate"]) for row in rows(tmp_path / "run")] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-4])


def test_start_from_a_model_with_other_classes(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=4, class_names=("a", "b", "c"), name="three")
    start = RefineDet(tiny().model, ("cat", "dog"))
    start.save_pretrained(tmp_path / "start")
    quiet = {"iterations": 1, "learning_rate": 1e-12, "evaluate_split": "none", "ema_decay": None}
    train(tiny(**quiet), data, out=tmp_path / "run", init=tmp_path / "start", device="cpu")
    trained = RefineDet.from_pretrained(tmp_path / "run").network.state_dict()
    before = start.network.state_dict()
    torch.testing.assert_close(trained["arm.0.logits.weight"], before["arm.0.logits.weight"])
    torch.testing.assert_close(trained["odm.2.offsets.weight"], before["odm.2.offsets.weight"])
    assert trained["odm.0.logits.weight"].shape[0] == 3 * 4
    assert trained["odm.0.logits.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch normalisation needs"),
        ({"train_split": "nope"}, "nope"),
        ({"evaluate_split": "train"}, "is the training split"),
        ({"evaluate_split": "nope"}, "nope"),
    ],
)
def test_wrong_calls_end_in_one_line(
    voc_folder: FolderFactory, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train(tiny(**changes), voc_folder(), out=tmp_path / "run", init_weights="random", device="cpu")
    assert "\n" not in str(caught.value)


def test_images_that_are_trained_and_evaluated_on_are_counted(
    voc_folder: FolderFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = voc_folder(images=12)
    apart = tiny(iterations=1, train_split="all[:75%]", evaluate_split="all[75%:]")
    train(apart, data, out=tmp_path / "apart", init_weights="random", device="cpu")
    assert "trained on too" not in caplog.text
    mixed = tiny(iterations=1, train_split="all[:75%]", evaluate_split="all[50%:]")
    train(mixed, data, out=tmp_path / "mixed", init_weights="random", device="cpu")
    assert "3 of the 6 images of 'all[50%:]' are trained on too" in caplog.text
    assert "3 images, none of which was trained on" in (tmp_path / "apart/last/README.md").read_text()
    assert "6 images, 3 of which were trained on" in (tmp_path / "mixed/last/README.md").read_text()


def test_weights_of_another_backbone_are_refused(voc_folder: FolderFactory, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.safetensors")
    with pytest.raises(RefineDetError, match=r"vgg\.safetensors: weights of no known format"):
        train(tiny(), voc_folder(), out=tmp_path / "run", init_weights=tmp_path / "vgg.safetensors")
    torch.save({"model": Path("x")}, tmp_path / "pickled.pth")
    with pytest.raises(RefineDetError, match=r"pickled\.pth: not a readable file of tensors"):
        train(tiny(), voc_folder(name="b"), out=tmp_path / "run2", init_weights=tmp_path / "pickled.pth")


@pytest.mark.parametrize("damage", ["cut", "pickle", "other"])
def test_resume_refuses_a_damaged_checkpoint(voc_folder: FolderFactory, tmp_path: Path, damage: str) -> None:
    train(
        tiny(iterations=1, evaluate_split="none"), voc_folder(), out=tmp_path / "run", init_weights="random",
        device="cpu",
    )  # fmt: skip
    path = tmp_path / "run/last.ckpt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"iteration": 1, "network": Path("x")}, path)
    else:
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(RefineDetError, match=r"last\.ckpt: not") as caught:
        resume(tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no run there"):
        resume(tmp_path / "nothing")


def test_resume_refuses_an_unknown_key_in_its_config(voc_folder: FolderFactory, tmp_path: Path) -> None:
    train(
        tiny(iterations=1, evaluate_split="none"), voc_folder(), out=tmp_path / "run", init_weights="random",
        device="cpu",
    )  # fmt: skip
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"momentum"', '"momentun"'))
    with pytest.raises(RefineDetError, match=r"config\.json.*momentun.*did you mean 'momentum'"):
        resume(tmp_path / "run")


DISTRIBUTED = """
import dataclasses, sys, torch
from refinedet.config import Preset
from refinedet.dataclass_json import from_dict
from refinedet.training.train import train
import json
torch.set_num_threads(1)
preset = from_dict(Preset, json.loads(sys.argv[1]))
run = train(preset, sys.argv[2], out=sys.argv[3], init_weights="random", device="cpu")
"""


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(voc_folder: FolderFactory, tmp_path: Path) -> None:
    """Same total batch, same images; batch norm sees other batches, so it is frozen or absent here."""
    from refinedet.dataclass_json import to_dict

    data = voc_folder(images=8)
    model = dataclasses.replace(tiny().model, backbone_norm="frozen", tcb_batch_norm=False, backbone="vgg16")
    # One step of plain SGD: the difference of the weights is the gradient.
    settings = dataclasses.replace(
        tiny().train, iterations=1, batch_size=4, learning_rate=1e-3, gradient_clip_norm=None, ema_decay=None,
        momentum=0.0, weight_decay=0.0, milestones=(), size_schedule=(), log_every=1,
    )  # fmt: skip
    preset = Preset(model=model, train=settings, summary="")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    outcome = []
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, str(script), json.dumps(to_dict(preset)), str(data), str(tmp_path / name)],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        outcome.append(torch.load(tmp_path / name / "last.ckpt", weights_only=True)["network"])
    torch.manual_seed(settings.seed)
    start = RefineDet(model, ("cat", "dog")).network.state_dict()
    moved = 0
    for name, before in start.items():
        one, two = outcome[0][name] - before, outcome[1][name] - before
        moved += int(one.abs().sum() > 0)
        # Differences of weights carry the rounding of the weights.
        torch.testing.assert_close(two, one, rtol=1e-3, atol=2e-7 + 1e-6 * float(before.abs().max()))
    assert moved > 60
    # Evaluation: every image once, so the very same figures and detections as one process found.
    reports = [json.loads((tmp_path / name / "report/report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["images"] == reports[1]["images"] == 4
    first, second = (
        (tmp_path / name / "metrics.csv").read_text().splitlines()[1].split(",") for name in ("one", "two")
    )
    assert [float(v) for v in first[:6]] == pytest.approx([float(v) for v in second[:6]], rel=1e-4)


def test_images_outside_of_the_data_are_trained_on_only_where_it_is_allowed(
    coco_folder: FolderFactory, tmp_path: Path
) -> None:
    data = coco_folder()
    (data / "train").rename(tmp_path / "private")
    listing = data / "annotations" / "instances_train.json"
    document = json.loads(listing.read_text())
    for image in document["images"]:
        image["file_name"] = str(tmp_path / "private" / image["file_name"])
    listing.write_text(json.dumps(document))
    settings: dict[str, Any] = {"iterations": 1, "evaluate_split": "none", "size_schedule": ((0, 64),)}
    with pytest.raises(RefineDetError, match="outside the folder of the data"):
        train(tiny(**settings), data, out=tmp_path / "run", init_weights="random", device="cpu")
    allowed = tiny(**settings, allow_outside=True)
    train(allowed, data, out=tmp_path / "run", init_weights="random", device="cpu")
    assert resume(tmp_path / "run", device="cpu").finished


def test_patience_ends_a_training_that_no_longer_gains(
    voc_folder: FolderFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = voc_folder(images=12)
    preset = tiny(iterations=12, evaluate_every=2, evaluate_limit=1, patience=2, ema_decay=None)

    def finds_nothing(model: RefineDet, dataset: DetectionDataset, indices: range, **_: Any) -> dict[int, Detections]:
        return {i: Detections.empty(model.class_names, (dataset[i].width, dataset[i].height)) for i in indices}

    # An mAP of 0 is the best at first; each 0 after it is no gain.
    monkeypatch.setattr(session, "collect_detections", finds_nothing)
    caplog.set_level("INFO")
    run = train(preset, data, out=tmp_path / "run", init_weights="random", device="cpu")
    assert run.finished
    assert run.report is not None
    assert run.report.images > 1, "the report is of all images, whatever the limit on the way"
    assert [row["iteration"] for row in rows(tmp_path / "run") if row["mAP"]] == ["2", "4", "6"]
    assert (tmp_path / "run/report/index.html").is_file()
    assert "2 evaluations without a new best figure: the training ends here (--patience)" in caplog.messages
    before = (tmp_path / "run/last.ckpt").read_bytes()
    resume(tmp_path / "run", device="cpu")
    assert "finished before, 6 of 12 iterations; nothing was changed" in caplog.messages[-1]
    assert (tmp_path / "run/last.ckpt").read_bytes() == before
    # More iterations begin to count anew.
    longer = resume(tmp_path / "run", iterations=16, device="cpu")
    assert longer.finished
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["iteration"] == 8 + 2


def test_patience_needs_something_to_measure(voc_folder: FolderFactory, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"patience must be 0 without evaluations on the way \(evaluate_every 0\), not 3"
    ):
        tiny(patience=3)
    preset = tiny(patience=3, evaluate_every=2, evaluate_split="none")
    with pytest.raises(UsageError, match="patience needs images to measure on"):
        train(preset, voc_folder(), out=tmp_path / "run", init_weights="random", device="cpu")
    assert not (tmp_path / "run").exists()
