"""Training on images without labels: which terms can, what the own losses see, processes, and a teacher's boxes."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.diagnostics.doctor import measure_terms
from distill.diagnostics.replay import _batch
from distill.evaluation import labeling
from distill.losses.at import AT
from distill.losses.base import DistillLoss
from distill.losses.chen import Chen
from distill.losses.defeat import DeFeat
from distill.losses.detr_logits import DETRLogits
from distill.losses.dsig import DSIG
from distill.losses.fgd import FGD
from distill.losses.foundation import Foundation
from distill.losses.mimic import Mimic
from distill.losses.pkd import PKD
from distill.losses.ssim import SSIM
from distill.training.balance import GradientBalance
from distill.training.distiller import Distiller
from distill.training.nonfinite import _batch_containers
from distill.types import Batch, DistillError, MissingTargets
from helpers.detectors import QUERY_FAMILIES, padded_batch, query_batch, query_detector, random_detector
from helpers.methods import METHODS, small_loss
from helpers.training import (
    assert_same,
    copy_weights,
    distiller,
    fit,
    sgd,
    shapes_data,
    small_detector,
    small_teacher,
)
from helpers.two_processes import start_two_processes

WHOLE = {"kind": "none"}
SETTINGS: dict[str, tuple[Callable[..., DistillLoss], str]] = {
    **{
        name: (small_loss(name), method.family)
        for name, method in METHODS.items()
        if not (method.needs_model or method.detectors)
    },
    **{f"detr_logits of {family}": (DETRLogits, family) for family in QUERY_FAMILIES if family != "rtdetr"},
    **{f"{name} of RetinaNet": (small_loss(name), "retinanet") for name in ("dist", "response")},
    "defeat everywhere": (partial(DeFeat, mask=WHOLE, neck={"background": 0}), "faster_rcnn"),
    "ssim, masked": (partial(SSIM, mask={"kind": "ground_truth"}), "faster_rcnn"),
    "chen, hint": (partial(Chen, rpn={"soft": 0, "box": 0}, rcn={"soft": 0, "box": 0}), "faster_rcnn"),
    "mimic of proposals": (partial(Mimic, regions={"kind": "proposals", "top": 9}), "faster_rcnn"),
    "fgd, the rest": (partial(FGD, neck={"foreground": 0, "background": 0}), "faster_rcnn"),
    "dsig of RetinaNet": (
        partial(
            DSIG,
            nodes={"foreground": 0, "background": 0, "predicted": 1},
            edges={"mining": None},
            logits={"classes": 0, "boxes": 0},
            adapter={"kernel": 1},
        ),
        "retinanet",
    ),
}
"""The constructors of losses, and the families of student and teacher."""


@functools.cache
def views(family: str) -> tuple[Any, Any]:
    build, images = random_detector, padded_batch()
    if family in QUERY_FAMILIES:
        pytest.importorskip("transformers", reason="the detectors with queries are those of transformers")
        build, images = query_detector, query_batch(family)
    batch = replace(images, targets=MissingTargets())
    student, teacher = build(family).train(), build(family, seed=1).eval()
    return student.view(batch, seed=0), teacher.view(batch, frozen=True, seed=0)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_loss_knows_which_of_its_terms_read_ground_truth(name: str) -> None:
    build, family = SETTINGS[name]
    student, teacher = views(family)
    loss = build(student=student.spec, teacher=teacher.spec)
    assert set(loss.truth_terms) <= loss.weights.keys()
    if loss.truth_terms:
        with pytest.raises(DistillError, match="whose boxes are not known"):
            loss(student, teacher)
    else:
        values = loss(student, teacher)
        assert values
        assert all(value.isfinite() for value in values.values())


def data(unlabeled: Any = None, train: int = 8, **options: Any) -> DetectionData:
    given = {} if unlabeled is None else {"unlabeled": unlabeled}
    return shapes_data(source=Shapes(train=train, val=2, test=0, size=64), **given, **options)


def first_batch(unlabeled: Any) -> Batch:
    made = data(unlabeled)
    made.setup("fit")
    batch: Batch = next(iter(made.train_dataloader()))  # type: ignore[assignment]
    return batch


def test_own_losses_see_labeled_images_alone_and_terms_are_means_over_all_images() -> None:
    module = distiller(losses={"at": AT})
    joint = first_batch({"images": 4, "ratio": 0.5})
    assert joint.unlabeled is not None
    alone = replace(joint, unlabeled=None)
    other = replace(joint.unlabeled, targets=joint.targets[:2])
    step, labeled, unlabeled = (module.compute_step(batch, 3, 0.0) for batch in (joint, alone, other))
    own = [name for name in step.terms if name.startswith("student/")]
    assert len(own) == 4
    assert all(torch.equal(step.terms[name], labeled.terms[name]) for name in own)
    expected = (4 * labeled.terms["at/neck.all"] + 2 * unlabeled.terms["at/neck.all"]) / 6
    assert step.terms["at/neck.all"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.terms["at/neck.all"].item() != pytest.approx(labeled.terms["at/neck.all"].item(), rel=1e-3)


def test_shares_of_the_gradient_are_those_of_the_labeled_images() -> None:
    """The share that `balance` gives a method is the share that doctor and the logs show."""
    module = distiller(losses={"at": AT})
    joint = first_batch({"images": 4, "ratio": 0.5})
    found, expected = (measure_terms(module.compute_step(x, 3, 0.0)) for x in (joint, replace(joint, unlabeled=None)))
    assert 0 < found["at/neck.all"]["share"] < 1
    assert found == expected


def test_a_balance_is_measured_after_the_forward_passes() -> None:
    """`Foundation` takes a forward pass for a new step, and would count the measurement as a step of its own."""

    class Features:
        channels = 6

        def features(self, batch: Batch, cells: tuple[int, int]) -> torch.Tensor:
            return torch.randn(len(batch), 6, *cells, generator=torch.Generator().manual_seed(batch.ids[0]))

    joint, norms = first_batch({"images": 4, "ratio": 0.5}), []
    for loss_scale in (None, 1.0):
        build = partial(Foundation, model=Features(), neck={"cosine": 1e-3})
        module = distiller(losses={"foundation": build}, balance=GradientBalance(share=1e9))  # a factor of 1
        module.compute_step(joint, 3, 0.0, loss_scale).loss.backward()
        module.losses["foundation"]._collect()
        norms.append(module.losses["foundation"].norms)
    assert norms[0].all()
    assert torch.equal(norms[0], norms[1])


def test_weights_of_zero_leave_the_student_alone(tmp_path: Path) -> None:
    plain = distiller()
    fit(plain, tmp_path, data(), max_epochs=1)
    zero = distiller(losses={"pkd": partial(PKD, neck={"all": 0.0})})
    fit(zero, tmp_path, data(4), max_epochs=1)
    assert_same(copy_weights(plain.student), copy_weights(zero.student))


def test_losses_that_read_ground_truth_are_refused(tmp_path: Path) -> None:
    for losses, message in (
        ({"defeat": DeFeat}, r"defeat/neck\.foreground, defeat/neck\.background read the ground truth.*distill=pkd"),
        (
            {"fgd": FGD},
            r"distill\.losses\.fgd\.neck\.foreground=0 .*; fgd/neck\.attention, fgd/neck\.relation can stay",
        ),
        ({}, "without distillation losses, nothing is learned"),
    ):
        with pytest.raises(DistillError, match=message):
            fit(distiller(losses=losses), tmp_path, data(4))


def test_a_teachers_boxes_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []
    label = labeling.label_images
    monkeypatch.setattr(labeling, "label_images", lambda *given: calls.append("") or label(*given))
    teacher = small_teacher()
    for score in (0.1, 0.2):
        module = distiller(teacher=teacher, losses={"defeat": DeFeat})
        made = data({"images": 4, "boxes": "teacher", "score": score})
        fit(module, tmp_path, made, max_epochs=1)
        records = made.unlabeled_records()
        assert len(records) == 4
        found = [teacher.detector([made.load_unlabeled(file)], score)[0] for file in records.files.texts()]
        assert records.labels.tolist() == [label for each in found for label in each.labels.tolist()]
        assert records.boxes == pytest.approx(torch.cat([each.boxes for each in found]).clamp(0, 64).numpy(), abs=1e-3)
    assert len(calls) == 1
    fit(module, tmp_path, data({"images": 5, "boxes": "teacher", "score": 0.1}), max_epochs=1)
    assert len(calls) == 2


def test_a_saved_step_keeps_its_unlabeled_images() -> None:
    batch = first_batch(4)
    again = _batch(_batch_containers(batch))
    assert batch.unlabeled is not None
    assert again.unlabeled is not None
    assert again.unlabeled.targets_missing
    assert torch.equal(again.unlabeled.images, batch.unlabeled.images)


def _slow_distiller() -> Distiller:
    """Its batches have no statistics, and its steps are so small that other draws in two processes hardly matter."""
    return distiller(small_detector(norm="frozen"), losses={"at": AT}, schedule=sgd(lr=1e-5))


def _train_on_rank(rank: int, folder: Path, port: int) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in place.items()}
    module = _slow_distiller()
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen")
    made = data({"images": 5}, batch_size=2)
    fit(module, folder, made, devices=2, strategy=strategy, max_epochs=2)
    weights = torch.cat([x.flatten() for x in module.student.parameters()])
    torch.save(weights, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_two_processes_end_with_one_student(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_two_processes(_train_on_rank, tmp_path, port)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    alone = _slow_distiller()
    start = torch.cat([x.detach().clone().flatten() for x in alone.student.parameters()])
    fit(alone, tmp_path, data({"images": 5}, batch_size=4), max_epochs=2)
    weights = torch.cat([x.flatten() for x in alone.student.parameters()])
    assert (first - weights).norm() < 0.02 * (weights - start).norm()


def test_the_label_file_is_in_cocos_format(tmp_path: Path) -> None:
    teacher = small_teacher()
    labeler = replace(labeling.teacher_labeler(teacher, 0.1), categories={1: 11, 2: 12})
    images = {"a.png": "a", "b.png": "b", "c.png": "c"}
    pixels = {name: torch.full((3, 64, 80), 90 * place, dtype=torch.uint8) for place, name in enumerate("ab")}

    def load(name: str) -> torch.Tensor:
        if name not in pixels:
            raise DistillError(f"{name}: no image")
        return pixels[name]

    done = labeling.label_images(labeler, images, load, tmp_path / "new" / "labels.json")
    assert done.failures == {"c.png": "c: no image"}
    content = json.loads((tmp_path / "new" / "labels.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png"]
    assert content["info"]["sha256"] == teacher.fingerprint
    assert [row["name"] for row in content["categories"]] == list(teacher.spec.classes[:2])
    found = teacher.detector([pixels["a"]], 0.1)[0]
    expected = [
        [*box[:2], box[2] - box[0], box[3] - box[1], 10.0 + label, score]
        for box, label, score in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        if label <= 2
    ]
    rows = [row for row in content["annotations"] if row["image_id"] == 1]
    assert len(rows) == len(expected) > 0
    for row, values in zip(rows, expected, strict=True):
        assert [*row["bbox"], row["category_id"], row["score"]] == pytest.approx(values, abs=1e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["labels.json"]


def test_a_stopped_labeling_goes_on(tmp_path: Path) -> None:
    labeler = labeling.teacher_labeler(small_teacher(), 0.3)
    images = {name: name for name in "abc"}
    read: list[str] = []

    def load(name: str, stop: str = "") -> torch.Tensor:
        if name == stop:
            raise KeyboardInterrupt
        read.append(name)
        return torch.full((3, 64, 64), 50, dtype=torch.uint8)

    out = tmp_path / "labels.json"
    with pytest.raises(KeyboardInterrupt):
        labeling.label_images(labeler, images, partial(load, stop="c"), out)
    assert not out.exists()
    labeling.label_images(labeler, images, load, out)
    assert read == ["a", "b", "c"]
    assert len(json.loads(out.read_text())["images"]) == 3
    labeling.label_images(labeler, images, load, out)  # a finished file is written anew
    assert read == ["a", "b", "c"] * 2
