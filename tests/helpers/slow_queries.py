"""Slow loops over boxes and logits of queries, written from the equations."""

from __future__ import annotations

import math


def slow_overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and generalized IoU of boxes (center x, center y, width, height)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    sides = [(ax - aw / 2, ax + aw / 2, bx - bw / 2, bx + bw / 2), (ay - ah / 2, ay + ah / 2, by - bh / 2, by + bh / 2)]
    inner = math.prod(max(0.0, min(s[1], s[3]) - max(s[0], s[2])) for s in sides)
    hull = math.prod(max(s[1], s[3]) - min(s[0], s[2]) for s in sides)
    union = aw * ah + bw * bh - inner
    return inner / union, inner / union - (hull - union) / hull


def slow_l1(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z) for z in row]
    return [power / sum(powers) for power in powers]


def slow_bce(student: list[float], teacher: list[float]) -> float:
    """Sum over classes of the cross-entropy with the teacher's sigmoids."""
    pairs = [(sigmoid(z), sigmoid(t)) for z, t in zip(student, teacher, strict=True)]
    return -sum(p * math.log(q) + (1 - p) * math.log(1 - q) for q, p in pairs)


def slow_kl(student: list[float], teacher: list[float], temperature: float) -> float:
    """``T^2 KL(teacher || student)`` of two rows of logits."""
    s, t = (softmax([z / temperature for z in row]) for row in (student, teacher))
    return temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(t, s, strict=True))
