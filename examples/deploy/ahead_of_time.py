"""Compile a detector ahead of time: by AOTInductor (.pt2) or for ExecuTorch (.pte), and compare it with PyTorch.

python ahead_of_time.py voc07-320-resnet18 model.pt2 photo.jpg other.jpg
python ahead_of_time.py voc07-320-resnet18 model.pte photo.jpg other.jpg

The result of AOTInductor takes any batch and needs torch and a C++ compiler; that of ExecuTorch takes batch 1 and needs
the package executorch, here with the kernels of XNNPACK. AOTInductor does not check the strides of its input: images
must be contiguous, those that it is compiled with as well, or pixels are read from wrong places without an error.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refinedet import RefineDet
from refinedet.deploy.graph import DetectorGraph
from refinedet.images import read_image
from refinedet.runtime import graph_inputs


def compile_by_inductor(graph: torch.nn.Module, images: torch.Tensor, file: str) -> Callable[[torch.Tensor], Any]:
    """Write a .pt2 package; returns what runs it."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = images[:1].repeat(2, 1, 1, 1)  # a batch of one would become a constant
    program = torch.export.export(graph, (example,), dynamic_shapes={"images": {0: batch}})
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=file))


def compile_for_executorch(graph: torch.nn.Module, images: torch.Tensor, file: str) -> Callable[[torch.Tensor], Any]:
    """Write a .pte program; returns what runs it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(torch.export.export(graph, (images[:1],)), partitioner=[XnnpackPartitioner()])
    Path(file).write_bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(file).load_method("forward")
    return lambda values: method.execute([values])


if __name__ == "__main__":
    name, file, *photos = sys.argv[1:]
    model = RefineDet.from_pretrained(name)
    graph = DetectorGraph(model).eval()
    images = torch.from_numpy(graph_inputs([read_image(photo) for photo in photos], model.config, "float32"))
    images = images.clone(memory_format=torch.contiguous_format)
    inductor = file.endswith(".pt2")
    with torch.no_grad():
        run = (compile_by_inductor if inductor else compile_for_executorch)(graph, images, file)
        for batch in [images, images[:1]] if inductor else images.split(1):
            boxes, scores, labels, counts = run(batch)[:4]
            expected_boxes, expected_scores, expected_labels, _ = graph(batch)[:4]
            print(
                f"{file}, batch {len(batch)}: {int(counts.sum())} detections, boxes within "
                f"{float((boxes - expected_boxes).abs().max()):.2g} px, scores within "
                f"{float((scores - expected_scores).abs().max()):.2g}, "
                f"labels equal: {bool((labels == expected_labels).all())}"
            )
