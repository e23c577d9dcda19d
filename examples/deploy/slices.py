"""Small objects in large images: a model looks at overlapping slices, and supervision or SAHI merges what it finds.

python slices.py deploy/model.onnx large.jpg

``Sliced(model)`` is a detector like the model itself, so ``refinedet.evaluate`` takes it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refinedet import Detections
from refinedet.images import read_image
from refinedet.loading import load_detector


def by_supervision(model: Any, image: Any, side: int, overlap: int, threshold: float | None) -> tuple[Any, Any, Any]:
    """Boxes, scores and labels of the slices and of the whole image, by ``supervision.InferenceSlicer``."""
    import supervision as sv

    def look(part: Any) -> sv.Detections:
        return model.predict_arrays([np.ascontiguousarray(part)], threshold=threshold)[0].to_supervision()

    iou = model.config.inference.nms_iou
    slicer = sv.InferenceSlicer(look, slice_wh=(side, side), overlap_wh=(overlap, overlap), iou_threshold=iou)
    merged = sv.Detections.merge([slicer(image), look(image)]).with_nms(threshold=iou)
    return merged.xyxy, merged.confidence, merged.class_id


def by_sahi(model: Any, image: Any, side: int, overlap: int, threshold: float | None) -> tuple[Any, Any, Any]:
    """The same by SAHI; merged by non-maximum suppression as well, not by its default, which joins boxes."""
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
    from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list

    class Adapter(DetectionModel):
        def set_model(self, model: Any, **_: Any) -> None:
            self.model = model

        def perform_inference(self, image: Any) -> None:
            self._original_predictions = self.model.predict_arrays([image], threshold=threshold)[0]

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            where = {
                "shift_amount": fix_shift_amount_list(shift_amount_list or [0, 0])[0],
                "full_shape": full_shape_list and fix_full_shape_list(full_shape_list)[0],
            }
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(one.box.tolist(), one.label, one.name, score=one.score, **where)
                    for one in self._original_predictions
                ]
            ]

    found = get_sliced_prediction(
        image,
        Adapter(model=model, device="cpu", confidence_threshold=0.0),
        slice_height=side,
        slice_width=side,
        overlap_height_ratio=overlap / side,
        overlap_width_ratio=overlap / side,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        postprocess_match_threshold=model.config.inference.nms_iou,
        verbose=0,
    ).object_prediction_list
    boxes = np.array([one.bbox.to_xyxy() for one in found]).reshape(-1, 4)
    return boxes, np.array([one.score.value for one in found]), np.array([one.category.id for one in found])


class Sliced:
    """A model that looks at slices of each image and at the whole image.

    Args:
        model: a ``RefineDet`` or ``Runtime``.
        find: what cuts and merges, ``by_supervision`` or ``by_sahi``.
        side: of a slice in pixels: objects in it should have the sizes that the model was trained on.
        overlap: of neighbouring slices in pixels, at least the size of the small objects.
    """

    def __init__(
        self,
        model: Any,
        find: Callable[..., tuple[Any, Any, Any]] = by_supervision,
        *,
        side: int = 640,
        overlap: int = 128,
    ) -> None:
        self.model, self.find, self.side, self.overlap = model, find, side, overlap
        self.config, self.class_names = model.config, model.class_names

    def predict_arrays(self, images: Sequence[Any], *, threshold: float | None = None) -> list[Detections]:
        """Detections of each (H, W, 3) uint8 RGB image, the best first."""
        return [self._predict(image, threshold) for image in images]

    def _predict(self, image: Any, threshold: float | None) -> Detections:
        boxes, scores, labels = self.find(self.model, image, self.side, self.overlap, threshold)
        order = np.argsort(-scores, kind="stable")
        return Detections(
            boxes=boxes[order].astype(np.float32),
            scores=scores[order].astype(np.float32),
            labels=labels[order].astype(np.int64),
            class_names=self.class_names,
            image_size=(image.shape[1], image.shape[0]),
        )


if __name__ == "__main__":
    name, file = sys.argv[1:]
    print(Sliced(load_detector(name)).predict_arrays([read_image(file)], threshold=0.5)[0].table())
