"""Words of other tools, and words with a spelling mistake: the message names what to type."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf

from distill.cli.config import compose, override_checks
from distill.cli.config.foreign_keys import SYNONYMS, VALUES, suggest_words, suggestion
from distill.cli.config.hydra_main import parse_words
from distill.cli.config.override_checks import validate_overrides
from distill.cli.config.value_checks import validate_values
from distill.type_checks import leaves
from distill.types import DistillError


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("epochs=3", "schedule.epochs=3"),
        ("lr=0.01", "schedule.optimizer.lr=0.01"),
        ("optimizer.lr=0.01", "schedule.optimizer.lr=0.01"),
        ("batch=4", "data.batch_size=4"),
        ("imgsz=640", "data.min_size=640 data.max_size=640"),
        ("device=cpu", "trainer.accelerator=cpu"),
        ("device=cuda:1", "trainer.accelerator=gpu 'trainer.devices=[1]'"),
        ("pretrained=true", "start=imagenet"),
        ("pretrained=a.pt", "model.weights=a.pt"),
        ("optimizer=AdamW", "schedule=adamw"),
        ("weights=a.pt", "model.weights=a.pt"),
        ("modle=frcnn_r50", "model=frcnn_r50"),
        ("distil=defeat", "distill=defeat"),
        ("epoch=3", "schedule.epochs=3"),
        ("data.root=x", "data.source.root=x"),
        ("schedule.lr=3", "schedule.optimizer.lr=3"),
        ("val_fracton=0.1", "data.val_fraction=0.1 or data.fraction=0.1"),
    ],
)
def test_the_words_to_type(word: str, advice: str) -> None:
    groups = {"model": ["frcnn_r50"], "distill": ["none", "defeat"], "schedule": ["adamw"], "data": ["coco"]}
    keys = [
        *("seed", "data.val_fraction", "data.source.root", "data.batch_size", "teacher.weights", "teacher.epochs"),
        *("schedule.epochs", "schedule.optimizer.lr", "trainer.accelerator"),
    ]
    said = suggestion(suggest_words(word, groups, keys))

    assert said == f"; did you mean {advice}?"


def test_every_synonym_composes() -> None:
    """A suggested key that does not exist would send the user round in a circle."""
    config = OmegaConf.to_container(compose.compose_config(["data=coco", "schedule=sgd"]))
    known = {*dict(leaves(config)), *compose.config_groups()}
    texts = [*SYNONYMS.values(), *(words for table in VALUES.values() for words in table.values())]
    for word in " ".join(texts).split():
        key, _, value = word.partition("=")
        assert key in known or key == "hydra.run.dir", word
        if key in compose.config_groups() and "{" not in value:
            assert value in compose.config_groups()[key], word


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--epochs", "3"], "schedule.epochs=3"),
        (["--batch-size=4"], "data.batch_size=4"),
        (["--data", "there"], "data=there"),
        (["--resume", "run"], "distill resume run"),
    ],
)
def test_flags_of_other_tools(words: list[str], advice: str) -> None:
    with pytest.raises(DistillError, match=rf"there is no flag {words[0]}.*did you mean {re.escape(advice)}\?"):
        parse_words(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill=none", "distill.losses.defeat.neck.foreground=1"], "has the loss 'defeat': choose distill=defeat"),
        (["distill=defeat+ssim"], "did you mean 'distill=[defeat,ssim]'?"),
        (["+epochs=3"], "'+epochs=3': there is no group or key 'epochs'; did you mean schedule.epochs=3?"),
    ],
)
def test_words_that_cannot_work(words: list[str], message: str) -> None:
    with pytest.raises(DistillError, match=re.escape(message)):
        validate_overrides(words)


def test_a_length_of_no_epochs() -> None:
    cfg = override_checks.compose_without_run(["distill=none", "schedule.epochs=0"])
    with pytest.raises(DistillError, match=r"^schedule\.epochs=0: expected a whole number from 1$"):
        validate_values(cfg)


def test_an_added_key_that_another_word_reads() -> None:
    words = ["distill=none", "+mine=7", "seed=${mine}"]
    assert override_checks.compose_without_run(words).seed == 7
