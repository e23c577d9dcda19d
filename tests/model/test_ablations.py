"""Table 2's switches and the channel attention: what each changes, that it learns, and the command that compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import FolderFactory
from refinedet import ablations, boxes, cli
from refinedet.ablations import VARIANTS, ablate, table, variant_of
from refinedet.config import InferenceConfig, LossConfig, ModelConfig, Preset, TrainConfig
from refinedet.detector import RefineDet
from refinedet.errors import UsageError
from refinedet.model.network import ChannelAttention, Predictions, RefineDetNetwork, starting_boxes
from refinedet.model.postprocess import postprocess
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets

TINY = ModelConfig(
    backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=16, anchor_sizes=(16, 24, 32, 48)
)
STD = torch.tensor(TINY.offset_std)


def case(config: ModelConfig, seed: int = 0) -> tuple[Predictions, Targets]:
    """Random raw outputs over the real anchors, and two objects per image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        anchors = RefineDetNetwork(config).eval()(torch.zeros(1, 3, 64, 64)).anchors
    count = len(anchors)
    predictions = Predictions(
        0.5 * torch.randn(2, count, 4, generator=generator),
        2 * torch.randn(2, count, 2, generator=generator),
        0.5 * torch.randn(2, count, 4, generator=generator),
        torch.randn(2, count, 3, generator=generator),
        anchors,
    )
    targets = Targets(
        torch.tensor([[[4.0, 4, 30, 28], [30, 20, 60, 62]], [[10.0, 8, 50, 50], [2, 40, 20, 60]]]),
        torch.tensor([[0, 1], [1, 0]]),
    )
    return predictions, targets


# two_step


def test_one_step_has_the_same_network() -> None:
    one, two = RefineDetNetwork(replace(TINY, two_step=False)), RefineDetNetwork(TINY)
    assert {n: t.shape for n, t in one.state_dict().items()} == {n: t.shape for n, t in two.state_dict().items()}


def test_one_step_loss_is_that_of_an_arm_that_moves_nothing_and_still_learns() -> None:
    """The ODM's terms ignore ARM offsets; the ARM's do not."""
    predictions, targets = case(TINY)
    still = predictions._replace(arm_offsets=torch.zeros_like(predictions.arm_offsets))
    one_step = RefineDetLoss(replace(TINY, two_step=False))(predictions, targets)
    reference = RefineDetLoss(TINY)(still, targets)
    moved = RefineDetLoss(TINY)(predictions, targets)
    for name in ("odm_classification", "odm_localization"):
        torch.testing.assert_close(one_step[name], reference[name], rtol=1e-4, atol=1e-4)
        assert abs(float(one_step[name] - moved[name])) > 1e-2
    for name in ("arm_classification", "arm_localization"):
        assert torch.equal(one_step[name], moved[name])


def test_one_step_still_filters() -> None:
    predictions, targets = case(TINY)
    hidden = predictions._replace(arm_logits=torch.tensor([-9.0, 9.0]).expand_as(predictions.arm_logits))
    config = replace(TINY, two_step=False)
    assert int(postprocess(hidden, config).counts.sum()) == 0
    assert int(postprocess(predictions, config).counts.sum()) > 0
    open_loss = RefineDetLoss(replace(config, negative_threshold=1.0))(hidden, targets)
    assert RefineDetLoss(config)(hidden, targets)["odm_classification"] < open_loss["odm_classification"]


def test_one_step_decodes_from_the_tiled_anchors() -> None:
    predictions, _ = case(TINY)
    settings = InferenceConfig(candidates=1, max_detections=1)
    config = replace(TINY, two_step=False, negative_threshold=1.0, inference=settings)
    found = postprocess(predictions, config)
    scores = predictions.odm_logits.softmax(-1)[..., :-1]
    for image in range(2):
        best = int(scores[image].flatten().argmax()) // 2
        wanted = boxes.decode(predictions.odm_offsets[image, best], predictions.anchors[best], STD)
        torch.testing.assert_close(found.boxes[image, 0], wanted)


def test_starting_boxes() -> None:
    predictions, _ = case(TINY)
    refined = boxes.decode(predictions.arm_offsets, predictions.anchors, STD)
    assert torch.equal(starting_boxes(predictions.arm_offsets, predictions.anchors, STD, TINY), refined)
    for changes in ({"two_step": False}, {"tcb": False}):
        start = starting_boxes(predictions.arm_offsets, predictions.anchors, STD, replace(TINY, **changes))
        assert torch.equal(start, predictions.anchors.expand(2, -1, -1))


# tcb


@pytest.mark.parametrize("theta", [1.0, 0.99, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_tcb_heads_stand_on_the_backbone_and_all_anchors_pass(theta: float, dtype: torch.dtype) -> None:
    config = replace(TINY, tcb=False, negative_threshold=theta)
    network = RefineDetNetwork(config).eval()
    assert not any(name.startswith(("arm", "tcb")) for name in network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        predictions = network(images)
        maps = network.backbone(images)
        levels: list[tuple[Tensor, Tensor]] = [head(x) for head, x in zip(network.odm, maps, strict=True)]
    assert torch.equal(predictions.odm_offsets, torch.cat([level[0] for level in levels], dim=1))
    assert torch.equal(predictions.odm_logits, torch.cat([level[1] for level in levels], dim=1))
    assert predictions.arm_offsets.shape == predictions.odm_offsets.shape
    assert not predictions.arm_offsets.any()
    assert predictions.arm_logits.shape == (2, len(predictions.anchors), 2)
    objectness = predictions.arm_logits.to(dtype).float().softmax(-1)[..., 0]
    assert bool((objectness == 1).all())
    assert int(postprocess(predictions, config).counts.min()) > 0


def test_without_tcb_the_loss_has_no_arm_terms() -> None:
    predictions, targets = case(TINY)
    losses = RefineDetLoss(replace(TINY, tcb=False))(predictions, targets)
    assert float(losses["arm_classification"]) == float(losses["arm_localization"]) == 0
    reference = RefineDetLoss(replace(TINY, two_step=False, negative_threshold=1.0))(predictions, targets)
    calm = predictions._replace(arm_logits=F.pad(torch.full_like(predictions.arm_logits[..., :1], 100.0), [0, 1]))
    losses = RefineDetLoss(replace(TINY, tcb=False))(calm, targets)
    assert torch.equal(losses["total"], losses["odm_classification"] + losses["odm_localization"])
    assert torch.equal(losses["odm_classification"], reference["odm_classification"])
    assert torch.equal(losses["odm_localization"], reference["odm_localization"])


# attention


def test_attention_weighs_channels_by_their_means() -> None:
    torch.manual_seed(0)
    attention = ChannelAttention(32).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    squeeze, excite = attention.squeeze, attention.excite
    with torch.no_grad():
        got = attention(x)
        for image in range(2):
            means = torch.stack([x[image, channel].sum() / 15 for channel in range(32)])
            middle = (squeeze.weight[:, :, 0, 0] @ means + squeeze.bias).clamp(min=0)  # type: ignore[operator]
            gate = 1 / (1 + (-(excite.weight[:, :, 0, 0] @ middle + excite.bias)).exp())  # type: ignore[operator]
            for channel in range(32):
                torch.testing.assert_close(got[image, channel], x[image, channel] * gate[channel])


def test_attention_is_off_by_default_and_adds_only_itself() -> None:
    plain, attentive = RefineDetNetwork(TINY).state_dict(), RefineDetNetwork(replace(TINY, tcb_attention=True))
    extra = set(attentive.state_dict()) - set(plain)
    assert {name.split(".")[2] for name in extra} == {"attention"}
    assert len(extra) == 4 * 4


# Each learns


@pytest.mark.parametrize(
    "changes",
    [
        {"two_step": False},
        {"two_step": False, "negative_threshold": 1.0},
        {"tcb": False},
        {"tcb_attention": True},
        {"prediction_blocks": True, "tcb_batch_norm": True},
        {"prediction_blocks": True, "tcb": False},
    ],
)
def test_the_loss_falls(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = replace(TINY, **changes)
    network = RefineDetNetwork(model).train()
    images = torch.randn(2, 3, 64, 64)
    _, targets = case(TINY)
    criterion = RefineDetLoss(model, LossConfig())
    optimizer = torch.optim.SGD(network.parameters(), lr=2e-3, momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = criterion(network(images), targets)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    assert all(p.grad is not None for p in network.parameters()), "every parameter takes part"


@pytest.mark.parametrize("changes", [{"two_step": False}, {"tcb": False}, {"tcb_attention": True}])
def test_saved_and_loaded(changes: dict[str, Any], tmp_path: Path) -> None:
    model = RefineDet(replace(TINY, **changes), ("a", "b"))
    again = RefineDet.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.config == model.config
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.network(images).odm_logits, model.network(images).odm_logits)


# refinedet ablate


def preset(**changes: Any) -> Preset:
    settings: dict[str, Any] = {
        "iterations": 4, "batch_size": 2, "learning_rate": 1e-3, "milestones": (), "workers": 0, "log_every": 1,
        "save_every": 2, "evaluate_every": 0, "train_split": "train", "evaluate_split": "val",
        "gradient_clip_norm": 10.0,
    }  # fmt: skip
    return Preset(model=TINY, train=TrainConfig(**{**settings, **changes}), summary="for tests")


def test_variants_take_away_one_part_after_the_other() -> None:
    models = [variant_of(replace(TINY, tcb_attention=True), variant) for variant in VARIANTS]
    assert [(m.negative_threshold < 1, m.two_step, m.tcb) for m in models] == [
        (True, True, True), (False, True, True), (False, False, True), (False, False, False),
    ]  # fmt: skip
    assert [variant.paper for variant in VARIANTS] == [80.0, 79.5, 77.3, 76.2]


@pytest.mark.slow
def test_ablate_trains_all_resumes_and_prints_the_table(
    voc_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "refinedet")
    data, out = voc_folder(images=4), tmp_path / "out"
    begun: list[str] = []
    train = ablations.train

    def stopped_in_the_third(preset: Preset, data: Any, *, out: Path, **rest: Any) -> Any:
        begun.append(out.name)
        if begun == ["full", "no-filtering", "one-step"]:
            asked = iter([False, True])
            assert not train(preset, data, out=out, stop=lambda: next(asked), **rest).finished
            raise KeyboardInterrupt
        return train(preset, data, out=out, **rest)

    monkeypatch.setattr(ablations, "train", stopped_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        ablate(preset(), data, out=out, init_weights="random", device="cpu")
    # The second was stopped before it had a checkpoint: nothing but its config is there.
    for file in sorted((out / "no-filtering").rglob("*"), reverse=True):
        if file.is_file() and file != out / "no-filtering/config.json":
            file.unlink()
    caplog.clear()
    found = ablate(preset(), data, out=out, init_weights="random", device="cpu")
    for line in ("variant full (1 of 4)", "full: finished before", "going on from iteration 2 of 4", "no-tcb (4 of 4)"):
        assert line in caplog.text
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert list(found) == [variant.name for variant in VARIANTS]
    assert ablate(preset(), data, out=out, init_weights="random", device="cpu") == found
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before, (
        "what is done is not done again"
    )
    text = table(found, preset())
    assert "4 iterations of 2 on train, val" in text
    assert "| 80.0 | 79.5 | 77.3 | 76.2 |" in text
    assert f"| {100 * found['full']:.1f} |" in text
    with pytest.raises(UsageError, match="other settings"):
        ablate(preset(learning_rate=2e-3), data, out=out, init_weights="random", device="cpu")


def test_ablate_needs_something_to_measure_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--evaluate-split"):
        ablate(preset(evaluate_split="none"), tmp_path, out=tmp_path / "out")


def test_the_command(voc_folder: FolderFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["ablate", "smoke", "--data", str(voc_folder(images=4)), "--out", str(out), "--iterations", "1"]
    arguments += ["--batch-size", "2", "--init-weights", "random", "--model.image-size", "64", "64", "--device", "cpu"]
    assert cli.main([*arguments, "--model.backbone-norm", "frozen"]) == 0
    signature, table = (out / "table.md").read_text().split("\n\n", 1)
    assert signature == "<!-- table written by refinedet -->"
    assert table in capsys.readouterr().out
    assert cli.main(["ablate"]) == 2
    assert cli.main(["ablate", "smoke", "--data", str(out / "nothing"), "--out", str(tmp_path / "b")]) == 2
