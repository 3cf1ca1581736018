"""What a configuration may name. Configurations are shared and copied, so that none of them may run code by itself.

A ``_target_`` is a class that distill, torch, torchvision, lightning or torchmetrics define, one of OURS, or anything that
``trust=[package,package.module.name]`` names; ``trust`` counts on the command line alone, never in a file. Hydra acts on
its own node (callbacks, logging, environment) before a run begins, so of that node a file may say only what is FREE.

The gate stands in Hydra's loader: no configuration is handed to anybody, Hydra itself included, before it has passed. Names
are judged there, without an import; what a name really means is judged when it is built, for `torch.os.system` begins well.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import hydra._internal.hydra as main
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from distill.types import DistillError

PACKAGES = ("distill", "torch", "torchvision", "lightning", "torchmetrics")
DENIED = (
    "distill.cli",  # would start a run of its own
    *("lightning.pytorch.cli", "lightning.fabric.cli"),  # build whatever their arguments name
    *("torch.hub", "torchvision.datasets", "torchmetrics.text", "torchmetrics.multimodal"),  # fetch files, and code
    *("torch.cuda.memory", "torch.xpu.memory"),  # load libraries
    *("torch.package", "torch.serialization"),  # unpickle
    *("torch.fx", "torch.jit", "torch.export", "torch.onnx", "torch.utils.cpp_extension"),  # compile
    *("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.rpc"),  # start processes
    *("torch.testing", "torch.utils.benchmark", "torch.multiprocessing"),
)
"""Parts of the packages above that are made to run, fetch or unpickle what they are told to."""
OURS = (
    "distill.training.callbacks.consistency.patience",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
)
PLUGINS = ("hydra_plugins", "optuna.samplers", "optuna.pruners")
"""May stand in the ``hydra`` node beside OURS: Hydra's plugins, all of which it imports in any case, and Optuna's parts."""
NAMING = ("_target_", "()", "custom_search_space")
"""Keys whose values are called: Hydra's, that of `logging.config`, and the Optuna sweeper's."""
FREE = ("run", "sweep", "sweeper", "mode", "verbose")
"""What files may say of the ``hydra`` node."""
NOTES = ("overrides", "runtime")
"""What Hydra itself notes there; the former is compared with what was given."""
FRAME = (
    "data",
    "model",
    "schedule",
    "distill",
    "metrics",
    "trainer",
    "callbacks",
    "logger",
    "paths",
    "supervised",
    "guard",
)
"""Nodes that every run reads."""
SETTLED = ("hydra.run.", "hydra.sweep.", "hydra.mode=", "hydra.verbose=")
"""Beginnings of the overrides that change FREE keys alone."""

_trusted: tuple[str, ...] = ()
_plain_nodes: dict[str, dict[str, Any]] = {}


def listen(words: Sequence[str]) -> None:
    """Note what ``trust=[…]`` names, and forget what it named before. To be called with the command line alone.

    Raises:
        DistillError: it names something else than packages, modules or constructors.
    """
    global _trusted
    _trusted = ()
    for word in words:
        if word.lstrip("+").partition("=")[0] == "trust":
            _trusted += _names(word)


def _names(word: str) -> tuple[str, ...]:
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        value = None
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.replace(".", "_").isidentifier() for name in names):
        raise DistillError(f"'{word}': expected names of packages or constructors, as in trust=[my_package]")
    return tuple(names)


@contextmanager
def gated() -> Iterator[None]:
    """Within, Hydra composes through the gate."""
    names = vars(main)  # Hydra has no option for it
    before, names["ConfigLoaderImpl"] = names["ConfigLoaderImpl"], Loader
    try:
        yield
    finally:
        names["ConfigLoaderImpl"] = before


class Loader(ConfigLoaderImpl):
    """Hydra's loader of configurations, which keeps to itself what it must not hand out."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """As Hydra has it.

        Raises:
            DistillError: the configuration names what it may not name.
        """
        cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        whole: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
        acted = whole.pop("hydra")
        if config_name is not None:  # --hydra-help composes Hydra's part alone
            judge_frame(whole)
        _judge_trust(whole.get("trust"))
        for where, name in named(whole):
            judge_name(name, where)
        parsed = OverridesParser.create().parse_overrides(overrides)
        words = [str(override.input_line) for override in parsed if override.is_hydra_override()]
        if acted["overrides"] != {"hydra": words, "task": [line for line in overrides if line not in words]}:
            raise DistillError(
                "a configuration file sets hydra.overrides, which is the command line's: remove it there"
            )
        _judge_hydra(acted, self._plain(config_name, words, run_mode))
        return cfg

    def _plain(self, config_name: str | None, words: Sequence[str], run_mode: RunMode) -> dict[str, Any]:
        """The ``hydra`` node that these words of the command line alone make of Hydra's defaults and ours."""
        said = [word for word in words if not word.lstrip("+~").startswith(SETTLED)]
        folders = [source.path for source in self.get_search_path().get_path()]
        key = json.dumps([config_name, said, folders, JobRuntime.instance().get("name")])
        if key not in _plain_nodes:
            cfg = super().load_configuration(config_name, said, run_mode, True, False)
            _plain_nodes[key] = OmegaConf.to_container(cfg.hydra, resolve=False)  # type: ignore[assignment]
        return _plain_nodes[key]


def judge_frame(whole: Mapping[str, Any]) -> None:
    """Refuse a configuration in which a node that every run reads is taken away.

    Raises:
        DistillError: names it.
    """
    for key in FRAME:
        if not isinstance(whole.get(key), dict):
            raise DistillError(
                f"{key}={whole.get(key)}: expected a mapping, as conf/config.yaml has it: leave it as it is"
            )


def _judge_trust(names: Any) -> None:
    given = names if isinstance(names, list) else [names]
    foreign = [name for name in given if name is not None and name not in _trusted]
    if foreign:
        raise DistillError(
            f"a configuration file says trust={foreign}: that counts on the command line alone. If you know this code and want "
            f"it to run, say trust=[{','.join(map(str, foreign))}] there"
        )


def _judge_hydra(node: dict[str, Any], plain: dict[str, Any]) -> None:
    """What Hydra would act on is what the command line made it, but for what files may say."""
    for where in differing({key: value for key, value in node.items() if key not in (*FREE, *NOTES)}, plain, "hydra"):
        if where != "hydra.job.override_dirname":
            raise DistillError(
                f"a configuration file sets {where}, on which Hydra acts before anything is checked: files may set "
                f"{', '.join(f'hydra.{key}' for key in FREE)}. If you want it, say {where}=… on the command line"
            )
    if node["sweeper"] != plain["sweeper"]:
        _judge_sweeper(node["sweeper"])
    for where, name in named(node, "hydra"):
        if name is not None and name not in OURS and not _within(name, PLUGINS):
            judge_name(name, where, known=())
            constructor(name, where)


def _judge_sweeper(node: Any) -> None:
    """What a file says of the sweeper makes the overrides of its jobs: none for Hydra, none that a later word could change."""
    for where, key, value in entries(node, "hydra.sweeper"):
        word = str(key).lstrip("+~")
        if word.startswith(("hydra", "trust")) or (isinstance(value, str) and "${" in value):
            raise DistillError(f"a configuration file sets {where}, which the command line alone may sweep over")


def differing(one: Any, other: Any, where: str) -> Iterator[str]:
    """The keys in which two plain nodes differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key, value in one.items():
            yield from differing(value, other.get(key), f"{where}.{key}")
    elif one != other:
        yield where


def entries(node: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Full key, key and value of every entry below a plain node, in lists too."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        below = f"{where}.{key}" if where else str(key)
        yield below, key, value
        yield from entries(value, below)


def named(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Full key and value of everything below a plain node that names something to call."""
    return ((below, value) for below, key, value in entries(node, where) if key in NAMING)


def _within(name: Any, parts: Sequence[str]) -> bool:
    return isinstance(name, str) and any(name == part or name.startswith(f"{part}.") for part in parts)


def judge_name(name: Any, where: str, known: Sequence[str] = PACKAGES) -> None:
    """Refuse a name by its letters.

    Raises:
        DistillError: it is outside of the known packages, in a denied part of them, or private; and not trusted.
    """
    if name is None or name == "???" or _within(name, _trusted):
        return
    if not isinstance(name, str):
        raise DistillError(f"{where}: expected the dotted name of a class, got {name!r}")
    private = any(part.startswith("_") for part in name.split("."))
    if "${" in name or private or not _within(name, known) or _within(name, DENIED):
        raise _refusal(name, where)


def _refusal(name: str, where: str, why: str = "") -> DistillError:
    return DistillError(
        f"{where}={name}: {why or 'this name is not among what a configuration may call'}. Expected a public class of "
        f"{', '.join(PACKAGES)} that neither fetches, unpickles nor starts anything by itself; if you know this code and want "
        f"it to run, add trust=[{name}] to the command line"
    )


def admit(node: Any, where: str = "") -> None:
    """Judge all that a resolved, plain node would call, by its letters and by what it really is.

    Raises:
        DistillError: it may not be called, or there is none of that name.
    """
    for below, key, value in entries(node, where):
        if key == "_target_":
            judge_name(value, below)
            constructor(value, below)
        elif isinstance(value, str) and "${" in value:
            raise DistillError(
                f"{below}={value}: an interpolation that is written so as to be resolved later; write it plainly"
            )


def constructor(name: Any, where: str) -> Any:
    """What a name means: a class that an allowed package itself defines, or what is trusted.

    Raises:
        DistillError: it is something else, or there is none of that name.
    """
    if not isinstance(name, str):
        raise DistillError(f"{where}: expected the dotted name of a class, got {name!r}")
    try:
        found = _found(name, where)
    except DistillError:
        raise
    except Exception as error:  # whatever the import of a module of the user's own raises
        raise DistillError(f"{where}: {name} cannot be imported: {error}") from error
    own = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if callable(found) and (name in _trusted or _within(own, _trusted)):
        return found
    if own in OURS:
        return found
    if not inspect.isclass(found):
        raise _refusal(name, where, f"this is no class, but {own if callable(found) else type(found).__name__}")
    if not _within(own, PACKAGES) or _within(own, DENIED):
        raise _refusal(name, where, f"this is {own}")
    return found


def _found(name: str, where: str) -> Any:
    """The object, reached through modules of the packages alone: that a module imports another makes it no part of it."""
    first, *rest = name.split(".")
    roots = (*PACKAGES, *(name.split(".")[0] for name in _trusted))
    found: Any = import_module(first)
    for part in rest:
        try:
            found = getattr(found, part)
        except AttributeError:
            if not isinstance(found, ModuleType):
                raise
            found = import_module(f"{found.__name__}.{part}")
        if isinstance(found, ModuleType) and not _within(found.__name__, roots) and name not in _trusted:
            raise _refusal(name, where, f"it leads out, to the module {found.__name__}")
    return found
