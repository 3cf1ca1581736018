"""Weights in and out: what fits is loaded and reported, what does not is named, and nothing unpickles code."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import _api, resnet18
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn, fcos_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from distill.detectors import registry, student_files, weights
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.retinanet import RetinaNet
from distill.labels import match_classes
from distill.types import Batch, DistillError, Target
from helpers.detectors import BOX_FAMILIES, nested
from helpers.grids import exhaustive

ROWS = {row.detector: row for row in BOX_FAMILIES.values()}
SMALL: dict[str, Any] = {"depth": 10, "width": 0.125, "neck_channels": 64}


def small(family: Any, classes: Any = ("cat", "dog", "owl"), **options: Any) -> Any:
    extra = {"head_channels": 16, "rpn_post_nms_top_n_test": 20} if family is FasterRCNN else {"score_thresh": 0.001}
    detector = family(classes, **nested({**SMALL, **extra, **options}))
    return detector


def randomised(detector: Any) -> Any:
    torch.manual_seed(0)
    for value in detector.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + 0.05)
    return detector


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    targets = (Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),) * 2
    return Batch(images, ((64, 96),) * 2, ((64, 96),) * 2, targets, (1, 2))


def assert_same_detections(left: Any, right: Any) -> None:
    pair = [detector.eval().view(batch(), training=False).detections for detector in (left, right)]
    for actual, other in zip(*pair, strict=True):
        assert len(actual.boxes) > 0
        assert all(torch.equal(a, b) for a, b in zip(actual[:3], other[:3], strict=True))


@pytest.mark.parametrize("family", ROWS)
@pytest.mark.parametrize("norm", ["frozen", "batch_fixed_stats", "batch", "sync"])
def test_a_student_comes_back_as_it_was(family: Any, norm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = small(
        family, norm=norm, norm_eps=1e-3, mean=(0.1, 0.2, 0.3), nms_thresh=0.4, **ROWS[family].other_results
    )
    path = student_files.save_student(student, tmp_path / "run", {"AP": 0.5})
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["student.json", "student.pt"]
    student.net.load_state_dict(torch.load(path, weights_only=True), strict=True)
    spec = json.loads((tmp_path / "run" / "student.json").read_text())
    assert spec["extra"] == {"AP": 0.5}
    assert spec["model"] == student.describe() == json.loads(json.dumps(student.describe()))
    for source in (tmp_path / "run", path, path.with_suffix(".json")):
        again = registry.load_detector(source)
        assert again.spec == student.spec
        assert again.describe() == student.describe()
        assert type(again.net.backbone.body["bn1"]) is type(student.net.backbone.body["bn1"])
        assert again.net.backbone.body["bn1"].eps == 1e-3
        assert again.state_dict().keys() == student.state_dict().keys()
        assert_same_detections(student, again)


def test_loading_a_teacher_draws_nothing_from_the_global_stream(tmp_path: Path) -> None:
    student_files.save_student(small(RetinaNet), tmp_path)
    before = torch.get_rng_state()
    registry.load_detector(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_every_constructor_argument_is_described() -> None:
    import inspect

    for family in ROWS:
        described = small(family).describe()
        assert set(described) == {"family", *inspect.signature(family).parameters}


def test_a_broken_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = small(RetinaNet)
    before = student_files.save_student(student, tmp_path).read_bytes()

    def broken(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        student_files.save_student(student, tmp_path)
    assert (tmp_path / "student.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_a_plain_file_loads_under_the_common_wrappings(wrap: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = small(FasterRCNN)
    state = {f"module.{name}": value for name, value in source.net.state_dict().items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pth")
    target = small(FasterRCNN, weights=str(tmp_path / "w.pth"))
    assert_same_detections(source, target)
    assert "does not name its classes" in "\n".join(target.report)
    assert target.describe()["weights"] is None


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    path, mark = tmp_path / "w.pt", tmp_path / "it ran"
    for content in (Evil(mark), {"model": Evil(mark)}):
        path.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(DistillError, match="tensors"):
            small(RetinaNet, weights=str(path))
        torch.save(content, path)
        with pytest.raises(DistillError, match="tensors"):
            small(RetinaNet, weights=str(path))
    torch.save({"model": [1, 2]}, path)
    with pytest.raises(DistillError, match="state dict"):
        small(RetinaNet, weights=str(path))
    path.write_bytes(b"")
    with pytest.raises(DistillError, match="completely"):
        small(RetinaNet, weights=str(path))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # so it would have run


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = small(RetinaNet).net.state_dict()
    for index in range(12):
        state[f"extra{index:02}"] = torch.zeros(1)
    gone = [name for name in state if name.startswith("backbone.fpn.inner")]
    for name in gone:
        del state[name]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DistillError) as caught:
        small(RetinaNet, weights=str(tmp_path / "w.pt"))
    text = str(caught.value)
    assert f"{len(gone)} missing: {'; '.join(sorted(gone))}" in text
    assert "12 unexpected: extra00; " in text
    assert "extra09 ..." in text
    assert "extra10" not in text
    torch.save(small(RetinaNet).net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(DistillError, match=r"of another shape: .*\(8, 3, 7, 7\), expected \(16, 3, 7, 7\)"):
        small(RetinaNet, weights=str(tmp_path / "w.pt"), width=0.25)
    with pytest.raises(DistillError, match="head=new"):
        small(RetinaNet, ["a"], weights=str(tmp_path / "w.pt"))
    with pytest.raises(DistillError, match="neither a file"):
        small(RetinaNet, weights=str(tmp_path / "nothing.pt"))
    with pytest.raises(DistillError, match="keep, match or new"):
        small(RetinaNet, weights=str(tmp_path / "w.pt"), head="old")


def rows(detector: Any, name: str) -> dict[str, list[Tensor]]:
    """Class name -> its rows, found one by one from each layer's documented order."""
    names = ["background", *detector.classes]
    value = detector.net.state_dict()[name]
    class_rows: dict[str, list[Tensor]] = {class_name: [] for class_name in names}
    for row in range(len(value)):
        label = row // 4 if "bbox_pred" in name else row % len(names)
        class_rows[names[label]].append(value[row])
    return class_rows


@pytest.mark.parametrize("family", ROWS)
def test_keep_takes_the_rows_of_the_same_names(family: Any, tmp_path: Path) -> None:
    source = randomised(small(family))
    student_files.save_student(source, tmp_path)
    target = small(family, ["owl", "cat"], weights=str(tmp_path))
    for layer in family.class_layers:
        for part in ("weight", "bias"):
            actual, reference = rows(target, f"{layer}.{part}"), rows(source, f"{layer}.{part}")
            assert set(actual) == {"background", "owl", "cat"}
            for name, values in actual.items():
                assert len(values) == len(reference[name]) > 0
                assert all(torch.equal(a, b) for a, b in zip(values, reference[name], strict=True))
    assert "owl, cat, out of 3 classes" in "\n".join(target.report)
    assert registry.load_detector(tmp_path).classes == ("cat", "dog", "owl")
    with pytest.raises(DistillError, match=r"\['Cat'\].*'cat', 'dog', 'owl'"):
        small(family, ["Cat", "dog"], weights=str(tmp_path))


@pytest.mark.parametrize("family", ROWS)
@pytest.mark.parametrize("named", [True, False])
def test_new_leaves_the_head_fresh_and_fits_the_rest(family: Any, named: bool, tmp_path: Path) -> None:
    source = randomised(small(family))
    student_files.save_student(source, tmp_path)
    if not named:
        (tmp_path / "student.json").unlink()
    fresh_head = small(family, ["x", "y"])
    before = {name: value.clone() for name, value in fresh_head.net.state_dict().items()}
    weights.load_weights(fresh_head, tmp_path / "student.pt", head="new")
    for name, value in fresh_head.net.state_dict().items():
        fresh = name.startswith(tuple(family.class_layers))
        assert torch.equal(value, before[name] if fresh else source.net.state_dict()[name]), name
    same = small(family, weights=str(tmp_path), head="new")
    kept = torch.equal(*(d.net.get_submodule(next(iter(family.class_layers))).weight for d in (same, source)))
    assert kept is named


def test_classes_may_come_with_the_weights(tmp_path: Path) -> None:
    student_files.save_student(small(RetinaNet), tmp_path)
    assert small(RetinaNet, None, weights=str(tmp_path)).classes == ("cat", "dog", "owl")
    with pytest.raises(DistillError, match="classes"):
        small(RetinaNet, None)
    for wrong in ([], ["a", "a"]):
        with pytest.raises(DistillError, match="classes"):
            small(RetinaNet, wrong)


def test_facts_that_weights_depend_on_must_agree(tmp_path: Path) -> None:
    student_files.save_student(small(RetinaNet, mean=(0.5, 0.5, 0.5), norm="frozen", norm_eps=1e-3), tmp_path)
    with pytest.raises(DistillError, match=r"pixels.mean=\[0.5, 0.5, 0.5\] \(here \[0.485"):
        small(RetinaNet, weights=str(tmp_path))
    fixed = small(RetinaNet, weights=str(tmp_path), mean=(0.5, 0.5, 0.5), norm="batch_fixed_stats")
    assert fixed.net.backbone.body["bn1"].eps == fixed.describe()["backbone"]["norm_eps"] == 1e-3
    report = "\n".join(fixed.report)
    assert "norm: batch_fixed_stats here; the weights were made with frozen" in report
    assert "norm_eps: 0.001" in report
    live = small(RetinaNet, weights=str(tmp_path), mean=(0.5, 0.5, 0.5), norm="batch")
    assert live.net.backbone.body["bn1"].eps == live.describe()["backbone"]["norm_eps"] == 1e-5


def test_a_json_that_is_no_detector_is_refused(tmp_path: Path) -> None:
    path = student_files.save_student(small(RetinaNet), tmp_path)
    spec = path.with_suffix(".json")
    good = json.loads(spec.read_text())
    for text, words in (
        ("{", "not JSON"),
        ("[]", "object"),
        ("{}", "naming one of"),
        (json.dumps({"model": {**good["model"], "family": "yolo"}}), "faster_rcnn, mask_rcnn, retinanet, fcos"),
        (json.dumps({"model": {**good["model"], "new_option": 1}}), "new_option"),
    ):
        spec.write_text(text)
        with pytest.raises(DistillError, match=words):
            registry.load_detector(tmp_path)


def offline(monkeypatch: pytest.MonkeyPatch, state: Any = None) -> list[str]:
    asked: list[str] = []

    def load(url: str, **options: Any) -> Any:
        asked.append(url)
        assert options["weights_only"] is True
        if state is None:
            raise URLError("no network")
        return state

    monkeypatch.setattr(_api, "load_state_dict_from_url", load)
    return asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone_weights": "IMAGENET1K_V1"}, r"model.backbone.weights=/path/to/resnet18-f37072fd\.pth"),
        (
            {"weights": "COCO_V1", "classes": ["dog"]},
            r" model\.weights=/path/to/(fasterrcnn_resnet50_fpn_coco-258fb6c6\.pth) "
            r"\(of the teacher: teacher\.weights=/path/to/\1\)",
        ),
    ],
)
def test_without_a_network_the_file_option_is_named(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    with pytest.raises(DistillError, match=words):
        FasterRCNN(**nested({"classes": ["dog"], "depth": 18, "neck_channels": 32, "head_channels": 16, **options}))


def test_imagenet_weights_from_torchvision_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = resnet18(weights=None)
    asked = offline(monkeypatch, model.state_dict())
    torch.save(model.state_dict(), tmp_path / "r18.pth")
    for source in ("IMAGENET1K_V1", "DEFAULT", str(tmp_path / "r18.pth")):
        detector = RetinaNet(["a"], backbone={"depth": 18, "norm": "frozen", "weights": source}, neck_channels=32)
        body = detector.net.backbone.body.state_dict()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in body.items())
        assert source in detector.report[0]
    assert len(asked) == 2
    for options, words in (
        ({"depth": 18, "width": 0.5, "backbone_weights": "DEFAULT"}, "width 1"),
        ({"depth": 10, "backbone_weights": "IMAGENET1K_V1"}, "none, for depth 10"),
        ({"depth": 34, "backbone_weights": str(tmp_path / "r18.pth")}, "missing"),
    ):
        with pytest.raises(DistillError, match=words):
            RetinaNet(["a"], neck_channels=32, **nested(options))


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("mobilenet_v2", "features.18"),
        exhaustive(("mobilenet_v3_large", "features.16")),
        exhaustive(("efficientnet_b0", "features.8")),
        exhaustive(("resnext50_32x4d", "fc")),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_classifiers_weights_fill_every_body(
    backbone: str, head: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = models.get_model(backbone, weights=None).state_dict()
    asked = offline(monkeypatch, state)
    torch.save(state, tmp_path / "classifier.pth")
    options: dict[str, Any] = {"backbone": backbone, "neck_channels": 32, "norm": norm}
    for source in ("IMAGENET1K_V1", str(tmp_path / "classifier.pth")):
        detector = RetinaNet(["a"], **nested({**options, "backbone_weights": source}))
        body = detector.net.backbone.body.state_dict()
        taken = {name.removeprefix("features."): value for name, value in state.items()}
        assert all(torch.equal(value, taken[name]) for name, value in body.items())
        left = {name for name in state if name.removeprefix("features.") not in body}
        assert all(name.startswith((f"{head}.", "classifier.")) or "num_batches" in name for name in left)
        assert source in detector.report[0]
    assert len(asked) == 1
    first = next(name for name in state if name.endswith("weight"))
    for changed, words in (
        (
            {name: value for name, value in state.items() if name != first},
            f"1 missing: {first.removeprefix('features.')}",
        ),
        ({**state, "features.99.weight": torch.zeros(1)}, "1 unexpected: 99.weight"),
    ):
        torch.save(changed, tmp_path / "classifier.pth")
        with pytest.raises(DistillError, match=words):
            RetinaNet(["a"], **nested({**options, "backbone_weights": str(tmp_path / "classifier.pth")}))


def test_imagenet_weights_are_for_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(DistillError, match=r"width 1, not 0\.5"):
        RetinaNet(["a"], backbone={"name": "mobilenet_v2", "width": 0.5, "weights": "DEFAULT"})
    with pytest.raises(DistillError, match=r"backbone.weights=/path/to/mobilenet_v2-7ebf99e0\.pth"):
        RetinaNet(["a"], backbone={"name": "mobilenet_v2", "weights": "DEFAULT"})
    with pytest.raises(DistillError, match="IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        RetinaNet(["a"], backbone={"name": "mobilenet_v2", "weights": "IMAGENET"})


@pytest.mark.parametrize("family", ROWS)
def test_a_mobilenet_student_comes_back_as_it_was(family: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = small(family, backbone="mobilenet_v3_small", depth=None, width=0.5, norm="frozen")
    student_files.save_student(student, tmp_path)
    again = registry.load_detector(tmp_path)
    assert (again.spec, again.describe()) == (student.spec, student.describe())
    assert_same_detections(student, again)


def test_torchvisions_coco_weights_are_held_to_torchvisions_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, {})
    for path, value in {"pixels.channel_order": "bgr", "box_roi_aligned": True, "anchors.offset": 0.5}.items():
        with pytest.raises(DistillError, match=f"made for {path}="):
            FasterRCNN(["dog"], weights="COCO_V1", **nested({path: value}))


def test_weights_of_the_other_box_head_are_refused_by_its_name(tmp_path: Path) -> None:
    student_files.save_student(RetinaNet(["a"], **nested({"depth": 10, "width": 0.125, "neck_channels": 32})), tmp_path)
    options = {"depth": 10, "width": 0.125, "neck_channels": 32, "box_head": "distribution", "box_loss": "giou"}
    with pytest.raises(DistillError, match=r"made for box_head=regression \(here distribution\).*model.box_head="):
        RetinaNet(["a"], weights=str(tmp_path / "student.pt"), **nested(options))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "regnety_002"])
def test_a_timm_classifiers_file_fills_its_body(name: str, tmp_path: Path) -> None:
    state = timm.create_model(name).state_dict()
    torch.save(state, tmp_path / "classifier.pth")
    options: dict[str, Any] = {"backbone": f"timm/{name}", "neck_channels": 32, "norm": "frozen"}
    detector = RetinaNet(["a"], **nested({**options, "backbone_weights": str(tmp_path / "classifier.pth")}))
    body = {key.removeprefix("net."): v for key, v in detector.net.backbone.body.state_dict().items()}
    assert len(body) > 90
    assert all(torch.equal(value, state[key]) for key, value in body.items())
    student_files.save_student(detector, tmp_path)
    assert registry.load_detector(tmp_path).describe() == detector.describe()
    first = next(iter(state))
    for changed, words in (
        ({key: value for key, value in state.items() if key != first}, f"1 missing: {first}"),
        ({**state, "other.weight": torch.zeros(1)}, "1 unexpected: other.weight"),
    ):
        torch.save(changed, tmp_path / "classifier.pth")
        with pytest.raises(DistillError, match=words):
            RetinaNet(["a"], **nested({**options, "backbone_weights": str(tmp_path / "classifier.pth")}))
    with pytest.raises(DistillError, match="timm's name is DEFAULT"):
        RetinaNet(["a"], **nested({**options, "backbone_weights": "IMAGENET1K_V1"}))


def test_torchvisions_coco_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its builder has them: 91 labels, frozen norms, epsilon 0, under the names of the published file."""
    torch.manual_seed(0)
    reference = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    state = OrderedDict(
        (name.replace("rpn.head.conv.0.0", "rpn.head.conv"), value)  # the published file's older name
        for name, value in reference.state_dict().items()
        if "num_batches_tracked" not in name
    )
    offline(monkeypatch, state)
    detector = FasterRCNN(weights="COCO_V1", backbone={"norm": "frozen"})
    assert len(detector.classes) == 90
    assert (detector.classes[0], detector.classes[-1], detector.classes.count("N/A")) == ("person", "toothbrush", 10)
    assert {m.eps for m in detector.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}
    assert detector.describe()["backbone"]["norm_eps"] == 0.0
    assert torch.equal(detector.net.rpn.head.conv[0][0].weight, reference.rpn.head.conv[0][0].weight)
    own = FasterRCNN(
        ["dog", "cat"], weights="FasterRCNN_ResNet50_FPN_Weights.COCO_V1", backbone={"norm": "batch_fixed_stats"}
    )
    score = "roi_heads.box_predictor.cls_score.weight"
    labels = [0, detector.classes.index("dog") + 1, detector.classes.index("cat") + 1]
    assert torch.equal(own.net.state_dict()[score], state[score][labels])
    assert {m.eps for m in own.modules() if isinstance(m, nn.BatchNorm2d)} == {0.0}


def test_torchvisions_coco_weights_of_fcos_keep_their_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's builder sets epsilon 0 for the COCO weights of its other families, and not for this one."""
    torch.manual_seed(0)
    reference = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    state = {name: value for name, value in reference.state_dict().items() if "num_batches_tracked" not in name}
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda url, **_: state)
    reference = fcos_resnet50_fpn(weights="COCO_V1")
    offline(monkeypatch, state)
    detector = FCOS(weights="COCO_V1", backbone={"norm": "frozen"})
    assert (len(detector.classes), detector.classes[0], detector.classes[-1]) == (90, "person", "toothbrush")
    expected = {m.eps for m in reference.modules() if isinstance(m, FrozenBatchNorm2d)}
    assert {m.eps for m in detector.modules() if isinstance(m, FrozenBatchNorm2d)} == expected == {1e-5}
    assert detector.describe()["backbone"]["norm_eps"] == 1e-5
    assert detector.parameters_count == FCOS_ResNet50_FPN_Weights.COCO_V1.meta["num_params"]
    assert detector.net.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in detector.net.state_dict().items())
    own = FCOS(
        ["dog", "cat"],
        weights="FCOS_ResNet50_FPN_Weights.COCO_V1",
        backbone={"norm": "batch_fixed_stats", "norm_eps": 1e-3},
    )
    labels = [0, detector.classes.index("dog") + 1, detector.classes.index("cat") + 1]
    score = "head.classification_head.cls_logits.weight"
    assert torch.equal(own.net.state_dict()[score], state[score][labels])
    assert {m.eps for m in own.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_classes_match_by_exact_name() -> None:
    assert match_classes(("b", "a"), ("a", "x", "b"), "or not") == [0, 3, 1]
    with pytest.raises(DistillError, match=r"\['A', 'c'\].*\['a', 'b'\]"):
        match_classes(("A", "b", "c"), ("a", "b"), "or not")
