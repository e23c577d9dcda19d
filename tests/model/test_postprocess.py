"""Inference against the loop over pairs, and greedy suppression against the textbook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from oracles import Margin
from refinedet.config import InferenceConfig, ModelConfig
from refinedet.model.network import Predictions
from refinedet.model.nms import non_maximum_suppression, suppress_at_once, suppress_in_rounds
from refinedet.model.postprocess import postprocess

PAPER = InferenceConfig()
OFFICIAL = InferenceConfig(candidates=1000, candidates_per="class", max_detections=500)
TOO_CLOSE = 1e-6
seeds = st.integers(0, 2**32 - 1)


def enough_rounds(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """The form of exported graphs, with as many rounds as the longest chain can need."""
    keep, settled = suppress_in_rounds(boxes, labels, valid, threshold, boxes.shape[1] + 1)
    assert settled.all()
    return keep


both_ways = pytest.mark.parametrize("suppress", [non_maximum_suppression, suppress_at_once, enough_rounds])
Suppress = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def separated_predictions(generator: torch.Generator, *, batch: int, anchors: int, classes: int) -> Predictions:
    """As ``random_predictions``, but no two class scores of an image are closer than rounding can tell apart."""
    predictions = oracles.random_predictions(generator, batch=batch, anchors=anchors, classes=classes, spread=0.7)
    # Distinct scores up to 0.95 / classes, some below 0.01; the background takes the rest of each anchor's 1.
    levels = torch.linspace(1e-4, 0.95 / classes, anchors * classes, dtype=torch.float64)
    shuffled = [levels[torch.randperm(len(levels), generator=generator)] for _ in range(batch)]
    scores = torch.stack(shuffled).view(batch, anchors, classes)
    scores = torch.cat([scores, 1 - scores.sum(dim=2, keepdim=True)], dim=2)
    return predictions._replace(odm_logits=(scores.log() + torch.randn(1, generator=generator)).float())


def compare(predictions: Predictions, config: ModelConfig, margin: Margin) -> None:
    inference = config.inference
    expected = oracles.postprocess(
        predictions, candidates=inference.candidates, candidates_per=inference.candidates_per,
        nms_iou=inference.nms_iou, max_detections=inference.max_detections,
        score_threshold=inference.score_threshold, theta=config.negative_threshold, margin=margin,
    )  # fmt: skip
    if margin.smallest < TOO_CLOSE:
        return
    result = postprocess(predictions, config)
    batch, width = result.scores.shape
    assert result.boxes.shape == (batch, width, 4)
    assert width <= inference.max_detections
    assert result.counts.tolist() == [len(one) for one in expected]
    for b, one in enumerate(expected):
        count = len(one)
        assert result.scores[b, :count].tolist() == pytest.approx([score for score, _, _ in one], rel=1e-4)
        assert result.labels[b, :count].tolist() == [label for _, label, _ in one]
        boxes = torch.tensor([box for _, _, box in one], dtype=torch.float64).view(-1, 4)
        torch.testing.assert_close(result.boxes[b, :count].double(), boxes, rtol=1e-4, atol=2e-3)
        assert result.labels[b, count:].eq(-1).all()
        assert result.scores[b, count:].eq(0).all()
        assert result.boxes[b, count:].eq(0).all()


@settings(max_examples=120, deadline=None)
@given(
    seed=seeds, batch=st.integers(1, 3), anchors=st.integers(1, 60), classes=st.integers(1, 5),
    inference=st.sampled_from([
        PAPER, OFFICIAL, InferenceConfig(candidates=25, max_detections=10),
        InferenceConfig(candidates=8, candidates_per="class", max_detections=12),
        InferenceConfig(candidates=30, max_detections=30, nms_iou=0.3, score_threshold=0.05),
        InferenceConfig(score_threshold=0.0, nms_iou=0.8),
    ]),
    theta=st.sampled_from([0.99, 0.99, 0.6, 1.0]),
)  # fmt: skip
def test_postprocess_equals_the_loop(
    seed: int, batch: int, anchors: int, classes: int, inference: InferenceConfig, theta: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions = separated_predictions(generator, batch=batch, anchors=anchors, classes=classes)
    margin = Margin()
    compare(predictions, ModelConfig(num_classes=classes, negative_threshold=theta, inference=inference), margin)
    assume(margin.smallest >= TOO_CLOSE)


@pytest.mark.parametrize("inference", [PAPER, OFFICIAL])
def test_limits_of_paper_and_official_code(inference: InferenceConfig) -> None:
    """Few overlaps, so that every limit is reached: 400 and 200, or 1,000 and 500."""
    generator = torch.Generator().manual_seed(11)
    predictions = separated_predictions(generator, batch=1, anchors=1100, classes=2)
    predictions = predictions._replace(
        arm_logits=torch.zeros(1, 1100, 2),
        anchors=oracles.random_boxes(generator, 1100, smallest=8, largest=24, side=600),
    )
    config = ModelConfig(num_classes=2, inference=inference)
    margin = Margin()
    compare(predictions, config, margin)
    assert margin.smallest >= TOO_CLOSE
    assert postprocess(predictions, config).counts.tolist() == [inference.max_detections]


def test_candidates_are_cut_before_suppression() -> None:
    # Three equal boxes and a lone one with the lowest score. Of 3 candidates one survives, of 4 two.
    predictions = simple([[0, 0, 10, 10]] * 3 + [[50, 50, 60, 60]], [[0.9], [0.8], [0.7], [0.6]])
    for candidates, expected in ((3, [0.9]), (4, [0.9, 0.6])):
        config = ModelConfig(num_classes=1, inference=InferenceConfig(candidates=candidates))
        result = postprocess(predictions, config)
        assert result.scores[0, : int(result.counts[0])].tolist() == pytest.approx(expected)


def simple(anchors: list[list[float]], scores: list[list[float]], batch: int = 1) -> Predictions:
    """Zero offsets and the scores given, the background takes the rest; every anchor passes the ARM."""
    count = len(anchors)
    classes = torch.tensor(scores, dtype=torch.float64)
    logits = torch.cat([classes, 1 - classes.sum(dim=1, keepdim=True)], dim=1).log().float()
    return Predictions(
        torch.zeros(batch, count, 4), torch.zeros(batch, count, 2), torch.zeros(batch, count, 4),
        logits.expand(batch, -1, -1), torch.tensor(anchors, dtype=torch.float32),
    )  # fmt: skip


def test_candidates_per_image_are_pairs_over_all_classes() -> None:
    # One anchor with three good classes uses up three candidates of the image, but one of each class.
    predictions = simple([[0, 0, 10, 10], [50, 50, 60, 60]], [[0.3, 0.31, 0.32], [0.2, 0.1, 0.05]])
    image = ModelConfig(num_classes=3, inference=InferenceConfig(candidates=3))
    result = postprocess(predictions, image)
    assert result.labels[0].tolist() == [2, 1, 0]
    each = ModelConfig(num_classes=3, inference=InferenceConfig(candidates=1, candidates_per="class"))
    result = postprocess(predictions, each)
    assert result.labels[0].tolist() == [2, 1, 0]
    both = ModelConfig(num_classes=3, inference=InferenceConfig(candidates=2, candidates_per="class"))
    result = postprocess(predictions, both)
    assert result.labels[0].tolist() == [2, 1, 0, 0, 1, 2]
    assert result.boxes[0, :, 0].tolist() == pytest.approx([0, 0, 0, 50, 50, 50], abs=1e-4)


@both_ways
def test_nms_chain_by_hand(suppress: Suppress) -> None:
    # A = (0, 0, 10, 10), B = A moved by 3, C = A moved by 6: A and B share 70 of 130 (0.538 > 0.45), so do B and C;
    # A and C share 40 of 160 (0.25). A drops B; B, dropped, cannot drop C; so A and C stay. D = A moved by 9 shares
    # 70 of 130 with C and goes.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10], [9, 0, 19, 10]]])
    labels, valid = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool)
    assert suppress(boxes, labels, valid, 0.45).tolist() == [[True, False, True, False]]
    # Other classes do not compete, invalid boxes neither: without A, B stays and drops C, and D stays.
    other = torch.tensor([[0, 1, 0, 1]])
    assert suppress(boxes, other, valid, 0.45).tolist() == [[True] * 4]
    without = torch.tensor([[False, True, True, True]])
    assert suppress(boxes, labels, without, 0.45).tolist() == [[False, True, False, True]]


@both_ways
def test_suppression_wants_more_than_the_threshold(suppress: Suppress) -> None:
    # Overlap exactly 0.5: kept at 0.5, dropped below.
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4]]])
    labels, valid = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    assert suppress(boxes, labels, valid, 0.5).tolist() == [[True, True]]
    assert suppress(boxes, labels, valid, 0.4999).tolist() == [[True, False]]


@both_ways
def test_a_long_chain(suppress: Suppress) -> None:
    # Each box drops the next: the rounds needed grow with the length.
    count = 60
    boxes = torch.tensor([[[3.0 * i, 0, 3.0 * i + 10, 10] for i in range(count)]])
    keep = suppress(boxes, torch.zeros(1, count, dtype=torch.int64), torch.ones(1, count, dtype=torch.bool), 0.45)
    assert keep[0].tolist() == [i % 2 == 0 for i in range(count)]


@both_ways
@settings(max_examples=150, deadline=None)
@given(seed=seeds, batch=st.integers(1, 3), count=st.integers(0, 50), classes=st.integers(1, 4),
       threshold=st.sampled_from([0.45, 0.1, 0.8]), share=st.sampled_from([1.0, 0.6]))  # fmt: skip
def test_nms_equals_the_greedy_loop(
    suppress: Suppress, seed: int, batch: int, count: int, classes: int, threshold: float, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack(
        [oracles.random_boxes(generator, count, smallest=10, largest=50, side=60) for _ in range(batch)]
    )
    labels = torch.randint(0, classes, (batch, count), generator=generator)
    valid = torch.rand(batch, count, generator=generator) < share
    keep = suppress(boxes, labels, valid, threshold)
    for b in range(batch):
        expected = set()
        for label in range(classes):
            own = [i for i in range(count) if int(labels[b, i]) == label and bool(valid[b, i])]
            margin = Margin()
            kept = oracles.nms([boxes[b, i].double().tolist() for i in own], threshold, margin)
            assume(margin.smallest > 1e-6)
            expected |= {own[index] for index in kept}
        assert set(keep[b].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_many_boxes_are_suppressed_alike_in_blocks_and_at_once(classes: int) -> None:
    # Labels of many boxes have a block of their own, rare ones share one: more boxes than the loop above can check.
    generator = torch.Generator().manual_seed(classes)
    boxes = torch.stack([oracles.random_boxes(generator, 900, smallest=20, largest=60, side=150) for _ in range(2)])
    labels = torch.randint(0, classes, (2, 900), generator=generator)
    labels = torch.where(torch.rand(2, 900, generator=generator) < 0.4, 0, labels)
    valid = torch.rand(2, 900, generator=generator) < 0.9
    kept = non_maximum_suppression(boxes, labels, valid, 0.45)
    assert 2 * classes < kept.sum() < 1200
    assert torch.equal(kept, suppress_at_once(boxes, labels, valid, 0.45))


def test_too_few_rounds_are_told() -> None:
    # In a chain of 10 boxes, n rounds decide the first n, and one more shows that nothing changes.
    boxes = torch.tensor(
        [[[3.0 * i, 0, 3.0 * i + 10, 10] for i in range(10)], [[20.0 * i, 0, 9, 9] for i in range(10)]]
    )
    labels, valid = torch.zeros(2, 10, dtype=torch.int64), torch.ones(2, 10, dtype=torch.bool)
    assert [suppress_in_rounds(boxes, labels, valid, 0.45, n)[1].tolist() for n in (4, 9, 10)] == [
        [False, True],
        [False, True],
        [True, True],
    ]


@pytest.mark.parametrize("inference", [PAPER, OFFICIAL], ids=["paper", "official"])
def test_a_graph_of_fixed_rounds_gives_the_same_detections(inference: InferenceConfig) -> None:
    generator = torch.Generator().manual_seed(9)
    config = ModelConfig(num_classes=4, inference=inference)
    for _ in range(20):
        predictions = separated_predictions(generator, batch=3, anchors=60, classes=4)
        for ours, graph in zip(
            postprocess(predictions, config), postprocess(predictions, config, rounds=16), strict=True
        ):
            assert torch.equal(ours, graph)


def test_filtered_anchors_detect_nothing() -> None:
    # Negative confidences 1 / (1 + e^-4.5) = 0.98901 and 1 / (1 + e^-4.7) = 0.99098.
    predictions = simple([[0, 0, 10, 10], [50, 50, 60, 60]], [[0.9], [0.8]])
    predictions.arm_logits[0] = torch.tensor([[0.0, 4.7], [0.0, 4.5]])
    result = postprocess(predictions, ModelConfig(num_classes=1))
    assert result.counts.tolist() == [1]
    assert result.scores[0, 0].item() == pytest.approx(0.8)
    nothing = dataclasses.replace(ModelConfig(num_classes=1), negative_threshold=1.0)
    predictions.arm_logits[0] = torch.tensor([[-200.0, 200.0]] * 2)
    assert postprocess(predictions, nothing).counts.tolist() == [2]


def test_a_value_exactly_at_its_threshold() -> None:
    # Equal logits: a negative confidence of 0.5 does not exceed 0.5, but a score of 0.25 must exceed 0.25 to count.
    predictions = simple([[0, 0, 10, 10]], [[0.25, 0.25, 0.25]])._replace(odm_logits=torch.zeros(1, 1, 4))
    for threshold, expected in ((0.25, 0), (0.2499, 3)):
        config = ModelConfig(
            num_classes=3, negative_threshold=0.5, inference=InferenceConfig(score_threshold=threshold)
        )
        assert postprocess(predictions, config).counts.tolist() == [expected]


def test_nothing_found() -> None:
    predictions = simple([[0, 0, 10, 10]] * 3, [[0.009], [0.001], [0.0099]], batch=2)
    result = postprocess(predictions, ModelConfig(num_classes=1))
    assert result.counts.tolist() == [0, 0]
    assert result.labels.eq(-1).all()
    assert result.scores.eq(0).all()
    assert result.boxes.eq(0).all()


def test_equal_scores_come_in_the_order_of_anchors_and_classes() -> None:
    anchors = [[20.0 * i, 0, 20.0 * i + 10, 10] for i in range(300)]
    predictions = simple(anchors, [[0.25, 0.25]] * 300)
    inference = InferenceConfig(candidates=600, max_detections=600)
    result = postprocess(predictions, ModelConfig(num_classes=2, inference=inference))
    assert result.counts.tolist() == [600]
    assert result.labels[0].tolist() == [0, 1] * 300
    assert result.boxes[0, ::2, 0].tolist() == pytest.approx([20.0 * i for i in range(300)], abs=1e-2)


def test_boxes_are_not_clipped_and_refined_twice() -> None:
    # The ARM moves the anchor by -20 * 0.1 * 10 px = -20 px, the ODM doubles its width.
    predictions = simple([[0, 0, 10, 10]], [[0.9]])
    predictions.arm_offsets[0, 0] = torch.tensor([-20.0, 0, 0, 0])
    predictions.odm_offsets[0, 0] = torch.tensor([0.0, 0, 3.4657359, 0])
    result = postprocess(predictions, ModelConfig(num_classes=1))
    # Centre 5 - 20 = -15; width 10 * exp(0.2 * 3.4657359) = 20.
    assert result.boxes[0, 0].tolist() == pytest.approx([-25.0, 0.0, -5.0, 10.0], abs=1e-4)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_absurd_outputs_give_finite_boxes(value: float) -> None:
    generator = torch.Generator().manual_seed(5)
    predictions = oracles.random_predictions(generator, batch=2, anchors=40, classes=3)
    predictions.arm_offsets.fill_(value)
    predictions.odm_offsets.copy_(value * torch.randn(2, 40, 4, generator=generator).sign())
    predictions.arm_logits[..., 0] = value
    result = postprocess(predictions, ModelConfig(num_classes=3))
    assert torch.isfinite(result.boxes).all()
    assert torch.isfinite(result.scores).all()


def test_half_precision_is_decoded_in_float32_and_needs_no_gradient() -> None:
    generator = torch.Generator().manual_seed(6)
    full = oracles.random_predictions(generator, batch=2, anchors=40, classes=3)
    half = Predictions(*(output.bfloat16().requires_grad_() for output in full[:4]), full.anchors)
    rounded = Predictions(*(output.detach().float() for output in half[:4]), full.anchors)
    config = ModelConfig(num_classes=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = postprocess(half, config)
    assert not got.scores.requires_grad
    for ours, expected in zip(got, postprocess(rounded, config), strict=True):
        assert torch.equal(ours, expected)


def test_an_image_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(7)
    predictions = separated_predictions(generator, batch=3, anchors=50, classes=4)
    for inference in (PAPER, OFFICIAL):
        config = ModelConfig(num_classes=4, inference=inference)
        joint = postprocess(predictions, config)
        for b in range(3):
            alone = postprocess(Predictions(*(x[b : b + 1] for x in predictions[:4]), predictions.anchors), config)
            for whole, one in zip(joint, alone, strict=True):
                assert torch.equal(whole[b], one[0])
