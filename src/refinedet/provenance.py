"""Where a result comes from: the program, the machine, the command and the time."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import refinedet
from refinedet.text import printable


@dataclass(frozen=True)
class Provenance:
    """Recorded in what an evaluation or a training leaves behind."""

    version: str = ""
    """Of refinedet."""
    torch: str = ""
    """Version of torch; empty where it is not installed."""
    device: str = ""
    """Where the network ran: "cpu", "cuda:0"."""
    command: str = ""
    """The command line of the process, with the arguments as they were given."""
    date: str = ""
    """Day and time in UTC, as ISO 8601 to the second."""

    @classmethod
    def now(cls, device: object = "") -> Provenance:
        """Of this process, at this time."""
        return cls(
            version=refinedet.__version__,
            torch=_version_of("torch"),
            device=str(device),
            command=_command_line(),
            date=datetime.now(UTC).replace(microsecond=0).isoformat(),
        )


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _command_line() -> str:
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    # The folders of the installation are of no interest: "refinedet", also for python -m refinedet.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return printable(shlex.join([name, *sys.argv[1:]]))
