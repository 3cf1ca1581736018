"""A student and a teacher of each kind, untrained, and the losses of every distill option that fits them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from distill.cli.config import compose, override_checks
from distill.cli.config.instantiate import without_weights
from distill.cli.reports.bench_measurement import bench_teacher
from distill.cli.runs.assembly import assemble, build_student
from distill.cli.runs.preflight import plan_run
from distill.diagnostics.bench.measure import set_norm_statistics
from distill.types import DistillError
from helpers.grids import exhaustive
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL

PAIRS = {
    "two-stage": ["model=frcnn_r10_mini", "teacher=frcnn_r18_mini", *TINY_HEADS],
    "one-stage": ["model=retinanet_r10_quarter", "teacher=retinanet_r18"],
}
QUERIES = ("detr_assignment", "detr_corners", "detr_features", "detr_logits", "detr_points")
"""Options for detectors with queries."""
NOT_HERE = {
    "two-stage": {
        *("adl", "bckd", "crosskd", "crosskd_fcos", "cwd_logits", "dicod", "foundation", "foundation_dinov3"),
        *("dsig_retinanet", "dsig_retinanet_small", "ld", "ld_fcos", *QUERIES),
    },
    "one-stage": {
        *("chen", "defeat_full", "dicod", "foundation", "foundation_dinov3", "global_knowledge", "mimic", "tadf"),
        *("best", "dsig", "dsig_r50_r101", "dsig_r101_r152", "ld", "ld_fcos", *QUERIES),
    },
}
"""Options that do not fit the pair: of a model of its own, of the other kind of detector, of distributions or queries.
"""

ONE_OF_EACH_METHOD = {
    "two-stage": (
        *("chen", "defeat_full", "dsig", "fgfi", "global_knowledge", "mimic", "pad_mimic", "ssim", "ssim_masked"),
        "tadf",
    ),
    "one-stage": ("defeat", "dsig_retinanet", "fgfi", "mimic_neck", "pad_fgfi", "ssim", "tadf_neck"),
}
OPTIONS = [*ONE_OF_EACH_METHOD.items(), *(exhaustive((name, ())) for name in PAIRS)]
"""(pair, options) for tests: one option of each method daily, all options in the exhaustive tests."""


class Pair:
    """What a step of the pair needs."""

    def __init__(self, name: str) -> None:
        self.name, self.lines = name, [*PAIRS[name], *TINY_DATA, *TINY_MODEL, "data.workers=0"]
        plan = plan_run(override_checks.compose_without_run(self.lines))
        self.data, self.schedule = plan.data, plan.schedule
        self.data.setup("fit")
        self.batch = next(iter(self.data.train_dataloader()))
        self.student = build_student(plan, self.data, **without_weights(plan.config["model"]))
        teacher = bench_teacher(plan, self.data, self.batch)
        assert teacher is not None
        self.teacher = teacher
        set_norm_statistics(self.student, self.batch)
        self.student.train()

    def losses(self, options: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
        """Each of these options with its losses. Without options: every option that fits, which is verified."""
        left = set()
        for option in sorted(options or set(compose.config_groups()["distill"]) - {"none"}):
            plan = plan_run(compose.compose_config([*self.lines, f"distill={option}", "paths.run=run"]))
            try:
                module = assemble(plan, self.data, self.student, self.teacher)
            except DistillError:
                left.add(option)
                continue
            module.start_epoch(0, self.data)
            yield option, module.losses
        assert left == (set() if options else NOT_HERE[self.name])
