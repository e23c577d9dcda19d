"""PASCAL VOC folders on disk: where annotations, images and split files lie, and which of them belong together.

Known are the devkit's years (Annotations/, JPEGImages/, ImageSets/Main/) and folders of one's own: XML beside the
images, XML and images in folders of any name, nested, and a folder for each split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from refinedet.data.pairing import (
    FolderFiles,
    Matches,
    list_files,
    match_files,
    place_below,
    split_folder,
    without_drawn,
)
from refinedet.data.problems import LISTED_TWICE, ProblemLog
from refinedet.data.voc_xml import is_annotation
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import is_image_name
from refinedet.text import cut

_LARGEST_LIST = 256_000_000
"""Bytes of a split file; a million names have about twenty million."""
_MOST_FOLDERS = 10_000
"""Folders that are looked through for a first annotation."""


@dataclass(frozen=True)
class VocFolder:
    """One year, or a folder of one's own."""

    root: Path
    annotations: Path
    """Where its annotations are expected."""
    images: Path
    """Where its images are expected."""
    sets: Path
    """Where its split files lie: ImageSets/Main, or ImageSets where only that is there."""
    loose: bool = False
    """True: recognised only by the XML files somewhere in it."""

    @property
    def is_year(self) -> bool:
        """Whether it is called VOC2007 or the like."""
        name = self.root.resolve().name
        return name[:3].upper() == "VOC" and name[3:].isdigit()

    @property
    def year(self) -> str:
        """The digits of VOC2007 and the like, else the folder's name."""
        name = self.root.resolve().name
        return name[3:] if self.is_year else name

    def split_files(self) -> dict[str, Path]:
        """Split name -> file that lists its images, sorted by name."""
        try:
            entries = sorted(os.scandir(self.sets), key=lambda entry: entry.name)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(f"{self.sets}: cannot be read ({error.strerror})") from None
        return {entry.name[:-4]: self.sets / entry.name for entry in entries if _is_list(entry)}


def _is_list(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.name.lower().endswith(".txt") and not entry.name.startswith(".") and entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def find_folders(path: Path) -> list[VocFolder]:
    """VOC folders at ``path``: itself, or the years in it (or in a VOCdevkit in it), sorted by name.

    Folders of one's own that are not divided by split files (``train/`` and ``test/``, each complete) are not among
    them; ``find_loose_folder`` reads their parent as one.
    """
    own = _as_folder(path)
    if own is not None:
        return [own]
    if not path.is_dir():
        return []
    folders = [folder for child in _subfolders(path) if (folder := _as_folder(child))]
    divided = any(folder.is_year or folder.sets.is_dir() for folder in folders)
    if not divided and any(split_folder([folder.root.name]) for folder in folders):
        folders = []
    if not folders and (path / "VOCdevkit").is_dir():
        return find_folders(path / "VOCdevkit")
    return folders


def find_loose_folder(path: Path) -> VocFolder | None:
    """The folder itself if there are VOC annotations anywhere in it; None if not."""
    if path.is_dir() and any(is_annotation(file) for file in _first_xml_files(path, 20)):
        return VocFolder(path, path, path, _sets(path), loose=True)
    return None


def _subfolders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as listing:
            return sorted(path / entry.name for entry in listing if entry.is_dir())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _sets(root: Path) -> Path:
    """Folder of split files."""
    usual = root / "ImageSets" / "Main"
    return usual if usual.is_dir() or not any(root.glob("ImageSets/*.txt")) else root / "ImageSets"


def _as_folder(root: Path) -> VocFolder | None:
    sets = _sets(root)
    for folder in (root / "Annotations", root / "annotations"):
        if folder.is_dir() and (sets.is_dir() or any(True for _ in _first_xml_files(folder, 1))):
            choices = [root / name for name in ("JPEGImages", "images", "Images")]
            images = next((choice for choice in choices if choice.is_dir()), choices[0])
            return VocFolder(root, folder, images, sets)
    if sets.is_dir() and (root / "JPEGImages").is_dir():
        # A test set as it comes from its server.
        return VocFolder(root, root / "Annotations", root / "JPEGImages", sets)
    return None


def _first_xml_files(folder: Path, most: int) -> Iterator[Path]:
    """Some of the XML files in a folder and its subfolders."""
    count = 0
    for parent, names_of_folders, names in islice(os.walk(folder), _MOST_FOLDERS):
        names_of_folders[:] = sorted(name for name in names_of_folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(".xml") and not name.startswith(".") and count < most:
                count += 1
                yield Path(parent) / name
        if count >= most:
            return


@dataclass
class VocContents:
    """The files of a VOC folder, each known by its key.

    A key is the path below the folder without ending and without folders such as ``Annotations`` and ``JPEGImages``:
    "000012" for Annotations/000012.xml and its image, "train/img0" for Annotations/train/img0.xml. Split files list
    keys.
    """

    folder: VocFolder
    files: FolderFiles
    matches: Matches
    annotations: dict[str, Path]
    """Annotation of each key, sorted by path."""
    second_annotations: list[Path] = field(default_factory=list)
    """Annotations whose key another one has."""

    def key(self, file: Path) -> str:
        """Key of a file of the folder."""
        return place_below(self.folder.root, file)

    @cached_property
    def images(self) -> dict[str, list[Path]]:
        """Images of each key."""
        images: dict[str, list[Path]] = {}
        for image in self.files.images:
            images.setdefault(self.key(image), []).append(image)
        return images

    @cached_property
    def images_by_name(self) -> dict[str, list[Path]]:
        """Images of each file name."""
        images: dict[str, list[Path]] = {}
        for image in self.files.images:
            images.setdefault(image.name, []).append(image)
        return images

    @cached_property
    def passed_over(self) -> frozenset[str]:
        """Keys of images that cannot be read here."""
        return frozenset(self.key(file) for file in (*self.files.passed_over, *self.files.special))

    @cached_property
    def _keys_by_stem(self) -> dict[str, list[str]]:
        keys: dict[str, list[str]] = {}
        for key in dict.fromkeys((*self.annotations, *self.images)):
            keys.setdefault(key.rsplit("/", 1)[-1], []).append(key)
        return keys

    def splits(self) -> dict[str, Path | None]:
        """Names of splits with the file that lists each; None for those that are folders."""
        files = self.folder.split_files()
        if files:
            return dict(files)
        names = {name for key in (*self.annotations, *self.images) if (name := split_folder(key.split("/")[:-1]))}
        return dict.fromkeys(sorted(names))

    def keys_of_split(self, name: str, log: ProblemLog, *, allow_outside: bool) -> list[str]:
        """Keys of a split in its order.

        Raises:
            RefineDetError: its file cannot be read, or is a link out of the folder.
        """
        file = self.splits()[name]
        if file is None:
            return [key for key in self.annotations if split_folder(key.split("/")[:-1]) == name]
        text = self._read_list(file, allow_outside=allow_outside)
        keys: dict[str, None] = {}
        for line in text.splitlines():
            key = self._key_of_entry(line)
            if not key:
                continue
            if key in keys:
                log.note(file, f"'{cut(key, 80)}' is listed twice; read once", LISTED_TWICE)
            keys[key] = None
        return list(keys)

    def _read_list(self, file: Path, *, allow_outside: bool) -> str:
        if file.is_symlink() and not allow_outside and not file.resolve().is_relative_to(self.folder.root.resolve()):
            raise RefineDetError(f"{file}: is a link to a file outside of the dataset; allow it with --allow-outside")
        try:
            with file.open("rb") as stream:
                data = stream.read(_LARGEST_LIST + 1)
            if len(data) > _LARGEST_LIST:
                raise RefineDetError(f"{file}: larger than {_LARGEST_LIST // 1_000_000} MB, which no list of images is")
            return data.decode("utf-8-sig")
        except OSError as error:
            raise RefineDetError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise RefineDetError(f"{file}: is not UTF-8 text, which a list of images must be") from None

    def _key_of_entry(self, line: str) -> str:
        """Key that a line of a split file means; empty if the line lists nothing."""
        entry = line.strip()
        if entry not in self.annotations and entry.endswith((" -1", " 0", " 1")):
            # Per-class lists carry a second column: 1 present, 0 only difficult ones, -1 absent.
            entry, _, flag = entry.rpartition(" ")
            entry = "" if flag == "-1" else entry.strip()
        if not entry or entry in self.annotations:
            return entry
        entry = entry.replace("\\", "/")
        if is_image_name(entry.rsplit("/", 1)[-1]) or entry.lower().endswith(".xml"):
            entry = entry.rsplit(".", 1)[0]
        if entry in self.annotations or entry in self.images:
            return entry
        # A path from another folder: its last part decides, if only one file is called so.
        same_stem = self._keys_by_stem.get(entry.rsplit("/", 1)[-1], [])
        return same_stem[0] if len(same_stem) == 1 and "/" in entry + same_stem[0] else entry


def list_contents(folder: VocFolder) -> VocContents:
    """List the files of a folder and pair them."""
    places = [folder.annotations, folder.images] if folder.images.is_dir() else [folder.root]
    files = FolderFiles()
    for place in places:
        files.add(list_files(place, ".xml"))
    if folder.loose:
        # XML of other kinds may lie anywhere in a folder of one's own; it is nobody's annotation.
        of_images = {image.stem for image in files.images}
        files.labels[:] = [file for file in files.labels if file.stem in of_images or is_annotation(file)]
    matches = match_files(files.images, files.labels)
    files.images[:] = without_drawn(files.images, matches.label_of())
    contents = VocContents(folder, files, matches, {})
    for file in sorted(files.labels, key=lambda label: (label not in matches.images_of, label)):
        if contents.annotations.setdefault(contents.key(file), file) != file:
            contents.second_annotations.append(file)
    contents.annotations = dict(sorted(contents.annotations.items()))
    return contents
