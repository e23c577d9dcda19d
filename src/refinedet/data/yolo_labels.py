"""The label file of each image of a YOLO split; which images have none because they show nothing, and which lost it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from refinedet.data.image_paths import steps_below
from refinedet.data.pairing import FolderFiles, Matches, list_files, match_files, without_drawn
from refinedet.data.problems import (
    LABEL_SHARED,
    NO_ANNOTATION,
    NO_IMAGE,
    OTHER_PLACE,
    FaultyFileError,
    ProblemLog,
    shorten,
)
from refinedet.data.yolo_description import NAME_FILES, Description
from refinedet.data.yolo_images import LABEL_ENDING, SplitImages
from refinedet.data.yolo_rows import looks_like_rows
from refinedet.errors import RefineDetError

_IMAGE_WORDS = frozenset({"images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "data"})
_LABEL_WORDS = frozenset({"labels", "label", "annotations", "annotation", "annots", "txt", "lbl"})
"""Folders that hold only images or only labels, in lower case."""


class LabelFiles:
    """Pairs the images of a split with label files."""

    def __init__(self, description: Description, source: SplitImages, log: ProblemLog) -> None:
        """Prepare for the images that ``source`` has read."""
        self._description = description
        self._source = source
        self._log = log
        self._label_folders: dict[Path, list[Path]] = {}
        self._words: dict[Path, list[Path]] = {}

    def pair(self, images: Sequence[Path]) -> dict[Path, Path | None]:
        """Image -> label file, None for an image without objects. Images whose labels are lost are left out.

        An image may do without a label file, but not all images of a folder, and not where label files of other names
        lie about: that is no statement that it shows nothing.

        Raises:
            RefineDetError: no image has labels; (strict) those of one folder have none.
        """
        folders = list(dict.fromkeys(image.parent for image in images))
        files = self._list_near(folders)
        matches = match_files(_joined(files.images, images), files.labels)
        label_of = matches.label_of()
        if len({image.parent for image in images if image in label_of}) < len(folders):
            everything = self._list_everything(files)
            matches = match_files(_joined(everything.images, images), everything.labels)
            label_of = matches.label_of()
        images = without_drawn(images, label_of, self._log)
        folders = list(dict.fromkeys(image.parent for image in images))
        chosen = set(images)
        lost = self._lost_folders(folders, images, label_of)
        lost |= self._doubtful([image for image in images if image not in label_of], matches, files)
        self._note_unusual(matches, chosen)
        return {image: label_of.get(image) for image in images if image not in lost}

    def _list_near(self, folders: Iterable[Path]) -> FolderFiles:
        """Images and labels of the folders themselves, and of those in which their labels should lie."""
        images: list[Path] = []
        labels: dict[Path, None] = {}
        for folder in folders:
            own = list_files(folder, LABEL_ENDING, skip=lambda _: True)
            # Images that cannot be read still are the ones that their label files belong to.
            images += [*own.images, *own.passed_over]
            labels.update(dict.fromkeys(own.labels))
            for place in self._folders_of_labels(folder):
                # What mirrors another folder of images is that one's.
                mirrors = partial(_mirrors_subfolder, place, folder)
                labels.update(dict.fromkeys(list_files(place, LABEL_ENDING, skip=mirrors).labels))
        return FolderFiles(images=images, labels=[label for label in labels if not self._describes(label)])

    def _list_everything(self, known: FolderFiles) -> FolderFiles:
        """All images and label files of the data, for labels in a folder of any name."""
        files = FolderFiles(images=list(known.images), labels=list(known.labels))
        seen = set(known.labels)
        for folder in self._source.folders:
            if folder.is_dir():
                below = list_files(folder, LABEL_ENDING)
                labels = [label for label in below.labels if label not in seen and self._is_label(label)]
                files.add(FolderFiles(images=[*below.images, *below.passed_over], labels=labels))
        return files

    def _is_label(self, file: Path) -> bool:
        return not self._describes(file) and looks_like_rows(file)

    def _describes(self, file: Path) -> bool:
        """Whether a text file describes the data instead of an image."""
        return file.name in NAME_FILES or file in (self._description.file, *self._source.lists)

    def _folders_of_labels(self, folder: Path) -> list[Path]:
        """Folders beside that mirror a folder of images: labels/train for images/train, train/labels for train."""
        if folder not in self._label_folders:
            above = [(base, steps) for base in self._source.folders if (steps := steps_below(folder, base)) is not None]
            base, steps = max(above, key=lambda pair: len(pair[1]), default=(folder, ()))
            places = self._mirrors(base, steps)
            position = _last_word(folder)
            if not places and position is not None:
                places = self._mirrors(Path(*folder.parts[:position]), folder.parts[position:])
            self._label_folders[folder] = places
        return self._label_folders[folder]

    def _mirrors(self, base: Path, steps: Sequence[str]) -> list[Path]:
        """Folders of labels for ``base/steps``: a step for labels inserted, or put in place of the one for images."""
        places: dict[Path, None] = {}
        for position in range(len(steps), -1, -1):
            rests = [steps[position:]]
            if position < len(steps) and steps[position].lower() in _IMAGE_WORDS:
                rests.insert(0, steps[position + 1 :])
            for word in self._word_folders(base.joinpath(*steps[:position])):
                places.update(dict.fromkeys(place for rest in rests if (place := word.joinpath(*rest)).is_dir()))
        return list(places)

    def _word_folders(self, above: Path) -> list[Path]:
        """Folders that are called labels or the like, directly in a folder."""
        if above not in self._words:
            try:
                self._words[above] = sorted(entry for entry in above.iterdir() if entry.name.lower() in _LABEL_WORDS)
            except OSError:
                self._words[above] = []
        return self._words[above]

    def _lost_folders(self, folders: Sequence[Path], images: Sequence[Path], label_of: dict[Path, Path]) -> set[Path]:
        """Images of folders without any label file and without a folder in which there could be one."""
        labelled = {image.parent for image in images if image in label_of}
        bare = [folder for folder in folders if folder not in labelled and not self._folders_of_labels(folder)]
        if bare and not labelled and len(bare) == len(folders):
            expected = min(_expected(folder) for folder in bare)
            raise RefineDetError(
                f"{self._description.file}: none of its images has labels; expected them in {expected}"
            )
        # Where labels lie beside the images, a folder of images that show nothing looks like this, too.
        apart = any(label_of[image].parent != image.parent for image in images if image in label_of)
        lost: set[Path] = set()
        of_folder: dict[Path, list[Path]] = {}
        for image in images:
            of_folder.setdefault(image.parent, []).append(image)
        for folder in bare if apart else ():
            inside = of_folder[folder]
            reason = (
                f"has no labels, as there is no folder {_expected(folder)}; restore that, or make an empty one if its "
                "images show no objects"
            )
            self._log.fatal(FaultyFileError(min(inside), reason, NO_ANNOTATION), count=len(inside))
            lost.update(inside)
        return lost

    def _doubtful(self, lone_images: Sequence[Path], matches: Matches, near: FolderFiles) -> set[Path]:
        """Images without a label file that very likely have one under another name."""
        listed = set(near.labels)
        lone_labels = [label for label in matches.lone_labels if label in listed and looks_like_rows(label)]
        if not lone_labels:
            return set()
        names = {_letters(label.stem) for label in lone_labels}
        doubtful = set(lone_images)
        if len(lone_labels) < len(lone_images):
            doubtful = {image for image in lone_images if _letters(image.stem) in names}
        reason = "belongs to no image, as none has that name; rename one of them"
        self._log.note(lone_labels[0], reason, NO_IMAGE, count=len(lone_labels))
        if doubtful:
            first = next(image for image in lone_images if image in doubtful)
            reason = "has no label file, while some of other names belong to no image; left out, as one may be its own"
            self._log.note(first, reason, NO_ANNOTATION, count=len(doubtful))
        return doubtful

    def _note_unusual(self, matches: Matches, chosen: set[Path]) -> None:
        """Note labels that serve several images, and those that are called or lie otherwise than usual."""
        for label, images in matches.images_of.items():
            own = [image for image in images if image in chosen]
            if len(own) > 1:
                names = shorten([image.name for image in own], 4)
                self._log.note(
                    label, f"is the label file of {len(own)} images, and read for each: {names}", LABEL_SHARED
                )
            for image in own:
                usual = label.name == image.stem + LABEL_ENDING
                places = (image.parent, *self._folders_of_labels(image.parent))
                if not usual or label.parent not in places:
                    self._log.note(
                        label,
                        f"is read for {image}, although the label file of that would usually be "
                        f"{_expected(image.parent) / (image.stem + LABEL_ENDING)}",
                        OTHER_PLACE,
                        cause=f"labels elsewhere: {label.parent}",
                    )


def _joined(listed: Sequence[Path], images: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys([*images, *listed]))


def _mirrors_subfolder(labels: Path, images: Path, subfolder: Path) -> bool:
    """Whether a subfolder of a folder of labels has its counterpart in the folder of images."""
    return (images / subfolder.relative_to(labels)).is_dir()


def _last_word(folder: Path) -> int | None:
    """Position of the last step of a path that stands for images."""
    return next(
        (index for index in range(len(folder.parts) - 1, 0, -1) if folder.parts[index].lower() in _IMAGE_WORDS), None
    )


def _expected(folder: Path) -> Path:
    """Where the labels of a folder of images usually lie."""
    position = _last_word(folder)
    if position is None:
        return folder
    return Path(*folder.parts[:position], "labels", *folder.parts[position + 1 :])


def _letters(stem: str) -> str:
    """A name without what people write differently: case, spaces, and signs."""
    return "".join(letter for letter in stem.casefold() if letter.isalnum())
