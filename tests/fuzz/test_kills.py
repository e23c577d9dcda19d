"""A short form of the kill program."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fuzz import kills


@pytest.mark.slow  # each kill is the start of a training
@pytest.mark.timeout(1500)
def test_trainings_that_are_killed_end_as_one_that_is_not(tmp_path: Path) -> None:
    assert kills.run(kills.make_data(tmp_path / "voc"), tmp_path, kills=12, seed=3, seconds=600.0) == []
