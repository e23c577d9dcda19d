"""Images from web addresses and object stores, with limits on time and size."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from glob import has_magic
from http.client import HTTPException
from typing import Any

from refinedet.errors import RefineDetError, UsageError
from refinedet.text import reason

MAX_BYTES = 64 * 1024 * 1024
"""Largest image file that is downloaded."""
TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""
DEADLINE = 120.0
"""Seconds that a whole download may take."""
STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Schemes of object stores, which fsspec reads, and the package that each needs."""
_SHOWN = 200
_USER = re.compile(r"://([^/?#]*)@")  # up to the last @, since a password may hold one
# Parameters of presigned addresses (S3, Google, Azure), of web services, and of cameras, which have them in paths too.
_SECRET = re.compile(
    r"([?&;/_](?:[^=&#;/?]{0,40}(?:signature|passw(?:or)?d|pwd|token|secret|credential|api[_-]?key|access_?key(?:_?id)?)"
    r"|sig|auth|pass|key))=[^&#;]*",
    re.IGNORECASE,
)


def is_address(text: str) -> bool:
    """Whether a text is a URL of any kind rather than a path."""
    return "://" in text[:40] or text[:5].lower() == "file:"


def is_store(text: str) -> bool:
    """Whether a text is the address of a file or folder in an object store, such as ``s3://bucket/photos``."""
    return scheme_of(text) in STORES and "://" in text


def check_scheme(address: str) -> None:
    """Refuse addresses that ``fetch`` does not open.

    Raises:
        UsageError: another scheme, a password in the address, or the package that reads this object store is missing.
    """
    check_no_password(address)
    scheme = scheme_of(address)
    if "://" not in address or scheme not in ("http", "https", *STORES):
        raise UsageError(
            f"{_shown(address)}: only http://, https:// and the object stores {', '.join(f'{s}://' for s in STORES)} "
            "are read; give a path for a local file"
        )
    if scheme in STORES:
        _open_store(address)


def check_no_password(address: str) -> None:
    """Refuse ``user:password@`` in an address, which would be repeated in messages and results.

    Raises:
        UsageError: there is one; the message does not repeat it.
    """
    user = _USER.search(address)
    if user is not None and ":" in user[1]:
        raise UsageError(
            f"{_shown(address)}: addresses with a password are not read, since messages and results "
            "repeat addresses; download the image and give its path"
        )


def without_secrets(address: str) -> str:
    """An address or path as messages may name it: without a user's name, passwords, signatures, tokens and keys.

    Example:
        >>> without_secrets("rtsp://me:secret@door/1")
        'rtsp://***@door/1'
        >>> without_secrets("https://bucket/a.jpg?X-Amz-Expires=60&X-Amz-Signature=0f3a")
        'https://bucket/a.jpg?X-Amz-Expires=60&X-Amz-Signature=***'
    """
    return _hide_parameters(_USER.sub("://***@", address)) if is_address(address) else address


def _hide_parameters(text: str) -> str:
    return _SECRET.sub(r"\1=***", text)


def scheme_of(address: str) -> str:
    """The scheme of an address, such as "https"."""
    return address.partition("://")[0].lower()


def fetch(address: str) -> bytes:
    """The content behind an http or https address, or of a file in an object store (``STORES``).

    Only these schemes are opened, also after a redirection: an address can never read a local file.

    Raises:
        UsageError: another scheme, a password in the address, or the package that reads it is missing.
        RefineDetError: the server cannot be reached, refuses, answers too slowly, or sends more than ``MAX_BYTES``.
    """
    check_scheme(address)
    content = _read_store(address) if is_store(address) else _download(address)
    if len(content) > MAX_BYTES:
        limit = MAX_BYTES >> 20
        raise RefineDetError(f"{_shown(address)}: larger than {limit} MB; download it and give the path of the file")
    if not content:
        raise RefineDetError(f"{_shown(address)}: the server sent an empty answer")
    return content


def list_store(address: str) -> list[str]:
    """Addresses of all files below a folder of an object store, or that match a pattern there, sorted.

    Raises:
        UsageError: nothing there, or the package that reads it is missing.
        RefineDetError: the store cannot be reached or refuses.
    """
    store = _open_store(address)
    try:
        path = store._strip_protocol(address)
        files = store.glob(path) if has_magic(path) else store.find(path)
    except Exception as error:  # each store raises the errors of its own library
        raise RefineDetError(f"{_shown(address)}: cannot be searched ({reason(error, _SHOWN)})") from None
    return [f"{scheme_of(address)}://{file}" for file in sorted(files)]


def _open_store(address: str) -> Any:
    """The file system of an object store; a chain of several (``::``) is not followed, which could read local files."""
    scheme = scheme_of(address)
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError:
        raise UsageError(
            f"{_shown(address)}: reading {scheme}:// needs a package: pip install {STORES[scheme]}"
        ) from None
    except Exception as error:  # credentials that cannot be used, for instance
        raise RefineDetError(f"{_shown(address)}: cannot be opened ({reason(error, _SHOWN)})") from None


def _read_store(address: str) -> bytes:
    store = _open_store(address)
    try:
        with store.open(store._strip_protocol(address), "rb") as file:
            return bytes(file.read(MAX_BYTES + 1))
    except Exception as error:  # each store raises the errors of its own library
        raise RefineDetError(f"{_shown(address)}: cannot be read ({reason(error, _SHOWN)})") from None


def _shown(address: str) -> str:
    address = without_secrets(address)
    return address if len(address) <= _SHOWN else f"{address[:_SHOWN]}..."


def _download(address: str) -> bytes:
    shown = _shown(address)
    deadline = time.monotonic() + DEADLINE
    content = bytearray()
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "refinedet", "Accept": "image/*"})
        with _opener().open(request, timeout=TIMEOUT) as answer:
            while chunk := answer.read1(1 << 16):
                content += chunk
                if len(content) > MAX_BYTES:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        raise RefineDetError(f"{shown}: cannot be fetched ({error.code} {error.reason})") from None
    except TimeoutError:
        raise RefineDetError(f"{shown}: the server is too slow; download the image and give its path") from None
    except (OSError, HTTPException, UnicodeError) as error:
        cause = getattr(error, "reason", None) or error
        # http.client quotes the path of an address that it refuses.
        raise RefineDetError(f"{shown}: cannot be fetched ({_hide_parameters(str(cause))})") from None
    except ValueError as error:  # an address without a host, or with characters that no address may hold
        raise UsageError(f"{shown}: not a valid address ({error})") from None
    return bytes(content)


def _opener() -> urllib.request.OpenerDirector:
    """An opener without the handlers for local files, FTP and data addresses, which ``urlopen`` would bring along."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
