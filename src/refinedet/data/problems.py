"""What is wrong with the files of a dataset: one ``Problem`` for each, with a kind by which they are counted."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from refinedet.errors import RefineDetError, UsageError, did_you_mean
from refinedet.text import cut


@dataclass(frozen=True)
class ProblemKind:
    """What many problems have in common; they are counted by it."""

    one: str
    """Words for a single one, such as "box clipped to its image"."""
    many: str
    """Words for several, such as "boxes clipped to their images"."""
    unit: Literal["object", "image", "file"]
    """What is affected: one object, a whole image, or neither (a value of a file was filled in)."""
    lost: bool = True
    """Whether the object or image is missing from the records."""


CLIPPED = ProblemKind("box clipped to its image", "boxes clipped to their images", "object", lost=False)
SWAPPED = ProblemKind("box with swapped corners dropped", "boxes with swapped corners dropped", "object")
NO_AREA = ProblemKind("box without an area dropped", "boxes without an area dropped", "object")
OUTSIDE = ProblemKind("box outside its image dropped", "boxes outside their images dropped", "object")
NO_BOX = ProblemKind("object without a box dropped", "objects without a box dropped", "object")
NO_SIZE = ProblemKind(
    "image size filled in from the image file", "image sizes filled in from the image files", "file", lost=False
)
NO_ANNOTATION = ProblemKind(
    "image without an annotation left out", "images without an annotation left out", "image", lost=True
)
DRAWN_IMAGE = ProblemKind(
    "image drawn by refinedet passed over", "images drawn by refinedet passed over", "image", lost=False
)
LISTED_TWICE = ProblemKind("entry listed twice", "entries listed twice", "file", lost=False)
NAME_DIFFERS = ProblemKind(
    "annotation that names another image file", "annotations that name another image file", "file", lost=False
)
FOUND_ELSEWHERE = ProblemKind(
    "image or folder found in another place than stated",
    "images or folders found in other places than stated",
    "file",
    lost=False,
)
LABEL_SHARED = ProblemKind(
    "label file read for several images", "label files read for several images", "file", lost=False
)
PARTS_IGNORED = ProblemKind("annotation read only in part", "annotations read only in part", "file", lost=False)
BOX_FORM = ProblemKind(
    "annotation file whose boxes seem to be of another form",
    "annotation files whose boxes seem to be of another form",
    "file",
    lost=False,
)
SPLIT_MISSING = ProblemKind("split that is not there", "splits that are not there", "file")
REPEATED = ProblemKind("box repeated in its image", "boxes repeated in their images", "object", lost=False)
UNREADABLE = ProblemKind("image that cannot be read", "images that cannot be read", "image")
NOT_A_FILE = ProblemKind(
    "pipe, device or broken link passed over", "pipes, devices or broken links passed over", "image"
)
SEVERAL_IMAGES = ProblemKind("image that shares its label file", "images that share their label file", "image")
SECOND_LABEL = ProblemKind("second label file of an image left out", "second label files of an image left out", "file")
NO_IMAGE = ProblemKind("label file without an image", "label files without an image", "image")
OTHER_PLACE = ProblemKind(
    "label file found under another name or place", "label files found under another name or place", "file", lost=False
)
ODD_VALUE = ProblemKind("value that was not understood", "values that were not understood", "file", lost=False)
SECOND_BOX = ProblemKind("object with several boxes", "objects with several boxes", "file", lost=False)
UNUSABLE = ProblemKind("file that cannot be used", "files that cannot be used", "image")


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file."""

    path: Path
    """The file: an annotation for a faulty box, an image for unreadable pixels."""
    message: str
    """One line without the path."""
    fatal: bool
    """True: training and evaluation refuse it, lenient reading left the file out. False: a box was dropped or clipped,
    a missing value filled in, or an image without annotation passed over."""
    kind: ProblemKind = UNUSABLE
    """What it is counted under."""
    count: int = 1
    """How often it occurs; ``path`` and ``message`` are those of the first occurrence."""

    def __str__(self) -> str:
        """``path: message``, with the number of further occurrences."""
        more = f" (and {self.count - 1} more like it)" if self.count > 1 else ""
        return f"{self.path}: {self.message}{more}"


class FaultyFileError(RefineDetError):
    """One file cannot be used. Strict reading lets it through, lenient reading turns it into a ``Problem``."""

    def __init__(self, path: Path, reason: str, kind: ProblemKind = UNUSABLE) -> None:
        """Name the file and what is wrong with it."""
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.kind = kind


class ProblemLog:
    """Collects problems while a reader works; in strict mode the first fatal one ends the reading."""

    def __init__(self, *, strict: bool) -> None:
        """Start without problems."""
        self.strict = strict
        self.problems: list[Problem] = []
        self._position_of_cause: dict[str, int] = {}

    def note(self, path: Path, message: str, kind: ProblemKind, *, cause: str | None = None, count: int = 1) -> None:
        """Remember something that was repaired.

        Args:
            path: the file.
            message: one line without the path.
            kind: what it is counted under.
            cause: what many problems come from, such as a line of the file that describes the dataset. Later problems
                of the same cause only raise the count of the first.
            count: how often it occurs.
        """
        self._add(Problem(path, message, fatal=False, kind=kind, count=count), cause)

    def fatal(self, error: FaultyFileError, *, cause: str | None = None, count: int = 1) -> None:
        """Raise ``error`` (strict) or remember it (lenient); ``cause`` and ``count`` are as for ``note``."""
        if self.strict:
            raise error
        self._add(Problem(error.path, error.reason, fatal=True, kind=error.kind, count=count), cause)

    def _add(self, problem: Problem, cause: str | None) -> None:
        position = None if cause is None else self._position_of_cause.get(cause)
        if position is None:
            if cause is not None:
                self._position_of_cause[cause] = len(self.problems)
            self.problems.append(problem)
        else:
            first = self.problems[position]
            self.problems[position] = replace(first, count=first.count + problem.count)


def count_kinds(problems: Iterable[Problem]) -> list[tuple[ProblemKind, int]]:
    """How many problems there are of each kind, the commonest first."""
    counts: Counter[ProblemKind] = Counter()
    for problem in problems:
        counts[problem.kind] += problem.count
    return counts.most_common()


def describe_kinds(problems: Iterable[Problem], most: int | None = None) -> str:
    """The counts of ``count_kinds`` in words: "12 boxes clipped to their images, 1 box without an area dropped".

    Args:
        problems: what is counted.
        most: how many kinds are named; None names all.
    """
    counts = count_kinds(problems)[:most]
    return ", ".join(f"{count} {kind.one if count == 1 else kind.many}" for kind, count in counts)


def unknown_split(path: Path, split: str, available: Iterable[str]) -> UsageError:
    """The error for a split that is not there, listing those that are."""
    known = ", ".join(available)
    return UsageError(
        f"{path}: no split {short_repr(split)}; " + (f"available: {known}" if known else "it has no splits")
    )


def unknown_class(path: Path, name: str, known: Sequence[str], where: str = "") -> FaultyFileError:
    """The error for an object of a class that is not in the list, with the nearest known name."""
    hint = did_you_mean(name, known, cutoff=0.5, otherwise=f"known: {shorten(known)}")
    return FaultyFileError(path, f"{where}class '{name}' is not in the list of classes; {hint}")


def shorten(names: Sequence[str], most: int = 8) -> str:
    """Names joined by commas, cut after ``most``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def short_repr(value: object) -> str:
    """A value of a file for a message: its ``repr``, which has no line breaks or control characters, cut where long."""
    return cut(_REPR.repr(value), 200)
