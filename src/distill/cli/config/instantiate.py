"""Builds objects from nodes of the configuration. All objects that a configuration describes are built here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cli.config import target_policy
from distill.type_checks import type_errors, unknown_options
from distill.types import DistillError

if TYPE_CHECKING:
    import torch

ARGUMENT_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    ImportError,
    OSError,
)
"""Exceptions that a constructor may raise for arguments of a wrong type or value."""


def build_node(node: Any, **given: Any) -> Any:
    """Call the constructor that a node names.

    Args:
        node: a mapping with ``_target_``; its other keys are arguments.
        given: further arguments, known at run time only.

    Raises:
        DistillError: raised by the constructor, or the arguments do not fit. The message then names the target.
    """
    options = _checked_options(node)
    returns_partial = options.get("_partial_") is True
    try:
        # Run-time arguments are not passed through Hydra, which would convert a dataclass among them into a dict.
        make = instantiate(node, _partial_=True, _convert_="all")
        if not returns_partial:
            return make(**given)
        with suppress(ValueError):  # functions written in C may have no signature
            inspect.signature(make.func).bind_partial(*make.args, **make.keywords)
        return make
    except DistillError:
        raise
    except InstantiationException as error:
        if isinstance(error.__cause__, DistillError):
            raise error.__cause__ from None
        raise DistillError(f"{node.get('_target_')} could not be built: {error.__cause__ or error}") from error
    except ARGUMENT_ERRORS as error:
        raise DistillError(f"{node.get('_target_')} could not be built: {error or type(error).__name__}") from error


def prepare_node(node: Any) -> Callable[..., Any]:
    """Check the target and options of a node now. Return a function that builds it later, with run-time arguments.

    Raises:
        DistillError: the target does not exist, or its options have unknown names or wrong types.
    """
    _checked_options(node)
    return partial(build_node, node)


def _checked_options(node: Any) -> dict[str, Any]:
    _require_target(node)
    options: dict[str, Any] = to_containers(node)
    target_policy.validate_targets(options, _full_key(node))
    _validate_options(options, _full_key(node))
    return options


def _validate_options(options: Any, where: str) -> None:
    """Refuse unknown options, and options of a wrong type, for constructors of distill and of Lightning."""
    nodes = [(where, options), *((below, value) for below, _, value in target_policy.walk(options, where))]
    for below, node in nodes:
        if isinstance(node, dict) and str(node.get("_target_")).startswith(("distill.", "lightning.")):
            target = target_policy.load_class(node["_target_"], f"{below}._target_")
            if unknown := unknown_options(target, node):
                raise DistillError(_unknown_message(below, node["_target_"], unknown))
            # A nested node has the type of the object that is built from it, so the mapping itself is not compared.
            given = {key: value for key, value in node.items() if not (value == "???" or "_target_" in str(value))}
            if wrong := type_errors(target, given):
                raise DistillError(f"{below or node['_target_']}: {'; '.join(wrong)}")


def _unknown_message(where: str, target: str, names: list[str]) -> str:
    message = f"{target} has no option {', '.join(names)}"
    if not where:  # a mapping that was taken out of the configuration
        return message
    removed = " ".join(f"~{where}.{name}" for name in names)
    return f"{where}: {message}. If an experiment or another option sets this, add to the command: {removed}"


def load_target(node: Any) -> Any:
    """The class that a node names, without building it.

    Raises:
        DistillError: the class does not exist, or a configuration may not name it.
    """
    _require_target(node)
    return target_policy.load_class(node.get("_target_"), f"{_full_key(node)}._target_".lstrip("."))


def _require_target(node: Any) -> None:
    if not (isinstance(node, dict) or OmegaConf.is_dict(node)) or node.get("_target_") is None:
        raise DistillError(
            f"{_full_key(node) or 'a part of the configuration'}: expected a mapping whose _target_ names a class, got "
            f"{node}"
        )


def named_nodes(node: Any) -> dict[str, Any]:
    """The nodes of a mapping by name, without null and empty ones.

    Raises:
        DistillError: the node is not a mapping.
    """
    if node is not None and not OmegaConf.is_dict(node):
        raise DistillError(f"expected a mapping of names to parts, as in the files of conf, got {node}")
    return {str(name): value for name, value in (node or {}).items() if value is not None and value != {}}


def _full_key(node: Any) -> str:
    return str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""


def without_weights(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which a detector is built with random weights, whatever weights its options name."""
    backbone = model.get("backbone", {})
    if isinstance(backbone, Mapping):  # the constructor refuses anything else
        backbone = {**backbone, "weights": None}
    return {"weights": None, "backbone": backbone}


def trainer_device(cfg: DictConfig) -> torch.device:
    """The device of the run's trainer: CUDA if available and not excluded, otherwise the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")


def to_containers(node: Any) -> Any:
    """A node as plain Python containers, with all interpolations resolved.

    Raises:
        DistillError: an interpolation cannot be resolved.
    """
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        where = _full_key(node) or "the configuration"
        raise DistillError(f"{where}: cannot be resolved: {str(error).splitlines()[0]}") from error
