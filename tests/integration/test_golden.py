"""Outputs recorded once: a change of structure must not change a weight, a detection, a loss or an AP.

``golden.json`` was written at commit 520f879 by ``python -m tests.integration.test_golden``; it is written anew only by
a change that is meant to change these numbers and says so.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refinedet import RefineDet, evaluate
from refinedet.config import LossConfig, ModelConfig
from refinedet.preprocess import preprocess
from refinedet.presets import PRESETS
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets

GOLDEN = Path(__file__).with_name("golden.json")
ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ("astronaut.jpg", "chelsea.jpg", "grace_hopper.jpg")
VOC = ROOT.parent / "shared" / "data" / "VOCdevkit"


def detections(model: RefineDet) -> dict[str, Any]:
    found = {name: model.predict(ROOT / "examples" / name, threshold=0.05) for name in PHOTOS}
    return {
        name: {"boxes": one.boxes.tolist(), "scores": one.scores.tolist(), "names": one.names}
        for name, one in found.items()
    }


def losses(model: RefineDet, settings: LossConfig) -> dict[str, float]:
    """Of the bundled model on its own best detections as targets."""
    from PIL import Image

    arrays = [np.asarray(Image.open(ROOT / "examples" / name).convert("RGB")) for name in PHOTOS]
    images = torch.from_numpy(np.stack([preprocess(image, model.config, model.config.image_size) for image in arrays]))
    boxes = [
        torch.tensor([[20.0, 30.0, 200.0, 300.0], [100.0, 40.0, 180.0, 90.0]]),
        torch.tensor([[5.0, 5.0, 310.0, 315.0]]),
        torch.zeros(0, 4),
    ]
    labels = [torch.tensor([14, 6]), torch.tensor([7]), torch.zeros(0, dtype=torch.int64)]
    with torch.no_grad():
        predictions = model.network(images)
        values = RefineDetLoss(model.config, settings)(predictions, Targets.collate(boxes, labels))
    return {name: float(value) for name, value in values.items()}


def initial_weights(config: ModelConfig) -> dict[str, float]:
    """What a seed gives: the mean magnitude of each tensor of a new network."""
    torch.manual_seed(0)
    state = RefineDet(config).network.state_dict()
    return {name: float(tensor.double().abs().mean()) for name, tensor in state.items()}


def digest(model: RefineDet) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def average_precision(model: RefineDet, metric: Any) -> dict[str, float]:
    report = evaluate(model, VOC, split="val[-40:]", metric=metric)
    return {name: value for name, value in report.per_class.items() if not np.isnan(value)} | dict(report.figures)


@pytest.fixture(scope="module")
def model() -> RefineDet:
    return RefineDet.from_pretrained("voc07-320-resnet18")


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(GOLDEN.read_text())


def test_bundled_weights_are_those_recorded(model: RefineDet, golden: Any) -> None:
    assert digest(model) == golden["digest"]


def test_seed_gives_the_recorded_initial_weights(golden: Any) -> None:
    assert initial_weights(PRESETS["smoke"].model) == pytest.approx(golden["initial_weights"], rel=1e-6)


def test_detections_are_those_recorded(model: RefineDet, golden: Any) -> None:
    for name, one in detections(model).items():
        recorded = golden["detections"][name]
        assert one["names"] == recorded["names"]
        np.testing.assert_allclose(one["boxes"], recorded["boxes"], atol=0.01)
        np.testing.assert_allclose(one["scores"], recorded["scores"], atol=1e-5)


@pytest.mark.parametrize("classification", ["mining", "focal"])
def test_losses_are_those_recorded(model: RefineDet, golden: Any, classification: Any) -> None:
    found = losses(model, LossConfig(classification=classification))
    assert found == pytest.approx(golden["losses"][classification], rel=1e-5)


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not VOC.exists(), reason="needs the photos of VOC 2007")
@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_average_precision_is_the_one_recorded(model: RefineDet, golden: Any, metric: str) -> None:
    assert average_precision(model, metric) == pytest.approx(golden["average_precision"][metric], abs=1e-4)


if __name__ == "__main__":
    bundled = RefineDet.from_pretrained("voc07-320-resnet18")
    recorded = {
        "digest": digest(bundled),
        "initial_weights": initial_weights(PRESETS["smoke"].model),
        "detections": detections(bundled),
        "losses": {kind: losses(bundled, LossConfig(classification=kind)) for kind in ("mining", "focal")},  # type: ignore[arg-type]
        "average_precision": {metric: average_precision(bundled, metric) for metric in ("voc07", "voc", "coco")},
    }
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
