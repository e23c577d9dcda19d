"""The first weights of a training: of a detector, of a backbone from ImageNet, or those it was made with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refinedet.config import ModelConfig
from refinedet.detector import RefineDet
from refinedet.training.plan import OWN_NETWORK, Call
from refinedet.weights.convert import Fitted, fit_backbone
from refinedet.weights.store import load_weights
from refinedet.weights.transfer import Transfer, adopt_config, changed_fields, transfer_classes


@dataclass(frozen=True)
class Start:
    """Where the first weights come from."""

    config: ModelConfig
    """The model's, with what the weights need (mean, std, channel order and the like)."""
    source: str
    """What config.json calls it."""
    adopted: str | None = None
    """A line on what the weights changed in the config."""
    detector: RefineDet | None = None
    """The detector whose weights are carried over."""
    backbone: Fitted | None = None
    """The ImageNet weights of the backbone."""

    def fill(self, model: RefineDet) -> Transfer | None:
        """Give the network its first weights; say what became of the classes, if they come from a detector."""
        if self.detector is not None:
            own, theirs = model.network.state_dict(), self.detector.network.state_dict()
            state, transfer = transfer_classes(
                own, theirs, model.class_names, self.detector.class_names, self.detector.untrained
            )
            load_weights(model.network, state, self.source)
            return transfer
        if self.backbone is not None:
            self.backbone.fill(model.network)
        return None


def find_start(call: Call, config: ModelConfig) -> Start:
    """The first weights that a call means.

    Raises:
        UsageError: there is no such model.
        RefineDetError: the weights cannot be read or do not fit.
    """
    if call.init is not None:
        detector = RefineDet.from_pretrained(call.init)
        config, adopted = adopt_config(config, detector.config)
        line = f"init: {', '.join(adopted)} as {call.init} has them" if adopted else None
        return Start(config, str(call.init), line, detector=detector)
    if call.network is not None and call.init_weights is None:
        return Start(config, OWN_NETWORK)
    fitted = fit_backbone(config, call.init_weights)
    if fitted is None:
        return Start(config, "random")
    changed = changed_fields(config, fitted.config)
    line = f"init weights: {', '.join(changed)} as {fitted.file.source} needs them" if changed else None
    return Start(fitted.config, Path(fitted.file.source).name, line, backbone=fitted)
