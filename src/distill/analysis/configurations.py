"""Configurations: finished runs that differ by their seed only. Their groups, names and references."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from distill.evaluation.recording import load_recording
from distill.type_checks import leaves
from distill.types import DistillError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP")
"""Metrics of a comparison, in the order of its columns. The first one that was measured is the main metric."""
DURATION_KEYS = ("schedule.epochs", "schedule.steps", "trainer.max_steps", "trainer.max_epochs")
"""Keys that say how long the student is trained."""
FOLLOWING_KEYS = (
    *("schedule.milestones", "schedule.evaluate_every", "trainer.check_val_every_n_epoch"),
    "data.augment.stop_epoch",
)
"""Keys that change with these in a longer training."""
SEED_KEYS = ("seed", "data.seed", "distill.losses.*.seed")
"""Keys that hold the seed of the run, unless an override of the run sets them."""
DISTILLATION_KEYS = ("distill.*", "teacher.*", "init", "trust*")
"""Keys in which a distilled student may differ from the student alone."""


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
    group: str = ""
    """Name of the configuration without the seed, which is the run's group on W&B."""

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

    def epochs_and_steps(self) -> list[str | None]:
        """The settings that say how long the student is trained."""
        return [self.settings.get(key) for key in DURATION_KEYS]

    def mean_seconds(self) -> float | None:
        """Mean duration of the runs."""
        return mean_of([run.seconds for run in self.runs.values()])


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
    configurations: dict[str, Configuration] = {}
    repeated = []
    for run in runs:
        settings = decisive_settings(run, free)
        configuration = configurations.setdefault(json.dumps(settings, sort_keys=True), Configuration(settings))
        if run.seed in configuration.runs:
            repeated.append((run.folder, f"same configuration and seed as {configuration.runs[run.seed].folder}"))
        else:
            configuration.runs[run.seed] = run
    for configuration in configurations.values():
        configuration.runs = dict(sorted(configuration.runs.items()))
    return list(configurations.values()), repeated


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
    words = [_decisive_words(configuration, free) for configuration in configurations]
    shared = set(words[0]).intersection(*words[1:])
    full, short = [], []
    for configuration, given in zip(configurations, words, strict=True):
        fitting = [label for key, label in labels.items() if key <= set(configuration.first.words)]
        kept = [word for word in given if word not in shared]
        full.append(fitting[-1] if fitting else _short_name(configuration, kept))
        short.append(fitting[-1] if fitting else _short_name(configuration, _without_followers(kept)))
    for configuration, name, shorter in zip(configurations, full, short, strict=True):
        configuration.name = shorter if short.count(shorter) == 1 else name
    taken: dict[str, int] = {}
    for configuration in configurations:
        taken[configuration.name] = taken.get(configuration.name, 0) + 1
        configuration.name += f" ({taken[configuration.name]})" if taken[configuration.name] > 1 else ""


def _without_followers(words: Sequence[str]) -> list[str]:
    """The words without those that follow the number of epochs, if it is among them: ``epochs=15`` says enough."""
    if not any(word.startswith("schedule.epochs=") for word in words):
        return list(words)
    return [word for word in words if word.partition("=")[0] not in FOLLOWING_KEYS]


def _short_name(configuration: Configuration, words: Sequence[str]) -> str:
    """The method, and the other overrides with the ends of their keys: ``defeat neck.foreground=4 lr=0.01``."""
    method = "+".join(configuration.first.losses) or "none"
    others = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "distill":
            method = value
            continue
        prefix, _, end = key.partition("distill.losses.")
        parts = (end or prefix).split(".")
        owner = "teacher." if key.lstrip("+~").startswith("teacher.") else ""  # its epochs are not the student's
        others.append(f"{'.'.join(parts[1:]) if end else owner + parts[-1]}={value}")
    return " ".join([method, *others])


def _decisive_words(configuration: Configuration, free: Sequence[str]) -> list[str]:
    """The overrides of a configuration that may change its result."""
    words = []
    for word in configuration.first.words:
        key = word.partition("=")[0].lstrip("+~")
        ignored = (*free, "seed", "hydra", "hydra.*", "trust*")
        if not (_matches(key, ignored) or f"{key}.*" in ignored):
            words.append(word)
    return words


def differing_settings(configurations: Sequence[Configuration]) -> dict[str, dict[str, str]]:
    """Key -> configuration -> value, for the keys whose values differ. A configuration without the key has no entry."""
    keys = dict.fromkeys(key for configuration in configurations for key in configuration.settings)
    table = {
        key: {
            configuration.name: configuration.settings[key]
            for configuration in configurations
            if key in configuration.settings
        }
        for key in keys
    }
    count = len(configurations)
    return {key: row for key, row in table.items() if len(row) < count or len(set(row.values())) > 1}


def find_references(configurations: Sequence[Configuration], equal: str) -> list[Configuration | None]:
    """The reference of each configuration; None for a student alone, and where there is none.

    It is the student alone with the same settings of the student, else the baseline that its runs name. If no
    configuration has such a reference, it is the first configuration.
    """
    alone = [configuration for configuration in configurations if configuration.is_alone]
    references = [
        None if configuration.is_alone else _reference(configuration, alone, equal) for configuration in configurations
    ]
    if not any(references):
        return [None, *([configurations[0]] * (len(configurations) - 1))]
    return references


def _reference(configuration: Configuration, alone: Sequence[Configuration], equal: str) -> Configuration | None:
    free = (*DURATION_KEYS, *FOLLOWING_KEYS) if equal == "time" else ()

    def settings(other: Configuration) -> dict[str, str]:
        return {key: value for key, value in other.student_settings().items() if key not in free}

    fitting = [other for other in alone if settings(other) == settings(configuration)]
    seconds = configuration.mean_seconds()
    if equal == "time" and seconds is not None:
        timed = [
            (abs(time - seconds), number) for number, other in enumerate(fitting) if (time := other.mean_seconds())
        ]
        return fitting[min(timed)[1]] if timed else None
    baselines = [
        other for other in alone if any(run.folder == configuration.first.baseline for run in other.runs.values())
    ]
    return next(iter([*fitting, *baselines]), None)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
