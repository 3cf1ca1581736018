"""Runs a step again from the file that a stopped run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.files import load_tensors
from distill.precision import autocast
from distill.run_folder import RunFolder
from distill.training.nonfinite import KIND, poison_gradient
from distill.types import Batch, DistillError, Target


def read_step(file: Path) -> dict[str, Any]:
    """What `NonFiniteGuard` wrote of a step. Only tensors and plain containers are read: such a file cannot run code.

    Raises:
        DistillError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise DistillError(
            f"{file}: there is no such file; a run that was stopped names its own, {RunFolder('RUN').non_finite}/step….pt"
        )
    step = load_tensors(file)
    if not isinstance(step, Mapping) or step.get("kind") != KIND:
        raise DistillError(
            f"{file} holds no step: expected a file that a stopped run left below {RunFolder('RUN').non_finite}"
        )
    return dict(step)


def replay(module: Any, step: Mapping[str, Any], device: torch.device | str = "cpu") -> list[dict[str, float]]:
    """Do a step's forward and backward passes again, from its own weights; no weight changes.

    Gradients are left on the parameters, added up over the batches. Counts that run over all processes
    (``normalizer="global"``) are those of this process alone.

    Args:
        module: a `Distiller` built as the run's.
        step: from `read_step`.
        device: where to do it.

    Returns:
        the unweighted terms of each batch.

    Raises:
        DistillError: the module is another one than the step's.
    """
    if module.student.describe() != step["student"]:
        raise DistillError("replay: the step was done by another student; build it from the run's own configuration")
    module.load_state_dict(step["state_dict"])
    module.to(device).train()
    module.zero_grad()
    module.set_epoch(step["epoch"])
    found = []
    for each in step["batches"]:
        with autocast(step["precision"], torch.device(device)):
            result = module.compute_step(_batch(each).to(device), each["draw"], each["progress"])
        torch.autograd.backward(poison_gradient(result.loss))
        found.append({name: value.item() for name, value in result.terms.items()})
    return found


def _batch(plain: Mapping[str, Any]) -> Batch:
    targets = tuple(Target(**target) for target in plain["targets"])
    return Batch(plain["images"], plain["sizes"], plain["original_sizes"], targets, plain["ids"])
