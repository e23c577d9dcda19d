"""Focal loss against a loop over anchors, in value and gradient, and a training with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FolderFactory
from refinedet.config import LossConfig, ModelConfig, Preset, TrainConfig
from refinedet.detector import RefineDet
from refinedet.errors import UsageError
from refinedet.model.network import Predictions, RefineDetNetwork
from refinedet.training.loss import RefineDetLoss, set_background_prior
from refinedet.training.matching import Targets
from refinedet.training.train import train

MODEL = ModelConfig(
    backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=16, anchor_sizes=(16, 24, 32, 48)
)
FOCAL = LossConfig(classification="focal")


def focal_of_module(
    logits: Tensor, anchors: Tensor, boxes: Tensor, labels: list[int], passes: list[bool], config: LossConfig
) -> tuple[Tensor, int]:
    """Sum of one image, anchor by anchor, and its positives. Every target matches at least one anchor by force."""
    overlaps = [[iou(anchor, box) for box in boxes.tolist()] for anchor in anchors.tolist()]
    matched = [-1] * len(overlaps)
    free = set(range(len(labels)))
    while free:
        value, i, j = max((overlaps[i][j], -i, -j) for i in range(len(overlaps)) if matched[i] < 0 for j in free)
        i, j = -i, -j
        if value <= 1e-6:
            break
        matched[i] = j
        free.remove(j)
    total, positives = torch.zeros((), dtype=torch.float64), 0
    background = logits.shape[-1] - 1
    for i, row in enumerate(overlaps):
        best = max(row, default=0.0)
        if matched[i] < 0 and best >= 0.5:
            matched[i] = row.index(best)
        scores = logits[i].exp() / logits[i].exp().sum()
        if matched[i] >= 0:
            positives += 1
            p, alpha = scores[labels[matched[i]]], config.focal_alpha
        elif best < 0.5 and passes[i]:
            p, alpha = scores[background], 1 - config.focal_alpha
        else:
            continue
        total = total - alpha * (1 - p) ** config.focal_gamma * p.log()
    return total, positives


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def random_case(seed: int, *, empty: bool) -> tuple[Predictions, Targets]:
    generator = torch.Generator().manual_seed(seed)
    centre = 128 * torch.rand(60, 2, generator=generator)
    side = 16 + 48 * torch.rand(60, 2, generator=generator)
    anchors = torch.cat([centre - side / 2, centre + side / 2], dim=1)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    predictions = Predictions(
        torch.zeros(2, 60, 4), normal(2, 60, 2, scale=3.0), normal(2, 60, 4, scale=1.0),
        normal(2, 60, 4, scale=2.0), anchors,
    )  # fmt: skip
    boxes = anchors[torch.randint(60, (2, 3), generator=generator)] + normal(2, 3, 4, scale=2.0)
    labels = torch.randint(3, (2, 3), generator=generator)
    if empty:
        labels[1] = -1
    return predictions, Targets(boxes, labels)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.0, 0.4)])
def test_focal_loss_equals_the_loop(seed: int, gamma: float, alpha: float) -> None:
    config = LossConfig(classification="focal", focal_gamma=gamma, focal_alpha=alpha)
    predictions, targets = random_case(seed, empty=seed % 2 == 0)
    ours = [x.clone().requires_grad_() for x in (predictions.arm_logits, predictions.odm_logits)]
    theirs = [x.double().requires_grad_() for x in (predictions.arm_logits, predictions.odm_logits)]
    losses = RefineDetLoss(ModelConfig(num_classes=3), config)(
        predictions._replace(arm_logits=ours[0], odm_logits=ours[1]), targets
    )
    passes = (predictions.arm_logits.double().softmax(-1)[..., 1] <= 0.99).tolist()
    assert not all(map(all, passes)), "some anchor is filtered"
    wanted = []
    for module, logits in zip(("arm", "odm"), theirs, strict=True):
        parts = []
        for image in range(2):
            real = [g for g in range(3) if int(targets.labels[image, g]) >= 0]
            labels = [0 if module == "arm" else int(targets.labels[image, g]) for g in real]
            flags = [True] * 60 if module == "arm" else passes[image]
            boxes = targets.boxes[image, real].double()
            parts.append(focal_of_module(logits[image], predictions.anchors.double(), boxes, labels, flags, config))
        loss = (parts[0][0] + parts[1][0]) / max(1, parts[0][1] + parts[1][1])
        wanted.append(loss)
        assert losses[f"{module}_classification"].item() == pytest.approx(float(loss.detach()), rel=1e-4)
    (losses["arm_classification"] + losses["odm_classification"]).backward()
    (wanted[0] + wanted[1]).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-3, atol=1e-5)


def test_images_without_objects_teach_background() -> None:
    predictions, targets = random_case(0, empty=False)
    nothing = Targets(targets.boxes, torch.full_like(targets.labels, -1))
    assert float(RefineDetLoss(ModelConfig(num_classes=3), FOCAL)(predictions, nothing)["odm_classification"]) > 0
    assert float(RefineDetLoss(ModelConfig(num_classes=3))(predictions, nothing)["total"]) == 0


@pytest.mark.parametrize("size", [40.0, 200.0])
def test_certain_anchors_give_no_nan(size: float) -> None:
    predictions, targets = random_case(1, empty=True)
    logits = (size * predictions.odm_logits.sign()).requires_grad_()
    loss = RefineDetLoss(ModelConfig(num_classes=3), FOCAL)(predictions._replace(odm_logits=logits), targets)["total"]
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_prior_makes_background_certain() -> None:
    network = RefineDetNetwork(MODEL).eval()
    set_background_prior(network, 0.99)
    for head, classes in ((network.arm[0], 1), (network.odm[0], 2)):
        bias = head.logits.bias.view(3, classes + 1)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(bias.softmax(-1)[:, -1], torch.full((3,), 0.99))
        assert not bias[:, :-1].any()
    count = sum(math.prod(size) for size in [(8, 8), (4, 4), (2, 2), (1, 1)]) * 3
    with torch.no_grad():
        predictions = network(torch.zeros(1, 3, 64, 64))
    assert predictions.odm_logits.shape == (1, count, 3)


@pytest.mark.parametrize("values", [{"focal_gamma": 0.5}, {"focal_gamma": -1.0}, {"focal_alpha": 1.0}])
def test_impossible_values(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must be"):
        LossConfig(classification="focal", **values)  # type: ignore[arg-type]


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    network = RefineDetNetwork(MODEL).train()
    set_background_prior(network)
    images = torch.randn(2, 3, 64, 64)
    targets = Targets(torch.tensor([[[4.0, 4, 30, 28]], [[10.0, 8, 50, 50]]]), torch.tensor([[0], [1]]))
    criterion = RefineDetLoss(MODEL, FOCAL)
    optimizer = torch.optim.SGD(network.parameters(), lr=5e-3, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(network(images), targets)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses


def test_trainer_sets_the_prior_on_new_heads_only(voc_folder: FolderFactory, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "iterations": 1, "batch_size": 2, "learning_rate": 1e-12, "milestones": (), "workers": 0, "loss": FOCAL,
        "train_split": "train", "evaluate_split": "none",
    }  # fmt: skip
    preset = Preset(model=MODEL, train=TrainConfig(**settings), summary="")
    run = train(preset, voc_folder(), out=tmp_path / "a", init_weights="random", device="cpu")
    bias = run.model.network.state_dict()["odm.0.logits.bias"].view(3, 3)
    torch.testing.assert_close(bias.softmax(-1)[:, -1], torch.full((3,), 0.99))
    start = RefineDet(replace(MODEL, num_classes=2), ("cat", "dog"))
    start.save_pretrained(tmp_path / "start")
    run = train(preset, voc_folder(name="b"), out=tmp_path / "c", init=tmp_path / "start", device="cpu")
    torch.testing.assert_close(
        run.model.network.state_dict()["odm.0.logits.bias"], start.network.state_dict()["odm.0.logits.bias"]
    )
