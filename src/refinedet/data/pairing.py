"""Which image belongs to which label file, in one place for all layouts that keep a label file for each image.

``list_files`` lists a folder, ``match_files`` pairs what it found, ``note_passed_over`` names what it cannot use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refinedet.data.problems import DRAWN_IMAGE, NOT_A_FILE, ProblemKind, ProblemLog
from refinedet.files import has_signature
from refinedet.images import IMAGE_EXTENSIONS, is_image_name

UNREADABLE_EXTENSIONS = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".psd", ".svg"}
) - IMAGE_EXTENSIONS  # fmt: skip
"""Images that cannot be read here; they are counted and named."""
_WORDS = frozenset(
    {"images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "frames", "data", "labels", "label",
     "annotations", "annotation", "annots", "annot", "xml", "xmls", "txt", "lbl"}
)  # fmt: skip
"""Folders that keep images and labels apart, in lower case: without them the paths of a pair are equal."""
SPLIT_FOLDERS = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "trainval", "default"}
)
"""Folders that are called after a split, in lower case."""
_DEPTH = 12
"""Levels of folders that are searched."""
_DRAWN = "drawn by refinedet"
"""What the signatures of all images that this package draws have in common."""
_VIRTUAL = ("/proc", "/sys")
"""Folders that the system makes up, which hold no data and have no end."""


@dataclass(frozen=True)
class FolderFiles:
    """What lies in a folder and its subfolders, each sorted by path."""

    images: list[Path] = field(default_factory=list)
    """Regular files with the name of an image."""
    labels: list[Path] = field(default_factory=list)
    """Regular files with the ending of a label file."""
    passed_over: list[Path] = field(default_factory=list)
    """Images that cannot be read here, by their ending."""
    special: list[Path] = field(default_factory=list)
    """Names of images or labels that are pipes, devices, or links that lead nowhere."""

    def add(self, other: FolderFiles) -> None:
        """Take over the files of another folder."""
        for own, more in (
            (self.images, other.images),
            (self.labels, other.labels),
            (self.passed_over, other.passed_over),
            (self.special, other.special),
        ):
            known = set(own)
            own.extend(file for file in more if file not in known)


def list_files(folder: Path, label_ending: str, *, skip: Callable[[Path], bool] | None = None) -> FolderFiles:
    """List images and label files of a folder and its subfolders.

    Hidden files and folders are not looked at. Links to folders are followed, but not to those that contain ``folder``,
    such as the root of the file system; each folder is listed once, so that links in a circle end.

    Args:
        folder: where to look; one that does not exist is empty.
        label_ending: such as ".xml", matched in upper and lower case.
        skip: asked for each subfolder; those for which it returns True are not looked at.
    """
    files = FolderFiles()
    seen: set[tuple[int, int]] = set()
    real = os.path.realpath(folder)

    def walk(place: Path, depth: int) -> None:
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            return
        folders = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = place / entry.name
            if _is_folder(entry):
                folders.append((entry.is_symlink(), path))
            else:
                _file_away(files, entry, path, label_ending)
        if depth < _DEPTH:
            # Folders before links to them, so that a file is known by the path at which it really lies.
            for is_link, path in sorted(folders):
                followed = not is_link or _may_follow(os.path.realpath(path), real)
                if followed and (skip is None or not skip(path)):
                    walk(path, depth + 1)

    if not _is_virtual(real):
        walk(folder, 0)
    for found in (files.images, files.labels, files.passed_over, files.special):
        found.sort()
    return files


def _may_follow(target: str, listed: str) -> bool:
    """Whether a link to a folder is followed in a listing; both are real paths."""
    return os.path.commonpath([listed, target]) != target and not _is_virtual(target)


def _is_virtual(path: str) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in _VIRTUAL)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _file_away(files: FolderFiles, entry: os.DirEntry[str], path: Path, label_ending: str) -> None:
    ending = os.path.splitext(entry.name)[1].lower()
    if is_image_name(entry.name):
        kind = files.images
    elif ending == label_ending:
        kind = files.labels
    elif ending in UNREADABLE_EXTENSIONS:
        kind = files.passed_over
    else:
        return
    try:
        regular = entry.is_file()
    except OSError:  # a link that leads to itself
        regular = False
    (kind if regular else files.special).append(path)


@dataclass(frozen=True)
class Matches:
    """Pairs of label files and images."""

    images_of: dict[Path, list[Path]]
    """For each label file that has an image: its images, more than one where several share its name."""
    lone_images: list[Path]
    """Images without a label file, in the order given."""
    lone_labels: list[Path]
    """Label files without an image, in the order given."""

    def label_of(self) -> dict[Path, Path]:
        """The label file of each image that has one."""
        return {image: label for label, images in self.images_of.items() for image in images}


def match_files(images: Sequence[Path], labels: Sequence[Path]) -> Matches:
    """Pair images with label files.

    A pair has the same path once the endings and folders such as "images" and "labels" are taken away, so both of
    ``images/train/a.jpg`` with ``labels/train/a.txt`` and ``train/a.jpg`` with ``train/a.xml`` are pairs. Where two
    label files fit, the one that does not lie beside the image counts. What is then left on both sides is paired where
    it is plain what is meant, that is, where a single image and a single label file fit each other: names that differ
    in case, labels that keep the image's ending (``a.jpg.txt``), images with two endings (``a.webp.jpg``), and last,
    the same name anywhere, as long as the two do not lie in different splits.
    """
    images_of: dict[Path, list[Path]] = {}
    at: dict[tuple[str, str], Path] = {}
    beside = {(image.parent, image.stem) for image in images}
    for label in sorted(labels, key=lambda file: (file.parent, file.stem) in beside):
        at.setdefault((_place(label.parent), label.stem), label)
    for image in images:
        label_found = at.get((_place(image.parent), image.stem))
        if label_found is not None:
            images_of.setdefault(label_found, []).append(image)
    paired = {image for pair in images_of.values() for image in pair}
    lone_images = [image for image in images if image not in paired]
    lone_labels = [label for label in labels if label not in images_of]
    for image_keys, label_keys in ((_near_names, _near_name), (_stem_anywhere, _label_anywhere)):
        for image, label in _plain_pairs(lone_images, lone_labels, image_keys, label_keys):
            images_of[label] = [image]
            paired.add(image)
        lone_images = [image for image in lone_images if image not in paired]
        lone_labels = [label for label in lone_labels if label not in images_of]
    return Matches(images_of, lone_images, lone_labels)


def _plain_pairs(
    images: Iterable[Path],
    labels: Iterable[Path],
    image_keys: Callable[[Path], Iterable[str]],
    label_key: Callable[[Path], str],
) -> list[tuple[Path, Path]]:
    """Pairs with a common key, where neither fits another one."""
    labels_at: dict[str, list[Path]] = {}
    for label in labels:
        labels_at.setdefault(label_key(label), []).append(label)
    candidates: dict[Path, list[Path]] = {}
    fits: list[tuple[Path, list[Path]]] = []
    for image in images if labels_at else ():
        fitting = list(dict.fromkeys(label for key in image_keys(image) for label in labels_at.get(key, ())))
        fits.append((image, fitting))
        for label in fitting:
            candidates.setdefault(label, []).append(image)
    return [
        (image, fitting[0])
        for image, fitting in fits
        if len(fitting) == 1 and len(candidates[fitting[0]]) == 1 and _same_split(image, fitting[0])
    ]


def _place(folder: Path) -> str:
    """The folder without the parts that keep images and labels apart."""
    return "/".join(part for part in folder.parts if part.lower() not in _WORDS)


def place_below(root: Path, file: Path) -> str:
    """Path below ``root`` without ending and without the folders that keep images and labels apart."""
    folder = _place(file.parent.relative_to(root))
    return f"{folder}/{file.stem}" if folder else file.stem


def _near_names(image: Path) -> list[str]:
    """Keys of an image whose label is called almost as it is."""
    place = _place(image.parent)
    stem = image.stem.lower()
    names = [stem, image.name.lower()]
    if is_image_name(image.stem):
        names.append(Path(stem).stem)
    return [f"{place}/{name}" for name in names]


def _near_name(label: Path) -> str:
    return f"{_place(label.parent)}/{label.stem.lower()}"


def _stem_anywhere(image: Path) -> list[str]:
    return [image.stem]


def _label_anywhere(label: Path) -> str:
    return label.stem


def split_folder(parts: Iterable[str]) -> str | None:
    """The first part of a path that is called after a split, as it is written; None if there is none."""
    return next((part for part in parts if part.lower() in SPLIT_FOLDERS), None)


def _same_split(image: Path, label: Path) -> bool:
    """False if the two lie in folders that are called after different splits."""
    first, second = (split_folder(reversed(file.parent.parts)) for file in (image, label))
    return first is None or second is None or first.lower() == second.lower()


def without_drawn(images: Iterable[Path], labelled: Container[Path], log: ProblemLog | None = None) -> list[Path]:
    """Images without those that this package has drawn, such as the ones of a report in the folder of the data.

    Args:
        images: all images of a folder.
        labelled: those with a label file, which stay, whoever made them.
        log: receives a note for each image that is passed over.
    """
    kept = []
    for image in images:
        if image in labelled or not has_signature(image, _DRAWN):
            kept.append(image)
        elif log is not None:
            log.note(image, "was drawn by refinedet, so it is a result and no data; passed over", DRAWN_IMAGE)
    return kept


def note_passed_over(
    files: FolderFiles, log: ProblemLog, is_asked_for: Callable[[Path], bool] = lambda _: True
) -> None:
    """Note the images that cannot be read here and what only looks like a file, as far as they are asked for."""
    for file in filter(is_asked_for, files.passed_over):
        ending = file.suffix.lower()
        kind = ProblemKind(
            f"image with the ending {ending} passed over", f"images with the ending {ending} passed over", "image"
        )
        log.note(file, f"images with the ending {ending} cannot be read; passed over, convert it to .jpg or .png", kind)
    for file in filter(is_asked_for, files.special):
        log.note(file, "is a pipe, a device or a broken link, not a file; passed over", NOT_A_FILE)
