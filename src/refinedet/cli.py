"""The command line: verbs to calls.

A verb's flags are the fields of a dataclass, parsed by tyro. Everything heavy is imported inside the verb, so that
``--help`` answers at once.

Exit codes: 0 done, 1 the work failed, 2 the call was wrong, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast

import tyro

import refinedet
import refinedet.weights
from refinedet.config import ModelConfig, Preset, TrainConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import check_output, check_output_folder, user_path, write_text
from refinedet.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from refinedet.detections import Detections
    from refinedet.sources import OneImage

CallT = TypeVar("CallT")


@dataclass(kw_only=True)
class TrainCall:
    """Train a detector.

    The flags of training (--iterations, --batch-size, --augment.*, --loss.*) and of the model (--model.*) start from
    the values of the preset, which comes first: refinedet train PRESET --data DATA. A stopped run goes on, bit for
    bit, with refinedet train --resume RUN. On several GPUs: torchrun --nproc-per-node N -m refinedet train ...
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = ""
    """Where the defaults come from; `refinedet models` lists them."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...")] = ()
    """Folders or files of annotated images: Pascal VOC, COCO JSON or YOLO; several are trained on together."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Run folder for config, metrics, weights and checkpoints (default: runs/PRESET)."""
    max_iterations: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Stop after so many iterations, whatever --iterations says."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Continue the training of this run folder; goes with no other flag but --device."""
    init_weights: Annotated[str, tyro.conf.arg(metavar="FILE")] = "torchvision"
    """ImageNet weights of the backbone: a file in torchvision's layout, 'torchvision' to download, or 'random'."""
    init: Annotated[str | None, tyro.conf.arg(metavar="WEIGHTS")] = None
    """A detector to start from instead: a model in the box, a run folder, a folder of weights, or a hub id. Classes are
    carried over by name."""
    class_names: Annotated[str | None, tyro.conf.arg(metavar="A,B,...")] = None
    """Names separated by commas, in the order of their labels (default: those of the data)."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """Training."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""


@dataclass(kw_only=True)
class ResumeCall:
    """Continue a training with the settings of its run folder."""

    resume: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Run folder."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(kw_only=True)
class EvaluateCall:
    """Measure a detector on annotated images: AP per class and their mean.

    With --submission also on images whose annotations are not public: results for their server instead of figures.
    """

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A model in the box (`refinedet models`), a run folder, a folder of weights, or a hub id."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder or file of annotated images: Pascal VOC, COCO JSON or YOLO."""
    split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT")] = None
    """Split of the data; 'all' takes every image (default: test, or every image of data that is not divided)."""
    metric: Literal["voc07", "voc", "coco"] = "voc07"
    """11-point AP of VOC 2007, area AP of VOC 2010 and later, or COCO's twelve numbers."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for index.html, a page on which the errors can be seen, and for the figures and all detections as JSON and
    CSV."""
    multi_scale: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Test at several sizes, flipped too, and merge by box voting: the paper's "+" rows, 16 to 40 times the work."""
    shared_classes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """For data of other classes: measure by those that model and data share (VOC's and COCO's names are matched)."""
    submission: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Results for the server of Pascal VOC (.zip, .tar.gz) or COCO (.zip, .json); DATA may lack annotations."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Only the first so many images."""
    batch_size: int = 8
    """Images that go through the network at once."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(kw_only=True)
class PredictCall:
    """Find objects in images: a table on the terminal, and on request drawn copies and JSON.

    An image that cannot be read is reported in one line, the others are done all the same, and the exit code is 1.
    """

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A model in the box (`refinedet models`), a run folder, a folder of weights, or a hub id."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Files, folders (their images, not their subfolders) and quoted patterns such as 'photos/*.jpg'."""
    threshold: float = 0.4
    """Keep detections that score at least this."""
    save: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for copies with the boxes drawn on; the originals are never touched."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the detections as JSON."""
    json_format: Literal["refinedet", "coco"] = "refinedet"
    """Our own form (per image; xyxy boxes, names), or COCO results (one list; x, y, width, height)."""
    batch_size: int = 8
    """Images that go through the network at once."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(kw_only=True)
class InspectCall:
    """Look over annotated images before training: counts, sizes, and each faulty box or file by name.

    The exit code is 1 if a file is so faulty that training would refuse it.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder or file of annotated images: Pascal VOC, COCO JSON or YOLO."""
    split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT")] = None
    """Split of the data (default: every image)."""
    class_names: Annotated[str | None, tyro.conf.arg(metavar="A,B,...")] = None
    """Names separated by commas that are the only ones allowed (default: those of the data)."""
    mosaic: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Picture file for a sheet of sample images with their boxes drawn."""


@dataclass(kw_only=True)
class ConvertCall:
    """Make weights of other programs into a model of ours.

    What the file is shows in its keys: official RefineDet models (.caffemodel), the luuuyi and dd604 ports (.pth), and
    ImageNet weights of VGG-16 and the ResNets from Caffe, torchvision and timm, which fill the backbone only. Mean,
    std, channel order and the number of classes follow from the file, the input size from the preset.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .caffemodel, .pth or .safetensors file; pickled code in it is never run."""
    preset: Annotated[str, tyro.conf.arg(metavar="PRESET")]
    """The model that the weights are for; `refinedet models` lists them."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for model.safetensors, config.json and the model card."""
    class_names: Annotated[str | None, tyro.conf.arg(metavar="A,B,...")] = None
    """Names separated by commas, in the order of their labels (default: those of VOC for 20 classes, COCO for 80)."""
    channel_order: Literal["rgb", "bgr"] | None = None
    """What the network is fed, where the format's own order is not right for this file."""


@dataclass(kw_only=True)
class AblateCall:
    """Train and evaluate the four variants of the paper's Table 2 under equal conditions.

    The flags are those of refinedet train; a preset may come first (default: voc07-320-vgg16). Each variant has its
    run folder in --out. The same command given again goes on where it was stopped, and prints the table at the end.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = ""
    """Where the defaults come from; `refinedet models` lists them."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...")] = ()
    """Folders or files of annotated images: Pascal VOC, COCO JSON or YOLO; several are trained on together."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/ablations")
    """Folder for the run folders and table.md."""
    init_weights: Annotated[str, tyro.conf.arg(metavar="FILE")] = "torchvision"
    """ImageNet weights of the backbone: a file in torchvision's layout, 'torchvision' to download, or 'random'."""
    class_names: Annotated[str | None, tyro.conf.arg(metavar="A,B,...")] = None
    """Names separated by commas, in the order of their labels (default: those of the data)."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """Training."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""


@dataclass(kw_only=True)
class BenchmarkCall:
    """Measure speed at batch 1: frames per second, number of boxes, and milliseconds of each step."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A model in the box, a run folder, a folder of weights, a hub id, or a preset, with random weights."""
    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """An image to measure on (default: noise of 500x375)."""
    runs: int = 50
    """Timed runs."""
    warmup: int = 10
    """Runs before them that do not count."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """CPU threads (default: torch's choice)."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(kw_only=True)
class ModelsCall:
    """List the models in the box and the presets for training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors of the user end in one line on standard error.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except RefineDetError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more while closing the stream.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # torch.OutOfMemoryError, told by its name because torch must not be imported for it.
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"out of GPU memory; try a smaller --batch-size ({_one_line(str(error))[:120]})", 1)
        raise


def _fail(message: str, code: int) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"refinedet {refinedet.__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_VERBS)}"
        raise UsageError(f"unknown command '{verb}': {hint}")
    return _VERBS[verb](rest)


def _overview() -> str:
    calls = {
        "train": TrainCall,
        "evaluate": EvaluateCall,
        "predict": PredictCall,
        "inspect": InspectCall,
        "convert": ConvertCall,
        "ablate": AblateCall,
        "benchmark": BenchmarkCall,
        "models": ModelsCall,
    }
    lines = [
        "usage: refinedet COMMAND ...",
        "",
        *(f"  {verb:<10}{(call.__doc__ or '').splitlines()[0]}" for verb, call in calls.items()),
        "",
        "refinedet COMMAND --help explains the flags of a command; refinedet --version tells the version.",
    ]
    return "\n".join(lines)


def _parse(kind: type[CallT], verb: str, arguments: list[str], default: CallT | None = None) -> CallT:
    """The call that the arguments describe.

    Raises:
        UsageError: tyro refused them; its framed explanation, made one line.
        SystemExit: after ``--help``.
    """
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return cast(CallT, tyro.cli(kind, prog=f"refinedet {verb}", args=arguments, default=default))
    except SystemExit as error:
        if not error.code:
            raise
        raise UsageError(f"{_unframed(refusal.getvalue())}; see refinedet {verb} --help") from None


def _unframed(text: str) -> str:
    """What a framed message of several sections says first, and the flag that it suggests.

    The first line is a title. The frame is drawn with line characters, or with dashes where the terminal has none.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ \t") for line in text.splitlines()]
    body = [line for line in lines if line]
    sentence: list[str] = []
    for line in body[1:]:
        if not re.fullmatch(r"[─-]{3,}", line):
            sentence.append(line)
        elif sentence:
            break
    message = _one_line(" ".join(sentence)).rstrip(".") or "the arguments were not understood"
    # tyro lists what each type in turn has against the value.
    pattern = r"parsing (\S+): no type matching \{None\}\|(\w+) could be instantiated from \['(.*?)'\]"
    either = re.search(pattern, message)
    if either:
        message = f"{either[1]} wants {either[2]} or None, not '{either[3]}'"
    suggested = [later for line, later in itertools.pairwise(body) if line.lower().startswith("perhaps you meant")]
    return message + (f" (did you mean {suggested[0].split()[0].rstrip(',')}?)" if suggested else "")


def _wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _train(arguments: list[str]) -> int:
    if any(re.match(r"--resume(=|$)", argument) for argument in arguments) and not _wants_help(arguments):
        return _resume(arguments)
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    preset = get_preset(named) if named is not None else next(iter(PRESETS.values()))
    call = _parse(TrainCall, "train", arguments, TrainCall(train=preset.train, model=preset.model))
    if named is None or call.preset != named:
        # The defaults of all other flags depend on it, so it has to be known before they are read.
        raise UsageError(f"the preset comes first: refinedet train PRESET --data DATA; known: {', '.join(PRESETS)}")
    if not call.data:
        raise UsageError(f"nothing to train on: refinedet train {named} --data DATA")
    weights = _backbone_weights(call.init_weights)
    if call.init is not None and call.init_weights != "torchvision":
        raise UsageError("--init starts from a whole detector, --init-weights from a backbone: give one of them")
    training = call.train
    if call.max_iterations is not None:
        _at_least_one("--max-iterations", call.max_iterations)
        training = dataclasses.replace(training, iterations=min(training.iterations, call.max_iterations))
    chosen = Preset(model=call.model, train=training, summary=preset.summary)
    out = Path("runs") / named if call.out is None else user_path(call.out)

    from refinedet.training.train import train

    train(
        chosen,
        list(call.data),
        out=out,
        backbone_weights=None if call.init is not None else weights,
        class_names=_names(call.class_names),
        device=call.device,
        init=call.init,
    )
    return _trained(out)


def _backbone_weights(given: str) -> Path | str:
    if given in ("torchvision", "random"):
        return given
    path = user_path(given)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --init-weights takes a file, 'torchvision' or 'random'")
    return path


def _resume(arguments: list[str]) -> int:
    call = _parse(ResumeCall, "train", arguments)
    folder = user_path(call.resume)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")

    from refinedet.training.train import resume

    resume(folder, device=call.device)
    return _trained(folder)


def _trained(out: Path) -> int:
    # Under torchrun every process comes by here; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        print(f"trained: {out}  (try: refinedet predict {out} photo.jpg --save drawn)")
    return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) != len(names):
        raise UsageError(f"--class-names must be different names separated by commas, not '{text}'")
    return names


def _evaluate(arguments: list[str]) -> int:
    call = _parse(EvaluateCall, "evaluate", arguments)
    _at_least_one("--batch-size", call.batch_size)
    if call.limit is not None:
        _at_least_one("--limit", call.limit)

    from refinedet.evaluation.evaluate import evaluate
    from refinedet.evaluation.page import write_page
    from refinedet.evaluation.report import check_report_folder

    data = user_path(call.data)
    report_folder = None if call.report is None else user_path(call.report)
    if report_folder is not None:
        check_report_folder(report_folder, [data])
    if call.submission is not None:
        return _submit(call, call.submission)
    with _progress("evaluate") as show:
        report = evaluate(
            call.weights,
            data,
            split=call.split,
            metric=call.metric,
            limit=call.limit,
            batch_size=call.batch_size,
            multi_scale=call.multi_scale,
            shared_classes=call.shared_classes,
            device=call.device,
            on_progress=show,
        )
    print(report.table())
    print(f"{report.settings.seconds_per_image:.3f} s per image")
    print(f"mAP {100 * report['mAP']:.2f}")
    if report_folder is not None:
        folder = report.save(report_folder)
        page = write_page(report, folder, metrics_csv=_log_of_run(call.weights))
        print(f"report: {folder}  (see {page})")
    return 0


def _submit(call: EvaluateCall, path: Path) -> int:
    """Results for a server; figures too, where the split has annotations."""
    from refinedet.detector import RefineDet
    from refinedet.device import pick_device
    from refinedet.evaluation.detector import Detector
    from refinedet.evaluation.evaluate import collect_detections, evaluate_detections, open_evaluation_data
    from refinedet.evaluation.multiscale import MultiScale
    from refinedet.evaluation.submission import plan_submission, write_submission

    if call.shared_classes or call.report is not None:
        raise UsageError("--submission takes neither --shared-classes (a server wants every class) nor --report")
    model = RefineDet.from_pretrained(call.weights, device=pick_device(call.device))
    dataset = open_evaluation_data(user_path(call.data), call.split, model, require_annotations=False)
    plan_submission(path, dataset, call.metric)
    form: Literal["voc", "coco"] = "coco" if call.metric == "coco" else "voc"
    runner: Detector = MultiScale(model, form, batch_size=call.batch_size) if call.multi_scale else model
    count = len(dataset) if call.limit is None else min(call.limit, len(dataset))
    with _progress("evaluate") as show:
        detections = collect_detections(runner, dataset, range(count), batch_size=call.batch_size, on_progress=show)
    print(f"submission: {write_submission(path, dataset, detections)}")
    if dataset.annotated:
        report = evaluate_detections(dataset, detections, call.metric)
        print(report.table())
        print(f"mAP {100 * report['mAP']:.2f}")
    else:
        print(f"no figures: {count} image{'s' * (count != 1)} without annotations")
    return 0


def _log_of_run(weights: str) -> Path | None:
    """metrics.csv, if the weights are a run folder or lie in one."""
    from refinedet.training.run import METRICS_FILE

    path = user_path(weights)
    log = (path.parent if path.name in ("best", "last") else path) / METRICS_FILE
    # A model in the box goes before a folder of the same name.
    return log if refinedet.weights.folder_of(weights) is None and log.is_file() else None


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} must be at least 1, not {value}")


def _predict(arguments: list[str]) -> int:
    call = _parse(PredictCall, "predict", arguments)
    _at_least_one("--batch-size", call.batch_size)
    if not 0 <= call.threshold <= 1:
        raise UsageError(f"--threshold must be between 0 and 1, not {call.threshold}")

    from refinedet.outputs import (
        JSON_SIGNATURE,
        SIGNATURE,
        DrawnCopies,
        coco_image_ids,
        coco_json,
        paragraph,
        predictions_json,
    )
    from refinedet.prediction import predict_ahead
    from refinedet.sources import find_images

    # Whatever can be wrong with the call is found before torch is imported and the network has worked.
    images = find_images(call.images)
    files = images.files
    if note := images.note():
        print(note, file=sys.stderr)
    save = None if call.save is None else check_output_folder(user_path(call.save), ours=SIGNATURE)
    json_file = None if call.json is None else check_output(user_path(call.json), inputs=files, ours=JSON_SIGNATURE)

    from refinedet.detector import RefineDet
    from refinedet.device import pick_device

    model = RefineDet.from_pretrained(call.weights, device=pick_device(call.device))
    copies = None if save is None else DrawnCopies(save, files)
    found: list[Detections] = []
    failed: list[dict[str, str]] = []

    def report_failure(image: OneImage, error: RefineDetError) -> None:
        _fail(str(error), error.exit_code)
        failed.append({"source": image.name, "error": str(error)})

    with _progress("predict") as show:
        for detections, pixels in predict_ahead(
            model, files, threshold=call.threshold, batch_size=call.batch_size, on_error=report_failure
        ):
            print(paragraph(detections))
            if copies is not None:
                copies.write(detections.source, detections.draw(pixels))
            # The boxes only: images are gone when their batch is done, however many there are.
            found.append(detections)
            show(len(found) + len(failed), len(files))
    if copies is not None and copies.written:
        print(f"drawn: {copies.written} image{'s' * (copies.written != 1)} in {save}")
    if json_file is not None:
        if call.json_format == "coco":
            ids = dict(zip(files, coco_image_ids(files), strict=True))
            text = coco_json(found, [ids[detections.source or ""] for detections in found])
        else:
            text = predictions_json(
                found, model=call.weights, class_names=model.class_names, threshold=call.threshold, failed=failed
            )
        write_text(json_file, text)
        print(f"json: {json_file}")
    return 1 if failed else 0


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while the block runs, fed with (done, total); nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Tables printed meanwhile are lifted over the bar, unless they go to a file.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _inspect(arguments: list[str]) -> int:
    call = _parse(InspectCall, "inspect", arguments)
    names = _names(call.class_names)

    from refinedet.data.health import MOSAIC_SIGNATURE, inspect_dataset

    data = user_path(call.data)
    mosaic = None
    if call.mosaic is not None:
        mosaic = check_output(user_path(call.mosaic), inputs=[data], ours=MOSAIC_SIGNATURE)
    with _progress("inspect") as show:
        health = inspect_dataset(data, split=call.split, class_names=names, progress=show)
    print(health.render())
    if mosaic is not None:
        health.write_mosaic(mosaic)
        print(f"mosaic: {mosaic}")
    return 1 if any(problem.fatal for problem in health.problems) else 0


def _convert(arguments: list[str]) -> int:
    call = _parse(ConvertCall, "convert", arguments)
    preset = get_preset(call.preset)
    given = _names(call.class_names)
    file, out = user_path(call.file), user_path(call.out)
    if not file.is_file():
        raise UsageError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}; convert takes a weight file")
    if (out / "model.safetensors").exists():
        raise UsageError(f"{out}: holds a model already; choose another --out")
    check_output_folder(out, ("model.safetensors", "config.json", "README.md"), inputs=[file], ours=lambda _: False)
    # Of a detector, the file decides the number of classes; of a backbone, the names do.
    wanted = dataclasses.replace(preset.model, num_classes=len(given)) if given else preset.model

    from refinedet.data.classes import COCO_CLASSES, VOC_CLASSES
    from refinedet.detector import RefineDet
    from refinedet.weights.importers import import_card, import_weights

    imported = import_weights(file, wanted, channel_order=call.channel_order)
    count = imported.config.num_classes
    names = given or {len(VOC_CLASSES): VOC_CLASSES, len(COCO_CLASSES): COCO_CLASSES}.get(count)
    if given and len(given) != count:
        raise UsageError(f"--class-names has {len(given)} names; {file} has {count} classes")
    model = RefineDet(imported.config, names, network=imported.network)
    model.save_pretrained(out, card=import_card(imported, file, model.class_names))
    order = imported.config.channel_order
    print(f"{file}: {imported.title}")
    print(f"input: {order}, mean {_numbers(imported.config.mean)}, std {_numbers(imported.config.std)}")
    if imported.untrained:
        print(f"not in the file, so still random: {', '.join(imported.untrained)}")
        following = f"refinedet train {call.preset} --init {out} --data DATA"
    else:
        if names is None:
            print(f"classes: {count}, without names; give them with --class-names")
        following = f"refinedet predict {out} photo.jpg"
    print(f"converted: {out}  (try: {following})")
    return 0


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _ablate(arguments: list[str]) -> int:
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    preset = get_preset(named or "voc07-320-vgg16")
    call = _parse(AblateCall, "ablate", arguments, AblateCall(train=preset.train, model=preset.model))
    if call.preset != (named or ""):
        raise UsageError("the preset comes first: refinedet ablate PRESET --data DATA")
    if not call.data:
        raise UsageError("nothing to train on: refinedet ablate --data DATA")
    weights = _backbone_weights(call.init_weights)
    names = _names(call.class_names)
    chosen = Preset(model=call.model, train=call.train, summary=preset.summary)
    out = user_path(call.out)

    from refinedet.ablations import TABLE_FILE, TABLE_SIGNATURE, ablate, table

    check_output_folder(out, [TABLE_FILE], ours=TABLE_SIGNATURE, inputs=call.data)
    found = ablate(chosen, list(call.data), out=out, backbone_weights=weights, class_names=names, device=call.device)
    if os.environ.get("RANK", "0") == "0":
        text = table(found, chosen)
        write_text(out / TABLE_FILE, f"<!-- {TABLE_SIGNATURE} -->\n\n{text}")
        print(text, end="")
    return 0


def _benchmark(arguments: list[str]) -> int:
    call = _parse(BenchmarkCall, "benchmark", arguments)
    _at_least_one("--runs", call.runs)
    if call.warmup < 0:
        raise UsageError(f"--warmup must not be negative, not {call.warmup}")
    if call.threads is not None:
        _at_least_one("--threads", call.threads)

    from refinedet.images import read_image

    image = None if call.image is None else read_image(call.image)

    import torch

    from refinedet.benchmark import measure_speed
    from refinedet.detector import RefineDet
    from refinedet.device import pick_device

    if call.threads is not None:
        torch.set_num_threads(call.threads)
    device = pick_device(call.device)
    if call.weights in PRESETS and refinedet.weights.folder_of(call.weights) is None:
        model = RefineDet(PRESETS[call.weights].model).to(device)
    else:
        model = RefineDet.from_pretrained(call.weights, device=device)
    print(measure_speed(model, image, runs=call.runs, warmup=call.warmup).table())
    return 0


def _models(arguments: list[str]) -> int:
    _parse(ModelsCall, "models", arguments)
    boxed = refinedet.weights.names()
    print("Models in the box (refinedet predict NAME photo.jpg):")
    for name in boxed:
        print(f"  {name:<28}{_measured(name)}")
    if not boxed:
        print("  none")
    print("\nPresets (refinedet train NAME --data DATA):")
    for name, preset in PRESETS.items():
        print(f"  {name:<28}{preset.summary}")
    return 0


def _measured(name: str) -> str:
    """The accuracy that the config of a model in the box records, and on what."""
    folder = refinedet.weights.folder_of(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else {}
        metrics = config["metrics"]
        figure = f"mAP {100 * metrics['mAP']:.1f}"
    except (OSError, ValueError, KeyError, TypeError):
        return "accuracy not measured"
    where = " ".join(str(metrics[key]) for key in ("data", "split") if metrics.get(key))
    return figure + (f" on {where}" if where else "")


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "inspect": _inspect,
    "convert": _convert,
    "ablate": _ablate,
    "benchmark": _benchmark,
    "models": _models,
}
