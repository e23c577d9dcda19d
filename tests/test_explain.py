"""The steps of a prediction, compared with what prediction itself returns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_scene
from refinedet import cli
from refinedet.config import InferenceConfig, ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.explain import STAGES
from refinedet.model.anchors import tile_anchors

CONFIG = ModelConfig(
    backbone="resnet18", num_classes=2, image_size=(64, 128), tcb_channels=8, tcb_batch_norm=True,
    inference=InferenceConfig(score_threshold=0.0, candidates=400),
)  # fmt: skip
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model() -> RefineDet:
    torch.manual_seed(0)
    return RefineDet(CONFIG, ("cat", "dog"))


@pytest.mark.parametrize("changes", [{}, {"tcb": False}, {"two_step": False}, {"negative_threshold": 0.5}])
def test_steps_lead_to_the_detections(changes: dict[str, object]) -> None:
    torch.manual_seed(1)
    model = RefineDet(dataclasses.replace(CONFIG, **changes), ("cat", "dog"))  # type: ignore[arg-type]
    image = make_scene(1, size=(150, 90)).image
    steps = model.explain(image, threshold=0.2)
    expected = model.predict(image, threshold=0.2)
    np.testing.assert_allclose(steps.detections.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_array_equal(steps.detections.labels, expected.labels)
    assert len(expected) > 0
    assert steps.tiled == (3 * 8 * 16, 3 * 4 * 8, 3 * 2 * 4, 3 * 1 * 2)
    assert len(steps.anchors) <= sum(steps.tiled) == model.num_anchors
    # The last step's boxes of the anchors that are named are the detections.
    size = np.array([150, 90, 150, 90], dtype=np.float32)
    np.testing.assert_allclose(steps.final[steps.origins].clip(0, size), expected.boxes, atol=1e-3)
    # Every anchor that passes is one that was tiled, on its level.
    sizes = [(8, 16), (4, 8), (2, 4), (1, 2)]
    tiled = tile_anchors(sizes, (64, 128), CONFIG.anchor_sizes, CONFIG.aspect_ratios).numpy()
    tiled = tiled * np.array([150 / 128, 90 / 64] * 2, dtype=np.float32)
    levels = np.repeat(np.arange(4), steps.tiled)
    for anchor, level in zip(steps.anchors[::17], steps.levels[::17], strict=True):
        assert np.abs(tiled[levels == level] - anchor).sum(axis=1).min() < 1e-3
    if changes.get("tcb") is False or changes.get("two_step") is False:
        np.testing.assert_array_equal(steps.refined, steps.anchors)
    assert (steps.objectness >= 1 - model.config.negative_threshold - 1e-6).all()


def test_explaining_leaves_the_network_as_it_was(model: RefineDet) -> None:
    image = make_scene(0).image
    before = model.predict(image, threshold=0.0)
    steps = model.explain(image, threshold=0.0)
    after = model.predict(image, threshold=0.0)
    np.testing.assert_array_equal(before.boxes, after.boxes)
    assert "forward" not in vars(model.network.backbone)
    assert list(steps.milliseconds) == list(STAGES)
    assert all(value > 0 for value in steps.milliseconds.values())
    assert "post-process" in steps.table()


def test_drawing_changes_no_size_with_what_is_found(model: RefineDet, tmp_path: Path) -> None:
    image = make_scene(0, size=(300, 1)).image
    nothing = model.explain(image, threshold=1.0)
    assert len(nothing.detections) == len(nothing.origins) == 0
    assert nothing.draw().shape == model.explain(image, threshold=0.0).draw().shape
    path = nothing.save(tmp_path / "steps.png")
    assert nothing.save(path) == path  # its own file is replaced
    Image.fromarray(image).save(tmp_path / "other.png")
    with pytest.raises(UsageError, match="was not written by this command"):
        nothing.save(tmp_path / "other.png")
    for threshold in (-0.1, 2):
        with pytest.raises(UsageError, match="threshold must be between 0 and 1"):
            model.explain(image, threshold=threshold)
    with pytest.raises(RefineDetError, match="no such image file"):
        model.explain(tmp_path / "none.jpg")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.jpg"
    call = ["explain", "voc07-320-resnet18", str(EXAMPLES / "chelsea.jpg"), "--save", str(out)]
    assert cli.main(call) == 0
    shown = capsys.readouterr().out
    assert "6,375 anchors tiled (4,800 + 1,200 + 300 + 75)" in shown
    assert f"steps: {out}" in shown
    assert Image.open(out).width > 1000
    assert cli.main(call) == 0
    capsys.readouterr()
    for arguments, message in (
        (["none", "x.jpg"], "no model 'none'"),
        (["voc07-320-resnet18", "x.jpg"], "x.jpg: no such file"),
        (["voc07-320-resnet18", "x.jpg", "--save", "x.gif"], "images are written as JPEG or PNG"),
    ):
        assert cli.main(["explain", *arguments]) > 0
        assert message in capsys.readouterr().err
