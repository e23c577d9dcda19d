"""The verbs that measure, predict and look at data; ``training.py`` has those that train, ``weights.py`` the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from refinedet.cli.flags import (
    ClassNames,
    Data,
    Device,
    Drawing,
    Flat,
    OptionalCount,
    OptionalData,
    OptionalFile,
    OptionalFolder,
    OptionalMetric,
    OptionalText,
    Results,
    Run,
    Switch,
    Videos,
    Weights,
    check_at_least,
    check_share,
    class_names_in,
    verb,
)
from refinedet.cli.terminal import note, say
from refinedet.config import DEFAULT_THRESHOLD
from refinedet.errors import UsageError
from refinedet.files import check_output, user_path
from refinedet.progress import ProgressBar

if TYPE_CHECKING:
    from refinedet.data import DetectionDataset
    from refinedet.detector import RefineDet
    from refinedet.evaluation.detector import Detector
    from refinedet.evaluation.report import Metric, Report
    from refinedet.runtime import Runtime


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
    detections: OptionalFolder = None,
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
        detections: Folder of 'refinedet batch' whose detections are measured; WEIGHTS is left out then:
            'refinedet evaluate DATA --detections found'.
        limit: Only the first so many images.
        batch_size: Images that go through the network at once.
        allow_outside: Entries of annotation files and lists may name images outside the folder of the data.
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    check_at_least("--batch-size", batch_size)
    check_at_least("--limit", limit)

    from refinedet.evaluation import evaluate as evaluation
    from refinedet.evaluation.multiscale import MultiScale
    from refinedet.evaluation.report import check_report_folder

    figure = None if metric is None else evaluation.check_metric(metric)
    if detections is not None:
        if data is not None or multi_scale or submission is not None:
            raise UsageError("--detections takes DATA alone, without WEIGHTS, --multi-scale and --submission")
        data = weights
    path = None if data is None else user_path(data)
    report_folder = None if report is None else user_path(report)
    if report_folder is not None:
        check_report_folder(report_folder, [] if path is None else [path])
    if submission is not None:
        if path is None:
            raise UsageError("--submission needs DATA, the images of a server")
        if shared_classes or report is not None:
            raise UsageError("--submission takes neither --shared-classes (a server wants every class) nor --report")
        detector, dataset = _open_for_server(weights, path, split, allow_outside=allow_outside, device=device)
        server: Literal["voc", "coco"] = "coco" if figure == "coco" else "voc"
        runner = MultiScale(detector, server, batch_size=batch_size) if multi_scale else detector
        return _submit(user_path(submission), runner, dataset, figure or "voc07", limit, batch_size)
    common: dict[str, Any] = {
        "split": split, "limit": limit, "shared_classes": shared_classes, "allow_outside": allow_outside
    }  # fmt: skip
    if detections is not None:
        from refinedet.bulk.results import evaluate_batch

        measured = evaluate_batch(user_path(detections), weights, metric=figure or "voc07", **common)
    else:
        with ProgressBar("evaluating") as bar:
            measured = evaluation.evaluate(
                weights, path, metric=figure, batch_size=batch_size, multi_scale=multi_scale, device=device,
                on_progress=bar, **common,
            )  # fmt: skip
    _show(measured, report_folder)
    return 0


def _show(measured: Report, report_folder: Path | None) -> None:
    """Print a report, and save it with its page."""
    from refinedet.evaluation.page import write_page

    seconds = measured.settings.seconds_per_image
    speed = "" if seconds is None else f"{seconds:.3f} s per image\n"
    say(f"{measured.table()}\n{speed}mAP {100 * measured['mAP']:.2f}")
    if report_folder is not None:
        page = write_page(measured, measured.save(report_folder), metrics_csv=_log_of_run(measured.settings.run))
        say(f"report: {report_folder}  (see {page})")


def _open_for_server(
    weights: str, data: Path, split: str | None, *, allow_outside: bool, device: str
) -> tuple[RefineDet | Runtime, DetectionDataset]:
    """The detector and the images, which may lack annotations."""
    from refinedet.evaluation.evaluate import open_evaluation_data
    from refinedet.loading import load_detector

    detector = load_detector(weights, device=device)
    dataset = open_evaluation_data(
        data, split, detector.class_names, require_annotations=False, allow_outside=allow_outside
    )
    return detector, dataset


def _submit(
    path: Path, detector: Detector, dataset: DetectionDataset, metric: Metric, limit: int | None, batch_size: int
) -> int:
    """Write results for a server; print figures too where the split has annotations."""
    from refinedet.evaluation.evaluate import collect_detections, evaluate_detections
    from refinedet.evaluation.submission import plan_submission, write_submission

    plan_submission(path, dataset, metric)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    with ProgressBar("evaluating") as bar:
        detections = collect_detections(detector, dataset, range(count), batch_size=batch_size, on_progress=bar)
    say(f"submission: {write_submission(path, dataset, detections)}")
    if dataset.annotated:
        report = evaluate_detections(dataset, detections, metric)
        say(f"{report.table()}\nmAP {100 * report['mAP']:.2f}")
    else:
        say(f"no figures: {count} image{'s' * (count != 1)} without annotations")
    return 0


def _log_of_run(folder: str) -> Path | None:
    """The log of a run, if there is one; the run may be none at all."""
    from refinedet.training.run import RunFolder

    log = RunFolder(Path(folder)).metrics
    return log if folder and log.is_file() else None


@verb
def compare(first: Run, second: Run, /) -> int:
    """Compare two runs: settings, and AP of each class on shared images.

    AP is that at an IoU of 0.5, from the detections that the evaluation at the end of each training saved. The
    intervals (95 %) come from drawing the images again 500 times.

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
    results: Annotated[Results, Flat] = Results(),  # noqa: B008 - frozen
    drawing: Annotated[Drawing, Flat] = Drawing(),  # noqa: B008
    videos: Annotated[Videos, Flat] = Videos(),  # noqa: B008
    recursive: Switch = False,
    quiet: Switch = False,
    batch_size: int = 8,
    max_pixels: OptionalCount = None,
    device: Device = "auto",
) -> int:
    """Detect objects in images and videos: table, drawn copies, JSON.

    An image that cannot be read is reported in one line, the others are processed all the same, and the exit code is 1.
    A video that breaks off keeps what came before. A run that is stopped keeps the results that it has.

    Args:
        weights: A bundled model (`refinedet models`), an exported file, a run folder, a folder of weights, or
            hf:owner/name.
        images: Files, folders and quoted patterns such as 'photos/*.jpg'; videos, addresses of streams, and the number
            of a camera.
        threshold: Keep detections that score at least this.
        results: Where they go.
        drawing: How boxes look.
        videos: How videos are read.
        recursive: Search the subfolders of folders too.
        quiet: Print no tables, only errors and where the results are.
        batch_size: Images that go through the network at once.
        max_pixels: Largest width times height of an image that is read (default: 178,956,970).
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    checked = (("--batch-size", batch_size), ("--line-width", drawing.line_width), ("--max-pixels", max_pixels))
    for name, value in checked:
        check_at_least(name, value)
    check_share("--threshold", threshold)

    from refinedet.cli.prediction import PredictionOutputs
    from refinedet.sources import find_images
    from refinedet.tracking import ObjectTracker
    from refinedet.video import Video

    # Whatever can be wrong with the call is found before torch is imported and the network has worked.
    chosen = find_images(images, recursive=recursive)
    if passed_over := chosen.note():
        note(passed_over)
    sources = [videos.of(file) or file for file in chosen.files]
    moving = [source for source in sources if isinstance(source, Video)]
    if videos.given() and not moving:
        raise UsageError(f"{videos.given()[0]} is for videos, and none of the sources is one")
    tracker = ObjectTracker(threshold) if videos.track else None
    outputs = PredictionOutputs([file for file in sources if isinstance(file, str)], results, drawing, moving, tracker)

    from refinedet.loading import load_detector
    from refinedet.prediction import predict_ahead

    detector = load_detector(weights, device=device)
    lengths = [source.length() if isinstance(source, Video) else 1 for source in sources]
    total = None if None in lengths else sum(length or 0 for length in lengths)
    with ProgressBar("predicting", total) as bar, outputs.open(weights, detector, threshold):
        predictions = predict_ahead(
            detector,
            sources,
            threshold=outputs.lowest_score(threshold),
            batch_size=batch_size,
            max_pixels=max_pixels,
            on_error=lambda image, error: outputs.add_failure(image.name, error),
        )
        for detections, pixels in predictions:
            outputs.add(detections, pixels, table=not (quiet or outputs.uses_standard_output))
            del pixels  # Otherwise the image would stay in memory while the next is decoded.
            bar(outputs.count)
    return 1 if outputs.failed else 0


@verb
def explain(
    weights: Weights,
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    /,
    *,
    save: OptionalFile = None,
    threshold: float = DEFAULT_THRESHOLD,
    device: Device = "auto",
) -> int:
    """Draw the steps by which a detector arrives at its boxes.

    The steps are the anchors that pass the first stage (ARM), where it moves them, what the second stage (ODM) makes of
    them, and the detections. The time that each stage takes is printed.

    Args:
        weights: A bundled model (`refinedet models`), a run folder, a folder of weights, or hf:owner/name.
        image: An image file or address.
        save: Image file (.jpg or .png) for the steps, drawn side by side.
        threshold: Lowest score of a detection.
        device: cpu, cuda, mps, or auto (a GPU if there is one).
    """
    check_share("--threshold", threshold)

    from refinedet.draw import check_image_ending

    target = None if save is None else check_image_ending(user_path(save))
    if target is not None:
        check_output(target, inputs=[image], ours="steps drawn by refinedet")

    from refinedet.loading import load_detector
    from refinedet.runtime import Runtime

    detector = load_detector(weights, device=device)
    if isinstance(detector, Runtime):
        raise UsageError(f"{weights}: an exported file has no steps to show; give the model that it was made of")
    detector.predict(image)  # The first run of a network takes longer than those that follow.
    steps = detector.explain(image, threshold=threshold)
    say(steps.table())
    if target is not None:
        say(f"steps: {steps.save(target)}")
    return 0


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
    from refinedet.draw import check_image_ending

    path = user_path(data)
    sheet = None if mosaic is None else check_image_ending(user_path(mosaic))
    if sheet is not None:
        check_output(sheet, inputs=[path], ours=MOSAIC_SIGNATURE)
    with ProgressBar("inspecting") as bar:
        health = inspect_dataset(path, split=split, class_names=names, allow_outside=allow_outside, progress=bar)
    say(health.render())
    if sheet is not None:
        health.write_mosaic(sheet)
        say(f"mosaic: {sheet}")
    return 1 if any(problem.fatal for problem in health.problems) else 0
