"""What cannot go well is refused before anything is trained, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.grids import mostly_exhaustive
from helpers.image_folders import write_voc
from helpers.runs import TINY, Cli, summary


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["seed=1,2"], "multirun"),
        (["teacher=none"], "cannot do without a teacher"),
        (["teacher=none", "distill=none", "init=inherit"], "init=inherit cannot do without a teacher"),
        (["init=teacher"], "init=teacher: expected one of scratch, inherit"),
        (
            ["distill=defeat_full", "model=retinanet_r10_quarter"],
            "proposals: the student is a retinanet, which has no rois. Set the weights of proposals to 0, or choose",
        ),
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
        (
            ["distill=defeat_full", "teacher=retinanet_r18"],
            "proposals: the teacher is a retinanet, which has no rois. Set the weights of proposals to 0, or choose",
        ),
        (["distill.losses.dsig.neck.levels=[4,128]"], "expected strides that both models have"),
        (["teacher.model.anchors.sizes=[[8]]"], "expected 5 lists"),
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


UNREAD = [  # the word, and what the message names
    ("schedule.optimizer.lr=-1", "schedule.optimizer: Invalid learning rate: -1"),
    ("schedule.optimizer.lr=abc", "schedule.optimizer: '"),
    ("schedule.optimizer.lr=inf", "schedule.optimizer: expected finite numbers"),
    ("+schedule.optimizer.momentumm=0.9", "unexpected keyword argument 'momentumm'"),
    ("schedule.optimizer._target_=torch.nn.Linear", "schedule.optimizer: "),
    ("schedule.clip=-1", "trainer.gradient_clip_val=-1: expected a number above 0, or null"),
    ("schedule.gamma=-1", "schedule: gamma=-1"),
    ("schedule.milestones=[a]", "milestones: expected Sequence[float]"),
    ("trainer.max_steps=1.5", "max_steps: expected int, got 1.5"),
    ("trainer.accelerator=tpuu", "tpuu"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0: expected a whole number from 1"),
    ("+trainer.val_check_interval=2", "trainer.val_check_interval=2: expected 1.0: a run is evaluated between epochs"),
    ("+trainer.val_check_interval=0.5", "schedule.evaluate_every says how often"),
    ("+trainer.val_check_interval={minutes:10}", "trainer.val_check_interval.minutes=10: expected 1.0"),
    ("trainer.check_val_every_n_epoch=null", "check_val_every_n_epoch=None: expected a whole number from 1"),
    ("+trainer.limit_test_batches=1", "data.limit_eval=N limits val and test to N images"),
    ("+trainer.overfit_batches=2", "data.limit=N trains on the same N images in every epoch"),
    ("+trainer.overfit_batches=0.1", "data.limit=N trains on the same N images in every epoch"),
    ("+trainer.fast_dev_run=true", "schedule.steps=2 data.limit_eval=8, or call the command doctor"),
    ("+trainer.fast_dev_run=3", "the folder of the run would count as finished"),
    ("trainer.precision=bf16-true", "trainer.precision=bf16-true: expected auto, 32-true, bf16-mixed, 16-mixed"),
    ("trainer.precision=16-true", "trainer.precision=16-true: expected auto, 32-true, bf16-mixed, 16-mixed"),
    ("trainer.precision=64-true", "trainer.precision=64-true: expected auto, 32-true, bf16-mixed, 16-mixed"),
    ("trainer.precision=64", "trainer.precision=64: expected auto"),
    ("trainer.use_distributed_sampler=true", "the loaders already split the images between the processes"),
    (
        "+model.topk_candidates=9",
        "model: distill.FasterRCNN has no option topk_candidates. If an experiment or another option sets this, ",
    ),
    ("+trainer.foo=1", "lightning.Trainer has no option foo"),
    ("trainer.devices=2", "trainer.strategy=auto with 2 processes: "),
    ("trainer={devices:2,strategy:ddp_spawn}", "trainer.strategy=ddp_spawn with 2 processes: "),
    ("trainer.save_every=x", "save_every"),
    ("deterministic=abc", "deterministic=abc: expected one of true, false, warn"),
    ("callbacks.best.mode=maxx", "callbacks.best: `mode` can be"),
    ("callbacks.rate.logging_interval=days", "callbacks.rate: logging_interval"),
    (
        "+callbacks.rate.x=1",
        "has no option x. If an experiment or another option sets this, add to the command: ~callbacks.rate.x",
    ),
    ("callbacks.panels.every=0", "callbacks.panels: expected images from 0"),
    ("+callbacks.x={_target_:torch.nn.Identity}", "callbacks.x: expected a Callback"),
    ("+logger.csv2={flush_logs_every_n_steps:x}", "flush_logs_every_n_steps=x: expected a whole number from 1"),
    ("+logger.csv2={flush_logs_every_n_steps:0}", "flush_logs_every_n_steps=0: expected a whole number from 1"),
    ("baseline=[a]", "expected train, the folder of a run with distill=none, or null"),
    ("baseline_epochs=0", "baseline_epochs=0: expected a factor above 0"),
    ("role=pupil", "role=pupil: expected one of student, teacher"),
    ("cost=-1", "cost=-1: expected a whole number from 0"),
    ("+logger.x={_target_:torch.nn.Identity}", "logger.x: expected a Logger"),
    ("supervised.loss_classifier=nan", "supervised.loss_classifier=nan: expected a weight from 0"),
    ("guard.limit=-1", "guard: expected limit"),
    ("metrics.coco.per_class=abc", "per_class: expected bool"),
    ("pictures=-1", "pictures=-1: expected a whole number from 0"),
    ("seed=-1", "seed=-1: expected a whole number from 0 to"),
    ("teacher.train=maybe", "teacher.train=maybe: expected one of auto, never"),
    ("teacher.dtype=half", "teacher.dtype=half: expected one of auto, float32, bfloat16"),
    ("+data.extra=${nowhere}", "cannot be resolved: Interpolation key 'nowhere'"),
    ("data.batch_size=0", "data.batch_size=0: expected a whole number from 1"),
    ("data.workers=-1", "workers"),
    ("data.min_size=0", "min_size"),
    ("data.pad_to=0", "pad_to"),
    ("data.prefetch=0", "prefetch"),
    ("data.flip=3", "flip"),
]


@pytest.mark.parametrize(("line", "message"), mostly_exhaustive(UNREAD, UNREAD[::4]))
def test_a_wrong_value_is_named_before_an_image_is_read(
    line: str, message: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distill.data.shapes.Shapes.read_split", lambda *_: pytest.fail("data were read"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert cli(["train", *TINY, line]) == 1
    said = capsys.readouterr().err
    assert said.startswith("\ndistill: ")
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classifier", "c.pt", "data.workers=-1"], "data.workers=-1: expected a whole number from 0"),
        (["classifier", "c.pt", "--epochs", "0"], "--epochs and --size start at 1"),
        (["classifier", "c.pt", "--rate", "nan"], "--rate is a number above 0"),
        (["bench", "data.batch_size=0"], "data.batch_size=0: expected a whole number from 1"),
        (["train", "-m", "--cfg", "job", "seed=1,2"], "--cfg shows the configuration of one run"),
        (
            [
                "train",
                *TINY,
                "distill=none",
                "+metrics.more={_target_:distill.CocoMetric,_partial_:true}",
            ],
            "metrics: ['coco', 'more'] give val/AP twice: set one of them to null",
        ),
    ],
)
def test_every_verb_names_a_wrong_value(
    words: list[str], message: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(words) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("tensorboard", "TensorBoardLogger cannot begin: "),
        ("wandb", "has no option unheard_of"),
    ],
)
def test_a_logger_that_cannot_begin_says_why_before_the_first_step(
    logger: str, message: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"logger={logger}", f"+logger.{logger}.unheard_of=1"]
    assert cli(["train", *TINY, "distill=none", *lines]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "unheard_of" in said.err
    assert "Traceback" not in said.err
    assert "epoch 1" not in said.out


@pytest.mark.parametrize("line", ["callbacks.best.monitor=val/APP", "metric=val/APP"])
def test_what_validation_does_not_measure_is_named_before_a_teacher_is_trained(
    line: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert cli(["train", *TINY, line, *(["callbacks.best.monitor=val/AP"] if line.startswith("metric") else [])]) == 1
    assert f"{line} is not among the measured values; did you mean val/AP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["callbacks=early_stop", "trainer.limit_val_batches=0"], "which leaves out all evaluations"),
        (["trainer.limit_val_batches=0.01"], "trainer: You requested to check 0.01 of the `val_dataloader`"),
    ],
)
def test_a_limit_that_leaves_no_evaluation_is_named_in_one_line(
    lines: list[str], message: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", "distill=none", *TINY, *lines]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
