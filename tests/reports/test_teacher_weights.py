"""Teachers that users name: a run's checkpoint, torchvision's COCO file, a moved teacher, a teacher without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.config import override_checks
from distill.cli.runs import shared_run, teacher_cache
from distill.cli.runs.preflight import plan_teacher
from distill.cli.runs.recorded_run import load_teacher_of
from distill.cli.runs.teacher_cache import TeacherOptions
from distill.detectors.student_files import save_student
from distill.run_folder import RunFolder
from distill.types import DistillError
from helpers.detectors import random_detector


def options(*overrides: str) -> TeacherOptions:
    planned = plan_teacher(override_checks.compose_without_run(["teacher=retinanet_r10_quarter", *overrides]))
    assert planned is not None
    return planned


def write_checkpoint(path: Path, student: Any) -> None:
    path.parent.mkdir(parents=True)
    state = {f"student.net.{name}": value for name, value in student.net.state_dict().items()}
    torch.save({"student": student.describe(), "student_format": 2, "state_dict": state}, path)


def test_the_best_checkpoint_of_a_run(tmp_path: Path) -> None:
    student = random_detector("faster_rcnn")
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    write_checkpoint(path, student)
    detector = teacher_cache.load_teacher(options(), str(path), ["cat"])
    assert detector.describe() == student.describe()
    state = student.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in detector.net.state_dict().items())


def test_published_weights_of_a_teacher_without_batch_norms(tmp_path: Path) -> None:
    """The norms of other teachers are frozen. An RF-DETR has none that could be."""
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    planned = options("teacher=rfdetr_mini")
    made = planned.build(classes=["cat", "dog"], min_size=128, max_size=128)
    made.net.config.id2label = {0: "cat", 1: "dog"}
    made.net.save_pretrained(tmp_path)
    detector = teacher_cache.load_teacher(planned, str(tmp_path), ["cat", "dog"])
    assert torch.equal(detector.net.class_embed.weight, made.net.class_embed.weight)


@pytest.mark.parametrize(
    ("teacher", "backbone", "norm"),
    [
        ("retinanet_r50", "timm/convnext_atto", "batch"),
        ("fcos_r50", "timm/convnext_atto", "batch"),
        ("frcnn_r50", "timm/convnext_atto", "batch"),
        ("retinanet_r50", "timm/resnet10t", "frozen"),
        ("retinanet_r50", "mobilenet_v3_small", "frozen"),
        ("retinanet_r50", "resnet", "frozen"),
    ],
)
def test_batch_norms_of_a_teacher_are_frozen_if_it_has_some(
    teacher: str, backbone: str, norm: str, tmp_path: Path
) -> None:
    """A file of weights for a ConvNeXt was refused: its layer norms cannot be frozen."""
    if backbone.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    depth = 10 if backbone == "resnet" else "null"
    words = [f"teacher.model.backbone.name={backbone}", f"teacher.model.backbone.depth={depth}"]
    planned = options(f"teacher={teacher}", *words, "teacher.model.neck_channels=64")
    source = teacher_cache.untrained(planned, ["cat", "dog"])
    torch.save(source.net.state_dict(), tmp_path / "weights.pth")
    detector = teacher_cache.load_teacher(planned, str(tmp_path / "weights.pth"), ["cat", "dog"])
    assert detector.spec.norm == norm
    state = detector.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in source.net.state_dict().items() if name in state)


def test_a_coco_file_of_torchvision_with_classes_of_the_data(tmp_path: Path) -> None:
    source = teacher_cache.untrained(options(), [f"class {label}" for label in range(1, 91)])
    state = {name: value for name, value in source.net.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(state, tmp_path / "coco.pth")
    detector = teacher_cache.load_teacher(options(), str(tmp_path / "coco.pth"), ["dog", "person"])
    assert detector.classes == ("dog", "person")
    weight = state["head.classification_head.cls_logits.weight"]
    rows = [91 * anchor + label for anchor in range(len(weight) // 91) for label in (0, 18, 1)]
    assert torch.equal(detector.net.head.classification_head.cls_logits.weight, weight[rows])
    assert detector.describe()["backbone"]["norm_eps"] == 0.0
    with pytest.raises(DistillError, match=r"\['screwdriver'\] of \['dog', 'screwdriver'\].* a teacher must know all"):
        teacher_cache.load_teacher(options(), str(tmp_path / "coco.pth"), ["dog", "screwdriver"])


def test_a_teacher_with_a_new_head() -> None:
    with pytest.raises(DistillError, match=r"teacher\.model\.head=new: a teacher whose head has random weights"):
        options("teacher.weights=COCO_V1", "teacher.model.head=new")
    assert options("teacher.model.weights=COCO_V1", "teacher.model.head=new").weights is None  # its run trains the head


def test_match_does_not_give_a_teacher_rows_with_random_weights(tmp_path: Path) -> None:
    source = teacher_cache.untrained(options(), [f"class {label}" for label in range(1, 91)])
    torch.save(source.net.state_dict(), tmp_path / "coco.pth")
    with pytest.raises(DistillError, match=r"\['screwdriver'\].* a teacher must know all classes"):
        teacher_cache.load_teacher(
            options("teacher.model.head=match"), str(tmp_path / "coco.pth"), ["dog", "screwdriver"]
        )


def finished_run(folder: Path, source: Path, classes: list[str]) -> RunFolder:
    folder.mkdir()
    run = RunFolder(folder)
    run.summary.write_text(json.dumps({"teacher": {"source": str(source), "classes": classes}}))
    return run


def test_evaluate_a_run_whose_teacher_moved(tmp_path: Path) -> None:
    student = random_detector("retinanet")
    save_student(student, tmp_path / "new")
    run = finished_run(tmp_path / "run", tmp_path / "old", list(student.classes))
    with pytest.raises(DistillError, match=r"the run's teacher is no longer at .*old.* teacher.weights="):
        load_teacher_of(run, options())
    given = options(f"teacher.weights={tmp_path / 'new'}")
    assert load_teacher_of(run, given, ["cat"]).describe() == student.describe()


def test_evaluate_uses_the_given_teacher_where_the_old_one_still_exists(tmp_path: Path) -> None:
    old, new = random_detector("retinanet"), random_detector("retinanet", seed=1)
    for detector, name in ((old, "old"), (new, "new")):
        save_student(detector, tmp_path / name)
    run = finished_run(tmp_path / "run", tmp_path / "old", list(old.classes))
    given = options(f"teacher.weights={tmp_path / 'new'}")
    layer = "head.classification_head.cls_logits.weight"
    assert torch.equal(load_teacher_of(run, given, ["cat"]).net.state_dict()[layer], new.net.state_dict()[layer])
    assert torch.equal(load_teacher_of(run, given).net.state_dict()[layer], old.net.state_dict()[layer])


def test_a_cached_teacher_whose_weights_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = options("teacher.train=never", f"paths.teachers={tmp_path}")
    shared = teacher_cache.teacher_run(planned)
    run = RunFolder(shared.folder)
    shared.folder.mkdir()
    run.summary.write_text("{}")
    run.description.write_text("{}")
    unread: Any = None
    with pytest.raises(DistillError, match=r"no trained teacher at .*student\.pt.*teacher\.weights="):
        teacher_cache.find_teacher(planned, unread)
    trained: list[Path] = []
    monkeypatch.setattr(shared_run, "_train", lambda run, _: trained.append(run.folder))
    shared.train()
    assert trained == [shared.folder]
    run.student.write_bytes(b"")
    shared.train()
    assert len(trained) == 1
