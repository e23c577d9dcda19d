"""Results files for the servers of PASCAL VOC and COCO, whose test annotations are not public.

VOC: an archive of ``results/VOC2012/Main/comp4_det_test_<class>.txt``, the devkit's layout; a line is ``image_id score
xmin ymin xmax ymax``, corners 1-based with the last pixel included. COCO: ``detections_<split>_<name>_results.json``,
also as a zip archive, a list of image_id, category_id, bbox (x, y, width, height) and score.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refinedet.data.layouts import LAYOUTS
from refinedet.data.records import DetectionDataset
from refinedet.detections import Detections
from refinedet.errors import UsageError
from refinedet.files import LIST_MARK, check_output, encoded, user_path, write_atomically

_SIGNATURE = "submission written by refinedet"
"""Stands in the files, so that a later submission may replace them."""
_ENDINGS = {"voc": (".zip", ".tar.gz", ".tgz"), "coco": (".zip", ".json")}


@dataclass(frozen=True)
class SubmissionPlan:
    """Where results go and what the files inside are called."""

    path: Path
    """The file to write."""
    server: str
    """"voc" or "coco"."""
    inner: str
    """VOC: path of the files in the archive up to the class name; COCO: name of the JSON file."""


def write_submission(
    path: str | Path, dataset: DetectionDataset, detections: Mapping[int, Detections] | Sequence[Detections]
) -> Path:
    """Write results for the server that the data belongs to.

    Args:
        path: for VOC .zip, .tar.gz or .tgz; for COCO .zip or .json.
        dataset: the data, of one split.
        detections: of each image, clipped to it: a list in the order of the dataset, or a mapping from the index of an
            image (what ``evaluate.collect_detections`` returns).

    Returns:
        The file.

    Raises:
        UsageError: as ``plan_submission``.
        RefineDetError: it cannot be written; a file that was there before is still there.
    """
    plan = plan_submission(path, dataset)
    by_index = detections if isinstance(detections, Mapping) else dict(enumerate(detections))
    indices = sorted(by_index)
    image_ids = [dataset[index].image_id for index in indices]
    of_images = [by_index[index] for index in indices]

    def files() -> Iterator[tuple[str, Iterator[str]]]:
        if plan.server == "coco":
            yield plan.inner, _coco_text(image_ids, of_images, dataset.category_ids)
            return
        for label, name in enumerate(_member_names(dataset.class_names)):
            yield f"{plan.inner}{name}.txt", _voc_lines(image_ids, of_images, label)

    ending = plan.path.name.lower()
    writer = _write_text if ending.endswith(".json") else _write_zip if ending.endswith(".zip") else _write_tar
    write_atomically(plan.path, lambda aside: writer(aside, files()))
    return plan.path


def plan_submission(path: str | Path, dataset: DetectionDataset, metric: str | None = None) -> SubmissionPlan:
    """Check, before hours of work, that results of this data can be written to that file.

    Args:
        path: as for ``write_submission``.
        dataset: the data, of one split.
        metric: what is measured along with it; "coco" goes with COCO's server, all others with VOC's.

    Raises:
        UsageError: an ending that the server does not take, an existing file that is no submission of ours, data of
            another layout than the server's, a metric of the other server, or several VOC years at once.
        RefineDetError: the file cannot be written there.
    """
    path = user_path(path)
    server = LAYOUTS[dataset.layout].server
    if server is None:
        raise UsageError(
            f"{dataset.path}: there is no server for data in {dataset.layout.upper()}'s layout; --report saves all "
            "detections"
        )
    if metric is not None and (metric == "coco") != (server == "coco"):
        raise UsageError(f"{dataset.path}: results of {server.upper()} data go with --metric {server}, not '{metric}'")
    endings = _ENDINGS[server]
    ending = next((end for end in endings if path.name.lower().endswith(end)), None)
    if ending is None:
        raise UsageError(
            f"{path}: results for the {server.upper()} server are a file that ends in {' or '.join(endings)}"
        )
    check_output(path, inputs=[dataset.path], ours=_SIGNATURE)
    if server == "coco":
        name = _safe(path.name[: -len(ending)])
        if not re.fullmatch(r"detections_.+_results", name):
            name = f"detections_{_safe(_coco_split(dataset))}_{name}_results"
        return SubmissionPlan(path, server, f"{name}.json")
    years = sorted({record.image_path.absolute().parent.parent.name for record in dataset.records})
    if len(years) != 1:
        raise UsageError(
            f"{dataset.path}: results are of one year, but the split is in {', '.join(years)}; "
            f"name one, as in --split {years[-1].removeprefix('VOC')}:test"
        )
    split = (dataset.split or "all").rpartition(":")[2]
    return SubmissionPlan(path, server, f"results/{_safe(years[0])}/Main/comp4_det_{_safe(split)}_")


def _safe(name: str) -> str:
    """A name that is one part of a path on every system: letters, digits and ``. _ -``, no dot in front."""
    return re.sub(r"^\.+|[^\w.-]", "_", name, flags=re.ASCII) or "_"


def _member_names(class_names: Sequence[str]) -> list[str]:
    """A safe name for each class, different from each other also where upper and lower case are the same."""
    taken: set[str] = set()
    names = []
    for class_name in class_names:
        name = safe = _safe(class_name)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{safe}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _coco_split(dataset: DetectionDataset) -> str:
    """The name that COCO has for the split: test-dev2017 and the like."""
    name = dataset.split or (dataset.path.stem if dataset.path.is_file() else "all")
    return name.removeprefix("image_info_").removeprefix("instances_")


def _voc_lines(image_ids: Sequence[int | str], detections: Sequence[Detections], label: int) -> Iterator[str]:
    for image_id, of_image in zip(image_ids, detections, strict=True):
        of_class = of_image.labels == label
        if not of_class.any():
            continue
        width, height = of_image.image_size
        # Detections lie in the image already; what is thinner than a pixel becomes the pixel that it lies on, since
        # inclusive corners cannot say less.
        limit = np.array([width, height], dtype=np.float64)
        first = np.clip(of_image.boxes[of_class, :2].astype(np.float64) + 1.0, 1.0, limit)
        last = np.clip(np.maximum(of_image.boxes[of_class, 2:], first), 1.0, limit)
        for score, (xmin, ymin), (xmax, ymax) in zip(of_image.scores[of_class], first, last, strict=True):
            yield f"{image_id} {score:.8f} {xmin:.3f} {ymin:.3f} {xmax:.3f} {ymax:.3f}\n"


def _coco_text(
    image_ids: Sequence[int | str], detections: Sequence[Detections], category_ids: Sequence[int] | None
) -> Iterator[str]:
    before = "["
    for image_id, of_image in zip(image_ids, detections, strict=True):
        for item in of_image.to_coco(image_id, category_ids):
            yield before + json.dumps(item, allow_nan=False)
            before = ",\n"
    yield "]\n" if before != "[" else "[]\n"


# Each writer takes (name, pieces of text); only the lines of one VOC class are ever held as a whole.


def _write_text(path: Path, files: Iterator[tuple[str, Iterator[str]]]) -> None:
    with path.open("wb") as stream:
        for _, text in files:
            stream.writelines(encoded(piece) for piece in text)
        stream.write(LIST_MARK.encode())


def _write_zip(path: Path, files: Iterator[tuple[str, Iterator[str]]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = _SIGNATURE.encode()
        for name, text in files:
            with archive.open(name, "w", force_zip64=True) as stream:
                for piece in text:
                    stream.write(encoded(piece))


def _write_tar(path: Path, files: Iterator[tuple[str, Iterator[str]]]) -> None:
    # The name that a gzip header has room for carries the signature.
    with (
        path.open("wb") as raw,
        gzip.GzipFile(_SIGNATURE, "wb", fileobj=raw) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name, text in files:
            data = encoded("".join(text))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
