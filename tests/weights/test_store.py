"""Weight files of every kind: found, read, and refused by their headers."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from refinedet.config import ModelConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.weights import store
from refinedet.weights.store import find_model, is_finite, network_shell, open_weights, refuse_occupied

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refusal(path: Path, *, read: bool = False) -> str:
    def act() -> None:
        file = open_weights(path)
        if read:
            file.read()

    with pytest.raises(RefineDetError) as caught:
        act()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.pth.tar", "pytorch_model.bin", "w.safetensors", "without_ending"])
@pytest.mark.parametrize("inside", [None, "state_dict", "model", "model_state_dict"])
def test_every_name_and_every_wrapping_reads_alike(tmp_path: Path, name: str, inside: str | None) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(STATE, path)
    else:
        saved(path, STATE if inside is None else {"epoch": 3, inside: STATE})
    file = open_weights(path)
    assert {key: (tensor.shape, tensor.device.type) for key, tensor in file.header.items()} == {
        "a.weight": (torch.Size([2, 3]), "meta"),
        "b": (torch.Size([4]), "meta"),
    }
    for key, tensor in file.read().items():
        assert torch.equal(tensor, STATE[key])


@pytest.mark.parametrize("zipped", [True, False])
def test_both_forms_of_torch_and_the_prefix_of_data_parallel(tmp_path: Path, zipped: bool) -> None:
    state = {f"module.{key}": value.half() for key, value in STATE.items()}
    path = saved(tmp_path / "a.pth", state, _use_new_zipfile_serialization=zipped)
    assert list(open_weights(path).header) == list(STATE)
    assert torch.equal(open_weights(path).read()["a.weight"], STATE["a.weight"].half())


def test_two_names_for_one_tensor_and_a_cut_of_a_tensor_are_fine(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    path = saved(tmp_path / "a.pth", {"a": whole, "b": whole, "c": whole[10:20]})
    assert torch.equal(open_weights(path).read()["c"], whole[10:20])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_number_that_is_not_finite(tmp_path: Path, number: float, kind: torch.dtype) -> None:
    tensor = torch.zeros(5, 7, dtype=kind)
    assert is_finite(tensor)
    tensor[3, 4] = number
    assert not is_finite(tensor)
    message = refusal(saved(tmp_path / "a.pth", {"x": torch.zeros(2), "y": tensor}), read=True)
    assert "'y' holds numbers that are not finite" in message


def stride_0() -> Tensor:
    return torch.zeros(1).expand(10**6, 10**5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (stride_0, "not as many numbers in the file"),
        (lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.zeros(2, dtype=torch.uint32), "uint32"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "complex64"),
        (lambda: torch.zeros(2, dtype=torch.bool), "bool"),
        (lambda: torch.zeros(3, 3).to_sparse(), ""),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), ""),
        (lambda: torch.zeros(2, device="meta"), "no numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers(tmp_path: Path, make: Callable[[], Tensor], words: str) -> None:
    message = refusal(saved(tmp_path / "a.pth", {"fine": torch.zeros(3), "odd": make()}), read=True)
    assert words in message
    assert "not a plain tensor" in message or "not a readable file" in message or "'odd'" in message


def test_a_tensor_that_is_a_number_is_read(tmp_path: Path) -> None:
    assert open_weights(saved(tmp_path / "a.pth", {"n": torch.tensor(3.0)})).header["n"].shape == ()


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"x": torch.zeros(2_000_000)})
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    path.write_bytes(packed.getvalue())
    assert path.stat().st_size < 100_000
    assert "a compressed archive, which torch.save does not write" in refusal(path)


def test_a_header_that_promises_more_than_the_file_has(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert "not a readable safetensors file" in refusal(path)


def test_other_number_types_of_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    assert "'x' holds numbers of type U8, which weights do not have" in refusal(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "b.safetensors")
    assert "no tensors in it" in refusal(tmp_path / "b.safetensors")


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    for number, content in enumerate(([1, 2], {}, {"state_dict": {}}, 3)):
        assert "no state dict" in refusal(saved(tmp_path / f"{number}.pth", content))
    assert "'epoch' is no tensor" in refusal(saved(tmp_path / "x.pth", {"epoch": 1}))
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"x": object}))
    assert "pickled object, which is never run" in refusal(tmp_path / "y.pth")
    assert "cannot be read" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "absent")
    with pytest.raises(UsageError, match="NUL"):
        open_weights(tmp_path / "n\0ul")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    file = open_weights(saved(tmp_path / "a.pth", STATE))
    saved(tmp_path / "a.pth", {"a.weight": torch.zeros(7), "b": torch.ones(4)})
    with pytest.raises(RefineDetError, match="the file was changed while it was read"):
        file.read()


# Finding -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_only_what_begins_with_hf_reaches_the_hub(
    no_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "org/name", "./a/b", "a/b/c", "hf:", "hf:name", "hf:a/b/c", "hf:../x", "~/x", "a", ""):
        with pytest.raises(UsageError) as caught:
            find_model(name)
        assert "\n" not in str(caught.value)
    assert no_hub == []
    with pytest.raises(UsageError, match=r"if it is a model on the Hugging Face hub, write hf:org/name"):
        find_model("org/name")
    with pytest.raises(RefineDetError, match=r"'org/name' could not be downloaded from the hub"):
        find_model("hf:org/name")
    assert no_hub == ["org/name"]


def test_a_run_folder_stands_for_its_best_model_then_its_last(tmp_path: Path) -> None:
    for name in ("last", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        assert find_model(tmp_path) == tmp_path / name


def test_a_model_under_the_name_that_a_kill_left_is_found(tmp_path: Path) -> None:
    left = store.previous_folder(tmp_path / "run" / "best")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"")
    assert find_model(tmp_path / "run") == left
    assert find_model(tmp_path / "run" / "best") == left


@pytest.mark.parametrize("name", ["model.safetensors", "last.ckpt", "best/model.safetensors", "last/model.safetensors"])
def test_what_must_not_be_written_over(tmp_path: Path, name: str) -> None:
    refuse_occupied(tmp_path)
    refuse_occupied(tmp_path / "absent")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds a (model|run) already; choose another --out"):
        refuse_occupied(tmp_path)


# Networks without numbers --------------------------------------------------------------------------------------------


def test_a_shell_takes_no_memory_and_no_random_numbers() -> None:
    before = torch.get_rng_state()
    shell = network_shell(ModelConfig(num_classes=1000, tcb_channels=1024))
    assert all(tensor.is_meta for tensor in shell.state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["hf-hub:org/name", "hf_hub:org/name", "local-dir:/tmp", "org/name", "http://x/y"])
def test_a_timm_name_never_reaches_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    with pytest.raises(UsageError, match="timm has no model"):
        network_shell(ModelConfig(backbone="timm", timm_name=name))
