"""Images from web addresses and object stores: a local server and a store in memory stand for them."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from PIL import Image

from refinedet import fetch as fetch_module
from refinedet.errors import RefineDetError, UsageError
from refinedet.fetch import fetch, is_address
from refinedet.images import describe, read_image
from refinedet.sources import find_images, list_images


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


FILES: dict[str, bytes] = {}


class Store(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """An object store in memory, which fsspec knows as s3."""

    protocol = "s3"
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: object) -> list[object]:
        inside = [name.removeprefix(f"{path}/").split("/") for name in FILES if name.startswith(f"{path}/")]
        found: list[object] = [
            {"name": f"{path}/{first}", "size": 1, "type": "directory" if rest else "file"} for first, *rest in inside
        ]
        if path in FILES:
            found.append({"name": path, "size": len(FILES[path]), "type": "file"})
        if not found:
            raise FileNotFoundError(path)
        return found

    def _open(self, path: str, *_: object, **__: object) -> io.BytesIO:
        if path.endswith("/forbidden.jpg"):
            raise RuntimeError("Access\nDenied")  # the libraries of stores have errors of their own
        return io.BytesIO(FILES[path])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setitem(_registry, "s3", Store)
    FILES.clear()
    FILES.update({f"bucket/photos/{name}": content() for name in ("b.png", "sub/a.PNG", "forbidden.jpg", ".c.png")})
    FILES.update({"bucket/photos/notes.txt": b"none", "bucket/photos/d.heic": b"h", "bucket/photos/empty.png": b""})
    return FILES


def test_object_stores(store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch("s3://bucket/photos/b.png") == content()
    assert read_image("s3://bucket/photos/b.png").shape == (10, 10, 3)
    whole = ["b.png", "empty.png", "forbidden.jpg", "sub/a.PNG"]
    for folder in ("s3://bucket/photos", "s3://bucket/photos/", "s3://bucket"):
        found = find_images([folder])
        assert found.files == [f"s3://bucket/photos/{name}" for name in whole]
        assert found.note() == "passed over: 1 .heic (these formats cannot be read; convert the images to JPEG or PNG)"
    assert find_images(["s3://bucket/photos/*.png"]).files == [
        "s3://bucket/photos/b.png", "s3://bucket/photos/empty.png",
    ]  # fmt: skip
    assert find_images(["s3://bucket/photos/sub/a.PNG"]).files == ["s3://bucket/photos/sub/a.PNG"]
    assert [image.name for image in list_images("s3://bucket/photos/sub")] == ["s3://bucket/photos/sub/a.PNG"]  # type: ignore[union-attr]
    with pytest.raises(RefineDetError, match=r"^s3://bucket/photos/forbidden.jpg: cannot be read \(Access Denied\)$"):
        fetch("s3://bucket/photos/forbidden.jpg")
    with pytest.raises(RefineDetError, match="empty answer"):
        fetch("s3://bucket/photos/empty.png")
    with pytest.raises(RefineDetError, match=r"no-such\.png: cannot be read"):
        fetch("s3://bucket/no-such.png")
    with pytest.raises(UsageError, match=r"^s3://bucket/none: no images there$"):
        find_images(["s3://bucket/none"])
    monkeypatch.setattr(fetch_module, "MAX_BYTES", 50)
    with pytest.raises(RefineDetError, match="larger than 0 MB"):
        fetch("s3://bucket/photos/b.png")


def test_a_chain_of_file_systems_reads_no_local_file(store: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(content())
    for address in (f"s3::file://{tmp_path}/secret.png", f"simplecache::file://{tmp_path}/secret.png"):
        with pytest.raises(UsageError, match=r"only http://, https:// and the object stores s3://, gs://"):
            find_images([address])
        with pytest.raises(RefineDetError):
            fetch(address)
    with pytest.raises(RefineDetError, match="cannot be read"):
        fetch(f"s3://bucket::file://{tmp_path}/secret.png")


def test_a_store_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UsageError, match=r"^az://a/b: reading az:// needs a package: pip install adlfs$"):
        find_images(["az://a/b"])


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (
            "https://b.s3/a.jpg?X-Amz-Date=1&X-Amz-Credential=AK%2F1&X-Amz-Signature=0f#x",
            "X-Amz-Date=1&X-Amz-Credential=***&X-Amz-Signature=***#x",
        ),
        (
            "https://b.s3/a.jpg?AWSAccessKeyId=AK&Expires=9&Signature=a%2Bb",
            "?AWSAccessKeyId=***&Expires=9&Signature=***",
        ),
        ("https://b.blob/a.jpg?sv=2024&sr=b&sig=a%3D", "?sv=2024&sr=b&sig=***"),
        ("https://host/a.jpg?access_token=t&id=7", "?access_token=***&id=7"),
        ("https://host/a.jpg?id=7&API-KEY=t", "?id=7&API-KEY=***"),
        ("rtsp://door/1?user=admin&password=p_q&channel=1", "?user=admin&password=***&channel=1"),
        ("rtsp://door/user=admin_password=p_q_channel=1", "/user=admin_password=***"),
        ("rtsp://me:pw@door/1?pwd=x", "rtsp://***@door/1?pwd=***"),
    ],
)
def test_signatures_tokens_and_keys_are_not_shown(address: str, shown: str) -> None:
    assert fetch_module.without_secrets(address).endswith(shown)
    assert describe(address) == fetch_module.without_secrets(address)
    assert fetch_module.without_secrets(shown) == shown  # no address: a file may have such a name


def test_other_parameters_stay() -> None:
    address = "https://host/keys/passing.jpg?id=7&keyword=cat&design=a&monkey=2&size=3"
    assert fetch_module.without_secrets(address) == address


def test_a_failed_download_does_not_show_its_signature() -> None:
    with pytest.raises(RefineDetError, match=r"^http://127.0.0.1:9/a.jpg\?sig=\*\*\*: cannot be fetched"):
        fetch("http://127.0.0.1:9/a.jpg?sig=s3cret")
    with pytest.raises(RefineDetError, match="control characters") as caught:
        fetch("http://127.0.0.1:9/a b.jpg?sig=s3cret")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "ftp"])
def test_passwords_are_not_shown(scheme: str) -> None:
    address = f"{scheme}://me:s3cr@et@127.0.0.1:9/a.jpg"
    for call in (lambda: find_images([address]), lambda: fetch(address), lambda: read_image(address)):
        with pytest.raises(UsageError, match=rf"^{scheme}://\*\*\*@127.0.0.1:9/a.jpg: ") as caught:
            call()
        assert "s3cr" not in str(caught.value)
        assert "et@" not in str(caught.value)
    fetch_module.check_no_password("abfs://container@account.dfs.core.windows.net/a.jpg")  # a name, no password
    fetch_module.check_no_password("http://host:80/a:b@c.jpg")
