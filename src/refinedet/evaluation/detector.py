"""What can be evaluated."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from refinedet.config import ModelConfig
from refinedet.detections import Detections


class Detector(Protocol):
    """A ``RefineDet``, or anything else that turns images into detections."""

    @property
    def config(self) -> ModelConfig:
        """Network, input and post-processing; of another kind of detector, whatever of it applies."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names; the index is the label."""

    def predict_arrays(
        self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        """One ``Detections`` for each (H, W, 3) RGB image, in its pixels.

        Args:
            images: sizes may differ.
            threshold: lowest score returned; None returns everything.
        """
