"""Names from outside, where they are shown."""

from __future__ import annotations

import os

import pytest

from refinedet.text import clock, printable


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


def test_clock() -> None:
    assert [clock(0), clock(59.9996), clock(3725.25)] == ["0:00:00.000", "0:01:00.000", "1:02:05.250"]
