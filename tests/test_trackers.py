"""TensorBoard, Weights & Biases and MLflow: against the packages where they are installed, else against a recorder."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refinedet.errors import RefineDetError, UsageError
from refinedet.loggers import LoggerGroup
from refinedet.trackers import TRACKERS, MLflowLogger, TensorBoardLogger, WandbLogger, check_trackers, open_trackers

SETTINGS = {"model": {"image_size": [320, 320]}, "train": {"learning_rate": 0.001}, "summary": "for tests"}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLogger(tmp_path / "tb", settings=SETTINGS)
    log.log(1, {"loss": 1.5})
    log.close()
    log = TensorBoardLogger(tmp_path / "tb", resume_step=1, settings=SETTINGS)
    log.log(2, {"loss": 1.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5), (2, 1.25)]
    (text,) = events.Tensors("settings/text_summary")
    assert "| train.learning_rate | 0.001 |" in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"^[\w &]+ is not installed: pip install 'refinedet\[{name}\]'$"
    with pytest.raises(UsageError, match=message):
        check_trackers([name])
    with pytest.raises(UsageError, match=message):
        TRACKERS[name](tmp_path / name)
    with pytest.raises(UsageError, match=message):
        open_trackers([name], tmp_path, None, {})
    if name == "tensorboard":  # nobody asked for it
        assert open_trackers([], tmp_path, None, {}) == []
    assert not (tmp_path / name).exists()


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="unknown logger 'wandv': did you mean 'wandb'"):
        check_trackers(["wandv"])


class FakeWandb:
    """Records the calls that the package documents: ``wandb.init``, ``Run.log`` and ``Run.finish``."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **given: Any) -> Any:
        self.calls.append(("init", given))
        return SimpleNamespace(
            id=given["id"] or "abc123",
            log=lambda values, step: self.calls.append((step, values)),
            finish=lambda: self.calls.append("finish"),
        )


def test_wandb_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "run-a" / "wandb"
    with LoggerGroup([WandbLogger(folder, settings=SETTINGS)]) as log:
        log.log(3, {"loss": 1.5})
    with LoggerGroup([WandbLogger(folder, resume_step=3)]) as log:
        log.log(4, {"mAP": 0.5})
    WandbLogger(folder).close()
    assert [call for call in fake.calls if call[0] != "init"] == [
        (3, {"loss": 1.5}), "finish", (4, {"mAP": 0.5}), "finish", "finish"
    ]  # fmt: skip
    first, resumed, anew = [call[1] for call in fake.calls if call[0] == "init"]
    assert (first["project"], first["name"], first["dir"]) == ("refinedet", "run-a", str(tmp_path / "run-a"))
    assert (first["config"], first["resume"]) == (SETTINGS, "allow")
    assert (first["id"], resumed["id"], anew["id"]) == (None, "abc123", None)


class FakeMlflow:
    """Records the calls of the fluent interface that the package documents."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start_run(self, run_id: str | None = None, run_name: str | None = None, nested: bool = False) -> Any:
        self.calls.append(("start", run_id, run_name, nested))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "42ab"))

    def log_params(self, params: dict[str, Any]) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, *, run_id: str | None = None) -> None:
        self.calls.append((run_id, step, metrics))

    def end_run(self) -> None:
        self.calls.append("end")


def test_mlflow_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    folder = tmp_path / "run-a" / "mlflow"
    log = MLflowLogger(folder, settings=SETTINGS)
    log.log(3, {"loss": 1.5})
    log.close()
    log.close()
    MLflowLogger(folder, resume_step=3, settings=SETTINGS)
    assert fake.calls == [
        ("start", None, "run-a", True),
        ("params", {"model.image_size": [320, 320], "train.learning_rate": 0.001, "summary": "for tests"}),
        ("42ab", 3, {"loss": 1.5}),
        "end",
        ("start", "42ab", "run-a", True),
    ]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_a_service_says_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the training it is an error; on the way the log is given up and the training continues."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\n  to host")

    run = SimpleNamespace(id="1", info=SimpleNamespace(run_id="1"), log=fail, finish=fail)
    working = SimpleNamespace(
        init=lambda **_: run, start_run=lambda **_: run, log_params=lambda _: None, log_metrics=fail, end_run=fail
    )
    monkeypatch.setitem(sys.modules, name, working)  # type: ignore[arg-type]
    with LoggerGroup(open_trackers([name], tmp_path, None, {})[-1:]) as group:
        group.log(1, {"loss": 1.0})
        group.log(2, {"loss": 1.0})
    (message,) = caplog.messages
    assert re.fullmatch(r"[\w &]+: no route to host; the training continues without this log", message)

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=fail, start_run=fail))  # type: ignore[arg-type]
    with pytest.raises(RefineDetError, match=r"^[\w &]+: no route to host; (log in with 'wandb login'|see MLFLOW_)"):
        open_trackers([name], tmp_path, None, {})


def test_a_service_that_fails_at_the_end_does_not_hide_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise ConnectionError("no route to host")

    run = SimpleNamespace(id="1", log=lambda values, step: None, finish=fail)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))  # type: ignore[arg-type]
    with LoggerGroup([WandbLogger(tmp_path / "wandb")]) as group:
        group.log(1, {"loss": 1.0})


def test_wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real package writes a run with our numbers into the run folder, and a resumed one under the same id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume_step in (None, 1):
        log = WandbLogger(tmp_path / "run-a/wandb", resume_step=resume_step, settings=SETTINGS)
        log.log(1, {"loss": 1.5})
        log.log(2, {"loss": 1.25, "mAP": 0.5})
        log.close()
        log.close()
    run_id = (tmp_path / "run-a/wandb/run-id").read_text()
    files = list((tmp_path / "run-a/wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    assert all(b"learning_rate" in file.read_bytes() and b"mAP" in file.read_bytes() for file in files)


def test_mlflow_in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as outer:
        for resume_step, step in ((None, 1), (1, 2)):
            log = MLflowLogger(tmp_path / "run-a/mlflow", resume_step=resume_step, settings=SETTINGS)
            log.log(step, {"loss": 1.0 / step})
            log.close()
        assert mlflow.active_run().info.run_id == outer.info.run_id  # the caller's own is still open
    run_id = (tmp_path / "run-a/mlflow/run-id").read_text()
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    run = mlflow.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("run-a", "FINISHED")
    assert json.loads(run.data.params["train.learning_rate"]) == 0.001
