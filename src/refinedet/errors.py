"""What goes wrong because of a file or a call, not because of a bug, and how it is said.

The command line prints these errors as one line and exits with their ``exit_code``. Both derive from ``ValueError``, so
users of the library need not know them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RefineDetError(ValueError):
    """The work failed: a bad file, a full disk, a loss that is not finite. The message names the file and the fix.

    Example:
        >>> from refinedet import RefineDet, RefineDetError
        >>> try:
        ...     RefineDet.from_pretrained("voc07-320-resnet18").predict("no-such-photo.jpg")
        ... except RefineDetError as error:
        ...     print(type(error).__name__, "for", str(error).split(":")[0])
        UsageError for no-such-photo.jpg
    """

    exit_code = 1


class UsageError(RefineDetError):
    """The call was wrong: an unknown preset, a missing folder, options that exclude each other.

    Example:
        >>> from refinedet import Detections, UsageError
        >>> try:
        ...     Detections.empty(("cat", "dog"), (640, 480)).filter(labels="dgo")
        ... except UsageError as error:
        ...     print(error)
        unknown class 'dgo': did you mean 'dog'?
    """

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6, otherwise: str | None = None) -> str:
    """A hint for a message about an unknown word: the nearest known one, or all of them.

    Args:
        word: as it was written; upper and lower case are alike.
        known: the words that would have been right.
        cutoff: how similar the nearest one must be, from 0 to 1.
        otherwise: what is returned instead of the list if no word is near.

    Example:
        >>> did_you_mean("predcit", ["train", "predict"])
        "did you mean 'predict'?"
        >>> did_you_mean("zzz", ["train", "predict"])
        'known: train, predict'
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    if near:
        return f"did you mean '{names[near[0]]}'?"
    return f"known: {', '.join(names.values())}" if otherwise is None else otherwise
