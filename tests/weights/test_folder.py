"""The folder of a model: whole or not at all, and checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FullDisk
from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.weights import folder as folder_module
from refinedet.weights.store import previous_folder

CONFIG = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=4, tcb_batch_norm=True)
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def model() -> RefineDet:
    torch.manual_seed(0)
    return RefineDet(CONFIG, ("cat", "dog"), category_ids=(17, 3))


@pytest.fixture
def saved(model: RefineDet, tmp_path: Path) -> Path:
    return model.save_pretrained(tmp_path / "model", card="# a card")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(RefineDetError) as caught:
        RefineDet.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert len(message) < 600
    return message


# Reading -------------------------------------------------------------------------------------------------------------


def test_everything_comes_back(model: RefineDet, saved: Path) -> None:
    loaded = RefineDet.from_pretrained(saved)
    assert (loaded.config, loaded.class_names, loaded.category_ids) == (CONFIG, ("cat", "dog"), (17, 3))
    assert not loaded.network.training
    state = model.network.state_dict()
    for name, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype
    assert all(parameter.requires_grad for parameter in loaded.network.parameters())


def test_loading_takes_no_random_numbers(saved: Path) -> None:
    before = torch.get_rng_state()
    RefineDet.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_weights_do_not_change_with_the_file(saved: Path) -> None:
    loaded = RefineDet.from_pretrained(saved)
    before = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    with (saved / "model.safetensors").open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        size = stream.tell()
        stream.seek(size // 2)
        stream.write(bytes(size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.network.state_dict().items())


def test_frozen_stages_stay_frozen(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, frozen_stages=2)
    model = RefineDet(config, ("cat", "dog"))
    learned = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    loaded = RefineDet.from_pretrained(model.save_pretrained(tmp_path / "a"))
    assert {n for n, parameter in loaded.network.named_parameters() if parameter.requires_grad} == learned


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    generator = random.Random(0)
    for _ in range(40):
        bit = generator.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        refusal(saved)
    path.write_bytes(data)
    RefineDet.from_pretrained(saved)


def test_a_model_without_a_checksum_is_read(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    del content["sha256"], content["category_ids"]
    (saved / "config.json").write_text(json.dumps(content))
    assert RefineDet.from_pretrained(saved).category_ids is None


def test_weights_of_another_model_of_the_same_config(model: RefineDet, saved: Path, tmp_path: Path) -> None:
    other = RefineDet(CONFIG, ("cat", "dog")).save_pretrained(tmp_path / "other")
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert "damaged, or not the file that config.json belongs to" in refusal(saved)


def test_weights_with_a_number_that_is_not_finite(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["odm.0.logits.bias"][1] = float("nan")
    save_file(state, saved / "model.safetensors")
    edit(saved, sha256=None)
    assert "'odm.0.logits.bias' holds numbers that are not finite" in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": 7}, "class_names must be a list of names"),
        ({"class_names": "ab"}, "class_names must be a list of names"),
        ({"class_names": None}, "class_names must be a list of names"),
        ({"class_names": True}, "class_names must be a list of names"),
        ({"class_names": {"a": 1, "b": 2}}, "class_names must be a list of names"),
        ({"class_names": ["a", 5]}, "'5' is no string"),
        ({"class_names": ["a", ["b"]]}, "is no string"),
        ({"class_names": ["a", "b\nc"]}, "cannot be a class name"),
        ({"class_names": ["a", "\x1b[2J"]}, "cannot be a class name"),
        ({"class_names": ["a", "\ud800"]}, "cannot be a class name"),
        ({"class_names": ["a", " "]}, "cannot be a class name"),
        ({"class_names": ["a"]}, "1 class names for a model of 2 classes"),
        ({"category_ids": [1]}, "category_ids must hold a different number for each of 2 classes"),
        ({"category_ids": [4, 4]}, "category_ids must hold a different number"),
        ({"category_ids": [1, "2"]}, "category_ids must be a list of whole numbers"),
        ({"category_ids": [1, True]}, "category_ids must be a list of whole numbers"),
        ({"category_ids": 5}, "category_ids must be a list of whole numbers"),
        ({"metrics": "x"}, "metrics must be an object"),
        ({"metrics": [1]}, "metrics must be an object"),
        ({"untrained": "arm"}, "untrained must be a list"),
        ({"untrained": [1]}, "untrained must be a list"),
        ({"sha256": 5}, "sha256 must be"),
        ({"model": []}, "expected an object"),
        ({"model": None}, "expected an object"),
        ({"surprise\n": 1}, "unknown key"),
    ],
)
def test_wrong_kinds_in_the_config(saved: Path, changes: dict[str, Any], words: str) -> None:
    edit(saved, **changes)
    assert words in refusal(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"tcb_channels": 4000},
        {"num_classes": 300_000_000},
        {"aspect_ratios": [1.0 + n for n in range(20_000)]},
        {"image_size": [64, 6_400_000]},
        {"negative_threshold": 10**400},
        {"mean": [float("nan"), 0, 0]},
        {"backbone": []},
        {"backbone": {}},
        {"mean": []},
        {"fc6_dilation": 10**12, "backbone": "vgg16"},
        {"timm_name": "hf-hub:org/name", "backbone": "timm", "backbone_norm": "batch"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_the_weights_do_not_fit_is_refused_before_memory_is_taken(
    saved: Path, changes: dict[str, Any]
) -> None:
    content = json.loads((saved / "config.json").read_text())
    classes = changes.get("num_classes", 2)
    listed = ["a", "b"] if classes == 2 else ["a"]
    edit(saved, model={**content["model"], **changes}, class_names=listed, category_ids=None)
    refusal(saved)


def test_a_backbone_alone_says_so_when_it_predicts(
    model: RefineDet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import numpy as np

    alone = RefineDet(CONFIG, ("cat", "dog"))
    alone.untrained = ("arm", "tcb", "odm")
    loaded = RefineDet.from_pretrained(alone.save_pretrained(tmp_path / "a"))
    assert loaded.untrained == ("arm", "tcb", "odm")
    for _ in range(2):
        loaded.predict(np.zeros((64, 64, 3), np.uint8))
    assert caplog.text.count("this model's heads are untrained (arm, tcb, odm)") == 1


@pytest.mark.parametrize("ids", [(1,), (1, 1), ("a", "b")])
def test_category_ids_in_python(ids: Any) -> None:
    with pytest.raises(UsageError, match="category_ids"):
        RefineDet(CONFIG, ("cat", "dog"), category_ids=ids)


# Writing -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["one step", "two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system call that swaps two names, and without."""
    if not request.param:
        monkeypatch.setattr(folder_module, "_exchange", lambda *_: False)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(value: float, saved: Path) -> None:
    ruined = RefineDet(CONFIG, ("a", "b"))
    with torch.no_grad():
        ruined.network.state_dict()["arm.0.logits.bias"].view(-1)[1] = value
    with pytest.raises(RefineDetError, match=r"not saved: 'arm\.0\.logits\.bias' holds numbers that are not finite"):
        ruined.save_pretrained(saved)
    assert RefineDet.from_pretrained(saved).class_names == ("cat", "dog")


@pytest.mark.usefixtures("exchange")
def test_a_folder_is_replaced_and_what_else_is_in_it_stays(model: RefineDet, saved: Path) -> None:
    (saved / "notes").mkdir()
    (saved / "notes" / "mine.txt").write_text("mine")
    for name in ("figure.png", "config.json.bak", "my.part"):
        (saved / name).write_bytes(b"1")
    RefineDet(CONFIG, ("a", "b")).save_pretrained(saved)
    assert names(saved) == sorted([*FILES, "config.json.bak", "figure.png", "my.part", "notes"])
    assert (saved / "notes" / "mine.txt").read_text() == "mine"
    assert (saved / "README.md").read_text() == "# a card"
    assert RefineDet.from_pretrained(saved).class_names == ("a", "b")
    assert names(saved.parent) == ["model"]


def test_a_link_to_a_folder_is_followed(model: RefineDet, saved: Path) -> None:
    link = saved.parent / "link"
    link.symlink_to(saved)
    RefineDet(CONFIG, ("a", "b")).save_pretrained(link)
    assert link.is_symlink()
    assert RefineDet.from_pretrained(saved).class_names == ("a", "b")


def test_the_working_folder_itself(model: RefineDet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    RefineDet(CONFIG, ("a", "b")).save_pretrained(".")
    assert names(Path()) == FILES
    assert RefineDet.from_pretrained(".").class_names == ("a", "b")


def test_the_working_folder_was_removed(model: RefineDet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    model.save_pretrained(tmp_path / "kept")
    assert RefineDet.from_pretrained(tmp_path / "kept").class_names == model.class_names


def test_a_full_disk_leaves_the_previous_model(model: RefineDet, saved: Path, full_disk: FullDisk) -> None:
    other = RefineDet(CONFIG, ("a", "b"))
    with full_disk(1_000_000), pytest.raises(RefineDetError, match=r"model\.safetensors: cannot be saved"):
        other.save_pretrained(saved)
    assert RefineDet.from_pretrained(saved).class_names == ("cat", "dog")
    assert names(saved.parent) == ["model"]
    with full_disk(1_000_000), pytest.raises(RefineDetError, match="cannot be saved") as caught:
        other.save_pretrained(saved.parent / "new")
    assert ".part" not in str(caught.value)
    assert names(saved.parent) == ["model"]


def test_a_folder_beside_which_nothing_can_be_made_is_written_in_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.endswith(".part"):
            raise PermissionError(13, "Permission denied")
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    RefineDet(CONFIG, ("a", "b")).save_pretrained(saved)
    assert RefineDet.from_pretrained(saved).class_names == ("a", "b")
    with pytest.raises(RefineDetError, match="cannot be saved"):
        RefineDet(CONFIG, ("a", "b")).save_pretrained(saved.parent / "new")


class Killed(BaseException):
    """Nothing may run after it: stands for SIGKILL."""


@pytest.mark.parametrize("step", range(7))
@pytest.mark.usefixtures("exchange")
def test_whatever_step_a_kill_hits_one_whole_model_is_there(
    step: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename and each removal in turn is the last thing that happens."""
    (saved / "mine.txt").write_text("mine")
    new = RefineDet(CONFIG, ("a", "b"))
    calls = 0

    def counted(original: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return original(*arguments, **options)

        return run

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        try:
            new.save_pretrained(saved)
            whole = True
        except Killed:
            whole = False
    assert whole or calls == step + 1 or calls > step
    assert RefineDet.from_pretrained(saved).class_names in (("cat", "dog"), ("a", "b"))
    RefineDet(CONFIG, ("c", "d")).save_pretrained(saved, card="# new")
    assert RefineDet.from_pretrained(saved).class_names == ("c", "d")
    assert names(saved) == sorted([*FILES, "mine.txt"])
    assert names(saved.parent) == ["model"]


PROGRAM = """
import sys
from refinedet.detector import RefineDet
model = RefineDet.from_pretrained(sys.argv[1])
print("ready", flush=True)
while True:
    model.save_pretrained(sys.argv[1], card="# again")
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_model_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    expected = RefineDet.from_pretrained(saved).network.state_dict()
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(saved)], stdout=subprocess.PIPE, cwd=tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(generator.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        state = RefineDet.from_pretrained(saved).network.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    RefineDet.from_pretrained(saved).save_pretrained(saved)
    assert names(saved.parent) == ["model"]


def test_the_part_of_a_running_process_is_left_alone(model: RefineDet, saved: Path) -> None:
    running = saved.with_name(f".{saved.name}.{os.getppid()}.part")
    running.mkdir()
    model.save_pretrained(saved)
    assert running.is_dir()
    assert not previous_folder(saved).exists()
    assert folder_module.WEIGHTS_FILE in names(saved)
