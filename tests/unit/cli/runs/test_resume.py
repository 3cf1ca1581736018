"""What may differ when a run goes on, and which run is meant."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from distill.cli.config import compose, instantiate, overrides
from distill.cli.runs import resume
from distill.run_folder import RunFolder
from distill.type_checks import leaves
from distill.types import DistillError


@cache
def composed(*lines: str) -> Any:
    return instantiate.to_containers(compose.compose_config(["paths.run=x", "name=x", *lines]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("schedule.epochs=3", ["schedule.epochs: 6 there, 3 here", "trainer.max_epochs: 6 there, 3 here"]),
        ("schedule.optimizer.lr=7", ["schedule.optimizer.lr: "]),
        ("supervised.loss_box_reg=2.0", ["supervised.loss_box_reg: 1.0 there, 2.0 here"]),
        ("distill.losses.dsig.nodes.foreground=9", ["distill.losses.dsig.nodes.foreground: "]),
        ("distill=[defeat,ssim]", ["distill.losses.ssim"]),
        ("trainer.precision=16-mixed", ["trainer.precision: auto there, 16-mixed here"]),
        ("trainer.accumulate_grad_batches=2", ["trainer.accumulate_grad_batches: "]),
        ("trainer.limit_train_batches=2", ["trainer.limit_train_batches: None there, 2 here"]),
        ("teacher.dtype=bfloat16", ["teacher.dtype: auto there, bfloat16 here"]),
        ("teacher.fold=false", ["teacher.fold: True there, False here"]),
        ("callbacks=ema", ["callbacks.ema._target_: not there, distill."]),
        ("data.flip=0.0", ["data.flip: 0.5 there, 0.0 here"]),
        ("data.limit=3", ["data.limit: None there, 3 here"]),
        ("metric=val/AP50", ["metric: val/AP there", "callbacks.best.monitor: "]),
        ("model.anchors.sizes=[[8],[16],[32],[64],[128]]", ["model.anchors.sizes: "]),
        ("+data.new=1", ["data.new: not there, 1 here"]),
    ],
)
def test_what_changes_the_result_is_named(line: str, words: list[str]) -> None:
    found = resume.differences(composed(), composed(line))
    for word in words:
        assert any(each.startswith(word) for each in found), found


def test_a_key_that_is_newer_than_the_run_may_have_its_default() -> None:
    before, now = composed(), composed("+data.new.part=1")
    assert resume.differences(before, now, given=["data.flip"]) == []
    assert resume.differences(before, now, given=["data.new"]) == ["data.new.part: not there, 1 here"]
    assert resume.differences(now, before, given=[]) == ["data.new.part: 1 there, not here"]
    assert resume.differences(before, composed("data.flip=0.0"), given=[]) == ["data.flip: 0.5 there, 0.0 here"]
    older = copy.deepcopy(composed())  # the composed configuration is shared
    del older["classes"], older["model"]["detection_rule"]
    assert resume.differences(older, composed(), given=[]) == []
    given = ["classes.map"]
    assert resume.differences(older, composed("classes.map=auto"), given) == ["classes.map: not there, auto here"]


FREE = [
    *(
        "trainer.accelerator=gpu",
        "trainer.devices=4",
        "trainer=ddp",
        "trainer.log_every_n_steps=1",
        "logger=tensorboard",
    ),
    *("trainer.save_every=null", "data.workers=7", "data.cache=ram", "pictures=0", "test=false", "paths.outputs=there"),
    *(
        "data.source.seed=3",
        "teacher.weights=there",
        "teacher.evaluate=false",
        "model.weights=there",
        "callbacks.rate=null",
    ),
    *("callbacks.panels=null", "callbacks.last.every=3 steps", "resume=anyway", "ckpt_path=last", "init=inherit"),
    *("data.eval_batch_size=1", "data.on_error=skip", "name=y"),
]


@pytest.mark.parametrize("line", FREE)
def test_machine_paths_and_screen_may_change(line: str) -> None:
    before, now = composed(), composed(line)
    assert before != now
    assert resume.differences(before, now) == []
    assert resume.differences(now, before) == []


def test_no_free_key_is_a_word_of_nothing() -> None:
    """A pattern that no key has any more would let a later one through."""
    keys = dict(leaves(composed("distill=dicod", "logger=[csv,tensorboard]", "trainer=ddp")))
    dead = [free for free in resume.MAY_DIFFER if not any(fnmatchcase(key, free) for key in keys)]
    assert dead == ["trainer.profiler"]  # not ours, but anybody's to add


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "outputs" / "none-frcnn_r10_mini-shapes"
    for name, line, file in (("a", "seed=0", "last-1.ckpt"), ("b", "seed=1", "last.ckpt"), ("c", "seed=2", None)):
        (home / name / "checkpoints").mkdir(parents=True)
        (home / name / "overrides.yaml").write_text(f"- distill=none\n- {line}\n")
        if file:
            (home / name / "checkpoints" / file).touch()
    return home


def test_a_folder_of_any_name_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job that SLURM started again: the value is read as Hydra reads it."""
    run = tmp_path / "it's here, [really]"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lines = ["seed=1", f"hydra.run.dir={overrides.quote_value(str(run))}"]
    assert resume.add_run_to_resume(lines) == [*lines, "ckpt_path=last"]
    run.rename(tmp_path / "seed1")
    lines = ["seed=1", f"hydra.run.dir={tmp_path}/seed${{seed}}"]
    assert resume.add_run_to_resume(lines) == [*lines, "ckpt_path=last"]
    assert resume.add_run_to_resume(["seed=2", lines[1]]) == ["seed=2", lines[1]]


def test_a_run_that_was_killed_between_two_renamings_is_found(runs: Path) -> None:
    lines = ["distill=none", "seed=0", "ckpt_path=last", "resume=anyway", "trainer.save_every=1 steps"]
    assert resume.add_run_to_resume(lines) == [*lines, f"hydra.run.dir='outputs/{runs.name}/a'"]
    with pytest.raises(DistillError, match=r"no run below .* was made by these very overrides"):
        resume.add_run_to_resume(["distill=none", "seed=2", "ckpt_path=last"])


def test_a_job_that_slurm_started_again_goes_on_where_there_is_something(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["distill=none", "seed=1"]
    assert resume.add_run_to_resume(lines) == lines
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert resume.add_run_to_resume(lines) == lines
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert resume.add_run_to_resume(lines) == lines  # a run of the same words that another job made
    (runs / "b" / "slurm_job").write_text("17")
    assert resume.add_run_to_resume(lines) == [*lines, "ckpt_path=last", f"hydra.run.dir='outputs/{runs.name}/b'"]
    assert resume.add_run_to_resume(["distill=none", "seed=2"]) == ["distill=none", "seed=2"]
    for name, more in (("b", ["ckpt_path=last"]), ("c", [])):
        named = [*lines, f"hydra.run.dir={runs / name}"]
        assert resume.add_run_to_resume(named) == [*named, *more]
    fixed = [*lines, "ckpt_path=null"]
    assert resume.add_run_to_resume(fixed) == fixed


UNFINISHED = ["distill=none", "seed=1", "ckpt_path=unfinished"]


def record_config(run: Path, words: list[str], **changes: Any) -> None:
    """Write the configuration that a run with these words records."""
    (run / "config.yaml").write_text(json.dumps(composed(*words) | changes))


def test_the_stopped_run_of_the_same_overrides_is_continued(runs: Path) -> None:
    record_config(runs / "b", UNFINISHED[:2])
    resumed = ["distill=none", "seed=1", "ckpt_path=last"]
    assert resume.add_run_to_resume(UNFINISHED) == [*resumed, f"hydra.run.dir='outputs/{runs.name}/b'"]
    place = f"hydra.run.dir={runs / 'b'}"
    assert resume.add_run_to_resume([*UNFINISHED, place]) == ["distill=none", "seed=1", place, "ckpt_path=last"]


@pytest.mark.parametrize("reason", ["no checkpoint", "finished", "in use", "another default", "other words"])
def test_a_new_run_starts_where_no_stopped_run_can_be_continued(reason: str, runs: Path) -> None:
    run = RunFolder(runs / "b")
    record_config(run.path, UNFINISHED[:2], metric="val/AP50" if reason == "another default" else "val/AP")
    if reason == "no checkpoint":
        run.last.unlink()
    if reason == "other words":
        run.overrides.write_text("- distill=none\n- seed=1\n- schedule.clip=2\n")
    if reason == "finished":
        for file in (run.summary, run.description, run.student):
            file.touch()
    with FileLock(run.lock) if reason == "in use" else nullcontext():
        assert resume.add_run_to_resume(UNFINISHED) == UNFINISHED[:2]


@pytest.mark.parametrize("outputs", [[], ["paths.outputs='an other'"]])
def test_a_sweep_that_slurm_started_again_goes_on_in_its_folder(
    outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("an other" if outputs else "outputs") / "sweeps"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for name, job in (("a", "16"), ("b", "17"), ("c", None)):
        (home / name).mkdir(parents=True)
        if job:
            (home / name / "slurm_job").write_text(job)
    lines = ["distill=none", "seed=0,1", *outputs]
    assert resume.requeued_sweep(lines) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resume.requeued_sweep(lines) == home / "b"
    assert resume.requeued_sweep([*lines, "hydra.sweep.dir=mine"]) is None
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert resume.requeued_sweep(lines) is None


@pytest.mark.parametrize("text", ["a b", "it's", "\\", "a\\'b\\", "ü(1)=2,3", "[x]{y}", "''", "#:$"])
def test_any_path_can_be_said_in_an_override(text: str) -> None:
    (word,) = overrides.parse_overrides([f"hydra.run.dir={overrides.quote_value(text)}"])
    assert word.value() == text or str(word.value()) == text
    assert overrides.parse_overrides([f"teacher.weights={overrides.quote_value(text)}"])[0].value() == text
