"""How strongly each loss term acts on the student's neck: the norm of its gradient there, and its share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.types import Pyramid, View


def head_maps(view: View) -> Pyramid:
    """The maps that the heads read: the neck, or the body of a detector without a neck."""
    return view.neck if "neck" in view.spec.outputs else view.body


def trained_maps(view: View) -> list[Tensor]:
    """All maps of the body and the neck that have a gradient."""
    neck = view.neck.values() if "neck" in view.spec.outputs else ()
    return [x for x in (*view.body.values(), *neck) if x.requires_grad]


def neck_gradient_norms(
    student: View, terms: Mapping[str, Tensor], weights: Mapping[str, float], scale: float = 1.0
) -> dict[str, Tensor]:
    """Norm of each weighted term's gradient at the neck: ``weight * sqrt(sum of (d term / d x)^2)``.

    The sum runs over all elements x of all maps of the neck (of the body, if there is no neck). The graph is kept, and
    the gradients of the weights do not change. Each term costs a backward pass from the term to the neck.

    Args:
        student: the student's View of the batch.
        terms: unweighted scalars, attached to the graph.
        weights: factor of each term in the loss.
        scale: loss scale of fp16, by which a term is multiplied before its backward pass, and its gradient divided
            after it. Without it, small gradients are 0 in fp16.

    Returns:
        Scalars (float64, float32 on MPS) on the student's device. 0 for a term that does not reach the neck.
    """
    maps = [x for x in head_maps(student).values() if x.requires_grad]
    return {name: abs(weights[name]) / scale * _gradient_norm(scale * term, maps) for name, term in terms.items()}


def _gradient_norm(term: Tensor, maps: list[Tensor]) -> Tensor:
    number = torch.float32 if term.device.type == "mps" else torch.float64  # MPS has no float64
    if not term.requires_grad or not maps:
        return torch.zeros((), dtype=number, device=term.device)
    gradients = torch.autograd.grad(term, maps, retain_graph=True, allow_unused=True)
    squares = [x.to(number).square().sum() for x in gradients if x is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=number, device=term.device)


def shares(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each norm divided by the sum of all norms, in [0, 1]; zeros if all norms are 0."""
    total = torch.stack(list(norms.values())).sum()
    return {name: torch.where(total > 0, norm / total, torch.zeros_like(total)) for name, norm in norms.items()}
