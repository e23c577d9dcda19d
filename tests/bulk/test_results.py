"""The detections of a batch prediction are measured like those of ``evaluate``, and become the label files they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refinedet import batch, cli, evaluate, read_batch
from refinedet.bulk.results import evaluate_batch, write_labels
from refinedet.data import open_dataset
from refinedet.errors import RefineDetError, UsageError

FolderFactory = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def found(tiny: Path, voc_folder: FolderFactory, tmp_path: Path) -> tuple[Path, Path]:
    """A dataset, and the detections of all of its images."""
    data = voc_folder(images=6)
    batch(tiny, data / "JPEGImages", tmp_path / "found", threshold=0.01, workers=1)
    return data, tmp_path / "found"


def test_figures_are_those_of_evaluate(found: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    data, folder = found
    for metric in ("voc07", "coco"):
        wanted = evaluate(tiny, data, "val", metric, threshold=0.01)  # type: ignore[arg-type]
        measured = evaluate_batch(folder, data, "val", metric)  # type: ignore[arg-type]
        assert measured.figures == pytest.approx(wanted.figures, nan_ok=True)
        assert measured.objects == wanted.objects
    assert measured.settings.score_threshold == 0.01
    assert measured.settings.weights == str(tiny)
    # The images may have moved since.
    moved = tmp_path / "moved"
    data.rename(moved)
    assert evaluate_batch(folder, moved, "val", "coco").figures == pytest.approx(measured.figures, nan_ok=True)


def test_shared_classes(found: tuple[Path, Path], tiny: Path) -> None:
    data, folder = found
    for file in (data / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<name>dog<", "<name>horse<"))
    with pytest.raises(RefineDetError, match="classes"):
        evaluate_batch(folder, data, "val")
    wanted = evaluate(tiny, data, "val", shared_classes=True, threshold=0.01)
    measured = evaluate_batch(folder, data, "val", shared_classes=True)
    assert measured.per_class == pytest.approx(wanted.per_class)
    assert measured.settings.left_out == wanted.settings.left_out


def test_images_without_a_row_are_named(found: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    data, _ = found
    batch(tiny, data / "JPEGImages/000000.jpg", tmp_path / "one", workers=1)
    with pytest.raises(UsageError, match=r"has no row for 5 of 6 images of the data, the first: .*000001\.jpg"):
        evaluate_batch(tmp_path / "one", data, "all")
    broken = data / "JPEGImages/000002.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    batch(tiny, data / "JPEGImages", tmp_path / "other", workers=1)
    broken.write_bytes(whole)
    with pytest.raises(RefineDetError, match=r"1 images of the data failed, the first: .*000002\.jpg"):
        evaluate_batch(tmp_path / "other", data, "all")
    with pytest.raises(UsageError, match="holds no batch prediction"):
        evaluate_batch(data, data, "all")


def test_the_command(found: tuple[Path, Path], tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, folder = found
    assert cli.main(["evaluate", str(data), "--detections", str(folder), "--split", "val", "--metric", "voc"]) == 0
    figure = evaluate_batch(folder, data, "val", "voc")["mAP"]
    assert capsys.readouterr().out.splitlines()[-1] == f"mAP {100 * figure:.2f}"
    assert cli.main(["evaluate", str(tiny), str(data), "--detections", str(folder)]) == 2
    assert "--detections takes DATA alone" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["voc", "coco", "yolo"])
def test_label_files_give_the_detections_back(layout: str, found: tuple[Path, Path], tmp_path: Path) -> None:
    """Read by our own readers, which have tests of their own against the layouts."""
    data, folder = found
    labels = tmp_path / "labels"
    assert write_labels(folder, layout, labels) == 6  # type: ignore[arg-type]
    place = {"voc": "JPEGImages", "coco": "images", "yolo": "images"}[layout]
    (labels / place).symlink_to(data / "JPEGImages")
    dataset = open_dataset(labels, "train" if layout == "yolo" else None, ("cat", "dog"), allow_outside=True)
    assert len(dataset) == 6
    by_stem = {Path(item.source or "").stem: item for item in read_batch(folder)}
    for record in dataset.records:
        wanted = by_stem[record.image_path.stem]
        tolerance = 1.01 if layout == "voc" else 0.01  # VOC's corners are whole pixels
        away = np.abs(record.boxes[:, None] - wanted.boxes).max(axis=2)
        away[record.labels[:, None] != wanted.labels] = np.inf
        assert len(record.boxes) > 0
        assert away.min(axis=0).max() <= tolerance, "a detection has no label"
        assert away.min(axis=1).max() <= tolerance, "a label has no detection"


def test_batch_writes_labels_at_its_end(
    tiny: Path, voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, labels = voc_folder(images=3) / "JPEGImages", tmp_path / "out", tmp_path / "labels"
    call = ["batch", str(tiny), str(data), "--out", str(out), "--workers", "1", "--to", "coco", "--labels-out"]
    assert cli.main([*call, str(labels)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"labels of 3 images: {labels}"
    assert len(json.loads((labels / "annotations.json").read_text())["images"]) == 3
    assert cli.main([*call, str(data)]) == 2
    assert "is not empty" in capsys.readouterr().err
