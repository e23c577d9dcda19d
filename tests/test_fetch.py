"""One image from a web address: a local server stands for the web."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from refinedet import fetch as fetch_module
from refinedet.errors import RefineDetError, UsageError
from refinedet.fetch import fetch, is_address
from refinedet.images import read_image


def content() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, format="PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    release = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404, "Not Found")
            return
        if self.path == "/slow":
            self.release.wait(30)
        self.send_response(302 if self.path.startswith("/to-") else 200)
        if self.path == "/to-file":
            self.send_header("Location", "file:///etc/hostname")
        if self.path == "/to-image":
            self.send_header("Location", "/a.png")
        self.end_headers()
        if self.path == "/a.png":
            self.wfile.write(content())
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        Handler.release.set()
        web.shutdown()


def test_an_image_is_fetched(server: str) -> None:
    assert fetch(f"{server}/a.png") == content()
    np.testing.assert_array_equal(read_image(f"{server}/to-image"), read_image(content()))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "404 Not Found"),
        ("/to-file", "cannot be fetched"),
        ("/empty", "empty answer"),
        ("/endless", "larger than 1 MB"),
        ("/slow", "too slow"),
    ],
)
def test_what_a_server_can_do_wrong(server: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.5)
    with pytest.raises(RefineDetError, match=message) as caught:
        fetch(server + path)
    assert str(caught.value).startswith(server + path)
    assert "\n" not in str(caught.value)


def test_a_drip_of_bytes_ends_at_the_deadline(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "DEADLINE", 0.0)
    with pytest.raises(RefineDetError, match="too slow"):
        fetch(f"{server}/endless")


@pytest.mark.parametrize(
    "address", ["http://", "http://127.0.0.1:99999/", "http://[::1", "http://a b/", "http://127.0.0.1:1/"]
)
def test_addresses_that_lead_nowhere(address: str) -> None:
    with pytest.raises(RefineDetError) as caught:
        fetch(address)
    assert "\n" not in str(caught.value)


def test_only_the_web(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("file:///etc/hostname", "ftp://example.com/a", "data:image/png;base64,AAAA"):
        with pytest.raises(UsageError, match="only http"):
            fetch(address)
    assert [is_address(text) for text in ("http://a", "file:/a", "s3://b", "C:\\a.jpg", "photos/a.jpg", "a:b.jpg")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
