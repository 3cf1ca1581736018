"""Losses of queries that a detector's own criterion and distillation share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 5.0
"""Of corner distributions, in D-FINE's released code."""


def varifocal_loss(logits: Tensor, quality: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """VFL: the target of a matched query's class is its box's IoU q with the object.

    ::

        VFL(p, q) = -q (q log p + (1 - q) log(1 - p))    matched class
        VFL(p)    = -alpha p^gamma log(1 - p)            all others

    Source: Zhang et al., "VarifocalNet", 2021, arXiv 2008.13367, equation 2, as RT-DETR (2304.08069) uses it: alpha =
    0.75, gamma = 2. No gradient flows through q and the factor p^gamma.

    Args:
        logits: (..., K).
        quality: (..., K), q at matched classes, else 0.
        positive: (..., K) bool, true at matched classes.

    Returns:
        the sum over all entries.
    """
    weight = torch.where(positive, quality, alpha * logits.detach().sigmoid() ** gamma)
    return F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="sum")


def corner_divergence(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))``, averaged over the sides; (..., 4, bins) of both -> (...)."""
    target = (teacher / temperature).log_softmax(-1)
    given = (student / temperature).log_softmax(-1)
    return temperature**2 * (target.exp() * (target - given)).sum(-1).mean(-1)


def balanced_mean(
    values: Tensor, positive: Tensor, counts: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``(sqrt(m_pos) mean_pos + sqrt(m_neg) mean_neg) / (sqrt(m_pos) + sqrt(m_neg))``, of this process's values.

    Args:
        values: (...).
        positive: (...) bool.
        counts: numbers of positive and negative values over all processes, as scalars.
        weights: m_pos and m_neg; None: the counts.
    """
    roots = [number.sqrt() for number in weights or counts]
    sums = (values * positive).sum(), (values * ~positive).sum()
    means = [root * total / count.clamp(min=1) for root, total, count in zip(roots, sums, counts, strict=True)]
    return sum(means, values.new_zeros(())) / (roots[0] + roots[1]).clamp(min=1)
