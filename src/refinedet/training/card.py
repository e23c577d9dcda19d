"""The model card: README.md beside the weights, in the format that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refinedet.config import Preset


def model_card(
    preset: Preset, class_names: Sequence[str], name: str, iteration: int, metrics: Mapping[str, Any]
) -> str:
    """Text of a model card.

    Args:
        preset: model and training.
        class_names: in label order.
        name: title.
        iteration: updates that the weights have seen.
        metrics: what was measured ("mAP", "metric", "data", "split", "images" and, if any of these was trained on,
            "also_trained_on"), or empty.
    """
    model, train = preset.model, preset.train
    if metrics:
        both = metrics.get("also_trained_on", 0)
        figure = (
            f"mAP {100 * metrics['mAP']:.2f} ({metrics['metric']}) on {metrics['data']}, split {metrics['split']}, "
            f"{metrics['images']} images, {f'{both} of which were' if both else 'none of which was'} trained on."
        )
    else:
        figure = "Not evaluated."
    height, width = model.image_size
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}[train.optimizer]
    return f"""---
library_name: refinedet
pipeline_tag: object-detection
---

# {name}

RefineDet ("Single-Shot Refinement Neural Network for Object Detection", CVPR 2018), {model.backbone} at
{height}x{width}, {len(class_names)} classes.

## Measured

{figure}

## Training

{iteration} of {train.iterations} iterations of {train.batch_size} images from split `{train.train_split}`, {optimizer}
with learning rate {train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}, precision
{train.precision}, seed {train.seed}{", moving average of the weights" if train.ema_decay else ""}.

## Classes

{", ".join(class_names)}

## Use

    from refinedet import RefineDet
    model = RefineDet.from_pretrained("<this folder>")
    print(model.predict("photo.jpg").table())
"""
