"""Text that comes from outside (file names, class names, messages of libraries), made harmless where it is shown."""

from __future__ import annotations

import unicodedata

_NOT_SHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control and format characters, lone surrogates and line breaks."""
_JOINERS = "\u200c\u200d"
"""Format characters that belong to words of several scripts and to emoji."""


def printable(text: str) -> str:
    r"""The same text with what a terminal, a table or a page could not show in one line as escapes.

    Line breaks, terminal escapes, characters that change the direction of writing, and the lone surrogates by which
    Python carries file names that are not UTF-8 become ``\n``, ``\x1b``, ``\u202e``, ``\udcff``. All other letters stay
    as they are, and the result can always be encoded as UTF-8.

    Example:
        >>> print(printable("a\nb\x1b[31m"))
        a\nb\x1b[31m
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _NOT_SHOWN and letter not in _JOINERS
        else letter
        for letter in text
    )


def cut(text: str, most: int) -> str:
    """The same text, or its beginning with "..." behind it where it has more than ``most`` characters.

    Example:
        >>> cut("abcdefgh", 6)
        'abc...'
    """
    return text if len(text) <= most else text[: most - 3] + "..."


def reason(error: Exception, most: int) -> str:
    r"""The message of another library's error in one line of at most ``most`` characters, or its class if it has none.

    Example:
        >>> reason(OSError("first\nsecond"), 80), reason(OSError(), 80)
        ('first second', 'OSError')
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def clock(seconds: float) -> str:
    """A time as text.

    Example:
        >>> clock(3661.5)
        '1:01:01.500'
    """
    thousandths = round(1000 * seconds)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
