"""A student and a teacher of each kind, untrained, and the losses of every distill option that fits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from distill.cli import compose
from distill.cli.bench import _losses, _teacher, untrained
from distill.diagnostics.bench.measure import settle
from distill.types import DistillError
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL

PAIRS = {
    "two-stage": ["model=frcnn_r10_mini", "teacher=frcnn_r18_mini", *TINY_HEADS],
    "one-stage": ["model=retinanet_r10_quarter", "teacher=retinanet_r18"],
}
NOT_HERE = {
    "two-stage": {"dicod", "dsig_retinanet", "dsig_retinanet_small"},
    "one-stage": {
        *("chen", "defeat_full", "dicod", "global_knowledge", "mimic", "tadf"),
        *("dsig", "dsig_r50_r101", "dsig_r101_r152"),
    },
}
"""Options that do not fit the pair: of a classifier, of the other kind of detector."""


class Pair:
    """What a step of the pair needs."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.lines = name, [*PAIRS[name], *TINY_DATA, *TINY_MODEL, "data.workers=0"]
        self.cfg = compose.composed(self.lines)
        self.data = compose.build(self.cfg.data)
        self.data.setup("fit")
        self.batch = next(iter(self.data.train_dataloader()))
        self.student = untrained(self.cfg.model, self.data, min_size=64, max_size=64)
        teacher = _teacher(self.cfg, self.data, self.batch)
        assert teacher is not None
        self.teacher = teacher
        settle(self.student, self.batch)
        self.student.train()
        self.schedule = compose.build(self.cfg.schedule)

    def losses(self) -> Iterator[tuple[str, Any]]:
        """Every option with its losses; that no other one is left out is seen to."""
        left = set()
        for option in sorted(set(compose.groups()["distill"]) - {"none"}):
            cfg = compose.composed([*self.lines, f"distill={option}"])
            try:
                losses = _losses(cfg, self.data, self.student, self.teacher)
            except DistillError:
                left.add(option)
                continue
            yield option, losses
        assert left == NOT_HERE[self.name]
