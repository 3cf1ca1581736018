"""Runs of version 0.1.0 can still be loaded, evaluated and taught from. Only resuming them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.cli.config.renamed_keys import translated
from distill.cli.runs.recorded_run import load_student
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.types import Batch, Target
from helpers.old_run_folders import OLD_RUNS, record, write_old_run
from helpers.runs import Cli


def batch() -> Batch:
    pixels = (torch.arange(3 * 64 * 96) * 37 % 251).to(torch.uint8).view(1, 3, 64, 96)
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return Batch(pixels, ((64, 96),), ((64, 96),), (nothing,), (0,))


@torch.no_grad()
def check_numbers(detector: Detector, expected: dict[str, Any]) -> None:
    """The detector computes what version 0.1.0 computed with these weights."""
    view = detector.eval().view(batch(), training=False, frozen=True)
    for stride, (mean, std) in expected["neck"].items():
        values = view.neck[int(stride)].double()
        assert float(values.std()) == pytest.approx(std, rel=1e-4)
        assert float(values.mean()) == pytest.approx(mean, rel=1e-4, abs=1e-4 * std)
    for stride, box in expected["anchors"].items():
        assert view.anchors[int(stride)].double().mean(0).tolist() == pytest.approx(box, abs=1e-3)
    for stride, size in expected["deltas"].items():
        assert float(view.deltas[int(stride)].double().abs().mean()) == pytest.approx(size, rel=1e-4)
    detections = view.detections[0]
    assert len(detections.boxes) == pytest.approx(expected["detections"], abs=2)  # at a threshold, rounding decides
    assert detections.scores[:5].tolist() == pytest.approx(expected["scores"], abs=1e-4)
    assert detections.boxes[0].tolist() == pytest.approx(expected["box"], abs=0.05)


@pytest.mark.parametrize("name", OLD_RUNS)
def test_an_old_detector_computes_the_old_numbers(name: str, tmp_path: Path) -> None:
    run = write_old_run(name, tmp_path)
    check_numbers(load_detector(run), record(name)["expected"])
    check_numbers(load_student(run / "checkpoints" / "last.ckpt"), record(name)["expected"])


@pytest.mark.parametrize("name", OLD_RUNS)
def test_evaluate_and_predict_work_on_an_old_run(name: str, cli: Cli, tmp_path: Path) -> None:
    run = write_old_run(name, tmp_path)
    if name == "distilled":
        write_old_run("faster_rcnn", tmp_path)
    evaluated = []
    for source in (run, run / "checkpoints" / "last.ckpt"):
        assert cli(["evaluate", str(source), "--json", "measured.json"]) == 0
        evaluated.append(json.loads(Path("measured.json").read_text()))
    assert evaluated[0] == evaluated[1]
    if name == "distilled":
        assert cli(["evaluate", str(run), "--teacher"]) == 0
    Image.new("RGB", (80, 60), (200, 30, 30)).save("image.png")
    assert cli(["predict", str(run), "image.png", "--out", "predictions"]) == 0
    assert Path("predictions/detections.json").is_file()


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_an_old_run_teaches_a_new_student(name: str, cli: Cli, tmp_path: Path) -> None:
    run = write_old_run(name, tmp_path)
    model = "frcnn_r10_mini" if name == "faster_rcnn" else "retinanet_r10_quarter"
    shape = [
        line for line in record(name)["overrides"] if line.startswith(("data.", "schedule.", "trainer.", "model.neck"))
    ]
    lines = [
        f"model={model}",
        "distill=mimic_neck",
        f"teacher.weights={run}",
        *shape,
        "pictures=0",
        "hydra.run.dir=new",
    ]
    assert cli(["train", *lines]) == 0


def test_resuming_an_old_run_is_refused(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_old_run("faster_rcnn", tmp_path)
    lines = [translated(line) for line in record("faster_rcnn")["overrides"]]
    for how in ("same", "anyway"):
        assert cli(["train", *lines, f"hydra.run.dir={run}", "ckpt_path=last", f"resume={how}"]) == 1
        assert (
            "was written by distill 0.1.0, which alone can resume that run: install distill 0.1.0"
            in capsys.readouterr().err
        )
