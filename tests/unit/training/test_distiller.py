"""What a run logs and evaluates under Lightning's limits and intervals."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.evaluation.coco import CocoMetric
from distill.evaluation.evaluate import evaluate
from distill.evaluation.metric import DetectionArrays, DetectionMetric, GroundTruth
from distill.training.callbacks.checkpoints import LastCheckpoint
from distill.training.callbacks.teacher_check import TeacherCheck
from distill.training.distiller import Distiller
from distill.types import DistillError
from helpers.training import CLASSES, distiller, fit, sgd, shapes_data, small_detector, small_teacher


class Counts(DetectionMetric):
    """Counts the images and objects that a metric would measure."""

    def evaluate(self, truth: GroundTruth, detections: DetectionArrays) -> dict[str, float]:
        return {"images": float(len(truth.images)), "objects": float(len(truth.label))}


def data(**options: Any) -> DetectionData:
    return shapes_data(source=Shapes(train=4, val=5, test=0, size=64), batch_size=2, eval_batch_size=2, **options)


def run(folder: Path, **options: Any) -> list[dict[str, str]]:
    """The rows of metrics.csv of a run with two steps an epoch, and 5 validation images in batches of 2."""
    logger = CSVLogger(folder, name="", version="")
    settings = {"limit_val_batches": 1.0, "log_every_n_steps": 20, **options}
    fit(distiller(metrics=[Counts]), folder, data(), logger=logger, **settings)
    file = folder / "metrics.csv"
    return list(csv.DictReader(file.open())) if file.is_file() else []


def logged(rows: list[dict[str, str]], name: str) -> dict[int, float]:
    """Values by step of the rows that have a value of this name."""
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


@pytest.mark.parametrize(("limit", "images"), [(1, 2), (0.67, 4), (3, 5), (1.0, 5)])
@pytest.mark.filterwarnings("ignore:trainer.limit_val_batches")
def test_images_beyond_the_limit_of_validation_batches_are_no_misses(limit: float, images: int, tmp_path: Path) -> None:
    truth = data().ground_truth("val")
    first = {image["id"] for image in truth["images"][:images]}
    rows = run(tmp_path, limit_val_batches=limit, max_epochs=1)
    assert logged(rows, "val/images") == {1: images}
    assert logged(rows, "val/objects") == {1: sum(note["image_id"] in first for note in truth["annotations"])}


def test_a_limit_of_validation_batches_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"limit_val_batches=1: .* only the images of these batches.*data.limit_eval"
    ) as seen:
        run(tmp_path, limit_val_batches=1, max_epochs=2)
    assert sum("limit_val_batches" in str(warning.message) for warning in seen) == 1


def test_a_sanity_check_before_the_training_leaves_no_values(tmp_path: Path) -> None:
    rows = run(tmp_path, num_sanity_val_steps=1, max_epochs=1)
    assert logged(rows, "val/images") == {1: 5}


def test_a_run_shorter_than_the_logging_interval_logs_its_last_step(tmp_path: Path) -> None:
    rows = run(tmp_path, max_steps=1, limit_val_batches=0)
    assert logged(rows, "loss/total").keys() == {0}
    terms = {name: float(value) for name, value in rows[0].items() if name.startswith("loss/student/")}
    assert math.isclose(sum(terms.values()), logged(rows, "loss/total")[0], rel_tol=1e-5)


def test_a_run_that_its_time_ends_logs_its_last_step(tmp_path: Path) -> None:
    rows = run(tmp_path, max_time={"milliseconds": 1}, max_epochs=50, limit_val_batches=0)
    assert logged(rows, "loss/total").keys() == {0}


def test_the_last_step_is_logged_besides_the_interval(tmp_path: Path) -> None:
    rows = run(tmp_path, log_every_n_steps=3, max_epochs=4, limit_val_batches=0)
    assert logged(rows, "loss/total").keys() == {2, 5, 7}


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, {3, 5}),
        ({"max_epochs": 2, "check_val_every_n_epoch": 3}, {3}),
        ({"max_epochs": 9, "max_steps": 5}, {1, 3, 4}),
        ({"max_epochs": 9, "max_steps": 4}, {1, 3}),
    ],
)
def test_the_last_weights_are_evaluated_whatever_the_interval(
    limits: Mapping[str, Any], steps: set[int], tmp_path: Path
) -> None:
    assert logged(run(tmp_path, **limits), "val/images") == dict.fromkeys(steps, 5.0)


def test_a_run_that_ended_inside_an_epoch_resumes_with_more_steps(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_epochs": 9, "limit_val_batches": 1.0, "enable_checkpointing": True}
    first = LastCheckpoint(tmp_path, every=None)
    fit(distiller(metrics=[Counts]), tmp_path, data(), callbacks=[first], max_steps=3, **limits)
    checkpoint = torch.load(first.file, weights_only=True)
    assert (checkpoint["global_step"], checkpoint["resume"]["stop"]) == (3, False)
    more = LastCheckpoint(tmp_path / "more", every=None)
    trainer = fit(distiller(metrics=[Counts]), tmp_path, data(), first.file, callbacks=[more], max_steps=5, **limits)
    assert trainer.global_step == 5


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_in_another_type_than_float32_are_refused(precision: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DistillError, match=f"trainer.precision={precision}: expected auto, 32-true, bf16-mixed, 16-mixed"
    ):
        fit(distiller(), tmp_path, precision=precision)


def test_a_teacher_that_lacks_a_class_is_judged_by_the_classes_that_it_knows(tmp_path: Path) -> None:
    teacher = small_teacher(classes=(*CLASSES[:5], "oval"))
    student = distiller(teacher=teacher)
    with pytest.warns(UserWarning, match="the teacher does not know cross: these classes count 0 in its AP"):
        fit(student, tmp_path, callbacks=[TeacherCheck()], max_steps=1)
    assert teacher.values.keys() >= {"val/AP", "val/shared_AP"}
    teacher.values |= {"val/AP": 0.4, "val/shared_AP": 0.6}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the teacher's AP")
        fit(student, tmp_path, callbacks=[TeacherCheck(min_ap=0.5)], max_steps=1)
    with pytest.warns(UserWarning, match=r"AP is 60.0 %, below teacher.min_ap=0.7"):
        fit(student, tmp_path, callbacks=[TeacherCheck(min_ap=0.7)], max_steps=1)


def test_the_schedule_s_options_act_on_a_plain_trainer(tmp_path: Path) -> None:
    """From Python, where nothing copies them into the trainer."""
    module = distiller(metrics=[Counts], schedule=sgd(clip=0.5, accumulate=2, evaluate_every=3))
    trainer = fit(module, tmp_path, data(), max_epochs=3, limit_val_batches=1.0)
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.5, 2)
    assert trainer.global_step == 3  # of 6 batches


def test_a_trainer_that_contradicts_the_schedule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"gradient_clip_val: the trainer has 1.0, the schedule 0.5"):
        fit(distiller(schedule=sgd(clip=0.5)), tmp_path, data(), gradient_clip_val=1.0)


def test_lightning_tests_and_predicts(tmp_path: Path) -> None:
    """`Trainer.test` measures what `evaluate` measures; `Trainer.predict` gives detections in original pixels."""
    module = distiller(metrics=[CocoMetric, Counts])
    drawn = DetectionData(Shapes(train=2, val=1, test=3, size=96), batch_size=2, workers=0, min_size=64, max_size=64)
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    (values,) = trainer.test(module, datamodule=drawn, verbose=False)
    assert values["test/images"] == 3
    expected = evaluate(module.student, drawn, "test", module.metrics)
    assert values == pytest.approx({f"test/{name}": value for name, value in expected.items()})
    predicted = trainer.predict(module, datamodule=drawn)
    assert predicted is not None
    assert [len(batch) for batch in predicted] == [2, 1]
    assert predicted[0][0].boxes.amax() > 64  # the images have 96 px


def test_a_checkpoint_gives_a_distiller_with_its_student(tmp_path: Path) -> None:
    module = distiller()
    fit(module, tmp_path, data(), max_epochs=1, enable_checkpointing=True, callbacks=[LastCheckpoint(tmp_path)])
    again = Distiller.load_from_checkpoint(tmp_path / "last.ckpt", metrics=[Counts])
    expected = module.student.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.student.state_dict().items())
    assert again.metrics == (Counts,)


@pytest.mark.parametrize("width", [0.25, 0.125])
def test_a_teacher_smaller_than_its_student_is_said(width: float, tmp_path: Path) -> None:
    student = small_detector(backbone={"depth": 10, "width": 0.25})
    teacher = small_teacher(backbone={"depth": 10, "width": width})
    small, large = teacher.detector.parameters_count, student.parameters_count
    said = f"the teacher has fewer parameters ({small:,}) than its student ({large:,})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(distiller(student, teacher), tmp_path, max_steps=0)
    assert any(said in str(warning.message) for warning in caught) == (small < large)
