"""The verb that exports a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from refinedet.cli.flags import Folder, OptionalText, Switch, Weights, flag, verb
from refinedet.cli.terminal import say
from refinedet.files import user_path

FILES = {"onnx": "model.onnx", "openvino": "model.xml"}
"""What a format's file is called."""


@verb
def export(
    weights: Weights,
    /,
    *,
    to: Annotated[tuple[Literal["onnx", "openvino"], ...], flag("{onnx,openvino}...", None)] = ("onnx",),
    out: Folder = Path("deploy"),
    input_type: Annotated[Literal["float32", "uint8"], flag("{float32,uint8}", None), tyro.conf.arg(name="input")] = (
        "float32"
    ),
    dynamic_size: Switch = False,
    raw: Switch = False,
    half: Switch = False,
    verify: OptionalText = None,
) -> int:
    """Export a model to a file that runs without PyTorch, post-processing included.

    The file is verified before the command returns: on real images, alone and in batches, it must keep the same boxes
    as PyTorch. `refinedet predict` and `refinedet evaluate` take it in place of WEIGHTS.

    Args:
        weights: A bundled model (`refinedet models`), a run folder, a folder of weights, or a hub id.
        to: Formats: ONNX (model.onnx) or OpenVINO (model.xml and model.bin).
        out: Folder for the files.
        input_type: Type of the graph's input, resized RGB images in 0..255: float32 gives the boxes of PyTorch, uint8
            rounds pixels to whole numbers.
        dynamic_size: Let the height and width of the input be any multiples of 64.
        raw: Leave out post-processing: the outputs are the offsets and logits of both stages.
        half: Store the weights of OpenVINO files as float16.
        verify: Folder or pattern of images to verify on (default: example photos and crowded scenes made of them).
    """
    folder = user_path(out)

    from refinedet.deploy.export import check_target
    from refinedet.deploy.export import export as export_model
    from refinedet.detector import RefineDet

    targets = [folder / FILES[name] for name in dict.fromkeys(to)]
    for target in targets:
        check_target(target, half=half and target.suffix == ".xml")
    detector = RefineDet.from_pretrained(weights)
    for target in targets:
        checked = export_model(
            detector,
            target,
            input_type=input_type,
            dynamic_size=dynamic_size,
            raw=raw,
            half=half and target.suffix == ".xml",
            images=verify,
        )
        say(f"{target}: {checked.summary()}")
        for tie in checked.ties:
            say(f"  tie: {tie}")
    say(f"exported: {folder}  (try: refinedet predict {targets[0]} photo.jpg)")
    return 0
