"""Models on the hub and in a local folder of its layout, as the hub's own client reads it."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, scan_cache_dir, snapshot_download

from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.weights.hub import store_locally

CONFIG = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model() -> RefineDet:
    torch.manual_seed(0)
    model = RefineDet(CONFIG, ("cat", "dog|<b>"))
    model.metrics = {
        "mAP": 0.5034,
        "metric": "voc07",
        "data": "Pets",
        "split": "val",
        "images": 9,
        "command": "refinedet x",
    }
    model.card = "---\nlicense: mit\n---\n# old\n\n## Training\n\n7 iterations.\n\n## Use\n\nold use\n"
    return model


def test_what_is_pushed_is_what_is_loaded(model: RefineDet, tmp_path: Path, no_network: None) -> None:
    folder = Path(model.push_to_hub("me/pets", hub=tmp_path / "hub"))
    again = RefineDet.from_pretrained("hf:me/pets", hub=tmp_path / "hub")
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    for ours, theirs in zip(model.network.state_dict().values(), again.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    np.testing.assert_array_equal(again.predict(image, threshold=0).boxes, model.predict(image, threshold=0).boxes)
    assert (again.class_names, again.config, again.metrics) == (model.class_names, model.config, model.metrics)
    # The hub's own client finds it, whole and alone.
    assert Path(snapshot_download("me/pets", cache_dir=tmp_path / "hub", local_files_only=True)) == folder
    (repo,) = scan_cache_dir(tmp_path / "hub").repos
    assert (repo.repo_id, repo.repo_type, set(repo.refs)) == ("me/pets", "model", {"main"})
    (revision,) = repo.revisions
    assert {file.file_name for file in revision.files} == {"model.safetensors", "config.json", "README.md"}
    assert not scan_cache_dir(tmp_path / "hub").warnings


def test_the_environment_variable_of_the_client_is_enough(
    model: RefineDet, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.push_to_hub("hf:me/pets", hub=tmp_path / "hub")
    # The client reads its variables when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert RefineDet.from_pretrained("hf:me/pets").class_names == model.class_names


def test_the_card_is_one_that_the_hub_reads(model: RefineDet, tmp_path: Path) -> None:
    folder = Path(model.push_to_hub("me/pets", hub=tmp_path))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "refinedet",
        "object-detection",
        "mit",
    )
    (result,) = card.data.eval_results or []
    assert (result.metric_value, result.dataset_name, result.task_type) == (50.34, "Pets, val", "object-detection")
    text = str(card.text)
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Use", "Measured", "Training", "Intended use and limits", "Citation"]
    for part in (
        'from_pretrained("hf:me/pets")',
        "VOC 2007 11-point mAP 50.34 on Pets, val.",
        "7 iterations.",
        "64 x 64",
    ):
        assert part in text
    assert "old use" not in text
    assert "dog&#124;<b>" in text
    # What was measured and trained survives being loaded and pushed again; a licence that is given goes first.
    again = RefineDet.from_pretrained("hf:me/pets", hub=tmp_path)
    second = ModelCard.load(Path(again.push_to_hub("me/pets", hub=tmp_path, license="apache-2.0")) / "README.md")
    assert second.data.license == "apache-2.0"
    assert "7 iterations." in str(second.text)
    bare = RefineDet(CONFIG)
    text = (Path(bare.push_to_hub("me/bare", hub=tmp_path)) / "README.md").read_text()
    assert "Not evaluated." in text
    assert "model-index" not in text


def test_a_new_commit_leaves_the_earlier_one(model: RefineDet, tmp_path: Path) -> None:
    first = Path(model.push_to_hub("me/pets", hub=tmp_path))
    assert Path(model.push_to_hub("me/pets", hub=tmp_path)) == first
    before = (first / "model.safetensors").read_bytes()
    torch.manual_seed(1)
    second = Path(RefineDet(CONFIG).push_to_hub("me/pets", hub=tmp_path))
    assert second != first
    assert (first / "model.safetensors").read_bytes() == before
    assert RefineDet.from_pretrained("hf:me/pets", hub=tmp_path).class_names == ("class 0", "class 1")


def test_a_push_that_fails_leaves_the_model_that_was_there(
    model: RefineDet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.push_to_hub("me/pets", hub=tmp_path / "hub")
    (tmp_path / "new").mkdir()
    RefineDet(dataclasses.replace(CONFIG, num_classes=3)).save_pretrained(tmp_path / "new", card="x")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RefineDetError, match="cannot be written \\(disk full\\)"):
        store_locally(tmp_path / "new", "me/pets", tmp_path / "hub")
    monkeypatch.undo()
    assert RefineDet.from_pretrained("hf:me/pets", hub=tmp_path / "hub").class_names == model.class_names
    assert sorted(path.name for path in (tmp_path / "hub/models--me--pets").iterdir()) == ["refs", "snapshots"]


def test_refusals(model: RefineDet, tmp_path: Path, no_network: None) -> None:
    for name in ("pets", "a/b/c", "../x", "me/", "hf:"):
        with pytest.raises(UsageError, match="a model on the hub is written hf:owner/name"):
            model.push_to_hub(name, hub=tmp_path)
    with pytest.raises(UsageError, match="holds no model 'me/none' in the layout of the hub"):
        RefineDet.from_pretrained("hf:me/none", hub=tmp_path)
    folder = Path(model.push_to_hub("me/pets", hub=tmp_path))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RefineDetError, match="damaged"):
        RefineDet.from_pretrained("hf:me/pets", hub=tmp_path)


def test_uploading(model: RefineDet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's client is asked to do; there is no hub here."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class HfApi:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, hub_id: str, **settings: Any) -> None:
            calls.append((hub_id, settings))

        def upload_folder(self, **settings: Any) -> None:
            names = sorted(path.name for path in Path(settings["folder_path"]).iterdir())
            calls.append(("upload", {**settings, "names": names}))
            if settings["repo_id"] == "me/refused":
                raise OSError("secret-token is no good")

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    assert model.push_to_hub("me/pets", private=True, token="secret-token") == "https://huggingface.co/me/pets"
    assert calls[:2] == [("token", {"token": "secret-token"}), ("me/pets", {"private": True, "exist_ok": True})]
    assert calls[2][1]["names"] == ["README.md", "config.json", "model.safetensors"]
    with pytest.raises(RefineDetError, match=r"'me/refused' could not be uploaded \(OSError\)") as caught:
        model.push_to_hub("me/refused", token="secret-token")
    assert "secret-token" not in str(caught.value)
