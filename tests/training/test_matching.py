"""Matching and mining against the loop over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
from oracles import Margin
from refinedet.training.matching import Targets, match, match_together, mine_negatives

seeds = st.integers(0, 2**32 - 1)
objects = st.lists(st.integers(0, 12), min_size=1, max_size=4)
TOO_CLOSE = 2e-6


def compare(anchors: torch.Tensor, targets: Targets, positive_iou: float) -> None:
    """``anchors`` (A, 4), or (B, A, 4)."""
    batch, count = len(targets.labels), anchors.shape[-2]
    result = match(anchors, targets, positive_iou)
    together = match_together(anchors.expand(batch, count, 4), targets, positive_iou)
    assert torch.equal(result.target, together.target)
    assert torch.equal(result.overlap, together.overlap)
    assert result.target.shape == (batch, count)
    assert result.overlap.shape == (batch, count)
    for b in range(batch):
        own = anchors if anchors.ndim == 2 else anchors[b]
        boxes = targets.boxes[b][targets.labels[b] >= 0]
        margin = Margin()
        matched, overlaps = oracles.match(own.double().tolist(), boxes.double().tolist(), positive_iou, margin)
        assume(margin.smallest > TOO_CLOSE)
        assert result.target[b].tolist() == matched
        assert result.overlap[b].tolist() == pytest.approx(overlaps, abs=2e-6)


@settings(max_examples=150, deadline=None)
@given(
    seed=seeds, count=st.integers(1, 60), objects=objects, kind=st.sampled_from(["usual", "twins", "tiny"]),
    positive_iou=st.sampled_from([0.5, 0.7, 0.3]), own_anchors=st.booleans(),
)  # fmt: skip
def test_match_equals_the_loop(
    seed: int, count: int, objects: list[int], kind: str, positive_iou: float, own_anchors: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = len(objects) * count if own_anchors else count
    anchors = oracles.random_boxes(generator, shape, smallest=16, largest=64, side=128)
    if own_anchors:
        anchors = anchors.view(len(objects), count, 4)
    compare(anchors, oracles.random_targets(generator, objects, 3, kind=kind), positive_iou)


@settings(max_examples=200, deadline=None)
@given(
    seed=seeds, count=st.integers(1, 14), objects=st.integers(0, 8), positive_iou=st.sampled_from([0.5, 0.25]),
    side=st.sampled_from([3, 4, 6]),
)  # fmt: skip
def test_exact_ties_and_thresholds_go_as_in_the_loop(
    seed: int, count: int, objects: int, positive_iou: float, side: int
) -> None:
    """Corners on a small grid: overlaps are fractions of small integers, equal ones exactly so in any precision."""
    generator = torch.Generator().manual_seed(seed)

    def grid_boxes(number: int) -> torch.Tensor:
        corner = torch.randint(0, side, (number, 2), generator=generator)
        return torch.cat([corner, corner + torch.randint(1, 4, (number, 2), generator=generator)], dim=1).float()

    anchors, boxes = grid_boxes(count), grid_boxes(objects)
    result = match(anchors, Targets.collate([boxes], [torch.zeros(objects, dtype=torch.int64)]), positive_iou)
    matched, overlaps = oracles.match(anchors.tolist(), boxes.tolist(), positive_iou)
    assert result.target[0].tolist() == matched
    assert result.overlap[0].tolist() == pytest.approx(overlaps)


@settings(max_examples=8, deadline=None)
@given(seed=seeds, count=st.sampled_from([30, 130]))
def test_a_hundred_objects_with_fewer_or_more_anchors(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors = oracles.random_boxes(generator, count, smallest=16, largest=64, side=128)
    compare(anchors, oracles.random_targets(generator, [100, 3], 20), 0.5)


@pytest.mark.parametrize("seed", range(300))
def test_the_queue_makes_the_pairs_of_the_rounds(seed: int) -> None:
    """Crowded images, bit for bit: on a coarse grid most overlaps are tied, and many targets want the same anchors."""
    generator = torch.Generator().manual_seed(seed)
    count, objects = (int(torch.randint(1, most, (), generator=generator)) for most in (90, 60))
    if seed % 3 == 0:
        anchors = oracles.random_boxes(generator, count, smallest=16, largest=64, side=100)
        boxes = oracles.random_boxes(generator, objects, smallest=16, largest=64, side=100)
    else:
        corner = torch.randint(0, 5, (count + objects, 2), generator=generator)
        grid = torch.cat([corner, corner + torch.randint(1, 4, (count + objects, 2), generator=generator)], dim=1)
        anchors, boxes = grid[:count].float(), grid[count:].float()
    labels = torch.randint(-1 if seed % 2 else 0, 3, (1, objects), generator=generator)
    targets = Targets(boxes[None], labels)
    queue, rounds = match(anchors, targets, 0.5), match_together(anchors[None], targets, 0.5)
    assert torch.equal(queue.target, rounds.target)
    assert torch.equal(queue.overlap, rounds.overlap)


def test_two_targets_that_want_one_anchor() -> None:
    # Anchor 0 = (0, 0, 10, 10) is the best of both targets: 8 / 10 and 9 / 10 of it. The better pair comes first; the
    # other target takes anchor 1 = (0, 5, 10, 15) although it overlaps little: 10 x 3 of 80 + 100 - 30 = 150: 0.2.
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 5, 10, 15], [50, 50, 60, 60]])
    targets = Targets.collate([torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 9]])], [torch.tensor([1, 0])])
    result = match(anchors, targets, 0.5)
    assert result.target.tolist() == [[1, 0, -1]]
    # Best overlap of anchor 1 is with the other target: 10 x 4 common, 90 + 100 - 40 = 150: 4 / 15.
    assert result.overlap[0].tolist() == pytest.approx([0.9, 4 / 15, 0.0])


def test_twins_take_the_two_best_anchors_lower_index_first() -> None:
    box = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    anchors = torch.tensor([[0.0, 0, 10, 7], [0, 0, 10, 9], [0, 0, 10, 6], [0, 0, 10, 1]])
    # Overlaps 0.7, 0.9, 0.6, 0.1: the first twin takes anchor 1, the second anchor 0; anchor 2 goes to the first.
    result = match(anchors, Targets.collate([box], [torch.tensor([0, 1])]), 0.5)
    assert result.target.tolist() == [[1, 0, 0, -1]]


def test_equal_anchors_lower_index_first() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 3]] * 3)
    targets = Targets.collate([torch.tensor([[0.0, 0, 10, 10]])], [torch.tensor([0])])
    assert match(anchors, targets, 0.5).target.tolist() == [[0, -1, -1]]


def test_of_tied_anchors_the_lowest_is_dealt_out_first() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
    # Overlaps with the two anchors: 1/3 and 0, 1/3 and 1/3, 0 and 1/3. Anchor 0 goes to the first target, so the second
    # gets anchor 1 and the third nothing; with anchor 1 dealt out first, the second would get nothing.
    boxes = torch.tensor([[-5.0, 0, 5, 10], [5, 0, 15, 10], [15, 0, 25, 10]])
    targets = Targets.collate([boxes], [torch.tensor([0, 1, 2])])
    assert match(anchors, targets, 0.5).target.tolist() == [[0, 1]]


def test_threshold_is_inclusive_and_the_greedy_step_ignores_it() -> None:
    # Overlaps 0.75, 0.5 and 0.25 are exact in binary.
    anchors = torch.tensor([[0.0, 0, 8, 6], [0, 0, 8, 4], [0, 0, 8, 2]])
    targets = Targets.collate([torch.tensor([[0.0, 0, 8, 8]])], [torch.tensor([4])])
    assert match(anchors, targets, 0.5).target.tolist() == [[0, 0, -1]]
    assert match(anchors, targets, 0.8).target.tolist() == [[0, -1, -1]]


@pytest.mark.parametrize(("height", "expected"), [(0.9e-4, -1), (1.1e-4, 0)])
def test_the_greedy_step_wants_more_overlap_than_a_millionth(height: float, expected: int) -> None:
    # A sliver of the 100 x 100 anchor: overlap = 100 * height / 10,000 = 1e-2 * height.
    anchors = torch.tensor([[0.0, 0, 100, 100]])
    targets = Targets.collate([torch.tensor([[0.0, 0, 100, height]])], [torch.tensor([0])])
    assert match(anchors, targets, 0.5).target.item() == expected


def test_a_target_that_touches_nothing_gets_nothing() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
    targets = Targets.collate([torch.tensor([[30.0, 30, 40, 40], [0, 10, 10, 20]])], [torch.tensor([0, 1])])
    assert match(anchors, targets, 0.5).target.tolist() == [[-1, -1]]


def test_padding_never_matches() -> None:
    # The padding of the first image lies at (0, 0, 0, 0); even a real box there must count as padding.
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    boxes = torch.tensor([[[20.0, 20, 30, 30], [0, 0, 10, 10]], [[0, 0, 10, 10], [20, 20, 30, 30]]])
    for labels, second in (([[0, -1], [0, 2]], [0, 1]), ([[0, -1], [-1, 2]], [-1, 1])):
        targets = Targets(boxes, torch.tensor(labels))
        for result in (match(anchors, targets, 0.5), match_together(anchors.expand(2, 2, 4), targets, 0.5)):
            assert result.target.tolist() == [[-1, 0], second]
            assert result.overlap.tolist() == [[0.0, 1.0], [1.0 + min(0, second[0]), 1.0]]


def test_no_targets_at_all() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    targets = Targets.collate([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    for result in (match(anchors, targets, 0.5), match_together(anchors.expand(2, 1, 4), targets, 0.5)):
        assert result.target.tolist() == [[-1], [-1]]
        assert result.overlap.tolist() == [[0.0], [0.0]]


def test_boxes_that_are_no_numbers_never_match() -> None:
    anchors = torch.tensor([[float("nan")] * 4, [0.0, 0, 10, 10]])
    targets = Targets.collate([torch.tensor([[0.0, 0, 10, 6]])], [torch.tensor([0])])
    result = match(anchors, targets, 0.5)
    assert result.target.tolist() == [[-1, 0]]
    assert torch.isfinite(result.overlap).all()


def test_match_leaves_its_arguments_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = oracles.random_boxes(generator, 20, smallest=16, largest=64, side=128).requires_grad_()
    targets = oracles.random_targets(generator, [3, 1], 2)
    before = anchors.detach().clone(), targets.boxes.clone(), targets.labels.clone()
    result = match(anchors, targets, 0.5)
    assert not result.overlap.requires_grad
    assert torch.equal(anchors, before[0])
    assert torch.equal(targets.boxes, before[1])
    assert torch.equal(targets.labels, before[2])


@settings(max_examples=150, deadline=None)
@given(seed=seeds, batch=st.integers(1, 4), count=st.integers(1, 80), ratio=st.sampled_from([3.0, 1.0, 0.0, 2.5]),
       share=st.sampled_from([0.0, 0.05, 0.3]))  # fmt: skip
def test_mining_equals_the_loop(seed: int, batch: int, count: int, ratio: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(batch, count, generator=generator) * 8
    positives = torch.rand(batch, count, generator=generator) < share
    candidates = ~positives & (torch.rand(batch, count, generator=generator) < 0.7)
    result = mine_negatives(losses, candidates, positives, ratio)
    for b in range(batch):
        expected = oracles.mine(losses[b].tolist(), candidates[b].tolist(), int(positives[b].sum()), ratio)
        assert result[b].tolist() == expected


def test_mining_by_hand() -> None:
    # One positive, three wanted of the four candidates; anchor 1 has the largest loss but is no candidate. Of the equal
    # losses of anchors 3 and 5 the earlier is taken. The second image has no positive, so it gets no negative.
    losses = torch.tensor([[0.0, 9.0, 5.0, 1.0, 4.0, 1.0], [1.0] * 6])
    candidates = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    positives = torch.tensor([[True, False, False, False, False, False], [False] * 6])
    expected = [[False, False, True, True, True, False], [False] * 6]
    assert mine_negatives(losses, candidates, positives, 3.0).tolist() == expected


def test_images_without_positives_can_be_given_negatives() -> None:
    losses = torch.tensor([[1.0, 5.0, 3.0, 4.0], [1.0, 5.0, 3.0, 4.0], [9.0, 5.0, 3.0, 4.0]])
    positives = torch.tensor([[True, False, False, False], [False] * 4, [False] * 4])
    candidates = ~positives
    candidates[2, 0] = False
    chosen = mine_negatives(losses, candidates, positives, 1.0, 2)
    assert chosen.tolist() == [[False, True, False, False], [False, True, False, True], [False, True, False, True]]
    assert mine_negatives(losses, candidates, positives, 1.0)[1:].sum() == 0


def test_equal_losses_go_by_index() -> None:
    # Hundreds of equal losses: an unstable sort would scatter the choice.
    candidates = torch.ones(1, 500, dtype=torch.bool)
    positives = torch.zeros(1, 500, dtype=torch.bool)
    positives[0, :40] = True
    chosen = mine_negatives(torch.full((1, 500), 2.0), candidates & ~positives, positives, 3.0)
    assert chosen[0].nonzero().flatten().tolist() == list(range(40, 160))


def test_collate_pads_and_marks() -> None:
    boxes = [torch.zeros(0, 4), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1.0, 1, 2, 2]])]
    labels = [torch.zeros(0, dtype=torch.int64), torch.tensor([4, 0]), torch.tensor([2])]
    targets = Targets.collate(boxes, labels)
    assert targets.labels.tolist() == [[-1, -1], [4, 0], [2, -1]]
    assert targets.valid.tolist() == [[False, False], [True, True], [True, False]]
    assert torch.equal(targets.boxes[1], boxes[1])
    assert torch.equal(targets.boxes[2, 0], boxes[2][0])
    moved = targets.to(torch.device("cpu"))
    assert torch.equal(moved.boxes, targets.boxes)
    assert torch.equal(moved.labels, targets.labels)
