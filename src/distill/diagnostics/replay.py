"""Replay of a training step from the file that a stopped run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.files import load_tensors
from distill.precision import autocast_context
from distill.run_folder import RunFolder
from distill.training.nonfinite import FILE_KIND, poison_gradient
from distill.types import Batch, DistillError, MissingTargets, Target


def read_step(file: Path) -> dict[str, Any]:
    """Read the step that `NonFiniteGuard` wrote. Only tensors and plain containers are loaded, so that no code can run.

    Raises:
        DistillError: the file does not exist, or it holds no step.
    """
    if not file.is_file():
        raise DistillError(
            f"{file}: there is no such file; a stopped run names its file, {RunFolder('RUN').non_finite}/step….pt"
        )
    step = load_tensors(file)
    if not isinstance(step, Mapping) or step.get("kind") != FILE_KIND:
        raise DistillError(
            f"{file} holds no step: expected a file that a stopped run left below {RunFolder('RUN').non_finite}"
        )
    return dict(step)


def replay(module: Any, step: Mapping[str, Any], device: torch.device | str = "cpu") -> list[dict[str, float]]:
    """Repeat the forward and backward passes of a step with its own weights. No weight changes.

    The gradients of all batches are summed and stay on the parameters. Counts over all processes
    (``normalizer="global"``) cover this process only.

    Args:
        module: a `Distiller` with the run's configuration.
        step: the step that `read_step` returns.
        device: the device of the computation.

    Returns:
        For each batch, term name -> unweighted value.

    Raises:
        DistillError: the student of the step and the student of the module differ.
    """
    if module.student.describe() != step["student"]:
        raise DistillError("replay: the step has another student; build the student from the run's own configuration")
    module.load_state_dict(step["state_dict"])
    module.to(device).train()
    module.zero_grad()
    module.set_epoch(step["epoch"])
    if module.balance and step.get("balance"):
        module.balance.load_state_dict(step["balance"])
    terms = []
    for record in step["batches"]:
        with autocast_context(step["precision"], torch.device(device)):
            result = module.compute_step(_batch(record).to(device), record["draw"], record["progress"])
        torch.autograd.backward(poison_gradient(result.loss))
        terms.append({name: value.item() for name, value in result.terms.items()})
    return terms


def _batch(record: Mapping[str, Any]) -> Batch:
    missing, unlabeled = record["targets"] is None, record.get("unlabeled")
    targets = MissingTargets() if missing else tuple(Target(**target) for target in record["targets"])
    parts = (record["images"], record["sizes"], record["original_sizes"], targets, record["ids"])
    return Batch(*parts, unlabeled=None if unlabeled is None else _batch(unlabeled))
