"""Keys of the teacher's run on the command line, and which of several values wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.cli.commands import train
from distill.cli.config.auto_values import DataFacts, resolve
from distill.cli.config.override_checks import compose_without_run
from distill.cli.config.teacher_words import expand_teacher_words
from distill.cli.runs import teacher_cache
from distill.cli.runs.preflight import plan_teacher
from distill.cli.runs.shared_run import compose_run
from distill.cli.runs.teacher_cache import run_config, teacher_overrides
from distill.data.auto_size import SizeChoice
from distill.quoting import quote_value
from distill.types import DistillError
from helpers.image_folders import write_coco


def teacher_run(*words: str) -> Any:
    """The configuration of the teacher's run of a command line."""
    options = plan_teacher(compose_without_run(expand_teacher_words(words)))
    assert options is not None
    return run_config(teacher_overrides(options))


SHAPES = ("data=shapes", "data.source.train=8")


def test_the_teacher_has_the_students_recipe() -> None:
    run = teacher_run(*SHAPES, "schedule.epochs=3", "schedule.optimizer.lr=0.5")
    assert (run.schedule.epochs, run.schedule.optimizer.lr, run.data.source.train) == (3, 0.5, 8)


def test_keys_of_the_teachers_run_win() -> None:
    run = teacher_run(*SHAPES, "teacher.schedule.epochs=5", "schedule.epochs=3", "teacher.data.source.train=16")
    assert (run.schedule.epochs, run.data.source.train) == (5, 16)
    run = teacher_run(*SHAPES, "teacher.schedule.epochs=5", 'teacher.run=["schedule.epochs=7"]')
    assert run.schedule.epochs == 7


def test_the_command_line_wins_over_the_rule_of_a_data_set() -> None:
    assert teacher_run("data=shapes").schedule.epochs == 12
    assert teacher_run("data=shapes", "schedule.epochs=3").schedule.epochs == 3


def test_the_teacher_of_a_data_option_has_the_data_of_its_table() -> None:
    """The word that chooses the option does not cancel the option's rule, but a word for the same key does."""
    for words in (["data=shapes_100"], ["data=shapes_100", "teacher.schedule.epochs=5"], ["experiment=demo"]):
        data = teacher_run(*words).data
        assert (data.source.train, data.batch_size) == (1600, 8)
    assert teacher_run("data=shapes_100", "data.source.train=16").data.source.train == 16
    assert teacher_run("data=shapes_100", "teacher.data.source.train=32").data.source.train == 32


CNN_FOR_DETR = (*SHAPES, "model=rtdetr_mini", "teacher=frcnn_r18_mini", "distill=pkd")


@pytest.mark.parametrize(
    ("words", "resize"),
    [
        (CNN_FOR_DETR, "square"),
        ((*CNN_FOR_DETR, "teacher.data=shapes"), "square"),
        ((*CNN_FOR_DETR, "data.resize=ratio"), "ratio"),
        ((*CNN_FOR_DETR, "teacher.data.resize=ratio"), "ratio"),
        ((*CNN_FOR_DETR, 'teacher.run=["data.resize=ratio"]'), "ratio"),
        ((*SHAPES, "model=frcnn_r18_mini", "teacher=rtdetr_mini", "distill=pkd"), "square"),
        ((*SHAPES, "model=rtdetr_mini", "data.resize=ratio", "teacher.data=shapes", "distill=detr_logits"), "ratio"),
        ((*SHAPES, "model=frcnn_r18_mini"), "ratio"),
    ],
)
def test_the_teacher_learns_from_images_as_it_will_see_them(words: tuple[str, ...], resize: str) -> None:
    """A CNN that teaches an RT-DETR on squares learns from squares, unless the overrides say otherwise."""
    assert teacher_run(*words).data.resize == resize


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["model=rfdetr_nano", "teacher=rfdetr_large"], (384, 384)),
        (["model=rfdetr_nano", "teacher=frcnn_r50"], (384, 384)),
        (["model=frcnn_r18", "teacher=rfdetr_small"], (512, 512)),
        (["model=rfdetr_nano", "teacher=rfdetr_large", "teacher.data=voc"], (384, 384)),
        (["model=rfdetr_nano", "teacher=rfdetr_large", "teacher.data.min_size=704"], (704, 704)),
        (["model=rfdetr_nano", "teacher=rfdetr_large", "teacher.data.max_size=256"], (256, 256)),
        (["model=rfdetr_nano", "teacher=rfdetr_large", "data.min_size=512"], (512, 512)),
        (["model=rfdetr_nano", "teacher=frcnn_r50", "teacher.data.resize=ratio"], (240, 320)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_the_teacher_learns_from_squares_of_the_side_that_it_will_see(words: list[str], sizes: tuple[int, int]) -> None:
    """Its own image size is another one. Squares of 384 pixels came from a teacher that had learned from 704."""
    facts = DataFacts(60, ("cell",), SizeChoice(240, 320, "kept"), SizeChoice(288, 288, "kept"))
    lines = expand_teacher_words(["data=coco", *words])
    options = plan_teacher(resolve(compose_without_run(lines), facts, lines)[0])
    assert options is not None
    overrides = teacher_overrides(options)
    data = resolve(compose_run(overrides, "teacher"), facts, overrides)[0].data
    assert (data.min_size, data.max_size) == sizes


def test_teachers_of_squares_and_of_other_images_are_two() -> None:
    folders = []
    for words in (CNN_FOR_DETR, (*CNN_FOR_DETR, "teacher.data.resize=ratio"), (*SHAPES, "teacher=frcnn_r18_mini")):
        options = plan_teacher(compose_without_run(expand_teacher_words(words)))
        assert options is not None
        folders.append(teacher_cache.teacher_run(options).folder)
    assert folders[0] != folders[1] == folders[2]


def test_another_option_replaces_all_keys_of_the_group() -> None:
    run = teacher_run(*SHAPES, "schedule.clip=3.0", "teacher.schedule=sgd_2x", "teacher.schedule.gamma=0.2")
    assert (run.schedule.epochs, run.schedule.clip, run.schedule.gamma) == (24, None, 0.2)


def test_another_data_set_by_its_folder(tmp_path: Path) -> None:
    write_coco(tmp_path)
    run = teacher_run(*SHAPES, "data.min_size=64", f"teacher.data={tmp_path}", "teacher.data.limit=2")
    assert run.data._target_ == "distill.DetectionData"
    assert run.data.source.root == str(tmp_path)
    assert (run.data.limit, run.data.min_size) != (2, 64)
    assert run.data.limit == 2


def test_values_of_all_kinds_arrive() -> None:
    run = teacher_run(*SHAPES, "teacher.data.limit=null", "teacher.data.min_size=[64,96]", "teacher.data.flip=0.0")
    assert (run.data.limit, list(run.data.min_size), run.data.flip) == (None, [64, 96], 0.0)


@pytest.mark.parametrize(
    ("word", "message"), [("teacher.schedule=sgd_3x", "sgd_2x"), ("teacher.data=cocoo", "teacher.data=cocoo")]
)
def test_an_option_that_does_not_exist(word: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        expand_teacher_words([word])


def test_a_sweep_of_a_key_stays_a_sweep() -> None:
    assert expand_teacher_words(["teacher.schedule.epochs=4,8", "seed=0,1"]) == [
        "++teacher.schedule.epochs=4,8",
        "seed=0,1",
    ]


@pytest.mark.parametrize(
    "words", [("teacher.schedule=sgd_1x",), ("schedule.optimizer.lr=0.003",), ("teacher.schedule.epochs=2",)]
)
def test_a_mapping_is_not_lost(words: tuple[str, ...]) -> None:
    assert teacher_run(*SHAPES, *words, "teacher.schedule.optimizer={lr: 0.05}").schedule.optimizer.lr == 0.05


@pytest.mark.parametrize("text", ["données/é", "a\\b", "it's, (1)"])
def test_texts_arrive_as_they_were_typed(text: str) -> None:
    word = f"teacher.data.source.root={quote_value(text)}"
    assert teacher_run("data=coco", "data.min_size=64", *FIXED, word).data.source.root == text


FIXED = ("data.max_size=64", "data.batch_size=2", "schedule=sgd_1x")


def test_renames_of_the_teachers_classes_stay_one_mapping() -> None:
    word = "teacher.data.source.rename={car: auto, my car: auto}"
    run = teacher_run("data=coco", "data.min_size=64", *FIXED, word)
    assert run.data.source.rename == {"car": "auto", "my car": "auto"}


def test_an_added_key() -> None:
    run = teacher_run(*SHAPES, "teacher.schedule=sgd", "+teacher.schedule.optimizer.nesterov=true")
    assert run.schedule.optimizer.nesterov is True


def test_a_key_with_a_spelling_mistake_is_named() -> None:
    with pytest.raises(DistillError, match=r"the teacher's run: .*epocs.*schedule\.epochs"):
        teacher_run(*SHAPES, "teacher.schedule.epocs=3")


def test_the_teacher_of_the_demo_learns_from_more_images() -> None:
    run = teacher_run("experiment=demo")
    assert (run.data.source.train, run.data.batch_size, run.schedule.epochs) == (1600, 8, 3)


def test_training_without_a_word_is_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(train.resume, "add_run_to_resume", lambda words: words)
    monkeypatch.setattr(train, "_run_once", lambda overrides: started.append(list(overrides)))
    assert train.main([]) == 0
    assert started == [["experiment=demo", "ckpt_path=unfinished"]]
    cfg = compose_without_run(started[0])
    assert (cfg.data.source.train, list(cfg.distill.losses), cfg.baseline) == (100, ["dsig"], "train")


def test_the_teacher_of_a_recipe_that_inherits_starts_from_scratch() -> None:
    """The student's neck and head start from the teacher's; its teacher has none to inherit from."""
    assert compose_without_run(["experiment=fgd_coco_retinanet_x101_r50"]).init == "inherit"
    assert teacher_run("experiment=fgd_coco_retinanet_x101_r50").init == "scratch"
