"""`data=PATH` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli.config import compose
from distill.cli.config.data_paths import expand_data_paths
from distill.types import DistillError
from helpers.image_folders import write_coco


def test_a_path_becomes_an_option_and_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Absolute, so that `evaluate` finds the data from another folder; a setting of the user's own stays."""
    write_coco(tmp_path / "it's = my data")
    monkeypatch.chdir(tmp_path)
    words = expand_data_paths(["seed=1", "data=it's = my data", "data.source.val.annotations=mine.json"])
    assert [word.partition("=")[0] for word in words] == [
        "seed",
        "data",
        "data.source.root",
        "data.source.train.annotations",
        "data.source.test.annotations",
        "data.source.val.annotations",
    ]
    cfg = compose.compose_config([*words, "paths.run=x"])
    assert cfg.data.source.root == str(tmp_path / "it's = my data")
    assert cfg.data.source.train.annotations == "annotations/instances_train2017.json"
    assert cfg.data.source.val.annotations == "mine.json"
    assert "data: it's = my data is COCO, train annotations/instances_train2017.json" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["data=shapes"], ["data=shapez"], ["data=coco,voc"], ["data=null"], ["data="], []])
def test_other_words_stay(words: list[str]) -> None:
    assert expand_data_paths(words) == words


def test_of_several_files_for_a_split_one_can_be_named(tmp_path: Path) -> None:
    """As the message says that asks for it."""
    write_coco(tmp_path / "set")
    val = tmp_path / "set" / "annotations" / "instances_val2017.json"
    val.with_name("instances_val_small.json").write_bytes(val.read_bytes())
    with pytest.raises(
        DistillError, match=r"data\.source\.val\.annotations=annotations/instances_val2017\.json"
    ) as caught:
        expand_data_paths([f"data={tmp_path / 'set'}"])
    named = str(caught.value).rpartition(": ")[2]
    words = expand_data_paths([f"data={tmp_path / 'set'}", named])
    assert "data.source.train.annotations='annotations/instances_train2017.json'" in words
    assert [word for word in words if word.startswith("data.source.val.")] == [named]
