"""torchvision's SSD between our batches and our evaluator: labels, weights, and a training that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.ssd_peer import SSDPeer, build_ssd, ssd_targets, train_ssd
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from conftest import FolderFactory
from experiments import ssd_peer
from refinedet.config import AugmentConfig, ModelConfig, TrainConfig
from refinedet.data.layouts import open_dataset
from refinedet.errors import RefineDetError
from refinedet.evaluation.evaluate import evaluate
from refinedet.model.network import RefineDetNetwork
from refinedet.training.matching import Targets

CPU = torch.device("cpu")
CONFIG = ModelConfig(num_classes=2)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_ssd(seed: int = 0) -> SSD:
    """torchvision's SSD with one level of 8x8 cells of a 64-pixel input, two classes and background."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = [8]
    network = SSD(backbone, DefaultBoxGenerator([[2]], scales=[0.3, 0.5]), (64, 64), num_classes=3)
    network.transform = ssd_peer._Prepared()
    return network


def test_classes_count_from_one_there_and_padding_stays_here() -> None:
    boxes = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9], [1, 2, 30, 40]]), torch.zeros(0, 4), torch.ones(1, 4)]
    boxes[2][:, 2:] = 9
    labels = [torch.tensor([0, 1, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])]
    targets = Targets.collate(boxes, labels)
    first, second, third = ssd_targets(targets, CPU)
    assert first["labels"].tolist() == [1, 2], "background is 0 there; a box without an area is left out"
    assert first["boxes"].tolist() == [[0, 0, 10, 10], [1, 2, 30, 40]]
    assert second["boxes"].shape == (0, 4)
    assert third["labels"].tolist() == [2]


def test_detections_come_back_in_pixels_of_the_image_with_our_labels() -> None:
    network = tiny_ssd()
    found = {"boxes": torch.tensor([[0.0, 16, 32, 64]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([2])}
    network.forward = lambda images: [found] * len(images)  # type: ignore[method-assign]
    peer = SSDPeer(network, CONFIG, ("cat", "dog"), size=(64, 64))
    one, other = peer.predict_arrays([np.zeros((100, 200, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)])
    assert one.names == ["dog"]
    assert one.boxes.tolist() == [[0, 25, 100, 100]]
    assert other.boxes.tolist() == [[0, 16, 32, 64]]
    assert len(peer.predict_arrays([np.zeros((8, 8, 3), np.uint8)], threshold=0.95)[0].boxes) == 0


@pytest.mark.slow  # builds two networks of VGG's size
def test_it_starts_from_the_weights_it_is_given() -> None:
    torch.manual_seed(0)
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    weights: dict[str, Tensor] = {}
    for index, inner, outer in zip(indices, widths, widths[1:], strict=False):
        weights[f"features.{index}.weight"] = torch.full((outer, inner, 3, 3), float(index)).half()
        weights[f"features.{index}.bias"] = torch.full((outer,), index + 0.5)
    network = build_ssd(ModelConfig(), weights, "weights")
    layers = [one for one in network.backbone.modules() if isinstance(one, nn.Conv2d)]
    for layer, index in zip(layers, indices, strict=False):
        assert bool((layer.weight == index).all())
        assert bool((layer.bias == index + 0.5).all())
    assert network.head.classification_head.num_columns == 21
    assert all(parameter.requires_grad for parameter in network.parameters())
    del weights["features.28.weight"]
    with pytest.raises(RefineDetError, match=r"file: looks like .* but 'features\.28\.weight' is missing"):
        build_ssd(ModelConfig(), weights, "file")


RESNET = ModelConfig(backbone="resnet18", num_classes=2, image_size=(128, 192), backbone_norm="frozen", frozen_stages=2)


def test_over_a_resnet_it_has_the_backbone_of_refinedet_and_anchors_at_its_strides() -> None:
    torch.manual_seed(0)
    donor = RefineDetNetwork(RESNET).backbone
    weights = {name: value for name, value in donor.state_dict().items() if not name.startswith("res6.")}
    # What a file of torchvision's ResNet-18 has beside it.
    weights |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    network = build_ssd(RESNET, weights, "weights")
    own = network.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in weights.items() if name in own)
    assert {name.partition(".")[0] for name in own} == {name.partition(".")[0] for name in donor.state_dict()}
    frozen = {name for name, parameter in network.backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in donor.named_parameters() if not parameter.requires_grad}
    outputs, anchors = ssd_peer.SSDOutputs(network)(torch.zeros(2, 3, 128, 192))
    # 4, 6, 6 and 4 boxes a cell, as in SSD: two squares, and two for each ratio.
    cells = [16 * 24 * 4, 8 * 12 * 6, 4 * 6 * 6, 2 * 3 * 4]
    assert outputs["cls_logits"].shape == (2, sum(cells), 3)
    assert [tuple(each.shape) for each in anchors] == [(sum(cells), 4)] * 2
    starts = np.cumsum([0, *cells[:-1]])
    centres = [((anchors[0][s, :2] + anchors[0][s, 2:]) / 2).tolist() for s in starts]
    assert centres[:3] == [pytest.approx([stride / 2] * 2, abs=0.01) for stride in (8, 16, 32)], "strides 8 to 64"


def test_three_and_three_iterations_are_six_bit_for_bit(voc_folder: FolderFactory, tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(images=8), "train")
    settings = TrainConfig(
        iterations=6, batch_size=2, learning_rate=0.01, milestones=(4,), workers=0, log_every=2, save_every=100
    )

    def run(folder: str, stop: Callable[[], bool], seed: int = 0) -> tuple[bool, SSD]:
        network = tiny_ssd(seed)
        peer = SSDPeer(network, CONFIG, dataset.class_names, size=(64, 64))
        return train_ssd(peer, settings, dataset, tmp_path / folder, device=CPU, stop=stop), network

    done, whole = run("whole", lambda: False)
    assert done
    calls = iter([False, False, True])
    assert not run("parts", lambda: next(calls))[0]
    done, parts = run("parts", lambda: False, seed=99)
    assert done
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    logs = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert logs[0][0].endswith(",images_per_second")
    # All but the last column, the speed.
    assert [line.rsplit(",", 1)[0] for line in logs[0]] == [line.rsplit(",", 1)[0] for line in logs[1]]
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), tiny_ssd().parameters(), strict=True))


def test_what_it_learns_here_it_finds_here(voc_folder: FolderFactory, tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(images=8), "trainval")
    settings = TrainConfig(
        iterations=100, batch_size=8, learning_rate=0.05, milestones=(80,), workers=0, log_every=50, save_every=1000,
        gradient_clip_norm=5.0, augment=AugmentConfig(photometric=False, expand_probability=0.0, crop=False),
    )  # fmt: skip
    peer = SSDPeer(tiny_ssd(), CONFIG, dataset.class_names, size=(64, 64))
    assert train_ssd(peer, settings, dataset, tmp_path / "run", device=CPU, stop=lambda: False)
    # A class or a coordinate that is off by one somewhere would leave next to nothing.
    assert evaluate(peer, dataset)["mAP"] > 0.5
