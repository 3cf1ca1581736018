"""What cannot go well is refused before anything is trained, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from standins import write_voc

from conftest import TINY, Cli, summary


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["seed=1,2"], "multirun"),
        (["teacher=none"], "cannot do without a teacher"),
        (["teacher=none", "distill=none", "init=inherit"], "init=inherit cannot do without a teacher"),
        (["init=teacher"], "init: expected scratch or inherit, got 'teacher'"),
        (["distill=defeat_full", "model=retinanet_r10_quarter"], "both detectors must be two-stage"),
        (["schedule.shape=stairs"], "expected one of step, cosine"),
        (["data.source.classes=[circle,cube]"], "cube"),
    ],
)
def test_refused_in_one_message(
    lines: list[str], message: str, cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_stage = ("model.rpn", "model.box", "model.head")
    fitting = [line for line in TINY if "retinanet" not in str(lines) or not line.startswith(two_stage)]
    named = [] if "teacher=none" in lines else [f"teacher.weights={tiny_teacher}"]
    assert cli(["train", *lines, *fitting, *named]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert "Epoch" not in said.out


def test_a_test_split_without_labels_is_said_first_and_does_not_lose_the_run(cli: Cli, tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": ("train", 8), "val": ("val", 4), "test": ("test", 2)})
    for xml in (tmp_path / "voc" / "Annotations").glob("*_test_*.xml"):
        xml.unlink()
    ours = [line for line in TINY if not line.startswith("data.source")]
    with pytest.warns(UserWarning, match="the test split is left out"):
        assert cli(["train", "data=voc", "data.source.root=voc", "distill=none", *ours, "hydra.run.dir=run"]) == 0
    assert "val/AP" in summary(tmp_path / "run")["student"]
    assert not [name for name in summary(tmp_path / "run")["student"] if name.startswith("test/")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["distill=defeat_full", "teacher=retinanet_r18"], "both detectors must be two-stage"),
        (["distill.losses.defeat.neck.levels=[4,128]"], "expected strides that both models have"),
        (["teacher.model.anchor_sizes=[[8]]"], "expected 5 lists"),
    ],
)
def test_a_pair_that_cannot_be_is_refused_before_its_teacher_is_trained(
    lines: list[str], message: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", *TINY, *lines]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "training one first" not in said.out
    assert not (tmp_path / "outputs" / "teachers").exists()
