"""Saving: whatever goes wrong, what was saved before is still there, whole."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import FullDisk
from refinedet import locks
from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import write_atomically
from refinedet.locks import lock_folder
from refinedet.training.run import RunFolder, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    state = {"iteration": 3, "network": {"w": torch.arange(4.0)}, "best": 0.5, "nothing": None}
    save_checkpoint(tmp_path / "deep/last.ckpt", state)
    loaded = load_checkpoint(tmp_path / "deep/last.ckpt")
    assert torch.equal(loaded["network"]["w"], state["network"]["w"])  # type: ignore[index]
    assert {k: v for k, v in loaded.items() if k != "network"} == {"iteration": 3, "best": 0.5, "nothing": None}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"iteration": 1, "network": {}})
    whole = path.read_bytes()
    with full_disk(100_000), pytest.raises(RefineDetError, match=r"last\.ckpt: cannot be saved \(.*untouched"):
        save_checkpoint(path, {"iteration": 2, "network": {"w": torch.zeros(1_000_000)}})
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"], "nothing half-written stays behind"


def test_a_full_disk_leaves_the_previous_weights(tmp_path: Path, full_disk: FullDisk) -> None:
    config = ModelConfig(backbone="resnet18", num_classes=1, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True)
    RefineDet(config).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    with full_disk(1_000_000), pytest.raises(RefineDetError, match=r"model\.safetensors: cannot be saved"):
        RefineDet(config).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    RefineDet.from_pretrained(tmp_path)


def test_a_full_disk_is_said_of_the_folder_that_a_model_was_to_be(tmp_path: Path, full_disk: FullDisk) -> None:
    config = ModelConfig(backbone="resnet18", num_classes=1, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True)
    with full_disk(1_000_000), pytest.raises(RefineDetError) as failed:
        RefineDet(config).save_pretrained(tmp_path / "last")
    assert str(failed.value).startswith(f"{tmp_path / 'last/model.safetensors'}: cannot be saved (disk full")
    assert list(tmp_path.iterdir()) == []


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    save_checkpoint(folder / "last.ckpt", {"iteration": 1, "network": {}})
    if os.geteuid() == 0:  # nothing is forbidden to root: refuse what a read-only folder would refuse
        monkeypatch.setattr(
            "tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
    else:
        folder.chmod(0o500)
    with pytest.raises(RefineDetError, match=r"last\.ckpt: cannot be saved \(Permission denied\); the previous file"):
        save_checkpoint(folder / "last.ckpt", {"iteration": 2, "network": {}})
    folder.chmod(0o700)
    assert load_checkpoint(folder / "last.ckpt")["iteration"] == 1


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(RefineDetError, match="cannot be saved"):
        save_checkpoint(tmp_path / "run/last.ckpt", {"iteration": 1, "network": {}})


def test_a_program_error_while_writing_is_no_user_error(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        write_atomically(tmp_path / "x", fail)
    assert not list(tmp_path.iterdir())


def test_saved_files_have_ordinary_rights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", {"iteration": 1, "network": {}})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RefineDetError, match="no checkpoint there"):
        load_checkpoint(tmp_path / "missing.ckpt")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(RefineDetError, match=r"empty\.ckpt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "empty.ckpt")


def state(number: int) -> dict[str, object]:
    return {"iteration": number, "network": {f"w{i}": torch.full((16,), float(number)) for i in range(4)}}


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, state(1))
    whole, rng = path.read_bytes(), random.Random(0)
    assert zipfile.ZipFile(path).testzip() is None
    assert torch.load(path, weights_only=True)["iteration"] == 1
    for position in [*rng.sample(range(len(whole)), 300), *range(len(whole) - 100, len(whole))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(RefineDetError, match=r"last\.ckpt: not a readable checkpoint"):
            load_checkpoint(path)


def test_the_last_two_checkpoints_are_kept_and_the_older_one_helps_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(1, 4):
        folder.save_checkpoint(state(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert folder.load_checkpoint()[0]["iteration"] == 3
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    again = RunFolder(tmp_path)
    found, warning = again.load_checkpoint()
    assert found["iteration"] == 2
    assert warning is not None
    assert "last.ckpt: not a readable checkpoint" in warning
    assert "going on from previous.ckpt, iteration 2" in warning
    again.save_checkpoint(state(3))  # the damaged one must not push out the only good one
    assert load_checkpoint(tmp_path / "previous.ckpt")["iteration"] == 2
    again.save_checkpoint(state(4))
    assert load_checkpoint(tmp_path / "previous.ckpt")["iteration"] == 3
    (tmp_path / "last.ckpt").unlink()
    assert RunFolder(tmp_path).load_checkpoint()[0]["iteration"] == 3
    (tmp_path / "previous.ckpt").write_bytes(b"damaged")
    with pytest.raises(RefineDetError, match=r"last\.ckpt: no checkpoint there"):
        RunFolder(tmp_path).load_checkpoint()


def test_without_hard_links_the_previous_checkpoint_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(state(1))
    folder.save_checkpoint(state(2))
    assert load_checkpoint(tmp_path / "previous.ckpt")["iteration"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


_SECOND = """
import sys
from pathlib import Path
from refinedet.training.run import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    pass
"""


def test_one_run_has_one_writer(tmp_path: Path) -> None:
    def second() -> str:
        command = [sys.executable, "-c", _SECOND, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ)).stderr

    with RunFolder(tmp_path / "run").lock():
        assert "another training is writing there" in second()
        with pytest.raises(UsageError, match="another training is writing there"), RunFolder(tmp_path / "run").lock():
            pytest.fail("two writers")
        # A loading process that outlives its trainer must not keep the folder.
        child = os.fork()
        if not child:
            os._exit(int(bool(locks._locks)))
        assert os.waitpid(child, 0)[1] == 0
    assert second() == ""
    assert list(tmp_path.iterdir()) == [], "what was made for the lock and stayed empty is gone"


def test_what_killed_trainings_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "best/config.json").write_text("best")
    for name in (".last.ckpt.abcdefgh.part", "best/.model.safetensors.abcdefgh.part"):
        (tmp_path / name).write_text("cut")
    # Under the lock of the run, the number of a process that lives is that of another program.
    for name in (".last.1234567.part", f".best.{os.getppid()}.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("cut")
        (tmp_path / name / ".model.safetensors.abcdefgh.part").write_text("cut")
    (tmp_path / ".last.previous").mkdir()
    (tmp_path / ".last.previous/config.json").write_text("last")  # killed between two renamings
    for name in (".hidden", "my.part", "notes.txt"):
        (tmp_path / name).write_text("mine")
    with folder.lock():
        folder.clear()
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == [".hidden", "best", "best/config.json", "last", "last/config.json", "my.part", "notes.txt"]
    assert (tmp_path / "last/config.json").read_text() == "last"


def test_a_refused_call_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refused"), lock_folder(tmp_path / "a/b/run", "training"):
        raise UsageError("refused")
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path / "a/b", "training"):
        (tmp_path / "a/notes.txt").write_text("mine")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]
    (tmp_path / "own").mkdir()
    with lock_folder(tmp_path / "own", "training"):
        pass
    assert (tmp_path / "own").is_dir(), "a folder that was there before stays"
