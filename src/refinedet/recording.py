"""Drawn frames as video files: frame times are kept, the sound of the original is copied, and a thread encodes.

A file appears when its last frame is written, also where the video or the work broke off; what was there before stays
until then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from refinedet.detections import Detections
from refinedet.draw import SIGNATURE
from refinedet.errors import RefineDetError, UsageError
from refinedet.fetch import is_address
from refinedet.files import check_output, has_signature, write_atomically
from refinedet.pixels import Pixels
from refinedet.text import reason
from refinedet.video import Video, pyav, start_of

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Endings of videos that are written, and FFmpeg's names of their formats."""
_CODECS = ("libx264", "libopenh264", "mpeg4")
"""The first that PyAV has is used."""
_TICKS = 90_000
"""Time stamps are written in this part of a second."""
_LEAD_IN = 0.05
"""Seconds of sound before the first frame that are copied."""
_AHEAD = 4
"""Frames that wait for the encoder, at most."""


def is_video_output(path: Path) -> bool:
    """Whether an output is a video, by its ending."""
    return path.suffix.lower() in FORMATS


class VideoWriter:
    """Writes a video while the caller works; a context manager, at whose end the file is there.

    Args:
        path: a .mp4, .mov or .mkv file, which ``files.check_output`` has allowed.
        original: the video that the frames are of; its sound is copied if it is a file and the format takes it.
        say: gets a line about sound that could not be copied.

    Raises:
        UsageError: another ending.
    """

    def __init__(self, path: Path, original: Video | None = None, *, say: Callable[[str], None] | None = None) -> None:
        if not is_video_output(path):
            raise UsageError(f"{path}: videos are written as {', '.join(FORMATS)}")
        self.path, self._original, self._say = path, original, say
        self.written = 0
        """Frames so far."""
        self._queue: queue.Queue[tuple[Callable[[], Pixels], float] | None] = queue.Queue(_AHEAD)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = False

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, frame: Pixels | Callable[[], Pixels], time: float) -> None:
        """Take a frame.

        Args:
            frame: (H, W, 3) uint8 RGB, or what returns it, which is called in the thread that encodes. Frames of
                another size than the first are scaled to it.
            time: seconds; later than that of the frame before. The first frame is shown at the start of the file.

        Raises:
            RefineDetError: the file cannot be written.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="encode-video", daemon=True)
            self._thread.start()
        self._queue.put((frame if callable(frame) else lambda: frame, time))
        self._raise()
        self.written += 1

    def close(self) -> None:
        """Write the file to its end; without a frame there is none.

        Raises:
            RefineDetError: it cannot be written.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()
            self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        try:
            write_atomically(self.path, self._encode)
        except BaseException as error:
            self._error = error if isinstance(error, RefineDetError) else _failure(self.path, error)
        while not self._ended:  # the caller must never wait for a thread that has given up
            self._next()

    def _next(self) -> tuple[Callable[[], Pixels], float] | None:
        item = self._queue.get()
        self._ended = item is None
        return item

    def _encode(self, part: Path) -> None:
        item = self._next()
        assert item is not None  # the thread begins with the first frame
        frame, time = item
        with _Encoder(part, FORMATS[self.path.suffix.lower()], self._original, frame(), time) as encoder:
            while (item := self._next()) is not None:
                frame, time = item
                encoder.write(frame(), time)
            encoder.finish()
        if encoder.lost_sound and self._say is not None:
            self._say(f"note: {self.path}: written without sound ({encoder.lost_sound})")


def _failure(path: Path, error: BaseException) -> RefineDetError:
    return RefineDetError(f"{path}: cannot be saved ({reason(error, 200) if isinstance(error, Exception) else error})")


class _Encoder:
    """An open file with a video stream and perhaps an audio stream."""

    def __init__(self, path: Path, kind: str, original: Video | None, first: Pixels, time: float) -> None:
        av = self._av = pyav(str(path))
        height, width = (side + side % 2 for side in first.shape[:2])
        self._size, self._start = (width, height), time
        self._last, self._step = -1, 0
        self._container = av.open(str(path), "w", format=kind)
        self._container.metadata["comment"] = SIGNATURE
        codec = next(name for name in _CODECS if name in av.codecs_available)
        self._stream: Any = self._container.add_stream(codec, rate=30)
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base, context.thread_type = Fraction(1, _TICKS), "AUTO"
        # Players take untagged videos for BT.709 or BT.601 depending on their size; 1 is BT.709, and its limited range.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        if codec == "libx264":
            self._stream.options = {"preset": "veryfast", "crf": "20"}
        else:
            self._stream.bit_rate = 6 * width * height
        # Codecs get going from packets before the first frame, for which Matroska would move all frames.
        self._sound = _Sound(self._container, original, time, lead_in=0 if kind == "matroska" else _LEAD_IN)
        self.lost_sound = self._sound.lost
        self.write(first, time)

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._sound.close()
        self._container.close()

    def write(self, pixels: Pixels, time: float) -> None:
        if pixels.shape[0] % 2 or pixels.shape[1] % 2:
            pixels = np.pad(pixels, [(0, side % 2) for side in pixels.shape[:2]] + [(0, 0)], mode="edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(*self._size, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        before, self._last = self._last, max(self._last + 1, round((time - self._start) * _TICKS))
        frame.pts, self._step = self._last, self._last - before
        frame.time_base = Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))
        self._sound.copy(self._last / _TICKS)

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._sound.copy((self._last + self._step) / _TICKS)  # the last frame is shown as long as the one before


class _Sound:
    """The sound of a video, copied as it is from a time on."""

    def __init__(self, target: Any, original: Video | None, start: float, lead_in: float) -> None:
        self._lead_in = lead_in
        self.lost = ""
        """Why there is none although the original has some."""
        self._source: Any = None
        if original is None or original.is_live or is_address(original.path):
            return
        self._source = original.open()
        try:
            if not self._source.streams.audio:
                self.close()
                return
            stream = self._source.streams.audio[0]
            self._target, self._stream = target, target.add_stream_from_template(stream)
            self._start = start + (start_of(self._source) or 0.0)
            if start:
                self._source.seek(max(0, int(1_000_000 * self._start)))
            self._packets = self._source.demux(stream)
            self._next = next(self._packets, None)
        except (ValueError, OSError) as error:  # a codec that the format has no place for
            self.lost = reason(error, 200)
            self.close()

    def copy(self, until: float) -> None:
        """Copy what belongs to the seconds up to ``until`` of the new file."""
        while self._source is not None and self._next is not None and self._next.pts is not None:
            packet = self._next
            ticks = packet.pts - round(self._start / packet.time_base)
            if ticks * packet.time_base > until:
                return
            if ticks * packet.time_base >= -self._lead_in:
                packet.pts = packet.dts = ticks
                packet.stream = self._stream
                self._target.mux(packet)
            try:
                self._next = next(self._packets, None)
            except (ValueError, OSError):  # the original is damaged here, which is said of its video
                self._next = None

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source = None


class DrawnVideos:
    """Drawn copies of videos: one file, or a file for each video in a folder.

    Args:
        target: a file with the ending of a video, for a single video, or a folder.
        videos: all videos of the call.
        look: arguments of ``Detections.draw``.
        say: as in ``VideoWriter``.

    Raises:
        UsageError: the file may not be replaced, or two videos would have the same file.
        RefineDetError: it cannot be written.
    """

    def __init__(
        self, target: Path, videos: Iterable[Video], look: dict[str, Any], *, say: Callable[[str], None] | None = None
    ) -> None:
        self._look, self._say = look, say
        self._videos = {video.name: video for video in videos}
        self._targets = _targets(target, list(self._videos.values()))
        self._writer: VideoWriter | None = None
        self._current: str | None = None
        self.written: list[Path] = []
        """The files that are there."""

    def write(self, found: Detections, pixels: Pixels) -> None:
        """Take a frame with its detections; the video before it is complete when that of another one comes.

        Raises:
            RefineDetError: it cannot be written.
        """
        name = found.source or ""
        if name != self._current or self._writer is None:
            self.close()
            self._current = name
            self._writer = VideoWriter(self._targets[name], self._videos[name], say=self._say)
        self._writer.write(lambda: found.draw(pixels, **self._look), found.time or 0.0)

    def close(self) -> None:
        """Complete the file that is being written.

        Raises:
            RefineDetError: it cannot be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            self.written.append(writer.path)


def _targets(target: Path, videos: list[Video]) -> dict[str, Path]:
    inputs = [video.path for video in videos]
    if is_video_output(target) and not target.is_dir():
        if len(videos) != 1:
            raise UsageError(f"{target}: takes one video; give a folder for {len(videos)}")
        return {videos[0].name: check_output(target, ours=SIGNATURE, inputs=inputs)}
    targets: dict[str, Path] = {}
    taken: set[str] = set()
    for video in videos:
        stem = "stream" if is_address(video.path) else Path(video.name).stem
        number = 1
        while True:
            path = target / f"{stem}{'' if number == 1 else f'-{number}'}.mp4"
            free = not path.exists() or (has_signature(path, SIGNATURE) and str(path) not in inputs)
            if str(path).lower() not in taken and free:
                break
            number += 1
        taken.add(str(path).lower())
        targets[video.name] = check_output(path, ours=SIGNATURE, inputs=inputs)
    return targets
