"""The verbs about weights: convert imports, export writes, benchmark times, and models lists those that are bundled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import refinedet.weights
from refinedet.cli.flags import (
    ClassNames,
    Device,
    Flat,
    Folder,
    OptionalCount,
    OptionalFile,
    OptionalMetric,
    OptionalText,
    Switch,
    Weights,
    check_at_least,
    class_names_in,
    flag,
    verb,
)
from refinedet.cli.terminal import note, say, terminable
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import check_output, check_output_folder, user_path, write_text
from refinedet.presets import PRESETS, get_preset
from refinedet.progress import ProgressBar

if TYPE_CHECKING:
    from refinedet.data import DetectionDataset
    from refinedet.deploy.export import Precision
    from refinedet.deploy.measure import Measured
    from refinedet.detector import RefineDet
    from refinedet.evaluation.report import Metric
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


@dataclasses.dataclass(frozen=True)
class Lower:
    """Lower precision, and data to measure what it costs."""

    half: Switch = False
    """Store the weights of OpenVINO files as float16."""
    int8: Switch = False
    """Compute with eight bits: faster, a quarter of the size, boxes and scores change a little. The files are called
    model-int8."""
    calibration: OptionalText = None
    """Images that ranges are measured on for --int8, like those that the model will see: a folder, a pattern, or
    annotated data (default: the images that the run was trained on)."""
    calibration_split: OptionalText = None
    """Split of annotated data to calibrate on (default: train)."""
    evaluate: OptionalText = None
    """Annotated data to compare the mAP of PyTorch and the files on (default with --int8: the images that the run held
    out)."""
    split: OptionalText = None
    """Split of --evaluate, as in `refinedet evaluate`."""
    metric: OptionalMetric = None
    """voc07, voc or coco."""

    @property
    def precision(self) -> Precision:
        """Of the files.

        Raises:
            UsageError: two at once, or images to calibrate on for neither.
        """
        if self.half and self.int8:
            raise UsageError("--half and --int8 exclude each other")
        if not self.int8 and (self.calibration is not None or self.calibration_split is not None):
            raise UsageError("--calibration and --calibration-split go with --int8")
        if self.evaluate is None and self.split is not None:
            raise UsageError("--split goes with --evaluate")
        return "int8" if self.int8 else "fp16" if self.half else "fp32"


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
    verify: OptionalText = None,
    lower: Annotated[Lower, Flat] = Lower(),
) -> int:
    """Export a model to a file that runs without PyTorch.

    Post-processing is part of the file, which is verified before the command returns: on real images, alone and in
    batches, it must keep the same boxes as PyTorch. `refinedet predict` and `refinedet evaluate` take it as WEIGHTS. A
    card beside each file tells what it is.

    Args:
        weights: A bundled model (`refinedet models`), a run folder, a folder of weights, or a hub id.
        to: Formats: ONNX (model.onnx) or OpenVINO (model.xml and model.bin).
        out: Folder for the files.
        input_type: Type of the graph's input, resized RGB images in 0..255: float32 gives the boxes of PyTorch, uint8
            rounds pixels to whole numbers.
        dynamic_size: Let the height and width of the input be any multiples of 64.
        raw: Leave out post-processing: the outputs are the offsets and logits of both stages.
        verify: Folder or pattern of images to verify on (default: example photos and crowded scenes made of them).
        lower: See there.
    """
    folder, precision = user_path(out), lower.precision

    from refinedet.deploy.export import check_target
    from refinedet.deploy.export import export as export_model
    from refinedet.deploy.measure import CARD_SIGNATURE, card
    from refinedet.deploy.quantize import calibration_files
    from refinedet.detector import RefineDet

    names = (EXPORTED_FILES[name] for name in dict.fromkeys(to))
    targets = [folder / (name.replace("model", "model-int8") if lower.int8 else name) for name in names]
    for target in targets:
        check_target(target, precision=precision)
        check_output(_card_of(target), ours=CARD_SIGNATURE)
    detector = RefineDet.from_pretrained(weights)
    files = calibration_files(weights, lower.calibration, lower.calibration_split) if lower.int8 else ()
    dataset, metric = _evaluation_data(weights, detector, lower)
    checks = []
    for target in targets:
        with terminable(), ProgressBar("calibrating") as bar:
            checked = export_model(
                detector,
                target,
                input_type=input_type,
                dynamic_size=dynamic_size,
                raw=raw,
                precision=precision,
                calibration=[str(file) for file in files],
                images=verify,
                on_progress=bar,
            )
        checks.append(checked)
        say(f"{target}: {checked.summary()}")
        for tie in checked.ties:
            say(f"  tie: {tie}")
    measured = None if precision == "fp32" and dataset is None else _measure(detector, targets, dataset, metric)
    for target, checked in zip(targets, checks, strict=True):
        write_text(_card_of(target), card(target, weights, checked, measured))
    say(f"exported: {folder}  (try: refinedet predict {targets[0]} photo.jpg)")
    return 0


def _card_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.md")


def _evaluation_data(weights: str, detector: RefineDet, lower: Lower) -> tuple[DetectionDataset | None, Metric]:
    """The images to measure the loss of mAP on, None without any, and the metric."""
    from refinedet.evaluation.evaluate import check_metric, open_evaluation_data
    from refinedet.evaluation.run_data import RunData, find_run

    metric = None if lower.metric is None else check_metric(lower.metric)
    if lower.evaluate is not None:
        dataset = open_evaluation_data(user_path(lower.evaluate), lower.split, detector.class_names)
        return dataset, metric or "voc07"
    run = find_run(weights) if lower.int8 else None
    if run is None:
        return None, metric or "voc07"
    data = RunData.of(run)
    try:
        return data.held_out(), metric or data.metric
    except RefineDetError as error:
        note(f"note: the loss of mAP is not measured ({error})")
        return None, metric or data.metric


def _measure(
    detector: RefineDet, targets: Sequence[Path], dataset: DetectionDataset | None, metric: Metric
) -> Measured:
    """Measure and print; a loss that is larger than usual is named."""
    from refinedet.deploy.measure import measure

    with ProgressBar("evaluating") as bar:
        measured = measure(detector, targets, dataset, metric, on_progress=bar)
    say(measured.table())
    if measured.average_precisions and measured.average_precisions[0] - min(measured.average_precisions) > 0.005:
        note("note: more than 0.5 mAP is lost; calibrate on more images, and on images like those of the evaluation")
    return measured


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
