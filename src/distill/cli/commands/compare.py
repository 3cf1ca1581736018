"""The command compare: does distillation help, by how much, how sure, and at what cost?

    distill compare distill=none,defeat,dsig seeds=3 [overrides of train]    train what is missing, then compare
    distill compare sweep=defeat_table4 seeds=3 [overrides of train]         a table of a paper on any data
    distill compare RUN RUN ...                                              compare finished runs, or sweeps

The student alone (distill=none) is always among the configurations. All runs share one teacher. Each run has its own
process. seeds=3 stands for seed=0,1,2. equal=time also trains the student alone for as long as each distilled student
took; for finished runs, it takes the student alone whose time is nearest. The same command with hydra.sweep.dir=DIR
continues a stopped comparison. Its folder gets comparison.csv, comparison.json and comparison.html.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from distill.cli.config import compose, override_checks
from distill.cli.config.overrides import parse_overrides
from distill.cli.config.prepared_sweeps import read_sweep
from distill.cli.config.target_policy import COMMAND_LINE_KEYS
from distill.cli.reports import sweep_report
from distill.cli.runs import sweep
from distill.cli.runs.sweep_folder import EQUAL, job_folders
from distill.cli.signals import Terminated
from distill.cli.tables import print_line
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.analysis.configurations import Configuration

OWN_KEYS = ("equal", "seeds", "sweep")
"""Keys of this command that are no keys of the configuration."""
SEEDS = 3


class Plan(NamedTuple):
    """The sweeps that a comparison runs one after another."""

    parts: list[list[str]]
    """Overrides of each, with the axis of seeds."""
    labels: Mapping[frozenset[str], str]
    """Names of configurations by their overrides."""
    first: DictConfig
    """The configuration of the first job, with the ``hydra`` node."""


def main(argv: Sequence[str]) -> int:
    """``distill compare [overrides] [seeds=3] [equal=time] [sweep=NAME]``, or ``distill compare RUN RUN ...``."""
    parser = argparse.ArgumentParser(
        prog="distill compare",
        usage="distill compare [overrides] [seeds=3] [equal=epochs|time] [sweep=NAME] | RUN RUN ... "
        "[equal=epochs|time] [--csv FILE] [--json FILE] [--html FILE] [--no-images]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="OVERRIDE|RUN", help="overrides as for train, or folders of runs and sweeps"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write tables, runs and settings to this file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page to this file")
    parser.add_argument("--no-images", action="store_true", help="leave out the intervals over images")
    args = parser.parse_intermixed_args(list(argv))
    folders = [Path(word) for word in args.words if is_folder(word)]
    words = [word for word in args.words if Path(word) not in folders]
    values, words = take_own_keys(words)
    if folders:
        _compare_runs(folders, values, words, args)
    else:
        _compare_by_training(values, words, args)
    return 0


def is_folder(word: str) -> bool:
    """Whether a word names a folder. Overrides have an equals sign, or begin with ``~``, which deletes a key."""
    return Path(word).is_dir() or not ("=" in word or word.startswith("~"))


def take_own_keys(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of this command's own keys, and the other words.

    Raises:
        DistillError: an own key is given twice, or has an invalid value.
    """
    values: dict[str, str] = {}
    others: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in OWN_KEYS:
            others.append(word)
        elif key in values:
            raise DistillError(f"{key} is given twice, as {values[key]} and as {value}: remove one of them")
        else:
            values[key] = value
    if values.get("equal", EQUAL[0]) not in EQUAL:
        raise DistillError(f"equal={values['equal']}: expected one of {', '.join(EQUAL)}")
    if "seeds" in values and not (values["seeds"].isdecimal() and int(values["seeds"]) > 0):
        raise DistillError(
            f"seeds={values['seeds']}: expected a number of seeds from 1, such as seeds=3; seed=4,7 names them"
        )
    return values, others


# -- finished runs


def _compare_runs(
    folders: Sequence[Path], values: Mapping[str, str], words: Sequence[str], args: argparse.Namespace
) -> None:
    if others := [*(f"{key}={value}" for key, value in values.items() if key != "equal"), *words]:
        raise DistillError(
            f"{others[0]}: finished runs are compared as they are. Leave out the overrides, or the run folders"
        )
    from distill.cli.reports import comparison_report as report

    comparison = report.compare_paths(folders, values.get("equal"), images=not args.no_images)
    report.write_comparison(comparison, args.csv, args.json)
    report.print_comparison(comparison)
    if args.html:
        print_line("report", report.write_page(comparison, args.html))


# -- runs that are trained first


def _compare_by_training(values: Mapping[str, str], words: Sequence[str], args: argparse.Namespace) -> None:
    compose.register_options()
    plan = plan_comparison(values, words)
    equal = values.get("equal", EQUAL[0])
    folder = sweep.choose_folder([word for word in plan.parts[0] if word in words], plan.first)
    failure: DistillError | None = None
    try:
        failure = _run(folder, plan.parts, plan.first)
        if equal == "time":
            failure = _run(folder, longer_baselines(job_folders(folder), plan.parts[0]), plan.first) or failure
    except (Terminated, KeyboardInterrupt):
        sweep_report.show_jobs(folder)
        raise
    files = (args.csv, args.json, args.html)
    sweep_report.show_table(folder, equal, plan.labels, always=True, files=files, images=not args.no_images)
    if failure is not None:
        raise failure


def _run(folder: Path, parts: Sequence[Sequence[str]], first: DictConfig) -> DistillError | None:
    try:
        if parts:
            sweep.run_jobs(folder, [(words, sweep.count_jobs(words, first)) for words in parts])
    except sweep.JobFailed as error:
        return error
    return None


def plan_comparison(values: Mapping[str, str], words: Sequence[str]) -> Plan:
    """The sweeps of a comparison. Every configuration is composed, so that mistakes are reported before a run starts.

    Raises:
        DistillError: an invalid override, or two that contradict each other.
    """
    keys = [override.key_or_group for override in parse_overrides(words)]
    if "seed" in keys and "seeds" in values:
        raise DistillError("seed and seeds are both given: seeds=3 stands for seed=0,1,2. Remove one of them")
    seeds = [] if "seed" in keys else [f"seed={','.join(map(str, range(int(values.get('seeds', SEEDS)))))}"]
    if "sweep" in values:
        return _plan_prepared(values["sweep"], words, seeds)
    words = [*with_plain_student(words), *seeds]
    first, checked = override_checks.validate_overrides(words)
    return Plan([checked], {}, first)


def with_plain_student(words: Sequence[str]) -> list[str]:
    """The words with ``none`` among the values of ``distill``. Without that key it has the default option, too."""
    parsed = parse_overrides(words)
    given = [word for word, override in zip(words, parsed, strict=True) if override.key_or_group == "distill"]
    if not given:
        cfg, _ = override_checks.validate_overrides(_without_sweeps(words))
        choice = cfg.hydra.runtime.choices["distill"]
        if choice.startswith("of/"):  # the default of the model's family, under the name of its loss
            choice = ",".join(cfg.distill.losses)
        return [*words, "distill=none" if choice == "none" else f"distill=none,{choice}"]
    override = next(override for override in parsed if override.key_or_group == "distill")
    sweeps = override.is_sweep_override()
    options = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    key, _, value = given[0].partition("=")
    if "none" in options or value == "none" or (sweeps and not options):
        return list(words)
    return [f"{key}=none,{value}" if word == given[0] else word for word in words]


def _without_sweeps(words: Sequence[str]) -> list[str]:
    """The words of a first job."""
    first_words = []
    for override in parse_overrides(words):
        if override.is_discrete_sweep():
            first_words.append(f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}")
        elif not override.is_sweep_override():
            first_words.append(str(override.input_line))
    return first_words


def _plan_prepared(name: str, words: Sequence[str], seeds: Sequence[str]) -> Plan:
    rows = read_sweep(name)
    unused = set(words)
    given = {override.key_or_group for override in parse_overrides(words)}
    parts, labels, first = [], {}, None
    for label, row in rows.items():
        for override in parse_overrides(row):
            if override.key_or_group in given:
                raise DistillError(
                    f"{override.key_or_group} is given, but sweep={name} sets it ({label}: {override.input_line}). "
                    "Remove your override"
                )
        applicable = set(override_checks.applicable_overrides([*words, *_options(row)]))
        part = [*(word for word in words if word in applicable), *row, *seeds]
        unused -= applicable
        cfg, _ = override_checks.validate_overrides(_without_sweeps(part))
        first = cfg if first is None else first
        parts.append(part)
        labels[frozenset(row)] = label
    if unused:
        raise DistillError(f"{sorted(unused)[0]}: no configuration of sweep={name} has this loss. Remove the override")
    assert first is not None  # a sweep has at least one configuration
    return Plan(parts, dict(sorted(labels.items(), key=lambda item: len(item[0]))), first)


def _options(words: Sequence[str]) -> list[str]:
    """The words that choose options, which decide which losses there are."""
    return [word for word in words if not word.startswith("distill.losses.")]


# -- equal time


def longer_baselines(jobs: Sequence[Path], words: Sequence[str]) -> list[list[str]]:
    """Overrides of students alone that train for as long as the distilled students of finished jobs took.

    The length of the training is multiplied by (seconds of the distilled run) / (seconds of the run alone), both of the
    first seed, so that more seeds later ask for the same lengths. It is never shortened.

    Args:
        jobs: folders of the finished jobs.
        words: overrides with the axis of seeds.
    """
    from distill.analysis.configurations import find_references, group_runs
    from distill.cli.reports.comparison_report import free_keys
    from distill.cli.runs.finished_runs import read_runs

    # Those of Hydra are not recorded by jobs; trust and config_dirs count on the command line only.
    kept_words = [word for word in words if word.lstrip("+").startswith(("seed=", *COMMAND_LINE_KEYS))]
    configurations, _ = group_runs(read_runs(jobs)[0], free_keys())
    parts = []
    for configuration, reference in zip(configurations, find_references(configurations, "epochs"), strict=True):
        if reference is None or not reference.is_alone:
            continue
        factor = time_factor(configuration, reference)
        if factor is not None and is_longer(reference.first.config, factor):
            parts.append([*longer_words(reference, factor), *kept_words])
    return [part for number, part in enumerate(parts) if part not in parts[:number]]


def time_factor(configuration: Configuration, reference: Configuration) -> float | None:
    """Duration of a configuration's run divided by that of its reference, both of the first seed that both have."""
    for seed, run in configuration.runs.items():
        other = reference.runs.get(seed)
        if other is not None and run.seconds and other.seconds:
            return run.seconds / other.seconds
    return None


def is_longer(config: Mapping[str, Any], factor: float) -> bool:
    """Whether the length that is multiplied by a factor, and rounded, is larger than before."""
    lengths = config["schedule"]["epochs"], config["schedule"]["steps"], config["trainer"]["max_steps"]
    return any(round(factor * length) > length for length in lengths if length is not None and length > 0)


def longer_words(reference: Configuration, factor: float) -> list[str]:
    """The overrides of a student alone, without its seed, for a training with so many times the epochs."""
    from distill.cli.runs.baseline import longer_overrides

    run = reference.first
    kept = [word for word in parse_overrides(run.words) if word.key_or_group not in ("seed", *COMMAND_LINE_KEYS)]
    lines = [str(word.input_line) for word in kept]
    longer = longer_overrides(run.config, factor, [*lines, f"seed={run.seed}"])
    replaced = {word.key_or_group for word in parse_overrides(longer)}
    return [*(line for word, line in zip(kept, lines, strict=True) if word.key_or_group not in replaced), *longer]
