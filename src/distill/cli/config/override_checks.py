"""Validates overrides before a run or a sweep, by composing every configuration that the overrides describe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli.config import compose
from distill.cli.config.composition_errors import explain_failure, unknown_key
from distill.cli.config.instantiate import ARGUMENT_ERRORS, named_nodes
from distill.cli.config.overrides import parse_overrides, sweep_key
from distill.cli.config.renamed_keys import refuse_renamed
from distill.types import DistillError


def validate_overrides(overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Compose the configuration without running anything, so that mistakes are reported within a second.

    A sweep is checked by every combination of its groups' options, and by every single value of a key. In a sweep a key
    of one loss, ``distill.losses.NAME.KEY``, applies to the jobs that have this loss.

    Returns:
        The configuration of the run, or of a sweep's first job, with the ``hydra`` node; and the overrides for Hydra. A
        key that applies only to some jobs gets the prefix ``++`` in these overrides, so that the key composes in all
        jobs. `applicable_overrides` leaves the key out of the jobs where it does not apply.

    Raises:
        DistillError: names the invalid override and the nearest valid names.
    """
    refuse_renamed(overrides)
    _refuse_added_root_keys(overrides)
    jobs = _sweep_jobs(overrides)
    configs = [_validate_job(jobs[0][1])]
    if params := configs[0].hydra.sweeper.get("params"):
        jobs = _sweep_jobs([*(f"{key}={value}" for key, value in params.items()), *overrides])
        configs = [_validate_job(jobs[0][1])]
    configs += [_validate_job(kept) for _, kept in jobs[1:]]
    left_out = {line for job, kept in jobs for line in job} - {line for _, kept in jobs for line in kept}
    most_losses = max(range(len(jobs)), key=lambda index: len(configs[index].distill.losses or {}))
    for line in left_out:  # keys that some jobs leave out; a key that applies to no job is refused here
        _validate_job([line, *jobs[most_losses][1]])
    partial = {
        sweep_key(override)
        for job, kept in jobs
        for override in parse_overrides(job)
        if override.input_line not in kept
    }
    forced = [
        f"++{line}" if sweep_key(override) in partial else line
        for line, override in zip(overrides, parse_overrides(overrides), strict=True)
    ]
    return configs[0], forced


def _refuse_added_root_keys(overrides: Sequence[str]) -> None:
    """Refuse ``+KEY=VALUE`` with a key that no part of a run reads, unless another override refers to the key."""
    known = {*compose.config_groups(), *compose.root_keys()}
    for word in overrides:
        key = word.lstrip("+").partition("=")[0]
        is_unknown = word.startswith("+") and re.fullmatch(r"\w+", key) and key not in known
        if is_unknown and not any(f"${{{key}" in other for other in overrides):
            raise DistillError(unknown_key(word))


def compose_without_run(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a command that starts no run.

    Raises:
        DistillError: an override is invalid; see `validate_overrides`.
    """
    if sweeps := [override.input_line for override in parse_overrides(overrides) if override.is_sweep_override()]:
        raise DistillError(f"{sweeps[0]}: expected one value: this command reads one configuration")
    cfg, _ = validate_overrides(overrides)
    HydraConfig.instance().set_config(cfg)  # as in a run, for interpolations into it
    cfg = compose.without_hydra(cfg)
    cfg.paths.run = "run"  # a placeholder: nothing is written there
    return cfg


def applicable_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides of a sweep's job, without the keys of losses that the job does not have."""
    of_losses = {
        line: match[1] for line in overrides if (match := re.match(r"(?:\+\+)?distill\.losses\.(\w+)\.", line))
    }
    if not of_losses:
        return list(overrides)
    losses = _try_to_compose([line for line in overrides if line not in of_losses]).distill.losses or {}
    lines = [line for line in overrides if of_losses.get(line) is None or of_losses[line] in losses]
    return [line.removeprefix("++") if line in of_losses else line for line in lines]


def _sweep_jobs(overrides: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Overrides of the jobs to check, and the overrides that apply to each job. A single job has all of them."""
    jobs = _expand_sweep(overrides)
    return [(job, applicable_overrides(job) if len(jobs) > 1 else job) for job in jobs]


def _validate_job(overrides: list[str]) -> DictConfig:
    """The validated configuration of one job."""
    cfg = _try_to_compose(overrides)
    _refuse_shared_losses(overrides)
    return cfg


def _try_to_compose(overrides: list[str]) -> DictConfig:
    try:
        return compose.compose_with_hydra(overrides)
    except (HydraException, OmegaConfBaseException, *ARGUMENT_ERRORS) as error:
        raise DistillError(explain_failure(error, overrides)) from None


def _expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of jobs that together have all combinations of groups' options and all values of keys.

    The first job has the first value of every axis.
    """
    fixed: list[str] = []
    options: list[list[str]] = []
    values: list[list[str]] = []
    known = compose.config_groups()
    for override in parse_overrides(overrides):
        glob, group = override.value(), override.key_or_group
        if isinstance(glob, Glob):
            options.append([f"{sweep_key(override)}={name}" for name in glob.filter(known.get(group, []))])
        elif override.is_discrete_sweep():
            axis = [f"{sweep_key(override)}={value}" for value in override.sweep_string_iterator()]
            (options if group in known else values).append(axis)
        elif not override.is_sweep_override():
            fixed.append(str(override.input_line))
    firsts = [axis[0] for axis in values if axis]
    jobs = [[*fixed, *chosen, *firsts] for chosen in product(*(axis for axis in options if axis))]
    # A key of a loss is checked in the jobs of all options, because the first job may not have this loss.
    changed = [(axis[0], line) for axis in values for line in axis[1:]]
    return jobs + [
        [*(override for override in job if override != first), line]
        for first, line in changed
        for job in (jobs if first.startswith("distill.losses.") else jobs[:1])
    ]


def _refuse_shared_losses(overrides: Sequence[str]) -> None:
    """Refuse two options of ``distill`` that define the same loss: the second one would overwrite the first one."""
    if not any(re.match(r"\+*(distill=.*\[|experiment=)", line) for line in overrides):
        return  # a single option
    writers: dict[str, str] = {}
    for option, losses in _chosen_losses(overrides).items():
        for name in losses:
            if (first := writers.setdefault(name, option)) != option:
                raise DistillError(
                    f"distill: {first} and {option} both write the loss '{name}', so that only the settings of the "
                    "last one would be left. Choose one of them, or give the second a name of its own: in an option of "
                    f"yours, DIR/distill/mine.yaml with --config-dir DIR, "
                    f"or by '+distill.losses.{name}_2={{_target_: …}}'"
                )


def _chosen_losses(overrides: Sequence[str]) -> dict[str, set[str]]:
    """Chosen option of ``distill`` -> the losses that the option defines or inherits."""
    with compose.initialized_hydra():
        loader = GlobalHydra.instance().config_loader()
        files = loader.compute_defaults_list(compose.CONFIG_NAME, list(overrides), RunMode.RUN).defaults
    chosen = [
        str(file.config_path).removeprefix("distill/")
        for file in files
        if str(file.config_path).startswith("distill/") and not str(file.parent).startswith("distill/")
    ]
    return {
        option: set(named_nodes(compose.compose_config([f"distill={option}"]).distill.get("losses")))
        for option in chosen
    }
