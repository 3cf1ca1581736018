"""Analyses that a pair of detectors does not allow are left out with their reason; the others are made."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill.analysis.neck_report import examine_necks, neck_tables, skipped_analyses
from helpers.fake_view import spec
from helpers.training import shapes_data, small_detector

CLASSES = spec().classes
PAIRS = ("distances", "ssim", "cka", "edges")
BARE = replace(spec(), neck={}, outputs=frozenset({"body"}), family="ssd")


def test_reasons() -> None:
    assert skipped_analyses({"student": spec()}, spec(), CLASSES) == {}
    assert skipped_analyses({"student": spec()}, None, CLASSES) == dict.fromkeys(PAIRS, "the run has no teacher")
    no_neck = "the student is a ssd, which has no neck"
    assert skipped_analyses({"student": BARE}, spec(), CLASSES) == {
        "gradients of student": no_neck,
        **{f"{name} of student": no_neck for name in ("distances", "ssim", "cka")},
        "edges of student": "the student is a ssd, which has no roi_features",
    }
    of_teacher = skipped_analyses({"student": spec(), "baseline": spec()}, BARE, CLASSES)
    assert of_teacher["cka of baseline"] == "the teacher is a ssd, which has no neck"
    assert "gradients of student" not in of_teacher
    channels = skipped_analyses({"student": spec(neck=4)}, spec(), CLASSES)
    assert set(channels) == {"distances of student", "ssim of student"}
    assert "unequal channels, [4, 4, 4, 4, 4] and the teacher's [6, 6, 6, 6, 6]" in channels["ssim of student"]
    other = skipped_analyses({"student": spec()}, spec(), CLASSES[::-1])
    assert other == {"gradients of student": "the student has other classes than the data, so it has no loss there"}
    apart = skipped_analyses({"student": spec(strides=(4, 8))}, spec(strides=(16, 32)), CLASSES)
    assert apart["cka of student"] == "no shared stride: [4, 8] and the teacher's [16, 32]"


@pytest.fixture(scope="module")
def report():  # type: ignore[no-untyped-def]
    """A one-stage student with other strides and channels, and a baseline that is the teacher itself."""
    teacher = small_detector("faster_rcnn", neck_channels=32)
    models = {"student": small_detector("retinanet"), "baseline": teacher}
    before = {name: value.clone() for name, value in models["student"].state_dict().items()}
    result = examine_necks(models, teacher, shapes_data(), "val", 3, torch.device("cpu"), examples=2)
    assert all(torch.equal(value, before[name]) for name, value in models["student"].state_dict().items())
    return result


def test_families_and_channels_may_differ(report) -> None:  # type: ignore[no-untyped-def]
    assert set(report.skipped) == {"distances of student", "ssim of student"}
    assert set(report.cka["student"]) == {8, 16, 32, 64}
    assert set(report.gradients["student"]) == {8, 16, 32, 64, 128}
    assert 0 < report.cka["student"][8][2] < 1
    assert len(report.examples) == 2
    assert set(report.examples[0].gradients) == {"student", "baseline"}


def test_a_model_that_is_the_teacher_agrees_with_it(report) -> None:  # type: ignore[no-untyped-def]
    assert report.edges["baseline"] == 0
    assert report.edges["student"] > 0
    assert all(means[2] == pytest.approx(1) for means in report.cka["baseline"].values())
    assert all(
        math.isnan(mean) or mean == pytest.approx(1) for means in report.ssim["baseline"].values() for mean in means
    )
    tables = neck_tables(report)
    assert {row["outside"] for row in tables["distances"]} == {0.0}
    assert {row["inside"] for row in tables["distances"]} <= {0.0, ""}  # no object lies on a coarse level
    assert [row["model"] for row in tables["edges"]] == ["student", "baseline"]
