"""The way from an image to network input, against torch, Pillow and a loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from refinedet.config import ModelConfig
from refinedet.preprocess import normalize, preprocess, resize

CAFFE = ModelConfig(mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0), channel_order="bgr")


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), height=st.integers(1, 90), width=st.integers(1, 90), to_height=st.integers(1, 90),
    to_width=st.integers(1, 90),
)  # fmt: skip
def test_bilinear_is_torchs_without_antialiasing(
    seed: int, height: int, width: int, to_height: int, to_width: int
) -> None:
    image = make_image(height, width, seed)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = F.interpolate(tensor, (to_height, to_width), mode="bilinear", align_corners=False, antialias=False)
    result = resize(image, to_height, to_width)
    assert result.dtype == np.float32
    assert result.shape == (to_height, to_width, 3)
    np.testing.assert_allclose(result, expected[0].permute(1, 2, 0).numpy(), atol=1e-3)


def test_bilinear_by_hand() -> None:
    # 4 columns to 2: centres at 0.5 and 2.5: (10 + 20) / 2 and (30 + 50) / 2. 1 row to 2: the same row twice.
    image = np.repeat(np.array([[10, 20, 30, 50]], dtype=np.uint8)[:, :, None], 3, axis=2)
    assert resize(image, 2, 2)[:, :, 0].tolist() == [[15.0, 40.0], [15.0, 40.0]]
    # 2 columns to 4: centres at -0.25 (held at 0), 0.25, 0.75, 1.25 (held at 1).
    image = np.repeat(np.array([[10, 20]], dtype=np.uint8)[:, :, None], 3, axis=2)
    assert resize(image, 1, 4)[0, :, 1].tolist() == [10.0, 12.5, 17.5, 20.0]


@pytest.mark.parametrize(("height", "width"), [(30, 20), (200, 300), (64, 64)])
def test_antialias_is_pillows(height: int, width: int) -> None:
    image = make_image(height, width)
    expected = np.asarray(Image.fromarray(image).resize((96, 64), Image.Resampling.BILINEAR))
    result = resize(image, 64, 96, "antialias")
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_laws_differ_when_shrinking() -> None:
    image = make_image(200, 200)
    plain = preprocess(image, ModelConfig(), (64, 64))
    smooth = preprocess(image, ModelConfig(resize="antialias"), (64, 64))
    assert plain.std() > 1.5 * smooth.std()


def test_channel_order_mean_and_std() -> None:
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[0, 1] = (200, 100, 50)
    # BGR minus (104, 117, 123): 50 - 104, 100 - 117, 200 - 123.
    assert normalize(image, CAFFE)[:, 0, 1].tolist() == [-54.0, -17.0, 77.0]
    rgb = normalize(image, ModelConfig())[:, 0, 1].tolist()
    assert rgb == pytest.approx([(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375], rel=1e-6)


@pytest.mark.parametrize("config", [CAFFE, ModelConfig()])
def test_the_whole_path_equals_a_loop(config: ModelConfig) -> None:
    image = make_image(7, 9, 3)
    result = preprocess(image, config, (5, 4))
    assert result.shape == (3, 5, 4)
    assert result.dtype == np.float32
    assert result.flags["C_CONTIGUOUS"]
    resized = resize(image, 5, 4)
    for channel in range(3):
        source = channel if config.channel_order == "rgb" else 2 - channel
        expected = (resized[:, :, source].astype(np.float64) - config.mean[channel]) / config.std[channel]
        np.testing.assert_allclose(result[channel], expected, atol=1e-4)


def test_default_size_is_the_configs() -> None:
    assert preprocess(make_image(10, 10), ModelConfig(image_size=(64, 128))).shape == (3, 64, 128)
    assert preprocess(make_image(10, 10), ModelConfig(image_size=(64, 128)), (10, 20)).shape == (3, 10, 20)


def test_the_image_is_left_alone() -> None:
    image = make_image(64, 64)
    before = image.copy()
    preprocess(image, CAFFE, (64, 64))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image must"):
        resize(image, 8, 8)
