"""A font that has the letters of a text."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from pathlib import Path

import pytest

from refinedet import fonts
from refinedet.errors import UsageError


@pytest.fixture(autouse=True)
def forget() -> None:
    fonts._system_face.cache_clear()


def fc_match(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program of that name, and nothing else, on the path."""
    program = folder / "fc-match"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_latin_greek_and_cyrillic_ship() -> None:
    text = "Straße 123 % café αυτοκίνητο велосипед Łódź …"
    assert fonts.missing_letters(text, str(fonts.BUNDLED), 0) == ""
    assert fonts.pick_face(text) == (str(fonts.BUNDLED), 0)
    assert os.path.getsize(fonts.BUNDLED) < 1 << 20
    assert "Bitstream Vera" in fonts.BUNDLED.with_name("LICENSE-DejaVuSans.txt").read_text()


def test_letters_that_are_missing_are_found_out() -> None:
    assert fonts.missing_letters("a狗b犬狗 ", str(fonts.BUNDLED), 0) == "犬狗"


def test_a_font_of_the_system_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "system.ttf"
    shutil.copy(fonts.BUNDLED, copy)
    asked = tmp_path / "asked"
    fc_match(tmp_path, monkeypatch, f'echo "$@" >> "{asked}"; echo "{copy}"; echo 0')
    assert fonts._system_face("жя") == (str(copy), 0)
    assert "charset=436 44f" in asked.read_text()


@pytest.mark.parametrize(
    "script", ["exit 1", "echo", "echo /nowhere.ttf; echo 0", "echo /etc/passwd; echo x", "echo {bundled}; echo 0"]
)
def test_where_no_font_has_the_letters(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fc_match(tmp_path, monkeypatch, script.format(bundled=fonts.BUNDLED))
    with caplog.at_level(logging.WARNING, logger="refinedet"):
        for _ in range(3):
            assert fonts.pick_face("狗") == (str(fonts.BUNDLED), 0)
    assert [record.getMessage() for record in caplog.records] == [
        "no font of this system has the letters 狗: give a font file that has them (--font FILE)"
    ]


def test_without_fontconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fonts.pick_face("狗") == (str(fonts.BUNDLED), 0)


def test_a_font_of_the_user(tmp_path: Path) -> None:
    copy = tmp_path / "own.ttf"
    shutil.copy(fonts.BUNDLED, copy)
    assert fonts.pick_face("狗", copy) == (str(copy), 0)
    (tmp_path / "text.ttf").write_text("no font")
    for path in (tmp_path / "text.ttf", tmp_path / "absent.ttf", tmp_path):
        with pytest.raises(UsageError, match="not a font that can be read"):
            fonts.pick_face("a", path)
