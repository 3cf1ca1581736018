"""The Distiller: weights of zero change nothing, no teacher is saved, a bad loss stops the run, a resume continues."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torchvision.models import detection, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from distill.cli.config.compose import compose_config
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_student
from distill.evaluation.coco import CocoMetric
from distill.evaluation.evaluate import evaluate
from distill.frozen import FrozenModel
from distill.losses.base import DistillLoss
from distill.losses.chen import Chen
from distill.losses.defeat import DeFeat
from distill.losses.dicod import DICOD
from distill.teacher import Teacher
from distill.training import schedule
from distill.training.callbacks.teacher_check import TeacherCheck
from distill.training.distiller import Distiller
from distill.training.nonfinite import NonFiniteGuard
from distill.types import Batch, Detections, DistillError, Target, View
from helpers.detectors import BOX_FAMILIES
from helpers.methods import METHODS, small_loss
from helpers.training import (
    ANCHORS,
    CLASSES,
    EVERYTHING,
    FormulaLoss,
    assert_same,
    copy_weights,
    distiller,
    fit,
    sgd,
    shapes_data,
    small_detector,
    small_teacher,
)

NOTHING = {place: {"foreground": 0.0, "background": 0.0} for place in ("neck", "backbone")}
OFF = {"stop": 99, "terms": None}
HARD_ONLY = {head: {"soft": 0.0, "box": 0.0} for head in ("rpn", "rcn")} | {"hint": {"neck": 0.0}}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Gradients(L.Callback):
    """Keeps what every parameter's gradient was before the last step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.found = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }


# -- weights of zero


def meddle(student: View, teacher: View) -> Tensor:
    """Reads and draws whatever could disturb a student, for nothing."""
    torch.rand(7)
    read = [teacher.rois.boxes, student.proposals, student.roi_logits(teacher.rois.boxes), teacher.losses]
    assert all(read)
    return torch.stack([x.sum() for x in student.neck.values()]).sum() * 0.0


QUIET = {"frs": {"logits": {"classes": 0.0}}}
"""Options without terms whose gradient, though 0, gives that of the RPN's logits another layout, and other rounding."""
IDLE: dict[str, dict[str, Callable[..., DistillLoss]]] = {
    "all weights zero": {"defeat": partial(DeFeat, **NOTHING)},
    "hard labels alone": {"chen": partial(Chen, **HARD_ONLY)},
    **{
        f"ramp at zero: {name}": {name: small_loss(name, ramp=OFF)}
        for name, method in METHODS.items()
        if not method.needs_model and not method.replaces_hard_labels and method.trained_alone
    },
    "ramp at zero: the other methods": {
        name: small_loss(name, ramp=OFF, **QUIET.get(name, {}))
        for name, method in METHODS.items()
        if not method.trained_alone and not method.needs_model and method.family == "faster_rcnn"
    },
    "zero effect": {"meddler": partial(FormulaLoss, formula=meddle), "defeat": partial(DeFeat, **NOTHING)},
}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    module = distiller()
    fit(module, tmp_path_factory.mktemp("baseline"))
    return copy_weights(module.student)


@pytest.mark.parametrize("case", IDLE)
def test_losses_without_effect_leave_the_student_as_it_is(
    case: str, baseline: dict[str, Tensor], tmp_path: Path
) -> None:
    gradients, module = Gradients(), distiller(losses=IDLE[case])
    trainer = fit(module, tmp_path, callbacks=[gradients])
    assert trainer.global_step == 4
    assert_same(copy_weights(module.student), baseline)
    trained = case.startswith("ramp at zero") and any(True for _ in module.losses.parameters())
    assert trained == any(name.startswith("losses.") for name in gradients.found)
    for name, found in gradients.found.items():
        assert found is not None, f"{name} is not attached"
        assert not name.startswith("losses.") or not found.any()


def test_a_loss_with_effect_does_change_the_student(baseline: dict[str, Tensor], tmp_path: Path) -> None:
    module = distiller(losses={"defeat": partial(DeFeat, **EVERYTHING)})
    fit(module, tmp_path)
    name = "net.backbone.fpn.layer_blocks.0.0.weight"
    assert not torch.equal(copy_weights(module.student)[name], baseline[name])


def test_soft_labels_take_their_weight_from_the_hard_ones(tmp_path: Path) -> None:
    options = {"rpn": {"soft": 0.25}, "rcn": {"soft": 0.5}, "ramp": {"stop": 99}}
    trainer = fit(distiller(losses={"chen": partial(Chen, **options)}), tmp_path)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for name, factor in {"loss_objectness": 0.75, "loss_classifier": 0.5, "loss_box_reg": 1.0}.items():
        assert found[f"loss/student/{name}"] == pytest.approx(factor * found[f"term/student/{name}"], rel=1e-6), name
    assert found["term/chen/rcn.soft"] > 0 == found["loss/chen/rcn.soft"]


# -- the teacher first


def test_the_teacher_runs_first_and_from_the_second_step_on_each_of_its_stages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body is asked for after the neck, which by then has left none behind."""
    teacher, student, ran = small_teacher(), small_detector(), []
    for who, net in (("teacher", teacher.optimized(torch.device("cpu"))), ("student", student)):
        maps = net.net.backbone.body.maps
        noted = partial(lambda who, maps, images: ran.append(who) or maps(images), who, maps)
        monkeypatch.setattr(net.net.backbone.body, "maps", noted)

    def formula(ours: View, theirs: View) -> Tensor:
        read = *ours.neck.values(), *theirs.neck.values(), *theirs.body.values()
        fresh = teacher.view(ours.batch)
        assert all(torch.equal(theirs.neck[at], x) for at, x in fresh.neck.items())
        del ran[-1]  # that one
        return torch.stack([x.mean() for x in read]).sum()

    module = distiller(student, teacher, {"mine": partial(FormulaLoss, formula=formula)})
    fit(module, tmp_path, max_steps=3)
    assert ran == ["teacher", "student", "teacher"] + 2 * ["teacher", "student"]


# -- the teacher


def test_the_teacher_is_nowhere_in_what_is_trained_averaged_or_saved(tmp_path: Path) -> None:
    teacher = small_teacher(width=1.0)
    module = distiller(teacher=teacher, losses={"defeat": DeFeat})
    average, keep = EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    trainer = fit(module, tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[average, keep])

    theirs = {id(parameter) for parameter in teacher.detector.parameters()}
    assert not theirs & {id(parameter) for parameter in module.parameters()}
    assert not theirs & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert average._average_model is not None
    assert average._average_model.module.teacher is teacher
    assert copy.deepcopy(module).teacher is teacher

    file = tmp_path / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert {name.split(".")[0] for name in checkpoint[part]} == {"student", "losses"}
    assert checkpoint["teacher"]["sha256"] == teacher.fingerprint
    ours = sum(value.nbytes for value in module.state_dict().values())
    assert file.stat().st_size < 3 * ours + 300_000 < sum(p.nbytes for p in teacher.detector.parameters())


class Watcher(L.Callback):
    """Fails when the teacher wakes up."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_train_batch_end(self, *_: Any) -> None:
        assert not any(module.training for module in self.teacher.detector.modules())
        assert all(p.grad is None and not p.requires_grad for p in self.teacher.detector.parameters())


def test_a_teacher_with_live_norms_stays_bit_identical_and_asleep(tmp_path: Path) -> None:
    teacher = small_teacher(norm="batch")
    before = copy_weights(teacher.detector)
    module = distiller(teacher=teacher, losses={"defeat": partial(DeFeat, **EVERYTHING)})
    fit(module, tmp_path, callbacks=[Watcher(teacher), TeacherCheck()], limit_val_batches=1.0, max_epochs=1)
    assert_same(copy_weights(teacher.detector), before)


def test_the_teachers_maps_are_gone_after_the_step(tmp_path: Path) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def imitate(student: View, teacher: View) -> Tensor:
        kept.extend(weakref.ref(x) for view in (student, teacher) for x in (*view.body.values(), *view.neck.values()))
        return (student.body[8].mean() - teacher.body[8].mean()).square()

    class Free(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert kept
            assert [each() for each in kept] == [None] * len(kept)

    gc.disable()
    try:
        module = distiller(losses={"defeat": partial(DeFeat, **EVERYTHING), "x": partial(FormulaLoss, formula=imitate)})
        fit(module, tmp_path, callbacks=[Free()], max_epochs=1)
    finally:
        gc.enable()


# -- finite numbers


def poison(model: Detector, level: int) -> None:
    with torch.no_grad():
        model.net.backbone.fpn.layer_blocks[level][0].weight[0, 0] = math.nan


def stopped(module: Distiller, folder: Path, **options: Any) -> str:
    module.guard = NonFiniteGuard(limit=0, folder=str(folder))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with pytest.raises(DistillError) as caught:
        fit(module, folder, **options)
    after = dict(module.named_parameters())
    assert [name for name in before if not torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7))] == []
    return str(caught.value)


@pytest.mark.parametrize("family", BOX_FAMILIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_student_that_is_not_finite_stops_before_any_weight_changes(
    family: str, accumulate: int, tmp_path: Path
) -> None:
    module = distiller(small_detector(family))
    poison(module.student, level=1)
    message = stopped(module, tmp_path, accumulate_grad_batches=accumulate)
    term, stride = ("student/loss_objectness", 8) if family == "faster_rcnn" else ("student/classification", 16)
    assert "step 0" in message
    assert term in message
    assert f"student's neck at stride {stride}, images [" in message
    assert message.count("at stride") == accumulate  # of each batch the first stage and level
    assert any(str(image) in message.split("images [")[1].split("]")[0].split(", ") for image in range(8))


def test_a_centerness_that_is_not_finite_is_named(tmp_path: Path) -> None:
    module = distiller(small_detector("fcos"))
    with torch.no_grad():
        module.student.net.head.regression_head.bbox_ctrness.weight[0, 0] = math.nan
    message = stopped(module, tmp_path)
    assert "not finite in student/bbox_ctrness (images [" in message
    assert "Levels: student's centerness at stride 8, images [" in message


def test_a_teacher_that_is_not_finite_is_named_with_its_level(tmp_path: Path) -> None:
    teacher = small_teacher()
    poison(teacher.detector, level=2)
    message = stopped(distiller(teacher=teacher, losses={"defeat": DeFeat}), tmp_path)
    assert "not finite in defeat/neck.foreground, defeat/neck.background (images [" in message
    assert "Levels: teacher's neck at stride 16, images [" in message


def test_a_formula_that_is_not_finite_is_named_with_its_images(tmp_path: Path) -> None:
    batches: list[Batch] = []

    def second_step_inf(student: View, teacher: View) -> Tensor:
        batches.append(student.batch)
        return student.neck[8].sum() * (math.inf if len(batches) == 2 else 0.0)

    class SecondStep(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
            if index == 1:
                self.before = copy_weights(nn.ModuleDict(dict(module.named_children())))

        def on_exception(self, trainer: Any, module: Any, error: BaseException) -> None:
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, self.before[name]), name

    module = distiller(losses={"mine": partial(FormulaLoss, formula=second_step_inf)}, guard=NonFiniteGuard(limit=0))
    with pytest.raises(DistillError, match=r"step 1: the loss is not finite in mine/term \(images") as caught:
        fit(module, tmp_path, callbacks=[SecondStep()])
    assert str(list(batches[1].ids)) in str(caught.value)
    assert "all maps are finite" in str(caught.value)


# -- resume


class StopAfter(L.Callback):
    """Ends a run in the middle of its schedule."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


@pytest.mark.parametrize("ema", [False, True])
def test_a_resume_ends_with_the_same_weights_bit_for_bit(ema: bool, tmp_path: Path) -> None:
    def run(name: str, stop: int = 99, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        module = distiller(
            losses={"defeat": partial(DeFeat, **EVERYTHING, mask={"kind": "random"}, ramp={"shape": "peak"})},
            schedule=sgd(epochs=4, shape="one_cycle"),
        )
        keep = ModelCheckpoint(tmp_path / name, "last", save_on_train_epoch_end=True)
        average = [EMAWeightAveraging(decay=0.5)] if ema else []
        options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True, "limit_val_batches": 1.0}
        fit(module, tmp_path, ckpt_path=ckpt_path, callbacks=[StopAfter(stop), keep, *average], **options)
        return copy_weights(module)

    straight = run("straight")
    half = run("half", stop=2)
    resumed = run("resumed", ckpt_path=tmp_path / "half" / "last.ckpt")
    assert not torch.equal(
        half["student.net.backbone.body.conv1.weight"], straight["student.net.backbone.body.conv1.weight"]
    )
    assert_same(resumed, straight)


@pytest.mark.parametrize("now", ["another teacher", "none"])
def test_a_resume_with_another_teacher_is_refused(now: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    losses = {"defeat": DeFeat}
    fit(distiller(losses=losses), tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[keep])
    module = distiller() if now == "none" else distiller(teacher=small_teacher(seed=2), losses=losses)
    with pytest.raises(DistillError, match=r"made with the teacher memory .*, but this run has"):
        fit(module, tmp_path, ckpt_path=tmp_path / "last.ckpt")


def test_a_resume_with_other_layers_of_a_loss_is_refused(tmp_path: Path) -> None:
    """Such as a checkpoint of a version whose loss had other layers."""
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    written = {"defeat": partial(DeFeat, adapter={"kernel": 1})}
    fit(distiller(losses=written), tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[keep])
    module = distiller(losses={"defeat": partial(DeFeat, adapter={"kernel": 3})})
    with pytest.raises(
        DistillError, match=r"trained layers of defeat in the checkpoint differ .* such as losses\.defeat\."
    ):
        fit(module, tmp_path, ckpt_path=tmp_path / "last.ckpt")


# -- weights, logs, optimiser


def test_every_term_is_logged_as_it_is_and_as_it_counts(tmp_path: Path) -> None:
    module = distiller(
        losses={"defeat": partial(DeFeat, **EVERYTHING, ramp={"shape": "linear"})},
        supervised={"loss_classifier": 0.5, "loss_rpn_box_reg": 0.0},
    )
    trainer = fit(module, tmp_path, limit_val_batches=1.0)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    ramp = 1 - 3 / 4  # three of four steps were done before the last one
    factors = {"neck.foreground": 4.0, "neck.background": 16.0, "backbone.foreground": 1.0, "backbone.background": 1.0}
    factors |= {f"proposals.{group}": 1.0 for group in ("positive", "negative", "all")}
    expected = {f"defeat/{name}": factor * ramp for name, factor in factors.items()}
    expected |= {"student/loss_classifier": 0.5, "student/loss_rpn_box_reg": 0.0}
    expected |= {"student/loss_objectness": 1.0, "student/loss_box_reg": 1.0}
    assert {name.removeprefix("term/") for name in found if name.startswith("term/")} == expected.keys()
    for name, factor in expected.items():
        assert found[f"loss/{name}"] == pytest.approx(factor * found[f"term/{name}"], rel=1e-6), name
    assert found["loss/total"] == pytest.approx(sum(found[f"loss/{name}"] for name in expected), rel=1e-5)
    assert found["term/defeat/neck.foreground"] > 0
    assert {"val/AP", "val/AP50", "val/APs"} <= found.keys()


def test_the_gradient_is_clipped_over_student_and_adapters_together(tmp_path: Path) -> None:
    schedule = sgd(optimizer=partial(torch.optim.SGD, lr=1.0))
    module = distiller(losses={"defeat": DeFeat}, schedule=schedule)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    gradients = Gradients()
    fit(module, tmp_path, callbacks=[gradients], max_steps=1, gradient_clip_val=0.01)
    moved = sum((p.detach() - before[name]).square().sum() for name, p in module.named_parameters() if p.requires_grad)
    assert float(moved) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert sum(float(g.square().sum()) for g in gradients.found.values()) > 0.01**2


def test_two_half_batches_accumulated_equal_one(tmp_path: Path) -> None:
    """RetinaNet, because its losses are means over images; sums of float32 in another order differ by rounding."""
    found = []
    for size, accumulate in ((4, 1), (2, 2)):
        module = distiller(small_detector("retinanet", norm="frozen"), schedule=sgd(base_batch=16))
        gradients = Gradients()
        trainer = fit(
            module,
            tmp_path,
            shapes_data(train=4, batch_size=size),
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            callbacks=[gradients],
        )
        assert trainer.global_step == 1
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 4 / 16)
        found.append(gradients.found)
    for name, whole in found[0].items():
        assert torch.allclose(found[1][name], whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max())), name


def test_norms_and_biases_of_a_detector_are_spared_decay() -> None:
    module = distiller(small_detector("retinanet", head_norm="group", neck_channels=32), losses=None)
    optimizer, _ = sgd(decay_norms=False).build_optimizer(module.student, module.losses, 10, 4)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decay[id(p)] for name, p in module.student.named_parameters()}
    assert len(named) == len(decay)
    assert all(value == 0 for name, value in named.items() if name.endswith("bias") or ".bn" in name)
    assert named["net.backbone.body.layer1.0.conv1.weight"] == 1e-4
    assert named["net.head.classification_head.conv.0.1.weight"] == 0  # group norm
    assert named["net.backbone.body.layer2.0.downsample.1.weight"] == 0
    assert named["net.backbone.body.layer2.0.downsample.0.weight"] == 1e-4


class Bare(DetectionData):
    """Batches of images that show nothing."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        none = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return replace(batch, targets=(none,) * len(batch))


@pytest.mark.parametrize("family", BOX_FAMILIES)
@pytest.mark.parametrize("kind", [DetectionData, Bare])
def test_a_gradient_reaches_every_trained_parameter(family: str, kind: Any, tmp_path: Path) -> None:
    options = EVERYTHING if family == "faster_rcnn" else {"backbone": EVERYTHING["backbone"]}
    gradients, teacher = Gradients(), Teacher(small_detector(family, 1, width=0.5))
    module = distiller(small_detector(family), teacher, {"defeat": partial(DeFeat, **options)})
    data = kind(Shapes(train=4, val=2, test=0, size=64), batch_size=4, workers=0, min_size=64, max_size=64)
    trainer = fit(module, tmp_path, data, max_steps=1, callbacks=[gradients])
    assert trainer.global_step == 1
    assert [name for name, found in gradients.found.items() if found is None] == []
    assert all(found.isfinite().all() for found in gradients.found.values())
    if kind is DetectionData:
        assert [name for name, found in gradients.found.items() if not found.any()] == []


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(s, t) for s in BOX_FAMILIES for t in BOX_FAMILIES if s != t],
)
@pytest.mark.parametrize("mask", ["ground_truth", "fine_grained"])
def test_any_family_teaches_any_other_on_the_strides_they_share(
    student: str, teacher: str, mask: str, tmp_path: Path
) -> None:
    losses = {"defeat": partial(DeFeat, backbone=EVERYTHING["backbone"], mask={"kind": mask})}
    module, gradients = (
        distiller(small_detector(student), Teacher(small_detector(teacher, 1, width=0.5)), losses),
        Gradients(),
    )
    trainer = fit(module, tmp_path, max_steps=1, callbacks=[gradients])
    shared = set(module.student.spec.neck) & set(module.teacher.detector.spec.neck)  # type: ignore[union-attr]
    assert shared == ({8, 16, 32, 64} if "faster_rcnn" in (student, teacher) else {8, 16, 32, 64, 128})
    for term in ("neck.foreground", "neck.background", "backbone.foreground", "backbone.background"):
        assert trainer.callback_metrics[f"term/defeat/{term}"] > 0
    assert [name for name, found in gradients.found.items() if found is None] == []
    adapted = {name: found for name, found in gradients.found.items() if name.startswith("losses.")}
    assert len(adapted) >= len(shared)
    assert all(found is not None and found.any() for found in adapted.values())


def test_the_configuration_names_the_loss_terms_of_every_family() -> None:
    batch = shapes_data().load_batch("train", range(2))
    for family in BOX_FAMILIES:
        detector = small_detector(family)
        option = f"supervised={type(detector).__name__}"
        configured = compose_config([option]).supervised
        assert configured == dict.fromkeys(detector.view(batch).losses, 1.0)
    # Mask R-CNN needs masks: tests/smoke/test_train_masks.py trains it with this option
    assert set(compose_config(["supervised=MaskRCNN"]).supervised) == {
        "loss_mask",
        *compose_config(["supervised=FasterRCNN"]).supervised,
    }


# -- the student that is left


def plain_torchvision(model: dict[str, Any]) -> nn.Module:
    """The torchvision model that a `student.json` describes, by torchvision alone."""
    norms = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}
    backbone, pixels = model["backbone"], model["pixels"]
    norm = partial(norms[backbone["norm"]], eps=backbone["norm_eps"])
    body = getattr(resnet, f"resnet{backbone['depth']}")(norm_layer=norm)
    shared = {
        "num_classes": len(model["classes"]) + 1,
        "min_size": model["min_size"],
        "max_size": model["max_size"],
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
    }
    if model["family"] != "faster_rcnn":
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        backbone = _resnet_fpn_extractor(body, 5, [2, 3, 4], LastLevelP6P7(256, 256))
        names = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
    if model["family"] == "fcos":
        return detection.FCOS(backbone, **shared, **{k: model[k] for k in (*names, "center_sampling_radius")})
    sizes = model["anchors"]["sizes"]
    anchors = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(model["anchors"]["ratios"]),) * len(sizes))
    if model["family"] == "retinanet":
        return detection.RetinaNet(backbone, anchor_generator=anchors, **shared, **{k: model[k] for k in names})
    passed = {name: value for name, value in model.items() if name.startswith("rpn_")}
    passed |= {f"box_{name}": model[name] for name in ("score_thresh", "nms_thresh", "detections_per_img")}
    head = detection.faster_rcnn.TwoMLPHead(256 * 49, model["head_channels"])
    last = detection.faster_rcnn.FastRCNNPredictor(model["head_channels"], shared.pop("num_classes"))
    return detection.FasterRCNN(
        _resnet_fpn_extractor(body, 5),
        rpn_anchor_generator=anchors,
        box_head=head,
        box_predictor=last,
        **shared,
        **passed,
    )


@pytest.mark.parametrize(("family", "norm"), [("faster_rcnn", "batch"), ("retinanet", "frozen"), ("fcos", "batch")])
def test_the_student_left_behind_is_torchvisions_own_model(family: str, norm: str, tmp_path: Path) -> None:
    kernel = {"box_roi_align": "torchvision"} if family == "faster_rcnn" else {}  # else equal but for rounding
    size = {"min_size": 96, "max_size": 120}
    student = small_detector(family, depth=18, width=1.0, neck_channels=256, norm=norm, **size, **kernel).eval()
    save_student(student, tmp_path)
    model = json.loads((tmp_path / "student.json").read_text())["model"]
    theirs = plain_torchvision(model).eval()
    theirs.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True), strict=True)
    data = shapes_data(source=Shapes(train=1, val=2, test=0, size=96), min_size=96, max_size=120)
    batch = data.load_batch("val", range(2))
    with torch.no_grad():
        expected = theirs([image.float() / 255 for image in batch.images])
    for ours, other in zip(student.view(batch, training=False).detections, expected, strict=True):
        known = other["labels"] > 0  # torchvision's one-stage detectors may name the label that no class has
        assert known.sum() > 5
        assert torch.equal(ours.boxes, other["boxes"][known])
        assert torch.equal(ours.scores, other["scores"][known])
        assert torch.equal(ours.labels, other["labels"][known])


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_narrow_student_comes_back_on_our_backbone(family: str, tmp_path: Path) -> None:
    module = distiller(small_detector(family))
    fit(module, tmp_path, max_epochs=1)
    save_student(module.student, tmp_path)
    batch = shapes_data().load_batch("val", range(4))
    back = load_detector(tmp_path).eval()
    pairs = zip(
        module.student.eval().view(batch, training=False).detections,
        back.view(batch, training=False).detections,
        strict=True,
    )
    for ours, theirs in pairs:
        assert len(ours.boxes) > 0
        assert all(torch.equal(one, other) for one, other in zip(ours[:3], theirs[:3], strict=True))


# -- evaluation and the teacher's check


def numbers(model: Detector, data: DetectionData) -> dict[str, float]:
    return evaluate(model, data)


class BeforeStepOne(L.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        if trainer.global_step == 0:
            self.values = dict(module.teacher.values)


def test_an_unknown_teacher_is_measured_before_the_first_step(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    look, teacher = BeforeStepOne(), small_teacher()
    module = distiller(teacher=teacher, losses={"defeat": DeFeat})
    fit(module, tmp_path, max_epochs=1, callbacks=[TeacherCheck(min_ap=0.9), look])
    assert look.values == {
        f"val/{name}": value for name, value in numbers(small_teacher().detector, shapes_data()).items()
    }
    assert 0 < look.values["val/AR100"] < 1
    assert any("below teacher.min_ap=0.9" in str(warning.message) for warning in recwarn)


def test_a_known_teacher_is_not_measured_again(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    teacher = small_teacher()
    teacher.values = {"val/AP": 0.5}
    module = distiller(teacher=teacher, losses={"defeat": DeFeat})
    fit(module, tmp_path, max_epochs=1, callbacks=[TeacherCheck(min_ap=0.4)])
    assert teacher.values == {"val/AP": 0.5}
    assert not any("min_ap" in str(warning.message) for warning in recwarn)


def test_a_teacher_of_other_classes_is_a_warning_where_the_loss_does_not_mind(tmp_path: Path) -> None:
    teacher = small_teacher(classes=("cat", "dog"))
    module = distiller(teacher=teacher, losses={"defeat": DeFeat})
    with pytest.warns(UserWarning, match="the teacher's AP is not known: .*share no name"):
        fit(module, tmp_path, max_epochs=1, callbacks=[TeacherCheck(min_ap=0.4)])
    assert teacher.values == {}


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_validation_inside_training_gives_the_numbers_of_evaluate(family: str, tmp_path: Path) -> None:
    module, data = (
        distiller(small_detector(family, seed=1, width=0.5, norm="frozen"), schedule=sgd(lr=1e-4)),
        shapes_data(),
    )
    trainer = fit(module, tmp_path, data, limit_val_batches=1.0)
    expected = numbers(module.student, shapes_data())
    assert 0 < expected["AR100"] < 1
    assert {name: trainer.callback_metrics[f"val/{name}"].item() for name in expected} == expected


def test_a_detector_of_another_class_list_is_measured_on_the_shared_names() -> None:
    names = ("ring", "cat", "circle", "dog", "star")
    model, data = small_detector(classes=names).eval(), shapes_data()
    truth = data.ground_truth("val")
    known = [row for row in truth["annotations"] if CLASSES[row["category_id"] - 1] in names]
    metric = CocoMetric(truth, data.classes)
    metric_of_shared = CocoMetric({**truth, "annotations": known}, data.classes)
    for batch in data.eval_dataloader("val"):
        shared = []
        for found in model.view(batch, training=False, frozen=True).detections:
            rows = [i for i, label in enumerate(found.labels.tolist()) if names[label - 1] in CLASSES]
            labels = [CLASSES.index(names[int(found.labels[i]) - 1]) + 1 for i in rows]
            shared.append(Detections(found.boxes[rows], found.scores[rows], torch.tensor(labels, dtype=torch.int64)))
        metric.update(batch.ids, shared)
        metric_of_shared.update(batch.ids, shared)
    found = numbers(model, data)
    expected_of_shared = {f"shared_{name}": value for name, value in metric_of_shared.compute().items()}
    assert found == metric.compute() | expected_of_shared
    assert found["AR100"] > 0


class Eye(FrozenModel):
    """A small image classifier with random weights, as DICOD wants one."""

    def __init__(self, classes: Sequence[str] = CLASSES) -> None:
        net = nn.ModuleDict(
            {"stem": nn.Conv2d(3, 4, 3, 2), "norm": nn.BatchNorm2d(4), "fc": nn.Linear(4, len(classes))}
        )
        super().__init__(net, "memory")
        self.net, self.classes = net, tuple(classes)

    def images(self, batch: Batch) -> Tensor:
        return batch.images.float() / 128 - 1

    def stem(self, images: Tensor) -> Tensor:
        found: Tensor = self.net["norm"](self.net["stem"](images))
        return found

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        found: Tensor = self.net["fc"](self.stem(images).mean((2, 3)))
        return found


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_classifier_teaches_without_a_teacher_and_stays_a_guest(family: str, tmp_path: Path) -> None:
    student = small_detector(family, **({"anchor_sizes": ANCHORS} if family == "retinanet" else {}))
    eye = Eye()
    before = {name: value.clone() for name, value in eye.net.state_dict().items()}
    module = Distiller(student, None, {"dicod": DICOD(student.spec, None, eye, size=16)}, schedule=sgd())
    average, keep = EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    trainer = fit(module, tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[average, keep])
    assert all(trainer.callback_metrics[f"term/dicod/{term}"] > 0 for term in ("classes", "pixels", "features"))

    theirs = {id(parameter) for parameter in eye.net.parameters()}
    assert not theirs & {id(parameter) for parameter in module.parameters()}
    assert not theirs & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert average._average_model is not None
    assert average._average_model.module.losses["dicod"].classifier is eye
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert {name.split(".")[0] for name in checkpoint[part]} == {"student"}
    assert checkpoint["guests"] == {"dicod": {"source": "memory", "sha256": eye.fingerprint}}
    assert_same(eye.net.state_dict(), before)


@pytest.mark.parametrize("same", [True, False])
def test_a_resume_with_another_classifier_is_refused(same: bool, tmp_path: Path) -> None:
    student, eye = small_detector(), Eye()

    def module(known: Eye) -> Distiller:
        return Distiller(small_detector(), None, {"dicod": DICOD(student.spec, None, known, size=16)}, schedule=sgd())

    fit(module(eye), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    if same:
        fit(module(eye), tmp_path, ckpt_path=tmp_path / "last.ckpt")
        return
    torch.manual_seed(9)
    other = Eye()
    with pytest.raises(
        DistillError, match=r"made with the frozen model of the loss dicod memory .*, but this run has memory"
    ):
        fit(module(other), tmp_path, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_classifier_s_terms_reach_the_heads_that_they_are_of(family: str) -> None:
    student = small_detector(family, **({"anchor_sizes": ANCHORS} if family == "retinanet" else {}))
    if family != "faster_rcnn":
        class_layer, box_layer = "head.classification_head.cls_logits", "head.regression_head.bbox_reg"
    else:
        class_layer, box_layer = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
    layers = [student.net.get_submodule(name).weight for name in (class_layer, box_layer)]
    data = shapes_data()
    values = DICOD(student.spec, None, Eye(), size=16)(student.view(next(iter(data.train_dataloader())), seed=1), None)
    for term, reached in (("classes", [True, False]), ("pixels", [False, True]), ("features", [False, True])):
        found = torch.autograd.grad(values[term], layers, allow_unused=True, retain_graph=True)
        assert [x is not None and bool(x.abs().sum() > 0) for x in found] == reached, term


def test_a_loss_without_a_teacher_is_refused() -> None:
    spec = small_detector().spec
    with pytest.raises(DistillError, match="need a teacher, but none was given; use distill=none"):
        Distiller(small_detector(), None, {"defeat": DeFeat(spec, spec)})


# -- layout


def channels_last(module: nn.Module) -> bool:
    """Whether every weight of a convolution lies so."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_the_layout_changes_nothing_but_the_rounding(tmp_path: Path) -> None:
    plain, laid = (distiller(small_detector(), losses={"defeat": DeFeat}) for _ in range(2))
    schedule.use_channels_last(laid)
    trainers = [fit(module, tmp_path, max_steps=1) for module in (plain, laid)]
    assert not channels_last(plain)
    assert channels_last(laid.student)
    assert channels_last(laid.losses)
    after = copy_weights(plain)
    assert max(float((value - after[name]).abs().max()) for name, value in copy_weights(laid).items()) < 1e-5
    # What DDP's buckets and the optimiser's fast path ask for.
    state = trainers[1].optimizers[0].state
    for parameter in laid.parameters():
        assert state[parameter]["momentum_buffer"].stride() == parameter.stride()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_command_line_lays_out_the_student(wanted: bool) -> None:
    from distill.cli.config import override_checks
    from distill.cli.runs.assembly import assemble
    from distill.cli.runs.preflight import plan_run

    lines = [
        "distill=none",
        f"channels_last={wanted}",
        "data.source.train=2",
        "data.source.val=2",
        "data.source.test=0",
    ]
    plan = plan_run(override_checks.compose_without_run(lines))
    assert channels_last(assemble(plan, plan.data).student) == wanted
