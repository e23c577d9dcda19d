"""Saving: whatever goes wrong, what was saved before is still there, whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from conftest import FullDisk
from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError
from refinedet.files import write_atomically
from refinedet.training.run import load_checkpoint, save_checkpoint


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
