"""Words on the command line that other projects' users typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli.config import override_checks
from distill.cli.config.value_checks import validate_values
from distill.cli.runs.sweep import count_jobs, refuse_repeated_keys
from distill.types import DistillError


def test_one_key_with_values_in_two_words() -> None:
    # hydra-ecosystem/hydra#3106
    with pytest.raises(DistillError, match="seed is given twice, as seed=0,1 and as seed=2,3: give all its values"):
        refuse_repeated_keys(["distill=none", "seed=0,1", "seed=2,3"])
    refuse_repeated_keys(["seed=0,1", "schedule.epochs=1,2", "teacher.seed=1"])


def test_a_key_of_one_option_of_a_swept_group() -> None:
    # hydra-ecosystem/hydra#283, hydra-ecosystem/hydra#2888
    words = ["distill=none,defeat", "distill.losses.defeat.neck.foreground=1,4", "seed=range(3)"]
    cfg, forced = override_checks.validate_overrides(words)
    assert "++distill.losses.defeat.neck.foreground=1,4" in forced
    assert count_jobs(words, cfg) == 2 * 2 * 3


def test_the_index_of_a_gpu_in_the_accelerator() -> None:
    cfg = override_checks.compose_without_run(["distill=none", "trainer.accelerator=cuda:1"])
    with pytest.raises(DistillError, match=r"trainer\.accelerator=cuda:1: expected .*trainer\.devices=\[1\]"):
        validate_values(cfg)


def test_listed_voc_images_with_spaces_and_no_xml(tmp_path: Path) -> None:
    # bubbliiiing/faster-rcnn-pytorch#145, facebookresearch/detectron2#2476
    from distill.data.voc import Voc

    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("ali (1)\nali (2) -1\nb\n")
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation><filename>b.jpg</filename></annotation>")
    (tmp_path / "JPEGImages" / "b.jpg").touch()
    _, records = Voc(root=str(tmp_path), train="train", val="train", classes=["a"]).read_split("train")
    faulty = [Path(record.faults[0].partition(":")[0]).name for record in records if record.faults]
    assert faulty[:2] == ["ali (1).xml", "ali (2).xml"]
