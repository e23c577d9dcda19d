"""Where the results of ``refinedet predict`` go: table, drawn copies, JSON Lines as they come, and JSON at the end.

A run that stops early, whatever the reason, keeps what it has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from refinedet.cli.flags import Drawing, Results
from refinedet.cli.terminal import fail, note, say, terminable
from refinedet.data.classes import coco_category_ids
from refinedet.detections import Detections
from refinedet.draw import SIGNATURE
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import (
    STANDARD_OUTPUT,
    check_output,
    check_output_folder,
    encoded,
    failure_reason,
    is_stream,
    open_stream,
    read_json,
    user_path,
    write_text,
)
from refinedet.fonts import check_font
from refinedet.labels import LabelFolder
from refinedet.outputs import (
    JSON_SIGNATURE,
    DrawnCopies,
    coco_image_ids,
    coco_json,
    paragraph,
    predictions_json,
)
from refinedet.pixels import Pixels
from refinedet.ranking import HEADER, Rank, rank, rank_csv
from refinedet.recording import DrawnVideos, is_video_output
from refinedet.tracking import LOWEST_SCORE, ObjectTracker
from refinedet.video import Video

RANK_SIGNATURE = ",".join(HEADER)
"""The first line of a table of ranks, by which it is recognised."""


class Detector(Protocol):
    """What is needed of a detector beside its detections."""

    class_names: tuple[str, ...]
    config: Any


class PredictionOutputs:
    """The outputs that a call asks for; they are checked when this is made, before the work starts.

    Args:
        files: The images, all of them.
        results: What is wanted.
        drawing: How drawn copies look.
        videos: The videos, streams and cameras.
        tracker: What numbers their objects, if anything does.

    Raises:
        UsageError: an output may not be replaced, the annotation file does not list an image, a font is none, or an
            output is none for videos.
        RefineDetError: an output cannot be written.
    """

    def __init__(
        self, files: Sequence[str], results: Results, drawing: Drawing, videos: Sequence[Video] = (),
        tracker: ObjectTracker | None = None,
    ) -> None:  # fmt: skip
        coco = results.json_format == "coco"
        if results.coco_images is not None and not coco:
            raise UsageError("--coco-images says the ids of COCO results: it goes with --json-format coco")
        annotations = None if results.coco_images is None else user_path(results.coco_images)
        inputs: list[str | Path] = [*files, *([annotations] if annotations is not None else [])]
        inputs += [video.path for video in videos]
        _check_outputs_of(videos, results)
        wanted = (results.json, JSON_SIGNATURE), (results.jsonl, JSON_SIGNATURE), (results.rank, RANK_SIGNATURE)
        paths = [None if path is None else user_path(path) for path, _ in wanted]
        for path, (_, signature) in zip(paths, wanted, strict=True):
            if path is not None:
                check_output(path, inputs=inputs, ours=signature)
                if paths.count(path) > 1:
                    raise UsageError(f"{path}: --json, --jsonl and --rank need different files")
        self._json, jsonl, self._rank = paths
        self._jsonl = None if jsonl is None else JsonLines(jsonl)
        self._image_ids = None
        if coco:
            ids = coco_image_ids(files) if annotations is None else image_ids_of(files, annotations)
            self._image_ids = dict(zip(files, ids, strict=True))
        self._tracker = tracker
        self._look = checked_look(drawing)
        self._copies, self._videos = _drawn(results.save, files, videos, self._look)
        self._layout, self._labels_folder = results.save_labels, user_path(results.labels_out)
        self._labels: LabelFolder | None = None
        self._images, self._files = 0, files
        self._total = f"{len(files)} images" if not videos else "an unknown number of images and frames"
        self._kept: list[Detections] = []
        self._ranks: list[Rank] = []
        self._threshold: float | None = None
        self.failed: list[dict[str, str]] = []
        """The images that could not be read, with the reason."""
        self._broken: OSError | None = None

    @property
    def _is_kept(self) -> bool:
        """Whether anything is kept beside what standard output shows."""
        return any((self._json, self._jsonl, self._copies, self._videos, self._layout, self._rank))

    def lowest_score(self, threshold: float) -> float | None:
        """The threshold of the detections that ``add`` wants: images are ranked by all, tracks use uncertain ones."""
        if self._rank is not None:
            return None
        return threshold if self._tracker is None else min(threshold, LOWEST_SCORE)

    @property
    def uses_standard_output(self) -> bool:
        """Whether JSON goes to standard output, so that nothing else may."""
        paths = (self._json, self._rank, None if self._jsonl is None else self._jsonl.path)
        return any(path is not None and (path == STANDARD_OUTPUT or _is_stdout(path)) for path in paths)

    @property
    def count(self) -> int:
        """How many images are done, failed ones included."""
        return self._images + len(self.failed)

    @contextlib.contextmanager
    def open(self, model: str, detector: Detector, threshold: float) -> Iterator[PredictionOutputs]:
        """Take results while the block runs; at its end, however it comes, what there is is written.

        Args:
            model: The name that the user gave.
            detector: The detector of that name.
            threshold: Lowest score.

        Raises:
            RefineDetError: an output cannot be written.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(terminable())
            self._threshold = threshold
            if self._layout is not None:
                ids = _category_ids(detector) if self._layout == "coco" else None
                names = detector.class_names
                self._labels = LabelFolder(self._labels_folder, self._layout, names, self._files, ids)
                self._labels.__enter__()
            if self._jsonl is not None:
                stack.enter_context(self._jsonl.open(header(model, detector, threshold)))
            try:
                yield self
            except BaseException as error:
                # The first error is the one to report; what there is is saved all the same.
                with contextlib.suppress(RefineDetError, OSError):
                    self._finish(model, detector, threshold)
                if isinstance(error, KeyboardInterrupt):
                    kept = "; their results are saved" if self._is_kept else ""
                    error.args = (f"{self.count} of {self._total} were done{kept}",)
                raise
            self._finish(model, detector, threshold)
        if self._broken is not None and not isinstance(self._broken, BrokenPipeError):
            raise RefineDetError(f"standard output: cannot be written ({failure_reason(self._broken)})")

    def add(self, detections: Detections, pixels: Pixels, *, table: bool) -> None:
        """Take the detections of one image.

        Raises:
            RefineDetError: an output cannot be written.
            OSError: standard output cannot be written, and it is the only output.
        """
        if self._rank is not None:
            self._ranks.append(rank(detections))
        if self._tracker is not None:
            detections = self._tracker.update(detections)
        detections = detections.filter(threshold=self._threshold)
        if table:
            self._show(paragraph(detections))
        if detections.time is not None:
            if self._videos is not None:
                self._videos.write(detections, pixels)
        elif self._copies is not None:
            self._copies.write(detections.source, detections.draw(pixels, **self._look))
        if self._jsonl is not None:
            self._jsonl.write(detections.to_dict())
        if self._labels is not None:
            self._labels.add(detections)
        self._images += 1
        if self._json is not None:
            # The boxes only: the pixels are gone when their batch is done, however many there are.
            self._kept.append(detections)

    def add_failure(self, source: str, error: RefineDetError) -> None:
        """Take an image that could not be read."""
        fail(str(error), error.exit_code)
        self.failed.append({"source": source, "error": str(error)})
        if self._jsonl is not None:
            self._jsonl.write(self.failed[-1])

    def _show(self, text: str) -> None:
        if self._broken is not None:
            return
        try:
            say(text)
        except OSError as error:
            if not self._is_kept:
                raise
            # Nobody reads the table any more, but the other outputs are wanted.
            self._broken = error

    def _finish(self, model: str, detector: Detector, threshold: float) -> None:
        outputs: list[str] = []
        if self._videos is not None:
            self._videos.close()
            outputs += [f"drawn: {path}" for path in self._videos.written]
        if self._copies is not None and self._copies.written:
            written = self._copies.written
            outputs.append(f"drawn: {written} image{'s' * (written != 1)} in {self._copies.folder}")
        if self._jsonl is not None:
            outputs.append(f"jsonl: {self._jsonl.path}")
        if self._labels is not None:
            self._labels.__exit__(None, None, None)
            outputs.append(f"labels: {self._labels.folder}")
        if self._rank is not None:
            write_text(self._rank, rank_csv(self._ranks))
            outputs.append(f"rank: {self._rank}")
        if self._json is not None:
            if self._image_ids is None:
                text = predictions_json(self._kept, **header(model, detector, threshold), failed=self.failed)
            else:
                ids = [self._image_ids[detections.source or ""] for detections in self._kept]
                text = coco_json(self._kept, ids, _category_ids(detector))
            write_text(self._json, text)
            outputs.append(f"json: {self._json}")
        for line in outputs if not self.uses_standard_output else ():
            self._show(line)


def _check_outputs_of(videos: Sequence[Video], results: Results) -> None:
    """Refuse outputs that are none for videos.

    Raises:
        UsageError: label files, ranks or COCO results of frames, or JSON of what may never end.
    """
    if not videos:
        return
    for name, wanted in (
        ("--save-labels", results.save_labels is not None),
        ("--rank", results.rank is not None),
        ("--json-format coco", results.json_format == "coco"),
    ):
        if wanted:
            raise UsageError(f"{videos[0].name}: {name} is for images; the frames of a video go into --jsonl")
    if results.json is not None and any(video.is_live for video in videos):
        raise UsageError(f"{videos[0].name}: --json is written at the end; use --jsonl for a stream or camera")


def _drawn(
    target: Path | None, files: Sequence[str], videos: Sequence[Video], look: dict[str, Any]
) -> tuple[DrawnCopies | None, DrawnVideos | None]:
    """What takes the drawn copies of images and of videos, as far as there are any."""
    if target is None:
        return None, None
    target = user_path(target)
    if videos and not files:
        return None, DrawnVideos(target, videos, look, say=note)
    if is_video_output(target) and not target.is_dir():
        raise UsageError(f"{target}: is the name of a video; give a folder for the copies of images")
    folder = check_output_folder(target, ours=SIGNATURE)
    return DrawnCopies(folder, files), DrawnVideos(folder, videos, look, say=note) if videos else None


class JsonLines:
    """A file or stream of JSON Lines, each written through as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None

    @contextlib.contextmanager
    def open(self, first: dict[str, Any]) -> Iterator[JsonLines]:
        """Open the file and write the first line, which carries the signature.

        Raises:
            RefineDetError: it cannot be written.
        """
        try:
            if not is_stream(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with open_stream(self.path) as self._stream:
                self.write({"generator": JSON_SIGNATURE, **first})
                yield self
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RefineDetError(f"{self.path}: cannot be written ({failure_reason(error)})") from None

    def write(self, content: dict[str, Any]) -> None:
        """Write one line; the file is open."""
        assert self._stream is not None
        self._stream.write(encoded(json.dumps(content, ensure_ascii=False) + "\n"))
        self._stream.flush()


def checked_look(drawing: Drawing) -> dict[str, Any]:
    """The arguments of ``Detections.draw`` that the flags ask for.

    Raises:
        UsageError: the font is none that can be read.
    """
    font = None if drawing.font is None else check_font(user_path(drawing.font))
    return {"line_width": drawing.line_width, "labels": not drawing.no_labels, "font": font}


def header(model: str, detector: Detector, threshold: float) -> dict[str, Any]:
    """What the files of a prediction say about it."""
    return {"model": model, "class_names": list(detector.class_names), "threshold": threshold}


def _is_stdout(path: Path) -> bool:
    return str(path) in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def _category_ids(detector: Detector) -> Sequence[int]:
    """COCO category id of each label: that of the training data, else COCO's own, else 1, 2, 3, ..."""
    trained_on: Sequence[int] | None = getattr(detector, "category_ids", None)
    known = trained_on or coco_category_ids(detector.class_names)
    if known:
        return known
    count = len(detector.class_names)
    note(f"note: the model does not know the category ids of its training data; they are 1 to {count} in label order")
    return range(1, count + 1)


def image_ids_of(files: Sequence[str], annotations: Path) -> list[int | str]:
    """The id of each image in a COCO annotation file, found by its file name.

    Raises:
        UsageError: an image is not in the file, or several of its name are.
        RefineDetError: the file is no list of COCO images.
    """
    content = read_json(annotations)
    by_name: dict[str, list[tuple[str, int | str]]] = {}
    try:
        for image in content["images"]:
            name = str(image["file_name"]).replace("\\", "/")
            number = image["id"]
            if not isinstance(number, (int, str)):
                raise RefineDetError(f"{annotations}: the id of {name[:100]} is neither a whole number nor a text")
            by_name.setdefault(PurePosixPath(name).name, []).append((name, number))
    except (KeyError, TypeError):
        raise RefineDetError(f"{annotations}: no list of COCO images (images with id and file_name)") from None
    ids = []
    for file in files:
        candidates = by_name.get(Path(file).name, [])
        if len(candidates) > 1:
            candidates = [(name, number) for name, number in candidates if Path(file).as_posix().endswith(f"/{name}")]
        if len(candidates) != 1:
            raise UsageError(f"{annotations}: lists {len(candidates) or 'no'} images named {Path(file).name}")
        ids.append(candidates[0][1])
    return ids
