"""Overrides of version 0.1.0, translated and refused."""

from __future__ import annotations

import importlib

import pytest

from distill.cli.config.renamed_keys import TARGETS, refuse_renamed, translated
from distill.types import DistillError

RENAMED = {
    "model.norm=live": "model.backbone.norm=batch",
    "++teacher.model.norm='fixed'": "++teacher.model.backbone.norm=batch_fixed_stats",
    "model.norm=live,frozen": "model.backbone.norm=batch,frozen",
    'teacher.run=["schedule.epochs=2","model.norm=fixed"]': (
        'teacher.run=["schedule.epochs=2","model.backbone.norm=batch_fixed_stats"]'
    ),
    "model.depth=18": "model.backbone.depth=18",
    "model.backbone=mobilenet_v2": "model.backbone.name=mobilenet_v2",
    "model.backbone_weights=null": "model.backbone.weights=null",
    "teacher.model.anchor_sizes=[[8],[16],[32],[64],[128]]": "teacher.model.anchors.sizes=[[8],[16],[32],[64],[128]]",
    "model.mean=[0.5,0.5,0.5]": "model.pixels.mean=[0.5,0.5,0.5]",
    "~model.norm_eps": "~model.backbone.norm_eps",
    "model._target_=distill.detectors.two_stage.FasterRCNN": "model._target_=distill.FasterRCNN",
    "+callbacks.mine={_target_: distill.callbacks.panels.Panels, count: 2}": (
        "+callbacks.mine={_target_: distill.PredictionImages, count: 2}"
    ),
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_override_is_translated_and_on_the_command_line_refused(old: str) -> None:
    assert translated(old) == RENAMED[old]
    with pytest.raises(DistillError) as refusal:
        refuse_renamed(["seed=1", old])
    assert str(refusal.value) == f"{old} is now {RENAMED[old]}"


@pytest.mark.parametrize(
    "line",
    [
        "model.backbone.norm=sync",
        "model.backbone={depth: 10, norm: batch}",
        "model.pixels.mean=[0.5,0.5,0.5]",
        "~model.head_channels",
        "data.source.root='a path, with = and live'",
        'teacher.run=["schedule.epochs=2"]',
        "teacher.run=[",
        "distill.losses.norm=live",
        "distill=[defeat,ssim]",
    ],
)
def test_an_override_of_today_stays_as_it_is(line: str) -> None:
    assert translated(line) == line
    refuse_renamed([line])


@pytest.mark.parametrize("path", TARGETS)
def test_the_old_class_path_is_gone_and_the_new_one_exists(path: str) -> None:
    import distill

    module, _, name = path.rpartition(".")
    with pytest.raises((ImportError, AttributeError)):
        getattr(importlib.import_module(f"distill.{module}"), name)
    *packages, name = TARGETS[path].split(".")
    home = importlib.import_module(".".join(["distill", *packages])) if packages else distill
    assert callable(getattr(home, name))
