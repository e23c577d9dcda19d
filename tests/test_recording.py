"""Videos that are written: times, colours and sound are those of the original, and a failure leaves what was there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from conftest import FullDisk
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.pixels import Pixels
from refinedet.recording import DrawnVideos, VideoWriter
from refinedet.video import Video

pytest.importorskip("av")
from clips import COLOURS, decoded, loudest, number_of, picture, sound_packets, write_clip

UNEVEN = [0.0, 0.04, 0.3, 0.35, 0.9, 1.0, 1.01, 1.5, 2.0, 2.9]


def copy(source: Path | Video, target: Path, **settings: object) -> Path:
    video = source if isinstance(source, Video) else Video(source)
    with VideoWriter(target, video, **settings) as writer:  # type: ignore[arg-type]
        for frame in video.frames():
            writer.write(frame.pixels, frame.time)
    return target


def write_all(path: Path, frames: Sequence[Pixels | Callable[[], Pixels]]) -> None:
    with VideoWriter(path) as writer:
        for number, frame in enumerate(frames):
            writer.write(frame, number / 10)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("size", [(160, 96), (161, 97), (1280, 720)])
def test_times_colours_and_order_are_kept(tmp_path: Path, ending: str, size: tuple[int, int]) -> None:
    pictures = [picture(number, size) for number in range(len(UNEVEN))]
    path = tmp_path / f"out.{ending}"
    with VideoWriter(path) as writer:
        for pixels, time in zip(pictures, UNEVEN, strict=True):
            writer.write(pixels, time)
    assert writer.written == 10
    written = decoded(path)
    assert [time for time, _ in written] == pytest.approx(UNEVEN, abs=0.6e-3)  # Matroska counts milliseconds
    assert [number_of(pixels) for _, pixels in written] == list(range(10))
    for _, pixels in written:
        assert (pixels.shape[1], pixels.shape[0]) == tuple(side + side % 2 for side in size)
        for index, colour in enumerate(COLOURS):
            spot = pixels[3 * size[1] // 4, size[0] // 8 + index * (size[0] // 4)]
            np.testing.assert_allclose(spot, colour, atol=6)


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4") as writer:
        writer.write(picture(5), 0.0)
        writer.write(np.kron(picture(9), np.ones((2, 2, 1), np.uint8)), 0.1)
        writer.write(lambda: picture(3), 0.1)  # a time that is not later is moved by a tick
    written = decoded(tmp_path / "out.mp4")
    assert [number_of(pixels) for _, pixels in written] == [5, 9, 3]
    assert [time for time, _ in written] == pytest.approx([0, 0.1, 0.1], abs=1e-3)


def test_sound_is_copied_packet_by_packet(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 20, sound="aac", beep=1.2)
    copy(tmp_path / "clip.mp4", tmp_path / "out.mp4")
    assert sound_packets(tmp_path / "out.mp4") == sound_packets(tmp_path / "clip.mp4")
    assert loudest(tmp_path / "out.mp4") == pytest.approx(1.2, abs=0.03)
    copy(Video(tmp_path / "clip.mp4", start=0.5, end=1.5, every=2), tmp_path / "part.mkv")
    assert loudest(tmp_path / "part.mkv") == pytest.approx(0.7, abs=0.05)
    assert [time for time, _ in decoded(tmp_path / "part.mkv")] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-3)
    assert len(sound_packets(tmp_path / "part.mkv")) * 1024 / 44_100 == pytest.approx(1.0, abs=0.05)


def test_sound_that_the_format_has_no_place_for_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mkv", 10, sound="wavpack")
    said: list[str] = []
    copy(tmp_path / "clip.mkv", tmp_path / "out.mp4", say=said.append)
    assert len(said) == 1
    assert "out.mp4: written without sound (" in said[0]
    assert len(decoded(tmp_path / "out.mp4")) == 10
    said.clear()
    write_clip(tmp_path / "silent.mp4", 3)
    copy(tmp_path / "silent.mp4", tmp_path / "still.mp4", say=said.append)
    assert said == []


def test_no_frame_no_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"out\.gif: videos are written as \.mp4"):
        VideoWriter(tmp_path / "out.gif")


def test_an_error_of_the_caller_leaves_what_was_written(tmp_path: Path) -> None:
    def write_some() -> None:
        with VideoWriter(tmp_path / "out.mp4") as writer:
            for number in range(5):
                writer.write(picture(number), number / 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_some()
    assert [number_of(pixels) for _, pixels in decoded(tmp_path / "out.mp4")] == [0, 1, 2, 3, 4]


def test_a_full_disk_is_named_and_the_previous_file_kept(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "out.mp4"
    copy(write_clip(tmp_path / "clip.mp4", 3), path)  # type: ignore[arg-type]
    before = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (60, 96, 160, 3), dtype=np.uint8)
    with full_disk(100_000), pytest.raises(RefineDetError, match=r"out\.mp4: cannot be saved \(.*full.*untouched"):
        write_all(path, list(noise))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


def test_a_frame_that_cannot_be_drawn_is_the_error(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise RefineDetError("no such font")

    with pytest.raises(RefineDetError, match="no such font"):
        write_all(tmp_path / "out.mp4", [picture(0), picture(1), *[fail] * 20])
    assert list(tmp_path.iterdir()) == []


def found(source: Path, time: float) -> Detections:
    return Detections([[20, 60, 120, 90]], [0.9], [0], ("cat",), (160, 96), str(source), time=time, frame=0)  # type: ignore[arg-type]


def test_every_video_has_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "a.mp4", tmp_path / "two" / "A.mkv"
    for path in (first, second):
        path.parent.mkdir()
        write_clip(path, 2)
    foreign = tmp_path / "out" / "a.mp4"
    foreign.parent.mkdir()
    foreign.write_bytes(first.read_bytes())
    kept = foreign.read_bytes()
    for _ in range(2):  # again: the copies are replaced, not multiplied
        drawn = DrawnVideos(tmp_path / "out", [Video(first), Video(second)], {"labels": False})
        for path in (first, second):
            for frame in Video(path).frames():
                drawn.write(found(path, frame.time), frame.pixels)
        drawn.close()
        assert [path.name for path in drawn.written] == ["a-2.mp4", "A.mp4"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["A.mp4", "a-2.mp4", "a.mp4"]
    assert foreign.read_bytes() == kept
    pixels = decoded(tmp_path / "out" / "A.mp4")[0][1]
    assert pixels.shape == (288, 480, 3)  # very small frames are enlarged, as images are
    for message, target, videos in (
        ("takes one video; give a folder for 2", tmp_path / "x.mp4", [Video(first), Video(second)]),
        ("is an input of this command", first, [Video(first)]),
        ("was not written by this command", foreign, [Video(first)]),
    ):
        with pytest.raises(UsageError, match=message):
            DrawnVideos(target, videos, {})


@pytest.mark.slow
def test_memory_stays_flat_over_a_long_video(tmp_path: Path) -> None:
    """1,500 frames need hardly more memory than 150, though they hold 1.4 GB of pixels."""
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from refinedet.recording import VideoWriter\n"
        "from refinedet.video import Video\n"
        "video = Video(sys.argv[1])\n"
        "with VideoWriter(Path(sys.argv[2]), video) as writer:\n"
        "    for batch in video.batches(8):\n"
        "        for frame in batch:\n"
        "            writer.write(frame.pixels, frame.time)\n"
        "print(writer.written, int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) // 1024)"
    )
    used = []
    for frames in (150, 1500):
        clip = tmp_path / f"{frames}.mp4"
        write_clip(clip, frames, size=(640, 480), sound="aac")
        call = [sys.executable, "-c", program, str(clip), str(tmp_path / f"out{frames}.mp4")]
        count, megabytes = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()
        assert int(count) == frames
        used.append(int(megabytes))
    assert used[1] - used[0] < 40, used
