"""Reading .caffemodel files: the protobuf wire format, by a minimal schema of our own.

Only the fields that carry weights are described (numbers and names from the public definition of Caffe's format); all
others are skipped. Both the current form (``layer``) and the older one (``layers``, blobs with num, channels, height
and width) are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refinedet.errors import RefineDetError

_FIELDS: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    # message: (field, number, type, repeated)
    "BlobShape": (("dim", 1, "int64", True),),
    "BlobProto": (
        ("num", 1, "int32", False),
        ("channels", 2, "int32", False),
        ("height", 3, "int32", False),
        ("width", 4, "int32", False),
        ("data", 5, "float", True),
        ("shape", 7, "BlobShape", False),
        ("double_data", 8, "double", True),
    ),
    "ConvolutionParameter": (("dilation", 18, "uint32", True),),
    "LayerParameter": (
        ("name", 1, "string", False),
        ("blobs", 7, "BlobProto", True),
        ("convolution_param", 106, "ConvolutionParameter", False),
    ),
    "V1LayerParameter": (("name", 4, "string", False), ("blobs", 6, "BlobProto", True)),
    "NetParameter": (
        ("name", 1, "string", False),
        ("layers", 2, "V1LayerParameter", True),
        ("layer", 100, "LayerParameter", True),
    ),
}


@dataclass(frozen=True)
class CaffeModel:
    """The weights of a .caffemodel."""

    blobs: dict[str, Tensor]
    """float32 tensors by "layer[index]", in the order of the file; the legacy 1 x 1 x 1 x N is a vector."""
    dilations: dict[str, int]
    """Dilation of the convolutions whose layer states one."""


@lru_cache(maxsize=1)
def _message_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="weights", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = described.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in _FIELDS:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".weights.{kind}"
            else:
                # A parser accepts packed and unpacked numbers alike, so the schema need not say which.
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weights.NetParameter"))


def read_caffemodel(path: Path) -> CaffeModel:
    """The weights of a .caffemodel file.

    Raises:
        RefineDetError: missing, cut, corrupt, or a file of another kind.
    """
    from google.protobuf.message import DecodeError

    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefineDetError(f"{path}: cannot be read ({error.strerror})") from None
    net = _message_class()()
    try:
        net.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError, ValueError):
        raise RefineDetError(f"{path}: not a readable .caffemodel file (cut, corrupt, or of another kind)") from None
    blobs: dict[str, Tensor] = {}
    dilations: dict[str, int] = {}
    for layer in (*net.layers, *net.layer):
        for index, blob in enumerate(layer.blobs):
            key = f"{layer.name}[{index}]"
            if key in blobs:
                raise RefineDetError(f"{path}: two layers with weights are called '{layer.name}'")
            blobs[key] = _tensor(blob, key, path)
        if hasattr(layer, "convolution_param") and layer.convolution_param.dilation:
            dilations[layer.name] = layer.convolution_param.dilation[0]
    if not blobs:
        raise RefineDetError(
            f"{path}: no layer with weights in it; a .caffemodel file is wanted (not .prototxt or .solverstate)"
        )
    return CaffeModel(blobs, dilations)


def _tensor(blob: Any, key: str, path: Path) -> Tensor:
    numbers = np.array(blob.data if blob.data else blob.double_data, dtype=np.float32)
    legacy = (blob.num, blob.channels, blob.height, blob.width)
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else legacy
    if min(shape, default=1) < 0 or math.prod(shape) != numbers.size:
        raise RefineDetError(f"{path}: '{key}' says it has shape {shape} but holds {numbers.size} numbers")
    if shape[:3] == (1, 1, 1):
        shape = shape[3:]
    return torch.from_numpy(numbers).reshape(shape)
