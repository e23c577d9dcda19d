"""The numbers of a training for TensorBoard, Weights & Biases and MLflow: loggers whose packages are extras.

``train`` and the command line find them by name in ``TRACKERS``. Each has a folder of its name in the run folder.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from refinedet.dataclass_json import flatten
from refinedet.errors import RefineDetError, UsageError, did_you_mean
from refinedet.files import make_folder, write_text
from refinedet.loggers import Logger
from refinedet.text import reason


class TensorBoardLogger:
    """Scalars for TensorBoard (needs the extra ``refinedet[tensorboard]``).

    Args:
        folder: Where the event files go; created if needed.
        resume_step: None for a new run; otherwise TensorBoard hides what was logged after this iteration.
        settings: Shown as a text of a new run.

    Raises:
        UsageError: tensorboard is not installed.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        tensorboard = _package("tensorboard")
        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = tensorboard.SummaryWriter(str(folder), purge_step=purge)
        if settings and resume_step is None:
            table = "".join(f"| {name} | {value} |\n" for name, value in flatten(settings))
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Write out and close the event file."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases (needs the extra ``refinedet[wandb]``).

    The package's environment variables apply: WANDB_MODE=offline keeps the run in the folder, WANDB_PROJECT names the
    project ("refinedet" by default).

    Args:
        folder: Keeps the id of the run; the files of the package go there too if it is called "wandb". The run has the
            name of the folder around it.
        resume_step: None for a new run; otherwise the run whose id is in ``folder`` continues.
        settings: Shown as the run's config.

    Raises:
        UsageError: wandb is not installed.
        RefineDetError: the run cannot be started, for example because nobody is logged in.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        wandb = _package("wandb")
        make_folder(folder)
        with _service_errors("Weights & Biases", "log in with 'wandb login', or set WANDB_MODE=offline"):
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "refinedet"),
                name=folder.parent.name,
                id=_read_run_id(folder, resume_step),
                resume="allow",
                dir=str(folder.parent),
                config=dict(settings or {}),
                settings={"console": "off"},  # its copy of the output would end the live progress bar
            )
        write_text(folder / _RUN_ID_FILE, self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step; those of a step that a stopped run has already logged are dropped by the service."""
        with _service_errors("Weights & Biases"):
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write out what is pending and end the run."""
        with _service_errors("Weights & Biases"):
            self._run.finish()


class MLflowLogger:
    """A run of MLflow (needs the extra ``refinedet[mlflow]``).

    The package's environment variables apply: MLFLOW_TRACKING_URI says where runs are kept (by default in the working
    directory), MLFLOW_EXPERIMENT_NAME names the experiment.

    Args:
        folder: Keeps the id of the run, which has the name of the folder around it.
        resume_step: None for a new run; otherwise the run whose id is in ``folder`` continues.
        settings: Logged as parameters of a new run; names of inner mappings are joined by dots.

    Raises:
        UsageError: mlflow is not installed.
        RefineDetError: the run cannot be started, for example because the server does not answer.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._mlflow = _package("mlflow")
        run_id = _read_run_id(folder, resume_step)
        with _service_errors("MLflow", "see MLFLOW_TRACKING_URI"):
            # Nested, so that a run which the caller has open stays as it is.
            run = self._mlflow.start_run(run_id=run_id, run_name=folder.parent.name, nested=True)
            if run_id is None:
                self._mlflow.log_params(dict(flatten(settings or {})))
        self._run_id: str = run.info.run_id
        self._open = True
        make_folder(folder)
        write_text(folder / _RUN_ID_FILE, self._run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step."""
        with _service_errors("MLflow"):
            self._mlflow.log_metrics({name: float(value) for name, value in values.items()}, step, run_id=self._run_id)

    def close(self) -> None:
        """End the run."""
        if self._open:
            self._open = False
            with _service_errors("MLflow"):
                self._mlflow.end_run()


_RUN_ID_FILE = "run-id"


def _read_run_id(folder: Path, resume_step: int | None) -> str | None:
    """The id under which a service knows the run that is resumed; None for a new run."""
    try:
        return None if resume_step is None else (folder / _RUN_ID_FILE).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


_MODULES = {"tensorboard": "torch.utils.tensorboard"}
"""Modules that are not called as the logger."""
_TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES.get(name, name))
    except ImportError:
        raise UsageError(f"{_TITLES[name]} is not installed: pip install 'refinedet[{name}]'") from None


@contextlib.contextmanager
def _service_errors(title: str, hint: str = "") -> Iterator[None]:
    """Make whatever a service's package raises one line."""
    try:
        yield
    except Exception as error:
        raise RefineDetError(f"{title}: {reason(error, 200).rstrip('. ')}{hint and f'; {hint}'}") from None


TRACKERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}
"""The loggers that ``train`` and the command line find by name; all are made from the same arguments."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse names that ``TRACKERS`` lacks, and those whose package is missing.

    Raises:
        UsageError: there is one; the message names it.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"unknown logger '{name}': {did_you_mean(name, TRACKERS)}")
        _package(name)


def open_trackers(
    names: Collection[str], run_folder: Path, resume_step: int | None, settings: Mapping[str, Any]
) -> list[Logger]:
    """TensorBoard, if it is installed, and the loggers that are named; each has a folder of its name in the run folder.

    Raises:
        UsageError: a package is missing.
        RefineDetError: a service cannot be reached.
    """
    loggers = []
    for name in dict.fromkeys(("tensorboard", *names)):
        # metrics.csv has the same numbers, so TensorBoard may be missing where nobody asked for it.
        with contextlib.nullcontext() if name in names else contextlib.suppress(UsageError):
            loggers.append(TRACKERS[name](run_folder / name, resume_step=resume_step, settings=settings))
    return loggers
