"""Runs that differ from a run in the distillation only: the same student alone, or with another method."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from distill.cli.config import compose
from distill.cli.config.overrides import parse_overrides
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.resume import MAY_DIFFER
from distill.cli.runs.shared_run import digest
from distill.data.datamodule import DetectionData
from distill.files import read_json
from distill.run_folder import RunFolder
from distill.type_checks import leaves
from distill.types import DistillError

START_KEYS = ("model.weights", "model.backbone.weights")
"""Keys that may differ when a run resumes, but decide the result of a run that starts."""
UNRELATED = (
    *(key for key in MAY_DIFFER if key not in START_KEYS),
    *("distill.*", "teacher.*", "classes.*", "data.unlabeled.*"),
)
"""Keys that may differ between a run and its baseline."""
LEFT_OUT = (
    *("hydra", "distill", "teacher", "classes", "init", "ckpt_path", "resume", "name", "role", "sweep"),
    *("baseline", "baseline_epochs"),
)
"""Keys of a distillation's overrides that do not belong to its baseline."""
OWN_FOLDER = "paths.run"
"""Key of the run's folder. A baseline that kept it would be trained into the folder of the distilled run."""


class RelatedRun(NamedTuple):
    """A finished run and its summary."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def is_baseline(self) -> bool:
        """Whether the run trained its student alone."""
        return not self.summary["losses"] and self.summary["teacher"] is None


def fingerprint_recipe(plan: RunPlan, data: DetectionData, processes: int) -> str:
    """Hash of what determines a student's training except the distillation: configuration, data, processes."""
    return fingerprint(plan.config, data, processes)


def fingerprint(config: Mapping[str, Any], data: DetectionData, processes: int) -> str:
    """The hash of `fingerprint_recipe`, for the resolved configuration of any run."""
    settings = {key: value for key, value in leaves(config) if not any(fnmatchcase(key, free) for free in UNRELATED)}
    labeled = {name: facts for name, facts in data.state_dict().items() if name != "unlabeled"}
    content = {"settings": settings, "data": labeled, "processes": processes}
    return digest(content)


def find_related_runs(plan: RunPlan, recipe: str) -> list[RelatedRun]:
    """Finished runs with this recipe in the output folder, in its sweeps, and beside this run; the newest one first."""
    runs = []
    for folder in _run_folders(plan):
        run = RunFolder(folder)
        if run.finished and recipe in run.summary.read_text(encoding="utf-8", errors="replace"):
            try:
                summary = read_json(run.summary)
            except DistillError:  # a damaged summary is no run to compare with
                continue
            if summary.get("recipe") == recipe and isinstance(summary.get("losses"), list):
                runs.append((run.summary.stat().st_mtime, RelatedRun(folder, summary)))
    return [related for _, related in sorted(runs, key=lambda pair: pair[0], reverse=True)]


def _run_folders(plan: RunPlan) -> Iterator[Path]:
    outputs, this_run = Path(plan.config["paths"]["outputs"]).absolute(), plan.folder.path.absolute()
    folders = {*outputs.glob("*/*"), *outputs.glob("sweeps/*/*"), *this_run.parent.glob("*")}
    return (folder for folder in sorted(folders) if folder != this_run)


def baseline_command(plan: RunPlan) -> str:
    """The shell command that trains the same student alone."""
    words = baseline_overrides(plan.overrides)
    # Without the teacher, the student's own class would choose the shape of the images, and the side of squares.
    data = plan.config.get("data", {})
    own = compose.resize_of(plan.config.get("model", {}).get("_target_"), None)
    decided = ["resize"] if data.get("resize") not in (None, own) else []
    decided += ["min_size"] if data.get("resize") == "square" and "min_size" in data else []
    words += [f"data.{key}={data[key]}" for key in decided if not any(x.startswith(f"data.{key}=") for x in words)]
    return shlex.join(["python", "-m", "distill", "train", *words, "distill=none"])


def baseline_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides of a distilled run that its baseline keeps: all but its folder and those of the distillation."""
    return [
        str(override.input_line)
        for override in parse_overrides(overrides)
        if override.key_or_group != OWN_FOLDER and override.key_or_group.split(".")[0].split("@")[0] not in LEFT_OUT
    ]
