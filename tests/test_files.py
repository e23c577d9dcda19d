from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conftest import FullDisk
from refinedet import RefineDet, files
from refinedet.draw import write_image
from refinedet.errors import RefineDetError, UsageError

SIGNATURE = "detections written by refinedet"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Paths of the user ---------------------------------------------------------------------------------------------------


def test_user_path_expands_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert files.user_path("~/photos") == Path("/home/somebody/photos")
    assert files.user_path("a/~b") == Path("a/~b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text"),
        ("~nosuch-user/x", r"no user of that name; write \./~nosuch-user/x"),
        ("a/" + "b" * 256 + "/c", "a name of 256 bytes"),
        ("ä" * 128, "a name of 256 bytes"),
        ("a/" * 2048 + "b", "a path of 4097 bytes"),
        ("a\0b", "NUL"),
        ("a\ud800b", "surrogate"),
    ],
)
def test_paths_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        files.user_path(text)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, b"photos", ["photos"]])
def test_what_is_no_path_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="a path is a text or"):
        files.user_path(value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a path is a text or"):
        RefineDet.from_pretrained(value)  # type: ignore[arg-type]


def test_longest_name_is_taken(tmp_path: Path) -> None:
    path = files.user_path(tmp_path / ("n" * 251 + ".txt"))
    files.check_output(path, ours=SIGNATURE)
    files.write_text(path, "a")
    assert path.read_text() == "a"


# What may be replaced ------------------------------------------------------------------------------------------------


def test_signed_files_are_recognised_and_others_are_not(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    files.write_text(tmp_path / "object.json", files.json_text({"a": 1}, SIGNATURE))
    files.write_text(tmp_path / "list.json", files.json_text([1, 2], SIGNATURE))
    files.write_text(tmp_path / "page.html", f"<!DOCTYPE html>\n<!-- {SIGNATURE} -->\n")
    write_image(tmp_path / "a.jpg", pixels, SIGNATURE)
    write_image(tmp_path / "a.png", pixels, SIGNATURE)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.comment = SIGNATURE.encode()
        archive.writestr("x", "y")
    with (tmp_path / "a.tar.gz").open("wb") as raw, gzip.GzipFile(SIGNATURE, "wb", fileobj=raw) as compressed:
        compressed.write(b"x")
    ours = sorted(tmp_path.iterdir())
    assert len(ours) == 7
    for path in ours:
        assert files.check_output(path, ours=SIGNATURE) == path
        if path.name != "list.json":  # white space names nobody
            with pytest.raises(UsageError, match="was not written by this command"):
                files.check_output(path, ours="report written by refinedet")
    for name, text in (
        ("foreign-object.json", json.dumps({"a": 1, "generator": SIGNATURE})),
        ("foreign-list.json", json.dumps([SIGNATURE])),
        ("notes.md", "x" * 300 + SIGNATURE),
        ("model.json", json.dumps({"format": "refinedet"})),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=f"{name}: exists and was not written by this command"):
            files.check_output(tmp_path / name, ours=SIGNATURE)
        assert (tmp_path / name).read_text() == text
    assert json.loads((tmp_path / "list.json").read_text()) == [1, 2]
    assert json.loads((tmp_path / "object.json").read_text()) == {"generator": SIGNATURE, "a": 1}


def test_empty_file_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made-by-mktemp"
    path.touch()
    files.check_output(path, ours=SIGNATURE)


def test_inputs_are_refused_under_every_name(tmp_path: Path) -> None:
    photo = tmp_path / "photo.json"
    files.write_text(photo, files.json_text([], SIGNATURE))  # ours, but read by this call
    (tmp_path / "link").symlink_to(photo)
    os.link(photo, tmp_path / "hard")
    for path in (photo, tmp_path / "link", tmp_path / "hard", tmp_path / "." / "photo.json"):
        with pytest.raises(UsageError, match="is an input of this command"):
            files.check_output(path, inputs=["nowhere", photo], ours=SIGNATURE)
    with pytest.raises(UsageError, match="is an input of this command"):
        files.check_output_folder(tmp_path, inputs=[tmp_path], ours=SIGNATURE)


def test_folders_and_names_in_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        files.check_output(tmp_path, ours=SIGNATURE)
    (tmp_path / "config.json").write_text("{}")
    files.check_output_folder(tmp_path, ["other.json"], ours=SIGNATURE)
    files.check_output_folder(tmp_path / "new" / "deep", ["config.json"], ours=SIGNATURE)
    with pytest.raises(UsageError, match=r"config\.json: exists"):
        files.check_output_folder(tmp_path, ["config.json"], ours=SIGNATURE)
    with pytest.raises(RefineDetError, match="the folder cannot be made"):
        files.check_output_folder(tmp_path / "config.json" / "x", ours=SIGNATURE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_what_cannot_be_written_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RefineDetError, match="loop"):
        files.check_output(tmp_path / "loop", ours=SIGNATURE)
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(RefineDetError, match=r"r\.json: cannot be written .*Read-only file system"):
        files.check_output(tmp_path / "deep" / "r.json", ours=SIGNATURE)


def test_sockets_are_refused(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(UsageError, match="not a regular file"):
            files.check_output(path, ours=SIGNATURE)
    assert stat.S_ISSOCK(path.stat().st_mode)


# Streams -------------------------------------------------------------------------------------------------------------


def test_devices_are_written_to(tmp_path: Path) -> None:
    device = Path("/dev/null")
    before = device.stat()
    files.check_output(device, ours=SIGNATURE)
    files.write_text(device, "text")
    assert device.stat().st_ino == before.st_ino
    assert stat.S_ISCHR(device.stat().st_mode)


def test_pipes_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    files.check_output(pipe, ours=SIGNATURE)
    files.write_text(pipe, "text")
    reader.join(10)
    assert read == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "FILE"])
def test_standard_output(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    program = (
        "import sys; from pathlib import Path; from refinedet import files\n"
        "path = Path(sys.argv[1]); print('before')\n"
        "files.check_output(path, ours='x'); files.write_text(path, 'text\\n'); print('after')"
    )
    with out.open("w") as stream:
        subprocess.run([sys.executable, "-c", program, name.replace("FILE", str(out))], stdout=stream, check=True)
    assert out.read_text() == "before\ntext\nafter\n"


# How it is written ---------------------------------------------------------------------------------------------------


def test_permissions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    files.write_text(path, "a")
    assert mode_of(path) == 0o600
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new", "a")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new") == 0o640


def test_symlinks_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, dangling = tmp_path / "elsewhere" / "a", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "elsewhere" / "b")
    for path in (link, dangling):
        files.write_text(path, "new")
        assert path.is_symlink()
    assert target.read_text() == (tmp_path / "elsewhere" / "b").read_text() == "new"


def test_planted_part_files_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr("tempfile._get_candidate_names", lambda: names)
    (tmp_path / ".r.json.aaaaaaaa.part").symlink_to(victim)
    files.write_text(tmp_path / "r.json", "new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "r.json").read_text() == "new"


def test_full_disk_is_named_and_the_file_kept(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with (
        full_disk(1000),
        pytest.raises(RefineDetError, match=r"a: cannot be saved \(disk full.*; the previous file is"),
    ):
        files.write_text(path, "x" * 2000)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    if os.path.exists("/dev/full"):
        with pytest.raises(RefineDetError, match=r"/dev/full: cannot be saved \(disk full\)$"):
            files.write_text(Path("/dev/full"), "a")


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    path = tmp_path / "names.json"
    files.write_text(path, files.json_text([name, "ü"], SIGNATURE))
    assert os.fsencode(json.loads(path.read_text(encoding="utf-8"))[0]) == b"caf\xe9.jpg"
    assert "ü" in path.read_text(encoding="utf-8")


def test_stale_parts_are_removed_and_living_ones_stay(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from refinedet import files\n"
        "def write(part): part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_atomically(Path(sys.argv[1]), write)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.ckpt")], check=False)
    (tmp_path / "notes.part").write_text("the user's")
    (left,) = tmp_path.glob(".*")

    def while_writing(part: Path) -> None:
        part.write_text("whole")
        assert files.remove_stale_parts(tmp_path) == 1
        assert part.exists()
        assert not left.exists()

    files.write_atomically(tmp_path / "b.ckpt", while_writing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.ckpt", "notes.part"]
    assert files.remove_stale_parts(tmp_path / "absent") == 0
