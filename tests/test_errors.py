from __future__ import annotations

import pytest

from refinedet.errors import RefineDetError, UsageError, did_you_mean


def test_exit_codes_and_kinds() -> None:
    assert (RefineDetError.exit_code, UsageError.exit_code) == (1, 2)
    assert issubclass(UsageError, RefineDetError)
    assert issubclass(RefineDetError, ValueError)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("predcit", "did you mean 'predict'?"),
        ("PREDICT", "did you mean 'predict'?"),
        ("voc", "did you mean 'VOC'?"),
        ("zzz", "known: train, predict, VOC"),
        ("", "known: train, predict, VOC"),
    ],
)
def test_did_you_mean(word: str, hint: str) -> None:
    assert did_you_mean(word, ["train", "predict", "VOC"]) == hint


def test_a_distant_word_has_another_hint_where_the_list_would_be_long() -> None:
    assert did_you_mean("zzz", ["train"], otherwise="see --help") == "see --help"
    assert did_you_mean("trian", ["train"], otherwise="see --help") == "did you mean 'train'?"
    assert did_you_mean("tra", ["train"], cutoff=0.9, otherwise="") == ""
