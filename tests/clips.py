"""Small videos for tests: every frame carries its number in black and white blocks."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from refinedet.pixels import Pixels

BLOCK = 16
BITS = 8
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (230, 230, 60))
SAMPLE_RATE = 44_100


def picture(number: int, size: tuple[int, int] = (160, 96)) -> Pixels:
    """The frame of that number: its bits in the first rows, four patches of colour below; ``size`` is width, height."""
    width, height = size
    image = np.full((height, width, 3), 128, np.uint8)
    for bit in range(BITS):
        image[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 if number >> bit & 1 else 0
    quarter = width // 4
    for index, colour in enumerate(COLOURS):
        image[height // 2 :, index * quarter : (index + 1) * quarter] = colour
    return image


def number_of(pixels: Pixels) -> int:
    """The number that a frame carries."""
    row = pixels[BLOCK // 2, BLOCK // 2 : BITS * BLOCK : BLOCK].mean(axis=1)
    return sum(1 << bit for bit, value in enumerate(row) if value > 128)


def write_clip(
    path: Path | str, times: Sequence[float] | int = 20, *, size: tuple[int, int] = (160, 96), sound: str = "",
    rotation: int = 0, codec: str = "libx264", beep: float = 0.0, **settings: Any,
) -> Path | str:  # fmt: skip
    """A clip with a frame at each of ``times`` (or so many at 10 per second), with sound of that codec.

    The sound is silent but for a tone of 0.1 s at ``beep``.
    """
    import av

    if isinstance(times, int):
        times = [number / 10 for number in range(times)]
    with av.open(str(path), "w", **settings) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        base = Fraction(1, 10 if str(path).endswith(".avi") else 1000)  # AVI has a fixed number of frames per second
        stream.codec_context.time_base = base
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "5", "g": "5"}
        if rotation:
            stream.set_display_rotation(rotation)
        audio: Any = container.add_stream(sound, rate=SAMPLE_RATE) if sound else None
        if audio is not None:
            _write_sound(container, audio, times[-1] + 0.1, beep)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _write_sound(container: Any, stream: Any, seconds: float, beep: float) -> None:
    import av

    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = np.sin(2 * np.pi * 880 * times) * (times >= beep) * (times < beep + 0.1)
    size = stream.codec_context.frame_size or 1024
    for start in range(0, len(wave), size):
        samples = (wave[None, start : start + size] * 20_000).astype(np.int16)
        frame: Any = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
        resampled = av.AudioResampler(stream.codec_context.format.name, "mono", SAMPLE_RATE).resample(frame)
        for part in resampled:
            part.pts = start
            container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def decoded(path: Path) -> list[tuple[float, Pixels]]:
    """Time and pixels of every frame, by PyAV alone."""
    import av

    with av.open(str(path)) as container:
        return [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def sound_packets(path: Path) -> list[bytes]:
    """The packets of the sound as they are in the file."""
    import av

    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def loudest(path: Path) -> float:
    """The time at which the sound begins to be loud."""
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            values = np.abs(frame.to_ndarray().astype(np.float64)).ravel()
            if values.max() > 0.1:
                return float(frame.time or 0) + float(np.argmax(values > 0.1)) / SAMPLE_RATE
    raise AssertionError("silence")


@contextlib.contextmanager
def rtsp_server(frames: int) -> Iterator[str]:
    """An RTSP server on this machine that sends a clip of MJPEG once, over TCP; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=_serve, args=(listener, frames), daemon=True)
    thread.start()
    try:
        yield f"rtsp://me:secret@127.0.0.1:{port}/door"
    finally:
        listener.close()
        thread.join(timeout=10)


def _serve(listener: socket.socket, frames: int) -> None:
    with contextlib.suppress(OSError):
        client, _ = listener.accept()
        with client, client.makefile("rwb") as stream:
            while True:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    line = stream.readline()
                    if not line:
                        return
                    request += line
                method = request.split(b" ")[0]
                number = request.lower().split(b"cseq:")[1].split(b"\r\n")[0].strip()
                head, body = b"", b""
                if method == b"DESCRIBE":
                    body = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:t\r\n"
                    head = b"Content-Type: application/sdp\r\nContent-Length: %d\r\n" % len(body)
                elif method == b"SETUP":
                    head = b"Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
                elif method == b"OPTIONS":
                    head = b"Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
                elif method == b"PLAY":
                    head = b"Session: 1\r\n"
                stream.write(b"RTSP/1.0 200 OK\r\nCSeq: " + number + b"\r\n" + head + b"\r\n" + body)
                stream.flush()
                if method == b"PLAY":
                    for packet in _rtp_packets(frames):
                        stream.write(b"$\x00" + len(packet).to_bytes(2, "big") + packet)
                    stream.flush()
                    return


def _rtp_packets(frames: int) -> list[bytes]:
    """What FFmpeg's RTP muxer sends of a clip."""
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    receiver.settimeout(1)
    packets: list[bytes] = []
    with receiver:
        write_clip(f"rtp://127.0.0.1:{receiver.getsockname()[1]}", frames, codec="mjpeg", format="rtp")
        with contextlib.suppress(TimeoutError):
            while True:
                packets.append(receiver.recv(1 << 16))
    return packets
