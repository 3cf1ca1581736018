"""The student alone that a distilled student is compared with: which run it is, and how long it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.cli.commands.resume import resume_words
from distill.cli.config.auto_values import COCO_CLASSES, DataFacts, SizeChoice, resolve
from distill.cli.config.instantiate import to_containers
from distill.cli.config.override_checks import compose_without_run
from distill.cli.runs import baseline
from distill.cli.runs.baseline import longer_overrides, longer_training, plan_baseline
from distill.cli.runs.preflight import RunPlan, plan_run
from distill.cli.runs.related_runs import fingerprint_recipe
from distill.cli.runs.results import measured_by
from distill.cli.runs.shared_run import SharedRun
from distill.run_folder import RunFolder
from distill.types import DistillError
from helpers.runs import TINY_DATA

SPLITS = ["val"]


def planned(tmp_path: Path, *words: str) -> tuple[RunPlan, Any]:
    plan = plan_run(compose_without_run([*TINY_DATA, f"paths.outputs={tmp_path}", *words]))
    return plan, plan.data


def write_run(folder: Path, plan: RunPlan, data: Any, **changes: Any) -> RunFolder:
    """A finished run of the student alone, with the recipe of a plan."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    for file in (run.description, run.student):
        file.touch()
    run.config.write_text(json.dumps({name: plan.config[name] for name in ("data", "schedule", "model")}))
    summary = {"losses": [], "teacher": None, "student": {"val/AP": 0.1}, "recipe": fingerprint_recipe(plan, data, 1)}
    summary["measured"] = measured_by(plan.config["metrics"], data, SPLITS)
    run.summary.write_text(json.dumps(summary | changes))
    return run


def test_without_the_key_and_without_distillation_there_is_no_baseline(tmp_path: Path) -> None:
    assert plan_baseline(*planned(tmp_path), SPLITS, 1) is None
    assert plan_baseline(*planned(tmp_path, "distill=none", "baseline=train"), SPLITS, 1) is None


def test_a_finished_run_of_the_same_student_is_not_trained_again(tmp_path: Path) -> None:
    plan, data = planned(tmp_path, "baseline=train")
    first = plan_baseline(plan, data, SPLITS, 1)
    assert first is not None
    assert not first.run.finished
    assert first.run.folder.parent == tmp_path / "baselines"
    write_run(tmp_path / "none" / "otherwise measured", plan, data, measured={"metrics": {}, "data": {}})
    again = plan_baseline(plan, data, SPLITS, 1)
    assert again is not None
    assert not again.run.finished
    write_run(tmp_path / "none" / "mine", plan, data)
    found = plan_baseline(plan, data, SPLITS, 1)
    assert found is not None
    assert (found.run.folder, found.run.finished) == (tmp_path / "none" / "mine", True)


def test_a_baseline_without_results_on_a_split_is_trained_in_a_folder_of_its_own(tmp_path: Path) -> None:
    plan, data = planned(tmp_path, "baseline=train", "data.source.test=2")
    first = plan_baseline(plan, data, ["val"], 1)
    assert first is not None
    write_run(first.run.folder, plan, data)
    second = plan_baseline(plan, data, ["val", "test"], 1)
    assert second is not None
    assert not second.run.finished


def test_a_finished_run_of_the_longer_training_is_found(tmp_path: Path) -> None:
    wanted = planned(tmp_path, "baseline=train", "baseline_epochs=3", "schedule.evaluate_every=2")
    write_run(tmp_path / "none" / "short", *planned(tmp_path, "distill=none", "schedule.evaluate_every=2"))
    first = plan_baseline(*wanted, SPLITS, 1)
    assert first is not None
    assert not first.run.finished
    longer = ("schedule.epochs=18", "schedule.evaluate_every=6")
    write_run(tmp_path / "none" / "long", *planned(tmp_path, "distill=none", *longer))
    found = plan_baseline(*wanted, SPLITS, 1)
    assert found is not None
    assert (found.run.folder.name, found.run.finished) == ("long", True)


def test_the_command_of_a_longer_baseline(tmp_path: Path) -> None:
    words = ["schedule.epochs=4", "distill=ssim", "baseline=train", "baseline_epochs=2.5", "seed=3", "init=inherit"]
    found = plan_baseline(*planned(tmp_path, *words), SPLITS, 1)
    assert found is not None
    assert not found.run.finished
    lines = found.run.command[4:]
    assert [line for line in lines if line.startswith(("distill", "baseline", "init", "seed"))] == [
        "seed=3",
        "distill=none",
    ]
    assert {"schedule.epochs=10", "schedule.evaluate_every=2"} <= set(lines)
    cfg = compose_without_run([line for line in lines if not line.startswith("hydra.")])
    assert (cfg.schedule.epochs, cfg.role, cfg.distill.losses, cfg.seed) == (10, "baseline", {}, 3)


def test_values_that_were_chosen_for_the_data_stay() -> None:
    """For COCO, ``schedule=auto`` became SGD. With given epochs it would become AdamW."""
    words = ["data=coco", "distill=none", "schedule.clip=3"]
    cfg = compose_without_run(words)
    facts = DataFacts(100_000, COCO_CLASSES, SizeChoice(800, 1333, ""), SizeChoice(640, 640, ""))
    config = to_containers(resolve(cfg, facts, words)[0])
    longer = to_containers(compose_without_run([*words, *longer_overrides(config, 1.5, words)]))
    assert longer["schedule"] == config["schedule"] | {"epochs": 18, "evaluate_every": 2, "milestones": [12.0, 16.5]}
    assert config["schedule"]["optimizer"]["_target_"] == "torch.optim.SGD"
    assert longer["data"] == config["data"]
    assert longer["trainer"]["max_steps"] == -1


def test_given_steps_of_the_trainer_are_multiplied() -> None:
    words = ["distill=none", "trainer.max_steps=50"]
    config = to_containers(compose_without_run(words))
    assert "trainer.max_steps=75" in longer_overrides(config, 1.5, words)
    assert not [word for word in longer_overrides(config, 1.0, words) if word.startswith("trainer")]


def test_what_changes_with_the_length() -> None:
    schedule = {"epochs": 12, "evaluate_every": 3, "steps": -1, "milestones": [8, 11], "shape": "step"}
    data = {"augment": {"stop_epoch": 10, "mosaic": 0.5}, "batch_size": 2}
    config = {"schedule": schedule, "data": data, "trainer": {"max_steps": -1}}
    doubled = longer_training(config, 2.0)
    assert doubled["schedule"] == {
        "epochs": 24,
        "evaluate_every": 6,
        "steps": -1,
        "milestones": [16.0, 22.0],
        "shape": "step",
    }
    assert doubled["data"] == {"augment": {"stop_epoch": 20, "mosaic": 0.5}, "batch_size": 2}
    halved = longer_training(config | {"schedule": schedule | {"evaluate_every": 1, "steps": 100}}, 0.5)["schedule"]
    assert (halved["epochs"], halved["evaluate_every"], halved["steps"]) == (6, 1, 50)
    assert longer_training(config, 1)["schedule"] == schedule


@pytest.mark.parametrize(("epochs", "steps", "max_steps"), [(10, -1, -1), (3, 10, -1), (3, -1, 10)])
def test_factors_of_the_same_length_give_the_same_training(epochs: int, steps: int, max_steps: int) -> None:
    """1.46 and 1.54 times 10 epochs are 15 epochs: evaluated every 7 or 8 epochs, they were two trainings."""
    schedule = {"epochs": epochs, "evaluate_every": 5, "steps": steps, "milestones": [8], "shape": "step"}
    data = {"augment": {"stop_epoch": 9}}
    config = {"schedule": schedule, "data": data, "trainer": {"max_steps": max_steps}}
    shorter, longer = (longer_training(config, factor) for factor in (1.46, 1.54))
    assert shorter == longer
    assert (shorter["schedule"]["evaluate_every"], shorter["schedule"]["milestones"]) == (8, [12.0])
    assert longer_training(config, 1.04)["schedule"] == schedule


def test_a_run_that_is_named(tmp_path: Path) -> None:
    plan, data = planned(tmp_path, f"baseline={tmp_path / 'none' / 'mine'}")
    write_run(tmp_path / "none" / "mine", plan, data)
    found = plan_baseline(plan, data, SPLITS, 1)
    assert found is not None
    assert (found.run.folder, found.run.finished, found.epochs) == (tmp_path / "none" / "mine", True, 6)
    assert found.result().summary["student"] == {"val/AP": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": ["ssim"]}, "expected a run of the student alone"),
        ({"measured": {"metrics": {}, "data": {}}}, "measured on other images or with other metrics"),
    ],
)
def test_a_run_that_is_no_baseline_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan, data = planned(tmp_path, f"baseline={tmp_path / 'other'}")
    write_run(tmp_path / "other", plan, data, **changes)
    with pytest.raises(DistillError, match=message):
        plan_baseline(plan, data, SPLITS, 1)


def test_a_run_that_is_not_there_or_not_finished_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    words = ["data=coco", "data.source.root=nowhere", f"baseline={tmp_path / 'other'}"]
    cfg = compose_without_run([*words, "data.source.train.annotations=a.json", "data.source.val.annotations=b.json"])
    with pytest.raises(DistillError, match=r"^baseline=.*other does not exist"):
        plan_run(cfg, tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(DistillError, match=r"^baseline=.*other is not finished"):
        plan_run(cfg, tmp_path)


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    other, data = planned(tmp_path, "model.head_channels=64")
    write_run(tmp_path / "other", other, data)
    with pytest.raises(DistillError, match="the model of that run differs"):
        plan_baseline(*planned(tmp_path, f"baseline={tmp_path / 'other'}"), SPLITS, 1)


def test_a_run_on_several_machines_is_told_to_name_its_baseline(tmp_path: Path) -> None:
    plan, data = planned(tmp_path, "baseline=train", "trainer.num_nodes=2")
    with pytest.raises(DistillError, match="baseline=RUN"):
        plan_baseline(plan, data, SPLITS, 2)


def test_a_resume_keeps_the_baseline(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.overrides.write_text("- seed=1\n- baseline=train\n")
    run.checkpoints.mkdir()
    run.last.touch()
    assert resume_words(tmp_path, [])[:2] == ["seed=1", "baseline=train"]


def test_the_announcement_says_what_comes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    baseline.announce_baseline(None)
    write_run(tmp_path / "mine", *planned(tmp_path))
    for name, epochs in (("mine", 7), ("missing", 9)):
        baseline.announce_baseline(baseline.Baseline(SharedRun("baseline", tmp_path / name), {"epochs": epochs}))
    lines = capsys.readouterr().out.splitlines()
    assert f"7 epochs: {tmp_path / 'mine'}" in lines[0]
    assert "is trained before this run, 9 epochs" in lines[1]
    assert len(lines) == 2
