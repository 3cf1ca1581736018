"""The words that continue a run, and what resume refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli.commands.resume import resume_words
from distill.types import DistillError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    lines = ["distill=none", "seed=3", "trust=[mine]", "hydra.run.dir=elsewhere", "ckpt_path=last", "resume=anyway"]
    (run / "overrides.yaml").write_text("".join(f"- {line}\n" for line in lines))
    return run


def test_the_recorded_overrides_in_the_runs_own_folder(run: Path) -> None:
    """Trust and Hydra's settings are those of the command line only; an earlier resume does not count."""
    place = f"hydra.run.dir='{run}'"
    assert resume_words(run, []) == ["distill=none", "seed=3", "ckpt_path=last", place]
    given = ["seed=4", "trust=[mine]"]
    assert resume_words(run, given) == ["distill=none", *given, "ckpt_path=last", place]
    file = run / "checkpoints" / "last.ckpt"
    assert resume_words(file, []) == ["distill=none", "seed=3", f"ckpt_path='{file}'", place]


def test_what_is_no_stopped_run(run: Path) -> None:
    with pytest.raises(DistillError, match="does not exist"):
        resume_words(run / "none", [])
    with pytest.raises(DistillError, match=r"holds 1 runs; name one of them, for example .*a run"):
        resume_words(run.parent, [])
    with pytest.raises(DistillError, match="seed=1,2: resume continues one run"):
        resume_words(run, ["seed=1,2"])
    (run.parent / "sweep.csv").touch()
    with pytest.raises(DistillError, match=r"the folder of a sweep.*hydra\.sweep\.dir="):
        resume_words(run.parent, [])
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "other")
    with pytest.raises(DistillError, match=r"no checkpoint.*\n  python -m distill train distill=none seed=3 'hydra"):
        resume_words(run, [])


def test_a_finished_run(run: Path) -> None:
    for name in ("summary.json", "student.json", "student.pt"):
        (run / name).touch()
    with pytest.raises(DistillError, match=r"has finished.*distill resume '.*a run' schedule\.epochs=N resume=anyway"):
        resume_words(run, [])
    assert "resume=anyway" in resume_words(run, ["schedule.epochs=9", "resume=anyway"])
