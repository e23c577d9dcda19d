"""Images and label files are paired where it is plain what is meant, and what is left is known on both sides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refinedet.data.pairing import list_files, match_files, note_passed_over
from refinedet.data.problems import ProblemLog, describe_kinds


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.jpg", "labels/train/a.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("images/train/a.jpg", "Labels/train/a.txt"),
        ("a.jpg", "a.txt"),
        ("obj_train_data/a.jpg", "obj_train_data/a.txt"),
        ("images/a.jpg", "labels/a.TXT"),
        ("images/A.JPG", "labels/a.txt"),
        ("images/a.jpg", "labels/a.jpg.txt"),
        ("images/p0.webp.jpg", "labels/p0.txt"),
        ("images/v1.2.jpg", "labels/v1.2.txt"),
        ("photos of may/a.jpg", "my labels/a.txt"),
        ("pics/a.jpg", "train/a.txt"),
    ],
)
def test_a_plain_pair(tmp_path: Path, image: str, label: str) -> None:
    touch(tmp_path, image, label)
    files = list_files(tmp_path, ".txt")
    matches = match_files(files.images, files.labels)
    assert matches.images_of == {tmp_path / label: [tmp_path / image]}
    assert matches.label_of() == {tmp_path / image: tmp_path / label}
    assert matches.lone_images == matches.lone_labels == []


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["images/img_0.jpg"], ["labels/img0.txt"]),
        (["train/images/a.jpg"], ["valid/labels/a.txt"]),  # a negative of train, and a label whose image is gone
        (["x/a.jpg", "y/a.jpg"], ["z/a.txt"]),
        (["x/a.jpg"], ["y/a.txt", "z/a.txt"]),
        (["images/a.jpg", "images/A.png"], ["labels/a.b.txt"]),
    ],
)
def test_what_is_not_plain_stays_alone(tmp_path: Path, images: list[str], labels: list[str]) -> None:
    touch(tmp_path, *images, *labels)
    files = list_files(tmp_path, ".txt")
    matches = match_files(files.images, files.labels)
    assert matches.images_of == {}
    assert matches.lone_images == sorted(tmp_path / name for name in images)
    assert matches.lone_labels == sorted(tmp_path / name for name in labels)


def test_two_images_of_one_label_file_and_two_label_files_of_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "images/g.jpg", "images/g.png", "labels/g.txt", "images/h.jpg", "images/h.txt", "labels/h.txt")
    files = list_files(tmp_path, ".txt")
    matches = match_files(files.images, files.labels)
    assert matches.images_of == {
        tmp_path / "labels/g.txt": [tmp_path / "images/g.jpg", tmp_path / "images/g.png"],
        tmp_path / "labels/h.txt": [tmp_path / "images/h.jpg"],
    }
    assert matches.lone_labels == [tmp_path / "images/h.txt"]


def test_a_listing_ends_and_names_what_it_passes_over(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.jpg", "a/b/y.XML", "a/.hidden/z.jpg", "a/c.HEIC", "a/d.heic", "a/e.cr2", "a/notes.md")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "self.xml").symlink_to(tmp_path / "a" / "self.xml")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    files = list_files(tmp_path, ".xml")
    assert files.images == [tmp_path / "a" / "x.jpg"]
    assert files.labels == [tmp_path / "a" / "b" / "y.XML"]
    assert [file.name for file in files.special] == ["gone.png", "pipe.jpg", "self.xml"]
    log = ProblemLog(strict=True)
    note_passed_over(files, log)
    assert describe_kinds(log.problems) == (
        "3 pipes, devices or broken links passed over, 2 images with the ending .heic passed over, "
        "1 image with the ending .cr2 passed over"
    )
    assert list_files(tmp_path / "nothing", ".xml").images == []


def test_many_files_are_paired_in_one_pass(tmp_path: Path) -> None:
    images = [tmp_path / "images" / f"{n}.jpg" for n in range(20_000)]
    labels = [tmp_path / "labels" / f"{n}.txt" for n in range(0, 20_000, 2)]
    matches = match_files(images, labels)
    assert len(matches.images_of) == 10_000
    assert len(matches.lone_images) == 10_000
