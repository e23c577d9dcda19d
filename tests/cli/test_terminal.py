"""Commands whose terminal, disk or reader fails end with a code and a line, never with a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refinedet import cli
from refinedet.cli import terminal
from refinedet.text import printable

PROGRAM = """
import sys, time, types
import numpy as np
from refinedet.config import ModelConfig
from refinedet.detections import Detections

class Detector:
    class_names = ("cat", "dog")
    config = ModelConfig(num_classes=2)
    def predict_arrays(self, images, *, threshold=None):
        time.sleep(float({delay!r}))
        return [Detections([[0, 0, 9, 9]], [0.75], [1], self.class_names, i.shape[1::-1]) for i in images]

detector, device = types.ModuleType("refinedet.detector"), types.ModuleType("refinedet.device")
detector.RefineDet = types.SimpleNamespace(from_pretrained=lambda name, device: Detector())
device.pick_device = lambda name: name
sys.modules.update({{"refinedet.detector": detector, "refinedet.device": device}})
from refinedet.cli import main
raise SystemExit(main(sys.argv[1:]))
"""
"""The command line with a detector that needs neither torch nor weights."""


def started(arguments: list[object], *, delay: float = 0, shell: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """The command ``predict stub ...`` in a process of its own, without the traceback that tests ask for."""
    environment = {**os.environ, **options.pop("env", {})}
    environment.pop("REFINEDET_DEBUG", None)
    command: Any = [sys.executable, "-c", PROGRAM.format(delay=delay), "predict", "stub", *map(str, arguments)]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=environment, **options)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in (out or b"") + (err or b""), err
    return process.returncode, (out or b"").decode("utf-8", "replace"), (err or b"").decode("utf-8", "replace")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Forty small images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (40, 30)).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


def results_in(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# What stops a prediction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")],
)
def test_stopped_prediction_keeps_its_results(
    photos: list[Path], tmp_path: Path, number: int, expected: int, word: str
) -> None:
    whole, lines = tmp_path / "r.json", tmp_path / "r.jsonl"
    process = started([*photos, "--json", whole, "--jsonl", lines, "--batch-size", 1], delay=0.1)
    while not lines.exists() or lines.read_bytes().count(b"\n") < 4:
        time.sleep(0.02)
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == expected
    kept = results_in(whole)["images"]
    assert 3 <= len(kept) < 40
    assert err == f"error: {word}: {len(kept)} of 40 images were done; their results are saved\n"
    assert [image["source"] for image in kept] == [str(path) for path in photos[: len(kept)]]
    header, *rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert header["class_names"] == ["cat", "dog"]
    assert rows == kept


def test_killed_prediction_keeps_its_lines(photos: list[Path], tmp_path: Path) -> None:
    lines = tmp_path / "r.jsonl"
    process = started([*photos, "--jsonl", lines, "--batch-size", 1], delay=0.1)
    while not lines.exists() or lines.read_bytes().count(b"\n") < 4:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["source"] for row in rows[1:4]] == [str(path) for path in photos[:3]]


def test_reader_that_went_away(photos: list[Path], tmp_path: Path) -> None:
    reader, unread = os.pipe()
    os.close(reader)
    code, _, err = ended(started(photos, stdout=unread))
    assert (code, err) == (141, "")
    # Where other outputs are asked for, the work goes on.
    code, _, err = ended(started([*photos, "--json", tmp_path / "r.json"], stdout=unread))
    assert (code, err) == (0, "")
    assert len(results_in(tmp_path / "r.json")["images"]) == 40
    os.close(unread)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_standard_output(photos: list[Path], tmp_path: Path) -> None:
    line = "error: standard output: cannot be written (disk full)\n"
    assert ended(started(photos, shell="> /dev/full")) == (1, "", line)
    assert ended(started([*photos, "--json", tmp_path / "r.json"], shell="> /dev/full")) == (1, "", line)
    assert len(results_in(tmp_path / "r.json")["images"]) == 40
    code, _, err = ended(started([*photos, "--jsonl", "/dev/full"]))
    assert (code, err) == (1, "error: /dev/full: cannot be written (disk full)\n")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&- <&-"])
def test_closed_standard_streams(closed: str, photos: list[Path], tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    code, _, err = ended(started([*photos[:2], broken, "--json", result], shell=closed))
    assert code == 1
    content = results_in(result)
    assert (len(content["images"]), len(content["failed"])) == (2, 1)
    assert err in ("", f"error: {content['failed'][0]['error']}\n")


def test_disk_full_in_the_middle(photos: list[Path], tmp_path: Path) -> None:
    lines = tmp_path / "r.jsonl"
    code, _, err = ended(started([*photos, "--jsonl", lines], shell="", preexec_fn=_small_files))
    assert code == 1
    assert err == f"error: {lines}: cannot be written (disk full, or the file is larger than allowed)\n"
    complete = lines.read_bytes().rpartition(b"\n")[0].splitlines()
    assert len([json.loads(line) for line in complete]) > 5


def _small_files() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))


# Names and text ------------------------------------------------------------------------------------------------------


def test_any_name_is_carried_through(tmp_path: Path) -> None:
    names = [b"caf\xe9.png", b"line\nbreak.png", b"\x1b[31mred.png", "ünï.png".encode()]
    paths = []
    for name in names:
        path = tmp_path / os.fsdecode(name)
        Image.new("RGB", (40, 30)).save(path)
        paths.append(path)
    process = started(
        [*paths, "--json", tmp_path / "r.json", "--save", tmp_path / "out", "--jsonl", tmp_path / "r.jsonl"],
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    code, out, err = ended(process)
    assert (code, err) == (0, "")
    assert out.isascii()
    assert "\x1b" not in out
    assert r"line\nbreak.png" in out
    assert r"\x1b[31mred.png" in out
    sources = [os.fsencode(image["source"]) for image in results_in(tmp_path / "r.json")["images"]]
    assert [os.path.basename(source) for source in sources] == names
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert [os.fsencode(json.loads(line)["source"]) for line in lines[1:]] == sources
    copies = [os.fsencode(path.name) for path in (tmp_path / "out").iterdir()]
    assert sorted(copies) == sorted(names)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo ü 漢.jpg", "photo ü 漢.jpg"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[2J\x9b", r"\x1b[2J\x9b"),
        ("a\u202egpj.exe", r"a\u202egpj.exe"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("\u2028", r"\u2028"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


# The last net --------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the verb models raise an error."""

    def make(error: BaseException) -> None:
        def models() -> int:
            raise error

        monkeypatch.setitem(cli.VERBS, "models", models)

    return make


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: out of memory; try a smaller --batch-size or smaller images"),
        (
            RecursionError("deep"),
            "error: unexpected RecursionError (deep); this is a fault of refinedet: please report",
        ),
        (KeyError("\x1b[31m\nx"), r"error: unexpected KeyError ('\x1b[31m\nx'); this is a fault of refinedet"),
        (OSError(28, "No space left on device"), "error: standard output: cannot be written (disk full)"),
        (OSError(28, "No space left on device", "a/b.csv"), "error: a/b.csv: disk full"),
        (PermissionError(13, "Permission denied", b"a/b.csv"), "error: a/b.csv: Permission denied"),
        (OSError(11, "Resource temporarily unavailable"), "error: unexpected BlockingIOError"),
    ],
)
def test_unexpected_errors_are_one_line(
    error: Exception, line: str, failing: Callable[[BaseException], None], refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("REFINEDET_DEBUG")
    monkeypatch.setattr(terminal, "_discard", lambda stream: None)
    failing(error)
    assert refused(["models"], 1).startswith(line)


def test_warnings_of_libraries_are_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def models() -> int:
        for _ in range(3):
            warnings.warn_explicit("Corrupt EXIF data.\n Expecting more", UserWarning, "/x/PIL/TiffImagePlugin.py", 900)
        warnings.warn_explicit("old", DeprecationWarning, "/x/torch/a.py", 1)
        return 0

    monkeypatch.delenv("REFINEDET_DEBUG")
    monkeypatch.setitem(cli.VERBS, "models", models)
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().err == "note: Pillow says: Corrupt EXIF data. Expecting more\n"


def test_log_of_the_library_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    def models() -> int:
        logging.getLogger("refinedet.training").info("split: 51 train")
        logging.getLogger("refinedet.training").warning("a class\nwith few objects")
        logging.getLogger("somebody.else").warning("not ours")
        return 0

    monkeypatch.setitem(cli.VERBS, "models", models)
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().err.startswith("split: 51 train\nnote: a class with few objects\n")
