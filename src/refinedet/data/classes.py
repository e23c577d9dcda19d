"""Names of classes: those of PASCAL VOC and COCO, and which names of two lists mean the same class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 classes of PASCAL VOC in label order, which is the alphabet's."""

COCO_CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
"""The 80 classes of COCO detection in the order of their category ids."""

SYNONYMS = (
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("tvmonitor", "tv"),
    ("sofa", "couch"),
)
"""VOC's and COCO's words for the same things, where they differ by more than spaces ("dining table")."""
_MEANING = {word: first for first, *others in SYNONYMS for word in (first, *others)}


def _letters(name: str) -> str:
    """The name without what spellings differ in: case, spaces, underscores and hyphens."""
    return "".join(letter for letter in name.casefold() if letter not in " _-")


def match_classes(names: Sequence[str], start_names: Sequence[str]) -> tuple[int | None, ...]:
    """For each of ``names`` the index of the same class in ``start_names``, or None.

    Equal names come first; then case, spaces, underscores and hyphens are ignored, and VOC's and COCO's words for the
    same things are equal.
    """
    exact = {name: label for label, name in reversed(list(enumerate(start_names)))}
    spelling = {_letters(name): label for label, name in reversed(list(enumerate(start_names)))}
    meaning = {_MEANING.get(word, word): label for word, label in reversed(list(spelling.items()))}
    matched = []
    for name in names:
        word = _letters(name)
        label = exact.get(name)
        for table, key in ((spelling, word), (meaning, _MEANING.get(word, word))):
            label = table.get(key) if label is None else label
        matched.append(label)
    return tuple(matched)


_LONGEST_NAME = 200
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, lone surrogates and line breaks, which no table or file can hold."""


def fault_of_name(name: str) -> str | None:
    """Why a text cannot be the name of a class, in words that follow "its name"; None if it can."""
    if not name.strip():
        return "is empty"
    if len(name) > _LONGEST_NAME:
        return f"has {len(name)} letters; at most {_LONGEST_NAME} are possible"
    if any(unicodedata.category(letter) in _NO_TEXT for letter in name):
        return "has a line break or another control character"
    return None


_COCO_UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""Numbers between 1 and 90 that stand for no class of COCO's detection task."""
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _COCO_UNUSED_IDS)
"""COCO's own category id of each of ``COCO_CLASSES``."""


def coco_category_ids(names: Sequence[str]) -> tuple[int, ...] | None:
    """COCO's own category ids of some classes; None unless all of them are classes of COCO."""
    matches = match_classes(names, COCO_CLASSES)
    ids = tuple(COCO_CATEGORY_IDS[match] for match in matches if match is not None)
    return ids if len(set(ids)) == len(names) else None
