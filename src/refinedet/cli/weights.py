"""The verbs about weights: convert imports, export writes, benchmark times, and models lists those that are bundled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import refinedet.weights
from refinedet.cli.flags import (
    ClassNames,
    Device,
    Folder,
    OptionalCount,
    OptionalFile,
    OptionalText,
    Switch,
    Weights,
    check_at_least,
    class_names_in,
    flag,
    verb,
)
from refinedet.cli.terminal import say
from refinedet.errors import UsageError
from refinedet.files import check_output_folder, user_path
from refinedet.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from refinedet.detector import RefineDet
    from refinedet.runtime import Runtime

_MOST_RUNS = 1_000_000
"""More would take weeks, so such a number is a slip."""

EXPORTED_FILES = {"onnx": "model.onnx", "openvino": "model.xml"}
"""What the file of each exported format is called."""


@verb
def convert(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    /,
    *,
    preset: Annotated[str, tyro.conf.arg(metavar="PRESET")],
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    class_names: ClassNames = None,
    channel_order: tyro.conf.DisallowNone[Annotated[Literal["rgb", "bgr"] | None, flag("{rgb,bgr}")]] = None,
) -> int:
    """Import weights of other programs as a model.

    The kind of file is recognised by its keys: official RefineDet models (.caffemodel), the luuuyi and dd604 ports
    (.pth), and ImageNet weights of VGG-16 and the ResNets from Caffe, torchvision and timm, which fill the backbone
    only. Mean, std, channel order and the number of classes follow from the file, the input size from the preset.

    Args:
        file: A .caffemodel, .pth or .safetensors file; pickled code in it is never run.
        preset: The model that the weights are for; `refinedet models` lists them.
        out: Folder for model.safetensors, config.json and the model card.
        class_names: Names separated by commas, in the order of their labels (default: those of VOC for 20 classes, of
            COCO for 80).
        channel_order: What the network is fed, where the order of the file's own kind is not right.
    """
    chosen, names = get_preset(preset), class_names_in(class_names)
    source, folder = user_path(file), user_path(out)
    if not source.is_file():
        reason = "is a folder" if source.is_dir() else "no such file"
        raise UsageError(f"{source}: {reason}; convert takes a weight file")
    from refinedet.weights.store import refuse_occupied

    refuse_occupied(folder)
    check_output_folder(
        folder, ("model.safetensors", "config.json", "README.md"), inputs=[source], ours=lambda _: False
    )

    # Of a detector, the file decides the number of classes; of a backbone, the names do.
    wanted = dataclasses.replace(chosen.model, num_classes=len(names)) if names else chosen.model

    from refinedet.data.classes import COCO_CLASSES, VOC_CLASSES
    from refinedet.detector import RefineDet
    from refinedet.weights.convert import import_card, import_weights

    imported = import_weights(source, wanted, channel_order=channel_order)
    count = imported.config.num_classes
    if names and len(names) != count:
        raise UsageError(f"--class-names has {len(names)} names; {source} has {count} classes")
    names = names or {len(VOC_CLASSES): VOC_CLASSES, len(COCO_CLASSES): COCO_CLASSES}.get(count)
    detector = RefineDet(imported.config, names, network=imported.network)
    detector.untrained = imported.untrained
    detector.save_pretrained(folder, card=import_card(imported, source, detector.class_names))
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (imported.config.mean, imported.config.std))
    say(f"{source}: {imported.title}\ninput: {imported.config.channel_order}, mean {mean}, std {std}")
    following = f"refinedet predict {folder} photo.jpg"
    if imported.untrained:
        say(f"not in the file, so still random: {', '.join(imported.untrained)}")
        following = f"refinedet train {preset} --init {folder} --data DATA"
    elif names is None:
        say(f"classes: {count}, without names; give them with --class-names")
    say(f"converted: {folder}  (try: {following})")
    return 0


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
    """Export a model to a file that runs without PyTorch.

    Post-processing is part of the file, which is verified before the command returns: on real images, alone and in
    batches, it must keep the same boxes as PyTorch. `refinedet predict` and `refinedet evaluate` take it as WEIGHTS.

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

    targets = [folder / EXPORTED_FILES[name] for name in dict.fromkeys(to)]
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


@verb
def benchmark(
    weights: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS...")],
    /,
    *,
    image: OptionalFile = None,
    runs: int = 50,
    warmup: int = 10,
    threads: OptionalCount = None,
    device: Device = "auto",
) -> int:
    """Measure the speed of detectors at batch 1.

    Of one the time of each step is shown. Several take turns, and their speed is compared with that of the first.

    Args:
        weights: Each a bundled model, an exported file, a run folder, a folder of weights, hf:owner/name, or a preset,
            with random weights.
        image: An image to measure on (default: noise of 500x375).
        runs: Timed runs.
        warmup: Runs before them that do not count.
        threads: CPU threads (default: the engine's choice).
        device: cpu, cuda, mps, or auto (a GPU if there is one); exported files run on the CPU.
    """
    check_at_least("--runs", runs, 1, _MOST_RUNS)
    check_at_least("--warmup", warmup, 0, _MOST_RUNS)
    check_at_least("--threads", threads)
    if not weights:
        raise UsageError("missing: WEIGHTS...; see refinedet benchmark --help")

    from refinedet.benchmark import comparison_table, measure_speeds
    from refinedet.images import read_image

    pixels = None if image is None else read_image(user_path(image))
    models = [(name, _load_for_timing(name, device, threads)) for name in weights]
    speeds = measure_speeds(models, pixels, runs=runs, warmup=warmup)
    say(speeds[0].table() if len(speeds) == 1 else comparison_table(speeds))
    return 0


def _load_for_timing(name: str, device: str, threads: int | None) -> RefineDet | Runtime:
    """A model, also one of a preset with random weights.

    Raises:
        UsageError: nothing of that name, or an exported file without detections.
    """
    if name not in PRESETS or refinedet.weights.folder_of(name) is not None:
        from refinedet.loading import load_detector
        from refinedet.runtime import Runtime, is_exported

        detector = load_detector(name, device="auto" if is_exported(name) else device, threads=threads)
        if isinstance(detector, Runtime) and detector.raw:
            raise UsageError(f"{name}: was exported with --raw, so it returns no detections")
        return detector

    import torch

    from refinedet.detector import RefineDet

    if threads is not None:
        torch.set_num_threads(threads)
    return RefineDet(PRESETS[name].model).to(device)


@verb
def models() -> int:
    """List the bundled models and the presets for training."""
    bundled = refinedet.weights.names()
    lines = ["Bundled models (refinedet predict NAME photo.jpg):"]
    lines += [f"  {name:<28}{refinedet.weights.measured(name)}" for name in bundled] or ["  none"]
    lines += ["", "Presets (refinedet train NAME --data DATA):"]
    lines += [f"  {name:<28}{preset.summary}" for name, preset in PRESETS.items()]
    say("\n".join(lines))
    return 0
