"""Metadata of an exported file: all facts that a program without distill needs to use the file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from distill import __version__
from distill.detectors.base import Detector
from distill.types import DistillError

FORMAT = 1
"""Version of this set of keys."""
INPUTS = {
    "full": "image: (height, width, 3) uint8 RGB, upright, of any size",
    "dense": "images: (batch, 3, H, W) uint8 RGB, resized and in the upper left corner; sizes: (batch, 2) int32, "
    "height and width of each resized image",
}
RULES = {
    "ratio": "scale = min(min_size / shorter side, max_size / longer side); each side is rounded down",
    "square": "both sides become min(min_size, max_size)",
}
"""Shape of the resize, see `ResizeOptions` -> the rule."""
OUTPUTS = {
    "boxes": "boxes: x1, y1, x2, y2 in pixels of the {frame} image",
    "scores": "scores: from 0 to 1, best first",
    "labels": "labels: from 1; classes[label - 1] is the name",
    "masks": "masks: (N, height, width) bool",
    "logits": "logits: (batch, N, K) before the sigmoid, anchor by anchor or query by query",
    "query_boxes": "query_boxes: (batch, Q, 4) x1, y1, x2, y2 in pixels of `sizes`",
    "deltas": "deltas: (batch, N, 4), relative to the anchors",
    "centerness": "centerness: (batch, N, 1) before the sigmoid",
    "anchors": "anchors: (N, 4) x1, y1, x2, y2 in pixels of the resized image",
}


def describe_file(
    detector: Detector,
    parts: str,
    outputs: list[str],
    extra: Mapping[str, Any],
    license_text: str,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts about an exported file, in plain containers.

    Args:
        detector: the exported detector.
        parts: ``full`` or ``dense``.
        outputs: names of the outputs, in order.
        extra: the further facts in the student's description, such as its category ids.
        license_text: the license of the weights.
        further: facts of this route, such as the canvas.
    """
    options = detector.options
    frame = "given" if parts == "full" else "resized"
    packages = ("distill", "torch", "torchvision")
    return {
        "format": FORMAT,
        "producer": f"distill {__version__}",
        "task": "object-detection",
        "family": detector.family,
        "parts": parts,
        "input": INPUTS[parts],
        "outputs": [OUTPUTS[name].format(frame=frame) for name in outputs],
        "classes": list(detector.classes),
        "category_ids": dict(extra.get("category_ids", {})),
        "resize": {
            "min_size": options["min_size"],
            "max_size": options["max_size"],
            "rule": RULES[detector.resize.shape],
            "interpolation": "bilinear",
            **detector.resize._asdict(),
        },
        "pixels": {**options["pixels"], "scale": "pixel / 255"},
        "score_threshold": options.get("score_thresh"),
        "nms_threshold": options.get("nms_thresh"),
        "detections_per_image": options.get("detections_per_img"),
        "license": license_text,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **further,
    }


def to_strings(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as texts: other values than texts are JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def from_strings(texts: Mapping[str, str], where: str) -> dict[str, Any]:
    """The facts of `to_strings`.

    Raises:
        DistillError: the file was not written by `distill export`, or by a newer version.
    """
    facts: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            facts[name] = json.loads(text)
        except ValueError:
            facts[name] = text
    if not isinstance(facts.get("format"), int) or not isinstance(facts.get("classes"), list):
        raise DistillError(
            f"{where}: its metadata names no classes. Expected a file that 'distill export' wrote; export the run again"
        )
    if facts["format"] > FORMAT:
        raise DistillError(f"{where}: written by a newer version of distill ({facts.get('producer')}); update distill")
    return facts
