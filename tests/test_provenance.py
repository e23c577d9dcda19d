"""What a report records about the program that made it."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version

import pytest

import refinedet
from refinedet.provenance import Provenance


def test_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/env/bin/refinedet", "evaluate", "my runs/a", "--split", "a\nb"])
    made = Provenance.now("cpu")
    assert made.version == refinedet.__version__
    assert made.torch == version("torch")
    assert made.device == "cpu"
    assert made.command == r"refinedet evaluate 'my runs/a' --split 'a\nb'"
    assert datetime.fromisoformat(made.date).utcoffset() is not None
    monkeypatch.setattr("sys.argv", ["/opt/env/refinedet/__main__.py", "models"])
    assert Provenance.now().command == "refinedet models"
