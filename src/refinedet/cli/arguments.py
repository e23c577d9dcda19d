"""Arguments to the call of a typed function, by tyro; a wrong argument is one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro import _errors as tyro_errors

from refinedet.errors import UsageError, did_you_mean

OTHER_PROGRAMS = {
    "--batch": "--batch-size",
    "--conf": "--threshold",
    "--img": "--model.image-size HEIGHT WIDTH",
    "--img-size": "--model.image-size HEIGHT WIDTH",
    "--imgsz": "--model.image-size HEIGHT WIDTH",
    "--lr": "--learning-rate",
    "--lr0": "--learning-rate",
    "--model": "the first argument, without a flag",
    "--name": "--out FOLDER",
    "--project": "--out FOLDER",
    "--source": "IMAGES after WEIGHTS, without a flag",
    "--weights": "WEIGHTS as the first argument, without a flag (of train: --init WEIGHTS)",
}
"""Flags of the programs of other detectors, and what they are here; a verb's own flags go before."""
_NOISE = re.compile(r"\(default: (None|False|)\)")
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}


def parse(function: Callable[..., int], program: str, arguments: Sequence[str]) -> int:
    """Call a function with what the arguments say.

    Args:
        function: Its annotations give the flags, its docstring the help.
        program: What stands in the help before the arguments.
        arguments: What the user wrote after it.

    Returns:
        What the function returns; 0 after ``--help``.

    Raises:
        UsageError: the arguments do not fit; the message names the one that does not.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        flags = re.findall(r"--[a-z][a-z0-9.-]*", _help(function, program))
        raise UsageError(f"{_foreign(arguments, flags) or _explanation(event, flags)}; see {program} --help")

    with tyro_errors.on_parse_error(refuse):
        if not any(argument in ("-h", "--help") for argument in arguments):
            return int(tyro.cli(function, prog=program, args=arguments))
        print(_help(function, program), end="")
        return 0


def _help(function: Callable[..., int], program: str) -> str:
    """The help as tyro writes it, without defaults that say nothing and with its introduction wrapped."""
    capture = io.StringIO()
    with contextlib.redirect_stdout(capture), contextlib.suppress(SystemExit):
        tyro.cli(function, prog=program, args=["--help"])
    text = _NOISE.sub(lambda noise: " " * len(noise[0]), capture.getvalue())
    introduction, frame, options = text.partition("╭")
    width = shutil.get_terminal_size().columns
    lines = [textwrap.fill(line, width, break_on_hyphens=False) for line in introduction.splitlines()]
    return "\n".join(lines) + "\n" + frame + options


def _foreign(arguments: Sequence[str], flags: Sequence[str]) -> str | None:
    """What to write instead of the first flag of another program, if there is one."""
    for name in (argument.split("=")[0] for argument in arguments):
        if name in OTHER_PROGRAMS and name not in flags:
            return f"unknown option '{name}': here it is {OTHER_PROGRAMS[name]}"
    return None


def _explanation(event: tyro_errors.ParseErrorEvent, flags: Sequence[str]) -> str:
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return _unknown(event.tokens, flags)
    if isinstance(event, tyro_errors.MissingArgs):
        if event.unrecognized_tokens:
            return _unknown(event.unrecognized_tokens, flags)
        return f"missing: {', '.join(_name(missing.arg) for missing in event.missing_arguments)}"
    if isinstance(event, tyro_errors.InvalidChoice):
        choices = ", ".join(f"'{choice}'" for choice in event.choices)
        return f"{_name(event.argument)} must be one of {choices}, not '{_short(event.value)}'"
    if isinstance(event, tyro_errors.BadValue):
        return f"{_name(event.argument)} needs a value: {_name(event.argument)} {event.argument.lowered.metavar or ''}"
    if isinstance(event, tyro_errors.InstantiationFailure):
        given = re.search(r"'([^'\n]*)'?\s*$", event.message)
        if event.argument is None or given is None:
            return _short(event.message.splitlines()[0])
        kinds = (event.argument.lowered.metavar or "").split("|")
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in reversed(kinds))
        return f"{_name(event.argument)} must be {wanted}, not '{_short(given[1])}'"
    return "the arguments were not understood"


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "..."


def _name(argument: Any) -> str:
    """A flag, or what stands in the help for an argument without one."""
    flags = [flag for flag in argument.lowered.name_or_flags if flag.startswith("-")]
    return str(flags[-1] if flags else (argument.lowered.metavar or argument.display_name()))


def _unknown(tokens: Sequence[str], flags: Sequence[str]) -> str:
    option = next((token for token in tokens if token.startswith("-")), None)
    if option is None:
        return f"unexpected argument '{_short(tokens[0])}'"
    name = _short(option.split("=")[0])
    hint = did_you_mean(name, flags)
    return f"unknown option '{name}'" + ("" if hint.startswith("known") else f": {hint}")
