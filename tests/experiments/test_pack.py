"""Packing for a machine that takes only so much at a time: what comes out there is what went in here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import FolderFactory
from experiments import pack
from refinedet.config import ModelConfig
from refinedet.data.layouts import open_dataset
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError


def deliver(source: Path, folder: Path, *names: str) -> Path:
    """A folder with the manifest and only these parts."""
    folder.mkdir()
    for name in (pack.MANIFEST_FILE, *names):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_what_is_packed_comes_out_after_several_deliveries(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=6, size=(200, 100), name="VOCdevkit/VOC2007")
    weights = tmp_path / "some.safetensors"
    weights.write_bytes(bytes(range(256)) * 40)
    said = pack.make(
        tmp_path / "packed", data=data.parent, weights=[weights], max_side=100, part_bytes=5_000
    )  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "packed").glob("*.zip.*"))
    assert "6 photos" in said
    assert len(names) > 2
    assert all((tmp_path / "packed" / name).stat().st_size <= 5_000 for name in names)

    there = tmp_path / "there"
    first = deliver(tmp_path / "packed", tmp_path / "first", *names[:2])
    assert pack.store(first, there) == names[2:]
    assert not (there / "VOCdevkit").exists()
    rest = deliver(tmp_path / "packed", tmp_path / "rest", *names[2:])
    assert pack.store(rest, there) == []
    assert pack.store(rest, there) == [], "a second time does no harm"

    assert (there / "weights" / weights.name).read_bytes() == weights.read_bytes()
    assert "quality 70, at most 100 pixels" in pack.pack_note(there / "VOCdevkit")
    for split in ("train", "val", "trainval"):
        before, after = open_dataset(data, split), open_dataset(there / "VOCdevkit", split)
        assert [record.image_id for record in after.records] == [record.image_id for record in before.records]
        assert not after.problems
        for old, new in zip(before.records, after.records, strict=True):
            assert (new.width, new.height) == (100, 50)
            np.testing.assert_allclose(new.boxes, old.boxes / 2, atol=1e-3)
            np.testing.assert_array_equal(new.difficult, old.difficult)
            assert [after.class_names[i] for i in new.labels] == [before.class_names[i] for i in old.labels]
        pixels, original = after.load_image(0).astype(float), before.load_image(0)[::2, ::2].astype(float)
        assert abs(pixels.mean() - original.mean()) < 3


def test_a_damaged_part_is_named_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    pack.make(tmp_path / "packed", weights=[tmp_path / "file"], part_bytes=120)
    part = tmp_path / "packed/pack.zip.001"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(RefineDetError, match=r"pack\.zip\.001: not the part that was cut.*bring it again"):
        pack.store(tmp_path / "packed", tmp_path / "there")
    part.unlink()
    assert pack.store(tmp_path / "packed", tmp_path / "there") == ["pack.zip.001"]
    with pytest.raises(RefineDetError, match=r"pack\.zip\.001: cannot be read"):
        pack.join(tmp_path / "packed")


def test_a_model_comes_home_in_parts(tmp_path: Path) -> None:
    model = RefineDet(ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8))
    manifest = pack.write_weights(model, tmp_path / "home", part_bytes=8 << 20)
    assert len(manifest.parts) > 1
    assert pack.join(tmp_path / "home").name == "model.safetensors"
    loaded = RefineDet.from_pretrained(tmp_path / "home")
    for name, value in model.network.state_dict().items():
        # Kernels travel as float16; everything else as it is.
        atol = 1e-3 * float(value.abs().max()) if value.ndim == 4 else 0.0
        np.testing.assert_allclose(loaded.network.state_dict()[name].numpy(), value.numpy(), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to pack: give --data"),
        (["--weights", "nowhere.safetensors"], r"nowhere\.safetensors: no such file"),
        (["--data", "."], "expected one VOC folder"),
    ],
)
def test_bad_calls_are_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        pack.main(["make", "--out", str(tmp_path / "packed"), *arguments])


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefineDetError, match=r"manifest\.json: cannot be read"):
        pack.main(["store", str(tmp_path), "--to", str(tmp_path / "there")])
