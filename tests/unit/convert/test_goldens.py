"""Detectors of other projects against numbers that those projects' own programs computed.

The numbers are not part of this repository: DISTILL_TEST_FORMATS names their folder.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.detectors.registry import load_detector
from distill.types import Batch, Target

FOLDER = os.environ.get("DISTILL_TEST_FORMATS")
FILES = sorted(Path(FOLDER).glob("*_fpn*.json")) if FOLDER else []


def filled(entries: list[Any], phase: int, adjust: list[Any]) -> dict[str, Tensor]:
    """The state dict that `fill.text` describes."""
    state = {}
    for name, shape, dtype in entries:
        count = int(np.prod(shape))
        seed = zlib.crc32(f"{phase}:{name}".encode())
        x = (np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(seed)) & np.uint64(0xFFFFFFFF)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x ^= x >> np.uint64(shift)
            x = (x * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        u = x.astype(np.float64) / 2**31 - 1
        if name.endswith("num_batches_tracked"):
            u = u * 0
        elif name.endswith("running_var"):
            u = 1 + 0.3 * u
        elif name.endswith("running_mean"):
            u = 0.2 * u
        elif name.endswith("bias"):
            u = 0.1 * u
        elif not shape:
            u = 1 + 0.2 * u
        elif len(shape) == 1:
            u = 0.8 + 0.2 * u
        else:
            u = 1.2 * np.sqrt(3 / np.prod(shape[1:])) * u
        for pattern, factor, term in adjust:
            if re.search(pattern, name):
                u = u * factor + term
                break
        kind = torch.int64 if dtype == "int64" else torch.float32
        state[name] = torch.from_numpy(u).to(kind).reshape(shape)
    return state


def image(height: int, width: int) -> Tensor:
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    t = (2 * x * (c + 1) + y * (3 - c)) % 512
    t = np.where(t > 255, 511 - t, t)
    pixels = 3 * t // 4 + 64 * ((x // 16 + y // 16 + c) % 2)
    return torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)


def content(golden: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """What the project's own checkpoint holds."""
    if golden["format"] == "detectron2":
        return {"model": state, "iteration": 0}
    config = golden["config"]
    meta = {"cfg": f"model = {config!r}\n", "mmengine_version": "0.10.7"}
    return {"meta": meta, "state_dict": state}


def yaml_of(golden: Mapping[str, Any]) -> str:
    """The part of Detectron2's configuration that the golden file records."""
    config = golden["config"]
    model = {"PIXEL_MEAN": config["pixel_mean"], "PIXEL_STD": config["pixel_std"], "RESNETS": config["resnets"]}
    names = ("fpn", "anchor_generator", "rpn", "roi_heads", "roi_box_head", "roi_mask_head", "retinanet")
    model |= {name.upper(): config[name] for name in names if name in config}
    return (
        "MODEL:\n"
        + "\n".join(f"  {name}: {json.dumps(value)}" for name, value in model.items())
        + (f"\nINPUT: {{FORMAT: {config['input_format']}}}\n")
    )


class Differences:
    """The largest difference of each kind, and its tolerance."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, kind: str, value: float, tolerance: float) -> None:
        self.found[kind] = (max(value, self.found.get(kind, (0.0, 0.0))[0]), tolerance)

    def compare(self, kind: str, actual: Any, expected: Any, tolerance: float) -> None:
        actual, expected = (torch.as_tensor(part, dtype=torch.float64) for part in (actual, expected))
        assert actual.shape == expected.shape, kind
        self.add(kind, float((actual - expected).abs().max()) if actual.numel() else 0.0, tolerance)

    def sampled(self, kind: str, actual: Tensor, expected: Mapping[str, Any], tolerance: float = 1e-4) -> None:
        assert list(actual.shape) == expected["shape"], kind
        flat = actual.contiguous().flatten().double()
        at = [(k * 7919 + 13) % len(flat) for k in range(16)]
        self.compare(kind, flat[at], expected["at"], tolerance)
        statistics = [flat.mean(), flat.std(correction=0)]
        self.compare(kind, statistics, [expected["mean"], expected["std"]], tolerance)


@pytest.mark.skipif(not FOLDER, reason="DISTILL_TEST_FORMATS is not set: it names the folder of numbers")
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "bare"])
def test_reproduces_the_original_program(path: Path, with_config: bool, tmp_path: Path) -> None:
    golden = json.loads(path.read_text())
    state = filled(golden["state_dict"]["entries"], golden["fill"]["phase"], golden["fill"]["adjust"])
    for name, values in golden["fill"]["check_first_values"].items():
        assert state[name].flatten()[: len(values)].tolist() == pytest.approx(values, rel=1e-7)
    file, record = tmp_path / f"{path.stem}.pth", content(golden, state)
    if not with_config:
        record = {"model": state} if golden["format"] == "detectron2" else {"state_dict": state}
    elif golden["format"] == "detectron2":
        (tmp_path / "config.yaml").write_text(yaml_of(golden))
    torch.save(record, file)
    with pytest.warns(UserWarning, match="read as"):
        detector = load_detector(file)
    size = (golden["image"]["H"], golden["image"]["W"])
    canvas = torch.zeros(1, 3, 160, 256, dtype=torch.uint8)
    canvas[0, :, : size[0], : size[1]] = image(*size)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    view: Any = detector.eval().view(Batch(canvas, (size,), (size,), (empty,), (0,)), training=False, frozen=True)
    found = compared(view, golden["expected"], golden)
    print(f"\n{path.stem}: " + ", ".join(f"{kind} {value:.2g} / {limit:g}" for kind, (value, limit) in found.items()))
    assert {kind: pair for kind, pair in found.items() if pair[0] > pair[1]} == {}


def compared(view: Any, expected: Mapping[str, Any], golden: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    differences = Differences()
    differences.sampled("input", view.images, expected["input"])
    for name, stage in expected["backbone"].items():
        differences.sampled("backbone", dict(zip(expected["backbone"], view.body.values(), strict=True))[name], stage)
    for (_, stage), actual in zip(expected["fpn"].items(), view.neck.values(), strict=True):
        differences.sampled("fpn", actual, stage)
    for (_, level), stride in zip(expected["rpn"].items(), view.neck, strict=True):
        differences.sampled("objectness", view.objectness[stride], level["objectness"])
        differences.sampled("rpn deltas", view.deltas[stride], level["deltas"])
        anchors = view.anchors[stride]
        assert len(anchors) == level["num_anchors"]
        differences.compare("anchors", anchors[:6], level["anchors_first6"], 1e-4)
        differences.compare("anchors", anchors[-3:], level["anchors_last3"], 1e-4)
    proposals = view.proposals[0]
    differences.add("proposal count", abs(len(proposals) - expected["proposals"]["count"]), 0)
    differences.compare("proposals", proposals[:25], expected["proposals"]["top_boxes"], 0.01)
    roi = expected["roi"]
    boxes = [torch.tensor(roi["boxes"])]
    differences.sampled("pooled", view.roi_features(boxes), roi["pooled"])
    logits, deltas = view.roi_logits(boxes)
    differences.compare("class logits", torch.cat([logits[:, 1:], logits[:, :1]], 1), roi["class_logits"], 1e-3)
    differences.compare("box deltas", deltas[:, 4:], roi["box_deltas"], 1e-3)
    found, wanted = view.detections[0], expected["detections"]
    differences.add("detection count", abs(len(found.boxes) - wanted["count"]), 0)
    assert found.labels.tolist() == [label + 1 for label in wanted["labels"]]
    differences.compare("detection boxes", found.boxes, wanted["boxes"], 0.01)
    differences.compare("detection scores", found.scores, wanted["scores"], 1e-4)
    return differences.found
