from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError

NAMES = ("cat", "dog", "bird")


def some(**changes: object) -> Detections:
    values: dict[str, object] = {
        "boxes": [[10, 20, 110, 220], [0, 0, 50.5, 60.25], [5, 5, 6, 6]],
        "scores": [0.9, 0.5, 0.1],
        "labels": [1, 0, 1],
        "class_names": NAMES,
        "image_size": (640, 480),
        "source": "a.jpg",
    }
    return Detections(**{**values, **changes})  # type: ignore[arg-type]


def test_arrays_have_the_promised_types_and_are_copies() -> None:
    boxes = np.array([[1, 2, 3, 4]], dtype=np.float32)
    found = some(boxes=boxes, scores=[1], labels=[2])
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.boxes.shape == (1, 4)
    boxes[:] = 0
    assert found.boxes[0].tolist() == [1, 2, 3, 4]
    assert found.names == ["bird"]


def test_empty() -> None:
    nothing = Detections.empty(NAMES, (640, 480))
    assert len(nothing) == 0
    assert nothing.boxes.shape == (0, 4)
    assert nothing.names == []
    assert nothing.to_coco(1) == []
    assert nothing.table() == "nothing found"
    assert len(nothing.filter(threshold=0.5, top=3)) == 0
    assert len(some(boxes=[], scores=[], labels=[])) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.5]}, "3 boxes, 1 scores, 3 labels"),
        ({"labels": [0, 1, 3]}, "labels must lie in 0..2"),
        ({"labels": [0, 1, -1]}, "labels must lie in 0..2"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        some(**changes)


def test_filter() -> None:
    found = some()
    assert found.filter(threshold=0.5).scores.tolist() == [np.float32(0.9), 0.5]
    assert found.filter(labels=["dog"]).names == ["dog", "dog"]
    assert found.filter(labels=[0, "dog"], top=2).names == ["dog", "cat"]
    assert len(found.filter(labels=[])) == 0
    assert len(found.filter(top=0)) == 0
    assert len(found.filter()) == 3
    assert found.filter(top=1).source == "a.jpg"
    assert some(scores=[0.1, 0.5, 0.9]).filter(top=2).names == ["cat", "dog"]  # order kept, best kept


def test_threshold_keeps_equal_float32_scores() -> None:
    assert len(some(scores=[0.4, 0.3, 0.2]).filter(threshold=0.4)) == 1


def test_filter_refuses_unknown_classes() -> None:
    with pytest.raises(UsageError, match="unknown class 'dgo': did you mean 'dog'"):
        some().filter(labels=["dgo"])
    with pytest.raises(UsageError, match="unknown class 3: labels go from 0 to 2"):
        some().filter(labels=[3])
    with pytest.raises(UsageError, match="top must not be negative"):
        some().filter(top=-1)


def test_coco_form() -> None:
    first, second, _ = some().to_coco(7)
    assert first == {"image_id": 7, "category_id": 1, "bbox": [10.0, 20.0, 100.0, 200.0], "score": 0.9}
    assert second["bbox"] == [0.0, 0.0, 50.5, 60.25]
    assert [one["category_id"] for one in some().to_coco(7, category_ids=(3, 18, 90))] == [18, 3, 18]
    with pytest.raises(UsageError, match="2 category ids for 3 classes"):
        some().to_coco(7, category_ids=(3, 18))


@given(st.floats(0, 1, width=32), st.lists(st.floats(0, 1000, width=32), min_size=4, max_size=4))
def test_json_is_lossless(score: float, box: list[float]) -> None:
    found = Detections([box], [score], [0], NAMES, (10, 10))  # type: ignore[arg-type]
    values = json.loads(json.dumps(found.to_dict()))["detections"][0]
    assert np.float32(values["score"]) == found.scores[0]
    assert np.array(values["box"], np.float32).tolist() == found.boxes[0].tolist()


def test_dict_and_table() -> None:
    values = some().to_dict()
    assert (values["source"], values["width"], values["height"]) == ("a.jpg", 640, 480)
    assert values["detections"][0] == {"label": 1, "name": "dog", "score": 0.9, "box": [10.0, 20.0, 110.0, 220.0]}
    lines = some().table().splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["dog", "0.900", "10.0", "20.0", "110.0", "220.0"]
    assert repr(some()) == "Detections(2 dog, 1 cat in a.jpg of 640x480)"


def test_draw_returns_a_copy() -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    drawn = some().draw(image)
    assert drawn.shape == image.shape
    assert drawn.any()
    assert not image.any()


def test_supervision_absent_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UsageError, match=r"pip install 'refinedet\[supervision\]'"):
        some().to_supervision()


def test_supervision() -> None:
    supervision = pytest.importorskip("supervision")
    found = some().to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.xyxy.shape == (3, 4)
    assert list(found.data["class_name"]) == ["dog", "cat", "dog"]


# As in Python ------------------------------------------------------------------------------------------------------


def test_one_several_and_all() -> None:
    found = some()
    first = found[0]
    assert (first.name, first.label, first.box.tolist()) == ("dog", 1, [10, 20, 110, 220])
    assert first.score == pytest.approx(0.9)
    assert [one.name for one in found] == ["dog", "cat", "dog"] == found.names
    assert found[-1].score == found[np.int64(2)].score == pytest.approx(0.1)
    with pytest.raises(IndexError):
        found[3]
    assert found[:2].names == ["dog", "cat"]
    assert found[::-1].scores.tolist() == found.scores[::-1].tolist()
    assert found[found.labels == 1].names == ["dog", "dog"]
    assert found[[2, 0]].scores.tolist() == [np.float32(0.1), np.float32(0.9)]
    assert len(found[[]]) == len(found[[False] * 3]) == 0
    assert (found[:1].source, found[:1].image_size) == ("a.jpg", (640, 480))


@pytest.mark.parametrize("index", ["dog", (0, 9), [[0]], [0.5], [True, False], None])
def test_what_picks_nothing(index: Any) -> None:
    with pytest.raises((UsageError, IndexError)):
        some()[index]


def test_shapes_and_counts() -> None:
    found = some()
    assert found.xywh.tolist() == [[10, 20, 100, 200], [0, 0, 50.5, 60.25], [5, 5, 1, 1]]
    assert found.areas.tolist() == [20000, 50.5 * 60.25, 1]
    assert found.counts == {"dog": 2, "cat": 1}
    nothing = Detections.empty(NAMES, (640, 480))
    assert (nothing.xywh.shape, nothing.areas.shape, nothing.counts, list(nothing)) == ((0, 4), (0,), {}, [])


def test_addition() -> None:
    both = some() + some(scores=[0.8, 0.7, 0.6], source="b.jpg")
    assert both.names == ["dog", "cat", "dog"] * 2
    assert both.source is None
    assert (some() + some()).source == "a.jpg"
    for other in (some(image_size=(1, 1)), some(class_names=("a", "b", "c"))):
        with pytest.raises(UsageError, match="same classes in an image of the same size"):
            some() + other
    with pytest.raises(TypeError):
        some() + 3  # type: ignore[operator]


def test_filter_takes_one_class_and_checks() -> None:
    assert some().filter(labels="cat").names == ["cat"]  # not the classes "c", "a" and "t"
    assert some().filter(labels=1).names == ["dog", "dog"]
    assert some().filter(labels=np.int64(1)).names == ["dog", "dog"]
    assert some().filter(labels=("cat", 1)).names == ["dog", "cat", "dog"]
    for wrong in ({"threshold": 40}, {"threshold": "0.5"}, {"labels": [None]}, {"labels": [0.5]}):
        with pytest.raises(UsageError):
            some().filter(**wrong)  # type: ignore[arg-type]


def test_json_text_and_table_of_pandas() -> None:
    assert json.loads(some().to_json()) == some().to_dict()
    pandas = pytest.importorskip("pandas")
    frame = some().to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.columns.tolist() == ["name", "label", "score", "x1", "y1", "x2", "y2", "source"]
    assert frame[frame.name == "cat"].x2.tolist() == [50.5]
    assert len(Detections.empty(NAMES, (4, 4)).to_dataframe()) == 0


def test_pandas_absent_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        some().to_dataframe()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (640, 480), (9, 9, 9)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_drawing_reads_the_source_again(photo: Path) -> None:
    found = some(source=str(photo))
    drawn = found.draw()
    np.testing.assert_array_equal(drawn, found.draw(np.full((480, 640, 3), 9, np.uint8)))
    np.testing.assert_array_equal(drawn, found.draw(photo.read_bytes()))
    assert found.draw(labels=False).sum() < drawn.sum()
    assert found.draw(line_width=9, labels=False).sum() > 2 * found.draw(line_width=2, labels=False).sum() / 2
    with pytest.raises(UsageError, match="give the image"):
        some(source=None).draw()
    with pytest.raises(RefineDetError, match="the image is 640x480, but these detections were made in one of 64x48"):
        some(source=str(photo), image_size=(64, 48)).draw()
    photo.unlink()
    with pytest.raises(RefineDetError, match="no such image file"):
        found.draw()


def test_saving(photo: Path) -> None:
    found = some(source=str(photo))
    target = photo.with_name("out.jpg")
    assert found.save(target) == target
    assert found.save(str(target), line_width=5) == target  # ours: replaced
    with Image.open(target) as image:
        assert image.size == (640, 480)
    before = photo.read_bytes()
    for path, message in ((photo, "is an input"), (photo.with_name("a.txt"), r"JPEG or PNG")):
        with pytest.raises(UsageError, match=message):
            found.save(path)
    Image.new("RGB", (3, 3)).save(photo.with_name("other.png"))
    with pytest.raises(UsageError, match="was not written by this command"):
        found.save(photo.with_name("other.png"))
    assert photo.read_bytes() == before


def test_notebooks(photo: Path) -> None:
    found = some(source=str(photo), class_names=("cat", "<b>", "bird"))
    content = found._repr_png_()
    assert content is not None
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (640, 480)
    text = found._repr_html_()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "data:image/png;base64," in text
    assert some(source=None)._repr_png_() is None
    assert "<img" not in some(source="gone.jpg")._repr_html_()


def test_tracks_follow_their_detections() -> None:
    boxes, scores = [[0, 0, 9, 9], [1, 1, 5, 5], [2, 2, 8, 8]], [0.9, 0.5, 0.7]
    found = Detections(boxes, scores, [0, 1, 0], ("cat", "dog"), (10, 10), time=1.5, frame=36, track_ids=[4, -1, 7])  # type: ignore[arg-type]
    for fewer, tracks in ((found.filter(0.6), [4, 7]), (found[1:], [-1, 7]), (found.filter(top=1), [4])):
        assert fewer.track_ids is not None
        assert fewer.track_ids.tolist() == tracks
        assert (fewer.time, fewer.frame) == (1.5, 36)
    values = found.to_dict()
    assert (values["frame"], values["time"]) == (36, 1.5)
    assert [item["track"] for item in values["detections"]] == [4, -1, 7]
    assert "track" not in replace(found, track_ids=None).to_dict()["detections"][0]
    assert (found + found).track_ids is None
    with pytest.raises(UsageError, match="3 boxes, 2 track ids"):
        replace(found, track_ids=np.array([1, 2]))
    # Two objects of one class, and one that is not followed yet, in three colours; of one track it stays the same.
    image = np.zeros((200, 200, 3), np.uint8)
    drawn = replace(found, boxes=np.array(found.boxes * 20), image_size=(200, 200)).draw(image, labels=False)
    assert len({tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}) == 4
