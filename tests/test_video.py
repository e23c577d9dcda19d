"""Frames of videos: which come, when, in how much memory, and what happens where a video breaks off."""

from __future__ import annotations

import functools
import http.server
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinedet import sources, video
from refinedet.errors import RefineDetError, UsageError
from refinedet.prediction import predict_ahead, predict_all
from refinedet.video import Frame, Video, as_video

pytest.importorskip("av")
from clips import COLOURS, number_of, picture, rtsp_server, write_clip
from test_prediction import Brightness

UNEVEN = [0.0, 0.04, 0.3, 0.35, 0.9, 1.0, 1.01, 1.5, 2.0, 2.9]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_clip(tmp_path / "clip.mp4", UNEVEN)
    return tmp_path / "clip.mp4"


def test_frames_come_in_order_with_their_own_times(clip: Path) -> None:
    frames = list(Video(clip).frames())
    assert [number_of(frame.pixels) for frame in frames] == [frame.number for frame in frames] == list(range(10))
    assert [frame.time for frame in frames] == pytest.approx(UNEVEN, abs=1e-3)
    for index, colour in enumerate(COLOURS):
        np.testing.assert_allclose(frames[0].pixels[80, 20 + 40 * index], colour, atol=4)
    assert Video(clip).length() in (10, 11)


@pytest.mark.parametrize(
    ("every", "start", "end", "expected"),
    [
        (1, 0.3, None, [2, 3, 4, 5, 6, 7, 8, 9]),
        (1, 0.31, 1.0, [3, 4]),
        (3, 0, None, [0, 3, 6, 9]),
        (2, 0.9, 2.0, [4, 6]),
        (1, 50, None, []),
    ],
)
def test_which_frames_are_taken(
    clip: Path, every: int, start: float, end: float | None, expected: list[int]
) -> None:  # fmt: skip
    frames = list(Video(clip, every=every, start=start, end=end).frames())
    assert [number_of(frame.pixels) for frame in frames] == expected
    assert [frame.time for frame in frames] == pytest.approx([UNEVEN[number] for number in expected], abs=1e-3)
    assert [frame.number for frame in frames] == list(range(0, every * len(expected), every))


@pytest.mark.parametrize("ending", ["mkv", "mov", "avi", "ts"])
def test_other_formats_begin_at_zero_too(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"clip.{ending}"
    write_clip(path, 12, codec="mpeg4" if ending == "avi" else "libx264")
    frames = list(Video(path, start=0.45).frames())
    assert [number_of(frame.pixels) for frame in frames] == list(range(5, 12))
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(5, 12)], abs=0.002)


def test_what_a_telephone_turned_is_upright(tmp_path: Path) -> None:
    for rotation, quarters in ((90, 1), (180, 2), (-90, 3)):
        path = tmp_path / f"{quarters}.mp4"
        write_clip(path, 1, rotation=rotation)
        (frame,) = Video(path).frames()
        np.testing.assert_allclose(frame.pixels.astype(int), np.rot90(picture(0), quarters), atol=60)
        assert np.abs(frame.pixels.astype(int) - np.rot90(picture(0), quarters)).mean() < 4


def test_batches_hold_what_frames_give(clip: Path) -> None:
    batches = list(Video(clip).batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    expected = Video(clip).frames()
    for frame, other in zip(itertools.chain(*batches), expected, strict=True):
        np.testing.assert_array_equal(frame.pixels, other.pixels)
    # Frames of 15,360 pixels, of which three may wait.
    assert [len(batch) for batch in Video(clip).batches(4, pixels_ahead=50_000)] == [3, 3, 3, 1]
    assert [len(batch) for batch in Video(clip).batches(4, pixels_ahead=1)] == [1] * 10


class Endless:
    """Instead of ``Video.frames``: frames that never end, and how many there were."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = threading.Event()

    def __call__(self, **_: object) -> Iterator[Frame]:
        try:
            while True:
                self.made += 1
                yield Frame(np.zeros((2, 2, 3), np.uint8), float(self.made), self.made)
        finally:
            self.closed.set()


def test_decoding_waits_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Endless()
    monkeypatch.setattr(Video, "frames", lambda self, **settings: endless(**settings))
    batches = Video("clip.mp4").batches(5)
    taken = 0
    for _ in range(4):
        taken += len(next(batches))
        assert endless.made <= taken + 5 + 1  # a full buffer, and one frame that waits for room
    assert taken == 20
    batches.close()
    assert endless.closed.wait(10)
    assert "decode-video" not in [thread.name for thread in threading.enumerate()]


def test_of_a_stream_the_newest_frames_come(monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()

    def frames(self: Video, **_: object) -> Iterator[Frame]:
        for number in range(50):
            yield Frame(np.zeros((2, 2, 3), np.uint8), number / 10, number)
        made.set()

    monkeypatch.setattr(Video, "frames", frames)
    batches = Video("rtsp://camera/1").batches(3)
    thread = threading.Thread(target=lambda: made.wait(10))
    thread.start()
    first = next(batches)
    thread.join()  # all frames are there while the caller works on the first batch
    assert first[0].number < 50
    rest = [frame.number for batch in batches for frame in batch]
    assert len(first) <= 3
    assert len(rest) <= 3
    assert ([frame.number for frame in first] + rest)[-1] == 49


def broken(path: Path, kind: str) -> Path:
    content = path.read_bytes()
    half = len(content) // 2
    if kind == "cut":
        content = content[:half]
    elif kind == "hole":
        content = content[:half] + bytes(len(content) // 8) + content[half + len(content) // 8 :]
    elif kind == "text":
        content = b"not a video\n" * 100
    path.write_bytes(content if kind != "empty" else b"")
    return path


@pytest.mark.parametrize(
    ("kind", "ending", "message"),
    [
        ("cut", "mp4", r"is cut off after \d\.\d of 20\.0 s"),
        ("cut", "mkv", r"is cut off after \d+\.\d of 20\.0 s"),
        ("hole", "mp4", r"\d+ of its packets are damaged and were left out"),
        ("text", "mp4", r"not a video that can be read"),
        ("empty", "mp4", r"not a video that can be read"),
    ],
)
def test_what_breaks_off_is_one_line_after_the_frames_before(
    tmp_path: Path, kind: str, ending: str, message: str
) -> None:  # fmt: skip
    path = tmp_path / f"clip.{ending}"
    settings = {"options": {"movflags": "faststart"}} if ending == "mp4" else {}
    write_clip(path, 200, **settings)
    broken(path, kind)
    numbers: list[int] = []
    with pytest.raises(RefineDetError, match=message) as raised:
        numbers.extend(number_of(frame.pixels) for batch in Video(path).batches(8) for frame in batch)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    whole = {"cut": 60, "hole": 120}.get(kind, 0)
    assert len(numbers) >= whole
    assert numbers[:60] == list(range(200))[: len(numbers[:60])]


def test_what_is_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44_100)
        frame: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(RefineDetError, match="has no video stream, only audio"):
        list(Video(path).frames())
    with pytest.raises(UsageError, match="no such file"):
        list(predict_ahead(Brightness(), str(tmp_path / "none.mp4")))
    write_clip(tmp_path / "large.mp4", 2)
    with pytest.raises(RefineDetError, match=r"frames are too large \(160x96\): more than 15,000 pixels"):
        list(Video(tmp_path / "large.mp4").frames(max_pixels=15_000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"start": -1}, "start must be at least 0"),
        ({"start": float("nan")}, "start must be at least 0"),
        ({"start": 5, "end": 5}, "end must be later than start"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Video("clip.mp4", **settings)


def test_what_is_taken_for_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    for source in ("a.MP4", Path("b.mkv"), "rtsp://x/y", "http://x/a.m3u8?token=1", "https://x/c.mp4", 0, "12"):
        assert as_video(source) is not None, source
    for other in ("a.jpg", "a.gif", "http://x/a.jpg", "http://x/photo", "7", "1234", True, None, b"", "folder.mp4"):
        assert as_video(other) is None, other
    assert as_video("12") == Video(12)
    assert [Video(0).is_live, Video("rtsp://x").is_live, Video("http://x/a.mp4").is_live] == [True, True, False]
    assert Video("rtsp://me:s3cr@et@door/1").name == "rtsp://***@door/1"
    for text in (Video("rtsp://me:secret@door/1").name, str(sources.find_images(["udp://127.0.0.1:5"]).files)):
        assert "secret" not in text


def test_a_video_is_many_images_for_a_detector(tmp_path: Path) -> None:
    clip, photo = tmp_path / "clip.mp4", tmp_path / "a.png"
    write_clip(clip, 5)
    from PIL import Image

    Image.new("RGB", (20, 10), (255, 0, 0)).save(photo)
    found: Any = predict_all(Brightness(), str(clip), threshold=None)
    # The first pixel is white in frames of odd numbers.
    assert [len(detections.filter(0.5)) for detections in found] == [0, 1, 0, 1, 0]
    assert [detections.frame for detections in found] == [0, 1, 2, 3, 4]
    assert [detections.time for detections in found] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    mixed = list(predict_ahead(Brightness(), [photo, Video(clip, every=2), photo], threshold=None, batch_size=2))
    assert [detections.source for detections, _ in mixed] == [str(photo), *[str(clip)] * 3, str(photo)]
    assert [detections.frame for detections, _ in mixed] == [None, 0, 2, 4, None]


def test_what_may_never_end_is_no_list() -> None:
    for source in (0, "rtsp://127.0.0.1/x", Video(3)):
        with pytest.raises(UsageError, match=r"may never end, so predict has no list to return; use stream"):
            predict_all(Brightness(), source)
    with pytest.raises(UsageError, match="item 0 of the list, int 7, is no image"):
        list(predict_ahead(Brightness(), [7]))


def test_errors_of_a_video_among_images(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    paths = [tmp_path / "bad.mp4", tmp_path / "a.png"]
    failed: list[str] = []
    found = list(
        predict_ahead(Brightness(), paths, threshold=None, on_error=lambda image, _: failed.append(image.name))
    )
    assert [len(found), failed] == [1, [str(tmp_path / "bad.mp4")]]
    with pytest.raises(RefineDetError, match=r"bad\.mp4: not a video"):
        list(predict_ahead(Brightness(), paths))


def test_addresses(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 8)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/clip.mp4"
        assert [number_of(frame.pixels) for frame in Video(address).frames()] == list(range(8))
        with pytest.raises(RefineDetError, match=r"none\.mp4: not a video that can be read \(.*404"):
            list(Video(address.replace("clip", "none")).frames())
    finally:
        server.shutdown()
        server.server_close()


def test_a_stream_over_rtsp() -> None:
    with rtsp_server(6) as address:
        frames = [frame for batch in Video(address).batches(2) for frame in batch]
    numbers = [number_of(frame.pixels) for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 5
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in numbers], abs=0.002)
    with pytest.raises(RefineDetError, match=r"^rtsp://\*\*\*@127.0.0.1:1/door: not a video that can be read"):
        list(Video("rtsp://me:secret@127.0.0.1:1/door").frames())


def test_a_local_playlist_reaches_neither_network_nor_other_files(tmp_path: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        path = tmp_path / "clip.mp4"
        address = f"http://127.0.0.1:{server.server_address[1]}/x.ts"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(RefineDetError):
            list(Video(path).frames())
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


def test_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV reads a file in place of a camera, which this machine may not have."""
    pytest.importorskip("cv2")
    write_clip(tmp_path / "clip.mp4", 6)
    monkeypatch.setattr(video, "_camera", lambda number: str(tmp_path / "clip.mp4"))
    frames: list[Frame] = []
    with pytest.raises(RefineDetError, match="camera 0: breaks off after"):
        frames.extend(Video(0).frames())
    assert [number_of(frame.pixels) for frame in frames] == list(range(6))
    np.testing.assert_allclose(frames[0].pixels[80, 20], COLOURS[0], atol=25)  # red first, not blue
    monkeypatch.setattr(video, "_camera", lambda number: str(tmp_path / "none.mp4"))
    with pytest.raises(RefineDetError, match="camera 3: there is no such camera"):
        list(Video(3).frames())
