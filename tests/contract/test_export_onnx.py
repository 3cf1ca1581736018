"""Every family as an ONNX file: the detections of the file are those of the detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.detectors.base import Detector
from distill.detectors.detection_rules import RULES, paste_sampled
from distill.detectors.norms import NORMS
from distill.export.exported import ExportedDetector
from distill.export.graphs import Canvas, DenseGraph, paste_sampled_masks
from distill.export.parity import compare_detections
from distill.export.routes import ROUTES, ExportOptions, open_program
from distill.imaging.resizing import ResizeOptions
from distill.types import Detections, DistillError
from helpers.detectors import FAMILIES, random_detector

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZES = ((120, 150), (97, 203), (64, 64), (300, 200))
"""Images that are reduced and enlarged, with and without padding on either side."""
OTHER_DENSE = (("faster_rcnn", 400), ("retinanet", None), ("fcos", 400))
OTHER_OPTIONS = {
    "bgr": {"channel_order": "bgr", "mean": [0.4, 0.5, 0.6]},
    "foreign anchors": {"offset": 0.5, "rounded": False, "order": "size", "step": "nominal"},
    "offset and fitted steps": {"offset": 0.5},
    "foreign regions": {"box_roi_aligned": True, "box_level_rule": "mmdetection", "delta_clamp": "both"},
    "adaptive sampling": {"box_sampling_ratio": 0},
    "linear p7": {"p7_relu": False, "p6_from": "c5"},
    "group norm": {"head_norm": "group", "neck_channels": 64},
    "version 2": {"neck_norm": "batch", "rpn_convs": 2, "box_convs": 4, "head_norm": "batch"},
    "distributions": {"box_head": "distribution", "box_loss": "giou"},
    "distributions of FCOS": {"box_head": "distribution", "distances": "relu"},
}


def picture(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A smooth random image (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, size[0] // 8 + 1, size[1] // 8 + 1, generator=generator)
    return (255 * F.interpolate(coarse, size=size, mode="bilinear")[0]).to(torch.uint8)


def detector_of(family: str, **options: Any) -> Detector:
    # Weights of this size give scores apart from one another. Equal scores would be cut off in any order.
    detector: Detector = random_detector(family, min_size=96, max_size=160, score_thresh=0.0, **options).eval()
    return detector


def assert_equal_detections(detector: Detector, path: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    detect = open_program("onnx", path, detector)(1)
    images = [picture(size) for size in sizes]
    ours = [Detections(image.boxes, image.scores, image.labels, image.masks) for image in detector(images)]
    parity = compare_detections(ours, [detect(image) for image in images])
    assert parity.detections > 20 * len(sizes)
    assert parity.agreement > 0.97, parity  # of RetinaNet's candidates, some scores are equal
    assert parity.pixels < 0.05, parity
    assert parity.score < 1e-3, parity
    assert parity.mask_pixels < 1e-3, parity


def export(detector: Detector, folder: Path, canvas: Canvas | None = None, **options: Any) -> Path:
    chosen = ExportOptions(parts="full" if canvas is None else "dense", **options)
    chosen.check()
    return ROUTES["onnx"].write(detector, chosen, canvas, {"category_ids": {1: 7}}, folder).main


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "name"),
    [  # of an untrained RetinaNet on the small MobileNet, scores are equal, and the file cuts off others of them
        ("faster_rcnn", "timm/resnet18"),
        ("faster_rcnn", "timm/mobilenetv3_small_050"),
        ("retinanet", "timm/resnet18"),
    ],
)
def test_full_file_of_a_timm_backbone(family: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="install distill[timm]")
    detector = detector_of(family, backbone={"name": name, "depth": None, "width": 1.0})
    assert_equal_detections(detector, export(detector, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_file_finds_what_the_detector_finds(family: str, tmp_path: Path) -> None:
    detector = detector_of(family)
    path = export(detector, tmp_path)
    assert_equal_detections(detector, path)
    facts = ExportedDetector(path).facts
    assert facts["classes"] == ["cat", "dog", "owl"]
    assert facts["resize"]["min_size"] == 96
    assert facts["pixels"]["mean"] == [0.485, 0.456, 0.406]
    assert facts["category_ids"] == {"1": 7}
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    "family",
    ["retinanet", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES if name != "retinanet")],
)
def test_an_image_without_detections(family: str, tmp_path: Path) -> None:
    detector = detector_of(family)
    for module in (detector.net, getattr(detector.net, "roi_heads", detector.net)):
        module.score_thresh = 2.0
    found = ExportedDetector(export(detector, tmp_path)).detect(picture((97, 203)))
    assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))
    assert found.masks is None or found.masks.shape == (0, 97, 203)


def options_of(family: str) -> dict[str, dict[str, Any]]:
    known = FAMILIES[family].detector.__init__.__annotations__
    flat = {"channel_order": "pixels", "mean": "pixels", "offset": "anchors", "rounded": "anchors"}
    return {
        name: options
        for name, options in OTHER_OPTIONS.items()
        if not (name == "group norm" and FAMILIES[family].two_stage)  # their heads have none, or batch norms
        and all(flat.get(key, "anchors" if key in ("order", "step") else key) in known for key in options)
    }


def placed(options: dict[str, Any]) -> dict[str, Any]:
    """Flat options of pixels and anchors below their groups."""
    groups = {"pixels": ("channel_order", "mean"), "anchors": ("offset", "rounded", "order", "step")}
    nested = {name: {key: options[key] for key in keys if key in options} for name, keys in groups.items()}
    others = {key: value for key, value in options.items() if not any(key in keys for keys in groups.values())}
    return {**others, **{name: values for name, values in nested.items() if values}}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in options_of(family)])
def test_foreign_options_are_exported(family: str, name: str, tmp_path: Path) -> None:
    detector = detector_of(family, **placed(options_of(family)[name]))
    assert_equal_detections(detector, export(detector, tmp_path))


def test_a_rule_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(DistillError, match=r"--top 5: .*detection_rule=mmdetection"):
        DenseGraph(detector_of("fcos", detection_rule="mmdetection"), Canvas(64, 64), top=5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "torchvision"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_of_other_projects_are_exported(family: str, rule: str, tmp_path: Path) -> None:
    detector = detector_of(family, detection_rule=rule)
    path = export(detector, tmp_path)
    assert_equal_detections(detector, path)
    for module in (detector.net, getattr(detector.net, "roi_heads", detector.net)):
        module.score_thresh = 2.0
    (tmp_path / "none").mkdir()
    assert len(ExportedDetector(export(detector, tmp_path / "none")).detect(picture((97, 203))).boxes) == 0


def test_sampled_masks_are_those_of_the_loop() -> None:
    """`paste_sampled` samples each mask alone. The file computes all at once; boxes reach over the borders."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(40, 1, 28, 28, generator=generator)
    corners = torch.rand(40, 2, generator=generator) * 90 - 15
    boxes = torch.cat([corners, corners + torch.rand(40, 2, generator=generator) * 60], dim=1)
    boxes[0, 2:] = boxes[0, :2]
    expected, found = paste_sampled(cells, boxes, (60, 80)), paste_sampled_masks(cells, boxes, 60, 80)
    assert (expected != found).float().mean() < 1e-4
    assert not found[0].any()
    assert 0.05 < expected[1:].float().mean() < 0.9


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_backbones_are_exported(name: str, tmp_path: Path) -> None:
    detector = detector_of("faster_rcnn", backbone={"name": name, "depth": None, "width": 1.0}, norm="batch")
    assert_equal_detections(detector, export(detector, tmp_path))


@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("opset", [16, 20])
def test_norms_and_operator_sets(norm: str, opset: int, tmp_path: Path) -> None:
    detector = detector_of("retinanet", norm=norm)
    assert_equal_detections(detector, export(detector, tmp_path, opset=opset))


@pytest.mark.parametrize("antialias", [True])
def test_antialias_and_padding_are_exported(antialias: bool, tmp_path: Path) -> None:
    detector = detector_of("retinanet")
    detector.resize = ResizeOptions(antialias, pad_to=64)
    assert_equal_detections(detector, export(detector, tmp_path))


@pytest.mark.parametrize(
    ("family", "top"),
    [
        ("faster_rcnn", None),
        ("retinanet", 400),
        ("fcos", None),
        *(pytest.param(family, top, marks=pytest.mark.exhaustive) for family, top in OTHER_DENSE),
    ],
)
def test_dense_file_in_batches(family: str, top: int | None, tmp_path: Path) -> None:
    """The decoded file has the best candidates of all levels; for these images they include all detections."""
    detector = detector_of(family)
    path = export(detector, tmp_path, Canvas(96, 160), batch="dynamic", top=top)
    exported = ExportedDetector(path, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 96, 160), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[96, 160], [96, 128], [64, 160]], dtype=torch.int32)
    together = exported.run(images, sizes)
    for index in range(3):
        alone = exported.run(images[index : index + 1], sizes[index : index + 1])
        for name in set(together) - {"anchors", "labels"}:
            torch.testing.assert_close(together[name][index], alone[name][0], rtol=1e-4, atol=1e-3)
    blank = images.clone()
    blank[1, :, :, 128:] = 0  # outside of the image
    torch.testing.assert_close(exported.run(blank, sizes), together)
    view = detector.view(_batch(images, sizes), training=False, frozen=True)
    if top is not None and exported.facts["detects"]:
        assert_best_detections(detector, exported)
    if top is None:
        assert_completed(detector, path)
        deltas = torch.cat([_flat(x, 4) for x in view.deltas.values()], dim=1)
        torch.testing.assert_close(together["deltas"], deltas, rtol=1e-4, atol=1e-4)


def assert_completed(detector: Detector, path: Path) -> None:
    """The student's own code after the dense part finds the detections of the student.

    It may find more: an untrained student detects label 0, too, which the file does not have. These detections are
    dropped after they have taken the places of others.
    """
    images = [picture((96, 160)), picture((97, 203))]
    detect = open_program("onnx", path, detector)(1)
    ours = [Detections(image.boxes, image.scores, image.labels) for image in detector(images)]
    parity = compare_detections(ours, [detect(image) for image in images])
    assert parity.detections > 40
    assert parity.missing <= 0.03 * parity.detections, parity
    assert parity.surplus == 0 or "class_logits" in detector.spec.outputs, parity


def assert_best_detections(detector: Detector, exported: ExportedDetector) -> None:
    """The best detections of the detector are among those of a dense file, whose canvas the image fills."""
    image = picture((96, 160))
    (ours,), (found,) = detector([image]), exported([image])
    best = Detections(ours.boxes[:20], ours.scores[:20], ours.labels[:20])
    parity = compare_detections([best], [Detections(found.boxes, found.scores, found.labels)])
    assert parity.detections == 20
    assert parity.missing <= 1, parity  # equal scores


def _flat(x: torch.Tensor, columns: int) -> torch.Tensor:
    return x.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _batch(images: torch.Tensor, sizes: torch.Tensor) -> Any:
    from distill.types import Batch, Target

    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    shapes: Any = tuple(map(tuple, sizes.tolist()))
    return Batch(images, shapes, shapes, (target,) * len(images), tuple(range(len(images))))
