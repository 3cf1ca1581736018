"""Every method's option on pairs with a set-prediction detector: it runs, or is refused before a teacher is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.cli.config import compose, instantiate
from distill.types import DistillError
from helpers.detectors import query_detector, random_detector, square_batch
from helpers.grids import mostly_exhaustive

pytest.importorskip("transformers", reason="the extra detr is not installed")

PAIRS = [("rtdetr", "rtdetr"), ("rtdetr", "faster_rcnn"), ("faster_rcnn", "rtdetr"), ("dfine", "retinanet")]
OPTIONS = [option for option in compose.config_groups()["distill"] if option != "none"]
NEED_MODELS = ("dicod", "foundation", "foundation_dinov3")
WORK_EVERYWHERE = (
    "defeat",
    "ssim",
    "pkd",
    "cwd",
    "fgd",
    "mgd",
    "mimic_neck",
    "hint",
    "at",
    "maskd",
    "fbkd",
    "tadf_neck",
)
"""Methods that compare maps of the neck."""


def detector(family: str, seed: int) -> Any:
    if family in ("rtdetr", "dfine"):
        return query_detector(family, seed, neck_channels=64)
    return random_detector(family, seed, neck_channels=64)


def run(option: str, student: Any, teacher: Any) -> bool:
    """One step of an option; False if its losses refuse the pair at construction."""
    nodes = compose.compose_config([f"distill={option}", "hydra.run.dir=."]).distill.losses
    try:
        losses = [instantiate.build_node(node, student=student.spec, teacher=teacher.spec) for node in nodes.values()]
    except DistillError:
        return False
    data = square_batch(((96, 128),) * 2)
    views = student.view(data, seed=1), teacher.view(data, frozen=True, seed=2)
    terms = [term for loss in losses for term in loss(*views).values()]
    sum(terms).backward()
    assert all(term.isfinite() for term in terms)
    gradient = next(p.grad for p in student.body.parameters() if p.grad is not None)
    assert gradient.isfinite().all()
    return True


@pytest.mark.parametrize(("family", "teacher_family"), mostly_exhaustive(PAIRS, PAIRS[1:2]))
def test_every_method_runs_or_is_refused_at_construction(family: str, teacher_family: str) -> None:
    student, teacher = detector(family, 0), detector(teacher_family, 1).eval()
    torch.manual_seed(0)
    chosen = [option for option in OPTIONS if option not in NEED_MODELS]
    if (family, teacher_family) == PAIRS[1]:  # the daily one
        chosen = ["defeat", "ssim", "fgfi", "bckd", "response", "chen"]
    ran = {option for option in chosen if run(option, student, teacher)}
    assert ran >= set(WORK_EVERYWHERE) & set(chosen)
    if family != "faster_rcnn":
        assert not ran & {"chen", "fgfi", "response"}
