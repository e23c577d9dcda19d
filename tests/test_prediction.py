"""Sources through a detector in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.pixels import Pixels
from refinedet.prediction import check_threshold, predict_ahead


class Brightness:
    """Finds one box whose score is the brightness of the first pixel."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict_arrays(self, images: list[Pixels], *, threshold: float | None = None) -> list[Detections]:
        self.batches.append(len(images))
        found = []
        for image in images:
            size = (image.shape[1], image.shape[0])
            score = np.float32(image[0, 0, 0] / 255)
            found.append(Detections([[0, 0, 1, 1]], [score], [0], ("light",), size).filter(threshold=threshold))  # type: ignore[arg-type]
        return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(5):
        Image.new("RGB", (10 + index, 8), (51 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    return tmp_path


def test_results_come_in_order_with_their_pixels(photos: Path) -> None:
    model, errors = Brightness(), []
    found = list(
        predict_ahead(
            model, photos, batch_size=2, on_error=lambda image, error: errors.append((image.file, str(error)))
        )
    )
    assert [Path(detections.source or "").name for detections, _ in found] == ["0.png", "1.png", "3.png", "4.png"]
    assert [len(detections) for detections, _ in found] == [0, 0, 1, 1]  # the threshold is 0.4
    for detections, pixels in found:
        assert detections.image_size == (pixels.shape[1], pixels.shape[0])
    assert errors == [(str(photos / "2.png"), f"{photos / '2.png'}: not an image, or of a format that is not read")]
    assert model.batches == [2, 1, 1]


def test_without_a_handler_the_first_error_is_raised(photos: Path) -> None:
    with pytest.raises(RefineDetError, match=r"2\.png: not an image"):
        list(predict_ahead(Brightness(), photos))


def test_huge_images_go_one_by_one(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "2.png").unlink()
    monkeypatch.setattr("refinedet.decoding.PIXELS_AHEAD", 100)
    model = Brightness()
    assert len(list(predict_ahead(model, photos, threshold=None))) == 4
    assert model.batches == [1, 1, 1, 1]


@pytest.mark.parametrize("threshold", [40, -0.1, 1.5, float("nan"), True, "0.5", [0.5]])
def test_wrong_thresholds(threshold: Any) -> None:
    with pytest.raises(UsageError, match="threshold must be between 0 and 1"):
        list(predict_ahead(Brightness(), b"", threshold=threshold))


def test_thresholds() -> None:
    for threshold in (None, 0, 1, 0.5, np.float32(0.5), np.int64(1)):
        check_threshold(threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("batch_size", -1), ("max_pixels", 0), ("max_pixels", -5)]
)
def test_wrong_numbers(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*at least 1, not {value}"):
        list(predict_ahead(Brightness(), [], **{name: value}))  # type: ignore[arg-type]
