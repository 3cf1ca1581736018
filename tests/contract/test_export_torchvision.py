"""Every family in plain torchvision: the lines of `--to torchvision` build the same detector."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.detectors.base import Detector
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.student_files import save_student
from distill.export.parity import compare_detections
from distill.export.torchvision_code import detect_with_torchvision, torchvision_code, torchvision_state
from distill.imaging.resizing import ResizeOptions
from distill.types import Detections, DistillError
from helpers.detectors import FAMILIES, random_detector

CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "bgr": ("faster_rcnn", {"pixels": {"channel_order": "bgr", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}),
    "another epsilon": ("faster_rcnn", {"norm_eps": 1e-2}),
    "epsilon 0": ("retinanet", {"norm_eps": 0.0}),
    "version 2 of Faster R-CNN": (
        "faster_rcnn",
        {"neck_norm": "batch", "rpn_convs": 2, "box_convs": 2, "head_norm": "batch"},
    ),
    "version 2 of Mask R-CNN": ("mask_rcnn", {"neck_norm": "batch", "head_norm": "batch"}),
    "version 2": ("retinanet", {"head_norm": "group", "p6_from": "c5", "neck_channels": 64}),
}
DAILY = (*FAMILIES, "bgr", "another epsilon")


def plain_detector(family: str, **options: Any) -> Detector:
    settings = {"depth": 10, "width": 1.0, "min_size": 96, "max_size": 160, "score_thresh": 0.0, **options}
    detector: Detector = random_detector(family, **settings).eval()
    for name, buffer in detector.named_buffers():  # statistics of an untrained norm would hide a wrong epsilon
        if name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return detector


@pytest.mark.parametrize(
    "case", [case if case in DAILY else pytest.param(case, marks=pytest.mark.exhaustive) for case in CONVERTED]
)
def test_torchvision_finds_what_the_detector_finds(case: str, tmp_path: Path) -> None:
    family, options = CONVERTED[case]
    detector = plain_detector(family, **options)
    torch.save(torchvision_state(detector), tmp_path / "weights.pt")
    names: dict[str, Any] = {}
    exec(torchvision_code(detector, str(tmp_path / "weights.pt")), names)
    # torchvision resizes in float32, so these images need no resize
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        for seed, size in enumerate([(96, 128), (96, 160)])
    ]
    ours = [Detections(*found[:3], found.masks) for found in detector(images)]
    detect = detect_with_torchvision(names["net"])
    parity = compare_detections(ours, [detect(image) for image in images])
    assert parity.detections > 40
    assert parity.agreement > 0.97, parity
    assert parity.pixels < 0.05, parity
    assert parity.mask_pixels < 1e-3, parity


def test_three_lines_of_the_documentation_load_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(list(filter(None, code.splitlines()))) == 3
    torch.manual_seed(0)
    student = FasterRCNN(["cat", "dog", "owl"])
    save_student(student, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for net in (student.net.eval(), names["net"].eval()):
        net.transform.min_size, net.roi_heads.score_thresh = (64,), 0.0
        with torch.no_grad():
            found.append(net([image])[0])
    assert len(found[0]["boxes"])
    for name in ("scores", "boxes"):
        torch.testing.assert_close(found[1][name], found[0][name])


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("faster_rcnn", {"width": 0.5}, "backbone.width=0.5"),
        ("faster_rcnn", {"box_roi_aligned": True}, "box_roi_aligned=True"),
        ("faster_rcnn", {"offset": 0.5}, "anchors.offset=0.5"),
        ("retinanet", {"p7_relu": False}, "p7_relu=False"),
        ("retinanet", {"p6_from": "lateral"}, "p6_from=lateral"),
        ("retinanet", {"head_norm": "group_bias", "neck_channels": 64}, "head_norm=group_bias"),
        ("fcos", {"detection_rule": "mmdetection"}, "detection_rule=mmdetection"),
    ],
)
def test_settings_that_torchvision_lacks_are_named(family: str, options: dict[str, Any], named: str) -> None:
    anchors = {"anchors": options} if "offset" in options else options
    with pytest.raises(DistillError, match=named):
        torchvision_code(plain_detector(family, **anchors), "student.pt")


def test_another_resize_is_named() -> None:
    detector = plain_detector("retinanet")
    detector.resize = ResizeOptions(antialias=True, pad_to=64)
    with pytest.raises(DistillError, match=r"data\.antialias=true, data\.pad_to=64"):
        torchvision_code(detector, "student.pt")
