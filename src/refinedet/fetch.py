"""One image from a web address, with a limit on time and size."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from http.client import HTTPException

from refinedet.errors import RefineDetError, UsageError

MAX_BYTES = 64 * 1024 * 1024
"""Largest image file that is downloaded."""
TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""
DEADLINE = 120.0
"""Seconds that a whole download may take."""


def is_address(text: str) -> bool:
    """Whether a text is a URL of any kind rather than a path."""
    return "://" in text[:40] or text[:5].lower() == "file:"


def fetch(address: str) -> bytes:
    """The content behind an http or https address.

    Only these two schemes are opened, also after a redirection: an address can never read a local file.

    Raises:
        UsageError: another scheme.
        RefineDetError: the server cannot be reached, refuses, answers too slowly, or sends more than ``MAX_BYTES``.
    """
    shown = address if len(address) <= 200 else f"{address[:200]}..."
    scheme = address.split(":", 1)[0].lower()
    if scheme not in ("http", "https"):
        raise UsageError(f"{shown}: only http:// and https:// addresses are fetched; give a path for a local file")
    deadline = time.monotonic() + DEADLINE
    content = bytearray()
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "refinedet", "Accept": "image/*"})
        with _opener().open(request, timeout=TIMEOUT) as answer:
            while chunk := answer.read1(1 << 16):
                content += chunk
                if len(content) > MAX_BYTES:
                    limit = MAX_BYTES >> 20
                    raise RefineDetError(f"{shown}: larger than {limit} MB; download it and give the path of the file")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        raise RefineDetError(f"{shown}: cannot be fetched ({error.code} {error.reason})") from None
    except TimeoutError:
        raise RefineDetError(f"{shown}: the server is too slow; download the image and give its path") from None
    except (OSError, HTTPException, UnicodeError) as error:
        reason = getattr(error, "reason", None) or error
        raise RefineDetError(f"{shown}: cannot be fetched ({reason})") from None
    except RefineDetError:
        raise
    except ValueError as error:  # an address without a host, or with characters that no address may hold
        raise UsageError(f"{shown}: not a valid address ({error})") from None
    if not content:
        raise RefineDetError(f"{shown}: the server sent an empty answer")
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
