"""The command line: arguments to calls.

To add a verb, write a function with the decorator ``verb`` in ``verbs.py``: its annotations give the flags, its
docstring their help. ``flags.py`` has the annotations, ``arguments.py`` makes a call of the arguments, and
``terminal.py`` says how a command prints and fails. Everything heavy is imported inside the verbs, so that ``--help``
answers at once.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Sequence

import refinedet
from refinedet.cli import bulk, demo, training, verbs, weights
from refinedet.cli.arguments import parse
from refinedet.cli.flags import VERBS, fields_in
from refinedet.cli.terminal import run, say
from refinedet.errors import UsageError, did_you_mean
from refinedet.presets import PRESETS, get_preset

__all__ = ["VERBS", "bulk", "demo", "main", "training", "verbs", "weights"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what goes wrong ends in one line on standard error.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        say(f"refinedet {refinedet.__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        raise UsageError(f"unknown command '{name}': {did_you_mean(name, VERBS)}")
    function = VERBS[name]
    if name in training.DEFAULT_PRESETS:
        if any(argument in ("-h", "--help") for argument in rest):
            say(training.SHORT_HELP[name])
            return 0
        rest = ["--help" if argument == "--help-all" else argument for argument in rest]
        resumes = any(re.match(r"--resume(=|$)", argument) for argument in rest)
        function = training.resume_run if resumes else _with_defaults(name, rest)
    return parse(function, f"refinedet {name}", rest)


def _overview() -> str:
    return "\n".join(
        [
            "usage: refinedet COMMAND ...",
            "",
            *(f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in VERBS.items()),
            "",
            "refinedet COMMAND --help explains the flags of a command.",
            "refinedet --version tells the version.",
        ]
    )


def _with_defaults(name: str, arguments: Sequence[str]) -> Callable[..., int]:
    """The verb with the defaults of the preset that comes first, which has to be known before flags are read."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if named is None and any(b in PRESETS and not a.startswith("-") for a, b in itertools.pairwise(arguments)):
        raise UsageError(f"the preset comes first: refinedet {name} PRESET --data DATA")
    preset = get_preset(named if named is not None else training.DEFAULT_PRESETS[name])
    defaults = {"settings": preset.train, "model": preset.model}
    return functools.partial(VERBS[name], **defaults, **({"given": fields_in(arguments)} if name == "train" else {}))
