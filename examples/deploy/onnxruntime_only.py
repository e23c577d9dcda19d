"""Detect objects with an exported file without this package: ONNX Runtime, NumPy and Pillow.

python onnxruntime_only.py deploy/model.onnx photo.jpg

For models whose images are resized bilinearly, the default.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
facts = json.loads(session.get_modelmeta().custom_metadata_map["refinedet"])
height, width = facts["model"]["image_size"]
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
scale = np.array([photo.width / width, photo.height / height] * 2)
# Four pixels with half-pixel centres, as cv2.INTER_LINEAR; Image.resize would average over more when it shrinks.
# Channels of floating point, since those of bytes are rounded.
matrix, bilinear = (scale[0], 0, 0, 0, scale[1], 0), Image.Resampling.BILINEAR
channels = [
    channel.convert("F").transform((width, height), Image.Transform.AFFINE, matrix, bilinear)
    for channel in photo.split()
]
pixels = np.stack(channels, axis=-1)[None]
images = np.rint(pixels).astype("uint8") if facts["input_type"] == "uint8" else pixels
boxes, scores, labels, counts, settled, finite = session.run(None, {"images": images})
if not (settled.all() and finite.all()):
    sys.exit("no answer: see `settled` and `finite` in docs/deploy.md")
corners = np.clip(boxes[0] * scale, 0, [photo.width, photo.height] * 2)
for box, score, label in zip(corners, scores[0], labels[0], strict=True):
    if score >= 0.5:  # rows of padding score 0
        print(facts["class_names"][label], f"{score:.3f}", *(f"{side:.1f}" for side in box))
