"""Seeded damage to bytes, JSON documents, text and command-line values."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    -0.0,
    1e-30,
    1e30,
    1e308,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "0",
    "1.0",
    "-1",
    "nan",
    "1e400",
    "true",
    "a\nb",
    "a\x1b[31mb",
    "\x00",
    "\ud800",
    "ключ 鍵",
    "../../../../etc/passwd",
    "/dev/zero",
    "~nosuchuser/x",
    "x" * 300,
    "y/" * 3000,
    "z" * 100_000,
    [],
    {},
    [[]],
    [None],
    [1, 2, 3],
    [0, 0, 0, 0],
    [-5, -5, 1e9, 1e9],
    [1e308, 1e308, 1e308, 1e308],
    ["1", "2", "3", "4"],
    {"a": {"b": []}},
)
"""Values that a document may hold in the place of the right one."""

BYTES = (b"\x00", b"\n", b"<", b"&lol;", b"1e999", b"-", b"{", b"]", b"\xef\xbb\xbf", b"\xff\xfe", b"99999999999")
"""Stretches that are inserted into files."""

ARGUMENTS: tuple[str, ...] = (
    "",
    " ",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "64",
    "0.5",
    "1e-3",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "1e400",
    "18446744073709551616",
    "9" * 500,
    "0x10",
    "1_000",
    "None",
    "none",
    "true",
    "[]",
    "{}",
    "a,b",
    ",",
    "a,a",
    "é",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "/dev/null/x",
    "/proc/self/mem",
    "~nosuchuser",
    "x" * 300,
    "x/" * 3000,
    "cuda",
    "cuda:99",
    "meta",
    "xla",
    "mps",
    "--help",
    "-",
    "--",
)
"""Values for flags."""


def mutate_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """One to three of: flipped bits, a cut, a repeated or removed stretch, zeros, random bytes, inserted words."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = len(content)
        if size == 0:
            return bytes(content)
        at = int(rng.integers(size))
        if rng.random() < 0.5:
            at = min(at, int(rng.integers(min(size, 200))))  # headers are short and decide most
        length = int(rng.integers(1, 65))
        kind = int(rng.integers(8))
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = content[at : at + length]
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at : at + length] = bytes(min(length, size - at))
        elif kind == 5:
            content[at : at + length] = rng.integers(0, 256, min(length, size - at), dtype=np.uint8).tobytes()
        elif kind == 6:
            content[at : at + 4] = b"\xff\xff\xff\xff"
        else:
            words = (
                b"\x00",
                b"\n",
                b"<",
                b"&lol;",
                b"1e999",
                b"-",
                b"{",
                b"]",
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"99999999999",
            )
            content[at:at] = words[int(rng.integers(len(words)))]
    return bytes(content)


def mutate_json(rng: np.random.Generator, document: Any) -> bytes:
    """The document as JSON after one to three changes of its structure."""
    changed = copy.deepcopy(document)
    for _ in range(int(rng.integers(1, 4))):
        changed = change(rng, changed)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    places = [path]
    if isinstance(node, dict):
        for key, value in node.items():
            places += _places(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node[:6]):
            places += _places(value, (*path, index))
    return places


def change(rng: np.random.Generator, document: Any) -> Any:
    """The nested lists and dicts after one change: a value that is gone, renamed, doubled, scaled or replaced."""
    places = _places(document)
    path = places[int(rng.integers(len(places)))]
    value = VALUES[int(rng.integers(len(VALUES)))]
    if not path:
        return value if rng.random() < 0.1 else document
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], int(rng.integers(6))
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif kind == 3 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = parent[key] * float(rng.choice([-1, 0, 0.001, 1000, 1e12]))
    else:
        parent[key] = value
    return document


def mutate_words(rng: np.random.Generator, text: str, words: Sequence[str]) -> str:
    """The text after one to three of its lines or words were replaced, removed or repeated."""
    lines = text.splitlines(keepends=True)
    for _ in range(int(rng.integers(1, 4))):
        if not lines:
            break
        at = int(rng.integers(len(lines)))
        kind = int(rng.integers(4))
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[at])
        else:
            parts = lines[at].replace(">", "> ").replace("<", " <").split(" ")
            parts[int(rng.integers(len(parts)))] = words[int(rng.integers(len(words)))]
            lines[at] = " ".join(parts)
    return "".join(lines)
