"""Results to files and text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet.detections import Detections
from refinedet.errors import RefineDetError
from refinedet.files import encoded
from refinedet.outputs import DrawnCopies, coco_image_ids, coco_json, paragraph, predictions_json

DRAWN = np.zeros((4, 6, 3), np.uint8)


def some(source: str | None = "a.jpg") -> Detections:
    return Detections([[1, 2, 5, 8]], [0.5], [1], ("cat", "dog"), (20, 10), source)  # type: ignore[arg-type]


def test_each_original_has_its_own_copy(tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    copies = DrawnCopies(folder, ["x/a.jpg", "y/a.JPG", "a.tif"])
    names = ["x/a.jpg", "y/A.JPG", "a.tif", "https://e.com/b%20c.jpg?x=1", None, None, "/", "n" * 255 + ".jpg"]
    written = [copies.write(name, DRAWN).name for name in names]
    assert written == ["a.jpg", "A-2.jpg", "a.png", "b c.jpg", "image.png", "image-2.png", "image-3.png",
                       "n" * 200 + ".jpg"]  # fmt: skip
    assert copies.written == len(names)
    for name in written:
        with Image.open(folder / name) as image:
            assert image.size == (6, 4)
    # The same again replaces what was drawn, and nothing else.
    (folder / "b c.jpg").write_text("a user's file")
    again = DrawnCopies(folder, [])
    assert [again.write(name, DRAWN).name for name in names[:4]] == ["a.jpg", "A-2.jpg", "a.png", "b c-2.jpg"]
    assert (folder / "b c.jpg").read_text() == "a user's file"


def test_originals_links_and_pipes_stay(tmp_path: Path) -> None:
    original = tmp_path / "a.png"
    DrawnCopies(tmp_path, []).write("a.png", DRAWN)  # a copy of ours, which is now an original
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.png")
    before = original.read_bytes()
    copies = DrawnCopies(tmp_path, [original])
    assert [copies.write(name, DRAWN).name for name in ("a.png", "b.png", "c.png")] == ["a-2.png", "b-2.png", "c-2.png"]
    assert original.read_bytes() == before


def test_a_copy_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefineDetError, match=r"file/a\.jpg: cannot be saved"):
        DrawnCopies(tmp_path / "file", []).write("a.jpg", DRAWN)


def test_names_that_are_no_utf8_come_through(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (written := DrawnCopies(tmp_path, []).write(name, DRAWN)).stat()
    assert os.fsencode(written.name) == b"caf\xe9.png"
    text = predictions_json([some(name)], model="m", class_names=("cat", "dog"), threshold=None)
    assert os.fsencode(json.loads(encoded(text))["images"][0]["source"]) == b"caf\xe9.png"


def test_coco_ids_count_the_inputs() -> None:
    assert coco_image_ids(["x/000012.jpg", "7.png"]) == [12, 7]
    assert coco_image_ids(["12.jpg", "x/12.png"]) == [1, 2]
    assert coco_image_ids(["12.jpg", "b.png"]) == [1, 2]
    assert coco_image_ids(["9" * 5000 + ".jpg"]) == [1]
    assert coco_image_ids([]) == []
    (result,) = json.loads(coco_json([some()], [7], (3, 9)))
    assert result == {
        "image_id": 7, "category_id": 9, "bbox": [1.0, 2.0, 4.0, 6.0], "score": 0.5, "file_name": "a.jpg",
    }  # fmt: skip


def test_paragraph() -> None:
    assert paragraph(some()).splitlines()[0] == "a.jpg  20x10  1 object"
    assert "dog" in paragraph(some()).splitlines()[2]
    assert paragraph(Detections.empty(("cat",), (3, 4)), "b") == "b  3x4  0 objects"
    assert paragraph(some("https://b/a.jpg?sig=s3cret")).startswith("https://b/a.jpg?sig=***  20x10")
