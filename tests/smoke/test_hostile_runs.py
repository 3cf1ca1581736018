"""Files from outside that would run code, given wherever the command line takes files; and folders of odd names."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.detectors import nested
from helpers.grids import exhaustive, mostly_exhaustive
from helpers.image_folders import drawn, write_voc
from helpers.runs import TINY, Cli, summary


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def poison(file: Path, mark: Path, inside: str | None = None) -> Path:
    """A file of torch's own form, whose pickle leaves a mark."""
    content = Evil(mark) if inside is None else {inside: Evil(mark), "state_dict": {}, "student": {}}
    torch.save(content, file)
    return file


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def test_the_poison_works(tmp_path: Path, mark: Path) -> None:
    torch.load(poison(tmp_path / "x.pt", mark), weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("inside", [None, exhaustive("model")])
@pytest.mark.parametrize(
    "words",
    [
        ["teacher.weights=x.pt", "distill=mimic"],
        ["model.weights=x.pt", "distill=none"],
        ["model.backbone.weights=x.pt", "distill=none"],
        ["ckpt_path=x.pt", "distill=none"],
        ["distill=dicod", "distill.losses.dicod.classifier.weights=x.pt"],
    ],
    ids=["teacher", "model", "backbone", "checkpoint", "classifier"],
)
def test_no_file_that_training_takes_runs_code(
    words: list[str], inside: str | None, cli: Cli, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(tmp_path / "x.pt", mark, inside)
    (tmp_path / "x.json").write_text(json.dumps({"classes": ["a"]}))
    if words[0].startswith("teacher"):
        (tmp_path / "x.json").unlink()
    assert cli(["train", *TINY, *words]) == 1
    said = capsys.readouterr().err
    assert "not a file of tensors" in said
    assert "Traceback" not in said
    assert not mark.exists()


@pytest.fixture
def run(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be poisoned."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "run"))


@pytest.mark.parametrize("verb", [["evaluate", "run"], ["predict", "run", "a.png"]], ids=["evaluate", "predict"])
def test_no_student_of_a_run_runs_code(
    verb: list[str], run: Path, cli: Cli, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(run / "student.pt", mark)
    drawn("val", 1)[1][0][1].save(tmp_path / "a.png")
    assert cli(verb) == 1
    assert "not a file of tensors" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("inside", [None, "optimizer"])
def test_no_checkpoint_of_a_run_runs_code(
    inside: str | None, run: Path, cli: Cli, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(run / "checkpoints" / "last.ckpt", mark, inside)
    assert cli(["evaluate", "run/checkpoints/last.ckpt"]) == 1
    assert "not a file of tensors" in capsys.readouterr().err
    assert cli(["train", *TINY, "distill=none", "hydra.run.dir=run", "ckpt_path=last"]) == 1
    assert "not a file of tensors" in capsys.readouterr().err
    assert not mark.exists()


NO_CHECKPOINTS = [b"", b"PK", b"\x80\x02", pickle.dumps({"a": 1}), b"\0" * 999, [1], {"a": 1}, 7]


@pytest.mark.parametrize("content", mostly_exhaustive(NO_CHECKPOINTS, NO_CHECKPOINTS[::2]))
def test_a_checkpoint_that_is_none_is_named(
    content: Any, run: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "last.ckpt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert cli(["evaluate", "run/checkpoints/last.ckpt"]) == 1
    said = capsys.readouterr().err
    assert "last.ckpt: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "change",
    [
        {"neck_channels": 10**7},
        {"neck_channels": 10**30},
        {"neck_channels": -1},
        {"head_channels": 10**8},
        {"width": "wide"},
        {"width": None},
        {"depth": [1]},
        {"classes": 7},
        {"classes": "abc"},
        {"classes": [1, 2]},
        {"classes": [f"c{i}" for i in range(20_000)]},
        {"anchor_sizes": [[1e999]]},
        {"anchor_sizes": "x"},
        {"mean": "abc"},
        {"backbone": "timm/hf-hub:evil/model"},
        {"backbone": 3},
        {"pixels": "abc"},
        {"anchors": {"sides": [[8]]}},
        {"weights": "../../etc/passwd"},
        {"norm_eps": "small"},
        {"min_size": "x"},
        {"_target_": "os.system"},
        {"family": ["fcos"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_student_says_of_itself_is_checked(
    change: dict[str, Any], run: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = json.loads((run / "student.json").read_text())
    for name, value in nested(change).items():
        spec["model"][name] = {**spec["model"][name], **value} if isinstance(value, dict) else value
    (run / "student.json").write_text(json.dumps(spec))
    drawn("val", 1)[1][0][1].save(tmp_path / "a.png")
    assert cli(["predict", "run", "a.png"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("\ndistill: ")
    assert "Traceback" not in said


NOTES = [
    ("student.json", "[]"),
    ("student.json", "{"),
    ("student.json", "[" * 100_000),
    ("student.json", '{"model": 1}'),
    ("student.json", '{"model": {}, "extra": []}'),
    ("summary.json", "{"),
    ("summary.json", "[]"),
    ("summary.json", '{"teacher": 7}'),
    ("summary.json", '{"teacher": {"source": ["x"], "classes": ["a"]}}'),
    ("summary.json", '{"teacher": {"source": "x"}}'),
]


@pytest.mark.parametrize(("file", "text"), mostly_exhaustive(NOTES, NOTES[::3]))
def test_what_a_run_notes_is_checked(
    file: str, text: str, run: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / file).write_text(text)
    assert cli(["evaluate", "run", *(["--teacher"] if file == "summary.json" else [])]) == 1
    assert file in capsys.readouterr().err


@pytest.mark.parametrize("measured", ["7", "[]", '{"data": 7, "metrics": {}}', '{"data": {}}'])
def test_what_a_teacher_says_it_measured_is_checked(
    measured: str, run: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").write_text(f'{{"student": 3, "measured": {measured}}}')
    assert cli(["train", *TINY, "distill=mimic", "teacher.weights=run"]) == 1
    assert "summary.json" in capsys.readouterr().err


def test_names_cannot_steer_the_terminal(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"id": 1, "file_name": "\x1b]0;evil\x07.png"}]
    (tmp_path / "t.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    words = [
        "data=coco",
        "data.source.root=.",
        "data.source.train.annotations=t.json",
        "data.source.val.annotations=t.json",
    ]
    assert cli(["train", "distill=none", *words]) == 1
    said = capsys.readouterr().err
    assert "evil" in said
    assert "\x1b" not in said


@pytest.mark.exhaustive
def test_a_run_in_a_folder_of_spaces_and_letters(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, outputs, teacher and student below one, with class names that mean something to the table's printer."""
    home = tmp_path / "für später [red] {x}"
    home.mkdir()
    monkeypatch.chdir(home)
    write_voc(home / "my data", {"train": ("train", 8), "val": ("val", 4)})
    for xml in (home / "my data" / "Annotations").iterdir():
        xml.write_text(xml.read_text().replace("<name>circle", "<name>[/red] Kreis é"))
    ours = [line for line in TINY if not line.startswith("data.source")]
    words = ["data=voc", "data.source.root='my data'", "distill=mimic", "metrics=coco", *ours]
    assert (
        cli(
            [
                "train",
                *words,
                "teacher=frcnn_r10_mini",
                f"teacher.run={json.dumps(TINY_TEACHER)}",
                "hydra.run.dir='my run'",
            ]
        )
        == 0
    )
    assert "val/AP" in summary(home / "my run")["student"]
    untrained = ["teacher.weights='my run/student.pt'", "teacher.min_ap=null"]
    assert cli(["doctor", *words, "teacher=frcnn_r10_mini", *untrained]) == 0
    assert cli(["evaluate", "my run", "metrics.coco.per_class=true"]) == 0
    assert cli(["predict", "my run", "my data/JPEGImages", "--out", "my pictures"]) == 0
    assert (home / "my pictures" / "detections.json").is_file()


TINY_TEACHER = [line for line in TINY if not line.startswith("data.source")]
