"""State dicts: safe reading from a file, and loading into a module with a report of every difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.files import load_tensors
from distill.run_folder import DESCRIPTION
from distill.types import DistillError

State = Mapping[str, Tensor]

ADVICE = (
    "Check family, depth, width and head sizes. If only the classes differ, a student can start its head afresh with "
    "model.head=new; a teacher must know all classes of the data."
)
"""Advice in the message about weights that do not fit."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file, see `extract_state`.

    Raises:
        DistillError: the file cannot be read, or it holds no state dict.
    """
    return extract_state(load_tensors(path), path)


def extract_state(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in the content of a file: the content itself, or its entry ``model`` or ``state_dict``.

    Common trainers write these entries. A prefix ``module.`` of the names is removed.

    Raises:
        DistillError: the content holds no state dict. The message names `path`.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DistillError(f"{path}: expected a state dict (names -> tensors), got {type(content).__name__}")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def fit(
    module: nn.Module,
    state: State,
    where: str,
    fresh: tuple[str, ...] = (),
    what: str = "detector",
    advice: str = ADVICE,
) -> None:
    """Load a state dict into a module. All names and shapes must match.

    Args:
        module: the module, changed in place.
        state: the state dict.
        where: the source of the weights, for the message.
        fresh: prefixes of names that may be missing.
        what: the kind of module, for the message.
        advice: the end of the message.

    Raises:
        DistillError: the message lists missing tensors, unexpected tensors, and tensors of another shape.
    """
    own = module.state_dict()
    state = _with_tied(module, state)
    # Frozen batch norms ignore this buffer of batch norms.
    missing, unexpected = (
        [name for name in names if not name.endswith(".num_batches_tracked")]
        for names in (own.keys() - state.keys(), state.keys() - own.keys())
    )
    shapes = [
        f"{name}: {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not shapes:
        try:  # torchvision renames tensors of older files while it loads: use its report
            missing, unexpected = module.load_state_dict(dict(state), strict=False)
        except RuntimeError as error:
            missing, unexpected, shapes = [], [], [str(error)]
    missing = [name for name in missing if not fresh or not name.startswith(fresh)]
    problems = [
        f"  {len(names)} {kind}: {'; '.join(sorted(names)[:10])}{' ...' if len(names) > 10 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise DistillError("\n".join([f"{where}: the weights do not fit this {what}.", *problems, advice]))


def without_tied(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module with each parameter once, under the first of its names."""
    repeated = {name for names in _tied_names(module) for name in names[1:]}
    return {name: value for name, value in module.state_dict().items() if name not in repeated}


def _tied_names(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _with_tied(module: nn.Module, state: State) -> State:
    """Add the other names of tied parameters, which files of transformers and of safetensors hold once."""
    found = dict(state)
    for names in _tied_names(module):
        known = next((name for name in names if name in state), None)
        found |= {name: state[known] for name in names if known is not None and name not in state}
    return found


def fit_sizes(module: nn.Module, state: State, where: str) -> None:
    """Raise an error if a module is far larger than its weights. Such a module must not be allocated.

    Raises:
        DistillError: the module has more than 2 n + 1000 values, where `state` has n. The message names `where`.
    """
    described, stored = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (module.state_dict(), state))
    if described > 2 * stored + 1000:
        raise DistillError(
            f"{where}: its {DESCRIPTION} describes {described} numbers, and the file holds {stored}. {ADVICE}"
        )
