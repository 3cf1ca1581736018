"""Every distill option, and every promise of the run folder, at the size of seconds."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from distill import load_detector
from distill.cli.config import compose
from distill.cli.main import main
from distill.cli.runs import teacher_cache
from distill.data.shapes import CLASSES
from distill.evaluation.coco import CocoMetric
from distill.evaluation.recording import load_recording
from distill.training.distiller import Distiller
from helpers.detector_pairs import NOT_HERE, QUERIES
from helpers.grids import exhaustive, mostly_exhaustive
from helpers.methods import METHODS
from helpers.runs import TINY, TINY_DATA, TINY_HEADS, TINY_MODEL, TINY_RUN, Cli, summary
from helpers.wandb_files import read_wandb

WIDE = "model.neck_channels=64"  # group norm
DISTRIBUTION_HEADS = ("ld", "ld_fcos")
OTHER_HEADS = (*DISTRIBUTION_HEADS, *QUERIES)
OPTIONS = [option for option in compose.config_groups()["distill"] if option not in ("none", *OTHER_HEADS)]
MADE = {
    "dicod": "made_classifier",
    **dict.fromkeys(("foundation", "foundation_dinov3"), "random_vision_transformer"),
}
"""Options that need something made first -> the fixture that makes it and gives the overrides that name it."""
ONE_STAGE = [
    option for option in OPTIONS if "retinanet" in option or option in NOT_HERE["two-stage"] - {*MADE, *OTHER_HEADS}
]
TOGETHER = {
    family: sorted(
        row.option
        for row in METHODS.values()
        if not (row.trained_alone or row.detectors or row.needs_model) and row.family == family
    )
    for family in ("faster_rcnn", "retinanet")
}
"""Options of a family that daily tests train in one run."""
DISTILL = [*(option for option in OPTIONS if option not in ONE_STAGE), f"[{','.join(TOGETHER['faster_rcnn'])}]"]
DAILY = [*(method.option for method in METHODS.values() if method.trained_alone), DISTILL[-1]]
DENSE = [f"[{','.join(['dsig_retinanet', *TOGETHER['retinanet']])}]", *ONE_STAGE]
WITHOUT_TEACHER = {"dicod": ["classes", "pixels", "features"], "foundation": ["neck.cosine"]}
"""Option -> the terms of its loss."""


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A classifier that the verb made, and what the verb printed."""
    file, printed = tmp_path_factory.mktemp("classifier") / "classifier.pt", io.StringIO()
    with redirect_stdout(printed):
        assert (
            main(
                [
                    "classifier",
                    str(file),
                    "--arch",
                    "resnet18",
                    "--epochs=1",
                    "--size=32",
                    *TINY_DATA,
                    "data.batch_size=auto",
                ]
            )
            == 0
        )
    return file, printed.getvalue()


@pytest.fixture
def made_classifier(classifier_file: tuple[Path, str]) -> list[str]:
    """The overrides of the classifier, as the verb printed them, without the choice of the method."""
    method, *overrides = classifier_file[1].splitlines()[-1].split()
    assert method == "distill=dicod"
    return overrides


@pytest.fixture
def random_vision_transformer() -> list[str]:
    """The overrides of a tiny model."""
    pytest.importorskip("timm", reason="the vision transformers are timm's")
    model = "distill.losses.foundation.model"
    return [f"{model}.name=test_vit.r160_in1k", f"{model}.weights=random"]


@pytest.mark.parametrize("option", mostly_exhaustive(DISTILL, DAILY))
def test_every_distill_option_trains(
    option: str, cli: Cli, tiny_teacher: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(MADE[option]) if option in MADE else []
    lines = [f"distill={option}", f"teacher.weights={tiny_teacher}", *TINY, *made, "hydra.run.dir=run"]
    assert cli(["train", *lines]) == 0
    report = summary(tmp_path / "run")
    for loss in compose.compose_config([f"distill={option}"]).distill.losses:
        assert any(name.startswith(f"term/{loss}/") for name in report["terms"]), loss
    assert all(torch.isfinite(torch.tensor(value)) for value in report["terms"].values())
    assert option in MADE or report["teacher"]["source"] == str(tiny_teacher)


@pytest.mark.parametrize("option", WITHOUT_TEACHER)
def test_a_loss_that_no_detector_teaches_needs_no_teacher(
    option: str, cli: Cli, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(MADE[option])
    for run, teacher in (("none", ["teacher=none"]), ("default", ["teacher.train=never"])):
        assert cli(["train", f"distill={option}", *teacher, *TINY, *made, f"hydra.run.dir={run}"]) == 0
        report = summary(tmp_path / run)
        assert report["teacher"] is None
        assert all(report["terms"][f"term/{option}/{term}"] > 0 for term in WITHOUT_TEACHER[option])


@pytest.mark.parametrize("model", [exhaustive(["model=retinanet_r10_quarter"]), ["model=fcos_r10_quarter", WIDE]])
def test_a_classifier_teaches_one_stage_students_and_beside_a_teacher(
    model: list[str], cli: Cli, tiny_teacher: Path, tmp_path: Path, made_classifier: list[str]
) -> None:
    small = [*TINY_DATA, *TINY_MODEL, *TINY_RUN, *made_classifier, "test=false", "hydra.run.dir=run"]
    lines = [model[0], "teacher=frcnn_r18_mini", f"teacher.weights={tiny_teacher}", *small, *model[1:]]
    assert cli(["train", "distill=[defeat,dicod]", *lines]) == 0
    terms = summary(tmp_path / "run")["terms"]
    assert "term/defeat/neck.foreground" in terms
    assert all(terms[f"term/dicod/{term}"] >= 0 for term in ("classes", "pixels", "features"))


def test_dicod_without_a_classifier_says_how_to_make_one(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "distill=dicod", *TINY, "hydra.run.dir=run"]) == 1
    said = capsys.readouterr().err
    assert "classifier.weights" in said
    assert "distill classifier FILE.pt" in said


HEADS = [f"{role}.box_head=distribution" for role in ("model", "teacher.model")]


@pytest.mark.parametrize(
    ("option", "model", "own"),
    [
        exhaustive(("ld", "retinanet_r10_quarter", ["model.box_loss=giou", "teacher.model.box_loss=giou"])),
        exhaustive(("ld_fcos", "fcos_r10_quarter", [WIDE, "teacher.model.neck_channels=64"])),
    ],
)
def test_localization_distillation_trains(option: str, model: str, own: list[str], cli: Cli, tmp_path: Path) -> None:
    small = [*TINY_DATA, *TINY_MODEL, *TINY_RUN, "test=false", "hydra.run.dir=run", "teacher.min_ap=null"]
    assert cli(["train", f"distill={option}", f"model={model}", f"teacher={model}", *HEADS, *small, *own]) == 0
    terms = summary(tmp_path / "run")["terms"]
    assert all(
        terms[f"term/{name}"] > 0 for name in ("ld/sides.main", "ld/logits.classes", "student/bbox_distribution")
    )


def test_localization_distillation_names_the_head_that_it_needs(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["distill=ld", "model=retinanet_r10_quarter", "teacher=retinanet_r18", *TINY_DATA, *TINY_MODEL, *TINY_RUN]
    assert cli(["train", *lines, "hydra.run.dir=run"]) == 1
    assert "which has no side_logits" in (said := capsys.readouterr().err)
    assert "box_head=distribution" in said
    assert not list(tmp_path.glob("outputs/teachers/*/summary.json"))


def test_methods_add_up(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = ["distill=[defeat,ssim]", "distill.losses.ssim.neck.foreground=2", f"teacher.weights={tiny_teacher}", *TINY]
    assert cli(["train", *lines, "hydra.run.dir=run"]) == 0
    terms = summary(tmp_path / "run")["terms"]
    assert {"term/defeat/neck.foreground", "term/defeat/neck.background", "term/ssim/neck.foreground"} <= terms.keys()
    assert terms["loss/ssim/neck.foreground"] == pytest.approx(2 * terms["term/ssim/neck.foreground"])


@pytest.mark.parametrize("method", ["chen", exhaustive("tadf"), "dsig", exhaustive("mimic")])
def test_methods_for_the_heads_add_up_with_defeat(method: str, cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = [f"distill=[defeat,{method}]", f"teacher.weights={tiny_teacher}", *TINY, "hydra.run.dir=run"]
    assert cli(["train", *lines]) == 0
    terms = summary(tmp_path / "run")["terms"]
    assert {name.split("/")[1] for name in terms if name.startswith("term/")} == {"student", "defeat", method}


@pytest.mark.parametrize("option", ["none", "defeat"])
def test_an_inheriting_student_starts_from_the_teacher_s_neck_and_heads(
    option: str, cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"distill={option}", f"teacher.weights={tiny_teacher}", *TINY, "init=inherit", "hydra.run.dir=run"]
    still = "schedule.optimizer.lr=0"
    assert cli(["train", *lines, still]) == 0
    assert "inherit: roi_heads.box_head: 4 of 4" in capsys.readouterr().out
    student, teacher = load_detector(tmp_path / "run").net, load_detector(tiny_teacher).net
    assert torch.equal(student.roi_heads.box_head.fc6.weight, teacher.roi_heads.box_head.fc6.weight)
    assert not torch.equal(
        student.backbone.fpn.inner_blocks[0][0].weight, teacher.backbone.fpn.inner_blocks[0][0].weight
    )


@pytest.mark.parametrize("option", mostly_exhaustive(DENSE, DENSE[:1]))
def test_every_one_stage_option_trains(option: str, cli: Cli, tmp_path: Path) -> None:
    lines = ["model=retinanet_r10_quarter", *TINY_DATA, *TINY_MODEL, *TINY_RUN]
    assert cli(["train", *lines, "distill=none", "hydra.run.dir=teacher"]) == 0
    assert cli(["train", *lines, f"distill={option}", "teacher.weights=teacher", "hydra.run.dir=run"]) == 0
    report = summary(tmp_path / "run")
    for loss in compose.compose_config([f"distill={option}"]).distill.losses:
        assert any(name.startswith(f"term/{loss}/") for name in report["terms"]), loss
    assert all(torch.isfinite(torch.tensor(value)) for value in report["terms"].values())


def test_run_folder_holds_what_it_promises(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = ["distill=defeat_full", f"teacher.weights={tiny_teacher}", *TINY, "hydra.run.dir=run"]
    assert cli(["train", *lines, "callbacks.history.curves=true"]) == 0
    run = tmp_path / "run"
    files = ("config.yaml", "overrides.yaml", "summary.json", "student.pt", "student.json")
    for name in (*files, "metrics.csv", "steps.csv", "curves.png"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert len(list((run / "pictures").glob("*.png"))) == 1
    assert not list(run.rglob("*.part"))
    assert [file.name for file in (run / "detections").iterdir()] == ["val.npz"]
    recording = load_recording(run / "detections" / "val.npz")
    categories = [{"id": label, "name": name} for label, name in enumerate(recording.classes, 1)]
    truth = {"images": [], "annotations": [], "categories": categories}
    metric = CocoMetric(truth, recording.classes, per_class=True)
    measured = metric.evaluate(recording.truth, recording.detections)
    assert {f"val/{name}": value for name, value in measured.items()} == summary(run)["student"]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [name for name in state["state_dict"] if "teacher" in name]
    student = load_detector(run)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, best[f"student.{name}"]), name


@pytest.mark.parametrize("lines", [["model=retinanet_r10_quarter"], ["model=fcos_r10_quarter", WIDE]])
def test_a_one_stage_student_takes_its_neck_from_a_two_stage_teacher(
    lines: list[str], cli: Cli, tiny_teacher: Path, tmp_path: Path
) -> None:
    lines = [lines[0], "teacher=frcnn_r18_mini", f"teacher.weights={tiny_teacher}", *TINY_DATA, *TINY_MODEL, *lines[1:]]
    assert cli(["train", *lines, *TINY_RUN, "hydra.run.dir=run"]) == 0
    assert "term/defeat/neck.foreground" in summary(tmp_path / "run")["terms"]


def test_fcos_teaches_retinanet_and_is_evaluated_and_predicts(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*TINY_DATA, *TINY_MODEL, *TINY_RUN, "test=false"]
    fcos = ["model=fcos_r10_quarter", "distill=none", WIDE, "supervised.bbox_ctrness=2", "model.score_thresh=0"]
    assert cli(["train", *small, *fcos, "hydra.run.dir=teacher"]) == 0
    terms = summary(tmp_path / "teacher")["terms"]
    assert terms["loss/student/bbox_ctrness"] == pytest.approx(2 * terms["term/student/bbox_ctrness"])
    assert cli(["evaluate", "teacher"]) == 0
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    assert cli(["predict", "teacher", "image.png"]) == 0
    assert "fcos" in capsys.readouterr().out
    student = ["model=retinanet_r10_quarter", "teacher=fcos_r10_quarter", "teacher.weights=teacher"]
    assert cli(["train", *small, *student, "distill.losses.defeat.mask.kind=fine_grained", "hydra.run.dir=run"]) == 0
    assert summary(tmp_path / "run")["terms"]["term/defeat/neck.foreground"] > 0


def test_a_teacher_that_is_missing_is_refused_before_anything_is_trained(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", *TINY, "teacher.train=never", "hydra.run.dir=run"]) == 1
    said = capsys.readouterr().err
    assert "teacher.train=never" in said
    assert "distill train" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("backgrounds", ["4", exhaustive("4,16")])
def test_a_teacher_is_trained_once_and_serves_a_sweep(backgrounds: str, cli: Cli, tmp_path: Path) -> None:
    """Weights of a loss swept: one teacher and one run of the student alone for all jobs, a folder a job, one table."""
    tiny_teacher = [
        "teacher.model.backbone.depth=10",
        "teacher.model.backbone.width=0.5",
        "teacher.model.neck_channels=16",
    ]
    tiny_teacher += [f"teacher.{line}" for line in TINY_HEADS]
    sweep = [
        "distill=defeat",
        "distill.losses.defeat.neck.foreground=1,4",
        f"distill.losses.defeat.neck.background={backgrounds}",
    ]
    run = ['teacher.run=["schedule.epochs=1","trainer.max_steps=2"]', "hydra.sweep.dir=sweep"]
    run += ["baseline=train", "baseline_epochs=2"]
    assert cli(["train", "-m", *sweep, *TINY, *tiny_teacher, *run]) == 0
    made = [folder for folder in (tmp_path / "outputs" / "teachers").iterdir() if folder.is_dir()]
    assert len(made) == 1
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    jobs = [(foreground, background) for foreground in ("1", "4") for background in backgrounds.split(",")]
    assert [row["distill.losses.defeat.neck.foreground"] for row in rows] == [foreground for foreground, _ in jobs]
    if "," in backgrounds:  # else it is no column of the table, but the same in all rows
        assert [row["distill.losses.defeat.neck.background"] for row in rows] == [background for _, background in jobs]
    assert all(row["state"] == "done" and float(row["val/AP"]) >= 0 for row in rows)
    assert all(summary(tmp_path / "sweep" / str(job))["teacher"]["source"] == str(made[0]) for job in range(len(jobs)))
    (alone,) = (folder for folder in (tmp_path / "outputs" / "baselines").iterdir() if folder.is_dir())
    assert summary(alone)["losses"] == []
    assert alone.name.startswith("frcnn_r10_mini-shapes-")
    for row in rows:
        job = summary(tmp_path / "sweep" / row["job"])
        assert job["baseline"]["source"] == str(alone)
        (picture,) = (tmp_path / "sweep" / row["job"] / "pictures").glob("*.png")
        assert Image.open(picture).width > 4 * 480  # ground truth, teacher, student alone, distilled student
        assert float(row["alone/val/AP"]) == round(summary(alone)["student"]["val/AP"], 4)
    # the teacher's own run is a run of distill=none, with its measured AP, which no job measured again
    assert "val/AP" in summary(made[0])["student"]
    assert summary(made[0])["teacher"] is None


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("schedule.epochs=9", False),
        ("supervised.loss_box_reg=2.0", False),
        ("callbacks=ema", False),
        ("trainer.precision=bf16-mixed", False),
        ("trainer.limit_train_batches=3", False),
        ("data.source.seed=5", False),
        *((f"data.{key}", True) for key in ("workers=3", "pin_memory=true", "persistent_workers=false")),
        ("trainer.log_every_n_steps=7", True),
        ("logger=wandb", True),
        ("callbacks.terms.every=7", True),
        ("callbacks.terms=null", True),
        ("model.box_roi_align=torchvision", True),
    ],
)
def test_a_cached_teacher_is_another_only_where_it_learns_otherwise(change: str, same: bool) -> None:
    lines = ["model=frcnn_r18_thin", "distill=none", "teacher=none", "seed=0"]
    assert (teacher_cache._cache_key([*lines, change]) == unchanged_key(*lines)) == same


@functools.cache
def unchanged_key(*lines: str) -> str:
    return teacher_cache._cache_key(lines)


@pytest.mark.exhaustive
def test_a_sweep_over_methods_includes_the_baseline(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = ["-m", "distill=none,defeat", f"teacher.weights={tiny_teacher}", *TINY, "hydra.sweep.dir=sweep"]
    assert cli(["train", *lines]) == 0
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [row["distill"] for row in rows] == ["none", "defeat"]


def test_resume_goes_on_in_the_newest_folder_of_the_name(cli: Cli, tmp_path: Path) -> None:
    """Of the runs of that name, the one that the same overrides made; and what the first half logged is kept."""
    lines = ["distill=none", *TINY_DATA, *TINY_MODEL, *TINY_HEADS, "pictures=0", "trainer.accelerator=cpu"]
    named = tmp_path / "outputs" / "none-frcnn_r10_mini-shapes"
    assert cli(["train", *lines, "schedule.epochs=2", "trainer.max_epochs=1"]) == 0
    (mine,) = named.iterdir()
    assert cli(["train", *lines, "seed=1", "schedule.epochs=1", f"hydra.run.dir={named / 'newer'}"]) == 0
    first = (mine / "metrics.csv").read_text()
    assert first.count("\n") == 2
    assert cli(["train", *lines, "schedule.epochs=2", "ckpt_path=last", "resume=anyway"]) == 0  # of more epochs
    assert sorted(named.iterdir()) == sorted([mine, named / "newer"])
    assert torch.load(mine / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    assert torch.load(named / "newer" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert (mine / "metrics.csv").read_text().startswith(first)
    assert [row["epoch"] for row in csv.DictReader((mine / "metrics.csv").open())] == ["1", "2"]


def test_resume_without_a_run_is_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "ckpt_path=last"]) == 1
    assert "none has a checkpoint" in capsys.readouterr().err
    assert cli(["train", "distill=none", *TINY, "pictures=0"]) == 0
    capsys.readouterr()
    assert cli(["train", "distill=none", *TINY, "pictures=0", "seed=1", "ckpt_path=last"]) == 1
    said = capsys.readouterr().err
    assert "no run below" in said
    assert "was made by: distill=none" in said
    assert cli(["train", "distill=none", *TINY, "ckpt_path=missing.ckpt"]) == 1
    assert "there is no file missing.ckpt" in capsys.readouterr().err


def test_resume_with_another_student_is_refused(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["train", "distill=none", *TINY, "pictures=0"]
    assert cli([*lines, "hydra.run.dir=run"]) == 0
    other = ["model.rpn_post_nms_top_n_test=7", "hydra.run.dir=other"]
    for anyway, words in (([], "was made by another run"), (["resume=anyway"], "another student")):
        file = tmp_path / "run" / "checkpoints" / "last.ckpt"
        assert cli([*lines, *other, *anyway, f"ckpt_path={file}"]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert "rpn_post_nms_top_n_test" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_trainer_that_the_machine_cannot_run_is_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "distill=none", *TINY, "trainer=gpu", "trainer.accelerator=gpu"]) == 1
    said = capsys.readouterr().err
    assert "trainer=auto" in said
    assert "Traceback" not in said


def test_a_seed_that_is_no_number_is_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "seed=abc"]) == 1
    assert "seed=abc: expected a whole number" in capsys.readouterr().err


def test_unknown_metric_is_refused_with_the_nearest(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", *TINY, "metric=val/AP5", "hydra.run.dir=run"]) == 1
    said = capsys.readouterr()
    assert "metric=val/AP5 is not among the measured values; did you mean" in said.err
    assert "val/AP50" in said.err
    assert "training one first" not in said.out
    assert "Epoch" not in said.out


@pytest.mark.parametrize("callbacks", [exhaustive("ema"), exhaustive("early_stop"), "[ema,early_stop]"])
def test_callbacks_options(callbacks: str, cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = [f"callbacks={callbacks}", f"teacher.weights={tiny_teacher}", *TINY, "hydra.run.dir=run"]
    assert cli(["train", *lines]) == 0
    chosen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["callbacks"]
    assert {"ema", "early_stop"} & chosen.keys() == set(callbacks.strip("[]").split(","))
    assert (tmp_path / "run" / "student.pt").is_file()


def test_loggers_get_the_values_of_the_csv_files(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Without a database: a store of files has no place for both `epoch` and `epoch/loss/total`.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    in_mlflow: set[str] = set()
    monkeypatch.setattr(
        "mlflow.tracking.MlflowClient.log_batch",
        lambda *_, metrics=(), **__: in_mlflow.update(metric.key for metric in metrics),
    )
    loggers = ["logger=[tensorboard,wandb,mlflow]", "logger.wandb.offline=true", "logger.wandb.log_student=true"]
    assert (
        cli(
            [
                "train",
                *loggers,
                "logger.mlflow.tracking_uri=mlruns",
                f"teacher.weights={tiny_teacher}",
                *TINY,
                "hydra.run.dir=run",
            ]
        )
        == 0
    )
    run = tmp_path / "run"
    assert (run / "metrics.csv").is_file()  # whatever else is chosen
    boxes = [json.loads(file.read_text())["box_data"] for file in run.rglob("*.boxes2D.json")]
    ground_truth = [each for each in boxes if each and all(box["scores"]["score"] == 1 for box in each)]
    assert len(ground_truth) >= 4  # one for each validation image
    assert all(box["box_caption"].split()[0] in CLASSES for each in boxes for box in each)

    (file,) = run.rglob("*.wandb")
    records = read_wandb(file, lambda records: records.files.keys() >= {"student.pt", "student.json"})
    assert records.run.run_group.startswith("data.source.train=")
    assert "seed" not in records.run.run_group
    assert {"frcnn_r10_mini", "shapes", "dsig", f"{tiny_teacher.name} → frcnn_r10_mini"} <= set(records.run.tags)
    assert records.axes["epoch/*"] == "epoch"
    assert records.best["val/*"] == "max"
    assert records.files.keys() >= {"student.pt", "student.json"}
    table = json.loads(records.files["predictions.table.json"].read_text())
    assert len(table["data"]) == 4  # one row per validation image
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert set(row["image"]["boxes"]) == {"ground_truth", "student", "teacher"}
    assert set(row["image"]["masks"]) == {"distillation"}
    assert 0 <= row["teacher right, student wrong"] <= row["teacher finds"] <= row["objects"]
    measured = summary(run)["student"]
    assert {name: records.summary[name] for name in measured} == pytest.approx(measured)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"]
    steps = (run / "steps.csv").read_text().splitlines()[0].split(",")
    ours = {name for name in steps if "/" in name and name not in ("loss/detection", "loss/distillation")}
    assert ours <= set(drawn)
    assert ours <= records.logged
    assert ours <= in_mlflow


def test_a_named_teacher_is_measured_once_for_all_jobs_on_its_data(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own run measured it: other images, another size or other metrics make that worthless, other seeds do not."""
    measured: list[str] = []

    def count(*args: Any) -> dict[str, float]:
        measured.append("again")
        return {"AP": 0.5}

    monkeypatch.setattr("distill.training.callbacks.teacher_check.evaluate", count)
    lines = ["train", f"teacher.weights={tiny_teacher}", *TINY, "pictures=0"]
    assert cli([*lines, "seed=3", "data.source.train=12", "data.eval_batch_size=1", "hydra.run.dir=same"]) == 0
    assert not measured
    own = {name: value for name, value in summary(tiny_teacher)["student"].items() if name.startswith("val/")}
    assert summary(tmp_path / "same")["teacher"]["values"] == own
    file = Path(os.path.relpath(tiny_teacher / "student.pt"))
    assert cli([lines[0], f"teacher.weights={file}", *lines[2:], "hydra.run.dir=file"]) == 0
    assert not measured
    assert summary(tmp_path / "file")["teacher"]["values"] == own
    assert summary(tmp_path / "file")["teacher"]["source"] == str(Path.cwd() / file)
    lines = ["data.source.test=2" if line == "data.source.test=0" else line for line in lines]
    for number, other in enumerate(["data.source.seed=5", "data.pad_to=96", "metrics.coco.per_class=false"], start=1):
        assert cli([*lines, other, f"hydra.run.dir={number}"]) == 0
        assert len(measured) == number, other
        values = summary(tmp_path / str(number))["teacher"]["values"]
        assert {name for name in values if name.startswith("val/")} == {"val/AP"}
        assert values["val/AP"] == 0.5
        assert 0 <= values["test/AP"] <= 1  # for the closing table


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupt_says_how_to_go_on(
    epoch: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first epoch there is no checkpoint yet; in the second the first one's is kept, and a resume takes it."""
    step = Distiller.training_step

    def interrupted(self: Distiller, batch: Any, index: int) -> Any:
        if self.current_epoch == epoch:
            raise KeyboardInterrupt
        return step(self, batch, index)

    data = [line for line in TINY if not line.startswith(("schedule.epochs", "trainer.max_steps"))]
    lines = ["train", "distill=none", *data, "schedule.epochs=2", "pictures=0", "hydra.run.dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "training_step", interrupted)
        assert cli(lines) == 130
    said = capsys.readouterr()
    assert "interrupted" in said.err
    assert ("python -m distill resume" if epoch else "start it again with the same arguments") in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() == (epoch == 1)
    assert not (tmp_path / "run" / "summary.json").exists()
    if epoch == 1:
        assert cli([*lines, "ckpt_path=last"]) == 0
        assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("workers", [exhaustive(0), 2])
def test_a_deterministic_run_repeats_to_the_bit(workers: int, cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    """Two runs leave the same file; another seed leaves another."""
    lines = [f"teacher.weights={tiny_teacher}", *TINY, "trainer.max_steps=4", "schedule.epochs=2", "pictures=0"]
    for run, seed in (("one", 0), ("two", 0), ("other", 1)):
        line = [*lines, f"data.workers={workers}", "deterministic=true", f"seed={seed}", f"hydra.run.dir={run}"]
        assert cli(["train", *line]) == 0
    one, two, other = ((tmp_path / run / "student.pt").read_bytes() for run in ("one", "two", "other"))
    assert one == two
    assert one != other


@pytest.mark.exhaustive  # daily: test_of_two_processes_one_is_told_and_both_leave
def test_two_processes_from_the_command_line(tiny_teacher: Path, tmp_path: Path) -> None:
    """A process of its own: Lightning starts the second one with this one's command line."""
    lines = ["trainer=ddp_cpu", f"teacher.weights={tiny_teacher}", *TINY, "pictures=0", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "distill", "train", *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation and test, percent") == 1
    report = summary(tmp_path / "run")
    assert report["student"]["val/AP"] >= 0
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["run"]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_run_that_ends_inside_an_epoch_says_nothing_that_nobody_can_act_on(
    cli: Cli, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert cli(["train", "distill=none", *TINY, "trainer.max_steps=1", "hydra.run.dir=run"]) == 0
    assert [str(each.message) for each in recwarn if "monitor" in str(each.message)] == []
    assert summary(tmp_path / "run")["student"]["val/AP"] >= 0
