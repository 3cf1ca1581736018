"""Whatever a method reads of a teacher, the folded one with its channels last gives it the same terms."""

from __future__ import annotations

import pytest

from conftest import TINY_DATA, TINY_HEADS, TINY_MODEL
from distill import bench
from distill.cli import config
from distill.cli.bench import _losses, _teacher, untrained
from distill.cli.teacher import guest
from distill.types import DistillError

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


@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_gives_the_terms_of_the_plain_teacher(pair: str) -> None:
    base = [*PAIRS[pair], *TINY_DATA, *TINY_MODEL, "data.workers=0"]
    cfg = config.composed(base)
    data = config.build(cfg.data)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    student, cheap = untrained(cfg.model, data, min_size=64, max_size=64), _teacher(cfg, data, batch)
    assert cheap is not None
    bench.settle(student, batch)
    plain = guest(
        config.composed([*base, "teacher.fold=false", "teacher.channels_last=false"]), cheap.detector, "plain"
    )
    schedule, left = config.build(cfg.schedule), set()
    for option in set(config.groups()["distill"]) - {"none"}:
        adapter = ["distill.losses.dsig.adapter.kernel=1"] if option.startswith("dsig") else []  # for unequal necks
        try:
            losses = _losses(config.composed([*base, f"distill={option}", *adapter]), data, student, cheap)
        except DistillError:
            left.add(option)
            continue
        steps = [bench.Step(student, teacher, losses, batch, schedule) for teacher in (plain, cheap)]
        expected, found = (float(step.distilled(student.view(batch, seed=0), step.teacher_view())) for step in steps)
        assert found == pytest.approx(expected, rel=1e-5), option
    assert left == NOT_HERE[pair]
