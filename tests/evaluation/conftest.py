"""pycocotools as the oracle of the COCO numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest


@pytest.fixture
def pycocotools_numbers() -> Callable[[Path, list[dict[str, Any]]], npt.NDArray[np.float64]]:
    """A function of an annotation file and detections in COCO's results form that gives pycocotools' 12 numbers."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    def numbers(annotation_file: Path, results: list[dict[str, Any]]) -> npt.NDArray[np.float64]:
        with contextlib.redirect_stdout(io.StringIO()):
            reference = coco.COCO(str(annotation_file))
            evaluator = cocoeval.COCOeval(reference, reference.loadRes(results), "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return np.asarray(evaluator.stats, dtype=np.float64)

    return numbers
