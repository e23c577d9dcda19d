"""Images are found by the names that other machines and tools wrote for them, and never outside of the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from refinedet.data.image_paths import ImageFinder, is_below, is_really_below, walk_files
from refinedet.data.problems import FaultyFileError, ProblemLog


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("images/a.jpg", "images/my photo.jpg", "images/100%.jpg", "x/b.jpg", "y/b.jpg", "y/z/c.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (tmp_path / "secret.jpg").touch()
    return root


def finder(root: Path, log: ProblemLog | None = None, *, allow_outside: bool = False) -> ImageFinder:
    folders = [root / "images", root]
    log = log or ProblemLog(strict=True)
    return ImageFinder(root / "list.json", folders, root, log, allow_outside=allow_outside)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.jpg", "images/a.jpg"),
        ("./a.jpg", "images/a.jpg"),
        ("images/a.jpg", "images/a.jpg"),
        ("images\\a.jpg", "images/a.jpg"),
        ("images/my%20photo.jpg", "images/my photo.jpg"),
        ("100%.jpg", "images/100%.jpg"),
        ("x/../y/b.jpg", "y/b.jpg"),
    ],
)
def test_names_as_they_stand(root: Path, name: str, place: str) -> None:
    log = ProblemLog(strict=True)
    assert finder(root, log).find(name) == root / place
    assert not log.problems


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("/home/user/data/a.jpg", "images/a.jpg"),
        ("C:\\Users\\me\\a.jpg", "images/a.jpg"),
        ("..\\..\\media\\upload\\4\\my%20photo.jpg", "images/my photo.jpg"),
        ("/elsewhere/x/b.jpg", "x/b.jpg"),
        ("https://host.example/photos/c.jpg", "y/z/c.jpg"),
    ],
)
def test_the_end_of_a_path_decides_where_it_is_the_only_one(root: Path, name: str, place: str) -> None:
    log = ProblemLog(strict=True)
    find = finder(root, log).find
    assert find(name) == root / place
    assert find(name) == root / place
    assert [problem.count for problem in log.problems] == [2]
    assert not log.problems[0].fatal


def test_several_with_the_same_end(root: Path) -> None:
    with pytest.raises(FaultyFileError, match=r"names '/elsewhere/b.jpg', which is not there, and 2 files"):
        finder(root).find("/elsewhere/b.jpg")


@pytest.mark.parametrize(
    "name", ["d.jpg", ".", "..", "/", "", "images", "a\0.jpg", "\ud800.jpg", "d" * 5000, "d/" * 9999]
)
def test_images_that_are_not_there(root: Path, name: str) -> None:
    with pytest.raises(FaultyFileError, match=r"image is missing|which is not there") as caught:
        finder(root).find(name)
    assert str(root) in str(caught.value)
    assert len(str(caught.value)) < 800
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../secret.jpg", "../../secret.jpg", "images/../../secret.jpg", "..\\secret.jpg"])
def test_outside_of_the_data(root: Path, name: str) -> None:
    with pytest.raises(FaultyFileError, match=r"lies outside the folder of the data .*--allow-outside"):
        finder(root).find(name)
    assert finder(root, allow_outside=True).find(name) == root.parent / "secret.jpg"


def test_an_absolute_path_outside_of_the_data(root: Path) -> None:
    name = str(root.parent / "secret.jpg")
    with pytest.raises(FaultyFileError, match="lies outside the folder of the data"):
        finder(root).find(name)
    assert finder(root, allow_outside=True).find(name) == root.parent / "secret.jpg"
    assert finder(root).find(str(root / "x/b.jpg")) == root / "x/b.jpg"


def test_links_in_a_circle_end(root: Path) -> None:
    (root / "x/loop").symlink_to(root)
    assert sum(len(names) for _, names in walk_files(root)) == 6
    assert finder(root).find("/elsewhere/c.jpg") == root / "y/z/c.jpg"


def test_a_search_of_a_large_folder_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinedet.data.image_paths._MOST_FILES", 3)
    assert len(list(walk_files(root))) < 5


def test_below(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2/a.txt").touch()
    (tmp_path / "data/link.txt").symlink_to(tmp_path / "data2/a.txt")
    assert is_below(tmp_path / "data/x", tmp_path / "data")
    assert is_below(tmp_path / "data", tmp_path / "data")
    assert is_below(tmp_path, "/")
    assert not is_below(tmp_path / "data2", tmp_path / "data")
    assert not is_below(tmp_path / "data/../data2", tmp_path / "data")
    assert is_below(tmp_path / "data/link.txt", tmp_path / "data")
    assert not is_really_below(tmp_path / "data/link.txt", tmp_path / "data")
