"""The verbs that use a model, look at data, or tell what there is; those that train are in ``training.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

import refinedet.weights
from refinedet.cli.flags import (
    ClassNames,
    Data,
    Device,
    OptionalCount,
    OptionalData,
    OptionalFile,
    OptionalFolder,
    OptionalMetric,
    OptionalText,
    Run,
    Switch,
    Weights,
    check_at_least,
    class_names_in,
    flag,
    verb,
)
from refinedet.cli.terminal import note, say
from refinedet.config import DEFAULT_THRESHOLD
from refinedet.errors import UsageError
from refinedet.files import check_output, check_output_folder, user_path
from refinedet.presets import PRESETS, get_preset
from refinedet.progress import ProgressBar


@verb
def evaluate(
    weights: Weights,
    data: OptionalData = None,
    /,
    *,
    split: OptionalText = None,
    metric: OptionalMetric = None,
    report: OptionalFolder = None,
    multi_scale: Switch = False,
    shared_classes: Switch = False,
    submission: OptionalFile = None,
    limit: OptionalCount = None,
    batch_size: int = 8,
    allow_outside: Switch = False,
    device: Device = "auto",
) -> int:
    """Measure the average precision of a detector on annotated images.

    With --submission also on images whose annotations are not public: results for their server instead of figures.

    Args:
        weights: A bundled model (`refinedet models`), a run folder, a folder of weights, or hf:owner/name.
        data: Folder or file of annotated images: Pascal VOC, COCO JSON or YOLO (default: the images that the run held
            out).
        split: Split of the data; 'all' takes every image (default: test, else val, or every image of undivided data).
        metric: voc07 (11-point AP of VOC 2007), voc (area AP of VOC 2010 and later) or coco (the twelve numbers of
            COCO); default: the run's own for the images that it held out, else voc07.
        report: Folder for index.html, a page that shows the errors, and for the figures and all detections as JSON and
            CSV.
        multi_scale: Test at several sizes, flipped too, and merge by box voting: the "+" rows of the paper, 16 to 40
            times the work.
        shared_classes: For data with other classes: measure by those that model and data share (VOC's and COCO's
            names are matched).
        submission: File of results for the server of Pascal VOC (.zip, .tar.gz) or COCO (.zip, .json); DATA may lack
            annotations.
        limit: Only the first so many images.
        batch_size: Images that go through the network at once.
        allow_outside: Entries of annotation files and lists may name images outside the folder of the data.
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    check_at_least("--batch-size", batch_size)
    check_at_least("--limit", limit)

    from refinedet.evaluation import evaluate as evaluation
    from refinedet.evaluation.page import write_page
    from refinedet.evaluation.report import check_report_folder

    figure = None if metric is None else evaluation.check_metric(metric)
    path = None if data is None else user_path(data)
    report_folder = None if report is None else user_path(report)
    if report_folder is not None:
        check_report_folder(report_folder, [] if path is None else [path])
    if submission is not None:
        if path is None:
            raise UsageError("--submission needs DATA, the images of a server")
        if shared_classes or report is not None:
            raise UsageError("--submission takes neither --shared-classes (a server wants every class) nor --report")
        return _submit(
            user_path(submission), weights, path, split, figure or "voc07", limit=limit, batch_size=batch_size,
            multi_scale=multi_scale, allow_outside=allow_outside, device=device,
        )  # fmt: skip
    with ProgressBar("evaluating") as bar:
        measured = evaluation.evaluate(
            weights,
            path,
            split=split,
            metric=figure,
            limit=limit,
            batch_size=batch_size,
            multi_scale=multi_scale,
            shared_classes=shared_classes,
            device=device,
            allow_outside=allow_outside,
            on_progress=bar,
        )
    say(f"{measured.table()}\n{measured.settings.seconds_per_image:.3f} s per image\nmAP {100 * measured['mAP']:.2f}")
    if report_folder is not None:
        page = write_page(measured, measured.save(report_folder), metrics_csv=_log_of_run(weights))
        say(f"report: {report_folder}  (see {page})")
    return 0


def _submit(
    path: Path,
    weights: str,
    data: Path,
    split: str | None,
    metric: Literal["voc07", "voc", "coco"],
    *,
    limit: int | None,
    batch_size: int,
    multi_scale: bool,
    allow_outside: bool,
    device: str,
) -> int:
    """Write results for a server; print figures too where the split has annotations."""
    from refinedet.detector import RefineDet
    from refinedet.device import pick_device
    from refinedet.evaluation.detector import Detector
    from refinedet.evaluation.evaluate import collect_detections, evaluate_detections, open_evaluation_data
    from refinedet.evaluation.multiscale import MultiScale
    from refinedet.evaluation.submission import plan_submission, write_submission

    detector = RefineDet.from_pretrained(weights, device=pick_device(device))
    dataset = open_evaluation_data(data, split, detector, require_annotations=False, allow_outside=allow_outside)
    plan_submission(path, dataset, metric)
    server: Literal["voc", "coco"] = "coco" if metric == "coco" else "voc"
    runner: Detector = MultiScale(detector, server, batch_size=batch_size) if multi_scale else detector
    count = len(dataset) if limit is None else min(limit, len(dataset))
    with ProgressBar("evaluating") as bar:
        detections = collect_detections(runner, dataset, range(count), batch_size=batch_size, on_progress=bar)
    say(f"submission: {write_submission(path, dataset, detections)}")
    if dataset.annotated:
        report = evaluate_detections(dataset, detections, metric)
        say(f"{report.table()}\nmAP {100 * report['mAP']:.2f}")
    else:
        say(f"no figures: {count} image{'s' * (count != 1)} without annotations")
    return 0


def _log_of_run(weights: str) -> Path | None:
    """metrics.csv, if the weights are a run folder or lie in one."""
    from refinedet.training.run import METRICS_FILE

    path = user_path(weights)
    log = (path.parent if path.name in ("best", "last") else path) / METRICS_FILE
    # A bundled model goes before a folder of the same name.
    return log if refinedet.weights.folder_of(weights) is None and log.is_file() else None


@verb
def compare(first: Run, second: Run, /) -> int:
    """Compare two runs: settings, and AP of each class on shared images.

    AP is that at an IoU of 0.5, from the detections that the evaluation at the end of each training saved. The
    intervals (95 %) come from drawing the images anew 500 times.

    Args:
        first: A run folder.
        second: Another run folder.
    """
    from refinedet.evaluation.compare import compare as compare_runs

    say(compare_runs(first, second).table())
    return 0


@verb
def predict(
    weights: Weights,
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")],
    /,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    save: OptionalFolder = None,
    line_width: OptionalCount = None,
    no_labels: Switch = False,
    font: OptionalFile = None,
    json: OptionalFile = None,
    json_format: Literal["refinedet", "coco"] = "refinedet",
    coco_images: OptionalFile = None,
    jsonl: OptionalFile = None,
    recursive: Switch = False,
    quiet: Switch = False,
    batch_size: int = 8,
    max_pixels: OptionalCount = None,
    device: Device = "auto",
) -> int:
    """Detect objects in images: a table, drawn copies, JSON.

    An image that cannot be read is reported in one line, the others are processed all the same, and the exit code is 1.
    A run that is stopped keeps the results that it has.

    Args:
        weights: A bundled model (`refinedet models`), a run folder, a folder of weights, or hf:owner/name.
        images: Files, folders and quoted patterns such as 'photos/*.jpg'.
        threshold: Keep detections that score at least this.
        save: Folder for copies with the boxes drawn on; the originals are never touched.
        line_width: Thickness of the drawn boxes in pixels (default: it follows the size of the image).
        no_labels: Draw the boxes without names and scores.
        font: Font file for the drawn names (default: one that has their letters).
        json: File for the detections as JSON, written at the end; '-' is standard output, without the table.
        json_format: Our own layout (per image; xyxy boxes, names), or COCO results (one list; x, y, width, height).
        coco_images: COCO annotation file from which COCO results take the image ids, by file name (default: the numbers
            in the file names, or 1, 2, 3, ... in the order of the images).
        jsonl: File for the detections as JSON Lines: one line per image, written as soon as it is done; '-' is standard
            output, without the table.
        recursive: Search the subfolders of folders too.
        quiet: Print no tables, only errors and where the results are.
        batch_size: Images that go through the network at once.
        max_pixels: Largest width times height of an image that is read (default: 178,956,970).
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    check_at_least("--batch-size", batch_size)
    check_at_least("--line-width", line_width)
    check_at_least("--max-pixels", max_pixels)
    if not 0 <= threshold <= 1:
        raise UsageError(f"--threshold must be between 0 and 1, not {threshold}")

    from refinedet.cli.prediction import Drawing, PredictionOutputs
    from refinedet.sources import find_images

    # Whatever can be wrong with the call is found before torch is imported and the network has worked.
    found = find_images(images, recursive=recursive)
    if passed_over := found.note():
        note(passed_over)
    outputs = PredictionOutputs(
        found.files,
        save=save,
        drawing=Drawing(line_width, labels=not no_labels, font=font),
        json_file=json,
        jsonl=jsonl,
        coco=json_format == "coco",
        coco_images=coco_images,
    )

    from refinedet.detector import RefineDet
    from refinedet.device import pick_device
    from refinedet.prediction import predict_ahead

    detector = RefineDet.from_pretrained(weights, device=pick_device(device))
    table = not (quiet or outputs.uses_standard_output)
    with ProgressBar("predicting", len(found.files)) as bar, outputs.open(weights, detector, threshold):
        results = predict_ahead(
            detector,
            found.files,
            threshold=threshold,
            batch_size=batch_size,
            max_pixels=max_pixels,
            on_error=lambda image, error: outputs.add_failure(image.name, error),
        )
        for detections, pixels in results:
            outputs.add(detections, pixels, table=table)
            del pixels  # Otherwise the image would stay in memory while the next is decoded.
            bar(outputs.count)
    return 1 if outputs.failed else 0


@verb
def inspect(
    data: Data,
    /,
    *,
    split: OptionalText = None,
    class_names: ClassNames = None,
    mosaic: OptionalFile = None,
    allow_outside: Switch = False,
) -> int:
    """Check annotated images before training: counts, sizes, faults.

    The exit code is 1 if a file is so faulty that training would refuse it.

    Args:
        data: Folder or file of annotated images: Pascal VOC, COCO JSON or YOLO.
        split: Split of the data (default: every image).
        class_names: Names separated by commas that are the only ones allowed (default: those of the data).
        mosaic: Image file for a sheet of sample images with their boxes drawn.
        allow_outside: Entries of annotation files and lists may name images outside the folder of the data.
    """
    names = class_names_in(class_names)

    from refinedet.data.health import MOSAIC_SIGNATURE, inspect_dataset

    path = user_path(data)
    sheet = None if mosaic is None else check_output(user_path(mosaic), inputs=[path], ours=MOSAIC_SIGNATURE)
    with ProgressBar("inspecting") as bar:
        health = inspect_dataset(path, split=split, class_names=names, allow_outside=allow_outside, progress=bar)
    say(health.render())
    if sheet is not None:
        health.write_mosaic(sheet)
        say(f"mosaic: {sheet}")
    return 1 if any(problem.fatal for problem in health.problems) else 0


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
def benchmark(
    weights: Weights,
    /,
    *,
    image: OptionalFile = None,
    runs: int = 50,
    warmup: int = 10,
    threads: OptionalCount = None,
    device: Device = "auto",
) -> int:
    """Measure the speed of a detector at batch 1, step by step.

    Args:
        weights: A bundled model, a run folder, a folder of weights, hf:owner/name, or a preset, with random weights.
        image: An image to measure on (default: noise of 500x375).
        runs: Timed runs.
        warmup: Runs before them that do not count.
        threads: CPU threads (default: torch's choice).
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    check_at_least("--runs", runs)
    check_at_least("--warmup", warmup, 0)
    check_at_least("--threads", threads)

    from refinedet.images import read_image

    pixels = None if image is None else read_image(user_path(image))

    import torch

    from refinedet.benchmark import measure_speed
    from refinedet.detector import RefineDet
    from refinedet.device import pick_device

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = pick_device(device)
    if weights in PRESETS and refinedet.weights.folder_of(weights) is None:
        detector = RefineDet(PRESETS[weights].model).to(chosen)
    else:
        detector = RefineDet.from_pretrained(weights, device=chosen)
    say(measure_speed(detector, pixels, runs=runs, warmup=warmup).table())
    return 0


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
