"""A font that has the letters of a text.

DejaVu Sans (its licence lies beside it) has Latin, Greek, Cyrillic and more. For other letters a font of the system is
looked for with ``fc-match`` (fontconfig), where there is one.
"""

from __future__ import annotations

import logging
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from PIL import ImageFont

from refinedet.errors import UsageError

BUNDLED = Path(__file__).with_name("DejaVuSans.ttf")

Font: TypeAlias = ImageFont.FreeTypeFont
_Face: TypeAlias = tuple[str, int]
"""A font file and the number of the face in it."""

_NO_CHARACTER = "\U0010fffe"
"""A code that no character has: drawn as the font's sign for a missing letter."""
_FC_MATCH_SECONDS = 10


def check_font(path: str | Path) -> Path:
    """The path of a font file that a user gave.

    Raises:
        UsageError: it is no font that can be read.
    """
    try:
        _load(str(path), 0, 12)
    except OSError as error:
        raise UsageError(f"{path}: not a font that can be read ({error.strerror or error})") from None
    return Path(path)


def pick_face(text: str, font: str | Path | None = None) -> _Face:
    """The font file, and the face in it, for a text.

    Args:
        text: what will be written.
        font: a font file to use whatever letters it has; by default DejaVu Sans, or a font of the system where that
            lacks a letter. If no font has them all a warning is logged, once for each set of letters.

    Raises:
        UsageError: ``font`` is no font that can be read.
    """
    if font is not None:
        return str(check_font(font)), 0
    missing = missing_letters(text, str(BUNDLED), 0)
    return _system_face(missing) if missing else (str(BUNDLED), 0)


def load_font(face: _Face, size: int) -> Font:
    """A face in a size in pixels."""
    return _load(*face, size)


@lru_cache(maxsize=256)
def missing_letters(text: str, path: str, index: int) -> str:
    """The different letters of a text that a face lacks, sorted."""
    font = _load(path, index, 24)
    blank = _drawn(font, _NO_CHARACTER)
    return "".join(sorted({letter for letter in text if letter.isprintable() and letter != " "
                           and _drawn(font, letter) == blank}))  # fmt: skip


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@lru_cache(maxsize=64)
def _load(path: str, index: int, size: int) -> Font:
    return ImageFont.truetype(path, size, index=index)


@lru_cache(maxsize=64)
def _system_face(letters: str) -> _Face:
    """A face of the system that has all these letters, else the bundled one."""
    wanted = "sans:charset=" + " ".join(f"{ord(letter):x}" for letter in letters[:200])
    command = ["fc-match", "--format=%{file}\n%{index}\n", wanted]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=_FC_MATCH_SECONDS, check=True)
        path, index = answer.stdout.decode("utf-8", "surrogateescape").splitlines()[:2]
        face = (path, int(index) & 0xFFFF)  # the upper half names an instance of a variable font
        if not missing_letters(letters, *face):
            return face
    except (OSError, ValueError, subprocess.SubprocessError):
        pass  # no fontconfig here, or a font that Pillow cannot read
    logging.getLogger("refinedet").warning(
        "no font of this system has the letters %s: give a font file that has them (--font FILE)", letters[:20]
    )
    return str(BUNDLED), 0
