"""COCO files: ids with gaps, crowds, layouts, agreement with pycocotools, and every way a file can be bad."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinedet.data import list_splits, open_dataset
from refinedet.errors import RefineDetError, UsageError

FolderFactory = Callable[..., Path]


@pytest.fixture
def root(coco_folder: FolderFactory) -> Path:
    return coco_folder(images=6)


def json_of(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}.json"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def first_annotation(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["annotations"][0].update(values)


def assert_bad_annotation(root: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Strict reading raises one line that names the file; lenient reading leaves only that entry out."""
    before = sum(len(record.labels) for record in open_dataset(root, "train").records)
    edit(json_of(root), change)
    with pytest.raises(RefineDetError, match=message) as caught:
        open_dataset(root, "train")
    assert str(json_of(root)) in str(caught.value)
    assert "\n" not in str(caught.value)
    lenient = open_dataset(root, "train", strict=False)
    assert [(problem.path, problem.fatal) for problem in lenient.problems] == [(json_of(root), True)]
    assert sum(len(record.labels) for record in lenient.records) == before - 1


def test_labels_follow_the_sorted_category_ids(root: Path) -> None:
    dataset = open_dataset(root, "train")
    assert dataset.class_names == ("cat", "dog")  # the file lists them in reverse
    assert dataset.category_ids == (3, 6)
    assert [record.image_id for record in dataset.records] == [100, 102, 104]
    document = json.loads(json_of(root).read_text())
    wanted = [{3: 0, 6: 1}[entry["category_id"]] for entry in document["annotations"] if entry["image_id"] == 102]
    assert dataset[1].labels.tolist() == wanted


def test_boxes_areas_and_crowd(root: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [
            {"id": 1, "image_id": 100, "category_id": 6, "bbox": [1.5, 2, 10.25, 20], "area": 77.5, "iscrowd": 1},
            {"id": 2, "image_id": 100, "category_id": 3, "bbox": [0, 0, 96, 64]},
        ]

    edit(json_of(root), change)
    record = open_dataset(root, "train")[0]
    assert record.boxes.tolist() == [[1.5, 2, 11.75, 22], [0, 0, 96, 64]]
    assert record.areas.tolist() == [77.5, 96 * 64]
    assert record.crowd.tolist() == [True, False]
    assert record.difficult.tolist() == [False, False]
    assert record.labels.tolist() == [1, 0]


def test_given_classes_decide_the_labels(root: Path) -> None:
    dataset = open_dataset(root, "train", ["dog", "bird", "cat"])
    assert dataset.class_names == ("dog", "bird", "cat")
    assert dataset.category_ids == (6, 7, 3)  # the file has no bird: an id that it does not use
    assert dataset[0].labels.tolist() == [2]


def test_unknown_class(root: Path) -> None:
    with pytest.raises(
        RefineDetError, match=r"annotation 1000: class 'cat' is not in the list .* did you mean 'cart'"
    ) as caught:
        open_dataset(root, "train", ["dog", "cart"])
    assert str(json_of(root)) in str(caught.value)


def test_a_listed_class_without_objects_may_be_unknown(root: Path) -> None:
    edit(json_of(root), lambda document: document["categories"].append({"id": 90, "name": "toothbrush"}))
    assert not open_dataset(root, "train", ["cat", "dog"]).problems


def test_split_without_its_year(coco_folder: FolderFactory) -> None:
    root = coco_folder(splits={"train2017": [0, 1], "val2017": [2]})
    assert len(open_dataset(root, "train")) == 2
    assert len(open_dataset(root, "val2017")) == 1
    assert len(open_dataset(root, "train+val")) == len(open_dataset(root)) == 3
    json_of(root, "train2014").write_text(json_of(root, "train2017").read_text())
    with pytest.raises(UsageError, match="no split 'train'; available: train2014, train2017, val2017"):
        open_dataset(root, "train")


def test_files_of_other_tasks_are_passed_over(root: Path) -> None:
    for name in ("captions_train.json", "person_keypoints_train.json"):
        (root / "annotations" / name).write_text("{}")
    assert list_splits(root) == ("train", "val")


@pytest.mark.parametrize("place", ["images/train", "train/images", "images", "."])
def test_other_places_of_the_images(root: Path, place: str) -> None:
    files = list((root / "train").iterdir())
    (root / place).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.move(file, root / place / file.name)
    dataset = open_dataset(root, "train")
    assert dataset[0].image_path.parent == root / place
    assert dataset.load_image(0).shape == (64, 96, 3)


def test_json_with_its_images_beside_it(root: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(root / "train", flat)
    shutil.copy(json_of(root), flat / "labels.json")
    dataset = open_dataset(flat / "labels.json")
    assert len(dataset) == 3
    assert dataset[0].image_path == flat / "000000.jpg"


def test_json_by_relative_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "annotations")
    assert open_dataset("instances_train.json").load_image(0).shape == (64, 96, 3)
    monkeypatch.chdir(root)
    assert os.path.samefile(open_dataset(".", "train")[0].image_path, root / "train/000000.jpg")


def test_file_names_with_folders(root: Path) -> None:
    (root / "train/deep").mkdir()
    shutil.move(root / "train/000000.jpg", root / "train/deep/000000.jpg")
    edit(json_of(root), lambda document: document["images"][0].update(file_name="deep/000000.jpg"))
    assert open_dataset(root, "train").load_image(0).shape == (64, 96, 3)


@pytest.fixture
def roboflow(root: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "roboflow"
    for split, name in (("train", "train"), ("val", "valid")):
        shutil.copytree(root / split, folder / name)
        shutil.copy(json_of(root, split), folder / name / "_annotations.coco.json")
        edit(folder / name / "_annotations.coco.json", add_roboflow_root)
    return folder


def add_roboflow_root(document: dict[str, Any]) -> None:
    for category in document["categories"]:
        category["supercategory"] = "pets"
    document["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})


def test_roboflow(roboflow: Path) -> None:
    assert list_splits(roboflow) == ("train", "valid")
    assert len(open_dataset(roboflow, "train")) == len(open_dataset(roboflow, "val")) == 3
    dataset = open_dataset(roboflow / "train")
    assert dataset.class_names == ("cat", "dog")  # the root category is no class
    assert dataset.category_ids == (3, 6)
    assert dataset.load_image(0).shape == (64, 96, 3)


def test_ids_that_several_splits_use_get_the_name_of_their_split(roboflow: Path) -> None:
    file = roboflow / "valid/_annotations.coco.json"
    edit(file, lambda document: document["images"][0].update(id=100))
    edit(file, lambda document: document.update(annotations=[]))
    own = [record.image_id for record in open_dataset(roboflow, "valid").records]
    joined = [record.image_id for record in open_dataset(roboflow).records]
    assert own[0] == 100
    assert joined[:3] == [record.image_id for record in open_dataset(roboflow, "train").records]
    assert joined[3:] == [f"valid:{image_id}" for image_id in own]
    edit(file, lambda document: document["categories"].pop())
    with pytest.raises(UsageError, match="its categories differ"):
        open_dataset(roboflow)


def test_missing_image(root: Path) -> None:
    (root / "train/000002.jpg").unlink()
    with pytest.raises(RefineDetError, match=r"image is missing, but .* lists it") as caught:
        open_dataset(root, "train")
    assert str(root / "train/000002.jpg") in str(caught.value)
    assert str(json_of(root)) in str(caught.value)
    lenient = open_dataset(root, "train", strict=False)
    assert [record.image_id for record in lenient.records] == [100, 104]
    assert [(p.path, p.fatal) for p in lenient.problems] == [(root / "train/000002.jpg", True)]


def test_folder_of_images_missing(root: Path) -> None:
    shutil.rmtree(root / "train")
    with pytest.raises(RefineDetError, match=r"000000.jpg: image is missing"):
        open_dataset(root, "train")


@pytest.mark.parametrize("content", ["", "{", '{"images": [', "\x80\x04pickle", "[" * 100_000])
def test_invalid_json(root: Path, content: str) -> None:
    json_of(root).write_text(content)
    for strict in (True, False):
        with pytest.raises(RefineDetError, match=r"not valid JSON|nested too deeply") as caught:
            open_dataset(root, "train", strict=strict)
        assert str(caught.value).startswith(str(json_of(root)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("document", [[], {"images": []}, {"images": {}, "annotations": [], "categories": []}, 3])
def test_json_of_another_kind(root: Path, document: object) -> None:
    json_of(root).write_text(json.dumps(document))
    with pytest.raises(RefineDetError, match="not a COCO instances file: it needs a list of objects named") as caught:
        open_dataset(root, "train")
    assert str(json_of(root)) in str(caught.value)


def test_empty_split(root: Path) -> None:
    json_of(root).write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UsageError, match="has no images"):
        open_dataset(root, "train")
    with pytest.raises(UsageError, match="has no images"):
        open_dataset(root, "train", strict=False)


def test_duplicate_image_id(root: Path) -> None:
    edit(json_of(root), lambda document: document["images"][1].update(id=100))
    with pytest.raises(RefineDetError, match=r"image id 100 is listed twice \(000000.jpg and 000002.jpg\)") as caught:
        open_dataset(root, "train")
    assert str(json_of(root)) in str(caught.value)


def test_annotation_of_an_unknown_image(root: Path) -> None:
    assert_bad_annotation(root, first_annotation(image_id=5), "annotation 1000 belongs to image id 5, which the file")


def test_annotation_of_an_unknown_category(root: Path) -> None:
    assert_bad_annotation(root, first_annotation(category_id=4), "annotation 1000 has category id 4, .* known: 3, 6")


@pytest.mark.parametrize("box", [[1, 2, 3], "abc", [1, 2, 3, None], [1, 2, float("nan"), 4], [1, 2, float("inf"), 4]])
def test_box_that_is_no_box(root: Path, box: object) -> None:
    assert_bad_annotation(root, first_annotation(bbox=box), "annotation 1000: 'bbox' must be four numbers")


def test_category_twice(root: Path) -> None:
    edit(json_of(root), lambda document: document["categories"].append({"id": 9, "name": "cat"}))
    with pytest.raises(RefineDetError, match=r"category 9 .'cat'. is listed twice"):
        open_dataset(root, "train")


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([5, 5, 0, 10], "has no area; dropped"),
        ([5, 5, -3, 10], "has no area .its corners are swapped.; dropped"),
        ([100, 5, 10, 10], "lies outside the 96x64 image; dropped"),
    ],
)
def test_useless_box(root: Path, box: list[float], message: str) -> None:
    edit(json_of(root), first_annotation(bbox=box))
    dataset = open_dataset(root, "train")
    assert len(dataset[0].labels) == 0
    assert re.search(f"000000.jpg, annotation 1000 .cat.: box .* {message}", str(dataset.problems[0]))


def test_box_over_the_edge_is_clipped(root: Path) -> None:
    edit(json_of(root), first_annotation(bbox=[90, 60, 20, 20]))
    dataset = open_dataset(root, "train")
    assert dataset[0].boxes.tolist() == [[90, 60, 96, 64]]
    assert "reaches outside" in dataset.problems[0].message


def test_annotation_without_box(root: Path) -> None:
    edit(json_of(root), lambda document: document["annotations"][0].pop("bbox"))
    dataset = open_dataset(root, "train")
    assert len(dataset[0].labels) == 0
    assert "annotation 1000 has no 'bbox'; dropped" in dataset.problems[0].message


def test_image_without_size(root: Path) -> None:
    edit(json_of(root), lambda document: document["images"][0].pop("width"))
    dataset = open_dataset(root, "train")
    assert (dataset[0].width, dataset[0].height) == (96, 64)
    assert "image 100 has no size; 96x64 taken from 000000.jpg" in dataset.problems[0].message


@pytest.mark.shared_data
def test_against_pycocotools(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    file = shared_data / "coco_tiny/annotations/instances_train2017.json"
    oracle = COCO(str(file))
    dataset = open_dataset(shared_data / "coco_tiny", "train")
    assert len(dataset) == 80
    assert dataset.category_ids == tuple(sorted(oracle.getCatIds()))
    assert dataset.class_names == tuple(c["name"] for c in oracle.loadCats(dataset.category_ids))
    assert sorted(record.image_id for record in dataset.records) == sorted(oracle.getImgIds())
    for index, record in enumerate(dataset.records):
        entries = oracle.loadAnns(oracle.getAnnIds(imgIds=[record.image_id]))
        boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(record.boxes, boxes, atol=1e-3)
        assert [dataset.category_ids[label] for label in record.labels] == [e["category_id"] for e in entries]
        assert record.crowd.tolist() == [bool(entry["iscrowd"]) for entry in entries]
        np.testing.assert_allclose(record.areas, [entry["area"] for entry in entries], rtol=1e-6)
        assert dataset.load_image(index).shape == (record.height, record.width, 3)
    assert sum(int(record.crowd.sum()) for record in dataset.records) == 6
    assert not dataset.problems
