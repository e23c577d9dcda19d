"""The multi-task loss (paper, equation 1) with the official code's details (reference: multibox_loss_layer.cpp)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinedet import boxes as box_ops
from refinedet.config import LossConfig, ModelConfig
from refinedet.model.network import PredictionHead, Predictions, passes_negative_filter, starting_boxes
from refinedet.training.matching import Targets, match, mine_negatives


class _Assignment(NamedTuple):
    """How a module's anchors become positive and negative, and what class a positive is to learn."""

    positive_iou: float
    negative_iou: float
    label_smoothing: float = 0.0


class RefineDetLoss(nn.Module):
    """Loss of the ARM on tiled anchors and of the ODM on refined anchors.

    * The ARM learns object or not, and offsets from the tiled anchors.
    * The ODM is matched on, and learns offsets from, the anchors that the ARM has refined; these are constants, so no
      gradient of the ODM's loss reaches the ARM's outputs.
    * Negative anchor filtering (``passes_negative_filter``): filtered anchors leave the pool of the ODM's hard
      negatives, and only that; a positive stays a positive (official bbox_util.cpp:1096-1110).
    * Each module's sums are divided by its number of positives, at least 1; a batch without positives gives 0.
    * Focal loss instead of mining: all candidates for mining are negatives, also in images without positives, and
      easy anchors weigh little.
    * Without ``two_step`` the ODM is matched on, and learns offsets from, the tiled anchors; without ``tcb`` there is
      no ARM, and its terms are 0.

    Args:
        model: offset_std, negative_threshold, two_step, tcb.
        config: thresholds of matching and mining.
        normalizer: maps this process's positive counts, (2,) of ARM and ODM, to the divisors of the losses; under DDP,
            the global count divided by the world size. None: the counts themselves, at least 1.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: LossConfig | None = None,
        *,
        normalizer: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.model = model
        self.negative_threshold = model.negative_threshold
        self.normalizer = normalizer
        self.register_buffer("offset_std", torch.tensor(model.offset_std), persistent=False)
        self.offset_std: Tensor

    def forward(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            predictions: raw outputs for B images, of any float type; all arithmetic is float32.
            targets: ground truth in pixels of the network input.

        Returns:
            Scalars ``arm_classification``, ``arm_localization``, ``odm_classification``, ``odm_localization`` and
            their sum ``total``.
        """
        with torch.autocast(predictions.arm_logits.device.type, enabled=False):
            arm_offsets, arm_logits = predictions.arm_offsets.float(), predictions.arm_logits.float()
            odm_offsets, odm_logits = predictions.odm_offsets.float(), predictions.odm_logits.float()
            anchors = predictions.anchors.float()
            config = self.config
            if self.model.tcb:
                object_targets = Targets(targets.boxes, targets.labels.clamp(max=0))
                arm = self._module_loss(
                    arm_offsets, arm_logits, anchors, object_targets, None,
                    _Assignment(config.arm_positive_iou, config.arm_negative_iou),
                )  # fmt: skip
            else:
                arm = (anchors.new_zeros(()),) * 3
            with torch.no_grad():
                start = starting_boxes(arm_offsets, anchors, self.offset_std, self.model)
                unfiltered = passes_negative_filter(arm_logits, self.negative_threshold)
            odm = self._module_loss(
                odm_offsets, odm_logits, start, targets, unfiltered,
                _Assignment(config.odm_positive_iou, config.odm_negative_iou, config.label_smoothing),
            )  # fmt: skip
            positives = torch.stack([arm[2], odm[2]]).float()
            divisor = positives.clamp(min=1.0) if self.normalizer is None else self.normalizer(positives)
            losses = {
                "arm_classification": arm[0] / divisor[0],
                "arm_localization": arm[1] / divisor[0],
                "odm_classification": odm[0] / divisor[1],
                "odm_localization": odm[1] / divisor[1],
            }
            return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def _module_loss(
        self,
        offsets: Tensor,
        logits: Tensor,
        anchors: Tensor,
        targets: Targets,
        unfiltered: Tensor | None,
        assignment: _Assignment,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed classification loss, summed localization loss and number of positives of one module.

        ``unfiltered`` (B, A) marks the anchors that pass negative anchor filtering; None lets all pass.
        """
        background = logits.shape[-1] - 1
        matched = match(anchors, targets, assignment.positive_iou)
        positive = matched.target >= 0
        with torch.no_grad():
            background_loss = logits.logsumexp(dim=-1) - logits[..., background]
            candidates = ~positive & (matched.overlap < assignment.negative_iou)
            if unfiltered is not None:
                candidates &= unfiltered
            if self.config.classification == "focal":
                negative = candidates
            else:
                ratio, without = self.config.negatives_per_positive, self.config.negatives_of_empty_images
                negative = mine_negatives(background_loss, candidates, positive, ratio, without)
        index = matched.target.clamp(min=0)
        if targets.labels.shape[1] == 0:
            labels = torch.full_like(index, background)
            target_boxes = torch.zeros_like(offsets)
        else:
            labels = torch.where(positive, targets.labels.gather(1, index), background)
            target_boxes = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=assignment.label_smoothing
        ).view_as(labels)
        if self.config.classification == "focal":
            alpha = torch.where(positive, self.config.focal_alpha, 1.0 - self.config.focal_alpha)
            # 1 - exp(-x) as -expm1(-x): an easy anchor's cross-entropy is far below the last digit of 1.
            cross_entropy = alpha * (-torch.expm1(-cross_entropy)) ** self.config.focal_gamma * cross_entropy
        # where() and not a product: the loss of an anchor that does not count may be inf, and inf * 0 is NaN.
        classification = torch.where(positive | negative, cross_entropy, 0.0).sum()
        wanted = box_ops.encode(target_boxes, anchors, self.offset_std)
        distance = F.smooth_l1_loss(
            offsets, torch.where(positive[..., None], wanted, offsets.detach()), reduction="none"
        )
        localization = torch.where(positive[..., None], distance, 0.0).sum()
        return classification, localization, positive.sum()


@torch.no_grad()
def set_background_prior(network: nn.Module, probability: float = 0.99) -> None:
    """Let every untrained head begin with that confidence in background.

    Focal loss sums over thousands of negatives from the first iteration on; without this their sum is so large that
    training diverges (Lin et al., section 3.3).

    Args:
        network: with ``PredictionHead``s of several logits per anchor.
        probability: softmax score of background where the other logits are equal.
    """
    for head in network.modules():
        if isinstance(head, PredictionHead) and head.logits.bias is not None:
            classes = head.logits_per_anchor - 1
            bias = head.logits.bias.view(-1, head.logits_per_anchor)
            bias.zero_()
            bias[:, -1] = math.log(probability / (1 - probability) * classes)
