"""The classes that a configuration may name.

Configuration files are shared and copied, so a file must not be able to run code of its author's choice. Three rules:

- A ``_target_`` is a class that one of the `ALLOWED` packages defines, or that a trusted package defines: an installed
  plugin (see `distill.plugins`), or a name that ``trust=[package]`` allows.
- ``trust`` counts on the command line only. A file that sets it is refused.
- Hydra acts on its own node (callbacks, launcher, logging, environment) before a run begins. Files may set only the
  `FREE_KEYS` of that node.

`validate_config` checks how names are spelled, without an import, before Hydra or a run acts on a configuration.
`load_class` checks what a name refers to when an object is built: ``torch.os.system`` is spelled like a part of torch.
Hydra's own policy is a list of forbidden names, which lets unknown ones pass. It stays active inside
`hydra.utils.instantiate`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_object

from distill import plugins
from distill.type_checks import leaves
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
FILE_KEYS = ("hydra.run", "hydra.sweep", "hydra.mode", "hydra.verbose", "hydra.sweeper.params")
"""Keys of the ``hydra`` node that a file may set."""
FREE_KEYS = tuple(f"{key}." for key in (*FILE_KEYS, "hydra.runtime", "hydra.job.override_dirname"))
"""Prefixes of these keys, and of those that Hydra fills from the other groups and keys."""
TRUST = re.compile(r"\[\s*(NAME(\s*,\s*NAME)*)?\s*\]|NAME".replace("NAME", r"[^\W\d]\w*(\.\w+)*"))
"""Value of ``trust``: ``[NAME, …]`` or ``NAME``."""

COMMAND_LINE_KEYS = ("hydra", "trust", "config_dirs")
"""Prefixes of keys that count on the command line only."""


def set_trusted(command_line: Sequence[str]) -> None:
    """Store the names of ``trust=[…]``, in place of those stored before. Call this with the command line only.

    Raises:
        DistillError: a value is not the name of a package, a module or a constructor.
    """
    words = [word for word in command_line if word.lstrip("+").startswith("trust=")]
    values = [word.partition("=")[2] for word in words]
    for word, value in zip(words, values, strict=True):
        if not TRUST.fullmatch(value):
            raise DistillError(f"'{word}': expected names of packages or constructors, as in trust=[my_package]")
    plugins.set_trusted(re.findall(r"[\w.]+", " ".join(values)))


def validate_config(
    config: Mapping[str, Any], overrides: Sequence[str], hydra: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Refuse a composed configuration whose files break the rules.

    Args:
        config: all nodes including ``hydra``, not resolved.
        overrides: the words that composed the configuration.
        hydra: the ``hydra`` node of the same words on Hydra alone, without any other group or key.
        own: the ``hydra`` node of no words: its classes are Hydra's and distill's own.

    Raises:
        DistillError: names the key, and the override that allows the setting on the command line.
    """
    for key in ("trust", "config_dirs"):
        if config.get(key) and not any(word.lstrip("+").startswith(f"{key}=") for word in overrides):
            raise DistillError(
                f"a configuration file sets {key}={config[key]}: {key} counts on the command line only. If you know "
                f"this code and want it to run, add {key}=… to the command line"
            )
    for where, name in _target_names({key: node for key, node in config.items() if key != "hydra"}):
        _validate_name(name, where)
    expected = dict(leaves({"hydra": hydra}))
    for key, value in leaves({"hydra": config["hydra"]}):
        if not f"{key}.".startswith(FREE_KEYS) and (key not in expected or value != expected[key]):
            raise DistillError(
                f"a configuration file sets {key}, and Hydra acts on this key before anything is checked. Files may "
                f"set {', '.join(FILE_KEYS)}. If you want the setting, say {key}=… on the command line"
            )
    params = config["hydra"]["sweeper"].get("params")
    if params != hydra["sweeper"].get("params"):
        for where, key, value in walk(params if isinstance(params, dict) else {"params": params}):
            if str(key).lstrip("+~").startswith(COMMAND_LINE_KEYS) or "${" in str(value):
                raise DistillError(
                    f"a configuration file sets hydra.sweeper.params.{where}; only the command line may sweep over this"
                )
    trusted = {name for _, name in _target_names(own)}
    for where, name in _target_names(config["hydra"], "hydra"):
        if name not in trusted:
            load_class(name, where, ALLOWED_IN_HYDRA)


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
    is_trusted = callable(target) and (name in plugins.trusted_by_command_line() or plugins.is_trusted(origin))
    if is_trusted or origin in allowed or (inspect.isclass(target) and plugins.is_within(origin, allowed)):
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
