"""Which baseline an analysis finds, and whether two runs were measured on the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.cli.config.override_checks import compose_without_run
from distill.cli.reports import analyzed_models
from distill.cli.reports.analyzed_models import Models, find_baseline, recorded_detections
from distill.cli.runs.preflight import plan_run
from distill.evaluation.metric import DetectionArrays
from distill.evaluation.recording import DetectionRecorder, Recording, save_recording
from distill.run_folder import RunFolder
from helpers.finished_runs import write_run
from helpers.runs import TINY_DATA


def test_the_baseline_that_the_run_names_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training was longer, so its recipe is another one. Without its files the advice remains."""
    monkeypatch.setattr(analyzed_models, "load_student", lambda folder: f"student of {folder.name}")
    plan = plan_run(compose_without_run([*TINY_DATA, f"paths.outputs={tmp_path}"]))
    alone = write_run(tmp_path / "baselines" / "longer", 0.2)
    summary = {"losses": ["defeat"], "recipe": "x", "baseline": {"source": str(alone), "values": {}}}
    models = Models()
    find_baseline(models, plan, summary)
    assert (models.detectors, models.sources) == ({"baseline": "student of longer"}, {"baseline": str(alone)})
    assert not models.notes
    (alone / "student.pt").unlink()
    models = Models()
    find_baseline(models, plan, summary)
    assert not models.detectors
    assert "distill=none" in models.notes[0]


def test_recorded_detections_are_used_for_the_same_data_only(tmp_path: Path) -> None:
    words = [*TINY_DATA, f"paths.outputs={tmp_path}"]
    data = plan_run(compose_without_run(words)).data
    folder = write_run(tmp_path / "run", 0.2, summary={"measured": {"data": {"val": data.fingerprint("val")}}})
    assert recorded_detections(str(folder), data, "val") is None
    truth = DetectionRecorder(data.ground_truth("val"), data.classes).truth
    one = np.zeros(1, dtype=np.int64)
    found = DetectionArrays(truth.images[:1], one + 1, np.ones((1, 4)), np.ones(1), np.full(1, None))
    file = save_recording(RunFolder(folder).detections_on("val"), Recording(tuple(data.classes), truth, found))
    for source in (folder, folder / "student.pt"):
        recording = recorded_detections(str(source), data, "val")
        assert recording is not None
        assert recording.detections.image.tolist() == found.image.tolist()
    assert recorded_detections(str(folder / "checkpoints" / "last.ckpt"), data, "val") is None
    larger = plan_run(compose_without_run([*words, "data.min_size=96", "data.max_size=96"])).data
    assert recorded_detections(str(folder), larger, "val") is None
    file.write_bytes(b"damaged")
    assert recorded_detections(str(folder), data, "val") is None
