"""Frames of videos, streams and cameras, decoded in a thread while the caller works, with their times and flat memory.

Needs the extra ``refinedet[video]`` (PyAV); cameras need OpenCV, whose wheels can open them on every system.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from refinedet.errors import RefineDetError, UsageError
from refinedet.fetch import is_address, without_secrets
from refinedet.files import user_path
from refinedet.images import MAX_PIXELS
from refinedet.pixels import Pixels
from refinedet.text import reason

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".3gp",
     ".ogv", ".mjpeg", ".mjpg", ".h264", ".264", ".hevc", ".h265"}
)  # fmt: skip
"""Files that are taken for videos, in lower case."""
_PLAYLISTS = frozenset({".m3u8", ".mpd"})
LIVE_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp"})
"""Addresses of these schemes are streams; http and https are too where the ending of the path is that of a video."""
TIMEOUT = 20.0
"""Seconds without an answer after which a stream is given up."""
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,rtsp,rtsps,rtmp,rtmps,srt,crypto,hls,data"
_PIXELS_AHEAD = 32_000_000
"""Pixels that are decoded and not yet taken, at most; one frame is, however large it is."""
_CUT_OFF = 1.0
"""Seconds that may be missing at the end of a video before it counts as cut off."""


class Frame(NamedTuple):
    """One frame of a video."""

    pixels: Pixels
    """(H, W, 3) uint8 RGB, turned as the video says."""
    time: float
    """Seconds from the start of the video; of a stream or camera from its first frame."""
    number: int
    """Its number among the frames from ``Video.start`` on, from 0, those between that ``every`` leaves out included."""


@dataclass(frozen=True)
class Video:
    """A video, stream or camera, and which of its frames are taken.

    Args:
        source: a file, the address of a stream (http, rtsp and others), or the number of a camera.
        every: take every so many frames.
        start: seconds from the start at which to begin.
        end: seconds from the start at which to stop.

    Raises:
        UsageError: a number that is too small.

    Example:
        >>> Video("clip.mp4", every=5, start=60, end=90).is_live, Video("rtsp://me:secret@door/1").name
        (False, 'rtsp://***@door/1')
    """

    source: str | os.PathLike[str] | int
    every: int = 1
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"every must be at least 1, not {self.every}")
        if not (math.isfinite(self.start) and self.start >= 0):
            raise UsageError(f"start must be at least 0 seconds, not {self.start}")
        if self.end is not None and not self.end > self.start:
            raise UsageError(f"end must be later than start, not {self.end:g} and {self.start:g} seconds")

    @property
    def name(self) -> str:
        """Path or address without a password, or "camera 0"."""
        if isinstance(self.source, int):
            return f"camera {self.source}"
        return without_secrets(os.fsdecode(self.source))

    @property
    def is_live(self) -> bool:
        """Whether frames that are not taken in time are lost."""
        return isinstance(self.source, int) or _scheme(os.fsdecode(self.source)) in LIVE_SCHEMES

    @cached_property
    def path(self) -> str:
        """What is opened: a path or an address."""
        text = os.fsdecode(self.source) if not isinstance(self.source, int) else str(self.source)
        return text if is_address(text) else str(user_path(text))

    def require(self) -> None:
        """Find out whether the package that reads it is installed.

        Raises:
            UsageError: it is not.
        """
        _opencv(self.name) if isinstance(self.source, int) else pyav(self.name)

    def open(self) -> Any:
        """PyAV's container of a file or address.

        Raises:
            UsageError: PyAV is not installed.
            RefineDetError: it cannot be opened.
        """
        av = pyav(self.name)
        network = is_address(self.path)
        # A playlist that somebody else wrote must neither read local files nor, in a local file, reach the network.
        options = {"protocol_whitelist": _NETWORK if network else "file"}
        if _scheme(self.path).startswith("rtsp"):
            options["rtsp_transport"] = "tcp"  # UDP would lose packets, and with them parts of frames
        try:
            return av.open(self.path, options=options, timeout=TIMEOUT if network else None)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise RefineDetError(f"{self.name}: not a video that can be read ({_reason(error)})") from None

    def length(self) -> int | None:
        """About how many frames are taken, if that is known beforehand; never raises."""
        if self.is_live or is_address(self.path):
            return None
        try:
            with self.open() as container:
                stream = container.streams.video[0]
                seconds = _seconds(container, stream)
                rate = float(stream.average_rate or 0)
        except (RefineDetError, IndexError):
            return None
        if seconds is None or not rate:
            return None
        seconds = max(0.0, min(seconds, self.end or seconds) - self.start)
        return math.ceil(seconds * rate / self.every)

    def frames(self, *, max_pixels: int | None = None) -> Iterator[Frame]:
        """Its frames, decoded in the thread that asks for them.

        Args:
            max_pixels: largest width times height; ``images.MAX_PIXELS`` if None.

        Raises:
            UsageError: the package that reads it is not installed.
            RefineDetError: it cannot be opened, breaks off, is damaged, or has larger frames. Whatever can be decoded
                comes first.
        """
        limit = MAX_PIXELS if max_pixels is None else max_pixels
        decoded = self._camera_frames() if isinstance(self.source, int) else self._file_frames(limit)
        number = -1
        with closing(decoded):
            for pixels, seconds in decoded:
                if seconds < self.start:
                    continue
                if self.end is not None and seconds >= self.end:
                    return
                number += 1
                if number % self.every == 0:
                    yield Frame(pixels(), seconds, number)

    def _file_frames(self, limit: int) -> Generator[tuple[Any, float], None, None]:
        """What makes the pixels of each frame, which is left undone for those that are not taken, and its time."""
        av = pyav(self.name)
        with self.open() as container:
            if not container.streams.video:
                raise RefineDetError(f"{self.name}: has no video stream, only audio")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            origin = None if self.is_live else start_of(container)
            if self.start and origin is not None:
                with suppress(OSError):  # a pipe, or a file without an index: all frames before are decoded
                    container.seek(max(0, math.floor(1_000_000 * (origin + self.start))))
            seconds, damaged, step = -1.0, 0, 1 / float(stream.average_rate or 25)
            try:
                for packet in container.demux(stream):
                    try:
                        frames = packet.decode()
                    except av.error.InvalidDataError:
                        damaged += 1  # the frames behind it may be sound
                        continue
                    for frame in frames:
                        if frame.width * frame.height > limit:
                            raise RefineDetError(_too_large(self.name, frame.width, frame.height, limit))
                        if frame.time is None:
                            seconds += step
                        else:
                            origin = frame.time if origin is None else origin
                            seconds = frame.time - origin
                        yield _Rgb(frame), max(0.0, seconds)
            except (av.error.FFmpegError, OSError) as error:
                raise RefineDetError(f"{self.name}: breaks off after {seconds:.1f} s ({_reason(error)})") from None
            expected = None if self.is_live else _seconds(container, stream)
            if expected is not None and seconds + step + _CUT_OFF < expected:
                raise RefineDetError(f"{self.name}: is cut off after {max(0, seconds):.1f} of {expected:.1f} s")
            if damaged:
                raise RefineDetError(f"{self.name}: {damaged} of its packets are damaged and were left out")

    def _camera_frames(self) -> Generator[tuple[Any, float], None, None]:
        capture = _opencv(self.name).VideoCapture(_camera(self.source))
        try:
            if not capture.isOpened():
                raise RefineDetError(f"{self.name}: there is no such camera, or another program uses it")
            began = time.monotonic()
            while True:
                there, image = capture.read()
                if not there:
                    raise RefineDetError(f"{self.name}: breaks off after {time.monotonic() - began:.1f} s")
                yield (lambda image=image: np.ascontiguousarray(image[..., ::-1])), time.monotonic() - began
        finally:
            capture.release()

    def batches(
        self, batch_size: int, *, max_pixels: int | None = None, pixels_ahead: int = _PIXELS_AHEAD
    ) -> Generator[list[Frame], None, None]:
        """Its frames in batches; the next ones are decoded in a thread while the caller works.

        Of a stream or camera the newest frames come, those that the caller had no time for are left out.

        Args:
            batch_size: largest number of frames in a batch; fewer where they are very large.
            max_pixels: as in ``frames``.
            pixels_ahead: bound on the pixels that are decoded and not yet taken.

        Raises:
            UsageError, RefineDetError: as in ``frames``, after all frames that could be decoded.
        """
        frames = self.frames(max_pixels=max_pixels)
        buffer = _Buffer(batch_size, pixels_ahead, newest_only=self.is_live)
        thread = threading.Thread(target=buffer.fill, args=(frames,), name="decode-video", daemon=True)
        thread.start()
        try:
            while batch := buffer.take():
                yield batch
        finally:
            buffer.close()
            thread.join(timeout=5)  # a stream that is silent is not waited for


class _Rgb:
    """The pixels of a decoded frame, once they are asked for."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __call__(self) -> Pixels:
        pixels: Pixels = self._frame.to_ndarray(format="rgb24")
        quarters = round(self._frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


class _Buffer:
    """Frames between the thread that decodes them and the one that takes them."""

    def __init__(self, batch_size: int, pixels_ahead: int, *, newest_only: bool) -> None:
        self._batch_size, self._pixels_ahead, self._newest_only = batch_size, pixels_ahead, newest_only
        self._frames: deque[Frame] = deque()
        self._room = batch_size
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._error: BaseException | None = None

    def fill(self, frames: Iterator[Frame]) -> None:
        """Take all frames, as there is room for them."""
        try:
            for frame in frames:
                if not self._put(frame):
                    break
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        with self._changed:
            self._room = max(1, min(self._batch_size, self._pixels_ahead // max(1, frame.pixels.size // 3)))
            if self._newest_only and len(self._frames) >= self._room:
                self._frames.popleft()
            while len(self._frames) >= self._room and not self._closed:
                self._changed.wait()
            self._frames.append(frame)
            self._changed.notify_all()
            return not self._closed

    def take(self) -> list[Frame]:
        """The frames that are there, as soon as a batch is full or, of what is live, one is there; none at the end."""
        with self._changed:
            while len(self._frames) < (1 if self._newest_only else self._room) and not self._ended:
                self._changed.wait()
            batch = list(self._frames)
            self._frames.clear()
            self._changed.notify_all()
        if not batch and self._error is not None:
            raise self._error
        return batch

    def close(self) -> None:
        """No more frames are wanted."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._changed.notify_all()


def as_video(source: object) -> Video | None:
    """The video that a source stands for: a ``Video``, the number of a camera, a path or an address; None if none.

    A text of digits is a camera where no file has this name.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, int) and not isinstance(source, bool):
        return Video(source)
    if not isinstance(source, (str, os.PathLike)):
        return None
    text = os.fsdecode(source)
    if is_address(text):
        scheme = _scheme(text)
        if scheme in LIVE_SCHEMES or (scheme in ("http", "https") and _ending(urlsplit(text).path, _PLAYLISTS)):
            return Video(text)
        return None
    if re.fullmatch(r"[0-9]{1,3}", text) and not os.path.lexists(text):
        return Video(int(text))
    return Video(text) if _ending(text) and not os.path.isdir(text) else None


def start_of(container: Any) -> float | None:
    """The time stamp at which a container begins, in seconds, if it says so."""
    return None if container.start_time is None else container.start_time / 1_000_000


def _seconds(container: Any, stream: Any) -> float | None:
    """How long a video says it is."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    said = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return 3600 * int(said[1]) + 60 * int(said[2]) + float(said[3]) if said else None


def _scheme(text: str) -> str:
    return text.split(":", 1)[0].lower() if is_address(text) else ""


def _ending(path: str, more: frozenset[str] = frozenset()) -> bool:
    return Path(path).suffix.lower() in VIDEO_EXTENSIONS | more


def _camera(number: Any) -> Any:
    """What OpenCV is asked to open; tests put a file here."""
    return number


def _too_large(name: str, width: int, height: int, limit: int) -> str:
    return f"{name}: frames are too large ({width}x{height}): more than {limit:,} pixels; raise the limit (max_pixels)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or reason(error, 200)


def _opencv(name: str) -> Any:
    try:
        import cv2
    except ImportError:
        raise UsageError(f"{name}: cameras need OpenCV: pip install opencv-python") from None
    return cv2


def pyav(name: str) -> Any:
    """The package of PyAV.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import av
        import av.error
    except ImportError:
        raise UsageError(f"{name}: videos need PyAV: pip install 'refinedet[video]'") from None
    return av
