"""Workers: their rows are those of ``predict``, and their death costs a repetition, not an image."""

from __future__ import annotations

import sys
import textwrap
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinedet import RefineDet
from refinedet.bulk import local, workers
from refinedet.bulk.local import run_local
from refinedet.bulk.worker import Worker, WorkerSettings
from refinedet.errors import RefineDetError

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = [str(EXAMPLES / f"{name}.jpg") for name in ("grace_hopper", "astronaut", "chelsea")]


def test_rows_are_those_of_predict(settings: WorkerSettings, tiny: Path, tmp_path: Path, one_thread: None) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    missing = str(tmp_path / "none.jpg")
    table = Worker(settings).detect([PHOTOS[0], str(broken), missing, *PHOTOS[1:]])
    rows = {row["path"]: row for row in table.to_pylist()}
    assert list(rows) == [PHOTOS[0], str(broken), missing, *PHOTOS[1:]]
    assert "broken.jpg: not an image" in rows[str(broken)]["error"]
    assert rows[missing]["error"] == f"{missing}: no such image file"
    model = RefineDet.from_pretrained(tiny)
    for batch in ([PHOTOS[0]], [PHOTOS[1]], [PHOTOS[2]]):  # the others took a place beside them
        for path, expected in zip(batch, model.predict(batch, threshold=0.1), strict=True):
            assert len(expected)
            np.testing.assert_array_equal(np.float32(rows[path]["scores"]), expected.scores)
            np.testing.assert_array_equal(np.float32(rows[path]["boxes"]), expected.boxes)
            assert (rows[path]["labels"], rows[path]["names"]) == (expected.labels.tolist(), expected.names)
            assert (rows[path]["width"], rows[path]["height"]) == expected.image_size
            assert rows[path]["model"] == "digest"


def test_an_image_that_the_detector_refuses_is_a_row(settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(settings)
    predict = worker._detector.predict_arrays

    def refuse(images: list[Any], **arguments: Any) -> Any:
        if any(image.shape == (512, 512, 3) for image in images):
            raise RefineDetError("needs more rounds")
        return predict(images, **arguments)

    monkeypatch.setattr(worker._detector, "predict_arrays", refuse)
    assert worker.detect(PHOTOS)["error"].to_pylist() == [None, "needs more rounds", None]


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers without a network: a path is answered by a row whose names are the paths of its group of two.

    A path with "slow" in it takes a moment; one with "deadly" kills the worker, one with "once" only the first time.
    """
    program = tmp_path / "worker.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, sys, time, pathlib
        from refinedet.bulk import worker
        from refinedet.bulk.parts import failed_row, table_of
        from refinedet.errors import RefineDetError

        class Worker:
            def __init__(self, settings):
                if settings.weights == "bad":
                    raise RefineDetError("bad weights")
                if settings.weights == "fatal":
                    os._exit(9)

            def detect(self, paths):
                print("noise on standard output")
                for path in paths:
                    mark = pathlib.Path({str(tmp_path)!r}, path)
                    if "deadly" in path or ("once" in path and not mark.exists()):
                        mark.touch()
                        os._exit(9)
                    if "slow" in path:
                        time.sleep(0.3)
                    if "odd" in path:
                        raise ValueError("odd")
                groups = [paths[start:start + 2] for start in range(0, len(paths), 2)]
                return table_of([failed_row(path, "+".join(group), "m") for group in groups for path in group])

        worker.Worker = Worker
        worker.main()
    """)
    )
    monkeypatch.setattr(local, "WORKER", (sys.executable, str(program)))
    return program


def answers(settings: WorkerSettings, tasks: list[list[str]], workers: int = 2) -> list[tuple[str, str]]:
    rows = [row for table in run_local(settings, tasks, ["cpu"] * workers) for row in table.to_pylist()]
    return [(row["path"], row["error"]) for row in rows]


def test_order_and_deaths(settings: WorkerSettings, fake_worker: Path) -> None:
    tasks = [["slow1", "b", "c"], ["d", "once1"], ["e", "once2"], ["f"], ["g"], ["h"]]
    assert answers(settings, tasks) == [
        ("slow1", "slow1+b"), ("b", "slow1+b"), ("c", "c"), ("d", "d+once1"), ("once1", "d+once1"), ("e", "e+once2"),
        ("once2", "e+once2"), ("f", "f"), ("g", "g"), ("h", "h"),
    ]  # fmt: skip


def test_a_deadly_image_is_one_row_and_the_other_groups_stay(settings: WorkerSettings, fake_worker: Path) -> None:
    result = answers(settings, [["a", "b", "deadly", "c", "d", "e"], ["f"]], workers=1)
    assert result[2][0] == "deadly"
    assert "died 3 times" in result[2][1]
    assert [*result[:2], *result[3:]] == [
        ("a", "a+b"), ("b", "a+b"), ("c", "c"), ("d", "d+e"), ("e", "d+e"), ("f", "f")
    ]  # fmt: skip


def test_workers_that_cannot_work(settings: WorkerSettings, fake_worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for weights, message in (("bad", "^bad weights$"), ("fatal", r"ended while it loaded the model \(exit code 9\)")):
        with pytest.raises(RefineDetError, match=message):
            answers(replace(settings, weights=weights), [["a"], ["b"]])
    with pytest.raises(RefineDetError, match=r"a worker process failed .ValueError: odd"):
        answers(settings, [["odd"]])
    monkeypatch.setattr(workers, "MOST_GIVEN_UP", 1)
    with pytest.raises(RefineDetError, match="die again and again, the last time on deadly2"):
        answers(settings, [["deadly1"], ["deadly2"]], workers=1)


def test_nothing_is_left_when_the_caller_stops(
    settings: WorkerSettings, fake_worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = local.subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(local.subprocess, "Popen", noted)
    tasks = ([f"slow{index}"] for index in range(1000))
    with closing(run_local(settings, tasks, ["cpu", "cpu"])) as tables:
        next(tables)
    assert len(started) == 2
    assert [process.wait(10) for process in started] == [-9, -9]


def test_a_worker_ends_with_its_input(settings: WorkerSettings, fake_worker: Path) -> None:
    process = local._Process(settings)._process
    began = time.monotonic()
    assert process.communicate(timeout=20)[0] == b""
    assert process.returncode == 0
    assert time.monotonic() - began < 20
