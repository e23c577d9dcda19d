from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import FolderFactory
from refinedet.config import ModelConfig, TrainConfig
from refinedet.data.classes import COCO_CLASSES, VOC_CLASSES, match_classes
from refinedet.detector import RefineDet
from refinedet.errors import UsageError
from refinedet.presets import PRESETS
from refinedet.training.train import train
from refinedet.weights.transfer import adopt_config, transfer_classes

OFFICIAL_MAP = {
    0: 0, 5: 1, 2: 2, 15: 3, 9: 4, 40: 5, 6: 6, 3: 7, 16: 8, 57: 9, 20: 10, 61: 11, 17: 12, 18: 13, 4: 14, 1: 15,
    59: 16, 19: 17, 58: 18, 7: 19, 63: 20,
}  # fmt: skip
"""COCO label to VOC label, both with background as 0 (official data/VOC0712/coco_voc_map.txt)."""


def small(classes: int, **changes: object) -> ModelConfig:
    config = dataclasses.replace(PRESETS["smoke"].model, num_classes=classes, tcb_channels=8, image_size=(64, 64))
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_coco_to_voc_is_the_official_map() -> None:
    # Shifted by one, as our labels start at 0; background is the last of both.
    expected = {voc - 1: coco - 1 for coco, voc in OFFICIAL_MAP.items() if voc}
    assert match_classes(VOC_CLASSES, COCO_CLASSES) == tuple(expected[label] for label in range(20))
    torch.manual_seed(0)
    coco, voc = RefineDet(small(80), COCO_CLASSES), RefineDet(small(20), VOC_CLASSES)
    start, own = coco.network.state_dict(), voc.network.state_dict()
    state, transfer = transfer_classes(own, start, VOC_CLASSES, COCO_CLASSES)
    for level in range(4):
        for suffix in ("weight", "bias"):
            # The official loop, over rows of the official order.
            old, new = start[f"odm.{level}.logits.{suffix}"], state[f"odm.{level}.logits.{suffix}"]
            for anchor in range(3):
                for coco_label, voc_label in OFFICIAL_MAP.items():
                    theirs = anchor * 81 + (coco_label - 1) % 81
                    ours = anchor * 21 + (voc_label - 1) % 21
                    assert torch.equal(new[ours], old[theirs])
    classifiers = {f"odm.{level}.logits.{suffix}" for level in range(4) for suffix in ("weight", "bias")}
    assert set(state) == set(start) == set(own)
    for name, tensor in start.items():
        if name not in classifiers:
            assert torch.equal(state[name], tensor), name
    assert len(transfer.carried) == 20
    assert ("aeroplane", "airplane") in transfer.carried
    assert transfer.new == ()
    assert len(transfer.dropped) == 60
    voc.network.load_state_dict(state)


def test_synonyms_and_spellings() -> None:
    assert match_classes(
        ("Motorcycle", "TV", "couch", "airplane", "dining table", "potted_plant", "traffic-light", "unicorn"),
        ("motorbike", "tvmonitor", "sofa", "aeroplane", "diningtable", "pottedplant", "Traffic Light"),
    ) == (0, 1, 2, 3, 4, 5, 6, None)
    assert match_classes(("motorbike", "tvmonitor", "sofa"), ("tv", "couch", "motorcycle")) == (2, 0, 1)
    # An equal name beats a synonym, whatever the order.
    assert match_classes(("tv", "tvmonitor"), ("tvmonitor", "tv")) == (1, 0)
    assert match_classes(("CAT", "cat"), ("cat", "CAT")) == (1, 0)


def test_classes_without_a_counterpart_start_anew() -> None:
    names, start_names = ("unicorn", "cat"), ("dog", "cat", "cow")
    torch.manual_seed(0)
    start, own = (RefineDet(small(len(n)), n).network.state_dict() for n in (start_names, names))
    for state in (start, own):
        for name in state:
            if ".logits.bias" in name:
                state[name].copy_(torch.randn(state[name].shape))
    state, transfer = transfer_classes(own, start, names, start_names)
    for key in ("odm.2.logits.weight", "odm.2.logits.bias"):
        for anchor in range(3):
            assert torch.equal(state[key][3 * anchor], own[key][3 * anchor])
            assert torch.equal(state[key][3 * anchor + 1], start[key][4 * anchor + 1])
            assert torch.equal(state[key][3 * anchor + 2], start[key][4 * anchor + 3])
    assert transfer.carried == (("cat", "cat"),)
    assert transfer.new == ("unicorn",)
    assert transfer.dropped == ("dog", "cow")
    assert transfer.summary() == "1 classes carried over: cat; 1 start from random weights: unicorn"


def test_random_heads_are_not_carried_over() -> None:
    names = ("cat", "dog")
    start, own = (RefineDet(small(2), names).network.state_dict() for _ in range(2))
    state, transfer = transfer_classes(own, start, names, names, ("arm", "tcb", "odm"))
    assert torch.equal(state["odm.2.logits.weight"][0], own["odm.2.logits.weight"][0])
    assert (transfer.carried, transfer.new) == ((), names)
    assert transfer.summary() == "no classes carried over: the model to start from has random arm, tcb, odm"


def test_frozen_and_learned_norms_can_start_from_each_other() -> None:
    for first, second in (("frozen", "batch"), ("batch", "frozen")):
        start = RefineDet(small(2, backbone_norm=first)).network.state_dict()
        network = RefineDet(small(2, backbone_norm=second)).network
        state, _ = transfer_classes(network.state_dict(), start, ("a", "b"), ("a", "b"))
        network.load_state_dict(state)


def test_the_input_of_the_weights_is_adopted() -> None:
    start = dataclasses.replace(
        ModelConfig(), mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0), channel_order="bgr", fc6_dilation=6
    )
    config, changed = adopt_config(ModelConfig(num_classes=3, image_size=(512, 512)), start)
    assert changed == ("mean", "std", "channel_order", "fc6_dilation")
    assert config == dataclasses.replace(start, num_classes=3, image_size=(512, 512))
    with pytest.raises(UsageError, match="has the backbone vgg16, the one to train resnet18"):
        adopt_config(small(2), ModelConfig())


def test_training_starts_from_carried_classes(
    voc_folder: FolderFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "refinedet")
    start = RefineDet(small(3, mean=(1.0, 2.0, 3.0)), ("Dog", "cow", "couch"))
    start.save_pretrained(tmp_path / "start")
    data = voc_folder(images=4, class_names=("sofa", "dog", "gnu"))
    settings = dataclasses.replace(
        TrainConfig(), iterations=1, batch_size=4, learning_rate=1e-12, workers=0, evaluate_every=0,
        train_split="train", evaluate_split="none",
    )  # fmt: skip
    preset = dataclasses.replace(PRESETS["smoke"], model=small(20), train=settings)
    run = train(preset, data, out=tmp_path / "run", init=tmp_path / "start", device="cpu")
    assert run.model.config.mean == (1.0, 2.0, 3.0)
    before, after = start.network.state_dict(), run.model.network.state_dict()
    names = run.model.class_names
    for name, old in (("dog", 0), ("sofa", 2)):
        torch.testing.assert_close(
            after["odm.1.logits.weight"][4 + names.index(name)], before["odm.1.logits.weight"][4 + old]
        )
    torch.testing.assert_close(after["arm.1.logits.weight"], before["arm.1.logits.weight"])
    lines = [message for message in caplog.messages if message.startswith("init: ")]
    assert lines[0] == f"init: mean as {tmp_path / 'start'} has them"
    assert lines[1].startswith("init: 2 classes carried over: ")
    assert "sofa (from couch)" in lines[1]
    assert lines[1].endswith("; 1 start from random weights: gnu")


def test_two_places_to_start_from_are_refused(voc_folder: FolderFactory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        train(PRESETS["smoke"], voc_folder(), out=tmp_path / "run", init="x", init_weights="random")
