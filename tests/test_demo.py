"""The page on which a model can be tried: what it computes, and the page itself in a browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refinedet import cli
from refinedet.demo import MAX_PIXELS, look_at, show_boxes, show_steps
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError

EXAMPLES = Path(__file__).parents[1] / "examples"
CAT = str(EXAMPLES / "chelsea.jpg")


@pytest.fixture(scope="module")
def model() -> RefineDet:
    return RefineDet.from_pretrained("voc07-320-resnet18")


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.4, 1.0])
def test_a_threshold_that_moves_gives_what_a_new_prediction_gives(model: RefineDet, threshold: float) -> None:
    seen = look_at(model, CAT)
    drawn, rows = show_boxes(seen, threshold)
    expected = model.predict(CAT, threshold=threshold)
    assert [row[0] for row in rows] == expected.names
    np.testing.assert_allclose(np.reshape([row[2:] for row in rows], (-1, 4)), expected.boxes, atol=0.06)
    assert drawn is not None
    steps, text = show_steps(seen, threshold)
    again = model.explain(CAT, threshold=threshold)
    assert steps is not None
    assert text.splitlines()[:4] == again.table().splitlines()[:4]
    assert seen[2] is not None
    np.testing.assert_array_equal(seen[2].at(threshold).origins, again.origins)


def test_nothing_is_shown_of_nothing(tmp_path: Path, model: RefineDet) -> None:
    assert show_boxes(None, 0.4) == (None, [])
    assert show_steps(None, 0.4) == (None, "")
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("L", (side, side)).save(tmp_path / "large.png")
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (("large.png", "this file: image is too large"), ("text.jpg", "this file: not an image")):
        with pytest.raises(RefineDetError, match=message):
            look_at(model, str(tmp_path / name))


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for arguments, message in (
        (["--port", "0"], "--port must be from 1 to 65,535, not 0"),
        (["nothing-of-this-name"], "no model 'nothing-of-this-name'"),
        ([], "pip install 'refinedet[demo]'"),
    ):
        assert cli.main(["demo", *arguments]) > 0
        assert message in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """The address of a page that the command line serves."""
    pytest.importorskip("gradio")
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "refinedet", "demo", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "uploads")},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"http://127.0.0.1:{port}/  (Ctrl-C ends)\n", line + process.communicate()[1]
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


def status(address: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, data, headers or {}), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_only_this_machine_is_served_and_large_files_are_refused(page: str, tmp_path: Path) -> None:
    port = int(page.rpartition(":")[2])
    own = next((a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
    if not own.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((own, port), timeout=5)
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    for path in ("/etc/passwd", str(secret), str(EXAMPLES.parent / "pyproject.toml")):
        assert status(f"{page}/gradio_api/file={path}") == 403
    codes = []
    for megabytes in (1, 21):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + bytes(megabytes << 20)
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        codes.append(status(f"{page}/gradio_api/upload", body + b"\r\n--x--\r\n", headers))
    assert codes == [200, 413]
    # A second page on the same port is one line.
    again = subprocess.run(
        [sys.executable, "-m", "refinedet", "demo", "--port", str(port)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: --host 127.0.0.1 --port {port}: cannot be used (")
    assert len(again.stderr.splitlines()) == 1


@contextlib.contextmanager
def browser_page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": 1200})
            tab.set_default_timeout(60_000)
            yield tab
        finally:
            browser.close()


def wait_for(tab: Any, condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if condition():
            return
        tab.wait_for_timeout(200)
    raise AssertionError("the page never came to show it")


@pytest.mark.slow
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """An example, the threshold, the steps, a file of one's own and one that is no image; nothing comes from elsewhere.

    ``REFINEDET_SCREENSHOTS`` names a folder for pictures of what is seen.
    """
    with browser_page() as tab:
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page)

        def picture(name: str) -> None:
            if folder := os.environ.get("REFINEDET_SCREENSHOTS"):
                tab.screenshot(path=f"{folder}/{name}.png", full_page=True)

        def rows() -> list[str]:
            texts = tab.locator("[role=gridcell].first-column").all_inner_texts()
            return [text.strip() for text in texts if text.strip()]

        tab.locator(".gallery-item").nth(1).click()  # the cat
        wait_for(tab, lambda: rows() == ["cat"])
        picture("detections")
        number = tab.get_by_label("number input for Lowest score")
        number.fill("0.02")
        number.press("Enter")
        wait_for(tab, lambda: len(rows()) > 1)
        assert rows()[0] == "cat"
        picture("low-threshold")
        number.fill("1")
        number.press("Enter")
        wait_for(tab, lambda: "cat" not in rows())
        number.fill("0.4")
        number.press("Enter")
        tab.get_by_role("tab", name="See how RefineDet thinks").click()
        wait_for(tab, lambda: "6,375 anchors tiled" in tab.inner_text("body"))
        assert "post-process" in tab.inner_text("body")
        tab.wait_for_timeout(1000)  # until it has faded in
        picture("steps")
        tab.get_by_role("tab", name="Detections").click()
        tab.get_by_label("Remove Image").click()
        wait_for(tab, lambda: "cat" not in rows())
        tab.locator("input[type=file]").first.set_input_files(str(EXAMPLES / "astronaut.jpg"))
        wait_for(tab, lambda: rows()[:1] == ["person"])
        picture("own-file")
        tab.get_by_label("Remove Image").click()
        Image.new("L", (8000, 8000)).save(tmp_path / "large.png")
        tab.locator("input[type=file]").first.set_input_files(str(tmp_path / "large.png"))
        wait_for(tab, lambda: "image is too large (8000x8000)" in tab.inner_text("body"))
        picture("too-large")
        hosts = {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))}
        assert hosts == {page.split("/")[2]}
