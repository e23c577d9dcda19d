"""What goes wrong because of a file or a call, not because of a bug.

The command line prints these as one line and exits with their ``exit_code``; everything else is a bug and keeps its
traceback. Both derive from ``ValueError``, so library users need not know them.
"""

from __future__ import annotations


class RefineDetError(ValueError):
    """The work failed: a bad file, a full disk, a loss that is no number. The message names the file and the fix."""

    exit_code = 1


class UsageError(RefineDetError):
    """The call was wrong: an unknown preset, a missing folder, options that exclude each other."""

    exit_code = 2
