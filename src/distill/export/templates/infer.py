"""Detect objects in an image with an exported file: python infer.py student.onnx image.jpg [lowest score].

Needs numpy, Pillow and onnxruntime only. Prints one JSON object per detection.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
classes = json.loads(metadata["classes"])
lowest = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5

with Image.open(sys.argv[2]) as file:
    image = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))  # (height, width, 3) uint8

names = [output.name for output in session.get_outputs()]
found = dict(zip(names, session.run(names, {"image": image}), strict=True))
for number, (box, score, label) in enumerate(zip(found["boxes"], found["scores"], found["labels"], strict=True)):
    if score < lowest:
        continue
    row = {"class": classes[label - 1], "score": float(score), "box": box.tolist()}  # x1, y1, x2, y2 in pixels
    if "masks" in found:
        row["mask_pixels"] = int(found["masks"][number].sum())
    print(json.dumps(row))
