"""The one progress bar: a line that fits the terminal, and nothing at all where there is none.

``training ━━━━━━━━ 420/11200  loss 7.83  22 img/s  mAP 62.8  left 1:31:20``

On a narrow terminal the numbers in the middle go first, from the right, then the bar and the title; the count and the
time never do.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_NARROWEST_BAR, _WIDEST_BAR = 8, 30


@dataclass
class _Work:
    """Something that is being done."""

    title: str
    done: int
    total: int | None
    start: int = 0
    began: float = field(default_factory=time.monotonic)

    def seconds_left(self, seconds: float | None) -> float | None:
        """At the speed so far; None if nothing is done yet."""
        seconds = time.monotonic() - self.began if seconds is None else seconds
        worked = self.done - self.start
        if self.total is None or worked <= 0:
            return None
        return seconds / worked * max(0, self.total - self.done)


class ProgressBar:
    """Shows how far some work is; a context manager and a function of (done, total).

    Args:
        title: What is done, one word.
        total: How much there is to do; None as long as it is not known.
        done: How much of it was done before, for a resumed run.
        stream: Where to show it; standard error by default. A stream that is no terminal shows nothing.
        keep: Whether the last state stays on the screen.

    Example:
        >>> with ProgressBar("evaluating") as bar:
        ...     bar(40, 250)
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        keep: bool = False,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._work = _Work(title, done, total, start=done)
        self._aside: _Work | None = None
        self._parts: dict[str, str] = {}
        self._keep = keep
        self._live: Any = None

    def __enter__(self) -> ProgressBar:
        if is_terminal(self._stream):
            # Rich is imported here because it costs a quarter of the time in which --help must answer.
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                self,
                console=Console(file=self._stream),
                transient=not self._keep,
                # What is printed meanwhile is lifted over the bar, unless it goes to a file.
                redirect_stdout=is_terminal(sys.stdout),
                redirect_stderr=self._stream is sys.stderr,
                vertical_overflow="crop",
            )
            self._safely(self._live.start)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int | None = None, parts: Mapping[str, str] | None = None) -> None:
        """Move the bar.

        Args:
            done: How much is done.
            total: How much there is to do, where that was not known before.
            parts: What to show between count and time, by a name that tells which earlier part is replaced.
        """
        self._aside = None
        self._work.done = done
        if total is not None:
            self._work.total = total
        if parts:
            self._parts.update(parts)

    def aside(self, title: str, done: int, total: int) -> None:
        """Show another piece of work in between, until the bar is moved again."""
        if self._aside is None or self._aside.title != title:
            self._aside = _Work(title, 0, total)
        self._aside.done, self._aside.total = done, total

    def close(self) -> None:
        """Take the bar off the screen; calling it twice is harmless."""
        live, self._live = self._live, None
        if live is not None:
            self._safely(live.stop)

    def line(self, width: int, *, seconds: float | None = None, ascii_only: bool = False) -> tuple[str, str, str]:
        """The line in three pieces: up to the done part of the bar, the part still to do, and what follows.

        Args:
            width: Columns of the terminal.
            seconds: Time since the work began; measured if not given.
            ascii_only: Whether the terminal cannot show line characters.
        """
        work = self._aside or self._work
        count = f"{work.done}/{work.total}" if work.total is not None else str(work.done)
        left = f"  left {duration(work.seconds_left(seconds))}" if work.total is not None else ""
        texts = [f"  {text}" for text in self._parts.values() if text]
        fixed = len(work.title) + 2 + len(count) + len(left)
        while texts and fixed + _NARROWEST_BAR + sum(map(len, texts)) > width:
            texts.pop()
        size = min(_WIDEST_BAR, width - fixed - sum(map(len, texts)))
        after = count + "".join(texts) + left
        if size < _NARROWEST_BAR:
            title = f"{work.title} "
            return (title if len(title) + len(after) <= width else ""), "", after
        filled = round(size * min(1.0, work.done / work.total)) if work.total else 0
        full, empty = ("#", "-") if ascii_only else ("━", "━")
        return f"{work.title} {full * filled}", empty * (size - filled), f" {after}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        before, empty, after = self.line(options.max_width, ascii_only=options.ascii_only)
        title = before.rstrip("━#")
        yield Text.assemble(
            title, (before[len(title) :], "green"), (empty, "bright_black"), after, no_wrap=True, overflow="crop"
        )

    def _safely(self, act: Any) -> None:
        """A terminal that went away is not the end of the work."""
        try:
            act()
        except (OSError, ValueError):
            self._live = None


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is there, is open, and shows what is written to it on a terminal."""
    with contextlib.suppress(ValueError, AttributeError):
        return stream is not None and stream.isatty()
    return False


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; "-:--:--" if not known."""
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
