"""Results that a run recorded in its summary, and the images and metrics by which they were measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from distill import __version__
from distill.files import read_json
from distill.run_folder import STUDENT, SUMMARY, RunFolder
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.data.datamodule import DetectionData


def measured_by(metrics: Mapping[str, Any], data: DetectionData, splits: Sequence[str]) -> dict[str, Any]:
    """Metrics and fingerprints of the splits behind a run's results. Kept in the run's summary."""
    return {"metrics": dict(metrics), "data": {split: data.fingerprint(split) for split in splits}}


def fingerprints(summary: Mapping[str, Any]) -> dict[str, str]:
    """Split -> fingerprint of the images and boxes on which a run was measured; empty where its summary has none."""
    measured = summary.get("measured")
    data = measured.get("data") if isinstance(measured, dict) else None
    return {str(split): str(value) for split, value in data.items()} if isinstance(data, dict) else {}


def is_measured_on(summary: Mapping[str, Any], metrics: Mapping[str, Any], data: DetectionData, split: str) -> bool:
    """Whether the results of a summary come from these metrics and from the images of this split."""
    if not fingerprints(summary).get(split) or summary["measured"].get("metrics") != json.loads(json.dumps(metrics)):
        return False
    with suppress(DistillError):  # the split cannot be read here
        return data.has_split(split) and data.fingerprint(split) == fingerprints(summary)[split]
    return False


def read_summary(source: str) -> dict[str, Any]:
    """The summary of the run that a teacher comes from, a folder or its exported student; empty if there is none.

    Raises:
        DistillError: the file does not hold a run's results.
    """
    path = Path(source)
    file = RunFolder(path.parent if path.stem == Path(STUDENT).stem else path).summary
    if not file.is_file():
        return {}
    summary = read_json(file)
    measured = summary["measured"] = summary.get("measured") or {"metrics": None, "data": {}}
    data = measured.get("data") if isinstance(measured, dict) else None
    if not isinstance(data, dict) or not isinstance(summary.get("student"), dict):
        raise DistillError(f"{file}: expected what the run measured under 'student' and 'measured'")
    return summary


def read_finished(run: RunFolder) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        DistillError: the run failed or has not finished, its student is gone, its summary is damaged, or a newer
            version of distill, whose numbers may have another meaning, wrote it.
    """
    if not run.summary.is_file():
        if run.error.is_file():
            reason = run.error.read_text(encoding="utf-8", errors="replace").strip()
            raise DistillError(f"{run.path}: failed: {reason}")
        command = shlex.join(["python", "-m", "distill", "resume", str(run.path)])
        advice = f"{command} continues it" if run.resumable else "start it again"
        raise DistillError(f"{run.path}: unfinished, it has no {SUMMARY}: {advice}")
    if not run.finished:
        raise DistillError(
            f"{run.path}: expected the run's student, but there is no {STUDENT}, or no description of it"
        )
    summary = read_json(run.summary)
    if not isinstance(summary.get("student"), dict):
        raise DistillError(
            f"{run.summary}: expected the run's results under 'student'. Evaluate or train the run again"
        )
    versions = summary.get("versions")
    written = versions.get("distill") if isinstance(versions, dict) else None
    with suppress(InvalidVersion):
        if written is not None and Version(str(written)) > Version(__version__):
            raise DistillError(
                f"{run.summary}: written by distill {written}, newer than the installed {__version__}. Install that "
                "version"
            )
    return summary
