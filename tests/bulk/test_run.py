"""``batch`` from the call to the folder: every image once, whatever stopped it, and nothing done twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refinedet import batch, cli, read_batch
from refinedet.bulk.run import list_paths
from refinedet.errors import RefineDetError, UsageError
from refinedet.locks import lock_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = ("grace_hopper.jpg", "astronaut.jpg", "chelsea.jpg")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of seven photos in two subfolders, with a broken one among them."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for index in range(6):
        (folder / ("deep" if index % 2 else ".") / f"{index}.jpg").symlink_to(EXAMPLES / PHOTOS[index % 3])
    (folder / "3x.jpg").write_bytes(b"broken")
    return folder


def sorted_rows(folder: Path) -> Any:
    return pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("*.parquet"))]).sort_by("path")


@pytest.mark.slow  # starts a server, and workers
def test_an_object_store(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With s3fs, and a server of moto in the place of S3."""
    pytest.importorskip("s3fs")
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "a"),
                            ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_DEFAULT_REGION", "us-east-1")):  # fmt: skip
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in photos.rglob("*.jpg"):
            client.upload_file(str(path), "bucket", f"photos/{path.relative_to(photos)}")
        call = ["batch", str(tiny), "s3://bucket/photos", "--threshold", "0.1", "--workers", "2", "--batch-size", "2"]
        assert cli.main([*call, "--out", str(tmp_path / "remote")]) == 1
        output = capfd.readouterr()
        assert output.err.startswith("error: s3://bucket/photos/3x.jpg: not an image")
        assert cli.main([*call, "--out", str(tmp_path / "remote")]) == 1  # all is done
        assert "0 new, 1 failed" in capfd.readouterr().out
        assert cli.main([*call[:2], "s3://no-such-bucket/a", "--out", str(tmp_path / "none")]) in (1, 2)
        assert capfd.readouterr().err.startswith("error: s3://no-such-bucket/a: ")
    finally:
        server.stop()
    assert cli.main([*call[:2], str(photos), *call[3:], "--out", str(tmp_path / "local")]) == 1
    remote, local = (sorted_rows(tmp_path / name).to_pylist() for name in ("remote", "local"))
    for one, other in zip(remote, local, strict=True):
        assert one.pop("path").removeprefix("s3://bucket/photos/") == os.path.relpath(other.pop("path"), photos)
        assert (one.pop("error") is None) == (other.pop("error") is None)
        assert one == other


def names(tasks: list[list[str]]) -> list[list[str]]:
    return [[os.path.basename(path) for path in task] for task in tasks]


def test_the_command(
    tiny: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], in_process: list[list[str]]
) -> None:
    out = tmp_path / "out"
    arguments = ["batch", str(tiny), str(photos), "--threshold", "0.1", "--batch-size", "2", "--out", str(out)]
    assert cli.main([*arguments, "--rows-per-part", "2"]) == 1
    output = capfd.readouterr()
    assert output.out.startswith(f"7 images in {out}: 7 new, ")
    assert output.out.endswith(" images/s, 1 failed\n")
    assert output.err == f"error: {photos}/3x.jpg: not an image, or of a format that is not read\n"
    assert sorted_rows(out)["path"].to_pylist() == sorted(str(path) for path in photos.rglob("*.jpg"))
    assert names(in_process) == [["0.jpg", "2.jpg"], ["3x.jpg", "4.jpg"], ["1.jpg", "3.jpg"], ["5.jpg"]]
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(before) == 4
    assert cli.main(arguments) == 1  # the broken one is still broken
    assert capfd.readouterr().out == f"7 images in {out}: 0 new, 1 failed\n"
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")} == before
    assert cli.main(["batch", str(tiny), str(photos / "0.jpg"), "--out", str(tmp_path / "good")]) == 0
    assert cli.main(["batch", str(tiny), str(photos), "--out", str(photos)]) == 2
    assert "holds no batch prediction" in capfd.readouterr().err


def test_processes_give_the_rows_of_one(
    tiny: Path, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The one test here that starts worker processes."""
    settings: dict[str, Any] = {"threshold": 0.1, "batch_size": 2, "workers": 2, "rows_per_part": 2}
    seen: list[tuple[int, int]] = []
    result = batch(tiny, photos, tmp_path / "two", on_progress=lambda *now: seen.append(now), **settings)
    assert (result.images, result.new, result.failed, len(result.errors)) == (7, 7, 1, 1)
    assert seen == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]
    assert len(list(read_batch(tmp_path / "two"))) == 6
    assert len(request.getfixturevalue("in_process")) == 0
    batch(tiny, photos, tmp_path / "one", **settings)
    assert sorted_rows(tmp_path / "two").equals(sorted_rows(tmp_path / "one"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RefineDetError])
def test_a_stopped_run_goes_on(
    stop: type[BaseException], tiny: Path, photos: Path, tmp_path: Path, in_process: list[list[str]]
) -> None:
    def stopping(done: int, total: int) -> None:
        if done == 4:
            raise stop("now")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    batch(tiny, photos, whole, threshold=0.1, batch_size=2, rows_per_part=2)
    in_process.clear()
    with pytest.raises(stop, match=r"^(4 of 7 images are done; the same command goes on|now)$"):
        batch(tiny, photos, parts, threshold=0.1, batch_size=2, rows_per_part=2, on_progress=stopping)
    assert names(in_process) == [["0.jpg", "2.jpg"], ["3x.jpg", "4.jpg"]]
    result = batch(tiny, photos, parts, threshold=0.1, batch_size=2, rows_per_part=100)
    assert names(in_process[2:]) == [["1.jpg", "3.jpg", "5.jpg"]]
    assert (result.images, result.new) == (7, 3)
    assert sorted_rows(parts).equals(sorted_rows(whole))
    shutil.copy(EXAMPLES / PHOTOS[0], photos / "new.jpg")
    assert batch(tiny, photos, parts, threshold=0.1).new == 1
    assert names(in_process)[-1] == ["new.jpg"]


def test_refusals(tiny: Path, photos: Path, tmp_path: Path, in_process: list[list[str]]) -> None:
    out = tmp_path / "out"
    batch(tiny, photos / "0.jpg", out, threshold=0.1)
    other = shutil.copytree(tiny, tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"cat"', '"cow"'))
    wrong: dict[str, Callable[[], Any]] = {
        "another model": lambda: batch(other, photos, out, threshold=0.1),
        "--threshold 0.1, not 0.2": lambda: batch(tiny, photos, out, threshold=0.2),
        "holds no batch prediction": lambda: batch(tiny, photos, photos),
        "no such file": lambda: batch(tiny, tmp_path / "none", out, threshold=0.1),
        "threshold must be between": lambda: batch(tiny, photos, out, threshold=2),
        "batch_size must be at least 1": lambda: batch(tiny, photos, out, batch_size=0),
        "engine must be one of": lambda: batch(tiny, photos, out, engine="spark"),  # type: ignore[arg-type]
        "no model": lambda: batch("no-such-model", photos, out),
    }
    for message, call in wrong.items():
        with pytest.raises(UsageError, match=message):
            call()
    with lock_folder(out, "batch"), pytest.raises(UsageError, match="another batch is writing there"):
        batch(tiny, photos, out, threshold=0.1)
    assert len(in_process) == 1


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    lines = ["a.jpg", "../b c.jpg", "", "/abs/d.jpg", "http://host/e.jpg"]
    expected = [f"{tmp_path}/lists/a.jpg", f"{tmp_path}/b c.jpg", "/abs/d.jpg", "http://host/e.jpg"]
    (tmp_path / "lists/names.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert list_paths("lists/names.txt") == expected
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "path": [line for line in lines if line]}), "lists/names.parquet")
    assert list_paths(Path("lists/names.parquet")) == expected
    pq.write_table(pa.table({"id": [1]}), "lists/other.parquet")
    (tmp_path / "lists/secret.txt").write_text("http://host/a.jpg\nhttp://me:s3cret@host/b.jpg\n")
    with pytest.raises(UsageError, match=r"^http://\*\*\*@host/b.jpg: addresses with a password"):
        list_paths("lists/secret.txt")
    (tmp_path / "lists/empty.txt").write_text("\n")
    (tmp_path / "lists/damaged.parquet").write_text("x")
    for name in ("other.parquet", "empty.txt", "damaged.parquet"):
        with pytest.raises(UsageError, match=rf"lists/{name}: ") as raised:
            list_paths(f"lists/{name}")
        assert "\n" not in str(raised.value)
    (tmp_path / "x.jpg").write_text("")
    assert list_paths(["x.jpg", tmp_path]) == [f"{tmp_path}/x.jpg"] * 2
