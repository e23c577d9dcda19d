"""Packs data and weights for a machine that takes and gives only so much at a time, and unpacks them there.

    python -m experiments.pack make --data VOCdevkit --weights vgg16.safetensors --out experiments/packed/base
    python -m experiments.pack store experiments/packed/base --to /tmp/claims     (there, after each delivery of parts)
    python -m experiments.pack weights RUN --out FOLDER                           (there: a model in float16, cut)
    python -m experiments.pack join FOLDER                                        (here: the model in one piece again)

A file that is cut becomes ``<name>.000``, ``<name>.001``, ... and ``manifest.json`` with the checksum of each.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from experiments.steps import run_main
from refinedet.data.layouts import open_dataset
from refinedet.data.records import DetectionDataset, Record
from refinedet.data.voc import find_folders
from refinedet.dataclass_json import load_json, save_json
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import read_json, write_atomically, write_bytes
from refinedet.weights.store import WEIGHTS_FILE

MANIFEST_FILE, ARCHIVE_FILE, PACK_FILE = "manifest.json", "pack.zip", "pack.json"
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a file that was cut."""

    name: str
    """File in the manifest's folder."""
    bytes: int
    """Its length."""
    sha256: str
    """Its checksum, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How to put a cut file together again."""

    name: str
    """The file that was cut."""
    sha256: str
    """Checksum of the whole."""
    parts: tuple[Part, ...]
    """In order."""


def cut(path: Path, folder: Path, part_bytes: int) -> Manifest:
    """Cut a file into parts of at most ``part_bytes`` and a manifest in ``folder``.

    Raises:
        RefineDetError: the folder cannot be written to or the disk is full.
    """
    if part_bytes < 1:
        raise UsageError(f"a part needs at least 1 byte, not {part_bytes}: raise --part-mib")
    parts: list[Part] = []
    whole = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(part_bytes):
            whole.update(data)
            part = Part(name=f"{path.name}.{len(parts):03}", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            write_bytes(folder / part.name, data)
            parts.append(part)
    manifest = Manifest(name=path.name, sha256=whole.hexdigest(), parts=tuple(parts))
    save_json(manifest, folder / MANIFEST_FILE)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of parts.

    Raises:
        RefineDetError: there is none, or it is no manifest.
    """
    return load_json(Manifest, folder / MANIFEST_FILE)


def read_part(folder: Path, part: Part) -> bytes:
    """The bytes of a part.

    Raises:
        RefineDetError: it is not there, or not what was cut.
    """
    path = folder / part.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefineDetError(f"{path}: cannot be read ({error.strerror}); bring this part again") from None
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise RefineDetError(f"{path}: not the part that was cut (its checksum differs); bring it again")
    return data


def join(folder: Path, target: Path | None = None) -> Path:
    """Put the parts in ``folder`` together as ``target`` (default: under the old name beside them).

    Raises:
        RefineDetError: a part is missing or damaged; it is named.
    """
    manifest = read_manifest(folder)
    path = target or folder / Path(manifest.name).name

    def write(aside: Path) -> None:
        whole = hashlib.sha256()
        with aside.open("wb") as stream:
            for part in manifest.parts:
                data = read_part(folder, part)
                whole.update(data)
                stream.write(data)
        if whole.hexdigest() != manifest.sha256:
            raise RefineDetError(f"{folder / MANIFEST_FILE}: its parts do not make the file that was cut; pack anew")

    write_atomically(path, write)
    return path


def store(folder: Path, target: Path) -> list[str]:
    """Keep the parts that have arrived in ``folder``; once all are there, unpack them into ``target``.

    Args:
        folder: of the manifest and some or all parts of an archive that ``make`` wrote.
        target: where parts are collected (``target/parts``) and unpacked; survives from delivery to delivery.

    Returns:
        Names of the parts still missing; empty if the archive has been unpacked.

    Raises:
        RefineDetError: a part is damaged, or ``target`` collects the parts of another archive.
    """
    manifest = read_manifest(folder)
    kept = target / "parts" / manifest.sha256[:16]
    missing = []
    for part in manifest.parts:
        if (folder / part.name).exists():
            write_bytes(kept / part.name, read_part(folder, part))
        elif not (kept / part.name).exists():
            missing.append(part.name)
    write_bytes(kept / MANIFEST_FILE, (folder / MANIFEST_FILE).read_bytes())
    if not missing:
        archive = join(kept)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(target)
        archive.unlink()
    return missing


def shrink(
    image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], max_side: int, quality: int
) -> tuple[bytes, Image.Image]:
    """A picture (H, W, 3) as JPEG, with its longer side at most ``max_side`` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, optimize=True)
    return stream.getvalue(), picture


def annotation(record: Record, class_names: Sequence[str], size: tuple[int, int], filename: str) -> str:
    """A record as VOC XML for a picture of another (width, height), boxes to a thousandth of a pixel."""
    factor = np.array([size[0] / record.width, size[1] / record.height] * 2)
    lines = [
        "<annotation>",
        f"<filename>{escape(filename)}</filename>",
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>",
    ]
    for box, label, difficult in zip(record.boxes * factor, record.labels, record.difficult, strict=True):
        # The devkit's corners count from 1 and are inclusive; ours are pixel edges.
        corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), (box + np.array([1, 1, 0, 0])).tolist(), strict=True))
        bndbox = "".join(f"<{name}>{value:.3f}</{name}>" for name, value in corners.items())
        lines.append(
            f"<object><name>{escape(class_names[label])}</name><difficult>{int(difficult)}</difficult>"
            f"<bndbox>{bndbox}</bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>", ""])


def make(
    out: Path,
    *,
    data: Path | None = None,
    weights: Sequence[Path] = (),
    quality: int = 70,
    max_side: int = 400,
    part_bytes: int = 15 << 20,
    limit: int | None = None,
) -> str:
    """Pack the train and val photos of a VOC year, and files of weights, into parts.

    Args:
        out: folder of the parts and their manifest; those of an earlier archive are replaced.
        data: a VOCdevkit with one year, or the year itself; None packs weights only.
        weights: files that end up in ``weights/``.
        quality: of the photos' JPEG.
        max_side: of the photos, in pixels; boxes are scaled with them.
        part_bytes: largest part.
        limit: only so many photos of each split, for a rehearsal.

    Returns:
        One line about what was packed.

    Raises:
        UsageError: not one VOC folder, or nothing to pack.
        RefineDetError: a bad file, named.
    """
    if data is None and not weights:
        raise UsageError("nothing to pack: give --data, --weights or both")
    if data is not None and len(find_folders(data)) != 1:
        raise UsageError(
            f"{data}: expected one VOC folder (Annotations, JPEGImages, ImageSets/Main), or a VOCdevkit of one"
        )
    for path in weights:
        if not path.is_file():
            raise UsageError(f"{path}: no such file; --weights wants existing files")
    for old in out.glob(f"{ARCHIVE_FILE}.*"):
        old.unlink()
    said = []
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / ARCHIVE_FILE
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
            for path in weights:
                packed.write(path, f"weights/{path.name}")
                said.append(path.name)
            if data is not None:
                said.append(_pack_photos(packed, data, quality, max_side, limit))
        manifest = cut(archive, out, part_bytes)
        size = archive.stat().st_size
    return f"{', '.join(said)}: {size / 2**20:.1f} MiB in {len(manifest.parts)} parts in {out}"


def _pack_photos(packed: zipfile.ZipFile, data: Path, quality: int, max_side: int, limit: int | None) -> str:
    root = f"VOCdevkit/{find_folders(data)[0].root.resolve().name}"
    stems: dict[str, list[str]] = {}
    objects = 0
    for split in SPLITS:
        dataset: DetectionDataset = open_dataset(data, split)
        stems[split] = []
        for index, record in enumerate(dataset.records[:limit]):
            name = str(record.image_id)
            jpeg, picture = shrink(dataset.load_image(index), max_side, quality)
            text = annotation(record, dataset.class_names, picture.size, f"{name}.jpg")
            packed.writestr(f"{root}/JPEGImages/{name}.jpg", jpeg)
            packed.writestr(f"{root}/Annotations/{name}.xml", text, zipfile.ZIP_DEFLATED)
            stems[split].append(name)
            objects += len(record.boxes)
    stems["trainval"] = sorted(name for split in SPLITS for name in stems[split])
    for split, names in stems.items():
        packed.writestr(f"{root}/ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names))
    note = f"re-encoded as JPEG of quality {quality}, at most {max_side} pixels"
    packed.writestr(f"VOCdevkit/{PACK_FILE}", json.dumps({"photos": note, "objects": objects}) + "\n")
    return f"{len(stems['trainval'])} photos with {objects} objects"


def pack_note(data: Path) -> str:
    """What was done to the photos, if ``data`` was unpacked from an archive of ``make``; else an empty string."""
    path = data / PACK_FILE
    return str(read_json(path)["photos"]) if path.exists() else ""


def write_weights(model: RefineDet, folder: Path, part_bytes: int = 15 << 20) -> Manifest:
    """Write a model with float16 kernels, its weights cut into parts; ``join`` makes it loadable again.

    Args:
        model: any device.
        folder: receives config.json, the manifest and the parts.
        part_bytes: largest part.
    """
    with tempfile.TemporaryDirectory() as aside:
        model.save_pretrained(aside, half=True)
        manifest = cut(Path(aside) / WEIGHTS_FILE, folder, part_bytes)
        shutil.copy(Path(aside) / "config.json", folder / "config.json")
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make", help="pack photos and weights into parts")
    maker.add_argument("--data", type=Path)
    maker.add_argument("--weights", type=Path, nargs="*", default=[])
    maker.add_argument("--out", type=Path, required=True)
    maker.add_argument("--quality", type=int, default=70)
    maker.add_argument("--max-side", type=int, default=400)
    maker.add_argument("--limit", type=int, help="photos of each split, for a rehearsal")
    keeper = verbs.add_parser("store", help="keep the parts that have arrived; unpack once all are there")
    keeper.add_argument("folder", type=Path)
    keeper.add_argument("--to", type=Path, required=True)
    writer = verbs.add_parser("weights", help="a model's weights as float16, cut into parts")
    writer.add_argument("run", help="a run folder or a model")
    writer.add_argument("--out", type=Path, required=True)
    for cutter in (maker, writer):
        cutter.add_argument("--part-mib", type=float, default=15, help="largest part, in MiB")
    joiner = verbs.add_parser("join", help="put a cut file together again")
    joiner.add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.verb == "make":
        part_bytes = int(chosen.part_mib * 2**20)
        print(
            make(
                chosen.out,
                data=chosen.data,
                weights=chosen.weights,
                quality=chosen.quality,
                max_side=chosen.max_side,
                part_bytes=part_bytes,
                limit=chosen.limit,
            )
        )
    elif chosen.verb == "store":
        missing = store(chosen.folder, chosen.to)
        print(f"still missing: {', '.join(missing)}" if missing else f"complete, unpacked into {chosen.to}")
    elif chosen.verb == "weights":
        manifest = write_weights(RefineDet.from_pretrained(chosen.run), chosen.out, int(chosen.part_mib * 2**20))
        print(f"{len(manifest.parts)} parts in {chosen.out}")
    else:
        print(join(chosen.folder))
    return 0


if __name__ == "__main__":
    run_main(main)
