"""Which images to label next."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinedet.detections import Detections
from refinedet.ranking import rank, rank_csv


def found(scores: list[float], source: str | None = "a.jpg") -> Detections:
    return Detections([[0, 0, 1, 1]] * len(scores), scores, [0] * len(scores), ("cat",), (4, 4), source)  # type: ignore[arg-type]


def test_by_hand() -> None:
    one = rank(found([0.95, 0.5, 0.3, 0.1, 0.09]))
    assert one.uncertainty == pytest.approx(0.05 + 0.5 + 0.3 + 0.1)
    assert (one.image, one.doubtful, one.detections) == ("a.jpg", 2, 4)
    assert rank(found([], None)).uncertainty == 0


@given(st.lists(st.floats(0, 1, width=32), max_size=20))
def test_sure_scores_add_nothing_and_others_only_add(scores: list[float]) -> None:
    before = rank(found(scores)).uncertainty
    assert rank(found([*scores, 1.0])).uncertainty == before
    assert before <= rank(found([*scores, 0.5])).uncertainty == pytest.approx(before + 0.5, abs=1e-3)
    assert 0 <= before <= 0.5 * len(scores)


def test_table_is_sorted_and_keeps_odd_names() -> None:
    ranks = [rank(found(scores, name)) for scores, name in (([0.9], "a,b.jpg"), ([0.5, 0.5], 'q"x.jpg'), ([], "c.jpg"))]
    rows = list(csv.DictReader(io.StringIO(rank_csv(ranks))))
    assert [row["image"] for row in rows] == ['q"x.jpg', "a,b.jpg", "c.jpg"]
    assert np.all(np.diff([float(row["uncertainty"]) for row in rows]) <= 0)
