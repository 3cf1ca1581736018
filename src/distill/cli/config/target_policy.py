"""The classes that a configuration may name.

Configuration files are shared and copied, so a file must not be able to run code of its author's choice. Three rules:

- A ``_target_`` is a class that one of the `ALLOWED` packages defines, or that a trusted package defines: an installed
  plugin (see `distill.plugins`), or a name that ``trust=[package]`` allows.
- ``trust`` counts on the command line only. A file that sets it is refused.
- Hydra acts on its own node (callbacks, launcher, logging, environment) before a run begins. Files may set only the
  `FILE_KEYS` of that node, and the keys of a sweep.

`validate_config` checks spelling and origin of names, without an import, before Hydra or a run acts on a configuration.
`load_class` checks what a name refers to when an object is built: ``torch.os.system`` is spelled like a part of torch.
Hydra's own block list stays active inside `hydra.utils.instantiate`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_object

from distill import plugins
from distill.types import DistillError

ALLOWED = (
    *("distill.data", "distill.detectors", "distill.losses", "distill.evaluation", "distill.training"),
    *("torch.nn", "torch.optim", "torchvision.models", "torchvision.ops", "torchvision.transforms"),
    *(
        f"lightning.pytorch.{part}"
        for part in ("callbacks", "loggers", "plugins", "profilers", "strategies", "trainer")
    ),
    *("torchmetrics.aggregation", "torchmetrics.classification", "torchmetrics.detection"),
    "distill.training.callbacks.consistency.exchange_timeout",  # a function, so it is allowed by its full name
)
"""Packages whose classes a configuration may name. None of these classes downloads, unpickles or starts anything."""
ALLOWED_IN_HYDRA = ("hydra_plugins", "optuna.samplers", "optuna.pruners")
"""Packages whose classes the ``hydra`` node may name: plugins, which Hydra always imports, and parts of Optuna."""
HYDRA_DEFAULTS = (
    "distill.cli.runs.sweep.SweepTable",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
)
"""Classes that the ``hydra`` node names by default."""
FILE_KEYS = ("run", "sweep", "mode", "verbose")
"""Keys of the ``hydra`` node that a file may set, besides ``sweeper.params``."""
TRUST = re.compile(r"\[\s*(NAME(\s*,\s*NAME)*)?\s*\]|NAME".replace("NAME", r"[^\W\d]\w*(\.\w+)*"))
"""Value of ``trust``: ``[NAME, …]`` or ``NAME``."""

COMMAND_LINE_KEYS = ("hydra", "trust", "config_dirs")
"""Prefixes of keys that count on the command line only."""


def set_trusted(command_line: Sequence[str]) -> None:
    """Store the names of ``trust=[…]``, in place of those stored before. Call this with the command line only.

    Raises:
        DistillError: a value is not the name of a package, a module or a constructor.
    """
    names: list[str] = []
    for word in command_line:
        key, _, value = word.lstrip("+").partition("=")
        if key == "trust":
            if not TRUST.fullmatch(value):
                raise DistillError(f"'{word}': expected names of packages or constructors, as in trust=[my_package]")
            names += re.findall(r"[\w.]+", value)
    plugins.set_trusted(names)


def validate_config(config: dict[str, Any], overrides: Sequence[str], default_hydra: Mapping[str, Any]) -> None:
    """Refuse a composed configuration whose files break the rules.

    Args:
        config: all nodes including ``hydra``, not resolved.
        overrides: the words that composed the configuration.
        default_hydra: the ``hydra`` node composed of the same words on Hydra alone, without any other group or key.

    Raises:
        DistillError: names the key, and the override that allows the setting on the command line.
    """
    tasks = {key: node for key, node in config.items() if key != "hydra"}
    trust, known = tasks.get("trust"), (None, *plugins.trusted_by_command_line())
    if foreign := [name for name in (trust if isinstance(trust, list) else [trust]) if name not in known]:
        raise DistillError(
            f"a configuration file sets trust={foreign}: trust counts on the command line only. If you know this code "
            f"and want it to run, add trust=[{','.join(map(str, foreign))}] to the command line"
        )
    if tasks.get("config_dirs") and not any(word.startswith("config_dirs=") for word in overrides):
        raise DistillError("a configuration file sets config_dirs: only the command line may name folders of options")
    for where, name in _target_names(tasks):
        _validate_name(name, where)
    hydra, sweeper = config["hydra"], config["hydra"]["sweeper"]
    sweep_keys = sweeper.get("params") if isinstance(sweeper, dict) else None
    given = [word for word in overrides if word not in default_hydra["overrides"]["hydra"]]
    allowed = {**default_hydra, **{key: hydra[key] for key in (*FILE_KEYS, "runtime")}}
    allowed["sweeper"] = {**default_hydra["sweeper"], "params": sweep_keys}
    allowed["overrides"] = {**default_hydra["overrides"], "task": given}
    allowed["job"] = {**default_hydra["job"], "override_dirname": hydra["job"]["override_dirname"]}
    if changed := next(_differing_keys(hydra, allowed, "hydra"), None):
        raise DistillError(
            f"a configuration file sets {changed}, and Hydra acts on this key before anything is checked. Files may "
            f"set {', '.join(f'hydra.{key}' for key in FILE_KEYS)} and hydra.sweeper.params. If you want "
            f"the setting, say {changed}=… on the command line"
        )
    if sweep_keys != default_hydra["sweeper"].get("params"):
        for where, key, value in walk({"params": sweep_keys}, "hydra.sweeper"):  # they become overrides of the jobs
            if str(key).lstrip("+~").startswith(COMMAND_LINE_KEYS) or "${" in str(value):
                raise DistillError(f"a configuration file sets {where}; only the command line may sweep over this key")
    for where, name in _target_names(hydra, "hydra"):
        if name not in HYDRA_DEFAULTS:
            load_class(name, where, ALLOWED_IN_HYDRA)


def _differing_keys(node: Any, other: Any, where: str) -> Iterator[str]:
    if isinstance(node, dict) and isinstance(other, dict):
        for key, value in node.items():
            yield from _differing_keys(value, other.get(key), f"{where}.{key}")
    elif node != other:
        yield where


def walk(node: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Full key, key and value of every entry below a node of plain containers, in lists too."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        full_key = f"{where}.{key}" if where else str(key)
        yield full_key, key, value
        yield from walk(value, full_key)


def _target_names(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    targets = ((full_key, value) for full_key, key, value in walk(node, where) if key == "_target_")
    return ((full_key, name) for full_key, name in targets if name not in (None, "???"))


def validate_targets(node: Any, where: str = "") -> None:
    """Check all names below a resolved node, by spelling and by what they refer to, before the node is built.

    Raises:
        DistillError: a name is not allowed, or does not exist.
    """
    for full_key, key, value in walk(node, where):
        if key == "_target_":
            load_class(value, full_key)
        elif isinstance(value, str) and "${" in value:
            raise DistillError(
                f"{full_key}={value}: this text would be resolved a second time. Write the value without "
                "an escaped '${'"
            )


def load_class(name: Any, where: str, allowed: Sequence[str] = ALLOWED) -> Any:
    """Import the class that a name refers to.

    Raises:
        DistillError: the name does not exist, is not a class, or is defined outside the allowed and trusted packages.
    """
    _validate_name(name, where, allowed)
    try:
        target = plugins.import_trusted(name) if plugins.is_trusted(name) else get_object(name)
    except Exception as error:  # the import of a user's module may raise anything
        raise DistillError(f"{where}: {name} cannot be imported: {error}") from error
    origin = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    if callable(target) and (name in plugins.trusted_by_command_line() or plugins.is_trusted(origin)):
        return target
    if origin in allowed or (inspect.isclass(target) and plugins.is_within(origin, allowed)):
        return target
    raise _refusal(name, where, f"this is {origin if callable(target) else type(target).__name__}")


def _validate_name(name: Any, where: str, allowed: Sequence[str] = ALLOWED) -> None:
    """Check the spelling, so that no module outside of the allowed packages is imported for the look-up of a name."""
    if not isinstance(name, str):
        raise DistillError(f"{where}: expected the dotted name of a class, got {name!r}")
    if plugins.is_trusted(name):
        return
    first, *parts = name.split(".")
    public = all(part.isidentifier() and not part.startswith("_") for part in parts)
    if not public or first not in {package.split(".")[0] for package in allowed}:
        raise _refusal(name, where, "a configuration may not name this")


def _refusal(name: str, where: str, why: str) -> DistillError:
    return DistillError(
        f"{where}={name}: {why}. Expected a public class of {', '.join(ALLOWED)}. If you know this code and want it to "
        f"run, add trust=[{name}] to the command line"
    )
