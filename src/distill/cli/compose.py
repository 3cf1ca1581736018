"""Composes the configuration from overrides, and validates overrides before a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from distill.cli import target_policy
from distill.cli.instantiate import ARGUMENT_ERRORS, named_nodes
from distill.cli.presets import preset_options, register_presets
from distill.cli.renamed_keys import refuse_renamed, translated
from distill.cli.suggestions import nearest
from distill.run_folder import RunFolder
from distill.types import DistillError

CONFIG_NAME = "config"
REQUIRED_NODES = (
    *("data", "model", "schedule", "supervised", "distill", "metrics"),
    *("trainer", "callbacks", "logger", "paths", "guard"),
)
"""Nodes that every run reads."""
MESSAGE_LENGTH = 600
"""Maximum number of characters that are quoted from a library's message."""


def config_folder() -> Path:
    """The ``conf`` folder: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "conf", package.parents[1] / "conf"):
        if (place / f"{CONFIG_NAME}.yaml").is_file():
            return place
    raise DistillError(f"no conf/{CONFIG_NAME}.yaml beside {package}: reinstall distill")


def register_resolvers() -> None:
    """Register distill's own resolvers for configurations.

    ``${names:node}`` joins a mapping's keys, for the names of run folders; ``${sweep:mode,folder}`` is the name of a
    sweep's folder inside a sweep, and in the processes of its jobs, and null elsewhere.
    """
    OmegaConf.register_new_resolver("names", lambda node: "+".join(node) or "none", replace=True)
    OmegaConf.register_new_resolver(
        "sweep",
        lambda mode, path: Path(path).name if "MULTIRUN" in str(mode) else os.environ.get("DISTILL_SWEEP"),
        replace=True,
    )


def config_groups() -> dict[str, list[str]]:
    """Config groups and their options."""
    conf = config_folder()
    files = [file.relative_to(conf).with_suffix("").as_posix() for file in conf.rglob("*.yaml")]
    options: dict[str, list[str]] = {}
    for option in sorted({*files, *preset_options(conf)}):
        group, _, name = option.partition("/")
        if name:
            options.setdefault(group, []).append(name)
    return options


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra parses them.

    Raises:
        DistillError: a word is not an override.
    """
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except (HydraException, RecursionError) as error:
        raise DistillError(f"cannot read the command line: {error}") from None


def quote_value(text: str) -> str:
    """Quote a value, so that an override may contain any characters, such as spaces and commas in paths."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def read_overrides(run: Path) -> list[str]:
    """The overrides that a run recorded, with current keys. Their origin is unknown, so they are not trusted.

    Raises:
        DistillError: ``overrides.yaml`` is not a list of overrides.
    """
    file = RunFolder(run).overrides
    try:
        with file.open(encoding="utf-8") as stream:
            lines = yaml.safe_load(stream)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DistillError(
            f"{file}: cannot be read ({str(error).splitlines()[0]}). Expected the folder of a run"
        ) from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise DistillError(f"{file}: expected a list of overrides, as train writes it")
    return [translated(line) for line in lines]


def recorded_overrides(run: Path) -> list[Override]:
    """The overrides that a run recorded, without those that only the command line may set: ``hydra.*`` and ``trust``.

    Raises:
        DistillError: ``overrides.yaml`` is not a list of overrides.
    """
    return [
        override
        for override in parse_overrides(read_overrides(run))
        if not override.is_hydra_override() and override.key_or_group != "trust"
    ]


@contextmanager
def initialized_hydra() -> Iterator[None]:
    """Hydra, initialized with our configuration, unless a running job has initialized it."""
    register_resolvers()
    register_presets(config_folder())
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(str(config_folder()), job_name="distill", version_base="1.3"):
            yield


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration of these overrides, without the ``hydra`` node and with interpolations not resolved."""
    cfg = compose_with_hydra(overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def compose_with_hydra(overrides: Sequence[str]) -> DictConfig:
    """The configuration with the ``hydra`` node, checked before Hydra or a run acts on it.

    Raises:
        DistillError: the configuration breaks a rule of `target_policy`, or lacks a node that every run reads.
    """
    with initialized_hydra():
        cfg = compose(CONFIG_NAME, list(overrides), return_hydra_config=True)
    nodes: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    require_nodes(nodes)
    words = [str(override.input_line) for override in parse_overrides(overrides) if override.is_hydra_override()]
    acted_on = tuple(word for word in words if not word.startswith(("hydra.run.", "hydra.sweep.")))
    default = _default_hydra(config_folder(), acted_on)
    # Any file may name the folders of runs, so these words are not composed: hundreds of folders share one default.
    default = default | {"overrides": default["overrides"] | {"hydra": words}}
    target_policy.validate_config(nodes, overrides, default)
    return cfg


@cache
def _default_hydra(conf: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """The ``hydra`` node of conf/config.yaml and these overrides only."""
    with initialized_hydra():
        cfg = compose(CONFIG_NAME, list(words), return_hydra_config=True)
    node: dict[str, Any] = OmegaConf.to_container(cfg.hydra, resolve=False)  # type: ignore[assignment]
    return node


def require_nodes(nodes: Mapping[str, Any]) -> None:
    """Refuse a configuration if a node that every run reads is missing or not a mapping.

    Raises:
        DistillError: names the node.
    """
    for key in REQUIRED_NODES:
        if not isinstance(nodes.get(key), dict):
            raise DistillError(
                f"{key}={nodes.get(key)}: expected a mapping, as in conf/config.yaml. Remove the override"
            )


def runs_folder(overrides: Sequence[str]) -> Path:
    """The parent folder of all runs whose name these overrides determine."""
    from hydra.core.hydra_config import HydraConfig

    cfg = compose_with_hydra(overrides)
    HydraConfig.instance().set_config(cfg)
    return Path(cfg.paths.outputs) / str(cfg.name)


def compose_without_run(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a verb that starts no run.

    Raises:
        DistillError: an override is invalid; see `validate_overrides`.
    """
    validate_overrides(overrides)
    runs_folder(overrides)  # sets HydraConfig, as in a run
    cfg = compose_config(overrides)
    cfg.paths.run = "run"  # a placeholder: nothing is written there
    return cfg


def validate_overrides(overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Compose the configuration without running anything, so that mistakes are reported within a second.

    A sweep is checked by every combination of its groups' options, and by every single value of a key. In a sweep a key
    of one loss, ``distill.losses.CONFIG_NAME.KEY``, applies to the jobs that have this loss.

    Returns:
        The configuration of the run, or of a sweep's first job, with the ``hydra`` node; and the overrides for Hydra. A
        key that applies only to some jobs gets the prefix ``++`` in these overrides, so that the key composes in all
        jobs. `applicable_overrides` leaves the key out of the jobs where it does not apply.

    Raises:
        DistillError: names the invalid override and the nearest valid names.
    """
    refuse_renamed(overrides)
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
        _override_key(override)
        for job, kept in jobs
        for override in parse_overrides(job)
        if override.input_line not in kept
    }
    forced = [
        f"++{line}" if _override_key(override) in partial else line
        for line, override in zip(overrides, parse_overrides(overrides), strict=True)
    ]
    return configs[0], forced


def _sweep_jobs(overrides: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Overrides of the jobs to check, and the overrides that apply to each job. A single job has all of them."""
    jobs = _expand_sweep(overrides)
    return [(job, applicable_overrides(job) if len(jobs) > 1 else job) for job in jobs]


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


def _validate_job(overrides: list[str]) -> DictConfig:
    """The validated configuration of one job."""
    cfg = _try_to_compose(overrides)
    _refuse_shared_losses(overrides)
    return cfg


def _try_to_compose(overrides: list[str]) -> DictConfig:
    try:
        return compose_with_hydra(overrides)
    except (HydraException, OmegaConfBaseException, *ARGUMENT_ERRORS) as error:
        raise DistillError(_explain_failure(error, overrides)) from None


def _expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of jobs that together have all combinations of groups' options and all values of keys.

    The first job has the first value of every axis.
    """
    fixed: list[str] = []
    options: list[list[str]] = []
    values: list[list[str]] = []
    known = config_groups()
    for override in parse_overrides(overrides):
        glob, group = override.value(), override.key_or_group
        if isinstance(glob, Glob):
            options.append([f"{_override_key(override)}={name}" for name in glob.filter(known.get(group, []))])
        elif override.is_discrete_sweep():
            axis = [f"{_override_key(override)}={value}" for value in override.sweep_string_iterator()]
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
                    f"yours, {config_folder() / 'distill' / 'mine.yaml'}, "
                    f"or by '+distill.losses.{name}_2={{_target_: …}}'"
                )


def _chosen_losses(overrides: Sequence[str]) -> dict[str, set[str]]:
    """Chosen option of ``distill`` -> the losses that the option defines or inherits."""
    with initialized_hydra():
        loader = GlobalHydra.instance().config_loader()
        files = loader.compute_defaults_list(CONFIG_NAME, list(overrides), RunMode.RUN).defaults
    chosen = [
        str(file.config_path).removeprefix("distill/")
        for file in files
        if str(file.config_path).startswith("distill/") and not str(file.parent).startswith("distill/")
    ]
    return {option: set(named_nodes(compose_config([f"distill={option}"]).distill.get("losses"))) for option in chosen}


def _override_key(override: Override) -> str:
    key = override.get_key_element()
    return ("+" * override.is_add() if not override.is_force_add() else "++") + key.lstrip("+~")


def _explain_failure(error: Exception, overrides: Sequence[str]) -> str:
    known = config_groups()
    for line in overrides:
        key, _, value = line.lstrip("+~").partition("=")
        key = key.split("@")[0]
        if not re.search(r"\.|hydra/", key) and key not in known and key not in _root_keys():
            return f"'{line}': there is no group or key '{key}'{nearest(key, [*known, *_root_keys()])}"
        for option in value.strip("[]").split(",") if key in known else ():
            if option not in ("", "null") and option not in known[key] and f"{key}={option}" not in str(error):
                return f"'{line}': group '{key}' has no option '{option}'{nearest(option, known[key])}"
    if extra := re.search(r"Could not find '(hydra/\w+/(optuna|joblib|submitit)\w*)'", str(error)):
        return f"{extra[1]} is an extra: install 'distill[{extra[2]}]'"
    message = str(error.__cause__ or error).splitlines()[0]
    match = re.search(r"Key '([^']+)' is not in struct", message)
    full = re.search(r"full_key: (\S+)", str(error.__cause__ or error))
    if match:
        path = full.group(1) if full else match.group(1)
        families = _families_with(path)
        owner = (
            f", which weights a loss of {' and '.join(families)}: the student is of another family" if families else ""
        )
        return f"there is no key '{path}'{owner}{nearest(path, _leaf_keys(overrides))}"
    return f"the configuration does not compose: {shorten(str(error), MESSAGE_LENGTH, placeholder='…')}"


def _families_with(path: str) -> list[str]:
    """The detector families that define the loss ``supervised.NAME``; none for any other key."""
    group, _, name = path.partition(".")
    files = sorted((config_folder() / group).glob("*.yaml")) if group == "supervised" else []
    return [file.stem for file in files if name in OmegaConf.load(file)]


def _root_keys() -> list[str]:
    return [
        str(key) for key in OmegaConf.load(config_folder() / f"{CONFIG_NAME}.yaml") if key not in ("defaults", "hydra")
    ]


def _leaf_keys(overrides: Sequence[str]) -> list[str]:
    chosen = [line for line in overrides if "." not in line.partition("=")[0]]
    try:
        config = compose_config(chosen)
    except (HydraException, OmegaConfBaseException):
        return []
    return list(_full_keys(OmegaConf.to_container(config), ""))


def _full_keys(node: Any, prefix: str) -> Iterable[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _full_keys(value, f"{prefix}{key}.")
