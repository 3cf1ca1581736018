"""The student alone, to compare a distilled student with: ``baseline=train`` and ``baseline=RUN``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only

from distill.cli.config.instantiate import to_containers
from distill.cli.config.overrides import node_overrides, read_config
from distill.cli.runs.preflight import RunPlan, named_baseline
from distill.cli.runs.related_runs import RelatedRun, baseline_overrides, find_related_runs, fingerprint
from distill.cli.runs.results import is_measured_on, measured_by, read_summary
from distill.cli.runs.shared_run import SharedRun, compose_run, digest
from distill.cli.tables import print_line
from distill.data.datamodule import DetectionData
from distill.run_folder import RunFolder
from distill.types import DistillError

BASELINE = "baseline"
FOLDER = "baselines"
"""Folder of the baselines, below ``paths.outputs``."""


class Baseline(NamedTuple):
    """A run of the student alone, finished or planned."""

    run: SharedRun
    schedule: Mapping[str, Any]
    """The resolved node ``schedule`` of the run."""

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return int(self.schedule["epochs"])

    def result(self) -> RelatedRun:
        """The finished run. It is trained or resumed first if it is not finished.

        Raises:
            DistillError: the run failed.
        """
        self.run.train()
        return RelatedRun(self.run.folder, read_summary(str(self.run.folder)))


def plan_baseline(plan: RunPlan, data: DetectionData, splits: Sequence[str], processes: int) -> Baseline | None:
    """The baseline that ``baseline`` names; None without one, and in a run that trains the student alone itself.

    Args:
        plan: plan of the distilled run.
        data: its data, already read.
        splits: the splits on which the students are compared.
        processes: number of processes of the run.

    Raises:
        DistillError: the named run is not finished, or cannot be compared with this run.
    """
    if plan.baseline is None or not (plan.losses or plan.inherit):
        return None
    if plan.names_baseline:
        run = named_baseline(plan)
        _validate_run(run, plan, data, splits)
        return Baseline(SharedRun(BASELINE, run.path), read_config(run)["schedule"])
    lines = [*baseline_overrides(plan.overrides), "distill=none"]
    if compose_run(lines, BASELINE).init != "scratch":  # an experiment says so
        lines.append("init=scratch")
    lines += longer_overrides(plan.config, plan.baseline_epochs, lines)
    config = to_containers(compose_run(lines, BASELINE))
    recipe = fingerprint(config, data, processes)
    for related in find_related_runs(plan, recipe):
        if related.is_baseline and _is_comparable(related.summary, plan, data, splits):
            return Baseline(SharedRun(BASELINE, related.folder), config["schedule"])
    if plan.config["trainer"]["num_nodes"] > 1:
        raise DistillError(
            "baseline=train with trainer.num_nodes above 1: a baseline is trained on one machine. Train it by itself, "
            "with distill=none, and name it: baseline=RUN"
        )
    choices = HydraConfig.get().runtime.choices
    folder = Path(plan.config["paths"]["outputs"]).absolute() / FOLDER
    # A finished run with this recipe that was measured on other splits or images keeps its folder.
    measured = digest([recipe, measured_by(plan.config["metrics"], data, splits)])
    folder /= f"{choices['model']}-{choices['data']}-{measured[:10]}"
    return Baseline(SharedRun(BASELINE, folder, [*lines, "pictures=0", "cost=0"]), config["schedule"])


def longer_training(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The nodes ``schedule`` and ``data`` of a configuration for a training with so many times the epochs.

    The length, the milestones, the epochs between evaluations and the end of the augmentation change alike. The number
    of epochs is rounded first, and the others follow it: factors that give the same epochs give the same training.
    """
    schedule, data = dict(config["schedule"]), dict(config["data"])
    factor = _whole_factor(config, factor)
    if factor == 1:
        return {"schedule": schedule, "data": data}

    def scale(value: Any, least: int = 1) -> Any:
        return max(least, round(factor * value))

    for key in ("epochs", "evaluate_every"):
        schedule[key] = scale(schedule[key])
    schedule["steps"] = scale(schedule["steps"]) if schedule["steps"] > 0 else schedule["steps"]
    if schedule["shape"] == "step":
        schedule["milestones"] = [factor * epoch for epoch in schedule["milestones"]]
    stop = data["augment"]["stop_epoch"]
    data["augment"] = {**data["augment"], "stop_epoch": None if stop is None else scale(stop, 0)}
    return {"schedule": schedule, "data": data}


def _whole_factor(config: Mapping[str, Any], factor: float) -> float:
    """The factor that gives whole epochs, or whole steps where steps end the training."""
    steps = [config["schedule"]["steps"], config["trainer"]["max_steps"] or 0]
    length = next((number for number in steps if number > 0), config["schedule"]["epochs"])
    return float(max(1, round(factor * length)) / length)


def longer_overrides(config: Mapping[str, Any], factor: float, words: Sequence[str]) -> list[str]:
    """Overrides that turn the student alone of these words into that of a configuration, with so many times the epochs.

    Values that are ``auto`` after the words become those of the configuration: they would be chosen anew for another
    number of epochs.

    Args:
        config: the resolved configuration.
        factor: see `longer_training`.
        words: overrides of the student alone, with the seed of `config`.
    """
    composed, wanted = compose_run(words, BASELINE), longer_training(config, factor)
    factor = _whole_factor(config, factor)
    overrides = [word for node in ("data", "schedule") for word in node_overrides(node, wanted[node], composed)]
    steps, of_schedule = config["trainer"]["max_steps"], config["schedule"]["steps"]
    if steps is not None and steps > 0 and steps != of_schedule and factor != 1:
        overrides.append(f"trainer.max_steps={max(1, round(factor * steps))}")
    return overrides


def _validate_run(run: RunFolder, plan: RunPlan, data: DetectionData, splits: Sequence[str]) -> None:
    named, summary = f"baseline={plan.baseline}", read_summary(str(run.path))
    if not RelatedRun(run.path, summary).is_baseline:
        raise DistillError(f"{named}: expected a run of the student alone (distill=none), got a distilled student")
    if read_config(run).get("model") != plan.config["model"]:
        raise DistillError(f"{named}: the model of that run differs from this student: choose a run of the same model")
    if not _is_comparable(summary, plan, data, splits):
        raise DistillError(
            f"{named}: that run was measured on other images or with other metrics, so its AP cannot be compared. "
            "Choose a run with the same data and metrics, or baseline=train"
        )


def _is_comparable(summary: Mapping[str, Any], plan: RunPlan, data: DetectionData, splits: Sequence[str]) -> bool:
    return all(is_measured_on(summary, plan.config["metrics"], data, split) for split in splits)


@rank_zero_only
def announce_baseline(baseline: Baseline | None) -> None:
    """Print which run is the baseline, or that it is trained first."""
    if baseline is None:
        return
    if baseline.run.finished:
        print_line("baseline", f"the student alone, {baseline.epochs} epochs: {baseline.run.folder}")
    else:
        print_line(
            "baseline", f"none is cached: the student alone is trained before this run, {baseline.epochs} epochs"
        )
