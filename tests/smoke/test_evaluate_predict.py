"""The verbs evaluate and predict, on what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.cli.main import main
from distill.data.shapes import CLASSES
from distill.detectors.base import Detector
from distill.types import Batch, View
from helpers.image_folders import drawn, write_voc
from helpers.runs import TINY, Cli, summary


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, which tests only read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    lines = [f"teacher.weights={tiny_teacher}", *TINY, "data.source.test=4", f"hydra.run.dir={folder}"]
    assert main(["train", *lines]) == 0
    return folder


def test_evaluate_gives_the_numbers_of_the_run(run: Path, cli: Cli) -> None:
    before = summary(run)
    for source, split in (
        (run, "val"),
        (run / "checkpoints" / "best.ckpt", "val"),
        (run, "test"),
        (run / "student.pt", "val"),
    ):
        assert cli(["evaluate", str(source), "--split", split, "--json", "found.json"]) == 0
        found = json.loads(Path("found.json").read_text())
        expected = {name.split("/", 1)[1]: value for name, value in before["student"].items() if name.startswith(split)}
        assert found == expected
    assert cli(["evaluate", str(run), "--teacher", "--json", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    values = before["teacher"]["values"]
    assert {f"val/{name}": value for name, value in found.items()} == {
        name: value for name, value in values.items() if name.startswith("val/")
    }
    assert {name.split("/")[0] for name in values} == {"val", "test"}


def test_evaluate_on_another_data_set_and_per_class(run: Path, cli: Cli, tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": ("train", 4), "val": ("val", 4)})
    other = ["data=voc", "data.source.root=voc", "metrics.coco.per_class=true"]
    sizes = ["data.min_size=64", "data.max_size=64"]
    assert cli(["evaluate", str(run), "--json", "found.json", *other, *sizes]) == 0
    found = json.loads(Path("found.json").read_text())
    assert {f"AP/{name}" for name in CLASSES} <= set(found)
    # without sizes the images are resized as in training, not as data=voc would have it
    assert cli(["evaluate", str(run), "--json", "as_trained.json", *other]) == 0
    assert json.loads(Path("as_trained.json").read_text()) == found
    write_voc(tmp_path / "only", {"val": ("val", 4)})  # without a train split
    assert cli(["evaluate", str(run), "--json", "only.json", *other, "data.source.root=only"]) == 0
    assert json.loads(Path("only.json").read_text())["AP"] == found["AP"]


def test_evaluate_refuses_what_is_no_run(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["evaluate", str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist: expected the folder of a run" in capsys.readouterr().err
    assert cli(["evaluate", str(tmp_path)]) == 1
    assert "is not a run" in capsys.readouterr().err


def test_predict_writes_pictures_and_coco_json(run: Path, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for record, picture in drawn("val", 3)[1]:
        picture.resize((100, 80)).save(folder / f"{record.id}.PNG")
    assert cli(["predict", str(run), str(folder), "--out", "found"]) == 0
    results = json.loads(Path("found/detections.json").read_text())
    for result in results:
        x, y, width, height = result["bbox"]
        assert -1e-3 <= x <= x + width <= 100 + 1e-3
        assert -1e-3 <= y <= y + height <= 80 + 1e-3
        assert 1 <= result["category_id"] <= len(CLASSES)
        assert 0 <= result["score"] <= 1
    assert {result["image_id"] for result in results} <= {0, 1, 2}
    pictures = sorted(Path("found").glob("*.png"))
    assert len(pictures) == 3
    assert Image.open(pictures[0]).size[0] >= 100


def test_predict_names_what_is_missing(run: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["predict", str(run), "nowhere.jpg"]) == 1
    assert "nowhere.jpg does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["data.antialias=true", "data.pad_to=48"]])
def test_predict_makes_images_ready_as_evaluation_did(
    options: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 128 px goes in at 64: the pixels that the student sees are those that it was evaluated on."""
    seen: list[Batch] = []
    view = Detector.view

    def look(self: Detector, batch: Batch, **settings: Any) -> View:
        if not settings.get("training", True):
            seen.append(batch)
        return view(self, batch, **settings)

    write_voc(tmp_path / "voc", {"train": ("train", 4), "val": ("val", 1)})
    file = next((tmp_path / "voc" / "JPEGImages").glob("*_val_*"))
    Image.effect_noise((150, 128), 90).convert("RGB").save(file)
    xml = tmp_path / "voc" / "Annotations" / f"{file.stem}.xml"
    xml.write_text(xml.read_text().replace("<width>64", "<width>150").replace("<height>64", "<height>128"))
    monkeypatch.setattr(Detector, "view", look)
    shapes = [line for line in TINY if not line.startswith(("data.source", "data.max_size"))]
    lines = ["data=voc", "data.source.root=voc", "distill=none", *shapes, *options, "hydra.run.dir=run", "pictures=0"]
    assert cli(["train", *lines]) == 0
    evaluated = seen[-1]
    assert cli(["predict", "run", str(file), "--out", "found"]) == 0
    assert seen[-1] is not evaluated
    assert torch.equal(seen[-1].images, evaluated.images)
