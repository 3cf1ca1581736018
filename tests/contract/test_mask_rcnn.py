"""Mask R-CNN: equal to torchvision's bit for bit, and lazy: who reads boxes never pays for masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import detection, resnet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.roi_heads import maskrcnn_inference, paste_masks_in_image

from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.mask_rcnn import MaskRCNN
from distill.detectors.registry import load_detector
from distill.detectors.retinanet import RetinaNet
from distill.detectors.student_files import save_student
from distill.types import Batch, DistillError, Target
from helpers.detectors import nested

SIZES = ((96, 64), (70, 100), (128, 90))
FEW = {
    "rpn_pre_nms_top_n_train": 60,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 30,
    "head_channels": 32,
}


def enlarge(layer: Any, weight: float, bias: float) -> None:
    torch.nn.init.normal_(layer.weight, std=weight)
    torch.nn.init.normal_(layer.bias, std=bias)


def build(kind: Any = MaskRCNN, seed: int = 0, **options: Any) -> Any:
    """A small detector whose fresh weights are large enough to tell boxes, classes and masks apart."""
    torch.manual_seed(seed)
    settings = nested({"depth": 10, "width": 0.25, "neck_channels": 32, "norm": "frozen", **FEW, **options})
    detector = kind(["cat", "dog", "owl"], **settings)
    for layer in detector.class_layers:
        enlarge(detector.net.get_submodule(layer), 0.05, 0.5)
    return detector


def batch(masks: bool = True, seed: int = 1, empty: tuple[int, ...] = (1,)) -> Batch:
    """Images of several sizes in one padded tensor, some without boxes; masks are random blots in their boxes."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (math.ceil(max(sides) / 32) * 32 for sides in zip(*SIZES, strict=True))
    images = torch.zeros(len(SIZES), 3, height, width, dtype=torch.uint8)
    targets = []
    for index, (h, w) in enumerate(SIZES):
        images[index, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([w, h]) * 0.5
        side = 8 + torch.rand(3, 2, generator=generator) * torch.tensor([w, h]) * 0.4
        boxes, labels = torch.cat([corner, corner + side], dim=1), torch.tensor([1, 2, 3])
        pixels = torch.zeros(3, h, w, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(pixels, boxes.long().tolist(), strict=True):
            part = mask[y1:y2, x1:x2]
            part[:] = torch.rand(part.shape, generator=generator) < 0.7
        keep = 0 if index in empty else 3
        targets.append(Target(boxes[:keep], labels[:keep], pixels[:keep] if masks else None))
    original = tuple((2 * h - 3, 3 * w + 1) for h, w in SIZES)
    return Batch(images, SIZES, original, tuple(targets), tuple(range(len(SIZES))))


def torchvision_input(data: Batch) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(data.images, data.sizes, strict=True)]
    return images, [{"boxes": target.boxes, "labels": target.labels, "masks": target.masks} for target in data.targets]


def reference(detector: Any, width: int) -> Any:
    """torchvision's own MaskRCNN with the same weights; it takes the images as they are."""
    backbone = detector.net.backbone
    options = {name: value for name, value in FEW.items() if name.startswith("rpn")}
    model = detection.MaskRCNN(
        backbone,
        box_head=detection.faster_rcnn.TwoMLPHead(width * 49, FEW["head_channels"]),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(FEW["head_channels"], 4),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(width, [width] * 4, 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(width, width, 4),
        **options,
    )
    model.load_state_dict(detector.net.state_dict(), strict=True)
    for module in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        # its guess from the first, tiny batch would be wrong scales: see pooling.region_pool
        module.scales, module.map_levels = (
            detector.net.roi_heads.box_roi_pool.scales,
            detector.net.roi_heads.box_roi_pool.map_levels,
        )
    model.transform.resize = lambda image, target: (image, target)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    gradients_by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients_by_name


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("options", [{}, {"norm": "batch", "depth": 18}])
def test_losses_and_gradients_equal_torchvision_bit_for_bit(options: dict[str, Any]) -> None:
    detector, data = build(**options, box_roi_align="torchvision"), batch()
    model = reference(detector, 32).train()
    torch.manual_seed(7)
    view_losses = detector.view(data).losses
    sum(view_losses.values()).backward()
    our_gradients = gradients(detector.net)
    torch.manual_seed(7)
    losses = model(*torchvision_input(data))
    sum(losses.values()).backward()
    assert_same(view_losses, losses)
    assert float(view_losses["loss_mask"].detach()) > 0.1
    assert_same(our_gradients, gradients(model))
    assert any("mask_head" in name for name in our_gradients)


def test_detections_and_masks_equal_torchvision_bit_for_bit() -> None:
    detector, data = build(box_roi_align="torchvision").eval(), batch()
    model = reference(detector, 32).eval()
    data = Batch(data.images, data.sizes, data.sizes, data.targets, data.ids)
    view = detector.view(data, training=False, frozen=True)
    with torch.no_grad():
        expected = model(torchvision_input(data)[0])
    shown = 0
    predictions = view.predictions()
    cells = maskrcnn_inference(
        view.mask_logits([one.boxes for one in predictions]), [one.labels for one in predictions]
    )
    for actual, other, cell in zip(view.detections, expected, cells, strict=True):
        assert torch.equal(actual.boxes, other["boxes"])
        assert torch.equal(actual.scores, other["scores"])
        assert torch.equal(actual.labels, other["labels"])
        assert actual.masks is not None
        assert actual.masks.dtype == torch.bool
        assert torch.equal(actual.masks, other["masks"][:, 0] > 0.5)
        assert torch.equal(paste_masks_in_image(cell, other["boxes"], actual.masks.shape[1:]), other["masks"])
        shown += int(actual.masks.flatten(1).any(1).sum())
    assert shown > 5


def test_masks_lie_in_the_original_images_pixels() -> None:
    detector, data = build().eval(), batch()
    view = detector.view(data, training=False, frozen=True)
    cells = maskrcnn_inference(
        view.mask_logits([one.boxes for one in view.predictions()]), [one.labels for one in view.predictions()]
    )
    for one, cell, size in zip(view.detections, cells, data.original_sizes, strict=True):
        assert one.masks is not None
        assert one.masks.shape == (len(one.boxes), *size)
        assert torch.equal(one.masks, paste_masks_in_image(cell, one.boxes, size)[:, 0] > 0.5)


def test_an_image_where_nothing_is_found_has_no_masks_but_their_size() -> None:
    detector, data = build(score_thresh=1.0).eval(), batch()
    for one, size in zip(detector.view(data, training=False, frozen=True).detections, data.original_sizes, strict=True):
        assert one.masks is not None
        assert one.masks.shape == (0, *size)


def test_a_foreign_default_model_loads_the_state_dict_and_agrees() -> None:
    body = resnet.resnet18(weights=None, norm_layer=torch.nn.BatchNorm2d)
    model = detection.MaskRCNN(_resnet_fpn_extractor(body, 5), 4, rpn_post_nms_top_n_test=20)
    detector = MaskRCNN(
        ["a", "b", "c"], backbone={"depth": 18}, rpn_post_nms_top_n_test=20, box_roi_align="torchvision"
    )
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in detector.net.state_dict().items()
    }
    model.load_state_dict(detector.net.state_dict(), strict=True)
    model.transform.resize = lambda image, target: (image, target)
    data = batch()
    data = Batch(data.images, data.sizes, data.sizes, data.targets, data.ids)
    with torch.no_grad():
        expected = model.eval()(torchvision_input(data)[0])
    for actual, other in zip(detector.eval().view(data, training=False, frozen=True).detections, expected, strict=True):
        assert len(actual.boxes)
        assert torch.equal(actual.boxes, other["boxes"])
        assert torch.equal(actual.masks, other["masks"][:, 0] > 0.5)  # type: ignore[arg-type]


class Calls:
    """Counts how often the mask head runs."""

    def __init__(self, detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, forward = 0, detector.net.roi_heads.mask_head.forward

        def run(features: Tensor) -> Tensor:
            self.count += 1
            out: Tensor = forward(features)
            return out

        monkeypatch.setattr(detector.net.roi_heads.mask_head, "forward", run)


@pytest.mark.parametrize("masks", [True, False])
def test_stages_of_boxes_never_run_the_mask_head_nor_need_masks(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, data = build(), batch(masks)
    calls, view = Calls(detector, monkeypatch), detector.view(data, frozen=True)
    view.predictions()
    view.roi_features(view.rois.boxes)
    view.roi_logits(view.rois.boxes)
    assert calls.count == 0
    plain = build(FasterRCNN)
    fitting = {name: value for name, value in detector.net.state_dict().items() if ".mask_" not in name}
    plain.net.load_state_dict(fitting, strict=True)
    torch.manual_seed(3)
    expected = plain.view(data).rois
    torch.manual_seed(3)
    assert all(map(torch.equal, detector.view(data).rois.boxes, expected.boxes))


def test_losses_run_the_mask_head_once_and_detections_once(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = build()
    calls, view = Calls(detector, monkeypatch), detector.view(batch())
    assert view.losses is view.losses
    assert calls.count == 1
    assert view.detections is view.detections
    assert calls.count == 2


@pytest.mark.parametrize("seed", [None, 5])
def test_reading_order_changes_nothing(seed: int | None) -> None:
    detector, data, losses = build(), batch(), []
    for stages in (("losses",), ("detections", "losses"), ("rois", "detections"), ("proposals", "rois", "losses")):
        torch.manual_seed(3)
        view = detector.view(data, seed=seed)
        for stage in stages:
            getattr(view, stage)
        losses.append(view.losses)
    for other in losses[1:]:
        assert_same(other, losses[0])


def test_a_batch_without_boxes_gives_a_mask_loss_of_zero_that_is_attached() -> None:
    detector = build()
    loss = detector.view(batch(empty=(0, 1, 2))).losses["loss_mask"]
    assert float(loss.detach()) == 0
    loss.backward()
    head = detector.net.roi_heads.mask_predictor.mask_fcn_logits
    assert head.weight.grad is not None


def test_the_mask_loss_is_float32_under_autocast() -> None:
    detector, data = build(), batch()
    exact = detector.view(data, seed=1).losses["loss_mask"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = detector.view(data, seed=1)
        assert view.losses["loss_mask"].dtype == torch.float32
        assert view.mask_logits(view.rois.boxes).dtype == torch.float32
        assert 0 < abs(float(view.losses["loss_mask"]) - float(exact)) < 0.1


def test_losses_without_masks_are_refused_with_the_remedy() -> None:
    with pytest.raises(DistillError, match=r"data\.masks=true"):
        _ = build().view(batch(masks=False)).losses


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_other_families_say_that_they_have_no_masks(kind: Any) -> None:
    detector = kind(["a"], backbone={"depth": 10, "width": 0.25}, neck_channels=32)
    with pytest.raises(DistillError, match=r"mask_logits.*model=mask_rcnn_r50"):
        detector.view(batch()).mask_logits([torch.zeros(0, 4)] * 3)


def test_it_describes_itself_and_is_saved_and_loaded(tmp_path: Any) -> None:
    detector, data = build().eval(), batch()
    save_student(detector, tmp_path)
    again = load_detector(tmp_path).eval()
    assert type(again) is MaskRCNN
    assert again.spec == detector.spec
    assert again.spec.family == "mask_rcnn"
    pairs = zip(*(model.view(data, training=False, frozen=True).detections for model in (detector, again)), strict=True)
    for one, other in pairs:
        assert all(map(torch.equal, one, other))


def test_classes_are_taken_over_by_name_in_the_mask_head_too(tmp_path: Any) -> None:
    detector = build()
    save_student(detector, tmp_path)
    settings = {name: value for name, value in detector.options.items() if name != "classes"}
    fewer = MaskRCNN(["owl", "cat"], **{**settings, "weights": str(tmp_path)})
    layer, fewer_layer = (module.net.roi_heads.mask_predictor.mask_fcn_logits for module in (detector, fewer))
    assert torch.equal(fewer_layer.weight, layer.weight[[0, 3, 1]])
    assert torch.equal(fewer_layer.bias, layer.bias[[0, 3, 1]])


def test_the_names_of_torchvisions_published_files_are_read(tmp_path: Any) -> None:
    """They still call the head's convolutions mask_fcn1 to mask_fcn4."""
    detector = build()
    old = {
        name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if ".mask_head." in name else name: value
        for name, value in detector.net.state_dict().items()
    }
    for layer in range(4):
        for kind in ("weight", "bias"):
            old[f"roi_heads.mask_head.mask_fcn{layer + 1}.{kind}"] = old.pop(f"roi_heads.mask_head.{layer}.{kind}")
    torch.save(old, tmp_path / "old.pth")
    again = MaskRCNN(**{**detector.options, "weights": str(tmp_path / "old.pth")})
    assert_same(dict(again.net.state_dict()), dict(detector.net.state_dict()))
