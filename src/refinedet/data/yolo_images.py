"""The images of a YOLO split: the folders and list files that the describing file names, wherever these now are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from refinedet.data.image_paths import (
    ImageFinder,
    MissingImageError,
    is_absolute,
    is_below,
    is_really_below,
    steps_below,
    with_slashes,
)
from refinedet.data.pairing import FolderFiles, list_files, note_passed_over
from refinedet.data.problems import FOUND_ELSEWHERE, SPLIT_MISSING, FaultyFileError, ProblemLog, short_repr
from refinedet.data.splits import choose_split
from refinedet.data.yolo_description import Description
from refinedet.errors import RefineDetError, UsageError

LABEL_ENDING = ".txt"
_SPLIT_FOLDERS = {
    "train": ("train", "Train", "training"),
    "val": ("val", "valid", "Val", "Valid", "validation"),
    "test": ("test", "Test", "testing"),
}
"""What the folder of a split may be called."""


class SplitImages:
    """Finds the images of the splits of a description."""

    def __init__(self, description: Description, log: ProblemLog, *, allow_outside: bool = False) -> None:
        """Prepare for the splits of a description.

        Args:
            description: of the dataset.
            log: receives the problems.
            allow_outside: whether relative entries and lines of list files may lead out of the data.
        """
        self._description = description
        self._log = log
        self._allow_outside = allow_outside
        self.folders: list[Path] = [description.folder]
        """The folders of the data: of the describing file, its ``path``, and the absolute ones that it names."""
        self.lists: list[Path] = []
        """The list files that were read."""
        if not is_below(description.folder, description.root):
            self._trust(description.root)

    def splits(self) -> dict[str, list[str]]:
        """Split -> entries, without splits whose entries are all missing; from the folders if none are stated."""
        stated = self._description.splits()
        if not stated:
            return self._usual_folders()
        return {split: entries for split, entries in stated.items() if any(map(self._exists, entries))}

    def read(self, split: str | None) -> list[Path]:
        """The images of a split, of several joined by "+", or of all for None, each once.

        Raises:
            UsageError: unknown split, a folder that does not exist, a split without images.
            RefineDetError: (strict) a line of a list that names no image.
        """
        stated = self._description.splits() or self._usual_folders()
        if split is None:
            images = self._read_all(stated)
        else:
            images = {}
            for part in (part.strip() for part in split.split("+")):
                name = choose_split(self._description.file, part, list(stated))
                in_split = self._read_split(name, stated[name])
                if not in_split:
                    raise UsageError(f"{self._description.file}: split '{part}' has no images")
                images.update(dict.fromkeys(in_split))
        folders = {folder: self._spell(folder) for folder in {image.parent for image in images}}
        return list(dict.fromkeys(folders[image.parent] / image.name for image in images))

    def _spell(self, folder: Path) -> Path:
        """The one path of a folder, however it is stated: below the folder of the data, if it lies there."""
        steps = steps_below(folder, self._description.folder)
        return folder if steps is None else self._description.folder.joinpath(*steps)

    def _read_all(self, stated: dict[str, list[str]]) -> dict[Path, None]:
        if not stated:
            folder = self._description.root if self._description.root.is_dir() else self._description.folder
            return dict.fromkeys(self._list(folder / "images" if (folder / "images").is_dir() else folder))
        images: dict[Path, None] = {}
        missing: list[UsageError] = []
        for split, entries in stated.items():
            if any(map(self._exists, entries)):
                images.update(dict.fromkeys(self._read_split(split, entries)))
            else:
                # Exports name a test split whether there is one or not.
                missing.append(self._missing(split, entries[0]))
        if len(missing) == len(stated):
            raise missing[0]
        for error in missing:
            reason = str(error).removeprefix(f"{self._description.file}: ")
            self._log.note(self._description.file, reason, SPLIT_MISSING)
        return images

    def _usual_folders(self) -> dict[str, list[str]]:
        """Folders called after splits: images/train, train/images or train."""
        folder = self._description.folder
        splits: dict[str, list[str]] = {}
        for split, names in _SPLIT_FOLDERS.items():
            places = [place for name in names for place in (f"images/{name}", f"{name}/images", name)]
            existing = [place for place in places if (folder / place).is_dir()]
            if existing:
                splits[split] = existing[:1]
        return splits

    def _exists(self, entry: str) -> bool:
        try:
            return self._resolve(entry, note=False) is not None
        except UsageError:
            return True  # It is there, and refused when it is read.

    def _missing(self, split: str, entry: str) -> UsageError:
        return UsageError(
            f"{self._description.file}: '{split}' names {short_repr(entry)[1:-1]}, which does not exist; correct it or "
            "the key 'path'"
        )

    def _read_split(self, split: str, entries: Iterable[str]) -> dict[Path, None]:
        images: dict[Path, None] = {}
        for entry in entries:
            place = self._resolve(entry)
            if place is None:
                raise self._missing(split, entry)
            if place.is_dir():
                images.update(dict.fromkeys(self._list(place)))
            elif place.suffix.lower() == ".txt" and place.is_file():
                images.update(dict.fromkeys(self._read_list(place)))
            else:
                raise UsageError(
                    f"{self._description.file}: '{split}' names {short_repr(entry)[1:-1]}, which is neither a folder "
                    "nor a .txt file"
                )
        return images

    def _resolve(self, entry: str, *, note: bool = True) -> Path | None:
        """The place that an entry means, None if there is none.

        An absolute path is taken as it stands. A relative one starts at ``path`` or at the describing file and must
        stay below; exports write "../train/images" for a folder beside the file. Of a path that is not there, such as
        an absolute one of another machine, the end is looked for beside the file.

        Raises:
            UsageError: the place lies outside the data, or is a folder that contains the describing file's.
        """
        text = with_slashes(entry)
        steps = [step for step in text.split("/") if step not in ("", ".", "..")]
        here, root = self._description.folder, self._description.root
        outside: Path | None = None
        expanded = os.path.expanduser(text)
        if is_absolute(expanded):
            if _exists(Path(expanded)):
                place = Path(os.path.normpath(expanded))
                self._check_not_above(entry, place)
                self._trust(place if place.is_dir() else place.parent)
                return place
        else:
            for start in (root, here):
                place = Path(os.path.normpath(start / text))
                if _exists(place):
                    if self._allow_outside or is_below(place, start):
                        self._check_not_above(entry, place)
                        return place
                    outside = outside or place
        for skipped in range(len(steps)):
            for start in (root, here):
                place = start.joinpath(*steps[skipped:])
                if _exists(place):
                    if skipped and note:
                        self._note_elsewhere(entry, place)
                    return Path(os.path.normpath(place))
        if outside is not None:
            raise UsageError(
                f"{self._description.file}: {short_repr(entry)} leads out of the folder of the data ({root}) to "
                f"{outside}; write an absolute path if that is meant, or allow it with --allow-outside"
            )
        return None

    def _trust(self, folder: Path) -> None:
        """Take a folder for one of the data, unless it is one that holds everything else."""
        if folder not in self.folders and folder != Path(folder.anchor):
            self.folders.append(folder)

    def _check_not_above(self, entry: str, place: Path) -> None:
        above = is_below(self._description.folder, place) and not is_below(place, self._description.folder)
        if place == Path(place.anchor) or (above and not self._allow_outside):
            raise UsageError(
                f"{self._description.file}: {short_repr(entry)} is a folder above the one of this file; name the "
                "folder of the images"
            )

    def _note_elsewhere(self, entry: str, place: Path) -> None:
        self._log.note(
            self._description.file,
            f"names {short_repr(entry)}, which is not there; {place} is used",
            FOUND_ELSEWHERE,
            cause=f"{self._description.file}: {entry}",
        )

    def _list(self, folder: Path) -> list[Path]:
        files = list_files(folder, LABEL_ENDING)
        note_passed_over(FolderFiles(passed_over=files.passed_over, special=files.special), self._log)
        return files.images

    def _read_list(self, file: Path) -> list[Path]:
        """The images on the lines of a list file."""
        self.lists.append(file)
        try:
            # File names are bytes; those that are no UTF-8 are carried through.
            lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        except OSError as error:
            raise RefineDetError(f"{file}: cannot be read ({error.strerror})") from None
        here, root = self._description.folder, self._description.root
        folders = [folder for folder in dict.fromkeys([file.parent, root, here]) if folder.is_dir()]
        finder = ImageFinder(file, folders, here, self._log, allow_outside=self._allow_outside)
        quote = any(is_really_below(file, folder) for folder in self.folders)
        images = []
        for number, line in enumerate(lines, start=1):
            name = line.strip()
            if not name:
                continue
            try:
                images.append(Path(os.path.normpath(finder.find(name))))
            except FaultyFileError as error:
                reason = f"names {short_repr(name)[1:-1]}, which does not exist"
                reason = reason if isinstance(error, MissingImageError) else error.reason
                reason = f"line {number} {reason}" if quote else f"line {number} names no image of the data"
                self._log.fatal(FaultyFileError(file, reason), cause=f"{file}: line")
        return images


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # A name that no file can have.
        return False
