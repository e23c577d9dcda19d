"""``refinedet predict`` with videos: what goes into which file, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refinedet import cli
from refinedet.cli.flags import Videos
from refinedet.errors import UsageError

pytest.importorskip("av")
from clips import decoded, number_of, rtsp_server, sound_packets, write_clip

Refused = Callable[..., str]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_clip(path, 12, sound="aac", size=(320, 192), options={"movflags": "faststart"})
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_a_drawn_video_and_its_lines(
    stub: Any, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = clip.read_bytes()
    out, result = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    arguments = ["predict", "stub", str(clip), "--save", str(out), "--jsonl", str(result), "--batch-size", "5"]
    for _ in range(2):
        assert cli.main(arguments) == 0
    assert clip.read_bytes() == before
    assert stub.batches == [5, 5, 2] * 2
    rows = lines(result)
    assert [row["frame"] for row in rows] == list(range(12))
    assert [row["time"] for row in rows] == pytest.approx([number / 10 for number in range(12)])
    assert rows[3] == {
        "source": str(clip), "frame": 3, "time": 0.3, "width": 320, "height": 192,
        "detections": [{"label": 1, "name": "dog", "score": 0.75, "box": [0.0, 0.0, 160.0, 192.0]}],
    }  # fmt: skip
    drawn = decoded(out)
    assert [number_of(pixels) for _, pixels in drawn] != []
    assert [time for time, _ in drawn] == pytest.approx([number / 10 for number in range(12)])
    # The box of the left half has its right edge in the middle, in the colour of the class.
    original = decoded(clip)[0][1]
    changed = abs(drawn[0][1].astype(int) - original).sum(axis=2) > 60
    assert changed[40:180, 156:160].mean() > 0.4
    assert not changed[40:, 170:].any()
    assert sound_packets(out) == sound_packets(clip)
    output = capsys.readouterr()
    assert f"{clip}  0:00:00.300  1 dog\n" in output.out
    assert f"drawn: {out}\njsonl: {result}\n" in output.out
    assert output.err == ""


def test_part_of_a_video_beside_images(
    stub: Any, clip: Path, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "r.json"
    image = photo("a.png")
    flags = ["--every", "3", "--start", "0:0.2", "--end", "1", "--quiet"]
    call = ["predict", "stub", str(image), str(clip), "--save", str(tmp_path / "drawn"), "--json", str(result)]
    assert cli.main([*call, *flags]) == 0
    images = json.loads(result.read_text())["images"]
    assert [item.get("time") for item in images] == [None, 0.2, 0.5, 0.8]
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["a.png", "clip.mp4"]
    assert [time for time, _ in decoded(tmp_path / "drawn" / "clip.mp4")] == pytest.approx([0, 0.3, 0.6], abs=1e-3)


def test_a_video_that_breaks_off(stub: Any, clip: Path, tmp_path: Path, refused: Refused) -> None:
    write_clip(clip, 100, options={"movflags": "faststart"})
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    call = ["predict", "stub", clip, "--save", tmp_path / "out.mp4", "--jsonl", tmp_path / "r.jsonl", "--quiet"]
    assert "clip.mp4: is cut off after" in refused(call, 1)
    rows = lines(tmp_path / "r.jsonl")
    assert len(rows) > 20
    assert set(rows[-1]) == {"source", "error"}
    assert len(decoded(tmp_path / "out.mp4")) == len(rows) - 1


def test_a_stop_keeps_a_playable_video(
    stub: Any, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = stub.predict_arrays

    def interrupted(images: list[Any], **settings: Any) -> Any:
        if len(stub.batches) == 2:
            raise KeyboardInterrupt
        return predict(images, **settings)

    monkeypatch.setattr(stub, "predict_arrays", interrupted)
    call = ["predict", "stub", str(clip), "--save", str(tmp_path / "out.mkv"), "--batch-size", "4", "--quiet"]
    assert cli.main(call) == 130
    assert "interrupted: 8 of an unknown number of images and frames were done" in capsys.readouterr().err
    assert len(decoded(tmp_path / "out.mkv")) == 8


def test_streams(stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rtsp_server(5) as address:
        call = ["predict", "stub", address, "--save", str(tmp_path / "out"), "--jsonl", str(tmp_path / "r.jsonl")]
        assert cli.main(call) == 0
    assert "secret" not in (tmp_path / "r.jsonl").read_text() + capsys.readouterr().out
    assert len(decoded(tmp_path / "out" / "stream.mp4")) == len(lines(tmp_path / "r.jsonl")) > 0


def test_what_is_refused(
    stub: Any, clip: Path, photo: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:  # fmt: skip
    image = photo("a.png")
    for arguments, message in (
        ([image, "--every", "2"], "--every is for videos, and none of the sources is one"),
        ([clip, "--every", "0"], "--every must be at least 1"),
        ([clip, "--start", "soon"], "--start must be seconds or [hours:]minutes:seconds"),
        ([clip, "--start", "5", "--end", "4"], "end must be later than start"),
        ([clip, "--save-labels", "voc"], "--save-labels is for images"),
        ([clip, "--rank", tmp_path / "r.csv"], "--rank is for images"),
        ([clip, "--json", tmp_path / "r.json", "--json-format", "coco"], "--json-format coco is for images"),
        (["rtsp://127.0.0.1/x", "--json", tmp_path / "r.json"], "use --jsonl for a stream or camera"),
        ([image, clip, "--save", tmp_path / "out.mp4"], "is the name of a video; give a folder"),
        ([image, "--save", tmp_path / "out.mp4"], "is the name of a video; give a folder"),
        ([clip, "--save", clip], "is an input of this command"),
        ([tmp_path / "none.mp4"], "none.mp4: no such file or folder"),
    ):
        assert message in refused(["predict", "stub", *arguments])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "clip.mp4"]


def test_times() -> None:
    for text, seconds in (("90", 90), ("1:30", 90), ("1:00:00.5", 3600.5)):
        video = Videos(start=text).of("clip.mp4")
        assert video is not None
        assert video.start == seconds
    for text in ("-1", "1:2:3:4", "", "nan", "1e3"):
        with pytest.raises(UsageError, match="--start must be seconds"):
            Videos(start=text).of("clip.mp4")
    assert Videos().of("http://camera/stream") is None
    video = Videos(video=True, every=2).of("http://camera/stream")
    assert video is not None
    assert video.every == 2


def test_objects_are_numbered(stub: Any, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackers")
    result = tmp_path / "r.jsonl"
    call = ["predict", "stub", str(clip), "--track", "--jsonl", str(result), "--save", str(tmp_path / "out.mp4")]
    assert cli.main(call) == 0
    tracks = [[item["track"] for item in row["detections"]] for row in lines(result)]
    assert tracks == [[-1], *[[1]] * 11]
    assert "0:00:00.300  1 dog  (tracks 1)\n" in capsys.readouterr().out


def test_tracking_without_its_package(stub: Any, clip: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    assert "pip install 'refinedet[track]'" in refused(["predict", "stub", clip, "--track"])
    monkeypatch.setitem(sys.modules, "av", None)
    assert "clip.mp4: videos need PyAV: pip install 'refinedet[video]'" in refused(["predict", "stub", clip])
