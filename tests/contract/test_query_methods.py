"""Every option on pairs with a set-prediction detector: it runs, or is refused before a teacher is trained.

What runs here in a real step is what ``distill methods`` says from the families' declarations.
"""

from __future__ import annotations

import functools

import pytest
import torch

from distill.cli.reports import method_table
from helpers.detectors import QUERY_FAMILIES
from helpers.option_steps import OPTIONS, refusal, small_pair

pytest.importorskip("transformers", reason="the extra detr is not installed")
pytest.importorskip("timm", reason="the vision transformers are timm's")

PAIRS = {name: pair for name, pair in method_table.PAIRS.items() if QUERY_FAMILIES.keys() & set(pair)}
OTHER_PAIRS = [("dfine", "retinanet"), ("rtdetr", "dfine"), ("deimv2", "rfdetr"), ("rfdetr", "rtdetr")]
"""Pairs that are not in the table."""
WORK_EVERYWHERE = {
    *("defeat", "ssim", "pkd", "cwd", "fgd", "mgd", "mimic_neck", "hint", "at", "maskd", "fbkd", "tadf_neck"),
    *("pad_mimic", "chen_hints", "foundation"),
}
"""Methods that compare maps of the neck."""


@functools.cache
def fitting(pair: str) -> set[str]:
    """The options that fit a pair of the table."""
    return {row.option for row in method_table.method_rows() if pair in row.pairs}


@pytest.mark.parametrize("name", ["RT-DETR as student", "RF-DETR as teacher", "DEIMv2"])
def test_some_options_run_or_are_refused(name: str) -> None:
    """One of each kind: on the neck, with anchors, on all outputs, on queries, on the decoder's points."""
    pair, options = small_pair(*PAIRS[name]), ("ssim", "fgfi", "bckd", "chen", "detr_features", "detr_points")
    ran = {option for option in options if not refusal(option, *pair)}
    expected = {
        "RT-DETR as student": {"ssim"},
        "RF-DETR as teacher": {"ssim", "fgfi", "detr_features"},
        "DEIMv2": {"ssim", "detr_features", "detr_points"},
    }
    assert ran == expected[name]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PAIRS)
def test_what_the_table_says_runs_and_the_rest_is_refused(name: str) -> None:
    torch.manual_seed(0)
    pair = small_pair(*PAIRS[name])
    ran = {option for option in OPTIONS if not refusal(option, *pair)}
    assert ran == fitting(name)
    assert ran >= WORK_EVERYWHERE


@pytest.mark.exhaustive
@pytest.mark.parametrize(("student", "teacher"), OTHER_PAIRS)
def test_every_option_runs_or_is_refused_at_construction(student: str, teacher: str) -> None:
    torch.manual_seed(0)
    pair = small_pair(student, teacher)
    ran = {option for option in OPTIONS if not refusal(option, *pair)}
    assert ran >= WORK_EVERYWHERE
    assert not ran & {"chen", "fgfi", "response"}
    assert ("detr_logits" in ran) == (teacher in QUERY_FAMILIES)
