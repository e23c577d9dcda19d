"""The settings of a report and their JSON form."""

from __future__ import annotations

import json

from refinedet.config import ModelConfig
from refinedet.dataclass_json import from_dict
from refinedet.evaluation.settings import EvaluationSettings, LeftOut
from refinedet.provenance import Provenance


def test_json_gives_the_settings_back() -> None:
    settings = EvaluationSettings(
        model=ModelConfig(num_classes=3),
        weights="runs/a",
        score_threshold=0.25,
        limit=7,
        multi_scale=True,
        passes=("320x320", "320x192 flipped"),
        left_out=LeftOut(("tv",), ("fox", "owl")),
        trained_on=2,
        provenance=Provenance.now("cpu"),
    )
    assert from_dict(EvaluationSettings, json.loads(json.dumps(settings.to_dict()))) == settings
    assert from_dict(EvaluationSettings, {}) == EvaluationSettings()
    assert str(settings.left_out) == "1 of the model, 2 of the data"
