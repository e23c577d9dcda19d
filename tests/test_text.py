"""Names from outside, where they are shown."""

from __future__ import annotations

import os

import pytest

from refinedet.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat", "cat"),
        ("Straßenschild", "Straßenschild"),
        ("猫 🐈", "猫 🐈"),
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("gnp.\u202egpj", r"gnp.\u202egpj"),
        ("a\u2028b", r"a\u2028b"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\udce9.jpg"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()
