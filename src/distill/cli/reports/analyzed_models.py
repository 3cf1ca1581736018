"""The models that analyze looks at: a finished run's student, its teacher, and a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cli.config.overrides import parse_overrides
from distill.cli.runs.recorded_run import load_student, load_teacher_of
from distill.cli.runs.results import fingerprints
from distill.cli.runs.teacher_cache import bridge_teacher
from distill.evaluation.recording import DetectionRecorder, Recording, load_recording
from distill.files import read_json
from distill.run_folder import STUDENT, RunFolder
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.cli.runs.preflight import RunPlan
    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector


@dataclass
class Models:
    """The detectors of an analysis by name, best informed first: teacher, baseline, student."""

    detectors: dict[str, Detector] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Name -> where the weights come from."""
    notes: list[str] = field(default_factory=list)
    """Sentences about models that are left out."""

    def add(self, name: str, detector: Detector, source: object) -> None:
        """Add a detector."""
        self.detectors[name], self.sources[name] = detector, str(source)


def recorded_detections(source: str, data: DetectionData, split: str) -> Recording | None:
    """The detections that a finished run recorded of its student on a split; None if it was measured on other data.

    Args:
        source: the run's folder or its exported student. Other weights have no recorded detections.
        data: the data that is analyzed now.
        split: the split.
    """
    path = Path(source)
    run = RunFolder(path.parent if path.name == STUDENT else path)
    file = run.detections_on(split)
    if not (file.is_file() and run.finished):
        return None
    with suppress(DistillError):  # a damaged file: the detections are computed
        if fingerprints(read_json(run.summary)).get(split) == data.fingerprint(split):
            recording = load_recording(file)
            truth = DetectionRecorder(data.ground_truth(split), data.classes).truth
            now = Recording(tuple(data.classes), truth, recording.detections)
            return recording if recording.truth_digest() == now.truth_digest() else None
    return None


def add_teacher(
    models: Models, run: RunFolder, plan: RunPlan, summary: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Add the run's teacher, if it has one. A teacher that is gone is left out, with a note."""
    given = any(word.key_or_group == "teacher.weights" for word in parse_overrides(overrides))
    if not summary.get("teacher") and not given:
        models.notes.append("the run has no teacher (distill=none): comparisons with a teacher are left out")
        return
    try:
        teacher = load_teacher_of(run, plan.teacher, plan.data.classes if given else None)
        bridge_teacher(plan.teacher, teacher, plan.data.classes)
    except DistillError as error:
        models.notes.append(f"the teacher is left out: {error}")
        return
    identity = summary.get("teacher")
    named = identity.get("source") if isinstance(identity, dict) else None
    models.add("teacher", teacher, plan.teacher.weights if given and plan.teacher else named)


def add_other(
    models: Models,
    run: RunFolder,
    against: RunFolder,
    summary: Mapping[str, Any],
    student: Detector,
    split: str,
    fingerprint: str | None,
) -> None:
    """Add the student of the run that the user named.

    Raises:
        DistillError: it is the same run, or was trained or measured on other classes or other data.
    """
    if against.path.resolve() == run.path.resolve():
        raise DistillError(f"--against {against.path}: this is the analyzed run itself. Name another run")
    detector = load_student(against.path)
    if set(detector.spec.classes) != set(student.spec.classes):
        raise DistillError(
            f"--against {against.path}: its classes are {', '.join(detector.spec.classes)}, those of {run.path} are "
            f"{', '.join(student.spec.classes)}. Name a run of the same classes"
        )
    if fingerprint is not None and fingerprints(summary).get(split, fingerprint) != fingerprint:
        raise DistillError(
            f"--against {against.path}: it was measured on another {split} split, or at another image size, than "
            f"{run.path}. Name a run of the same data, or data=… to analyze both on one data set"
        )
    name = "baseline" if summary.get("losses") == [] and not summary.get("teacher") else "other"
    models.add(name, detector, against.path)


def find_baseline(models: Models, plan: RunPlan, summary: Mapping[str, Any]) -> None:
    """Add the student alone that the run was compared with, else the newest finished run of the same student alone."""
    from distill.cli.runs.related_runs import baseline_command, find_related_runs

    if not summary.get("losses"):
        return
    source = (summary.get("baseline") or {}).get("source")
    if source is not None and RunFolder(source).finished:
        models.add("baseline", load_student(Path(source)), source)
        return
    recipe = summary.get("recipe")
    related = find_related_runs(plan, recipe) if isinstance(recipe, str) else []
    baseline = next((run for run in related if run.is_baseline), None)
    if baseline is None:
        command = baseline_command(plan)
        models.notes.append(f"no run of the same student alone was found. This command makes one:\n{command}")
        return
    models.add("baseline", load_student(baseline.folder), baseline.folder)
