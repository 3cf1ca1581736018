"""The import of a detector of another project: a whole folder or none, with a report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.commands.import_detector import read_names
from distill.detectors import imported
from distill.detectors.registry import load_detector
from distill.detectors.student_files import read_extra
from distill.detectors.weights import load_weights
from distill.types import DistillError
from helpers.foreign_files import detectron2_state, mmdetection_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "retina.pth"
    torch.save({"model": {**detectron2_state("retinanet"), "pixel_mean": torch.zeros(3, 1, 1)}}, path)
    return path


def test_the_folder_takes_the_place_of_a_run(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "retina"
    report = imported.import_detector(checkpoint, out, classes=["a", "b", "c"])
    assert sorted(path.name for path in out.iterdir()) == [
        "import.json",
        "overrides.yaml",
        "student.json",
        "student.pt",
    ]
    assert json.loads((out / "import.json").read_text()) == report
    assert (len(report["used"]), report["unused"], report["missing"]) == (136, ["pixel_mean"], [])
    assert report["used"]["backbone.top_block.p6.weight"] == "backbone.fpn.extra_blocks.p6.weight"
    assert report["options"]["p6_from"] == {"value": "c5", "from": "shapes"}
    assert len(report["warnings"]) == 3
    assert read_extra(out)["resize"] == {"antialias": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the folder describes itself
        folder = load_detector(out)
    with pytest.warns(UserWarning, match="read as a retinanet of Detectron2"):
        file = load_detector(checkpoint)
    assert folder.resize == file.resize
    assert folder.classes == ("a", "b", "c")
    assert all(torch.equal(own, other) for own, other in zip(folder.parameters(), file.parameters(), strict=True))
    with pytest.raises(DistillError, match="exists already"):
        imported.import_detector(checkpoint, out)


def test_a_failure_leaves_nothing_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(imported, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        imported.import_detector(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(DistillError, match="cannot be written"):
        imported.import_detector(checkpoint, tmp_path / "file" / "out")


def test_an_unknown_layout_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"encoder.weight": torch.ones(1)}}, path)
    with pytest.raises(DistillError, match="expected a checkpoint of Detectron2"):
        imported.import_detector(path, tmp_path / "out")
    with pytest.raises(DistillError, match="neither a file"):
        imported.import_detector(tmp_path / "none.pth", tmp_path / "out")


def test_the_configuration_beside_the_file_is_used(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.name
    path.hardlink_to(checkpoint)
    (tmp_path / "config.yaml").write_text("MODEL:\n  PIXEL_STD: [57.375, 57.12, 58.395]\n")
    report = imported.import_detector(path, tmp_path / "out")
    assert report["options"]["pixels.std"]["value"] == pytest.approx([0.225, 0.224, 0.229])
    other = tmp_path / "other.yaml"
    other.write_text("MODEL: [not, a, mapping]")
    with pytest.raises(DistillError, match="with the key MODEL"):
        imported.import_detector(path, tmp_path / "out2", config=other)


def test_weights_of_a_student_must_have_its_options(tmp_path: Path) -> None:
    from distill.detectors.retinanet import RetinaNet

    path = tmp_path / "m.pth"
    torch.save({"state_dict": mmdetection_state("retinanet")}, path)
    student = RetinaNet(["class_1", "class_2", "class_3"], backbone={"depth": 18}, neck_channels=64, p6_from="c5")
    with (
        pytest.warns(UserWarning, match="read as"),
        pytest.raises(DistillError, match=r"made for .*anchors\.rounded=False \(here True\)"),
    ):
        load_weights(student, path)


def test_names_come_from_words_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\n\n b c \n")
    assert read_names(str(tmp_path / "names.txt")) == ["a", "b c"]
    assert read_names("a, b") == ["a", "b"]
    with pytest.raises(DistillError, match="expected names"):
        read_names(",")
