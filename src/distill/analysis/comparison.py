"""Comparison of finished runs: configurations over seeds, and their differences to the student alone.

Runs that differ by their seed only are one configuration. A configuration is compared with its reference: the student
alone (``distill=none``) with the same student, data and schedule. Differences are paired by seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from distill.analysis import statistics
from distill.analysis.image_bootstrap import bootstrap_ap, difference_interval
from distill.analysis.statistics import Interval
from distill.evaluation.metric import FloatArray
from distill.evaluation.recording import load_recording
from distill.type_checks import leaves
from distill.types import DistillError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP")
"""Metrics of a comparison, in the order of its columns. The first one that was measured is the main metric."""
LENGTH_KEYS = (
    *("schedule.epochs", "schedule.steps", "schedule.milestones", "schedule.evaluate_every"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.check_val_every_n_epoch"),
    "data.augment.stop_epoch",
)
"""Keys of the length of a training, and those that change with it."""
SEED_KEYS = ("seed", "data.seed", "distill.losses.*.seed")
"""Keys that hold the seed of the run, unless an override of the run sets them."""
DISTILLATION_KEYS = ("distill.*", "teacher.*", "init", "trust*")
"""Keys in which a distilled student may differ from the student alone."""
SAME_AP = 1e-6
"""Largest difference between AP of the recorded detections and AP in the summary."""


@dataclass(frozen=True)
class FinishedRun:
    """What a comparison reads of a finished run."""

    folder: Path
    config: Mapping[str, Any]
    words: Sequence[str]
    """The overrides of the run."""
    losses: Sequence[str]
    values: Mapping[str, float]
    """Results of the student by name, such as ``test/AP``, from 0 to 1."""
    classes: Sequence[str] = ()
    teacher: Mapping[str, Any] | None = None
    """Source and values of the teacher."""
    baseline: Path | None = None
    """Folder of the student alone that the run names, for ``baseline=train`` and ``baseline=RUN``."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Split -> hash of its images, boxes, classes and sizes."""
    detections: Mapping[str, Path] = field(default_factory=dict)
    """Split -> file of the student's detections."""
    seconds: float | None = None
    """Duration of the training with its evaluations."""
    seconds_per_step: float | None = None
    """Mean duration of an optimizer step, without evaluations."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config["seed"])

    @property
    def is_alone(self) -> bool:
        """Whether the student was trained alone."""
        return not self.losses and self.teacher is None

    def truth_digest(self, split: str) -> str | None:
        """Hash of the ground truth in the file of detections; None without a readable file."""
        with suppress(KeyError, DistillError):
            return load_recording(self.detections[split]).truth_digest()
        return None


@dataclass
class Configuration:
    """Runs that differ by their seed only."""

    settings: Mapping[str, str]
    """Dotted key -> value as JSON, without keys that do not change the result."""
    runs: dict[int, FinishedRun] = field(default_factory=dict)
    """By seed."""
    name: str = ""

    @property
    def first(self) -> FinishedRun:
        """The run with the first seed."""
        return next(iter(self.runs.values()))

    @property
    def is_alone(self) -> bool:
        """Whether this is a student alone."""
        return self.first.is_alone

    def student_settings(self) -> dict[str, str]:
        """The settings without those of the distillation."""
        return {key: value for key, value in self.settings.items() if not _matches(key, DISTILLATION_KEYS)}

    def mean_seconds(self) -> float | None:
        """Mean duration of the runs."""
        return mean_of([run.seconds for run in self.runs.values()])


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
    for one, reference in zip(configurations, references, strict=True):
        difference = difference_to(one, reference, metrics[0], bootstrap) if reference else None
        rows.append(configuration_row(one, metrics, difference))
    return Comparison(
        split=split,
        metric=metrics[0],
        equal=equal,
        rows=rows,
        left_out=out,
        notes=[*regime_notes(configurations, references, metrics[0]), *(bootstrap.notes if bootstrap else ())],
        settings=differing_settings(configurations),
        runs=[_run_entry(one, run) for one in configurations for run in one.runs.values()],
    )


# -- which runs


def measured(split: str) -> list[str]:
    """Names of the metrics of a comparison on a split."""
    return [f"{split}/{name}" for name in METRICS]


def keep_comparable(runs: Sequence[FinishedRun], split: str) -> tuple[list[FinishedRun], list[tuple[Path, str]]]:
    """The runs on the data, classes and metrics of the first one; and the others with the reason."""
    kept: list[FinishedRun] = []
    refused = []
    for run in runs:
        reason = _why_not_comparable(run, kept[0] if kept else None, split)
        if reason:
            refused.append((run.folder, reason))
        else:
            kept.append(run)
    return kept, refused


def _why_not_comparable(run: FinishedRun, first: FinishedRun | None, split: str) -> str:
    main = next((name for name in measured(split) if name in run.values), None)
    if main is None:
        return f"it has no result on the split {split}: python -m distill evaluate measures one"
    if first is None:
        return ""
    if list(run.classes) != list(first.classes):
        return f"its classes are {', '.join(run.classes)}; those of {first.folder} are {', '.join(first.classes)}"
    if main not in first.values:
        return f"it was measured by {main}, which {first.folder} lacks"
    digests = run.truth_digest(split), first.truth_digest(split)
    if None in digests:  # an older run: the summary's hash covers the size of the images, too
        digests = run.fingerprints.get(split), first.fingerprints.get(split)
    if None in digests:
        return f"its files do not say on which images of {split} it was measured, or those of {first.folder} do not"
    if digests[0] != digests[1]:
        return f"its images or boxes of {split} are not those of {first.folder}: another data set"
    return ""


def group_runs(runs: Sequence[FinishedRun], free: Sequence[str]) -> tuple[list[Configuration], list[tuple[Path, str]]]:
    """Group runs by their configuration without the seed. A second run of the same seed is left out.

    Args:
        runs: the runs.
        free: patterns of keys that do not change a result.
    """
    found: dict[str, Configuration] = {}
    repeated = []
    for run in runs:
        settings = decisive_settings(run, free)
        one = found.setdefault(json.dumps(settings, sort_keys=True), Configuration(settings))
        if run.seed in one.runs:
            repeated.append((run.folder, f"same configuration and seed as {one.runs[run.seed].folder}"))
        else:
            one.runs[run.seed] = run
    for one in found.values():
        one.runs = dict(sorted(one.runs.items()))
    return list(found.values()), repeated


def decisive_settings(run: FinishedRun, free: Sequence[str]) -> dict[str, str]:
    """Dotted key -> value as JSON, for the keys that may change the result, without the seed."""
    given = {word.partition("=")[0].lstrip("+") for word in run.words} - {"seed"}
    settings = {}
    for key, value in leaves(run.config):
        is_seed = _matches(key, SEED_KEYS) and value == run.seed and key not in given
        if is_seed or _matches(key, free) or (run.is_alone and key.startswith("teacher.")):
            continue
        settings[key] = json.dumps(value, sort_keys=True, default=str)
    return settings


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def name_configurations(
    configurations: Sequence[Configuration], labels: Mapping[frozenset[str], str], free: Sequence[str] = ()
) -> None:
    """Name each configuration by its label, or by its method and the overrides that not all of them have.

    Args:
        configurations: the configurations; their names are set.
        labels: names by overrides.
        free: patterns of keys that do not change a result.
    """
    words = [_decisive_words(one, free) for one in configurations]
    shared = set(words[0]).intersection(*words[1:])
    for one, own in zip(configurations, words, strict=True):
        fitting = [label for key, label in labels.items() if key <= set(one.first.words)]
        one.name = fitting[-1] if fitting else _short_name(one, [word for word in own if word not in shared])
    taken: dict[str, int] = {}
    for one in configurations:
        taken[one.name] = taken.get(one.name, 0) + 1
        one.name += f" ({taken[one.name]})" if taken[one.name] > 1 else ""


def _short_name(one: Configuration, words: Sequence[str]) -> str:
    """The method, and the other overrides with the ends of their keys: ``defeat neck.foreground=4 lr=0.01``."""
    method = "+".join(one.first.losses) or "none"
    others = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "distill":
            method = value
            continue
        prefix, _, end = key.partition("distill.losses.")
        parts = (end or prefix).split(".")
        others.append(f"{'.'.join(parts[1:]) if end else parts[-1]}={value}")
    return " ".join([method, *others])


def _decisive_words(one: Configuration, free: Sequence[str]) -> list[str]:
    """The overrides of a configuration that may change its result."""
    words = []
    for word in one.first.words:
        key = word.partition("=")[0].lstrip("+~")
        ignored = (*free, "seed", "hydra", "hydra.*", "trust*")
        if not (_matches(key, ignored) or f"{key}.*" in ignored):
            words.append(word)
    return words


def differing_settings(configurations: Sequence[Configuration]) -> dict[str, dict[str, str]]:
    """Key -> configuration -> value, for the keys whose values differ. A configuration without the key has no entry."""
    keys = dict.fromkeys(key for one in configurations for key in one.settings)
    table = {key: {one.name: one.settings[key] for one in configurations if key in one.settings} for key in keys}
    count = len(configurations)
    return {key: row for key, row in table.items() if len(row) < count or len(set(row.values())) > 1}


# -- what is compared with what


def find_references(configurations: Sequence[Configuration], equal: str) -> list[Configuration | None]:
    """The reference of each configuration; None for a student alone, and where there is none.

    It is the student alone with the same settings of the student, else the baseline that its runs name. If no
    configuration has such a reference, it is the first configuration.
    """
    alone = [one for one in configurations if one.is_alone]
    found = [None if one.is_alone else _reference(one, alone, equal) for one in configurations]
    if not any(found):
        return [None, *([configurations[0]] * (len(configurations) - 1))]
    return found


def _reference(one: Configuration, alone: Sequence[Configuration], equal: str) -> Configuration | None:
    free = LENGTH_KEYS if equal == "time" else ()

    def settings(other: Configuration) -> dict[str, str]:
        return {key: value for key, value in other.student_settings().items() if key not in free}

    fitting = [other for other in alone if settings(other) == settings(one)]
    seconds = one.mean_seconds()
    if equal == "time" and seconds is not None:
        timed = [
            (abs(time - seconds), number) for number, other in enumerate(fitting) if (time := other.mean_seconds())
        ]
        return fitting[min(timed)[1]] if timed else None
    own = [other for other in alone if any(run.folder == one.first.baseline for run in other.runs.values())]
    return next(iter([*fitting, *own]), None)


def difference_to(
    one: Configuration, reference: Configuration, metric: str, bootstrap: ImageBootstrap | None = None
) -> Difference | None:
    """The difference of a configuration to its reference, paired by seed; None without a common seed."""
    seeds = [seed for seed in one.runs if seed in reference.runs]
    if not seeds:
        return None
    values, reference_values = ([other.runs[seed].values[metric] for seed in seeds] for other in (one, reference))
    differences = [value - base for value, base in zip(values, reference_values, strict=True)]
    interval = statistics.mean_interval(differences)
    verdict = statistics.verdict(interval)
    teacher = (one.first.teacher or {}).get("values", {}).get(metric, -1.0)
    time, reference_time = one.mean_seconds(), reference.mean_seconds()
    return Difference(
        reference=reference.name,
        seeds=seeds,
        mean=fmean(differences),
        by_seed=interval,
        by_image=bootstrap.interval(one.runs[seeds[0]], reference.runs[seeds[0]]) if bootstrap else None,
        gap_closed=statistics.share_of_gap(fmean(reference_values), fmean(values), teacher),
        extra_time=time / reference_time - 1 if time and reference_time else None,
        verdict=verdict,
        further_seeds=statistics.seeds_to_decide(differences) or None,
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
        values = [self._values(each) for each in (run, reference)]
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
        for one in configurations
        for run in one.runs.values()
        if run.teacher and run.teacher.get("source")
    }
    rows = []
    for source, teacher in teachers.items():
        known = teacher.get("values") or {}
        values = {name: known[name] for name in metrics if known.get(name, -1.0) >= 0}
        name = "teacher" if len(teachers) == 1 else f"teacher {source}"
        rows.append(Row(name, "teacher", (), values, None, teacher.get("seconds"), None))
    return rows


def configuration_row(one: Configuration, metrics: Sequence[str], difference: Difference | None) -> Row:
    """The row of a configuration."""
    runs = list(one.runs.values())
    found = {name: [run.values[name] for run in runs if run.values.get(name, -1.0) >= 0] for name in metrics}
    main = found[metrics[0]]
    return Row(
        configuration=one.name,
        role="student alone" if one.is_alone else "distilled",
        seeds=list(one.runs),
        values={name: fmean(values) for name, values in found.items() if values},
        deviation=stdev(main) if len(main) > 1 else None,
        seconds=one.mean_seconds(),
        seconds_per_step=mean_of([run.seconds_per_step for run in runs]),
        difference=difference,
    )


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def regime_notes(
    configurations: Sequence[Configuration], references: Sequence[Configuration | None], metric: str
) -> list[str]:
    """Sentences that say whether the teacher knows more than the student alone, one for each pair of both."""
    notes = {}
    for one, reference in zip(configurations, references, strict=True):
        if reference is None or not reference.is_alone or one.first.teacher is None:
            continue
        teacher = (one.first.teacher.get("values") or {}).get(metric)
        alone = fmean([run.values[metric] for run in reference.runs.values()])
        if teacher is not None:
            notes[f"{one.first.teacher.get('source')} {reference.name}"] = describe_regime(
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
        "another cause here, such as its longer training time. Train the teacher longer (teacher.schedule.epochs=…) or "
        "on more data (teacher.data=…), or choose a larger one (teacher=…)"
    )


# -- output


def _run_entry(one: Configuration, run: FinishedRun) -> dict[str, Any]:
    return {
        "configuration": one.name,
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
        "role": row.role,
        "seeds": " ".join(map(str, row.seeds)),
        **dict(row.values),
        f"{metric}_deviation": row.deviation,
        "seconds": row.seconds,
        "seconds_per_step": row.seconds_per_step,
    }
    if (found := row.difference) is not None:
        flat |= {
            "reference": found.reference,
            "difference": found.mean,
            "paired_seeds": " ".join(map(str, found.seeds)),
            "seeds_low": found.by_seed.low if found.by_seed else None,
            "seeds_high": found.by_seed.high if found.by_seed else None,
            "images_low": found.by_image.low if found.by_image else None,
            "images_high": found.by_image.high if found.by_image else None,
            "gap_closed": found.gap_closed,
            "extra_time": found.extra_time,
            "verdict": found.verdict,
            "further_seeds": found.further_seeds,
        }
    return flat
