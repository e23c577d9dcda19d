"""Parts are whole, hold what was found to the last bit, and belong to one model and threshold."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import FullDisk
from refinedet import Detections, read_batch
from refinedet.bulk import parts
from refinedet.bulk.parts import SCHEMA, Manifest, PartFolder, failed_row, found_row, read_part, table_of
from refinedet.errors import RefineDetError, UsageError

NAMES = ("cat", "dog")
MANIFEST = Manifest("model", "abc" * 10, 0.4, NAMES)


def found(path: str, count: int = 2) -> Detections:
    rng = np.random.default_rng(len(path))
    boxes = np.sort(rng.random((count, 4), dtype=np.float32) * 90, axis=1)
    scores = rng.random(count, dtype=np.float32)
    return Detections(boxes, scores, np.arange(count) % 2, NAMES, (100, 90), path)


def rows(*paths: str) -> Any:
    return table_of([found_row(found(path), "m") for path in paths])


def test_rows_keep_every_bit(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path / "out")
    folder.check(MANIFEST)
    (tmp_path / "out").mkdir()
    assert folder.start(MANIFEST) == set()
    odd = os.fsdecode(b"/a/\xff.jpg")  # a file name that is not UTF-8
    folder.add(table_of([found_row(found("/a/1.jpg"), "m"), failed_row(odd, f"{odd}: no image", "m")]))
    folder.add(table_of([found_row(found("/a/22.jpg", 0), "m")]))
    folder.close(complete=True)
    (part,) = folder.parts()
    table = pq.read_table(part)
    assert table.schema == SCHEMA
    assert table["path"].to_pylist() == ["/a/1.jpg", r"/a/\udcff.jpg", "/a/22.jpg"]
    assert table["names"].to_pylist() == [["cat", "dog"], [], []]
    assert table["error"].to_pylist() == [None, r"/a/\udcff.jpg: no image", None]
    assert table["width"].to_pylist() == [100, None, 100]
    back = list(read_batch(tmp_path / "out"))
    assert [(item.source, item.image_size, item.class_names) for item in back] == [
        ("/a/1.jpg", (100, 90), NAMES), ("/a/22.jpg", (100, 90), NAMES)
    ]  # fmt: skip
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(back[0], name), getattr(found("/a/1.jpg"), name))
    assert folder.manifest() == replace(MANIFEST, images=3, failed=1, complete=True)


def test_parts_are_cut_by_rows_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PartFolder(tmp_path, rows_per_part=3)
    folder.start(MANIFEST)
    for index in range(3):
        folder.add(rows(f"{index}a", f"{index}b"))
    assert [len(read_part(part)) for part in folder.parts()] == [4]
    assert (folder.images, folder.done) == (4, 6)
    monkeypatch.setattr(parts, "SECONDS_PER_PART", 0.0)
    folder.add(rows("z"))
    assert [len(read_part(part)) for part in folder.parts()] == [4, 3]
    again = PartFolder(tmp_path)
    assert again.start(MANIFEST) == {"0a", "0b", "1a", "1b", "2a", "2b", "z"}
    again.add(rows("y"))
    again.close(complete=False)
    assert [part.name for part in again.parts()] == [f"part-0000{index}.parquet" for index in range(3)]
    assert (again.images, again.manifest().images, again.manifest().complete) == (8, 8, False)


def test_other_models_thresholds_and_files_are_kept_out(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    folder.check(MANIFEST)
    folder.start(MANIFEST)
    folder.check(replace(MANIFEST, model="other name of the same"))
    with pytest.raises(UsageError, match=r"another model \(model, digest abcabcabcabc, not b, digest xyz\)"):
        folder.check(replace(MANIFEST, model="b", model_digest="xyz"))
    with pytest.raises(UsageError, match=r"--threshold 0\.4, not 0\.5"):
        folder.check(replace(MANIFEST, threshold=0.5))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_text("")
    with pytest.raises(UsageError, match="holds no batch prediction"):
        PartFolder(tmp_path / "photos").check(MANIFEST)
    with pytest.raises(UsageError, match="holds no batch prediction"):
        next(read_batch(tmp_path / "photos"))
    with pytest.raises(RefineDetError, match=r"a\.jpg"):
        PartFolder(tmp_path / "photos/a.jpg/out").check(MANIFEST)


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".part-00000.parquet.abcdefgh.part"
    left.write_bytes(b"PAR1 half")
    folder = PartFolder(tmp_path)
    folder.check(MANIFEST)
    assert folder.start(MANIFEST) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["_manifest.json"]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    folder.start(MANIFEST)
    folder.add(rows("a"))
    folder.close(complete=True)
    (part,) = folder.parts()
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(RefineDetError, match=r"part-00000\.parquet: not a readable part .*remove it") as raised:
        PartFolder(tmp_path).start(MANIFEST)
    assert "\n" not in str(raised.value)


def test_a_full_disk_costs_one_part(tmp_path: Path, full_disk: FullDisk) -> None:
    folder = PartFolder(tmp_path, rows_per_part=1)
    folder.start(MANIFEST)
    folder.add(rows("a"))
    with full_disk(2000), pytest.raises(RefineDetError, match="disk full"):
        folder.add(rows(*(f"b{index}" for index in range(100))))
    folder.close(complete=False)
    assert folder.manifest().images == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_manifest.json", "part-00000.parquet"]
    assert PartFolder(tmp_path).start(MANIFEST) == {"a"}
