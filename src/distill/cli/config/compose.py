"""Composes the configuration from overrides, and checks what Hydra acts on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from distill.cli.config import config_folders, target_policy
from distill.cli.config.overrides import configuration_name, parse_overrides
from distill.cli.config.presets import DEFAULT_METHOD, preset_options, register_presets
from distill.types import DistillError

CONFIG_NAME = "config"
SWEEPS = "sweep"
"""Folder of the prepared sweeps of the command compare. It is no config group."""
REQUIRED_NODES = (
    *("data", "model", "schedule", "supervised", "distill", "metrics"),
    *("trainer", "callbacks", "logger", "paths", "guard"),
)
"""Nodes that every run reads."""


def config_folder() -> Path:
    """The ``conf`` folder: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[2]
    for place in (package / "conf", package.parents[1] / "conf"):
        if (place / f"{CONFIG_NAME}.yaml").is_file():
            return place
    raise DistillError(f"no conf/{CONFIG_NAME}.yaml beside {package}: reinstall distill")


def all_folders() -> list[Path]:
    """The ``conf`` folder, and the user's and the plugins' folders of options."""
    return [config_folder(), *config_folders.own_folders()]


def refuse_hidden_options() -> None:
    """Refuse an option in a folder of the command line if distill has an option of this name, which is read instead.

    Raises:
        DistillError: names the file.
    """
    conf = config_folder()
    _refuse_options(lambda option: (conf / f"{option}.yaml").is_file())


def _refuse_replaced_options() -> None:
    """Refuse an option in the user's folders, or in a run's copy of them, that would replace a derived option.

    A derived option, such as ``metrics=of/shapes``, has no file. The user's file would be a part of configurations that
    name no option of the user, and could tell Hydra what to do.
    """
    if config_folders.given_folders():
        _refuse_options(preset_options([config_folder()]).__contains__)


def _refuse_options(is_refused: Callable[[str], bool]) -> None:
    for folder in config_folders.given_folders():
        for file in sorted(folder.rglob("*.yaml")):
            if is_refused(file.relative_to(folder).with_suffix("").as_posix()):
                raise DistillError(f"{file}: distill has an option of this name. Rename the file")


def own_files(overrides: Sequence[str]) -> dict[str, Path]:
    """The files of the composed configuration that are not distill's own, by their path inside a folder of options."""
    with initialized_hydra():
        loader = GlobalHydra.instance().config_loader()
        options = loader.compute_defaults_list(CONFIG_NAME, list(overrides), RunMode.RUN).defaults
    names = [f"{option.config_path}.yaml" for option in options]
    files_by_name: dict[str, Path] = {}
    for name in names:
        places = [folder / name for folder in all_folders() if (folder / name).is_file()]
        if places and places[0] != config_folder() / name and ".." not in Path(name).parts:
            files_by_name[name] = places[0]
    return files_by_name


def register_options() -> None:
    """Make distill's resolvers, and the options that are not files of ``conf``, known to Hydra."""
    _refuse_replaced_options()
    register_resolvers()
    register_presets(all_folders())
    config_folders.register()


def resize_of(student: str | None, teacher: str | None, weights: str | None = None) -> str:
    """The value of ``data.resize`` for a student and its teacher, see `Detector.needs_squares`.

    Args:
        student: the student's class, as its ``_target_``.
        teacher: the class of ``teacher.model``.
        weights: ``teacher.weights``. A run that it names describes its detector, and ``teacher.model`` is not read.
    """
    described = described_detector(weights)
    detectors = target_class(student), described[0] if described else target_class(teacher)
    return "square" if any(getattr(detector, "needs_squares", False) for detector in detectors) else "ratio"


def target_class(name: str | None) -> Any:
    """The class that a ``_target_`` names. None without a name, and for a name that the run will refuse."""
    if name is None:
        return None
    try:
        return target_policy.load_class(name, "_target_")
    except DistillError:
        return None


def described_detector(weights: str | None) -> tuple[Any, Mapping[str, Any]] | None:
    """Class and options of the detector that a run, or a file of one, describes. None for all other weights."""
    try:
        path = None if weights is None else Path(weights).expanduser()
        if path is None or not path.exists():
            return None  # nothing, or a name of published weights
        from distill.detectors.registry import described_model

        return described_model(path)
    except (OSError, RuntimeError, DistillError):
        return None  # no path at all, weights of another form, or damaged ones, which the run refuses


def register_resolvers() -> None:
    """Register distill's own resolvers for configurations.

    ``${resize_of:class,class,weights}`` is the value of ``data.resize``, see `resize_of`.
    ``${names:node}`` joins a mapping's keys, for the names of run folders; ``${sweep:mode,folder}`` is the name of a
    sweep's folder inside a sweep, and in the processes of its jobs, and null elsewhere. ``${configuration:overrides}``
    names a configuration without its seed, see `configuration_name`. ``${pair:choices,weights,losses}`` names teacher
    and student, see `name_pair`.
    """
    OmegaConf.register_new_resolver("configuration", configuration_name, replace=True)
    OmegaConf.register_new_resolver("resize_of", resize_of, replace=True)
    OmegaConf.register_new_resolver("names", lambda node: "+".join(node) or "none", replace=True)
    OmegaConf.register_new_resolver("pair", name_pair, replace=True)
    OmegaConf.register_new_resolver(
        "sweep",
        lambda mode, path: Path(path).name if "MULTIRUN" in str(mode) else os.environ.get("DISTILL_SWEEP"),
        replace=True,
    )


def name_pair(choices: Mapping[str, Any], weights: str | None, losses: Mapping[str, Any]) -> str | None:
    """``teacher → student``, for a tag; None for a run whose losses read no teacher.

    Args:
        choices: the chosen options by group.
        weights: ``teacher.weights``. If set, the teacher is named by the last part of this path or name.
        losses: the losses by name.
    """
    if not any(getattr(target_class(loss.get("_target_")), "needs_teacher", True) for loss in losses.values()):
        return None
    teacher = Path(str(weights)).name if weights else choices.get("model@teacher.model")
    return f"{teacher} → {choices['model']}" if teacher else None


def config_groups() -> dict[str, list[str]]:
    """Config groups and their options, without those that stand for a model's default method."""
    folders = all_folders()
    files = [file.relative_to(conf).with_suffix("").as_posix() for conf in folders for file in conf.rglob("*.yaml")]
    files = [file for file in files if not file.startswith(f"{SWEEPS}/")]
    options: dict[str, list[str]] = {}
    for option in sorted({*files, *preset_options(folders)}):
        group, _, name = option.partition("/")
        if name and not option.startswith(DEFAULT_METHOD):
            options.setdefault(group, []).append(name)
    return options


def root_keys() -> list[str]:
    """Keys at the root of the configuration that are no groups."""
    return [
        str(key) for key in OmegaConf.load(config_folder() / f"{CONFIG_NAME}.yaml") if key not in ("defaults", "hydra")
    ]


@contextmanager
def initialized_hydra() -> Iterator[None]:
    """Hydra, initialized with our configuration, unless a running job has initialized it."""
    register_options()
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(str(config_folder()), job_name="distill", version_base="1.3"):
            yield


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration of these overrides, without the ``hydra`` node and with interpolations not resolved."""
    return without_hydra(compose_with_hydra(overrides))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a configuration without the ``hydra`` node."""
    cfg = cfg.copy()
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
    words: dict[bool, list[str]] = {True: [], False: []}
    for override in parse_overrides(overrides):
        words[override.is_hydra_override()].append(str(override.input_line))
    # Any file may name the folders of runs, so these words are not composed: hundreds of folders share one node.
    acted_on = tuple(word for word in words[True] if not word.startswith(("hydra.run.", "hydra.sweep.")))
    hydra = {**_hydra_node(config_folder(), acted_on), "overrides": {"hydra": words[True], "task": words[False]}}
    target_policy.validate_config(nodes, overrides, hydra, _hydra_node(config_folder(), ()))
    return cfg


@cache
def _hydra_node(conf: Path, words: tuple[str, ...]) -> dict[str, Any]:
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
    cfg = compose_with_hydra(overrides)
    HydraConfig.instance().set_config(cfg)
    return Path(cfg.paths.outputs) / str(cfg.name)
