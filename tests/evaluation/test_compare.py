"""Two runs compared: the figures against those of the metric, the interval against draws one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracles import voc_average_precision
from refinedet import PRESETS, cli
from refinedet.data import open_dataset
from refinedet.dataclass_json import to_dict
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.compare import compare
from refinedet.evaluation.evaluate import evaluate_detections
from refinedet.evaluation.metrics import mean_of_defined

FolderFactory = Callable[..., Path]
NAMES = ("lynx", "otter")


def save_run(folder: Path, data: Path, shift: float, **train: Any) -> list[Detections]:
    """A run whose detections are the objects, some of them moved away."""
    dataset = open_dataset(data, "test", NAMES)
    rng = np.random.default_rng(int(shift))
    detections = []
    for record in dataset.records:
        moved = shift * (rng.random(len(record.labels)) < 0.5)
        boxes = record.boxes + moved[:, None] * np.array([1, 0, 1, 0], np.float32)
        scores = rng.random(len(boxes)).astype(np.float32)
        size = (record.width, record.height)
        detections.append(Detections(boxes, scores, record.labels, NAMES, size))
    settings = {"train_split": "train", "evaluate_split": "test", "metric": "voc", **train}
    preset = {"model": to_dict(PRESETS["smoke"].model), "train": settings, "summary": ""}
    config = {"preset": preset, "data": [str(data)], "class_names": list(NAMES), "init_weights": "random"}
    evaluate_detections(dataset, detections, "voc").save(folder / "report")
    (folder / "config.json").write_text(json.dumps(config))
    return detections


@pytest.fixture
def data(voc_folder: FolderFactory) -> Path:
    return voc_folder(images=12, class_names=NAMES, splits={"train": [0], "test": list(range(1, 12))})


def test_figures_and_intervals(data: Path, tmp_path: Path) -> None:
    first = save_run(tmp_path / "a", data, 200)
    second = save_run(tmp_path / "b", data, 0, learning_rate=0.5)
    result = compare(tmp_path / "a", tmp_path / "b", samples=50, seed=3)
    records = open_dataset(data, "test", NAMES).records
    for row, detections in zip(result.average_precision, (first, second), strict=True):
        wanted = voc_average_precision(detections, records, 2, method="area").average_precision
        np.testing.assert_allclose(row, wanted, atol=1e-6)
    assert result.images == 11
    assert result.settings == {"train.learning_rate": (0.001, 0.5)}
    # The same draws, with images really repeated.
    rng = np.random.default_rng(3)
    differences = []
    for _ in range(50):
        drawn = rng.integers(0, 11, 11)
        means = [
            mean_of_defined(
                voc_average_precision(
                    [d[i] for i in drawn], [records[i] for i in drawn], 2, method="area"
                ).average_precision
            )
            for d in (first, second)
        ]
        differences.append(means[1] - means[0])
    np.testing.assert_allclose(result.interval[:, -1], np.percentile(differences, [2.5, 97.5]), atol=1e-6)
    table = result.table()
    assert "train.learning_rate  0.001 -> 0.5" in table
    assert "11 images that both held out" in table
    assert table.splitlines()[-1].startswith("mean")


def test_a_run_equals_itself(data: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "a", data, 200)
    result = compare(tmp_path / "a", tmp_path / "a", samples=20)
    assert not result.settings
    assert np.all(result.interval == 0)


def test_what_cannot_be_compared(data: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "a", data, 200)
    save_run(tmp_path / "b", data, 200, evaluate_split="train")
    with pytest.raises(RefineDetError, match="held out no image in common"):
        compare(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "report" / "detections.json").unlink()
    with pytest.raises(UsageError, match="has no report"):
        compare(tmp_path / "a", tmp_path / "a")
    with pytest.raises(UsageError, match="no run folder"):
        compare(tmp_path / "a", tmp_path / "nowhere")


def test_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "a", data, 200)
    save_run(tmp_path / "b", data, 0)
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    output = capsys.readouterr().out
    assert "settings: the same" in output
    assert "AP at IoU 0.5 on 11 images" in output
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
