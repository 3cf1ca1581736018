"""Words of the command line that Hydra cannot read are named with their cure."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from distill.cli.config.overrides import configuration_name, parse_overrides, recorded_overrides
from distill.quoting import quote_value
from distill.run_folder import RunFolder
from distill.training.wandb_run import shorten
from distill.types import DistillError

PATHS = [
    "/data/a=b",
    "/data/it's",
    "/data/x (1)",
    "/data/{x",
    "/data/für später",
    "/data/数据",
    "/data/x#1&2",
    '/data/a"b',
    "~/x",
    "C:\\Bücher\\",
    '\\"(',
    "[",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_needs_quotes_is_named_with_them(path: str) -> None:
    """The message's word, as a shell passes it on, is the path."""
    with pytest.raises(DistillError) as caught:
        parse_overrides(["seed=1", f"data.source.root={path}", "model=frcnn_r50"])
    message = str(caught.value)
    assert f"cannot read the command line at data.source.root={path}: " in message
    (override,) = parse_overrides(shlex.split(message.rpartition("Hydra: ")[2]))
    assert (override.key_or_group, override.value()) == ("data.source.root", path)


@pytest.mark.parametrize("text", [*PATHS, "", "\\", "a\\'b", "a,b", " a "])
@pytest.mark.parametrize("mark", ["'", '"'])
def test_any_text_can_be_quoted(text: str, mark: str) -> None:
    (override,) = parse_overrides([f"key={quote_value(text, mark)}"])
    assert override.value() == text


def test_a_word_that_is_no_override_is_named() -> None:
    with pytest.raises(DistillError, match=r"cannot read the command line at \?\?: "):
        parse_overrides(["seed=1", "??"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "defaults"),
        (["seed=3", "trainer=gpu", "hydra.run.dir=x", "logger=wandb", "paths.outputs=y"], "defaults"),
        (["distill=defeat", "seed=3", "model=frcnn_r50"], "distill=defeat model=frcnn_r50"),
        (["~distill.losses.defeat", "+model.x=1", "data.limit=3"], "~distill.losses.defeat data.limit=3 +model.x=1"),
        (["schedule.epochs=3", "teacher.seed=1"], "teacher.seed=1 schedule.epochs=3"),
        (["trainer.max_steps=5", "trainer.devices=2", "distill=ssim"], "distill=ssim trainer.max_steps=5"),
    ],
)
def test_a_configuration_is_named_without_its_seed(words: list[str], name: str) -> None:
    assert configuration_name(words) == name


def test_a_long_name_that_is_cut_for_wandb_still_says_the_method() -> None:
    data = ["data=coco", f"data.source.root=/data/{'x' * 200}", "model=frcnn_r50"]
    names = [shorten(configuration_name([*data, f"distill={method}"])) for method in ("none", "dsig")]
    assert [name.partition(" ")[0] for name in names] == ["distill=none", "distill=dsig"]


@pytest.mark.parametrize(
    ("recorded", "losses", "expected"),
    [
        (["seed=1"], ["defeat"], ["distill=defeat", "seed=1"]),
        (["seed=1"], ["dsig"], ["seed=1"]),
        (["distill=[defeat,ssim]"], ["defeat", "ssim"], ["distill=[defeat,ssim]"]),
        (["experiment=bccd"], ["defeat"], ["experiment=bccd"]),
    ],
)
def test_a_run_of_the_former_default_method_keeps_it(
    recorded: list[str], losses: list[str], expected: list[str], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    run.overrides.write_text(json.dumps(recorded))
    config = {"data": {}, "schedule": {}, "distill": {"losses": {name: {"weight": 1.0} for name in losses}}}
    run.config.write_text(json.dumps(config))
    assert [override.input_line for override in recorded_overrides(tmp_path)] == expected
