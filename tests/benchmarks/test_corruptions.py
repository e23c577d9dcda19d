"""Corruptions of pictures: what each does to pixels, and that the detector sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.corruptions import CORRUPTIONS, Corrupted, blur, contrast, jpeg, light, low_resolution, main, noise

from conftest import FolderFactory
from refinedet.config import ModelConfig
from refinedet.detections import Detections
from refinedet.detector import RefineDet


@pytest.fixture
def image() -> np.ndarray:
    """A square of 200 on a ground of 50, with a ramp across."""
    pixels = np.full((60, 80, 3), 50, np.uint8)
    pixels[20:40, 30:50] = 200
    return pixels + np.linspace(0, 40, 80).astype(np.uint8)[None, :, None]


def test_light_and_contrast_by_hand(image: np.ndarray) -> None:
    assert np.array_equal(light(image, 1.0), image)
    assert np.array_equal(light(image, 2.0), np.minimum(image.astype(int) * 2, 255))
    assert np.abs(light(image, 0.5).astype(float) - image / 2).max() <= 0.5
    flat = contrast(image, 0.25).astype(float)
    assert flat.mean() == pytest.approx(image.mean(), abs=0.5)
    assert flat.std() == pytest.approx(image.std() / 4, rel=0.03)


def test_noise_has_the_deviation_it_says_and_depends_on_the_image_alone() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = noise(grey, 20)
    assert (noisy.astype(float) - 128).std() == pytest.approx(20, rel=0.02)
    assert np.array_equal(noise(grey, 20), noisy)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.02


def test_blur_low_resolution_and_jpeg_lose_detail_and_keep_the_mean() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for corrupt, weak, strong in ((blur, 1, 3), (low_resolution, 2, 4), (jpeg, 60, 10)):
        details = [corrupt(image, strength).astype(float).std() for strength in (weak, strong)]
        assert image.std() > details[0] > details[1], corrupt
        assert corrupt(image, strong).mean() == pytest.approx(image.mean(), abs=3), corrupt
    blocks = low_resolution(np.repeat(np.repeat(image[:8, :8], 4, 0), 4, 1), 4)
    assert np.array_equal(blocks[::4, ::4].shape, (8, 8, 3))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_gets_worse_and_keeps_the_size(kind: str, image: np.ndarray) -> None:
    corrupt, strengths = CORRUPTIONS[kind]
    distance = [np.abs(corrupt(image, strength).astype(float) - image).mean() for strength in strengths]
    assert 0 < distance[0] < distance[1] < distance[2]
    assert {corrupt(image, strength).shape for strength in strengths} == {image.shape}
    assert {corrupt(image, strength).dtype for strength in strengths} == {np.dtype(np.uint8)}


def test_the_detector_sees_the_corrupted_image(image: np.ndarray) -> None:
    seen = []

    class Watching:
        config, class_names = ModelConfig(), ("cat",)

        def predict_arrays(self, images: list[np.ndarray], *, threshold: float | None = None) -> list[Detections]:
            seen.extend(images)
            return [Detections.empty(self.class_names, (80, 60))] * len(images)

    assert len(Corrupted(Watching(), light, 0.5).predict_arrays([image, image])) == 2
    assert np.array_equal(seen[1], light(image, 0.5))


@pytest.mark.usefixtures("one_thread")
def test_the_table_has_a_row_for_each_kind(
    voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = RefineDet(
        ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8), ("cat", "dog")
    )
    model.save_pretrained(tmp_path / "model")
    data = voc_folder(images=3, splits={"val": [0, 1, 2]})
    assert main([str(tmp_path / "model"), str(data), "--split", "val"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == list(CORRUPTIONS)
