"""The presets: a model and its training under one name, as data; every number of the paper names its source.

"Official" means the Caffe code of the authors. Standard library only, so that ``--help`` answers without torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from refinedet.config import AugmentConfig, InferenceConfig, LossConfig, ModelConfig, Preset, TrainConfig
from refinedet.errors import UsageError, did_you_mean

_VOC07 = TrainConfig(train_split="trainval", evaluate_split="test", metric="voc07")
"""Paper, section 5.1 (VOC 2007): 1e-3 for 80k iterations, then 20k each at 1e-4 and 1e-5, batch 32. In a VOCdevkit that
holds VOC2007 and VOC2012, "trainval" is the trainval of both: "07+12"."""
_VOC12 = dataclasses.replace(
    _VOC07,
    iterations=240_000,
    milestones=(160_000, 200_000),
    metric="voc",
    train_split="2007:trainval+2007:test+2012:trainval",
    evaluate_split="none",
)
"""Paper, section 5.2 (VOC 2012): 1e-3 for 160k iterations, then 40k each at 1e-4 and 1e-5, batch 32, on "07++12". The
annotations of VOC 2012 test are on the server only, so there is nothing to evaluate on."""
_COCO = TrainConfig(
    iterations=400_000, milestones=(280_000, 360_000), metric="coco", train_split="train", evaluate_split="val"
)
"""Paper, section 5.3 (COCO): 1e-3 for 280k iterations, then 80k at 1e-4 and 40k at 1e-5, batch 32. The images of the
paper's trainval35k and minival are those of train2017 and val2017, which "train" and "val" find."""
_COCO_RESNET_512 = dataclasses.replace(_COCO, batch_size=20, iterations=540_000, milestones=(400_000, 480_000))
"""Paper, footnote 7: batch 20; 400k, 80k and 60k iterations."""
_VOC07_FROM_COCO = dataclasses.replace(_VOC07, learning_rate=5e-5, gamma=0.2, milestones=(80_000, 120_000))
"""Official finetune_*.py: 5e-5, times 0.2 at 80k and 120k, end at 120k. The paper (section 5.4) gives no schedule."""
_VOC12_FROM_COCO = dataclasses.replace(
    _VOC12, learning_rate=5e-5, gamma=0.2, iterations=160_000, milestones=(120_000, 160_000)
)
"""Official finetune_*.py: 5e-5, times 0.2 at 120k and 160k, end at 160k."""

_VGG16 = ModelConfig()
_RESNET101 = ModelConfig(backbone="resnet101", tcb_batch_norm=True, prediction_blocks=True)
"""Official ResNet-101 code, which made the paper's figures, on torchvision's ImageNet weights. The paper's text has no
prediction blocks (--model.no-prediction-blocks); Caffe's weights want backbone_layout "caffe" and their own mean."""
_LIGHT = ModelConfig(
    backbone="resnet18",
    tcb_channels=128,
    tcb_batch_norm=True,
    backbone_norm="frozen",
    frozen_stages=2,
    # 400 of the paper are used up by a dozen crowded objects, each of which gets dozens of boxes.
    inference=InferenceConfig(candidates=1000),
)


def _named(model: ModelConfig, train: TrainConfig, side: int, summary: str, **changes: Any) -> Preset:
    model = dataclasses.replace(model, image_size=(side, side), **changes)
    return Preset(model=model, train=train, summary=summary)


PRESETS: dict[str, Preset] = {
    "voc07-320-vgg16": _named(
        _VGG16, _VOC07, 320, "Paper, Table 1: RefineDet320, VGG-16, VOC 2007 test (80.0 mAP); batch 32, 120k"
    ),
    "voc07-512-vgg16": _named(
        _VGG16, _VOC07, 512, "Paper, Table 1: RefineDet512, VGG-16, VOC 2007 test (81.8 mAP); batch 32, 120k"
    ),
    "voc12-320-vgg16": _named(
        _VGG16, _VOC12, 320, "Paper, Table 1: RefineDet320, VGG-16, VOC 2012 test (78.1 mAP); batch 32, 240k"
    ),
    "voc12-512-vgg16": _named(
        _VGG16, _VOC12, 512, "Paper, Table 1: RefineDet512, VGG-16, VOC 2012 test (80.1 mAP); batch 32, 240k"
    ),
    "coco-320-vgg16": _named(
        _VGG16,
        _COCO,
        320,
        "Paper, Table 3: RefineDet320, VGG-16, COCO test-dev (29.4 AP); batch 32, 400k",
        num_classes=80,
    ),
    "coco-512-vgg16": _named(
        _VGG16,
        _COCO,
        512,
        "Paper, Table 3: RefineDet512, VGG-16, COCO test-dev (33.0 AP); batch 32, 400k",
        num_classes=80,
    ),
    "coco-320-resnet101": _named(
        _RESNET101,
        _COCO,
        320,
        "Paper, Table 3: RefineDet320, ResNet-101, COCO test-dev (32.0 AP); batch 32, 400k",
        num_classes=80,
    ),
    "coco-512-resnet101": _named(
        _RESNET101,
        _COCO_RESNET_512,
        512,
        "Paper, Table 3: RefineDet512, ResNet-101, COCO test-dev (36.4 AP); batch 20, 540k",
        num_classes=80,
    ),
    "voc07-320-vgg16-from-coco": _named(
        _VGG16,
        _VOC07_FROM_COCO,
        320,
        "Paper, Table 4: RefineDet320 from COCO (--init WEIGHTS), VOC 2007 test (84.0 mAP); batch 32, 120k",
    ),
    "voc07-512-vgg16-from-coco": _named(
        _VGG16,
        _VOC07_FROM_COCO,
        512,
        "Paper, Table 4: RefineDet512 from COCO (--init WEIGHTS), VOC 2007 test (85.2 mAP); batch 32, 120k",
    ),
    "voc12-320-vgg16-from-coco": _named(
        _VGG16,
        _VOC12_FROM_COCO,
        320,
        "Paper, Table 4: RefineDet320 from COCO (--init WEIGHTS), VOC 2012 test (82.7 mAP); batch 32, 160k",
    ),
    "voc12-512-vgg16-from-coco": _named(
        _VGG16,
        _VOC12_FROM_COCO,
        512,
        "Paper, Table 4: RefineDet512 from COCO (--init WEIGHTS), VOC 2012 test (85.0 mAP); batch 32, 160k",
    ),
    "voc07-320-resnet101": _named(
        _RESNET101, _VOC07, 320, "RefineDet320, ResNet-101, VOC 2007 test, schedule of Table 1 (not in the paper)"
    ),
    "voc07-512-resnet101": _named(
        _RESNET101,
        dataclasses.replace(_VOC07, batch_size=20),
        512,
        "RefineDet512, ResNet-101, VOC 2007 test, schedule of Table 1 at batch 20 (not in the paper)",
    ),
    "voc12-320-resnet101": _named(
        _RESNET101, _VOC12, 320, "RefineDet320, ResNet-101, VOC 2012 test, schedule of Table 1 (not in the paper)"
    ),
    "voc12-512-resnet101": _named(
        _RESNET101,
        dataclasses.replace(_VOC12, batch_size=20),
        512,
        "RefineDet512, ResNet-101, VOC 2012 test, schedule of Table 1 at batch 20 (not in the paper)",
    ),
    "voc07-320-resnet18": Preset(
        model=_LIGHT,
        # Chosen by trials on a part of train (docs/results.md): AdamW, a backbone that hardly moves away from ImageNet,
        # fewer tiny objects, and mosaics, which show more objects per image.
        train=TrainConfig(
            iterations=11_200,
            batch_size=16,
            optimizer="adamw",
            learning_rate=1e-3,
            backbone_learning_rate_factor=0.01,
            weight_decay=0.05,
            schedule="cosine",
            warmup_iterations=100,
            gradient_clip_norm=10.0,
            ema_decay=0.999,
            size_schedule=((0, 192), (3_000, 256), (7_200, 320)),
            precision="auto",
            workers=1,
            evaluate_every=1_500,
            save_every=250,
            evaluate_limit=250,
            train_split="train",
            evaluate_split="val",
            augment=AugmentConfig(expand_ratio=2.0, mosaic_probability=0.5),
        ),
        summary="The light model that ships: ResNet-18, 128-channel TCB, trained on two CPU cores",
    ),
    "finetune": Preset(
        model=_LIGHT,
        # The backbone's share of the rate comes from trials, the rest from the light preset and from what a run may
        # take (docs/results.md, "Fine-tuning on small datasets").
        train=TrainConfig(
            iterations=300,
            batch_size=16,
            optimizer="adamw",
            learning_rate=1e-3,
            backbone_learning_rate_factor=0.3,
            weight_decay=0.05,
            schedule="cosine",
            warmup_iterations=30,
            gradient_clip_norm=10.0,
            ema_decay=0.999,
            precision="auto",
            workers=1,
            evaluate_every=0,
            save_every=50,
            log_every=10,
            train_split="train",
            evaluate_split="val",
            metric="coco",
            augment=AugmentConfig(expand_ratio=2.0, mosaic_probability=0.5),
            loss=LossConfig(negatives_of_empty_images=6),
        ),
        summary="Your own images: the light model from its bundled weights, a length that fits the data",
        init="voc07-320-resnet18",
        fit_to_data=True,
    ),
    "smoke": Preset(
        model=ModelConfig(
            backbone="resnet18", tcb_channels=32, tcb_batch_norm=True, image_size=(128, 128), backbone_norm="frozen"
        ),
        train=TrainConfig(
            iterations=20,
            batch_size=4,
            learning_rate=0.005,
            warmup_iterations=5,
            gradient_clip_norm=10.0,
            milestones=(15,),
            workers=0,
            log_every=1,
            save_every=10,
            evaluate_every=0,
            train_split="train",
            evaluate_split="val",
        ),
        summary="Twenty iterations at 128 pixels: does everything run on this machine?",
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: unknown name; the message suggests the nearest one.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise UsageError(f"unknown preset '{name}': {did_you_mean(name, PRESETS, cutoff=0.4)}")
