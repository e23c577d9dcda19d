"""The one way to write a file, and the rule on what may be replaced.

**What may be replaced.** ``check_output`` is asked before the work starts. It refuses a path that is an input of the
same call, and an existing file that this package did not write itself. Files are recognised by a signature such as
"detections written by refinedet", which stands

* in a JSON object: as the value of its first key, ``generator``;
* in a JSON list, which has no place for it: as a last line of white space (``LIST_MARK``), which JSON readers skip;
* in a zip file: in the comment of the archive; in a .tar.gz: in the header of the gzip stream;
* in an image: in the comment (JPEG) or in the text chunk "Software" (PNG); in a video: in the comment;
* in any other text (HTML, Markdown): in a comment within the first 200 bytes.

An empty file holds nothing and may be replaced. A pipe, a character device and "-" (standard output) are written to as
streams; block devices and sockets are refused.

**How it is written.** A new file beside the target, made exclusively, is filled, flushed and renamed, so that a full
disk or a stop leaves the previous file whole. A symbolic link is followed, and the permissions of the previous file are
kept. ``remove_stale_parts`` clears what a killed process left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from refinedet.errors import RefineDetError, UsageError

if sys.platform != "win32":
    import fcntl

STANDARD_OUTPUT = Path("-")
"""As an output path: standard output."""
LIST_MARK = " \t\t \t \t\t\n"
"""Last line of the JSON lists that this package writes."""
_NAME_BYTES = 255  # longest name of a file or folder on the common file systems
_PATH_BYTES = 4095  # longest path that Linux takes, without the zero at its end; others take less and say so
_PART_FILE = re.compile(r"\.(?P<name>.*)\.[^.]{8}\.part", re.DOTALL)
_FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "disk full, or the file is larger than allowed",
}


def user_path(text: str | Path) -> Path:
    """The path that a user means: ``~`` and ``~name`` are expanded.

    Raises:
        UsageError: no path, an empty text, an unknown user, NUL, a name above 255 bytes or a path above 4,095.
    """
    if not isinstance(text, (str, Path)):
        raise UsageError(f"a path is a text or a pathlib.Path, not {type(text).__name__}")
    if not str(text):
        raise UsageError("an empty text is not a path")
    if "\0" in str(text):
        raise UsageError(f"{str(text)[:60]!r}: a path cannot hold a NUL character")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{text}: there is no user of that name; write ./{text} for a folder of this name") from None
    try:
        longest = max((os.fsencode(part) for part in path.parts), key=len, default=b"")
    except UnicodeEncodeError:
        raise UsageError(f"{str(text)[:60]!a}: a path cannot hold half of a surrogate pair") from None
    if len(longest) > _NAME_BYTES:
        shown = os.fsdecode(longest[:40])
        raise UsageError(f"{shown}...: a name of {len(longest)} bytes; file systems take {_NAME_BYTES}")
    if (size := len(os.fsencode(path))) > _PATH_BYTES:
        raise UsageError(f"{str(path)[:40]}...: a path of {size} bytes; the system takes {_PATH_BYTES}")
    return path


def is_stream(path: Path) -> bool:
    """Whether writing to ``path`` means writing to a stream: "-", a pipe, a character device, or standard output."""
    if path == STANDARD_OUTPUT:
        return True
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode) or _is_standard_output(status)


def _is_standard_output(status: os.stat_result) -> bool:
    """Whether a file is where standard output goes: ``--json out.txt > out.txt``, and /dev/stdout."""
    try:
        return os.path.samestat(status, os.fstat(1))
    except OSError:
        return False


def has_signature(path: Path, signature: str) -> bool:
    """Whether this package wrote the file, as the module's documentation says; never raises."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 512))
            tail = stream.read()
    except (OSError, ValueError):
        return False
    mark = signature.encode()
    if head.startswith(b"["):
        return tail.endswith(LIST_MARK.encode())
    if head.startswith(b"{"):
        return re.match(rb'\{\s*"generator":\s*"' + re.escape(mark) + rb'"', head) is not None
    if head.startswith(b"PK"):
        return tail.endswith(mark)
    if head.startswith((b"\xff\xd8", b"\x89PNG", b"\x1f\x8b", b"\x1aE\xdf\xa3")) or head[4:8] == b"ftyp":
        return mark in head + tail
    return mark in head[:200]


def check_output(path: Path, *, ours: str | Callable[[Path], bool], inputs: Iterable[str | Path] = ()) -> Path:
    """Find out, before the work starts, whether a file may and can be written; nothing is changed.

    Args:
        path: The file, as ``user_path`` gives it.
        ours: The signature by which an existing file may be replaced, or a function that says so.
        inputs: Files and folders that the call reads.

    Returns:
        ``path``.

    Raises:
        UsageError: an input, a file that this package did not write, a folder, a block device or a socket.
        RefineDetError: the file cannot be written there: no permission, a read-only or full disk.
    """
    if path == STANDARD_OUTPUT:
        return path
    if _is_one_of(path, inputs):
        raise UsageError(f"{path}: is an input of this command; choose another name for the output")
    if is_stream(path):
        return path
    target = Path(os.path.realpath(path))
    try:
        status = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        _check_creatable(path, target)
        return path
    except (OSError, ValueError) as error:
        raise RefineDetError(f"{path}: cannot be written ({failure_reason(error)})") from None
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: is a folder; give the name of a file")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: is not a regular file and is never replaced; give the name of a file")
    if status.st_size and not (has_signature(target, ours) if isinstance(ours, str) else ours(target)):
        raise UsageError(f"{path}: exists and was not written by this command; choose another name or remove the file")
    if not os.access(target, os.W_OK):
        raise RefineDetError(f"{path}: cannot be written (write-protected)")
    _check_creatable(path, target)
    return path


def check_output_folder(
    folder: Path,
    names: Iterable[str] = (),
    *,
    ours: str | Callable[[Path], bool],
    inputs: Iterable[str | Path] = (),
) -> Path:
    """``check_output`` for the files ``names`` in a folder, which need not exist yet.

    Raises:
        UsageError: the folder is an input, or one of the files may not be replaced.
        RefineDetError: the folder cannot be made or written to.
    """
    if _is_one_of(folder, inputs):
        raise UsageError(f"{folder}: is an input of this command; choose another folder for the output")
    _check_creatable(folder, folder / "file", "the folder cannot be made")
    for name in names:
        if os.path.lexists(folder / name):
            check_output(folder / name, ours=ours)
    return folder


def _is_one_of(path: Path, others: Iterable[str | Path]) -> bool:
    for other in others:
        with contextlib.suppress(OSError, ValueError):  # what does not exist is no other file
            if os.path.samefile(path, other):
                return True
    return False


def _check_creatable(path: Path, target: Path, failure: str = "cannot be written") -> None:
    """Make and remove an empty file where ``target`` will be, or in the nearest folder above it that exists."""
    folder = target.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise RefineDetError(f"{path}: {failure} ({folder}: there is a file of that name)")
    try:
        Path(_make_part(folder, target.name)[0]).unlink(missing_ok=True)
    except OSError as error:
        raise RefineDetError(f"{path}: {failure} ({folder}: {failure_reason(error)})") from None


def _make_part(folder: Path, name: str) -> tuple[str, int]:
    """Path and descriptor of a new file, made exclusively and locked while its writer lives."""
    short = os.fsdecode(os.fsencode(name)[: _NAME_BYTES - 16])
    handle, path = tempfile.mkstemp(dir=folder, prefix=f".{short}.", suffix=".part")
    with contextlib.suppress(OSError):  # not every file system has locks
        _lock(handle)
    return path, handle


def _lock(handle: int) -> None:
    """Lock an open file until it is closed or its process ends; OSError if another process holds the lock."""
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents where it does not exist.

    Raises:
        RefineDetError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefineDetError(f"{folder}: the folder cannot be made ({failure_reason(error)})") from None
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file beside ``path``, flush it to the disk, and rename it into place.

    A symbolic link is followed; the permissions of an existing file are kept. If ``path`` is a stream, the finished
    content is copied to it.

    Raises:
        RefineDetError: no permission, a full disk; what ``path`` held before is still there.
    """
    part: str | None = None
    handle = -1
    stream = is_stream(path)
    try:
        target = Path(tempfile.gettempdir(), "stream") if stream else Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        part, handle = _make_part(target.parent, target.name)
        write(Path(part))
        if stream:
            with open(part, "rb") as source, open_stream(path) as sink:
                shutil.copyfileobj(source, sink)
            return
        _keep_permissions(target, part)
        with open(part, "rb+") as written:  # opened anew: ``write`` may have replaced the file
            os.fsync(written.fileno())
        os.replace(part, target)
        part = None
        flush_folder(target.parent)
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        kept = "; the previous file is untouched" if not stream and path.exists() else ""
        raise RefineDetError(f"{path}: cannot be saved ({failure_reason(error)}){kept}") from None
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
        if handle >= 0:
            os.close(handle)


def _keep_permissions(target: Path, part: str) -> None:
    try:
        before = os.stat(target)
    except OSError:
        # mkstemp makes the file private; give it the permissions that open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        return
    with contextlib.suppress(OSError, AttributeError):  # only root may give files away
        os.chown(part, before.st_uid, before.st_gid)
    os.chmod(part, stat.S_IMODE(before.st_mode))


def flush_folder(folder: Path) -> None:
    """Let what was renamed in a folder reach the disk."""
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """A stream to write to: standard output for "-", else the file, truncated; nothing is renamed.

    For pipes and devices, and for files that grow during the work, such as JSON Lines.
    """
    if path == STANDARD_OUTPUT or (path.exists() and _is_standard_output(os.stat(path))):
        sys.stdout.flush()
        # Standard output as a test or a notebook replaces it has no bytes below its text.
        buffer = getattr(sys.stdout, "buffer", None)
        with contextlib.nullcontext(buffer) if buffer is not None else open(1, "wb", closefd=False) as sink:
            yield sink
            sink.flush()
        return
    with path.open("wb") as sink:
        yield sink


def write_bytes(path: Path, data: bytes) -> None:
    """``write_atomically`` of bytes; raises what that raises."""
    write_atomically(path, lambda part: part.write_bytes(data))


def encoded(text: str) -> bytes:
    r"""UTF-8 of a text; bytes of a file name that are none become ``\udc80`` to ``\udcff``, which JSON can hold."""
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` of text, as ``encoded`` turns it into bytes; raises what that raises."""
    write_bytes(path, encoded(text))


def json_text(content: dict[str, Any] | list[Any], signature: str, *, indent: int | None = 1) -> str:
    """JSON with the signature by which ``has_signature`` recognises it.

    Raises:
        ValueError: NaN or an infinite number, which JSON does not have.
    """
    signed = {"generator": signature, **content} if isinstance(content, dict) else content
    text = json.dumps(signed, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    return text if isinstance(content, dict) else text + LIST_MARK


def remove_stale_parts(folder: Path, *, settled: float = 5.0) -> int:
    """Remove the unfinished files that killed processes left in a folder; those of living writers stay.

    A living writer holds a lock on its file; an empty one younger than ``settled`` seconds may not be locked yet.

    Returns:
        How many were removed.
    """
    removed = 0
    try:
        with os.scandir(folder) as entries:
            parts = [entry for entry in entries if _PART_FILE.fullmatch(entry.name)]
    except OSError:
        return 0
    for entry in parts:
        with contextlib.suppress(OSError):
            if not entry.is_file(follow_symlinks=False):
                continue
            handle = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                _lock(handle)
                status = os.fstat(handle)
                if status.st_size or time.time() - status.st_mtime >= settled:
                    os.unlink(entry.path)
                    removed += 1
            finally:
                os.close(handle)
    return removed


def failure_reason(error: Exception) -> str:
    """Why a file cannot be written, in a few words."""
    if isinstance(error, FileExistsError):
        return "there is a file of that name"
    if isinstance(error, OSError) and error.errno in _FULL:
        return _FULL[error.errno]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RefineDetError: the file is missing, unreadable or no JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RefineDetError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise RefineDetError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise RefineDetError(f"{path}: not valid JSON ({error}); it may be cut off: restore it") from None
