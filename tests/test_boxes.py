"""Box arithmetic against hand-computed values and loops over single boxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from oracles import STD
from refinedet import boxes as box_ops

STD_TENSOR = torch.tensor(STD)
seeds = st.integers(0, 2**32 - 1)


def boxes_of(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return oracles.random_boxes(generator, count, smallest=2, largest=150, side=320)


def test_iou_by_hand() -> None:
    # 10 x 10 and 10 x 20, common part x 5..10, y 4..10: 5 * 6 = 30; union 100 + 200 - 30 = 270; 30 / 270 = 1 / 9.
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    b = torch.tensor([[5.0, 4.0, 15.0, 24.0], [10.0, 0.0, 20.0, 10.0], [0.0, 0.0, 10.0, 10.0], [2.0, 2.0, 4.0, 7.0]])
    # The second only touches; the third is the box itself; the fourth lies within: 10 / 100.
    expected = torch.tensor([[1 / 9, 0.0, 1.0, 0.1]])
    torch.testing.assert_close(box_ops.iou(a, b), expected)


def test_encode_by_hand() -> None:
    # Anchor: centre (20, 40), 40 x 20. Box: centre (22, 37), 80 x 10.
    # Shift: 2 / 40 = 0.05 and -3 / 20 = -0.15, over 0.1: 0.5 and -1.5. Scale: ln 2 = 0.693147 and ln 0.5, over 0.2.
    anchor, box = torch.tensor([0.0, 30.0, 40.0, 50.0]), torch.tensor([-18.0, 32.0, 62.0, 42.0])
    expected = torch.tensor([0.5, -1.5, 3.465736, -3.465736])
    torch.testing.assert_close(box_ops.encode(box, anchor, STD_TENSOR), expected)
    torch.testing.assert_close(box_ops.decode(expected, anchor, STD_TENSOR), box)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, rows=st.integers(0, 8), columns=st.integers(0, 8))
def test_iou_equals_the_loop(seed: int, rows: int, columns: int) -> None:
    a, b = boxes_of(seed, rows), boxes_of(seed + 1, columns)
    expected = [[oracles.iou(x, y) for y in b.tolist()] for x in a.tolist()]
    result = box_ops.iou(a, b)
    assert result.shape == (rows, columns)
    torch.testing.assert_close(result.double(), torch.tensor(expected, dtype=torch.float64).view(rows, columns),
                               atol=2e-6, rtol=0)  # fmt: skip
    torch.testing.assert_close(box_ops.iou(b, a), result.T)


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_coding_equals_the_loop_and_inverts(seed: int) -> None:
    boxes, anchors = boxes_of(seed, 20), boxes_of(seed + 1, 20)
    offsets = box_ops.encode(boxes, anchors, STD_TENSOR)
    expected = [oracles.encode(x, y) for x, y in zip(boxes.tolist(), anchors.tolist(), strict=True)]
    torch.testing.assert_close(offsets.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(box_ops.decode(offsets, anchors, STD_TENSOR), boxes, atol=1e-3, rtol=1e-4)
    random = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)) * 3
    expected = [oracles.decode(x, y) for x, y in zip(random.tolist(), anchors.tolist(), strict=True)]
    result = box_ops.decode(random, anchors, STD_TENSOR)
    torch.testing.assert_close(result.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-3, rtol=1e-5)


def test_leading_shapes_broadcast() -> None:
    anchors, boxes = boxes_of(0, 6), boxes_of(1, 12).view(3, 4, 4)
    overlaps = box_ops.iou(boxes, anchors.expand(3, 6, 4))
    assert overlaps.shape == (3, 4, 6)
    for image in range(3):
        assert torch.equal(overlaps[image], box_ops.iou(boxes[image], anchors))
    offsets = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(box_ops.decode(offsets, anchors, STD_TENSOR)[2],
                       box_ops.decode(offsets[2], anchors, STD_TENSOR))  # fmt: skip


def test_boxes_without_area() -> None:
    flat = torch.tensor([[5.0, 5.0, 5.0, 9.0]])
    inverted = [torch.tensor([corners]) for corners in ([9.0, 9, 2, 2], [9.0, 2, 2, 9], [2.0, 9, 9, 2])]
    whole = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    for box in (flat, *inverted):
        assert box_ops.area(box).item() == 0
        assert box_ops.iou(box, whole).item() == 0
        assert box_ops.iou(box, box).item() == 0
        assert torch.isfinite(box_ops.encode(box, whole, STD_TENSOR)).all()
        assert torch.isfinite(box_ops.encode(whole, box, STD_TENSOR)).all()
    # Sides count as 1e-6: ln(1e-6 / 10) / 0.2 = -80.59.
    expected = math.log(1e-7) / 0.2
    assert box_ops.encode(flat, whole, STD_TENSOR)[0, 2].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_absurd_offsets_decode_to_finite_boxes(value: float) -> None:
    anchors = torch.tensor([[0.0, 0.0, 362.0, 181.0]])
    offsets = torch.full((1, 4), value, requires_grad=True)
    once = box_ops.decode(offsets, anchors, STD_TENSOR)
    once.sum().backward()
    assert torch.isfinite(offsets.grad).all()
    assert torch.isfinite(box_ops.iou(once, once)).all()
    assert torch.isfinite(box_ops.decode(offsets.detach(), once.detach(), STD_TENSOR)).all()


def test_usual_scales_are_not_cut() -> None:
    # exp(0.2 * 20) = 54.6: a 2-pixel anchor becomes a 109-pixel box.
    box = box_ops.decode(torch.tensor([0.0, 0.0, 20.0, -20.0]), torch.tensor([9.0, 9.0, 11.0, 11.0]), STD_TENSOR)
    half_width, half_height = math.exp(4.0), math.exp(-4.0)
    expected = torch.tensor([10 - half_width, 10 - half_height, 10 + half_width, 10 + half_height])
    torch.testing.assert_close(box, expected)


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_conversions_clip_scale(seed: int) -> None:
    boxes = boxes_of(seed, 10)
    original = boxes.clone()
    torch.testing.assert_close(box_ops.to_xyxy(box_ops.to_cxcywh(boxes)), boxes, atol=1e-4, rtol=0)
    clipped = box_ops.clip(boxes, 100, 200)
    scaled = box_ops.scale(boxes, 2.0, 0.5)
    for row, (x1, y1, x2, y2) in enumerate(original.tolist()):
        converted = box_ops.to_cxcywh(boxes)[row].tolist()
        assert converted == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], abs=1e-4)
        cut = [min(max(x1, 0), 200), min(max(y1, 0), 100), min(max(x2, 0), 200), min(max(y2, 0), 100)]
        assert clipped[row].tolist() == pytest.approx(cut)
        assert scaled[row].tolist() == pytest.approx([2 * x1, y1 / 2, 2 * x2, y2 / 2], abs=1e-4)
    assert torch.equal(boxes, original)


def test_scale_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        box_ops.scale(torch.zeros(1, 4), math.nan, 1.0)
    with pytest.raises(ValueError, match="finite"):
        box_ops.scale(torch.zeros(1, 4), 1.0, math.inf)


def test_dtype_is_kept() -> None:
    boxes = boxes_of(0, 3).double()
    for result in (
        box_ops.iou(boxes, boxes),
        box_ops.encode(boxes, boxes, STD_TENSOR.double()),
        box_ops.clip(boxes, 9, 9),
        box_ops.scale(boxes, 1.5, 1.5),
    ):
        assert result.dtype == torch.float64
