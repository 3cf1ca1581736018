"""Builds objects from nodes of the configuration. Every object of a run that a configuration describes is built here."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cli import target_policy
from distill.type_checks import type_errors
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
"""What constructors raise at arguments of a kind that they do not foresee."""


def build_node(node: Any, **given: Any) -> Any:
    """Call the constructor that a node names. Every object of a run is built here; ``given`` are run-time arguments.

    Raises:
        DistillError: the constructor's own, or one that names the target where the arguments do not fit it.
    """
    _require_target(node)
    options = to_containers(node)
    partial = options.get("_partial_") is True
    target_policy.validate_targets(options, _full_key(node))
    _validate_types(options, _full_key(node))
    try:
        # Run-time arguments are handed over by the call itself: Hydra would turn a dataclass among them into a dict.
        make = instantiate(node, _partial_=True, _convert_="all")
        if not partial:
            return make(**given)
        with suppress(ValueError):  # some functions of C tell nothing of their parameters
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


def _validate_types(options: Any, where: str) -> None:
    """Refuse options of a kind that a constructor of ours or of Lightning's does not take, before it falls over them."""
    nodes = [(where, options), *((below, value) for below, _, value in target_policy.walk(options, where))]
    for below, node in nodes:
        if isinstance(node, dict) and str(node.get("_target_")).startswith(("distill.", "lightning.")):
            # What is built in turn is not judged by the mapping that describes it.
            given = {key: value for key, value in node.items() if not (value == "???" or "_target_" in str(value))}
            if wrong := type_errors(target_policy.load_class(node["_target_"], f"{below}._target_"), given):
                raise DistillError(f"{below}: {'; '.join(wrong)}")


def load_target(node: Any) -> Any:
    """The constructor that a node names.

    Raises:
        DistillError: there is none of that name, or none that a configuration may call.
    """
    _require_target(node)
    return target_policy.load_class(node.get("_target_"), f"{_full_key(node)}._target_".lstrip("."))


def _require_target(node: Any) -> None:
    if not (isinstance(node, dict) or OmegaConf.is_dict(node)) or node.get("_target_") is None:
        raise DistillError(
            f"{_full_key(node) or 'a part of the configuration'}: expected a mapping whose _target_ names a class, got {node}"
        )


def named_nodes(node: Any) -> dict[str, Any]:
    """The nodes of a mapping by name, without those that are null or empty.

    Raises:
        DistillError: it is no mapping.
    """
    if node is not None and not OmegaConf.is_dict(node):
        raise DistillError(f"expected a mapping of names to parts, as in the files of conf, got {node}")
    return {str(name): each for name, each in (node or {}).items() if each is not None and each != {}}


def _full_key(node: Any) -> str:
    return str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""


def trainer_device(cfg: DictConfig) -> torch.device:
    """Where the run's trainer would compute, as far as one device goes."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")


def to_containers(node: Any) -> Any:
    """Plain containers with all interpolations resolved.

    Raises:
        DistillError: one of them leads nowhere.
    """
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        where = _full_key(node) or "the configuration"
        raise DistillError(f"{where}: cannot be resolved: {str(error).splitlines()[0]}") from error
