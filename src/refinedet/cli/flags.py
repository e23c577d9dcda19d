"""The flags that several verbs have, as annotations of their parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from refinedet.config import TrainConfig
from refinedet.errors import UsageError
from refinedet.text import cut

if TYPE_CHECKING:
    from refinedet.video import Video

VERBS: dict[str, Callable[..., int]] = {}
"""The verbs by name, in the order of the overview."""


def verb(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function a verb of the command line."""
    # A paragraph of a docstring is one paragraph of the help, which the terminal's width breaks into lines.
    function.__doc__ = re.sub(r"(?<=\S)\n(?!\n|Args:)(?=\S| {8})\s*", " ", inspect.cleandoc(function.__doc__ or ""))
    VERBS[function.__name__] = function
    return function


def flag(metavar: str, hint: str | None = "") -> Any:
    """A flag's name for its value, and what stands behind its help: nothing, or its default if ``hint`` is None."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, tyro.conf.arg(help_behavior_hint="")]]
Weights = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Data = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
OptionalData = tyro.conf.DisallowNone[Annotated[str | None, tyro.conf.Positional, flag("DATA")]]
OptionalMetric = tyro.conf.DisallowNone[Annotated[str | None, flag("voc07|voc|coco")]]
PresetName = Annotated[str, tyro.conf.Positional, flag("PRESET")]
DataPaths = Annotated[tuple[str, ...], flag("DATA...")]
Device = Annotated[str, flag("DEVICE", None)]
Folder = Annotated[Path, flag("FOLDER", None)]
OptionalFolder = tyro.conf.DisallowNone[Annotated[Path | None, flag("FOLDER")]]
OptionalFile = tyro.conf.DisallowNone[Annotated[Path | None, flag("FILE")]]
OptionalText = tyro.conf.DisallowNone[Annotated[str | None, flag("TEXT")]]
OptionalCount = tyro.conf.DisallowNone[Annotated[int | None, flag("INT")]]
OptionalNumber = tyro.conf.DisallowNone[Annotated[float | None, flag("N")]]
ClassNames = tyro.conf.DisallowNone[Annotated[str | None, flag("A,B,...")]]
LoggerNames = Annotated[tuple[str, ...], flag("NAME...")]
Training = Annotated[TrainConfig, tyro.conf.arg(name="")]

Flat = tyro.conf.arg(name="")
"""Of a dataclass: its fields are flags without a common prefix."""


@dataclass(frozen=True)
class Results:
    """Where the results of a prediction go."""

    save: OptionalFolder = None
    """Folder for copies with the boxes drawn on, or a .mp4, .mov or .mkv file for that of a video; the originals are
    never touched."""
    json: OptionalFile = None
    """File for the detections as JSON, written at the end; '-' is standard output, without the table."""
    json_format: Literal["refinedet", "coco"] = "refinedet"
    """refinedet's own format (per image: names, xyxy boxes) or COCO results (list; x, y, width, height)."""
    coco_images: OptionalFile = None
    """COCO annotation file from which COCO results take the image ids, by file name (default: the numbers in the file
    names, or 1, 2, 3, ... in the order of the images)."""
    jsonl: OptionalFile = None
    """File for the detections as JSON Lines: one line per image or frame, written as soon as it is done; '-' is
    standard output, without the table."""
    save_labels: tyro.conf.DisallowNone[Annotated[Literal["voc", "coco", "yolo"] | None, flag("{voc,coco,yolo}")]] = (
        None
    )
    """Write the detections as label files too, for correction in a labelling tool."""
    labels_out: Annotated[Path, flag("FOLDER", None)] = Path("labels")
    """New or empty folder for the label files."""
    rank: OptionalFile = None
    """CSV file for the images in the order in which to label them: most uncertain first."""


@dataclass(frozen=True)
class Videos:
    """How videos, streams and cameras among the sources are read."""

    every: int = 1
    """Of a video: take every so many frames."""
    start: OptionalText = None
    """Of a video: where to begin, as seconds or as [hours:]minutes:seconds."""
    end: OptionalText = None
    """Of a video: where to stop."""
    video: Switch = False
    """Every source is a video, also an address whose ending does not tell."""
    track: Switch = False
    """Of a video: follow objects over the frames and number them."""

    def given(self) -> list[str]:
        """The flags that were set."""
        return [f"--{field.name}" for field in fields(self) if getattr(self, field.name) != field.default]

    def of(self, source: str) -> Video | None:
        """The video that a source stands for, read as these flags say; None if it is no video.

        Raises:
            UsageError: a flag that is no time, or out of its range.
        """
        from refinedet.video import Video, as_video  # numpy and Pillow are not needed for the help

        video = Video(source) if self.video and as_video(source) is None else as_video(source)
        if video is None:
            return None
        check_at_least("--every", self.every)
        video.require()
        start, end = _seconds("--start", self.start), _seconds("--end", self.end)
        return replace(video, every=self.every, start=start or 0.0, end=end)


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    parts = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if parts is None:
        raise UsageError(f"{name} must be seconds or [hours:]minutes:seconds, such as 90 or 1:30, not '{text}'")
    return 3600 * int(parts[1] or 0) + 60 * int(parts[2] or 0) + float(parts[3])


@dataclass(frozen=True)
class Drawing:
    """How boxes are drawn; see ``Detections.draw``."""

    line_width: OptionalCount = None
    """Thickness of the drawn boxes in pixels (default: it follows the size of the image)."""
    no_labels: Switch = False
    """Draw the boxes without names and scores."""
    font: OptionalFile = None
    """Font file for the drawn names (default: one that has their letters)."""


def class_names_in(text: str | None) -> tuple[str, ...] | None:
    """The names in the value of --class-names.

    Raises:
        UsageError: an empty name, or one that is there twice.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) != len(names):
        raise UsageError(f"--class-names must be different names separated by commas, not '{text}'")
    return names


def check_at_least(flag: str, value: int | None, smallest: int = 1, largest: int = 2**63 - 1) -> None:
    """Refuse a number that is too small, or beyond what anything here counts to.

    Raises:
        UsageError: it is; the message names the flag.
    """
    if value is not None and value < smallest:
        raise UsageError(f"{flag} must be at least {smallest}, not {cut(str(value), 40)}")
    if value is not None and value > largest:
        raise UsageError(f"{flag} must be at most {largest:,}, not {cut(str(value), 40)}")


def fields_in(arguments: Sequence[str]) -> tuple[str, ...]:
    """Names of the fields that flags such as ``--model.image-size=...`` and ``--augment.no-crop`` set."""
    flags = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    names = [flag.rpartition(".")[2].removeprefix("no-").replace("-", "_") for flag in flags]
    return tuple(dict.fromkeys(names))


def check_share(flag: str, value: float) -> None:
    """Refuse a number that is not from 0 to 1.

    Raises:
        UsageError: it is not; the message names the flag.
    """
    if not 0 <= value <= 1:
        raise UsageError(f"{flag} must be between 0 and 1, not {value}")
