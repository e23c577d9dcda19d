"""COCO files as annotation tools and people really write them: each is read with the right value, or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refinedet.data import detect_layout, list_splits, open_dataset
from refinedet.errors import RefineDetError, UsageError

SIZE = (160, 120)
CATS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
BOX = [20, 20, 40, 40]
EDGES = [20, 20, 60, 60]


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (90, 120, 60)).save(path)


def image(key: object, name: str, **values: object) -> dict[str, Any]:
    return {"id": key, "file_name": name, "width": SIZE[0], "height": SIZE[1], **values}


def annotation(key: object, image_id: object, category: object = 1, **values: object) -> dict[str, Any]:
    return {"id": key, "image_id": image_id, "category_id": category, "bbox": BOX, **values}


def write_json(path: Path, images: list[Any], annotations: list[Any], categories: list[Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"images": images, "annotations": annotations, "categories": CATS if categories is None else categories}
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., Path]:
    """annotations/instances_train.json with the images a.jpg, b.jpg, ... in train/; returns the folder."""

    def make(images: list[Any], annotations: list[Any], categories: list[Any] | None = None) -> Path:
        for entry in images:
            write_image(tmp_path / "train" / entry["file_name"])
        write_json(tmp_path / "annotations/instances_train.json", images, annotations, categories)
        return tmp_path

    return make


# Where the file and its images are.


@pytest.mark.parametrize(
    ("json_name", "image_name"),
    [
        ("labels.json", "data/a.png"),  # FiftyOne
        ("result.json", "images/a.png"),  # Label Studio
        ("export of monday.json", "a.png"),
        ("ann/coco.json", "pics/deep/a.png"),
    ],
)
def test_one_file_of_any_name(tmp_path: Path, json_name: str, image_name: str) -> None:
    write_image(tmp_path / image_name)
    write_json(tmp_path / json_name, [image(1, "a.png")], [annotation(1, 1)])
    assert detect_layout(tmp_path) == "coco"
    assert list_splits(tmp_path) == ()
    dataset = open_dataset(tmp_path)
    assert dataset[0].image_path == tmp_path / image_name
    assert dataset[0].boxes.tolist() == [EDGES]


def test_files_named_by_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / f"images/{split}.png")
        write_json(tmp_path / f"{split}.json", [image(split, f"{split}.png")], [annotation(1, split)])
    assert list_splits(tmp_path) == ("train", "val")
    assert open_dataset(tmp_path, "val")[0].image_id == "val"
    assert len(open_dataset(tmp_path)) == 2
    assert list_splits(tmp_path / "val.json") == ("val",)


def test_folders_named_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_image(tmp_path / split / "data" / f"{split}.png")
        write_json(tmp_path / split / "labels.json", [image(split, f"{split}.png")], [annotation(1, split)])
    assert list_splits(tmp_path) == ("test", "train")
    assert len(open_dataset(tmp_path, "test")) == 1


def test_the_folder_of_annotations_itself(write_coco: Callable[..., Path]) -> None:
    root = write_coco([image(1, "a.jpg")], [annotation(1, 1)])
    assert open_dataset(root / "annotations", "train")[0].image_path.samefile(root / "train/a.jpg")


def test_json_beside_another_layout_does_not_count(yolo_folder: Callable[..., Path]) -> None:
    root = yolo_folder()
    write_json(root / "labels.json", [], [])
    assert detect_layout(root) == "yolo"


def test_json_of_another_kind_is_no_dataset(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "package.json").write_text('{"images": []}')
    with pytest.raises(UsageError, match="not a dataset"):
        detect_layout(tmp_path)


def test_a_folder_beside_with_the_same_names_is_not_taken(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.png")  # another dataset's
    write_image(tmp_path / "mine/images/a.png")
    write_json(tmp_path / "mine/labels.json", [image(1, "a.png")], [annotation(1, 1)])
    for opened in ("mine", "mine/labels.json"):
        assert open_dataset(tmp_path / opened)[0].image_path == tmp_path / "mine/images/a.png"


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("images/my photo.png", False),
        ("images\\my photo.png", False),
        ("images/my%20photo.png", False),
        ("..\\..\\label-studio\\media\\upload\\4\\my%20photo.png", True),
        ("/home/user/data/my photo.png", True),
        ("train2017/my photo.png", True),
    ],
)
def test_file_names_of_other_machines(tmp_path: Path, name: str, noted: bool) -> None:
    write_image(tmp_path / "images/my photo.png")
    write_json(tmp_path / "result.json", [image(0, name)], [annotation(0, 0)])
    dataset = open_dataset(tmp_path)
    assert dataset[0].image_path == tmp_path / "images/my photo.png"
    assert dataset[0].boxes.tolist() == [EDGES]
    assert [problem.fatal for problem in dataset.problems] == [False] * noted


def test_images_outside_are_refused_unless_allowed(tmp_path: Path) -> None:
    write_image(tmp_path / "private/a.png")
    for name in ("../private/a.png", str(tmp_path / "private/a.png")):
        root = tmp_path / "data"
        file = write_json(root / "annotations/instances_train.json", [image(1, name)], [annotation(1, 1)])
        with pytest.raises(RefineDetError, match="outside the folder of the data") as caught:
            open_dataset(root)
        assert str(file) in str(caught.value)
        with pytest.raises(RefineDetError, match="outside the folder of the data"):
            open_dataset(file)
        # A stated path starts where images may lie: beside the JSON file, here two folders further down.
        name = name.replace("..", "../..")
        write_json(file, [image(1, name)], [annotation(1, 1)])
        allowed = open_dataset(root, allow_outside=True)
        assert allowed[0].image_path.samefile(tmp_path / "private/a.png")


def test_missing_images_are_one_problem_with_a_count(write_coco: Callable[..., Path]) -> None:
    root = write_coco([image(i, f"{i}.png") for i in range(5)], [])
    for i in range(1, 5):
        (root / f"train/{i}.png").unlink()
    problems = open_dataset(root, strict=False).problems
    assert [(problem.path, problem.count, problem.fatal) for problem in problems] == [(root / "train/1.png", 4, True)]
    assert str(problems[0]).endswith("(and 3 more like it)")


# Ids, categories, flags and sizes.


def test_ids_that_are_texts(write_coco: Callable[..., Path]) -> None:
    images = [image("1", "a.jpg"), image("frame_2", "b.jpg"), image("007", "c.jpg"), image(4.0, "d.jpg")]
    annotations = [annotation(i, key, "2") for i, key in enumerate([1, "frame_2", "007", "4", 4])]
    root = write_coco(images, annotations, [{"id": "2", "name": "dog"}, {"id": "10", "name": "cat"}])
    dataset = open_dataset(root)
    assert [record.image_id for record in dataset.records] == [1, "frame_2", "007", 4]
    assert [len(record.labels) for record in dataset.records] == [1, 1, 1, 2]
    assert dataset.class_names == ("dog", "cat")
    assert dataset.category_ids == (2, 10)


def test_category_ids_that_are_words_are_numbered(write_coco: Callable[..., Path]) -> None:
    categories = [{"id": "c_dog", "name": "dog"}, {"id": "c_cat", "name": "cat"}]
    dataset = open_dataset(write_coco([image(1, "a.jpg")], [annotation(1, 1, "c_cat")], categories))
    assert dataset.class_names == ("dog", "cat")
    assert dataset.category_ids == (1, 2)
    assert dataset[0].labels.tolist() == [1]


@pytest.mark.parametrize("key", [10**30, None, True, [1], "", "x" * 300, 1.5])
def test_ids_that_are_none(write_coco: Callable[..., Path], key: object) -> None:
    root = write_coco([image(1, "a.jpg"), image(key, "b.jpg")], [annotation(1, key)])
    with pytest.raises(RefineDetError, match="needs an 'id'"):
        open_dataset(root)
    dataset = open_dataset(root, strict=False)
    assert [record.image_id for record in dataset.records] == [1]
    assert len(dataset.problems) == 2


@pytest.mark.parametrize("crowd", [0, False, None, "0", "false", "False", "", 0.0, "no"])
def test_not_crowd(write_coco: Callable[..., Path], crowd: object) -> None:
    dataset = open_dataset(write_coco([image(1, "a.jpg")], [annotation(1, 1, iscrowd=crowd)]))
    assert dataset[0].crowd.tolist() == [False]
    assert not dataset.problems


@pytest.mark.parametrize("crowd", [1, True, "1", "true", 1.0, " TRUE "])
def test_crowd(write_coco: Callable[..., Path], crowd: object) -> None:
    assert open_dataset(write_coco([image(1, "a.jpg")], [annotation(1, 1, iscrowd=crowd)]))[0].crowd.tolist() == [True]


@pytest.mark.parametrize("crowd", [2, "maybe", [], {}, -1])
def test_crowd_that_is_neither(write_coco: Callable[..., Path], crowd: object) -> None:
    root = write_coco([image(1, "a.jpg")], [annotation(1, 1, iscrowd=crowd), annotation(2, 1)])
    with pytest.raises(RefineDetError, match="annotation 1: 'iscrowd' must be 0 or 1"):
        open_dataset(root)
    assert len(open_dataset(root, strict=False)[0].labels) == 1


@pytest.mark.parametrize("sides", [{"width": "160", "height": "120"}, {"width": 160.0, "height": 120.0}])
def test_sizes_in_other_types(write_coco: Callable[..., Path], sides: dict[str, object]) -> None:
    dataset = open_dataset(write_coco([image(1, "a.jpg", **sides)], []))
    assert (dataset[0].width, dataset[0].height) == SIZE
    assert not dataset.problems


@pytest.mark.parametrize("side", [None, 0, -5, 10**400, 10**200, 1e300, "wide", True, [160], 160.5])
def test_sizes_that_cannot_be_are_taken_from_the_images(write_coco: Callable[..., Path], side: object) -> None:
    images = [image(i, f"{i}.jpg", width=side, height=side) for i in range(3)]
    dataset = open_dataset(write_coco(images, []))
    assert {(record.width, record.height) for record in dataset.records} == {SIZE}
    assert [problem.count for problem in dataset.problems] == [3]
    assert dataset.repaired() == "3 image sizes filled in from the image files"


@pytest.mark.parametrize("area", [-1e11, -1, "4", float("nan"), 1e300, [4]])
def test_areas_that_are_none(write_coco: Callable[..., Path], area: object) -> None:
    root = write_coco([image(1, "a.jpg")], [annotation(1, 1, area=area)])
    with pytest.raises(RefineDetError, match="annotation 1: 'area' must be a number from 0 up"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a\nb", "line break"), ("a\ud800", "control character"), (" ", "is empty"), ("x" * 100_000, "100000 letters")],
)
def test_class_names_that_no_table_can_hold(write_coco: Callable[..., Path], name: str, reason: str) -> None:
    root = write_coco([image(1, "a.jpg")], [], [{"id": 1, "name": name}])
    for strict in (True, False):
        with pytest.raises(RefineDetError, match=f"category 1: its name, .*{reason}") as caught:
            open_dataset(root, strict=strict)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


# Roots above the classes.

PETS = [
    {"id": 0, "name": "pets", "supercategory": "none"},
    {"id": 1, "name": "cat", "supercategory": "pets"},
    {"id": 2, "name": "dog", "supercategory": "pets"},
]
TOP = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "dog", "supercategory": "none"}]
SAME = [{"id": 0, "name": "cats", "supercategory": "none"}, {"id": 1, "name": "cats", "supercategory": "cats"}]


@pytest.mark.parametrize(
    ("categories", "used", "names", "labels"),
    [
        (PETS, [1, 2], ("cat", "dog"), [0, 1]),
        (PETS, [1, 0], ("pets", "cat", "dog"), [1, 0]),
        (TOP, [0, 1], ("cat", "dog"), [0, 1]),
        (SAME, [1], ("cats",), [0]),
        (SAME, [1, 0], ("cats",), [0, 0]),
    ],
)
def test_a_root_is_a_class_only_if_it_is_annotated(
    tmp_path: Path, categories: list[Any], used: list[int], names: tuple[str, ...], labels: list[int]
) -> None:
    write_image(tmp_path / "train/a.jpg")
    annotations = [annotation(i, 1, category) for i, category in enumerate(used)]
    write_json(tmp_path / "train/_annotations.coco.json", [image(1, "a.jpg")], annotations, categories)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.class_names == names
    assert dataset[0].labels.tolist() == labels
    assert not dataset.problems


def test_a_root_that_one_split_uses_is_a_class_of_all(tmp_path: Path) -> None:
    for split, used in (("train", 1), ("valid", 0)):
        write_image(tmp_path / split / f"{split}.jpg")
        file = tmp_path / split / "_annotations.coco.json"
        write_json(file, [image(split, f"{split}.jpg")], [annotation(1, split, used)], PETS)
    for opened, split in ((tmp_path, "train"), (tmp_path, "valid"), (tmp_path / "train", None), (tmp_path, None)):
        assert open_dataset(opened, split).class_names == ("pets", "cat", "dog")


# Boxes.


def test_one_image_under_two_ids_has_all_objects(write_coco: Callable[..., Path]) -> None:
    images = [image(1, "a.jpg"), image(2, "a.jpg"), image(3, "b.jpg")]
    annotations = [annotation(1, 1), annotation(2, 2, 2, bbox=[80, 20, 40, 40]), annotation(3, 3)]
    dataset = open_dataset(write_coco(images, annotations))
    assert [record.image_id for record in dataset.records] == [1, 3]
    assert dataset[0].boxes.tolist() == [EDGES, [80, 20, 120, 60]]
    assert dataset[0].labels.tolist() == [0, 1]
    assert "a.jpg is listed under the ids 1 and 2" in dataset.problems[0].message


def test_masks_without_boxes(write_coco: Callable[..., Path]) -> None:
    runs = {"size": [120, 160], "counts": [20 * 120 + 30, 40, 80, 40, 120 * 160 - 20 * 120 - 30 - 160]}
    annotations = [
        annotation(1, 1, bbox=None, segmentation=[[20, 20, 60, 20, 60, 60]], area=800),
        annotation(2, 1, bbox=[], segmentation=runs, iscrowd=1),
        annotation(3, 1, bbox=None, segmentation={"size": [120, 160], "counts": "abc"}),
        annotation(4, 1, bbox=None),
        annotation(5, 1, bbox=None),
    ]
    dataset = open_dataset(write_coco([image(1, "a.jpg")], annotations))
    assert dataset[0].boxes.tolist() == [EDGES, [20, 30, 22, 70]]
    assert dataset[0].areas.tolist() == [800, 80]
    assert dataset[0].crowd.tolist() == [False, True]
    assert [(problem.message, problem.count) for problem in dataset.problems] == [
        ("annotation 3 has no 'bbox', and the run lengths of its mask are cut off; dropped", 1),
        ("annotation 4 has no 'bbox'; dropped", 2),
    ]
    assert dataset.repaired() == "3 objects without a box dropped"


@pytest.mark.parametrize(
    ("box", "reason"),
    [([0.1, 0.2, 0.4, 0.5], "shares of the image"), ([100, 60, 150, 110], "would lie inside as .x1, y1, x2, y2.")],
)
def test_boxes_in_another_form_are_noticed(write_coco: Callable[..., Path], box: list[float], reason: str) -> None:
    root = write_coco([image(1, "a.jpg")], [annotation(i, 1, bbox=box) for i in range(6)])
    with pytest.raises(RefineDetError, match=f"instances_train.json: .* 6 boxes .*{reason}"):
        open_dataset(root)
    assert sum(problem.fatal for problem in open_dataset(root, strict=False).problems) == 1


def test_a_single_doubtful_box_is_only_noted(write_coco: Callable[..., Path]) -> None:
    dataset = open_dataset(write_coco([image(1, "a.jpg")], [annotation(1, 1, bbox=[100, 60, 150, 110])]))
    assert "would lie inside as [x1, y1, x2, y2]" in dataset.problems[-1].message
    repaired = "1 box clipped to its image, 1 annotation file whose boxes seem to be of another form"
    assert dataset.repaired() == repaired


def test_usual_boxes_are_not_doubted(write_coco: Callable[..., Path]) -> None:
    boxes = [[0, 0, 160, 120], [0, 0, 1, 1], [10, 10, 150, 110], [159, 119, 1, 1], [0.5, 0.5, 0.5, 0.5]]
    dataset = open_dataset(write_coco([image(1, "a.jpg")], [annotation(i, 1, bbox=box) for i, box in enumerate(boxes)]))
    assert not dataset.problems
    assert len(dataset[0].labels) == 5
