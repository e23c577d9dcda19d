"""What tests of the command line share: a detector that needs no weights, small photos, the line of a refusal."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refinedet import cli
from refinedet.config import ModelConfig
from refinedet.detections import Detections
from refinedet.errors import RefineDetError

Refused = Callable[..., str]


class StubDetector:
    """Finds a dog in the left half of every image."""

    class_names = ("cat", "dog")
    config = ModelConfig(num_classes=2)
    batches: list[int]

    def __init__(self) -> None:
        self.batches = []

    def predict_arrays(self, images: list[Any], *, threshold: float | None = None) -> list[Detections]:
        self.batches.append(len(images))
        found = []
        for image in images:
            height, width = image.shape[:2]
            one = Detections([[0, 0, width / 2, height]], [0.75], [1], self.class_names, (width, height))  # type: ignore[arg-type]
            found.append(one.filter(threshold=threshold))
        return found


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubDetector:
    """The command line gets this detector for the name "stub" and refuses every other."""
    detector = StubDetector()

    class RefineDet:
        @classmethod
        def from_pretrained(cls, name: str, *, device: object) -> StubDetector:
            if name != "stub":
                raise RefineDetError(f"{name}: corrupt")
            return detector

    module = types.ModuleType("refinedet.detector")
    module.RefineDet = RefineDet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "refinedet.detector", module)
    return detector


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small image and returns its path."""

    def make(name: str, size: tuple[int, int] = (40, 30)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 50)).save(path)
        return path

    return make


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command and returns the one line in which it ends."""

    def run(arguments: list[object], code: int = 2) -> str:
        assert cli.main([str(argument) for argument in arguments]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
