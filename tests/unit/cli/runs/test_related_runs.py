"""Runs that differ in the distillation only, and the command that trains the same student alone."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.cli.config import compose
from distill.cli.config.instantiate import to_containers
from distill.cli.runs.related_runs import baseline_command, find_related_runs, fingerprint_recipe
from distill.run_folder import RunFolder
from helpers.grids import mostly_exhaustive
from helpers.training import shapes_data


@dataclass
class Plan:
    """The part of a plan that these functions read."""

    config: dict[str, Any]
    folder: RunFolder
    overrides: list[str]


def plan(*lines: str) -> Any:
    config = compose.compose_config([*lines, "paths.run=run", "name=n"])
    return Plan(to_containers(config), RunFolder("run"), list(lines))


RECIPES = [
    (["distill=none"], True),
    (["distill=ssim", "teacher=frcnn_r50", "teacher.seed=3", "init=inherit"], True),
    (["data.workers=7", "pictures=0", "cost=0", "callbacks.terms=null", "trainer.save_every=null"], True),
    (["seed=1"], False),
    (["schedule.epochs=3"], False),
    (["model.backbone.depth=18"], False),
    (["model.backbone.weights=IMAGENET1K_V1"], False),
    (["callbacks=ema"], False),
]


@pytest.fixture(scope="module")
def default() -> Any:
    return plan()


@pytest.mark.parametrize(("lines", "same"), mostly_exhaustive(RECIPES, RECIPES[1:4]))
def test_a_baseline_has_the_same_recipe(lines: list[str], same: bool, default: Any) -> None:
    data = shapes_data()
    assert (fingerprint_recipe(plan(*lines), data, 1) == fingerprint_recipe(default, data, 1)) == same


def test_other_data_and_other_processes_are_another_recipe(default: Any) -> None:
    recipe = fingerprint_recipe(default, shapes_data(), 1)
    assert fingerprint_recipe(default, shapes_data(train=6), 1) != recipe
    assert fingerprint_recipe(default, shapes_data(), 2) != recipe


def test_finished_runs_of_the_recipe_are_found_the_newest_first(tmp_path: Path) -> None:
    others: Any = Plan({"paths": {"outputs": tmp_path}}, RunFolder(tmp_path / "mine" / "x"), [])

    def write(name: str, number: int, recipe: str = "abc", finished: bool = True) -> None:
        run = RunFolder(tmp_path / name)
        run.path.mkdir(parents=True)
        for file in (run.description, run.student) if finished else (run.description,):
            file.touch()
        summary = {"recipe": recipe, "losses": [], "teacher": None, "number": number}
        run.summary.write_text(json.dumps(summary))
        os.utime(run.summary, (number, number))

    for number, name in enumerate(["none/a", "none/b", "sweeps/today/0", "mine/x"]):
        write(name, number)
    write("none/other recipe", 7, "abd")
    write("none/unfinished", 8, finished=False)
    write("none/damaged", 9)
    RunFolder(tmp_path / "none/damaged").summary.write_text('{"recipe": "abc"')
    found = find_related_runs(others, "abc")
    assert [run.summary["number"] for run in found] == [2, 1, 0]
    assert all(run.is_baseline for run in found)


def test_the_baseline_s_command_keeps_all_but_the_distillation() -> None:
    lines = ["data=yolo", "data.source.root='a b'", "model=frcnn_r18", "distill=[defeat,ssim]"]
    lines += ["distill.losses.defeat.neck.foreground=2", "teacher.weights=t", "init=inherit", "hydra.run.dir=r"]
    lines += ["paths.run='the run'"]  # as analyze sets it
    distilled: Any = Plan({}, RunFolder("run"), lines)
    words = shlex.split(baseline_command(distilled))
    assert words == ["python", "-m", "distill", "train", *lines[:3], "distill=none"]


def test_the_baseline_s_command_keeps_squares_that_the_teacher_needed() -> None:
    config = {"data": {"resize": "square"}, "model": {"_target_": "distill.FasterRCNN"}}
    for lines, added in ((["model=frcnn_r18"], ["data.resize=square"]), (["data.resize=square"], [])):
        distilled: Any = Plan(config, RunFolder("run"), lines)
        words = shlex.split(baseline_command(distilled))
        assert words[4:] == [*lines, *added, "distill=none"]


@pytest.mark.parametrize("model", ["distill.FasterRCNN", "distill.RFDETR"])
def test_the_baseline_s_command_keeps_the_side_that_the_pair_got(model: str) -> None:
    """Alone, the student may get squares of another side, and its AP would not compare."""
    config = {"data": {"resize": "square", "min_size": 384, "max_size": 384}, "model": {"_target_": model}}
    shape = [] if model == "distill.RFDETR" else ["data.resize=square"]
    for lines, added in (([], [*shape, "data.min_size=384"]), (["data.min_size=384"], shape)):
        distilled: Any = Plan(config, RunFolder("run"), lines)
        words = shlex.split(baseline_command(distilled))
        assert words[4:] == [*lines, *added, "distill=none"]
