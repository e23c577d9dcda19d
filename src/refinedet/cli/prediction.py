"""Where the results of ``refinedet predict`` go: table, drawn copies, JSON Lines as they come, and JSON at the end.

A run that stops early, whatever the reason, keeps what it has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

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
from refinedet.outputs import (
    JSON_SIGNATURE,
    DrawnCopies,
    coco_image_ids,
    coco_json,
    paragraph,
    predictions_json,
)
from refinedet.pixels import Pixels


class Detector(Protocol):
    """What is needed of a detector beside its detections."""

    class_names: tuple[str, ...]
    config: Any


@dataclass(frozen=True)
class Drawing:
    """How drawn copies look; see ``Detections.draw``.

    Raises:
        UsageError: ``font`` is no font that can be read.
    """

    line_width: int | None = None
    labels: bool = True
    font: Path | None = None

    def __post_init__(self) -> None:
        if self.font is not None:
            object.__setattr__(self, "font", check_font(user_path(self.font)))


class PredictionOutputs:
    """The outputs that a call asks for; they are checked when this is made, before the work starts.

    Args:
        files: The images, all of them.
        save: Folder for drawn copies.
        drawing: How they look.
        json_file: File for all detections, at the end.
        jsonl: File for the detections of each image, as they come.
        coco: Whether ``json_file`` is a list of COCO results.
        coco_images: COCO annotation file that says the ids of the images.

    Raises:
        UsageError: an output may not be replaced, or the annotation file does not list an image.
        RefineDetError: an output cannot be written.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        save: Path | None = None,
        drawing: Drawing | None = None,
        json_file: Path | None = None,
        jsonl: Path | None = None,
        coco: bool = False,
        coco_images: Path | None = None,
    ) -> None:
        if coco_images is not None and not coco:
            raise UsageError("--coco-images says the ids of COCO results: it goes with --json-format coco")
        annotations = None if coco_images is None else user_path(coco_images)
        inputs: list[str | Path] = [*files, *([annotations] if annotations is not None else [])]
        outputs = [None if path is None else user_path(path) for path in (json_file, jsonl)]
        for path in outputs:
            if path is not None:
                check_output(path, inputs=inputs, ours=JSON_SIGNATURE)
        self._json, self._jsonl = outputs
        if self._json is not None and self._json == self._jsonl:
            raise UsageError(f"{self._json}: --json and --jsonl need different files")
        self._image_ids = None
        if coco:
            ids = coco_image_ids(files) if annotations is None else image_ids_of(files, annotations)
            self._image_ids = dict(zip(files, ids, strict=True))
        folder = None if save is None else check_output_folder(user_path(save), ours=SIGNATURE)
        self._copies = None if folder is None else DrawnCopies(folder, files)
        self._drawing = drawing or Drawing()
        self._images, self._total = 0, len(files)
        self._stream: IO[bytes] | None = None
        self._kept: list[Detections] = []
        self.failed: list[dict[str, str]] = []
        """The images that could not be read, with the reason."""
        self._broken: OSError | None = None

    @property
    def uses_standard_output(self) -> bool:
        """Whether JSON goes to standard output, so that nothing else may."""
        return any(
            path is not None and (path == STANDARD_OUTPUT or _is_stdout(path)) for path in (self._json, self._jsonl)
        )

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
            if self._jsonl is not None:
                self._stream = stack.enter_context(self._opened(self._jsonl))
                self._write_line({"generator": JSON_SIGNATURE, **_header(model, detector, threshold)})
            try:
                yield self
            except BaseException as error:
                # The first error is the one to report; what there is is saved all the same.
                with contextlib.suppress(RefineDetError, OSError):
                    self._finish(model, detector, threshold)
                if isinstance(error, KeyboardInterrupt):
                    kept = "; their results are saved" if self._json or self._jsonl or self._copies else ""
                    raise type(error)(f"{self.count} of {self._total} images were done{kept}") from None
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
        if table:
            self._show(paragraph(detections))
        if self._copies is not None:
            look = self._drawing
            drawn = detections.draw(pixels, line_width=look.line_width, labels=look.labels, font=look.font)
            self._copies.write(detections.source, drawn)
        self._write_line(detections.to_dict())
        self._images += 1
        if self._json is not None:
            # The boxes only: the pixels are gone when their batch is done, however many there are.
            self._kept.append(detections)

    def add_failure(self, source: str, error: RefineDetError) -> None:
        """Take an image that could not be read."""
        fail(str(error), error.exit_code)
        self.failed.append({"source": source, "error": str(error)})
        self._write_line(self.failed[-1])

    def _show(self, text: str) -> None:
        if self._broken is not None:
            return
        try:
            say(text)
        except OSError as error:
            if not (self._json or self._jsonl or self._copies):
                raise
            # Nobody reads the table any more, but the other outputs are wanted.
            self._broken = error

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[IO[bytes]]:
        try:
            if not is_stream(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with open_stream(path) as stream:
                yield stream
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RefineDetError(f"{path}: cannot be written ({failure_reason(error)})") from None

    def _write_line(self, content: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(encoded(json.dumps(content, ensure_ascii=False) + "\n"))
            self._stream.flush()

    def _finish(self, model: str, detector: Detector, threshold: float) -> None:
        quiet = self.uses_standard_output
        if self._copies is not None and self._copies.written and not quiet:
            written = self._copies.written
            self._show(f"drawn: {written} image{'s' * (written != 1)} in {self._copies.folder}")
        if self._jsonl is not None and not quiet:
            self._show(f"jsonl: {self._jsonl}")
        if self._json is None:
            return
        if self._image_ids is None:
            text = predictions_json(self._kept, **_header(model, detector, threshold), failed=self.failed)
        else:
            ids = [self._image_ids[detections.source or ""] for detections in self._kept]
            text = coco_json(self._kept, ids, _category_ids(detector))
        write_text(self._json, text)
        if not quiet:
            self._show(f"json: {self._json}")


def _is_stdout(path: Path) -> bool:
    return str(path) in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def _header(model: str, detector: Detector, threshold: float) -> dict[str, Any]:
    return {"model": model, "class_names": list(detector.class_names), "threshold": threshold}


def _category_ids(detector: Detector) -> Sequence[int]:
    """COCO category id of each label: that of the training data, else COCO's own, else 1, 2, 3, ..."""
    trained_on: Sequence[int] | None = getattr(detector.config, "category_ids", None)
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
