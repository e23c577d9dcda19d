"""Finding the images that annotation files and lists name, whatever machine and tool these come from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from refinedet.data.problems import FOUND_ELSEWHERE, FaultyFileError, ProblemLog, short_repr

_MOST_FILES = 1_000_000
"""How many files of a folder are looked at in a search, so that a search in a home directory comes to an end."""
_DRIVE = re.compile(r"[A-Za-z]:/")


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path lies in a folder or is that folder, as both are written; links are not followed."""
    inner, outer = os.path.abspath(path), os.path.abspath(folder)
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def steps_below(path: str | Path, folder: str | Path) -> tuple[str, ...] | None:
    """The steps from a folder down to a path, whichever of the two is relative; None if it does not lie there."""
    if not is_below(path, folder):
        return None
    return Path(os.path.relpath(os.path.abspath(path), os.path.abspath(folder))).parts


def is_really_below(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder once all links are followed. Only what such files say is quoted in messages."""
    return is_below(os.path.realpath(path), os.path.realpath(folder))


def with_slashes(text: str) -> str:
    """A path with the separators of Windows replaced by slashes."""
    return text.replace("\\", "/")


def is_absolute(text: str) -> bool:
    """Whether a path, already ``with_slashes``, starts at a root or a drive."""
    return text.startswith("/") or _DRIVE.match(text) is not None


class MissingImageError(FaultyFileError):
    """No image has the name that a file states."""


class ImageFinder:
    """Finds images by the names that a file states for them.

    A name is tried below each folder as it stands, with slashes for backslashes, and with %20 and the like decoded.
    Failing that, the image below ``root`` is taken whose path ends with the longest part of the name, if it is the
    only one; this is noted once for the file. A name that leads out of the folders is refused unless ``allow_outside``.
    """

    def __init__(
        self, source: Path, folders: Sequence[Path], root: Path, log: ProblemLog, *, allow_outside: bool = False
    ) -> None:
        """Prepare a search.

        Args:
            source: the file that states the names; messages name it.
            folders: where stated names may start, in order of preference.
            root: the folder of the data, in which images are searched by the end of their path.
            log: receives the problems.
            allow_outside: whether images outside of ``folders`` and ``root`` may be named.
        """
        self._source = source
        # Paths keep the spelling of the folders: images that are listed and images that are named must compare equal.
        self._folders = [str(folder) for folder in folders]
        self._root = str(root)
        self._log = log
        self._allow_outside = allow_outside
        # One listing of the folder instead of a question for each of 118,000 files.
        self._listed = _files_of(self._folders[0]) if self._folders else set()
        self._first_folder = Path(folders[0]) if folders else root
        self._by_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> Path:
        """The image of that name.

        Raises:
            FaultyFileError: there is none, there are several, or it lies outside.
        """
        if name in self._listed:
            return self._first_folder / name
        outside = None
        for spelling in _spellings(name):
            for folder in self._folders:
                place = os.path.normpath(os.path.join(folder, spelling))
                if not os.path.isfile(place):
                    continue
                if self._allow_outside or any(is_below(place, inside) for inside in (*self._folders, self._root)):
                    return Path(place)
                outside = place
        if outside is not None:
            raise FaultyFileError(
                self._source,
                f"names {short_repr(name)}, which lies outside the folder of the data ({self._root}); move it there, "
                "or allow it with --allow-outside",
            )
        return self._find_by_end(name)

    def _find_by_end(self, name: str) -> Path:
        parts = _steps(_spellings(name)[-1])
        if self._by_name is None:
            self._by_name = _index(self._root)
        candidates = self._by_name.get(parts[-1], []) if parts else []
        if not candidates:
            shown = self._first_folder / name if name.isprintable() and len(name) <= 200 else self._source
            raise MissingImageError(
                shown,
                f"image is missing, but {self._source} lists it; restore it or remove it from the file"
                if shown != self._source
                else f"names the image {short_repr(name)}, which is not there; restore it or remove it from the file",
            )
        agreement = [_common_end(parts, _steps(candidate)) for candidate in candidates]
        best = [place for place, count in zip(candidates, agreement, strict=True) if count == max(agreement)]
        if len(best) > 1:
            raise FaultyFileError(
                self._source,
                f"names {short_repr(name)}, which is not there, and {len(best)} files below {self._root} are called "
                f"{parts[-1]}; correct the name",
            )
        self._log.note(
            self._source,
            f"names {short_repr(name)}, which is not there; {best[0]} is used, the only one with that end",
            FOUND_ELSEWHERE,
            cause=f"found by end: {self._source}",
        )
        return Path(best[0])


def _spellings(name: str) -> list[str]:
    """The name as it stands and as other systems may have meant it."""
    slashes = with_slashes(name)
    return list(dict.fromkeys([name, slashes, unquote(slashes)]))


def _steps(path: str) -> list[str]:
    return [step for step in path.split("/") if step not in ("", ".", "..")]


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    """How many of the last steps of two paths agree."""
    count = 0
    for name, other in zip(reversed(first), reversed(second), strict=False):
        if name != other:
            break
        count += 1
    return count


def _files_of(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def walk_files(folder: str | Path) -> Iterable[tuple[str, list[str]]]:
    """Each folder below, with the names of its files, sorted; links to folders are not followed.

    Ends after ``_MOST_FILES`` files, so that no search goes on forever.
    """
    seen = 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield parent, sorted(names)
        seen += len(names) + len(folders)
        if seen > _MOST_FILES:
            return


def _index(root: str) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for parent, names in walk_files(root):
        for name in names:
            places.setdefault(name, []).append(os.path.join(parent, name))
    return places
