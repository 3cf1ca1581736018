"""Comparison of finished runs: configurations over seeds, and their differences to the student alone.

A configuration is compared with its reference: the student alone (``distill=none``) with the same student, data and
schedule. Differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from distill.analysis import statistics
from distill.analysis.configurations import (
    Configuration,
    FinishedRun,
    differing_settings,
    find_references,
    group_runs,
    keep_comparable,
    mean_of,
    measured,
    name_configurations,
)
from distill.analysis.image_bootstrap import bootstrap_ap, difference_interval
from distill.analysis.statistics import Interval
from distill.evaluation.metric import FloatArray
from distill.evaluation.recording import load_recording
from distill.types import DistillError

BETTER_TEACHER = (
    "Train the teacher longer (teacher.schedule.epochs=…) or on more data (teacher.data=…), or choose a larger one "
    "(teacher=…)"
)
"""Advice for a teacher that is not better than the student alone."""
SAME_AP = 1e-6
"""Largest difference between AP of the recorded detections and AP in the summary."""


@dataclass(frozen=True)
class Difference:
    """The difference of a configuration to its reference in the main metric."""

    reference: str
    seeds: Sequence[int]
    """Seeds that both have."""
    mean: float
    by_seed: Interval | None
    """The interval over seeds; None for a single seed."""
    by_image: Interval | None
    """The interval over images of the first of the seeds; None if detections are missing."""
    gap_closed: float | None
    """Share of the gap between the reference and the teacher."""
    extra_time: float | None
    """Duration of the runs divided by that of the reference, minus 1."""
    verdict: str
    further_seeds: int | None
    """Further seeds that would decide it; None if it is decided or no number can be given."""
    equal_length: bool = True
    """Whether both were trained for the same number of epochs and steps."""


@dataclass(frozen=True)
class Row:
    """A teacher or a configuration in the table. Metrics are from 0 to 1."""

    configuration: str
    role: str
    """``teacher``, ``student alone`` or ``distilled``."""
    seeds: Sequence[int]
    values: Mapping[str, float]
    """Means over the seeds by name of the metric, such as ``test/AP``."""
    deviation: float | None
    """Sample standard deviation of the main metric over the seeds."""
    seconds: float | None
    """Mean duration of a run's training with its evaluations."""
    seconds_per_step: float | None
    difference: Difference | None = None
    group: str = ""
    """Full name of the configuration, the W&B group of its runs. `configuration` is short: it names what differs."""


@dataclass
class Comparison:
    """The answer of a comparison."""

    split: str
    metric: str
    """The main metric, such as ``test/AP``."""
    equal: str
    rows: list[Row]
    left_out: list[tuple[Path, str]]
    notes: list[str]
    settings: dict[str, dict[str, str]]
    """Key that differs between configurations -> configuration -> value as JSON; a missing key has no entry."""
    runs: list[dict[str, Any]]


def compare(
    runs: Sequence[FinishedRun],
    left_out: Sequence[tuple[Path, str]] = (),
    free: Sequence[str] = (),
    equal: str = "epochs",
    labels: Mapping[frozenset[str], str] | None = None,
    images: bool = True,
) -> Comparison:
    """Compare finished runs.

    Args:
        runs: the runs. The first one decides about data, classes and split; those that differ are left out.
        left_out: further folders that are left out, with the reason.
        free: patterns of keys that do not change a result.
        equal: what is equal between a configuration and its reference: ``epochs``, or ``time``: the student alone with
            any number of epochs whose runs took the nearest time.
        labels: names of configurations by their overrides.
        images: whether to compute intervals over images, which takes about 30 s per configuration on COCO's val2017.

    Raises:
        DistillError: no run is left.
    """
    split = "test" if runs and any(name.startswith("test/") for name in runs[0].values) else "val"
    kept, refused = keep_comparable(runs, split)
    configurations, repeated = group_runs(kept, free)
    out = [*left_out, *refused, *repeated]
    if not configurations:
        reasons = "".join(f"\n  {folder}: {reason}" for folder, reason in out)
        raise DistillError(f"Expected at least one finished run to compare, got none.{reasons}")
    name_configurations(configurations, labels or {}, free)
    references = find_references(configurations, equal)
    metrics = [name for name in measured(split) if name in kept[0].values]
    bootstrap = ImageBootstrap(split, metrics[0]) if images else None
    rows = teacher_rows(configurations, metrics)
    for configuration, reference in zip(configurations, references, strict=True):
        difference = difference_to(configuration, reference, metrics[0], bootstrap) if reference else None
        rows.append(configuration_row(configuration, metrics, difference))
    return Comparison(
        split=split,
        metric=metrics[0],
        equal=equal,
        rows=rows,
        left_out=out,
        notes=[
            *pairing_notes(configurations, references),
            *regime_notes(configurations, references, metrics[0]),
            *(bootstrap.notes if bootstrap else ()),
        ],
        settings=differing_settings(configurations),
        runs=[
            _run_entry(configuration, run) for configuration in configurations for run in configuration.runs.values()
        ],
    )


# -- differences


def difference_to(
    configuration: Configuration, reference: Configuration, metric: str, bootstrap: ImageBootstrap | None = None
) -> Difference | None:
    """The difference of a configuration to its reference, paired by seed; None without a common seed."""
    seeds = [seed for seed in configuration.runs if seed in reference.runs]
    if not seeds:
        return None
    values, reference_values = (
        [other.runs[seed].values[metric] for seed in seeds] for other in (configuration, reference)
    )
    differences = [value - base for value, base in zip(values, reference_values, strict=True)]
    interval = statistics.mean_interval(differences)
    verdict = statistics.verdict(interval)
    teacher = (configuration.first.teacher or {}).get("values", {}).get(metric, -1.0)
    time, reference_time = configuration.mean_seconds(), reference.mean_seconds()
    return Difference(
        reference=reference.name,
        seeds=seeds,
        mean=fmean(differences),
        by_seed=interval,
        by_image=bootstrap.interval(configuration.runs[seeds[0]], reference.runs[seeds[0]]) if bootstrap else None,
        gap_closed=statistics.share_of_gap(fmean(reference_values), fmean(values), teacher),
        extra_time=time / reference_time - 1 if time and reference_time else None,
        verdict=verdict,
        further_seeds=statistics.seeds_to_decide(differences) or None,
        equal_length=configuration.epochs_and_steps() == reference.epochs_and_steps(),
    )


class ImageBootstrap:
    """Intervals over images of pairs of runs. The matches of a run are computed once.

    Args:
        split: the split.
        metric: the main metric; only COCO's AP has an interval.
    """

    def __init__(self, split: str, metric: str) -> None:
        self.split, self.metric = split, metric
        self._known: dict[Path, FloatArray | None] = {}
        self._missing: dict[str, list[str]] = {}
        """Reason -> runs."""

    @property
    def notes(self) -> list[str]:
        """Why intervals are missing."""
        if not self.metric.endswith("/AP"):
            return [f"no interval over images: it exists for COCO's AP only, not for {self.metric}"]
        return [f"no interval over images for {', '.join(runs)}: {reason}" for reason, runs in self._missing.items()]

    def interval(self, run: FinishedRun, reference: FinishedRun) -> Interval | None:
        """The interval of the difference of two runs; None if it cannot be computed."""
        if not self.metric.endswith("/AP"):
            return None
        values = [self._values(member) for member in (run, reference)]
        return None if values[0] is None or values[1] is None else difference_interval(values[0], values[1])

    def _values(self, run: FinishedRun) -> FloatArray | None:
        if run.folder not in self._known:
            try:
                self._known[run.folder] = self._compute(run)
            except DistillError as error:
                self._known[run.folder] = None
                self._missing.setdefault(str(error), []).append(str(run.folder))
        return self._known[run.folder]

    def _compute(self, run: FinishedRun) -> FloatArray:
        if self.split not in run.detections:
            raise DistillError(f"no detections on {self.split}, an older version made it")
        values = bootstrap_ap(load_recording(run.detections[self.split]))
        if abs(values[0] - run.values[self.metric]) > SAME_AP:
            raise DistillError(
                f"its detections have AP {values[0]:.4f}, its summary says {run.values[self.metric]:.4f}: one of the "
                "files belongs to another run"
            )
        return values


# -- rows


def teacher_rows(configurations: Sequence[Configuration], metrics: Sequence[str]) -> list[Row]:
    """A row for each teacher."""
    teachers = {
        str(run.teacher["source"]): run.teacher
        for configuration in configurations
        for run in configuration.runs.values()
        if run.teacher and run.teacher.get("source")
    }
    rows = []
    for source, teacher in teachers.items():
        known = teacher.get("values") or {}
        values = {name: known[name] for name in metrics if known.get(name, -1.0) >= 0}
        name = "teacher" if len(teachers) == 1 else f"teacher {source}"
        rows.append(Row(name, "teacher", (), values, None, teacher.get("seconds"), None))
    return rows


def configuration_row(configuration: Configuration, metrics: Sequence[str], difference: Difference | None) -> Row:
    """The row of a configuration."""
    runs = list(configuration.runs.values())
    by_name = {name: [run.values[name] for run in runs if run.values.get(name, -1.0) >= 0] for name in metrics}
    main = by_name[metrics[0]]
    return Row(
        configuration=configuration.name,
        role="student alone" if configuration.is_alone else "distilled",
        seeds=list(configuration.runs),
        values={name: fmean(values) for name, values in by_name.items() if values},
        deviation=stdev(main) if len(main) > 1 else None,
        seconds=configuration.mean_seconds(),
        seconds_per_step=mean_of([run.seconds_per_step for run in runs]),
        difference=difference,
        group=configuration.first.group,
    )


def pairing_notes(configurations: Sequence[Configuration], references: Sequence[Configuration | None]) -> list[str]:
    """Sentences that say why there is no difference: one configuration only, or no common seed."""
    if len(configurations) == 1:
        return [
            f"{configurations[0].name} is the only configuration, so there is no difference to show. Add runs of the "
            "student alone (distill=none) or of another method"
        ]
    return [
        f"{configuration.name} and {reference.name} have no seed in common, so there is no difference to show"
        for configuration, reference in zip(configurations, references, strict=True)
        if reference is not None and not set(configuration.runs) & set(reference.runs)
    ]


def regime_notes(
    configurations: Sequence[Configuration], references: Sequence[Configuration | None], metric: str
) -> list[str]:
    """Sentences that say whether the teacher knows more than the student alone, one for each pair of both."""
    notes = {}
    for configuration, reference in zip(configurations, references, strict=True):
        if reference is None or not reference.is_alone or configuration.first.teacher is None:
            continue
        teacher = (configuration.first.teacher.get("values") or {}).get(metric)
        alone = fmean([run.values[metric] for run in reference.runs.values()])
        if teacher is not None:
            notes[f"{configuration.first.teacher.get('source')} {reference.name}"] = describe_regime(
                teacher, alone, reference.name
            )
    return list(notes.values())


def describe_regime(teacher: float, alone: float, name: str) -> str:
    """Say whether distillation can help: a teacher that is not better than the student alone has nothing to teach.

    Args:
        teacher, alone: AP of both from 0 to 1.
        name: of the student alone.
    """
    values = f"the teacher has {100 * teacher:.1f}, the student alone ({name}) {100 * alone:.1f}"
    if teacher > alone:
        return f"{values}: a gap of {100 * (teacher - alone):.1f} that distillation may close"
    return (
        f"{values}: a teacher that is not better than the student alone has nothing to teach. A gain of a method has "
        f"another cause here, such as its longer training time. {BETTER_TEACHER}"
    )


# -- output


def _run_entry(configuration: Configuration, run: FinishedRun) -> dict[str, Any]:
    return {
        "configuration": configuration.name,
        "folder": str(run.folder),
        "seed": run.seed,
        "seconds": run.seconds,
        "seconds_per_step": run.seconds_per_step,
        **dict(run.values),
    }


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison in plain containers."""
    content = asdict(comparison)
    content["left_out"] = [{"folder": str(folder), "reason": reason} for folder, reason in comparison.left_out]
    for entry, row in zip(content["rows"], comparison.rows, strict=True):
        if row.difference is not None:
            for name in ("by_seed", "by_image"):
                interval = getattr(row.difference, name)
                entry["difference"][name] = interval._asdict() if interval else None
    return content


def to_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of the CSV file. Metrics and differences are from 0 to 1."""
    return [_flat(row, comparison.metric) for row in comparison.rows]


def _flat(row: Row, metric: str) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "configuration": row.configuration,
        "group": row.group,
        "role": row.role,
        "seeds": " ".join(map(str, row.seeds)),
        **dict(row.values),
        f"{metric}_deviation": row.deviation,
        "seconds": row.seconds,
        "seconds_per_step": row.seconds_per_step,
    }
    if (difference := row.difference) is not None:
        flat |= {
            "reference": difference.reference,
            "difference": difference.mean,
            "paired_seeds": " ".join(map(str, difference.seeds)),
            "seeds_low": difference.by_seed.low if difference.by_seed else None,
            "seeds_high": difference.by_seed.high if difference.by_seed else None,
            "images_low": difference.by_image.low if difference.by_image else None,
            "images_high": difference.by_image.high if difference.by_image else None,
            "gap_closed": difference.gap_closed,
            "extra_time": difference.extra_time,
            "verdict": difference.verdict,
            "further_seeds": difference.further_seeds,
        }
    return flat
