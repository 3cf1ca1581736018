"""Grouping by configuration, pairing by seed, references, and the numbers of a comparison worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.analysis.comparison import (
    Comparison,
    Difference,
    Row,
    compare,
    describe_regime,
    to_json,
    to_rows,
)
from distill.analysis.configurations import FinishedRun
from distill.analysis.image_bootstrap import bootstrap_ap
from distill.cli.reports.comparison_report import describe
from distill.evaluation.metric import DetectionArrays
from distill.evaluation.recording import save_recording
from distill.types import DistillError
from helpers.recordings import random_recording

TEACHER = {"source": "teachers/x", "values": {"test/AP": 0.5, "test/APl": -1.0}, "seconds": 90.0}
FREE = ("data.workers", "paths.*")


def run(
    name: str, seed: int, ap: float, seconds: float | None = 10.0, words: tuple[str, ...] = (), **more: Any
) -> FinishedRun:
    losses = () if name == "none" else (name,)
    epochs = more.pop("epochs", 4)
    return FinishedRun(
        folder=Path(f"{name}-{epochs}-{seed}"),
        config={
            "seed": seed,
            "data": {"seed": seed, "workers": seed},
            "schedule": {"epochs": epochs},
            "teacher": {"seed": 0},
            "distill": {"losses": {loss: {"weight": more.pop("weight", 1.0), "seed": seed} for loss in losses}},
        },
        words=[f"distill={name}", f"seed={seed}", *words],
        losses=losses,
        values={"val/AP": 0.9, "test/AP": ap, "test/AP50": 2 * ap},
        classes=("cat",),
        teacher=TEACHER if losses else None,
        fingerprints={"test": "same"},
        seconds=seconds,
        seconds_per_step=None if seconds is None else seconds / 100,
        group=f"data=x distill={name}",
        **more,
    )


NONE = [run("none", seed, ap) for seed, ap in ((0, 0.10), (1, 0.20), (2, 0.30))]
DEFEAT = [run("defeat", seed, ap, 14.0) for seed, ap in ((2, 0.33), (0, 0.12), (1, 0.24))]


def named(answer: Comparison, name: str) -> Row:
    return next(row for row in answer.rows if row.configuration == name)


def difference(answer: Comparison, name: str) -> Difference:
    found = named(answer, name).difference
    assert found is not None
    return found


def test_seeds_are_paired_and_the_numbers_are_those_worked_by_hand() -> None:
    """Differences 0.02, 0.04, 0.03: mean 0.03, s = 0.01, half a width of 4.303 * 0.01 / sqrt(3) = 0.02484."""
    answer = compare([*NONE, *DEFEAT], free=FREE, images=False)
    assert (answer.split, answer.metric, answer.left_out) == ("test", "test/AP", [])
    assert [(row.configuration, row.role) for row in answer.rows] == [
        ("teacher", "teacher"),
        ("none", "student alone"),
        ("defeat", "distilled"),
    ]
    alone, ours = named(answer, "none"), named(answer, "defeat")
    assert (alone.seeds, ours.seeds) == ([0, 1, 2], [0, 1, 2])
    assert alone.values == pytest.approx({"test/AP": 0.2, "test/AP50": 0.4})
    assert alone.deviation == pytest.approx(0.1)
    assert alone.difference is None
    found = difference(answer, "defeat")
    assert found.reference == "none"
    assert found.by_seed == pytest.approx((0.03, 0.03 - 0.02484, 0.03 + 0.02484), abs=1e-5)
    assert (found.verdict, found.further_seeds, found.by_image) == ("gain shown", None, None)
    assert found.gap_closed == pytest.approx(0.03 / 0.3)
    assert found.extra_time == pytest.approx(0.4)
    assert named(answer, "teacher").values == {"test/AP": 0.5}
    assert named(answer, "teacher").seconds == 90.0
    assert "gap of 30.0" in answer.notes[0]


def test_only_seeds_that_both_have_are_compared_and_one_seed_has_no_interval() -> None:
    answer = compare([NONE[0], NONE[1], run("defeat", 1, 0.15), run("defeat", 7, 0.9)], free=FREE, images=False)
    found = difference(answer, "defeat")
    assert (found.seeds, found.mean) == ([1], pytest.approx(-0.05))
    assert (found.by_seed, found.verdict, found.further_seeds) == (None, "not decided", None)


def test_a_fixed_seed_of_the_data_does_not_split_a_configuration() -> None:
    runs = [run("none", seed, 0.1, words=("data.seed=0",)) for seed in (0, 1)]
    runs = [replace(one, config={**one.config, "data": {"seed": 0}}) for one in runs]
    assert [row.seeds for row in compare(runs, free=FREE, images=False).rows] == [[0, 1]]


def test_no_common_seed_is_no_difference() -> None:
    answer = compare([*NONE, run("defeat", 9, 0.9)], free=FREE, images=False)
    assert named(answer, "defeat").difference is None
    assert answer.notes[0] == "defeat and none have no seed in common, so there is no difference to show"


def test_a_single_configuration_says_what_is_missing() -> None:
    (note,) = compare(DEFEAT, free=FREE, images=False).notes
    assert note.startswith("defeat is the only configuration")
    assert "distill=none" in note


@pytest.mark.parametrize(
    ("epochs", "expected"), [(4, "at equal epochs"), (6, "with another number of epochs or steps")]
)
def test_equal_epochs_are_said_only_of_equal_epochs(epochs: int, expected: str) -> None:
    """A reference may be shorter or longer: a named baseline, or the first of several configurations."""
    answer = compare([*NONE, run("none", 0, 0.2, 25.0, epochs=epochs, words=("lr=1",))], free=FREE, images=False)
    if epochs == 4:
        answer = compare([*NONE, *DEFEAT], free=FREE, images=False)
    (row,) = [row for row in answer.rows if row.difference]
    assert row.difference is not None
    assert f"more time {expected} (equal=time" in describe(row.difference, answer)


def test_the_epochs_of_the_teacher_are_named_as_such() -> None:
    longer = run("defeat", 0, 0.4, words=("++teacher.schedule.epochs=30", "schedule.epochs=10"), weight=2.0)
    answer = compare([*NONE, longer], free=FREE, images=False)
    assert answer.rows[-1].configuration == "defeat teacher.epochs=30 epochs=10"


def test_an_interval_that_holds_zero_says_how_many_seeds_would_decide() -> None:
    answer = compare(
        [*NONE, *(replace(one, values={"test/AP": ap}) for one, ap in zip(DEFEAT, (0.3, 0.2, 0.2), strict=True))],
        free=FREE,
        images=False,
    )
    found = difference(answer, "defeat")
    assert found.verdict == "no difference shown"
    assert found.further_seeds is not None
    assert found.further_seeds > 0


def test_configurations_differ_by_decisive_keys_only() -> None:
    """The seed, the seeds made from it, and free keys do not tell configurations apart; a weight does."""
    weighted = run("defeat", 0, 0.4, words=("distill.losses.defeat.weight=2",), weight=2.0)
    answer = compare([*NONE, *DEFEAT, weighted], free=FREE, images=False)
    assert [row.configuration for row in answer.rows] == ["teacher", "none", "defeat", "defeat weight=2"]
    assert answer.settings["distill.losses.defeat.weight"] == {"defeat": "1.0", "defeat weight=2": "2.0"}
    assert "data.workers" not in answer.settings
    assert not [key for key in answer.settings if key.endswith("seed") and not key.startswith("teacher.")]
    without = compare([*NONE, *DEFEAT], images=False)
    assert len(without.rows) == 7  # three of each, without patterns of free keys


def test_a_label_names_the_configuration_whose_words_it_has() -> None:
    labels = {frozenset(["distill=none"]): "student alone", frozenset(["distill=defeat"]): "objects"}
    answer = compare([*NONE, *DEFEAT], free=FREE, images=False, labels=labels)
    assert [row.configuration for row in answer.rows] == ["teacher", "student alone", "objects"]


def test_equal_time_takes_the_student_alone_whose_time_is_nearest() -> None:
    longer = [
        run("none", seed, 0.4, time, epochs=epochs, words=(f"schedule.epochs={epochs}",))
        for seed in (0, 1, 2)
        for epochs, time in ((6, 15.0), (9, 22.0))
    ]
    runs = [*NONE, *longer, *DEFEAT]
    assert difference(compare(runs, free=FREE, images=False), "defeat").reference == "none"
    answer = compare(runs, free=FREE, equal="time", images=False)
    found = difference(answer, "defeat")
    assert found.reference == "none epochs=6"
    assert found.mean == pytest.approx(0.23 - 0.4)
    assert found.extra_time == pytest.approx(14 / 15 - 1)


def test_the_name_of_a_longer_training_leaves_out_what_follows_the_epochs() -> None:
    def alone(epochs: int, evaluate_every: int) -> FinishedRun:
        words = (f"schedule.epochs={epochs}", f"schedule.evaluate_every={evaluate_every}")
        made = run("none", 0, 0.4, epochs=epochs, words=words)
        made.config["schedule"]["evaluate_every"] = evaluate_every
        return made

    answer = compare([*NONE, alone(6, 3), alone(9, 4)], free=FREE, images=False)
    assert [row.configuration for row in answer.rows] == ["none", "none epochs=6", "none epochs=9"]
    answer = compare([alone(6, 3), alone(6, 2)], free=FREE, images=False)
    assert [row.configuration for row in answer.rows] == ["none evaluate_every=3", "none evaluate_every=2"]
    answer = compare([*NONE, alone(6, 3), alone(6, 2), alone(9, 4)], free=FREE, images=False)
    names = ["none", "none epochs=6 evaluate_every=3", "none epochs=6 evaluate_every=2", "none epochs=9"]
    assert [row.configuration for row in answer.rows] == names


def test_without_a_student_alone_the_first_configuration_is_the_reference() -> None:
    answer = compare([*DEFEAT, run("dsig", 0, 0.2)], free=FREE, images=False)
    assert difference(answer, "dsig").reference == "defeat"
    assert difference(answer, "dsig").mean == pytest.approx(0.08)
    assert not answer.notes  # nothing is known about a student alone


OTHERS = [
    ({"classes": ("dog",)}, "its classes are dog; those of none-4-0 are cat"),
    ({"fingerprints": {"test": "other"}}, "not those of none-4-0: another data set"),
    ({"fingerprints": {}}, "do not say on which images of test it was measured"),
    ({"values": {"val/AP": 0.3}}, "no result on the split test"),
    ({"values": {"test/mAP": 0.3}}, "measured by test/mAP, which none-4-0 lacks"),
]


@pytest.mark.parametrize(("changes", "reason"), OTHERS, ids=lambda value: str(value)[:30])
def test_a_run_of_other_data_is_named_and_never_averaged_in(changes: dict[str, Any], reason: str) -> None:
    other = replace(NONE[1], **changes)
    answer = compare([NONE[0], other, *DEFEAT], free=FREE, images=False)
    ((folder, said),) = answer.left_out
    assert folder == other.folder
    assert reason in said
    assert named(answer, "none").seeds == [0]


def test_a_second_run_of_the_same_seed_is_left_out() -> None:
    again = replace(NONE[0], folder=Path("again"), values={"test/AP": 0.9})
    answer = compare([*NONE, again], free=FREE, images=False)
    assert answer.left_out == [(Path("again"), "same configuration and seed as none-4-0")]
    assert named(answer, "none").values["test/AP"] == pytest.approx(0.2)


def test_nothing_to_compare_is_refused_with_the_reasons() -> None:
    with pytest.raises(DistillError, match=r"at least one finished run to compare, got none.\n  x: unfinished"):
        compare([], [(Path("x"), "unfinished")])


def test_a_teacher_that_is_not_better_cannot_help() -> None:
    assert "has nothing to teach" in describe_regime(0.3, 0.3, "none")
    assert "gap of 10.0" in describe_regime(0.4, 0.3, "none")


def test_missing_detections_and_other_metrics_are_said() -> None:
    answer = compare([*NONE, *DEFEAT], free=FREE)
    assert difference(answer, "defeat").by_image is None
    assert "no interval over images for defeat-4-0, none-4-0: no detections on test" in answer.notes[1]
    voc = [replace(one, values={"test/mAP": one.values["test/AP"]}) for one in (*NONE, *DEFEAT)]
    assert "for COCO's AP only, not for test/mAP" in compare(voc, free=FREE).notes[-1]


def test_the_interval_over_images_is_that_of_the_first_common_seed(tmp_path: Path) -> None:
    ours = random_recording(3, images=40)
    kept = ours.detections.score > 0.5
    theirs = replace(ours, detections=DetectionArrays._make(column[kept] for column in ours.detections))
    runs = []
    for one, recording in ((NONE[1], theirs), (DEFEAT[2], ours)):
        file = save_recording(tmp_path / f"{one.folder}.npz", recording)
        ap = float(bootstrap_ap(recording, 0)[0])
        runs.append(replace(one, values={"test/AP": ap}, detections={"test": file}))
    answer = compare(runs, free=FREE)
    found = difference(answer, "defeat")
    assert found.by_image is not None
    assert found.by_image.low < found.mean < found.by_image.high
    assert found.by_image.mean == pytest.approx(found.mean)
    assert len(answer.notes) == 1
    foreign = [runs[0], replace(runs[1], values={"test/AP": 0.123})]
    answer = compare(foreign, free=FREE)
    assert difference(answer, "defeat").by_image is None
    assert "its summary says 0.1230: one of the files belongs to another run" in answer.notes[-1]


def test_files_have_the_names_of_the_metrics_and_plain_numbers() -> None:
    answer = compare([*NONE, *DEFEAT], [(Path("x"), "unfinished")], FREE, images=False)
    content = json.loads(json.dumps(to_json(answer)))
    assert content["left_out"] == [{"folder": "x", "reason": "unfinished"}]
    assert content["rows"][2]["difference"]["by_seed"]["mean"] == pytest.approx(0.03)
    assert content["runs"][0]["test/AP"] == 0.1
    teacher, alone, ours = to_rows(answer)
    assert alone["test/AP"] == pytest.approx(0.2)
    assert (teacher["role"], ours["seeds"], ours["reference"]) == ("teacher", "0 1 2", "none")
    assert [row["group"] for row in (teacher, alone, ours)] == ["", "data=x distill=none", "data=x distill=defeat"]
    assert ours["seeds_low"] < ours["difference"] < ours["seeds_high"]
