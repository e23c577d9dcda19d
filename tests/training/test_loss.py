"""Equation 1 against a loop over anchors, in value and in gradient, and its rules one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
from oracles import Margin
from refinedet.config import LossConfig, ModelConfig
from refinedet.model.network import Predictions
from refinedet.training.loss import RefineDetLoss
from refinedet.training.matching import Targets

NAMES = ("arm_classification", "arm_localization", "odm_classification", "odm_localization")
TOO_CLOSE = 1e-5
seeds = st.integers(0, 2**32 - 1)


def leaves(predictions: Predictions, dtype: torch.dtype = torch.float32) -> Predictions:
    """Copies that collect gradients; anchors stay constants."""
    outputs = [output.detach().to(dtype).clone().requires_grad_() for output in predictions[:4]]
    return Predictions(*outputs, predictions.anchors.to(dtype))


def gradients(predictions: Predictions) -> list[torch.Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in predictions[:4]]


def compare(
    predictions: Predictions, targets: Targets, classes: int, config: LossConfig | None = None, theta: float = 0.99
) -> dict[str, float]:
    """Values and gradients of loss and loop agree; returns the values."""
    config = config or LossConfig()
    ours, reference = leaves(predictions), leaves(predictions, torch.float64)
    margin = Margin()
    expected, _ = oracles.loss(
        reference,
        targets,
        arm_iou=(config.arm_positive_iou, config.arm_negative_iou),
        odm_iou=(config.odm_positive_iou, config.odm_negative_iou),
        ratio=config.negatives_per_positive,
        theta=theta,
        margin=margin,
    )
    assume(margin.smallest > TOO_CLOSE)
    losses = RefineDetLoss(ModelConfig(num_classes=classes, negative_threshold=theta), config)(ours, targets)
    assert set(losses) == {*NAMES, "total"}
    for name in NAMES:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=2e-4, abs=1e-4), name
    total = sum(expected.values())
    assert losses["total"].item() == pytest.approx(total.item(), rel=2e-4, abs=1e-4)
    losses["total"].backward()
    if total.requires_grad:
        total.backward()
    for got, wanted in zip(gradients(ours), gradients(reference), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=1e-5)
    return {name: value.item() for name, value in losses.items()}


@settings(max_examples=120, deadline=None)
@given(
    seed=seeds, anchors=st.integers(5, 60), classes=st.integers(1, 6),
    objects=st.lists(st.integers(0, 6), min_size=1, max_size=3), kind=st.sampled_from(["usual", "twins", "tiny"]),
    config=st.sampled_from([
        LossConfig(), LossConfig(), LossConfig(arm_positive_iou=0.7, arm_negative_iou=0.3),
        LossConfig(odm_positive_iou=0.6, odm_negative_iou=0.4, negatives_per_positive=1.5),
    ]),
    theta=st.sampled_from([0.99, 0.99, 0.7, 1.0]), spread=st.sampled_from([0.3, 1.0]),
)  # fmt: skip
def test_loss_and_gradient_equal_the_loop(
    seed: int, anchors: int, classes: int, objects: list[int], kind: str, config: LossConfig, theta: float,
    spread: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    predictions = oracles.random_predictions(
        generator, batch=len(objects), anchors=anchors, classes=classes, spread=spread
    )
    compare(predictions, oracles.random_targets(generator, objects, classes, kind=kind), classes, config, theta)


@settings(max_examples=3, deadline=None)
@given(seed=seeds)
def test_a_hundred_objects(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions = oracles.random_predictions(generator, batch=2, anchors=120, classes=20)
    compare(predictions, oracles.random_targets(generator, [100, 0], 20), 20)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_without_objects_costs_nothing(batch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    predictions = leaves(oracles.random_predictions(generator, batch=batch, anchors=30, classes=3))
    losses = RefineDetLoss(ModelConfig(num_classes=3))(predictions, oracles.random_targets(generator, [0] * batch, 3))
    assert [losses[name].item() for name in (*NAMES, "total")] == [0.0] * 5
    losses["total"].backward()
    for gradient in gradients(predictions):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_image_without_objects_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    both = oracles.random_predictions(generator, batch=2, anchors=40, classes=3)
    targets = oracles.random_targets(generator, [3, 0], 3)
    first = Predictions(*(output[:1] for output in both[:4]), both.anchors)
    criterion = RefineDetLoss(ModelConfig(num_classes=3))
    alone = criterion(first, Targets(targets.boxes[:1], targets.labels[:1]))
    joint = criterion(both, targets)
    for name in NAMES:
        assert joint[name].item() == pytest.approx(alone[name].item(), rel=1e-6)


def two_anchors(
    *, arm_logits: tuple[tuple[float, float], ...], odm_logits: tuple[tuple[float, ...], ...]
) -> Predictions:
    """One image; anchor 0 is (0, 0, 10, 10), the others lie far away one beside the other; all offsets 0."""
    count = len(arm_logits)
    anchors = torch.tensor([[0.0, 0, 10, 10]] + [[100.0 * i, 0, 100.0 * i + 10, 10] for i in range(1, count)])
    return Predictions(
        torch.zeros(1, count, 4), torch.tensor([arm_logits]), torch.zeros(1, count, 4), torch.tensor([odm_logits]),
        anchors,
    )  # fmt: skip


def one_target(box: tuple[float, ...], label: int) -> Targets:
    return Targets.collate([torch.tensor([box])], [torch.tensor([label])])


def test_loss_by_hand() -> None:
    # Anchor 0 is positive (overlap 1), anchor 1 the negative that 3:1 allows. All logits are 0, ODM: 2 classes + 1.
    # ARM: (ln 2 + ln 2) / 1 = 1.386294. ODM: (ln 3 + ln 3) / 1 = 2.197225. Nothing to regress.
    predictions = two_anchors(arm_logits=((0.0, 0.0),) * 2, odm_logits=((0.0, 0.0, 0.0),) * 2)
    losses = RefineDetLoss(ModelConfig(num_classes=2))(predictions, one_target((0.0, 0, 10, 10), 1))
    assert losses["arm_classification"].item() == pytest.approx(2 * math.log(2))
    assert losses["odm_classification"].item() == pytest.approx(2 * math.log(3))
    assert losses["arm_localization"].item() == losses["odm_localization"].item() == 0.0
    # A target moved by half a pixel to the right (overlap 9.5 / 10.5) wants (0.5 / 10) / 0.1 = 0.5 from offset 0:
    # 0.5 * 0.5^2 = 0.125 in both modules. Twice as high (overlap 0.5, centre 5 px lower): 5 / 10 / 0.1 = 5 costs 4.5,
    # ln 2 / 0.2 = 3.465736 costs 2.965736; in sum 7.465736.
    losses = RefineDetLoss(ModelConfig(num_classes=2))(predictions, one_target((0.5, 0, 10.5, 10), 1))
    assert losses["arm_localization"].item() == pytest.approx(0.125, rel=1e-5)
    assert losses["odm_localization"].item() == pytest.approx(0.125, rel=1e-5)
    losses = RefineDetLoss(ModelConfig(num_classes=2))(predictions, one_target((0.0, 0, 10, 20), 1))
    assert losses["arm_localization"].item() == pytest.approx(7.465736, rel=1e-5)
    # With an ARM offset of 0.2 (2 hundredths of 10 px) the ARM lacks 0.3: 0.045, and so does the ODM, whose anchor
    # now starts from there: 0.3 px / 10 px / 0.1 = 0.3.
    predictions.arm_offsets[0, 0, 0] = 0.2
    losses = RefineDetLoss(ModelConfig(num_classes=2))(predictions, one_target((0.5, 0, 10.5, 10), 1))
    assert losses["arm_localization"].item() == pytest.approx(0.045, rel=1e-4)
    assert losses["odm_localization"].item() == pytest.approx(0.045, rel=1e-4)


def test_label_smoothing_by_hand() -> None:
    # Two classes and background, a tenth of each target spread over the three: 28/30 for the right one, 1/30 each for
    # the others. Anchor 0 (positive, class 1): scores e, e^2 and 1 over their sum; anchor 1 (negative): all 1/3.
    predictions = two_anchors(arm_logits=((0.0, 0.0),) * 2, odm_logits=((1.0, 2.0, 0.0), (0.0, 0.0, 0.0)))
    config = LossConfig(label_smoothing=0.1)
    losses = RefineDetLoss(ModelConfig(num_classes=2), config)(predictions, one_target((0.0, 0, 10, 10), 1))
    total = math.log(math.e + math.e**2 + 1)
    positive = (28 * (total - 2) + (total - 1) + total) / 30
    assert losses["odm_classification"].item() == pytest.approx(positive + math.log(3), rel=1e-6)
    assert losses["arm_classification"].item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_filtered_positives_stay_and_filtered_negatives_leave_the_odm_only() -> None:
    # P(object) = 1 / (1 + e^6) = 0.0025 < 0.01 for anchors 0 and 1; anchor 2 passes. With ODM logits of 0, each
    # anchor costs ln 2 (one class): positive 0 + negative 2 = 2 ln 2; anchor 1 has left the pool. The ARM mines both:
    # its positive costs ln(1 + e^6) = 6.002476, anchor 1 as background 0.002476, anchor 2 ln 2.
    predictions = two_anchors(arm_logits=((-6.0, 0.0), (-6.0, 0.0), (0.0, 0.0)), odm_logits=((0.0, 0.0),) * 3)
    losses = RefineDetLoss(ModelConfig(num_classes=1))(predictions, one_target((0.0, 0, 10, 10), 0))
    assert losses["odm_classification"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert losses["arm_classification"].item() == pytest.approx(6.002476 + 0.002476 + math.log(2), rel=1e-5)
    # Theta of 1 filters nothing.
    losses = RefineDetLoss(ModelConfig(num_classes=1, negative_threshold=1.0))(
        predictions, one_target((0.0, 0, 10, 10), 0)
    )
    assert losses["odm_classification"].item() == pytest.approx(3 * math.log(2), rel=1e-5)


def test_a_negative_confidence_of_exactly_theta_is_not_filtered() -> None:
    # Equal logits: a negative confidence of 0.5, which does not exceed a theta of 0.5; so the negative is mined.
    predictions = two_anchors(arm_logits=((0.0, 0.0),) * 2, odm_logits=((0.0, 0.0),) * 2)
    losses = RefineDetLoss(ModelConfig(num_classes=1, negative_threshold=0.5))(
        predictions, one_target((0.0, 0, 10, 10), 0)
    )
    assert losses["odm_classification"].item() == pytest.approx(2 * math.log(2), rel=1e-5)


@pytest.mark.parametrize(("negative_iou", "negatives"), [(0.25, 0), (0.26, 1)])
def test_a_negative_lies_below_its_threshold(negative_iou: float, negatives: int) -> None:
    # Anchor 1 = (0, 0, 10, 40) overlaps the target (0, 0, 10, 10) by exactly a quarter.
    predictions = Predictions(
        torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), torch.zeros(1, 2, 4), torch.zeros(1, 2, 2),
        torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 40]]),
    )  # fmt: skip
    config = LossConfig(arm_negative_iou=negative_iou, odm_negative_iou=negative_iou)
    losses = RefineDetLoss(ModelConfig(num_classes=1), config)(predictions, one_target((0.0, 0, 10, 10), 0))
    for name in ("arm_classification", "odm_classification"):
        assert losses[name].item() == pytest.approx((1 + negatives) * math.log(2), rel=1e-5)


def test_each_module_divides_by_its_own_positives() -> None:
    # The target (0, 0, 10, 10) is anchor 0 itself. Anchor 1 = (0, 0, 10, 40) has overlap 0.25: no ARM positive. Its
    # refined box: centre 20 - 15 = 5 and height 40 / 4: offsets -15 / 40 / 0.1 = -3.75 and ln(1 / 4) / 0.2; an ODM
    # positive. So the ARM has 1 positive and 1 negative, the ODM 2 positives.
    predictions = Predictions(
        torch.tensor([[[0.0] * 4, [0.0, -3.75, 0.0, math.log(0.25) / 0.2]]]), torch.zeros(1, 2, 2),
        torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 40]]),
    )  # fmt: skip
    losses = RefineDetLoss(ModelConfig(num_classes=1))(predictions, one_target((0.0, 0, 10, 10), 0))
    assert losses["arm_classification"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert losses["odm_classification"].item() == pytest.approx(2 * math.log(2) / 2, rel=1e-5)
    assert losses["odm_localization"].item() == pytest.approx(0.0, abs=1e-4)


def test_arm_positives_without_odm_positives() -> None:
    # The ARM moves its only anchor far away from the target: N_odm = 0, so both ODM losses are 0 and finite.
    predictions = leaves(two_anchors(arm_logits=((0.0, 0.0),), odm_logits=((3.0, 0.0),)))
    with torch.no_grad():
        predictions.arm_offsets[0, 0, 0] = 1000.0
    losses = RefineDetLoss(ModelConfig(num_classes=1))(predictions, one_target((0.0, 0, 10, 10), 0))
    assert losses["odm_classification"].item() == losses["odm_localization"].item() == 0.0
    assert losses["arm_classification"].item() == pytest.approx(math.log(2))
    assert losses["arm_localization"].item() == pytest.approx(999.5)
    losses["total"].backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(predictions))


def test_no_gradient_of_the_odm_reaches_the_arm() -> None:
    generator = torch.Generator().manual_seed(3)
    predictions = leaves(oracles.random_predictions(generator, batch=2, anchors=60, classes=4))
    losses = RefineDetLoss(ModelConfig(num_classes=4))(predictions, oracles.random_targets(generator, [4, 2], 4))
    arm = losses["arm_classification"] + losses["arm_localization"]
    odm = losses["odm_classification"] + losses["odm_localization"]
    outputs = predictions[:4]
    reached = torch.autograd.grad(odm, outputs, retain_graph=True, allow_unused=True)
    assert [gradient is not None and bool(gradient.any()) for gradient in reached] == [False, False, True, True]
    reached = torch.autograd.grad(arm, outputs, allow_unused=True)
    assert [gradient is not None and bool(gradient.any()) for gradient in reached] == [True, True, False, False]


@pytest.mark.parametrize("value", [-1e4, 1e4, 300.0, -300.0])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_degenerate_outputs_stay_finite(value: float, which: int) -> None:
    """Every output of one kind is absurd, with random signs in the second image."""
    generator = torch.Generator().manual_seed(4)
    predictions = oracles.random_predictions(generator, batch=2, anchors=50, classes=3)
    predictions[which][0] = value
    predictions[which][1] = value * torch.randn(predictions[which][1].shape, generator=generator).sign()
    predictions = leaves(predictions)
    losses = RefineDetLoss(ModelConfig(num_classes=3))(predictions, oracles.random_targets(generator, [5, 3], 3))
    assert all(math.isfinite(value.item()) for value in losses.values())
    losses["total"].backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(predictions))


def test_a_loss_beyond_float32_that_does_not_count_does_no_harm() -> None:
    # 3e38 - (-3e38) overflows to inf; the second image has no objects, so nothing of it counts.
    generator = torch.Generator().manual_seed(9)
    predictions = oracles.random_predictions(generator, batch=2, anchors=30, classes=2)
    for logits in (predictions.arm_logits, predictions.odm_logits):
        logits[1] = 3e38 * torch.randn(logits[1].shape, generator=generator).sign()
    predictions = leaves(predictions)
    losses = RefineDetLoss(ModelConfig(num_classes=2))(predictions, oracles.random_targets(generator, [3, 0], 2))
    assert all(math.isfinite(value.item()) for value in losses.values())
    losses["total"].backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(predictions))


def test_an_anchor_that_the_arm_moves_to_infinity_does_no_harm() -> None:
    # 3e38 * 0.1 * 10 px overflows: the refined anchor 1 is no number, and must be a plain negative.
    predictions = leaves(two_anchors(arm_logits=((0.0, 0.0),) * 2, odm_logits=((0.0, 0.0),) * 2))
    with torch.no_grad():
        predictions.arm_offsets[0, 1] = 3e38
    losses = RefineDetLoss(ModelConfig(num_classes=1))(predictions, one_target((0.0, 0, 10, 10), 0))
    assert losses["odm_classification"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert losses["arm_localization"].item() == losses["odm_localization"].item() == 0.0
    losses["total"].backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(predictions))


@pytest.mark.parametrize("size", [0.0, 1e-4])
def test_degenerate_targets_stay_finite(size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    predictions = leaves(oracles.random_predictions(generator, batch=1, anchors=50, classes=3))
    losses = RefineDetLoss(ModelConfig(num_classes=3))(predictions, one_target((50.0, 50.0, 50 + size, 50 + size), 1))
    losses["total"].backward()
    assert math.isfinite(losses["total"].item())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(predictions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    full = oracles.random_predictions(generator, batch=2, anchors=50, classes=3)
    half = Predictions(*(output.to(dtype) for output in full[:4]), full.anchors)
    rounded = Predictions(*(output.float() for output in half[:4]), full.anchors)
    targets = oracles.random_targets(generator, [4, 2], 3)
    criterion = RefineDetLoss(ModelConfig(num_classes=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = criterion(half, targets)
    for name, value in criterion(rounded, targets).items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value)


def test_the_normalizer_gives_the_divisors() -> None:
    generator = torch.Generator().manual_seed(7)
    predictions = oracles.random_predictions(generator, batch=2, anchors=60, classes=4)
    targets = oracles.random_targets(generator, [4, 2], 4)
    _, positives = oracles.loss(leaves(predictions, torch.float64), targets)
    seen: list[list[float]] = []

    def normalizer(counts: torch.Tensor) -> torch.Tensor:
        seen.append(counts.tolist())
        return torch.tensor([2.0, 5.0])

    model = ModelConfig(num_classes=4)
    plain = RefineDetLoss(model)(predictions, targets)
    replaced = RefineDetLoss(model, normalizer=normalizer)(predictions, targets)
    assert seen == [list(map(float, positives))]
    for name in NAMES:
        module = name.startswith("odm")
        expected = plain[name].item() * positives[module] / (2.0, 5.0)[module]
        assert replaced[name].item() == pytest.approx(expected, rel=1e-5)


def test_the_arm_does_not_see_classes() -> None:
    generator = torch.Generator().manual_seed(8)
    predictions = oracles.random_predictions(generator, batch=1, anchors=60, classes=4)
    targets = oracles.random_targets(generator, [4], 4)
    other = Targets(targets.boxes, (targets.labels + 1) % 4)
    criterion = RefineDetLoss(ModelConfig(num_classes=4))
    first, second = criterion(predictions, targets), criterion(predictions, other)
    assert first["arm_classification"].item() == second["arm_classification"].item()
    assert first["odm_localization"].item() == second["odm_localization"].item()
    assert first["odm_classification"].item() != second["odm_classification"].item()
