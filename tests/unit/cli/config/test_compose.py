"""Values that the composition computes from the classes of the detectors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from distill.cli.config import target_policy
from distill.cli.config.compose import name_pair, resize_of
from distill.cli.config.override_checks import compose_without_run
from distill.cli.runs.recorded_run import recompose
from distill.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _trust_nothing() -> Iterator[None]:
    yield
    target_policy.set_trusted([])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("distill.FasterRCNN", None, "ratio"),
        ("distill.FCOS", "distill.RetinaNet", "ratio"),
        ("distill.RTDETR", None, "square"),
        ("distill.RTDETR", "distill.FasterRCNN", "square"),
        ("distill.FasterRCNN", "distill.DFine", "square"),
        ("distill.detectors.dfine.DFine", None, "square"),  # another name of the class
        ("distill.NoSuchDetector", None, "ratio"),  # refused when it is built
    ],
)
def test_the_resize_follows_from_the_detectors(student: str, teacher: str | None, expected: str) -> None:
    assert resize_of(student, teacher) == expected


def test_a_subclass_has_the_resize_of_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name says nothing. It got padded images, which it sees as image."""
    (tmp_path / "own_detr.py").write_text("import distill\n\n\nclass Mine(distill.RTDETR):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resize_of("own_detr.Mine", None) == "ratio"  # the run refuses it
    assert "own_detr" not in sys.modules
    target_policy.set_trusted(["trust=[own_detr]"])
    assert resize_of("own_detr.Mine", None) == resize_of("distill.FCOS", "own_detr.Mine") == "square"


def write_student(folder: Path, family: str) -> Path:
    """The files of a finished run that say which detector it trained, and a checkpoint."""
    folder.mkdir()
    model = {"family": family, "classes": ["cat"]}
    (folder / "student.json").write_text(json.dumps({"format": 2, "model": model}))
    (folder / "student.pt").write_bytes(b"weights")
    state = {"student.net.layer": torch.zeros(1)}
    torch.save({"state_dict": state, "student": model, "student_format": 2}, folder / "last.ckpt")
    return folder


@pytest.mark.parametrize("file", [".", "student.pt", "student.json", "last.ckpt"])
def test_a_run_as_teacher_says_whether_it_needs_squares(file: str, tmp_path: Path) -> None:
    """`teacher.model` is the default teacher of the student then, which is not built."""
    detr, cnn = write_student(tmp_path / "a b,c", "rtdetr"), write_student(tmp_path / "cnn", "faster_rcnn")
    assert resize_of("distill.FasterRCNN", "distill.FasterRCNN", str(detr / file)) == "square"
    assert resize_of("distill.FasterRCNN", "distill.RTDETR", str(cnn / file)) == "ratio"
    assert resize_of("distill.RTDETR", "distill.RTDETR", str(cnn / file)) == "square"
    for other in ("COCO_V1", "PekingU/rtdetr_v2_r18vd", str(tmp_path)):  # described by teacher.model
        assert resize_of("distill.FasterRCNN", "distill.RTDETR", other) == "square"
        assert resize_of("distill.FasterRCNN", "distill.FasterRCNN", other) == "ratio"


def rewrite(file: Path, content: str | bytes) -> None:
    """Write a file in place. Its time of modification stays, and so do its folder's times."""
    before = file.stat().st_mtime_ns
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(file, ns=(before, before))


@pytest.mark.parametrize("file", [".", "student.pt", "last.ckpt"])
def test_a_run_that_was_trained_again_is_read_again(file: str, tmp_path: Path) -> None:
    """The class of the first reading stayed, because the time of the given path was the same."""
    run, other = write_student(tmp_path / "run", "faster_rcnn"), write_student(tmp_path / "other", "rtdetr")
    assert resize_of("distill.FCOS", None, str(run / file)) == "ratio"
    for name in ("student.json", "last.ckpt"):
        rewrite(run / name, (other / name).read_bytes())
    assert resize_of("distill.FCOS", None, str(run / file)) == "square"


@pytest.mark.parametrize("file", [".", "last.ckpt"])
def test_a_link_that_leads_to_another_run_is_read_again(file: str, tmp_path: Path) -> None:
    runs = [write_student(tmp_path / family, family) for family in ("faster_rcnn", "rtdetr")]
    newest = tmp_path / "newest"
    for run, shape in zip(runs, ("ratio", "square"), strict=True):
        for path in (run, run / "last.ckpt"):
            os.utime(path, (10**9, 10**9))
        newest.unlink(missing_ok=True)
        newest.symlink_to(run)
        assert resize_of("distill.FCOS", None, str(newest / file)) == shape


def test_the_resize_of_a_run_stays_where_its_teacher_moved(tmp_path: Path) -> None:
    detr, run = write_student(tmp_path / "a b,c", "rtdetr"), RunFolder(tmp_path / "run")
    words = ["data=coco", "model=frcnn_r18", "distill=pkd", "data.min_size=96", f"teacher.weights='{detr}'"]
    cfg = compose_without_run(words)
    assert cfg.data.resize == "square"
    assert compose_without_run([*words, "data.resize=ratio"]).data.resize == "ratio"
    run.path.mkdir()
    run.overrides.write_text(yaml.safe_dump(words))
    run.config.write_text(
        yaml.safe_dump({"data": {"resize": "square", "max_size": 96, "batch_size": 2}, "schedule": {}})
    )
    detr.rename(tmp_path / "moved")
    for more in ([], ["data=voc"]):
        assert recompose(run, more).data.resize == "square"
        assert recompose(run, [*more, "data.resize=ratio"]).data.resize == "ratio"
    run.overrides.write_text(yaml.safe_dump([*words, "data.resize=ratio"]))
    run.config.unlink()
    assert recompose(run, ["data=voc"]).data.resize == "ratio"


def test_a_pair_is_named_after_the_teacher_that_is_used() -> None:
    choices = {"model": "frcnn_r10_mini", "model@teacher.model": "frcnn_r18_mini"}
    losses = {"dsig": {}}
    assert name_pair(choices, None, losses) == "frcnn_r18_mini → frcnn_r10_mini"
    assert name_pair(choices, "outputs/teachers/mine", losses) == "mine → frcnn_r10_mini"
    assert name_pair(choices, None, {}) is None  # a student alone, whatever the default teacher
    assert name_pair({"model": "frcnn_r10_mini"}, None, losses) is None
    without = {"dicod": {"_target_": "distill.DICOD"}}  # a classifier teaches, whatever the default teacher
    assert name_pair(choices, None, without) is None
    assert name_pair(choices, None, without | losses) == "frcnn_r18_mini → frcnn_r10_mini"
