"""Actors of Ray: the rows of the engine of one machine, whatever happens to an actor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refinedet import batch, cli
from refinedet.bulk import ray_engine
from refinedet.errors import RefineDetError, UsageError

EXAMPLES = Path(__file__).parents[2] / "examples"


def rows_of(folder: Path) -> Any:
    return pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("*.parquet"))]).sort_by("path")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty-four images, one of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ("grace_hopper.jpg", "astronaut.jpg", "chelsea.jpg")
    for index in range(24):
        (folder / f"{index:02d}.jpg").symlink_to(EXAMPLES / names[index % 3])
    (folder / "07.jpg").unlink()
    (folder / "07.jpg").write_bytes(b"broken")
    return folder


def test_calls_without_ray_are_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["batch", str(tiny), str(EXAMPLES), "--out", str(tmp_path / "out")]
    assert cli.main([*call, "--address", "auto"]) == 2
    assert "address is that of a Ray cluster; it needs the engine 'ray'" in capsys.readouterr().err
    assert cli.main([*call, "--engine", "ray", "--device", "mps"]) == 2
    assert "workers of Ray compute on 'cpu' or 'cuda'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main([*call, "--engine", "ray"]) == 2
    assert "--engine ray needs Ray: pip install 'refinedet[ray]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine with three CPUs, whatever it has."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_rows_are_those_of_one_machine(
    tiny: Path, photos: Path, tmp_path: Path, cluster: Any, one_thread: None
) -> None:
    options: dict[str, Any] = {"threshold": 0.1, "batch_size": 2, "workers": 2, "device": "cpu"}
    result = batch(tiny, photos, tmp_path / "ray", engine="ray", **options)
    assert (result.images, result.failed, result.new) == (24, 1, 24)
    batch(tiny, photos, tmp_path / "local", **options)
    assert rows_of(tmp_path / "ray").equals(rows_of(tmp_path / "local"))
    # Done is done, by either engine.
    assert batch(tiny, photos, tmp_path / "ray", **options).new == 0
    assert batch(tiny, photos, tmp_path / "local", engine="ray", **options).new == 0
    with pytest.raises(UsageError, match="--workers 9, but Ray has only 3 CPUs for them"):
        batch(tiny, photos, tmp_path / "other", engine="ray", workers=9)


@pytest.mark.slow
def test_actors_that_die_cost_a_repetition(tiny: Path, photos: Path, tmp_path: Path, cluster: Any) -> None:
    options: dict[str, Any] = {"threshold": 0.1, "batch_size": 1, "workers": 2, "device": "cpu"}
    batch(tiny, photos, tmp_path / "calm", **options)
    stop = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not stop.wait(0.3) and len(killed) < 4:
            for pid in [pid for pid in _pids("ray::_Actor") if pid not in killed][:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        result = batch(tiny, photos, tmp_path / "disturbed", engine="ray", **options)
    finally:
        stop.set()
        thread.join()
    assert killed, "no actor was there to be killed"
    assert result.images == 24
    assert rows_of(tmp_path / "disturbed").equals(rows_of(tmp_path / "calm"))


def _pids(name: str) -> list[int]:
    listed = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in listed.split()]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_errors_of_actors(photos: Path, tmp_path: Path) -> None:
    tasks = iter([[str(photos / "00.jpg")]])
    settings = ray_engine.WorkerSettings(str(tmp_path / "gone"), "digest", "cpu", 1, 0.1, 1, None)
    with pytest.raises(RefineDetError, match=r"cannot load the model .* every machine must see its files"):
        list(ray_engine.run_ray(settings, tasks, 1, None))
    assert list(ray_engine.run_ray(settings, iter([]), 1, None)) == []
