"""Files for the servers: layout, corners, ids, and splits without annotations."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from oracles import voc_average_precision
from refinedet import RefineDet, cli
from refinedet.config import ModelConfig
from refinedet.data import list_splits, open_dataset
from refinedet.data.layouts import detect_layout
from refinedet.detections import Detections
from refinedet.errors import RefineDetError, UsageError
from refinedet.evaluation.evaluate import collect_detections, evaluate, evaluate_detections, open_evaluation_data
from refinedet.evaluation.submission import plan_submission, write_submission

FolderFactory = Callable[..., Path]
NAMES = ("lynx", "otter")


class Guesser:
    """Three boxes in every image: the whole of it, a part, and a sliver thinner than a pixel at its right edge."""

    def __init__(self, class_names: tuple[str, ...] = NAMES) -> None:
        self.class_names = class_names
        self.config = ModelConfig(num_classes=len(class_names))
        self.seen = 0

    def predict_arrays(
        self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        self.seen += len(images)
        found = []
        for image in images:
            height, width = image.shape[:2]
            boxes = np.array([[0, 0, width, height], [2.5, 3.25, 20, 30], [width - 0.25, 5, width, 9]])
            found.append(
                Detections(boxes, np.array([0.75, 0.5, 0.25]), np.array([0, 1, 1]), self.class_names, (width, height))
            )
        return found


def submit(model: Guesser, data: Path, split: str | None, metric: str, file: Path) -> dict[int, Detections]:
    """What ``refinedet evaluate --submission`` does."""
    dataset = open_evaluation_data(data, split, model.class_names, require_annotations=False)
    plan_submission(file, dataset, metric)
    detections = collect_detections(model, dataset)
    assert write_submission(file, dataset, detections) == file
    return detections


@pytest.fixture
def voc_test(voc_folder: FolderFactory) -> Path:
    """VOC 2012 test as it comes from its server: images and lists, no annotations; 3 images."""
    root = voc_folder(name="VOCdevkit/VOC2012", splits={"test": [0, 2, 4]}, class_names=NAMES)
    shutil.rmtree(root / "Annotations")
    return root.parent


@pytest.fixture
def coco_test(coco_folder: FolderFactory) -> Path:
    """COCO with test-dev2017: annotated train2017 and val2017, test2017 with a list of three of its images."""
    root = coco_folder(class_names=NAMES, splits={"train2017": [0, 2], "val2017": [1, 3], "test2017": [0, 2, 4, 5]})
    instances = root / "annotations" / "instances_test2017.json"
    document = json.loads(instances.read_text())
    instances.unlink()
    del document["annotations"]
    (root / "annotations" / "image_info_test2017.json").write_text(json.dumps(document))
    del document["images"][-1]
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(document))
    return root


def read_archive(path: Path) -> dict[str, str]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            return {name: archive.read(name).decode() for name in archive.namelist()}
    with tarfile.open(path) as tar:
        return {one.name: tar.extractfile(one).read().decode() for one in tar.getmembers()}  # type: ignore[union-attr]


# VOC ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".zip", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("metric", ["voc07", "voc"])
def test_voc_archive_in_the_devkits_layout(voc_test: Path, tmp_path: Path, ending: str, metric: Any) -> None:
    file = tmp_path / "new" / f"mine{ending}"
    submit(Guesser(), voc_test, "test", metric, file)
    content = read_archive(file)
    assert set(content) == {f"results/VOC2012/Main/comp4_det_test_{name}.txt" for name in NAMES}
    ids = ["000000", "000002", "000004"]
    lynx = content["results/VOC2012/Main/comp4_det_test_lynx.txt"]
    assert lynx == "".join(f"{i} 0.75000000 1.000 1.000 96.000 64.000\n" for i in ids)
    otter = content["results/VOC2012/Main/comp4_det_test_otter.txt"].splitlines()
    assert otter[0] == "000000 0.50000000 3.500 4.250 20.000 30.000"
    # Thinner than a pixel: the pixel it lies on, and not beyond the image.
    assert otter[1] == "000000 0.25000000 96.000 6.000 96.000 9.000"
    assert len(otter) == 6


def test_a_class_without_detections_still_has_its_file(voc_test: Path, tmp_path: Path) -> None:
    submit(Guesser((*NAMES, "unicorn")), voc_test, "2012:test", "voc", tmp_path / "a.zip")
    content = read_archive(tmp_path / "a.zip")
    assert content["results/VOC2012/Main/comp4_det_test_unicorn.txt"] == ""
    assert len(content) == 3


def test_annotations_of_another_task_are_not_looked_at(voc_folder: FolderFactory, tmp_path: Path) -> None:
    root = voc_folder(name="VOC2012", splits={"test": [0, 2, 4]}, class_names=NAMES)
    for annotation in (root / "Annotations").glob("*.xml"):
        if annotation.stem != "000002":
            annotation.unlink()
    (root / "Annotations" / "000002.xml").write_text("<annotation><object><name>head</name></object></annotation>")
    dataset = open_dataset(root, "test", class_names=NAMES, require_annotations=False)
    assert not dataset.annotated
    assert [len(record.labels) for record in dataset.records] == [0, 0, 0]
    assert [(record.width, record.height) for record in dataset.records] == [(96, 64)] * 3
    assert len(submit(Guesser(), root, "test", "voc", tmp_path / "a.zip")) == 3
    with pytest.raises(RefineDetError, match=r"000000\.xml: no such annotation"):
        evaluate(Guesser(), root, "test", "voc")


def test_an_annotated_split_gets_its_figures_too_and_the_file_gives_the_same(
    voc_folder: FolderFactory, tmp_path: Path
) -> None:
    root = voc_folder(name="VOC2007", class_names=NAMES)
    detections = submit(Guesser(), root, "trainval", "voc", tmp_path / "a.zip")
    dataset = open_dataset(root, "trainval", class_names=NAMES)
    report = evaluate_detections(dataset, detections, "voc")
    assert report["mAP"] == evaluate(Guesser(), root, "trainval", "voc")["mAP"]
    rows: dict[str, list[tuple[int, list[float]]]] = {str(record.image_id): [] for record in dataset.records}
    for label, name in enumerate(NAMES):
        for line in read_archive(tmp_path / "a.zip")[
            f"results/VOC2007/Main/comp4_det_trainval_{name}.txt"
        ].splitlines():
            image_id, *numbers = line.split()
            rows[image_id].append((label, [float(number) for number in numbers]))
    found = []
    for record in dataset.records:
        numbers = np.array([values for _, values in rows[str(record.image_id)]])
        boxes = numbers[:, 1:] - np.array([1, 1, 0, 0])
        labels = np.array([label for label, _ in rows[str(record.image_id)]])
        found.append(Detections(boxes, numbers[:, 0], labels, NAMES, (record.width, record.height)))
    assert voc_average_precision(found, dataset.records, 2, method="area").mean == pytest.approx(
        report["mAP"], abs=1e-9
    )


def test_several_years_need_a_choice(voc_folder: FolderFactory, tmp_path: Path) -> None:
    voc_folder(name="VOCdevkit/VOC2007", class_names=NAMES)
    root = voc_folder(name="VOCdevkit/VOC2012", class_names=NAMES, first=10).parent
    with pytest.raises(UsageError, match=r"results are of one year, .* VOC2007, VOC2012; name one, as in --split 2012"):
        submit(Guesser(), root, "test", "voc", tmp_path / "a.zip")
    submit(Guesser(), root, "2012:test", "voc", tmp_path / "a.zip")
    assert "results/VOC2012/Main/comp4_det_test_lynx.txt" in read_archive(tmp_path / "a.zip")


def test_a_test_set_beside_an_annotated_year(voc_test: Path, voc_folder: FolderFactory) -> None:
    voc_folder(name="VOCdevkit/VOC2007", class_names=NAMES, first=10)
    dataset = open_dataset(voc_test, "test", NAMES)
    assert dataset.annotated
    assert {record.image_path.parent.parent.name for record in dataset.records} == {"VOC2007"}
    assert len(open_dataset(voc_test, "2012:test", NAMES, require_annotations=False)) == 3


def test_images_of_a_test_set_must_be_there(voc_test: Path, tmp_path: Path) -> None:
    missing = voc_test / "VOC2012" / "JPEGImages" / "000002.jpg"
    missing.unlink()
    with pytest.raises(RefineDetError, match=r"000002\.jpg: no such image file"):
        submit(Guesser(), voc_test, "test", "voc", tmp_path / "a.zip")
    lenient = open_dataset(voc_test, "test", NAMES, strict=False, require_annotations=False)
    assert [problem.path for problem in lenient.problems] == [missing]
    assert len(lenient) == 2


def test_without_lists_every_image_is_taken(voc_test: Path) -> None:
    dataset = open_dataset(voc_test, None, NAMES, require_annotations=False)
    assert len(dataset) == 6
    assert not dataset.annotated


# COCO -----------------------------------------------------------------------------------------------------------------


def test_coco_test_dev(coco_test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.zip"
    detections = submit(Guesser(), coco_test, "test-dev2017", "coco", file)
    (name,) = read_archive(file)
    assert name == "detections_test-dev2017_mine_results.json"
    results = json.loads(read_archive(file)[name])
    assert len(results) == 9
    assert {item["image_id"] for item in results} == {100, 102, 104}
    assert results[1] == {"image_id": 100, "category_id": 6, "bbox": [2.5, 3.25, 17.5, 26.75], "score": 0.5}
    assert [item["score"] for item in results] == [float(s) for d in detections.values() for s in d.scores]
    # The list itself, and the short name of the split.
    lists = coco_test / "annotations" / "image_info_test-dev2017.json"
    bare = tmp_path / "detections_test-dev2017_other_results.json"
    submit(Guesser(), lists, None, "coco", bare)
    assert json.loads(bare.read_text()) == results
    submit(Guesser(), coco_test, "test-dev", "coco", tmp_path / "detections_x_results.zip")
    assert list(read_archive(tmp_path / "detections_x_results.zip")) == ["detections_x_results.json"]
    submit(Guesser(), lists, "all", "coco", tmp_path / "b.zip")
    assert list(read_archive(tmp_path / "b.zip")) == ["detections_test-dev2017_b_results.json"]


def test_lists_of_images_do_not_get_in_the_way(coco_test: Path) -> None:
    assert list_splits(coco_test) == ("train2017", "val2017")
    assert len(open_dataset(coco_test)) == 4
    assert open_dataset(coco_test, "val2017", require_annotations=False).annotated
    with pytest.raises(
        UsageError, match=r"image_info_test2017\.json: lists images without 'annotations'.*--submission"
    ):
        open_dataset(coco_test, "test2017")
    for file in (coco_test / "annotations").glob("instances_*"):
        file.unlink()
    assert detect_layout(coco_test) == "coco"
    assert len(open_dataset(coco_test, "test2017", require_annotations=False)) == 4


def test_coco_file_without_annotations_is_still_an_error(coco_folder: FolderFactory) -> None:
    root = coco_folder(class_names=NAMES)
    file = root / "annotations" / "instances_val.json"
    document = json.loads(file.read_text())
    del document["annotations"]
    file.write_text(json.dumps(document))
    for required in (True, False):
        with pytest.raises(RefineDetError, match="needs a list of objects named 'annotations'"):
            open_dataset(root, "val", require_annotations=required)


def test_a_class_that_is_no_category_is_refused(coco_test: Path, tmp_path: Path) -> None:
    model = Guesser(("lynx", "yeti"))
    with pytest.raises(UsageError, match="has no category 'yeti'"):
        submit(model, coco_test, "test-dev2017", "coco", tmp_path / "a.zip")
    assert model.seen == 0


def test_nothing_found_is_an_empty_list(coco_test: Path, tmp_path: Path) -> None:
    dataset = open_dataset(coco_test, "test-dev2017", NAMES, require_annotations=False)
    nothing = [Detections.empty(NAMES, (96, 64))] * len(dataset)
    write_submission(tmp_path / "a.json", dataset, nothing)
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_members_have_safe_names(voc_folder: FolderFactory, tmp_path: Path) -> None:
    """Names that would leave the folder, or be one file where case does not count."""
    names = ("../../evil", "a/b", "A_b", "tab\there", "..")
    # Reading refuses some of these names; a dataset made in Python need not.
    plain = open_dataset(voc_folder(class_names=NAMES), "trainval", NAMES)
    dataset = replace(plain, class_names=(*NAMES, *names))
    write_submission(tmp_path / "a.zip", dataset, {0: Detections.empty(dataset.class_names, (96, 64))})
    members = [name.removeprefix("results/voc/Main/comp4_det_trainval_") for name in read_archive(tmp_path / "a.zip")]
    assert members == [
        f"{name}.txt" for name in ("lynx", "otter", "_/../evil".replace("/", "_"), "a_b", "A_b-2", "tab_here", "_")
    ]


@pytest.mark.shared_data
def test_pycocotools_reads_the_results(shared_data: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    names = open_dataset(shared_data / "coco_tiny").class_names
    dataset = open_dataset(shared_data / "coco_tiny", class_names=names)
    write_submission(tmp_path / "a.json", dataset, collect_detections(Guesser(names), dataset, range(4)))
    reference = coco.COCO(str(shared_data / "coco_tiny/annotations/instances_train2017.json"))
    assert len(reference.loadRes(str(tmp_path / "a.json")).anns) == 12


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "metric", "message"),
    [
        ("a.7z", "voc", r"a\.7z: results for the VOC server are a file that ends in \.zip or \.tar\.gz or \.tgz"),
        ("a.json", "voc07", r"ends in \.zip or"),
        ("a.zip", "coco", "results of VOC data go with --metric voc, not 'coco'"),
    ],
)
def test_wrong_voc_calls(voc_test: Path, tmp_path: Path, file: str, metric: Any, message: str) -> None:
    model = Guesser()
    with pytest.raises(UsageError, match=message) as caught:
        submit(model, voc_test, "test", metric, tmp_path / file)
    assert "\n" not in str(caught.value)
    assert model.seen == 0


def test_other_wrong_calls(coco_test: Path, yolo_folder: FolderFactory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="results of COCO data go with --metric coco, not 'voc07'"):
        submit(Guesser(), coco_test, "test-dev2017", "voc07", tmp_path / "a.zip")
    with pytest.raises(UsageError, match=r"ends in \.zip or \.json"):
        submit(Guesser(), coco_test, "test-dev2017", "coco", tmp_path / "a.tar.gz")
    (tmp_path / "b.zip").mkdir()
    with pytest.raises(UsageError, match=r"b\.zip: is a folder"):
        submit(Guesser(), coco_test, "test-dev2017", "coco", tmp_path / "b.zip")
    with pytest.raises(UsageError, match="no server for data in YOLO's layout"):
        submit(Guesser(), yolo_folder(class_names=NAMES), "val", "voc07", tmp_path / "a.zip")


def test_a_file_that_cannot_be_written_is_one_line(voc_test: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("")
    with pytest.raises(RefineDetError, match="blocked") as caught:
        submit(Guesser(), voc_test, "test", "voc", tmp_path / "blocked" / "a.zip")
    assert "\n" not in str(caught.value)


def test_command_line(voc_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(backbone="resnet18", tcb_channels=8, tcb_batch_norm=True, num_classes=2, image_size=(64, 64))
    RefineDet(config, NAMES).save_pretrained(tmp_path / "model")
    file = tmp_path / "results.zip"
    command = ["evaluate", str(tmp_path / "model"), str(voc_test), "--metric", "voc", "--submission", str(file)]
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "no figures: 3 images without annotations" in output
    assert f"submission: {file}" in output
    assert "mAP" not in output
    corners = [line.split()[2:] for text in read_archive(file).values() for line in text.splitlines()]
    numbers = np.array(corners, dtype=float)
    with Image.open(voc_test / "VOC2012" / "JPEGImages" / "000000.jpg") as image:
        assert (numbers >= 1).all()
        assert (numbers <= [*image.size, *image.size]).all()
    assert (numbers[:, 2:] >= numbers[:, :2]).all()
    assert cli.main([*command[:-1], str(tmp_path / "results.txt")]) == 2
    assert "results.txt: results for the VOC server" in capsys.readouterr().err
