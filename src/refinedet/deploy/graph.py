"""The whole detector as one graph: input pixels to padded detections, with shapes that tracing can fix.

Post-processing is ``model.postprocess`` with a fixed number of rounds of suppression, so no step depends on data.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from refinedet.detector import RefineDet
from refinedet.model.network import Predictions, evaluation_view
from refinedet.model.postprocess import postprocess

InputType = Literal["float32", "uint8"]

ROUNDS = 32
"""Rounds of suppression in a graph. The greedy outcome of an image needs as many rounds as its longest chain of boxes
that suppress each other in turn, plus one; verification shows whether these are enough, and ``settled`` at run time."""


class GraphDetections(NamedTuple):
    """Outputs of an exported detector, D = ``max_detections``."""

    boxes: Tensor
    """(B, D, 4) float32 xyxy in pixels of the network input, not clipped to it, 0 where padded."""
    scores: Tensor
    """(B, D) float32, best first, 0 where padded."""
    labels: Tensor
    """(B, D) int64, -1 where padded."""
    num_detections: Tensor
    """(B,) int64: how many rows are not padding."""
    settled: Tensor
    """(B,) bool: False if suppression needed more rounds than the graph has, so that boxes may be missing or extra."""
    finite: Tensor
    """(B,) bool: False if the network's scores are no finite numbers, which reads as an image without objects."""


OUTPUTS = GraphDetections._fields
RAW_OUTPUTS = Predictions._fields


class DetectorGraph(nn.Module):
    """Normalisation, network and post-processing of a detector as one module.

    Args:
        detector: weights and configuration; its network is left as it is.
        raw: leave out post-processing; the outputs are those of ``Predictions``.
        rounds: rounds of suppression.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, detector: RefineDet, *, raw: bool = False, rounds: int = ROUNDS) -> None:
        super().__init__()
        config = detector.config
        self.network = evaluation_view(detector.network)
        self.config, self.raw, self.rounds = config, raw, rounds
        self.register_buffer("mean", torch.tensor(config.mean).reshape(1, 3, 1, 1), persistent=False)
        # A product with the reciprocal, as in ``preprocess.normalize``.
        self.register_buffer("scale", 1.0 / torch.tensor(config.std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (B, H, W, 3) RGB in 0..255, float32 or uint8, resized to the network's input.

        Returns:
            The fields of ``GraphDetections`` or ``Predictions``, as a plain tuple: AOTInductor and ExecuTorch take no
            other.
        """
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        if self.config.channel_order == "bgr":
            pixels = pixels.flip(1)
        predictions: Predictions = self.network((pixels - self.mean) * self.scale)
        if self.raw:
            return tuple(predictions)
        found = postprocess(predictions, self.config, rounds=self.rounds)
        finite = predictions.odm_logits.isfinite().flatten(1).all(dim=1)
        return (found.boxes, found.scores, found.labels, found.counts, found.settled, finite)
