"""RefineDet: a network, its config and its class names in one object that predicts, saves and loads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import numpy as np
import numpy.typing as npt
import torch

from refinedet.config import DEFAULT_THRESHOLD, ModelConfig
from refinedet.detections import Detections, check_threshold
from refinedet.device import pick_device
from refinedet.errors import RefineDetError, UsageError
from refinedet.files import user_path
from refinedet.model.anchors import level_sizes
from refinedet.model.backbones import TimmBackbone
from refinedet.model.network import RefineDetNetwork, count_parameters, evaluation_view
from refinedet.model.padded import PaddedArrays, finish, unpad
from refinedet.model.postprocess import postprocess
from refinedet.prediction import predict_ahead, predict_all
from refinedet.preprocess import preprocess
from refinedet.weights.folder import (
    ModelInfo,
    check_category_ids,
    check_class_names,
    read_card,
    read_model,
    write_model,
)
from refinedet.weights.hub import check_hub_id, hub_card, publish
from refinedet.weights.store import find_model

if TYPE_CHECKING:
    from refinedet.explain import Explanation
    from refinedet.images import ImageSource, PixelSource
    from refinedet.video import Video

_LOG = logging.getLogger(__name__)

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


class RefineDet:
    """A detector: ``network`` (a ``torch.nn.Module``), ``config`` and ``class_names``.

    Args:
        config: the network and its input; weights start from random numbers.
        class_names: one name per class; "class 0", "class 1", ... if not given.
        network: an existing network of that config to wrap, instead of a new one.
        category_ids: the ids that the training data has for the classes, in label order, for results in COCO's format.

    Raises:
        UsageError: the number of names or ids is not the config's number of classes, or a name or id cannot be one.

    Example:
        >>> from refinedet import PRESETS, RefineDet
        >>> RefineDet(PRESETS["voc07-320-vgg16"].model).num_anchors
        6375
    """

    def __init__(
        self,
        config: ModelConfig,
        class_names: Sequence[str] | None = None,
        *,
        network: RefineDetNetwork | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        names = class_names or [f"class {i}" for i in range(config.num_classes)]
        self.class_names = check_class_names(names, config.num_classes)
        self.category_ids = check_category_ids(category_ids, config.num_classes)
        self.metrics: dict[str, Any] = {}
        """What was measured of these weights: figure, data, split, command; kept in config.json."""
        self.untrained: tuple[str, ...] = ()
        """Parts of the network that hold random numbers because the file that was imported lacks them."""
        self.card = ""
        """The text of the model card that the model came with."""
        self._said_untrained = False
        self.network = RefineDetNetwork(config).eval() if network is None else network

    @property
    def num_anchors(self) -> int:
        """Anchors at the config's image size."""
        sizes = level_sizes(*self.config.image_size)
        if self.config.backbone == "timm":
            # Only timm's networks have maps of other sizes than the strides say.
            assert isinstance(self.network.backbone, TimmBackbone)
            sizes = self.network.backbone.level_sizes(*self.config.image_size)
        return sum(rows * columns for rows, columns in sizes) * len(self.config.aspect_ratios)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the network's parameters."""
        return next(self.network.parameters()).dtype

    def __repr__(self) -> str:
        height, width = self.config.image_size
        names = ", ".join(self.class_names[:3]) + (", ..." if len(self.class_names) > 3 else "")
        millions = count_parameters(self.network) / 1e6
        where = f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        return (
            f"RefineDet({self.config.backbone}, {width}x{height}, {len(self.class_names)} classes: {names}; "
            f"{millions:.1f} M parameters, {where})"
        )

    def to(self, device: str | torch.device) -> RefineDet:
        """Move the network; returns self.

        Raises:
            UsageError: there is no such device here.
        """
        self.network.to(pick_device(str(device)))
        return self

    def half(self) -> RefineDet:
        """Turn the network's parameters into float16; returns self. Meant for GPUs."""
        self.network.half()
        return self

    # The type of a path's result depends on the disk, since a folder gives a list: Any lets both be used as they are.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        source: str | os.PathLike[str],
        *,
        threshold: float | None = ...,
        batch_size: int = ...,
        max_pixels: int | None = ...,
        precision: Precision | None = ...,
    ) -> Detections | Any: ...
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        source: PixelSource,
        *,
        threshold: float | None = ...,
        batch_size: int = ...,
        max_pixels: int | None = ...,
        precision: Precision | None = ...,
    ) -> Detections: ...
    @overload
    def predict(
        self,
        source: Iterable[ImageSource | Video] | Video,
        *,
        threshold: float | None = ...,
        batch_size: int = ...,
        max_pixels: int | None = ...,
        precision: Precision | None = ...,
    ) -> list[Detections]: ...
    def predict(
        self,
        source: ImageSource | Video | Iterable[ImageSource | Video],
        *,
        threshold: float | None = DEFAULT_THRESHOLD,
        batch_size: int = 8,
        max_pixels: int | None = None,
        precision: Precision | None = None,
    ) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            source: one image: a path, an http(s) address, the bytes of a file, an open binary file, a Pillow image, a
                NumPy array ((H, W, 3) RGB, also gray, RGBA, uint16) or a torch tensor ((C, H, W) or (H, W, C), uint8 or
                floats in 0..1). Or many: a folder, a pattern such as ``"photos/*.jpg"``, a list, a generator, a video
                (file, address or ``Video``); ``stream`` also takes the number of a camera.
            threshold: lowest score returned; None returns all that post-processing keeps.
            batch_size: images per run of the network; fewer where they are very large.
            max_pixels: largest width times height of an image that is read; ``images.MAX_PIXELS`` if None.
            precision: "bf16" or "fp16" runs the network in mixed precision (autocast), which is faster on a GPU;
                "fp32" and None leave it as it is.

        Returns:
            One ``Detections`` for one image, a list for many, in pixels of each image.

        Raises:
            UsageError: a wrong argument, or a source that is no image.
            RefineDetError: an image cannot be read.

        Example:
            >>> import numpy as np
            >>> from refinedet import PRESETS, RefineDet
            >>> model = RefineDet(PRESETS["smoke"].model)
            >>> model.predict(np.zeros((48, 64, 3), np.uint8)).image_size
            (64, 48)
        """
        model = _AtPrecision(self, precision)
        return predict_all(model, source, threshold=threshold, batch_size=batch_size, max_pixels=max_pixels)

    __call__ = predict

    def stream(
        self,
        sources: ImageSource | Video | int | Iterable[ImageSource | Video],
        *,
        threshold: float | None = DEFAULT_THRESHOLD,
        batch_size: int = 8,
        max_pixels: int | None = None,
        precision: Precision | None = None,
    ) -> Iterator[Detections]:
        """Detect objects in any number of images with flat memory, one ``Detections`` at a time, in order.

        Takes and raises what ``predict`` does; images and frames are decoded ahead in threads. Detections of a frame
        have its ``time`` and number; a video that breaks off raises after its last frame.
        """
        model = _AtPrecision(self, precision)
        for detections, _ in predict_ahead(
            model, sources, threshold=threshold, batch_size=batch_size, max_pixels=max_pixels
        ):
            yield detections

    def predict_arrays(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        threshold: float | None = None,
        sources: Sequence[str | None] | None = None,
        size: tuple[int, int] | None = None,
        precision: Precision | None = None,
    ) -> list[Detections]:
        """Run the network once over all ``images``.

        Args:
            images: (H, W, 3) uint8 RGB each, sizes may differ.
            threshold: lowest score returned; None returns all that post-processing keeps.
            sources: file of each image, for ``Detections.source``.
            size: height and width that the images are warped to instead of ``config.image_size``, multiples of 64;
                anchors keep their pixel sizes.
            precision: see ``predict``.

        Returns:
            Detections in pixels of each image, clipped to it, best first.

        Raises:
            UsageError: a size that is not two multiples of 64.
            RefineDetError: the network's outputs are not finite.
        """
        if not images:
            return []
        height, width = size or self.config.image_size
        if not (height >= 64 and width >= 64 and height % 64 == 0 and width % 64 == 0):
            raise UsageError(f"size must be two multiples of 64, not {size!r}")
        if self.untrained and not self._said_untrained:
            self._said_untrained = True
            _LOG.warning(
                "this model's heads are untrained (%s), so it detects nothing: start a training from it with --init",
                ", ".join(self.untrained),
            )
        inputs = torch.from_numpy(np.stack([preprocess(image, self.config, (height, width)) for image in images]))
        mixed = torch.bfloat16 if precision == "bf16" else torch.float16
        with torch.inference_mode(), torch.autocast(self.device.type, mixed, enabled=precision in ("bf16", "fp16")):
            inputs = inputs.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
            outputs = evaluation_view(self.network)(inputs)
            padded = postprocess(outputs, self.config)
            # Scores that are no numbers pass no threshold, which would read as an image without objects.
            if not bool(outputs.odm_logits.isfinite().all()):
                raise RefineDetError(
                    "the network's outputs are not finite: its weights are ruined, or too large for "
                    f"{str(outputs.odm_logits.dtype).removeprefix('torch.')}"
                )
        arrays = (tensor.cpu().numpy() for tensor in (padded.boxes, padded.scores, padded.labels, padded.counts))
        padded_arrays = PaddedArrays(*arrays)
        results = unpad(padded_arrays, images, (height, width), self.class_names, self.config.inference)
        return finish(results, threshold=threshold, sources=sources)

    def explain(self, source: ImageSource, *, threshold: float = DEFAULT_THRESHOLD) -> Explanation:
        """The steps that lead to the detections of one image, to be drawn or printed, and the time of each stage.

        Args:
            source: one image, as for ``predict``.
            threshold: lowest score of a detection.

        Raises:
            UsageError: a threshold outside 0..1, or a source that is no image.
            RefineDetError: the image cannot be read.

        Example:
            >>> from refinedet import RefineDet
            >>> steps = RefineDet.from_pretrained("voc07-320-resnet18").explain("examples/chelsea.jpg")
            >>> steps.detections.names, sum(steps.tiled)
            (['cat'], 6375)
            >>> steps.save("steps.png").name
            'steps.png'
        """
        from refinedet.explain import explain

        check_threshold(threshold)
        return explain(self, source, threshold=threshold)

    def save_pretrained(self, folder: str | Path, *, card: str | None = None, half: bool = False) -> Path:
        """Write model.safetensors, config.json and, if given, README.md (the model card).

        Args:
            folder: made if missing. It appears, or a model in it is replaced, whole or not at all; other files stay.
            card: text of the model card.
            half: store convolution kernels as float16; norms and biases stay float32.

        Raises:
            RefineDetError: the folder cannot be written to or the disk is full.
        """
        target = user_path(folder)
        state = {
            name: tensor.detach().cpu().contiguous().to(torch.float16 if half and tensor.ndim == 4 else tensor.dtype)
            for name, tensor in self.network.state_dict().items()
        }
        info = ModelInfo(self.config, self.class_names, self.category_ids, self.metrics, self.untrained)
        write_model(target, info, state, card=card)
        return target

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", hub: str | Path | None = None
    ) -> RefineDet:
        """Load a model.

        Args:
            name: a bundled model ("voc07-320-resnet18"), a folder with model.safetensors and config.json, a run
                folder (its best/ is taken, else its last/), or "hf:owner/name" for a model on the Hugging Face hub.
                Only the last uses the network.
            device: where the network goes.
            hub: a folder in the layout of the hub, as ``push_to_hub`` writes it: "hf:owner/name" is looked for there
                and nowhere else.

        Raises:
            UsageError: nothing of that name.
            RefineDetError: a file is missing, damaged, or does not fit its config.
        """
        folder = find_model(name, hub)
        info, network = read_model(folder)
        detector = cls(info.config, info.class_names, network=network, category_ids=info.category_ids)
        detector.metrics, detector.untrained = info.metrics, info.untrained
        detector.card = read_card(folder)
        return detector.to(device)

    def push_to_hub(
        self,
        hub_id: str,
        *,
        hub: str | Path | None = None,
        private: bool = False,
        license: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put the model and a full model card on the Hugging Face hub, or into a local folder of the same layout.

        Args:
            hub_id: "owner/name"; ``from_pretrained("hf:owner/name")`` then gives this model.
            hub: a folder in the layout of the hub; nothing goes over the network.
            private: whether a model that is new on the hub is only seen by its owner.
            license: of the weights, as the hub names licences ("apache-2.0"); default: that of the card it came with.
            token: of the hub; default: that of ``hf auth login``.

        Returns:
            The address on the hub, or the folder of the model.

        Raises:
            UsageError: no id of the hub.
            RefineDetError: it cannot be uploaded or written.

        Example:
            >>> from refinedet import RefineDet
            >>> model = RefineDet.from_pretrained("voc07-320-resnet18")
            >>> folder = model.push_to_hub("me/pets", hub="models")
            >>> RefineDet.from_pretrained("hf:me/pets", hub="models").class_names == model.class_names
            True
        """
        hub_id = check_hub_id(hub_id)
        card = hub_card(hub_id, self.config, self.class_names, self.metrics, earlier=self.card, license=license)
        folder = None if hub is None else user_path(hub)
        return publish(lambda part: self.save_pretrained(part, card=card), hub_id, folder, private=private, token=token)


@dataclass(frozen=True)
class _AtPrecision:
    """A detector whose network runs in one precision."""

    detector: RefineDet
    precision: Precision | None

    def __post_init__(self) -> None:
        if self.precision not in (None, *get_args(Precision)):
            raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}, not {self.precision!r}")

    def predict_arrays(
        self, images: list[npt.NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[Detections]:
        return self.detector.predict_arrays(images, threshold=threshold, precision=self.precision)
