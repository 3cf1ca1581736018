"""The command label: the file that it writes is a data set, and bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from distill.cli.commands import label
from distill.data.coco import Coco
from distill.detectors.student_files import save_student
from distill.types import DistillError
from helpers.training import small_detector


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_student(small_detector(), folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg"):
        Image.new("RGB", (80, 64), (90, 120, 30)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_its_file_is_a_data_set(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "labels.json"
    assert label.main([str(run), str(images), "--out", str(out), "--score", "0.1", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "in 2 images" in printed.out
    assert "1 of 3 images could not be read" in printed.out
    assert "left out: " in printed.err
    classes, records = Coco(str(images), train={"annotations": str(out), "images": None}).read_split("train")
    assert [Path(record.file).relative_to(images).as_posix() for record in records] == ["a.png", "sub/b.jpg"]
    assert len(classes) == 6
    assert sum(len(record.boxes) for record in records) == len(json.loads(out.read_text())["annotations"]) > 0


def test_bad_input_is_refused(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "annotations.json"
    other.write_text('{"images": []}')
    out = str(tmp_path / "labels.json")
    for words, message in (
        ([images / "a.png", "--out", out], "is a file: expected a folder of images"),
        ([tmp_path / "nowhere", "--out", out], "does not exist: expected a folder"),
        ([tmp_path / "empty", "--out", out], "no image"),
        ([images, "--out", images], "is a folder: expected the name of a file"),
        ([images, "--out", other], "is no file of 'distill label'"),
        ([images, "--out", out, "--score", "2"], "--score 2: expected a score from 0 to 1"),
        ([images, "--out", "/proc/labels.json"], "cannot be written"),
    ):
        with pytest.raises(DistillError, match=message):
            label.main([str(run), *map(str, words), "--device", "cpu"])
    with pytest.raises(DistillError, match="neither a file, nor a run's folder"):
        label.main([str(tmp_path / "none"), str(images), "--out", out])
    assert other.read_text() == '{"images": []}'
    assert not Path(out).exists()
