"""Models on the Hugging Face hub, and in a local folder of the same layout; the card that goes with them.

The layout is that of the hub client's cache: ``models--owner--name/snapshots/<commit>/`` holds the files of a model,
and ``models--owner--name/refs/main`` names the commit that counts. So ``HF_HUB_CACHE=folder`` makes it visible to
every program that uses the client.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refinedet.config import ModelConfig
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import failure_reason, make_folder, write_text
from refinedet.text import cut, printable
from refinedet.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

HUB_PREFIX = "hf:"
"""What a name of a model on the Hugging Face hub begins with; nothing else ever reaches the hub."""
_FILES = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE]
_METRICS = {"voc07": "VOC 2007 11-point mAP", "voc": "VOC area mAP", "coco": "COCO AP"}
_LIMITS = """\
The model finds objects of the classes above in photographs like those that it was trained and measured on. It misses
objects, above all small and hidden ones, and takes things for what they are not; on other kinds of images (drawings,
microscopes, other cameras, night) it has not been measured. A score is not a probability: choose the threshold on
images of your own. Nothing that harms or judges people should depend on it alone."""
_WHAT = """\
RefineDet ("Single-Shot Refinement Neural Network for Object Detection", CVPR 2018), a single-shot object detector with
two stages in one network: the first discards easy background and adjusts the anchors, the second classifies the others
and refines their boxes."""
_CITATION = """\
    @inproceedings{zhang2018refinedet,
      title     = {Single-Shot Refinement Neural Network for Object Detection},
      author    = {Zhang, Shifeng and Wen, Longyin and Bian, Xiao and Lei, Zhen and Li, Stan Z.},
      booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
      year      = {2018}
    }"""


def is_hub_id(text: str) -> bool:
    """Whether a text is an id of the hub, "owner/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def check_hub_id(hub_id: str) -> str:
    """The id of a model on the hub, with or without ``hf:``, as the hub has it.

    Raises:
        UsageError: it is none.
    """
    bare = hub_id.removeprefix(HUB_PREFIX)
    if not is_hub_id(bare):
        raise UsageError(f"'{HUB_PREFIX}{bare}': a model on the hub is written {HUB_PREFIX}owner/name")
    return bare


def download(hub_id: str, hub: Path | None = None) -> Path:
    """The folder of a model of the hub.

    Args:
        hub_id: "owner/name".
        hub: a folder in the layout of the hub, in which alone it is looked for.

    Raises:
        UsageError: no id of the hub, or the folder does not have the model.
        RefineDetError: it cannot be downloaded.
    """
    check_hub_id(hub_id)
    from huggingface_hub import snapshot_download

    if hub is not None:
        try:
            return Path(snapshot_download(hub_id, cache_dir=hub, local_files_only=True, allow_patterns=_FILES))
        except Exception:
            raise UsageError(f"{hub}: holds no model '{hub_id}' in the layout of the hub") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except Exception as error:
        # The hub's client raises HTTP, cache and name errors of its own and of two libraries; all mean the same here.
        raise RefineDetError(f"'{hub_id}' could not be downloaded from the hub ({type(error).__name__})") from None


def publish(save: Callable[[Path], object], hub_id: str, hub: Path | None, *, private: bool, token: str | None) -> str:
    """Put a model on the hub, or into a local folder of its layout; see ``RefineDet.push_to_hub``.

    Args:
        save: writes the files of the model into a folder.
        hub_id: "owner/name".
        hub: the local folder, if it is to go there.
        private: as in ``push_to_hub``.
        token: as in ``push_to_hub``.

    Raises:
        RefineDetError: it cannot be uploaded or written.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        if hub is not None:
            return str(store_locally(Path(folder), hub_id, hub))
        return upload(Path(folder), hub_id, private=private, token=token)


def upload(folder: Path, hub_id: str, *, private: bool, token: str | None) -> str:
    """Upload the folder of a model; returns its address.

    Raises:
        RefineDetError: no network, no permission, or the hub refuses it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=folder, allow_patterns=_FILES, commit_message="Upload of refinedet"
        )
    except Exception as error:
        raise RefineDetError(
            f"'{hub_id}' could not be uploaded ({type(error).__name__}); log in with 'hf auth login', or give a token "
            "that may write"
        ) from None
    return f"https://huggingface.co/{hub_id}"


def store_locally(folder: Path, hub_id: str, hub: Path) -> Path:
    """Put the folder of a model into a folder in the layout of the hub; returns where it lies.

    It is there whole or not at all, and the models that were there before stay, as earlier commits.

    Raises:
        RefineDetError: the folder cannot be written to or the disk is full.
    """
    model = hub / f"models--{hub_id.replace('/', '--')}"
    content = hashlib.sha1(usedforsecurity=False)
    for name in _FILES:
        content.update(hashlib.sha256((folder / name).read_bytes()).digest())
    target = make_folder(model / "snapshots") / content.hexdigest()
    try:
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=model, prefix=".part-") as part:
                for name in _FILES:
                    shutil.copyfile(folder / name, Path(part, name))
                os.chmod(part, 0o755)
                os.replace(part, target)
                os.mkdir(part)  # for TemporaryDirectory, which removes it
    except OSError as error:
        raise RefineDetError(f"{target}: cannot be written ({failure_reason(error)})") from None
    write_text(model / "refs" / "main", target.name)
    return target


def hub_card(
    hub_id: str, config: ModelConfig, class_names: Sequence[str], metrics: dict[str, Any], *,
    earlier: str, license: str | None,
) -> str:  # fmt: skip
    """The card of a model on the hub, with figures in the form that the hub reads.

    Args:
        hub_id: "owner/name".
        config: of the model.
        class_names: in label order.
        metrics: what was measured: "mAP", "metric", "data", "split", "images", "command", as far as it is known.
        earlier: the card that the model had; what it says on measurement, training and licence is taken over.
        license: of the weights, as the hub names licences ("apache-2.0").
    """
    from huggingface_hub import ModelCardData

    name = hub_id.partition("/")[2]
    license = license or next(iter(re.findall(r"^license: *(\S+)$", earlier, re.MULTILINE)), None)
    data = ModelCardData(
        library_name="refinedet",
        pipeline_tag="object-detection",
        tags=["object-detection", "refinedet", config.backbone],
        license=license,
        **_results(name, metrics),
    )
    return f"""---
{data.to_yaml()}
---

# {name}

{_WHAT}

{_facts(config, class_names)}

## Use

    from refinedet import RefineDet
    model = RefineDet.from_pretrained("{HUB_PREFIX}{hub_id}")
    print(model.predict("photo.jpg", threshold=0.5).table())

On the command line: `refinedet predict {HUB_PREFIX}{hub_id} photo.jpg --save drawn`.

## Measured

{_section(earlier, "Measured") or _figure(metrics)}

## Training

{_section(earlier, "Training") or "Not recorded."}

## Intended use and limits

{_LIMITS}

## Citation

{_CITATION}
"""


def _facts(config: ModelConfig, class_names: Sequence[str]) -> str:
    """A table of what goes in and what comes out."""
    height, width = config.image_size
    inference = config.inference
    mean, std = _numbers(config.mean), _numbers(config.std)
    names = cut(printable(", ".join(class_names)), 2000).replace("|", "&#124;")
    rows = {
        "backbone": config.timm_name or config.backbone,
        "input": f"an image of any size, resized to {width} x {height} pixels; {config.channel_order.upper()}, "
        f"mean {mean}, std {std}",
        "output": f"boxes (x1, y1, x2, y2 in pixels of the image), scores and labels; at most "
        f"{inference.max_detections} for an image",
        "suppression": f"IoU {inference.nms_iou:g} within a class, scores above {inference.score_threshold:g}",
        "classes": f"{len(class_names)}: {names}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _figure(metrics: dict[str, Any]) -> str:
    if "mAP" not in metrics:
        return "Not evaluated."
    where = ", ".join(str(metrics[key]) for key in ("data", "split") if metrics.get(key))
    measure = _METRICS.get(metrics.get("metric", ""), "mAP")
    command = f"\n\n    {metrics['command']}" if metrics.get("command") else ""
    return f"{measure} {100 * metrics['mAP']:.2f} on {where or 'its data'}.{command}"


def _results(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """The figure as the hub's "model-index"."""
    from huggingface_hub import EvalResult

    if "mAP" not in metrics:
        return {}
    data, split = str(metrics.get("data") or "unknown"), metrics.get("split")
    result = EvalResult(
        task_type="object-detection",
        dataset_type=re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "unknown",
        dataset_name=f"{data}, {split}" if split else data,
        metric_type="mAP",
        metric_name=_METRICS.get(metrics.get("metric", ""), "mAP"),
        metric_value=round(100 * float(metrics["mAP"]), 2),
    )
    return {"model_name": name, "eval_results": [result]}


def _section(card: str, title: str) -> str:
    """The text of a section of a card; empty if there is none."""
    found = re.search(rf"^## {title}\n+(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
