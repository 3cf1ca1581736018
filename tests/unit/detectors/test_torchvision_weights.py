"""A file of torchvision's COCO weights: its 91 outputs are recognized, and the rows of the data's classes are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection, resnet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from distill.cli.config.compose import compose_config
from distill.cli.config.instantiate import build_node
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.retinanet import RetinaNet
from distill.detectors.torchvision_weights import find_entry
from distill.types import Batch, DistillError, Target
from helpers.detectors import FAMILIES, small_options
from helpers.grids import exhaustive

COCO_IDS = {"cat": 17, "dog": 18, "person": 1}
PUBLISHED_EPS = {"faster_rcnn": 0.0, "mask_rcnn": 0.0, "retinanet": 0.0, "fcos": 1e-5}
FEW = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 20}


def torchvisions_detector(family: str, eps: float) -> Any:
    """torchvision's model with 91 outputs as its builder makes it for COCO_V1: frozen norms with an epsilon."""
    torch.manual_seed(0)
    body = resnet.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    if "rcnn" in family:
        kind = detection.FasterRCNN if family == "faster_rcnn" else detection.MaskRCNN
        model: Any = kind(_resnet_fpn_extractor(body, 5), 91, **FEW)
    else:
        backbone = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        model = (detection.RetinaNet if family == "retinanet" else detection.FCOS)(backbone, 91, score_thresh=0.001)
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.running_var.uniform_(0.5, 2.0)  # an epsilon of 1e-5 then changes the digits of the result
    for name in ("roi_heads.box_predictor.cls_score", "head.classification_head.cls_logits"):
        with torch.no_grad():
            if name.split(".")[0] in dict(model.named_children()):
                model.get_submodule(name).bias.normal_(std=0.5)
    overwrite_eps(model, eps)
    model.transform.resize = lambda image, target: (image, target)
    return model.eval()


def keep_rows(model: Any, labels: list[int]) -> Any:
    """The same model with the rows of some labels alone."""
    heads = getattr(model, "roi_heads", None)
    with torch.no_grad():
        if heads is None:
            layer, head = model.head.classification_head.cls_logits, model.head.classification_head
            rows = [anchor * 91 + label for anchor in range(len(layer.bias) // 91) for label in labels]
            layer.weight, layer.bias = nn.Parameter(layer.weight[rows]), nn.Parameter(layer.bias[rows])
            head.num_classes = len(labels)
            return model
        layers = [(heads.box_predictor.cls_score, 1), (heads.box_predictor.bbox_pred, 4)]
        if heads.has_mask():
            layers += [(heads.mask_predictor.mask_fcn_logits, 1)]
        for layer, count in layers:
            rows = [count * label + row for label in labels for row in range(count)]
            layer.weight, layer.bias = nn.Parameter(layer.weight[rows]), nn.Parameter(layer.bias[rows])
    return model


def one_image() -> Batch:
    images = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return Batch(images, ((64, 96),), ((64, 96),), (target,), (1,))


def with_weights(family: str, classes: Any, weights: Path, **options: Any) -> Any:
    few = {**FEW, "box_roi_align": "torchvision"} if FAMILIES[family].two_stage else {"score_thresh": 0.001}
    backbone = {"depth": 18, "norm": "frozen"}
    return FAMILIES[family].detector(classes, backbone=backbone, weights=str(weights), **few, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_with_91_outputs_gives_torchvisions_detections_of_the_datas_classes(family: str, tmp_path: Path) -> None:
    model = torchvisions_detector(family, PUBLISHED_EPS[family])
    torch.save(model.state_dict(), tmp_path / "coco.pth")
    detector = with_weights(family, ["dog", "person"], tmp_path / "coco.pth").eval()
    assert detector.classes == ("dog", "person")
    assert detector.describe()["backbone"]["norm_eps"] == PUBLISHED_EPS[family]
    batch = one_image()
    with torch.no_grad():
        (expected,) = keep_rows(model, [0, COCO_IDS["dog"], COCO_IDS["person"]])([batch.images[0] / 255])
        (actual,) = detector.view(batch, training=False).detections
    known = expected["labels"] > 0  # torchvision's one-stage detectors may name the label that no class has
    assert known.sum() > 5
    assert set(expected["labels"][known].tolist()) == {1, 2}
    assert torch.equal(actual.boxes, expected["boxes"][known])
    assert torch.equal(actual.scores, expected["scores"][known])
    assert torch.equal(actual.labels, expected["labels"][known])
    if actual.masks is not None:
        assert torch.equal(actual.masks, expected["masks"][:, 0] > 0.5)


VERSION_2 = {"neck_norm": "batch", "rpn_convs": 2, "box_convs": 4, "head_norm": "batch"}


def version_2(family: str) -> Any:
    """torchvision's detector of version 2 on a ResNet-18, with 91 outputs, as its builder makes it."""
    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(resnet.resnet18(weights=None), 5, norm_layer=nn.BatchNorm2d)
    parts: dict[str, Any] = {
        "rpn_head": RPNHead(256, 3, conv_depth=2),
        "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d),
    }
    if family == "mask_rcnn":
        parts["mask_head"] = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d)
    kind = detection.MaskRCNN if family == "mask_rcnn" else detection.FasterRCNN
    return drawn_norms(kind(backbone, 91, **parts, **FEW))


def drawn_norms(model: Any) -> Any:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 2.0)
            norm.running_mean.normal_(std=0.1)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.normal_(std=0.5)
    model.transform.resize = lambda image, target: (image, target)
    return model.eval()


def assert_same_detections(model: Any, detector: Any) -> None:
    batch = one_image()
    with torch.no_grad():
        (expected,) = keep_rows(model, [0, COCO_IDS["dog"], COCO_IDS["person"]])([batch.images[0] / 255])
        (actual,) = detector.eval().view(batch, training=False).detections
    assert len(actual.boxes) > 5
    for found, name in zip(actual, ("boxes", "scores", "labels"), strict=False):
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)
    if actual.masks is not None:
        assert ((actual.masks != (expected["masks"][:, 0] > 0.5)).sum() <= 2).all()


@pytest.mark.parametrize("family", [exhaustive("faster_rcnn"), "mask_rcnn"])
def test_version_2_gives_torchvisions_detections(family: str, tmp_path: Path) -> None:
    model = version_2(family)
    torch.save(model.state_dict(), tmp_path / "coco.pth")
    assert_same_detections(model, with_weights(family, ["dog", "person"], tmp_path / "coco.pth", **VERSION_2))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("option", "builder", "name"),
    [
        ("frcnn_r50_v2", detection.fasterrcnn_resnet50_fpn_v2, "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1"),
        ("mask_rcnn_r50_v2", detection.maskrcnn_resnet50_fpn_v2, "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1"),
        ("retinanet_r50_v2", detection.retinanet_resnet50_fpn_v2, "RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1"),
    ],
)
def test_the_options_of_version_2_take_its_weights(
    option: str, builder: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = builder(weights=None, weights_backbone=None, num_classes=91).state_dict()
    monkeypatch.setattr("distill.detectors.weights.download", lambda entry, _: state)
    cfg = compose_config([f"model={option}"])
    backbone = {"depth": 50, "norm": "frozen"}
    detector: Any = build_node(cfg.model, classes=["dog", "person"], weights=name, backbone=backbone)
    own = detector.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in own.items() if value.shape == state[key].shape)
    different = {key.rpartition(".")[0] for key, value in own.items() if value.shape != state[key].shape}
    assert different == set(detector.class_layers)


def test_weights_of_version_2_name_the_options_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.detectors.weights.download", lambda *_: {})
    with pytest.raises(DistillError) as refusal:
        FasterRCNN(["dog"], {"depth": 10, "width": 0.25}, weights="FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1")
    for words in ("neck_norm=batch (here none)", "'model.rpn_convs=2'", "'model.box_convs=4'", "model.head_norm"):
        assert words in str(refusal.value)


def coco_state(family: str, norm: str) -> dict[str, torch.Tensor]:
    options = small_options(family, {"head_channels": 32}, neck_channels=FAMILIES[family].neck_channels or 32)
    backbone = {**options.pop("backbone"), "norm": norm}
    detector: Any = FAMILIES[family].detector(
        [f"class {label}" for label in range(1, 91)], backbone=backbone, **options
    )
    state: dict[str, torch.Tensor] = detector.net.state_dict()
    return state


def small_retinanet(classes: Any, weights: Path, **options: Any) -> Any:
    backbone = {"depth": 10, "width": 0.25, "norm": "frozen"}
    return RetinaNet(classes, backbone=backbone, neck_channels=32, weights=str(weights), **options)


def test_classes_that_coco_lacks_are_named(tmp_path: Path) -> None:
    torch.save(coco_state("retinanet", "frozen"), tmp_path / "coco.pth")
    with pytest.raises(DistillError) as refusal:
        small_retinanet(["dog", "screwdriver", "Cat"], tmp_path / "coco.pth")
    text = str(refusal.value)
    assert "['screwdriver', 'Cat'] of ['dog', 'screwdriver', 'Cat'] is not among ['person', 'bicycle'" in text
    assert "N/A" not in text
    assert "a teacher must know all classes" in text


def test_a_student_starts_classes_that_coco_lacks_afresh(tmp_path: Path) -> None:
    state = coco_state("retinanet", "frozen")
    torch.save(state, tmp_path / "coco.pth")
    detector = small_retinanet(["screwdriver", "dog"], tmp_path / "coco.pth", head="match")
    weight = detector.net.head.classification_head.cls_logits.weight
    source = state["head.classification_head.cls_logits.weight"]
    assert torch.equal(weight[2::3], source[COCO_IDS["dog"] :: 91])
    assert torch.equal(weight[0::3], source[0::91])


@pytest.mark.parametrize(
    ("norm", "name", "eps"),
    [
        ("frozen", "mine.pth", 0.0),
        ("batch", "mine.pth", 1e-5),  # norms with batch statistics were trained with the default epsilon
        ("batch", "retinanet_resnet50_fpn_coco-eeacb38b.pth", 0.0),  # the published name decides
    ],
)
def test_the_file_tells_the_epsilon_of_its_norms(norm: str, name: str, eps: float, tmp_path: Path) -> None:
    torch.save(coco_state("retinanet", norm), tmp_path / name)
    detector = small_retinanet(["dog"], tmp_path / name)
    assert {layer.eps for layer in detector.modules() if isinstance(layer, FrozenBatchNorm2d)} == {eps}


def test_ninety_classes_of_other_names_are_the_files_own(tmp_path: Path) -> None:
    state = coco_state("retinanet", "frozen")
    torch.save(state, tmp_path / "own.pth")
    names = [f"class {label}" for label in range(1, 91)]
    detector = small_retinanet(names, tmp_path / "own.pth")
    assert all(torch.equal(value, state[name]) for name, value in detector.net.state_dict().items())
    assert "does not name its classes" in "\n".join(detector.report)


def test_a_misfit_lists_no_counters_of_batch_norms(tmp_path: Path) -> None:
    """20 outputs and three classes: the message names the class layer and nothing that frozen norms ignore."""
    state = coco_state("retinanet", "batch")
    layer = "head.classification_head.cls_logits"
    state |= {name: value[: 9 * 20] for name, value in state.items() if name.startswith(layer)}
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(DistillError) as refusal:
        small_retinanet(["a", "b", "c"], tmp_path / "own.pth")
    assert "num_batches_tracked" not in str(refusal.value)
    assert f"2 of another shape: {layer}.bias" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1", "three levels"),
        ("SSD300_VGG16_Weights.COCO_V1", "SSD"),
    ],
)
def test_detectors_that_no_family_has_are_refused_before_the_download(name: str, part: str) -> None:
    with pytest.raises(DistillError, match=part):
        find_entry(name, FasterRCNN.enum)
