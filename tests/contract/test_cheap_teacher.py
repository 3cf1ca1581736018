"""Every method gives the same terms with the folded, channels-last teacher as with the plain one."""

from __future__ import annotations

import pytest

from distill.cli.config import override_checks
from distill.cli.runs.preflight import plan_teacher
from distill.cli.runs.teacher_cache import as_teacher
from distill.diagnostics.bench.step import Step
from distill.training.distiller import Distiller
from helpers.detector_pairs import OPTIONS, Pair


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_method_gives_the_terms_of_the_plain_teacher(name: str, options: tuple[str, ...]) -> None:
    pair = Pair(name)
    switched_off = override_checks.compose_without_run(
        [*pair.lines, "teacher.fold=false", "teacher.channels_last=false"]
    )
    plan = plan_teacher(switched_off)
    assert plan is not None
    plain = as_teacher(plan, pair.teacher.detector, "plain")
    for option, losses in pair.losses(options):
        modules = [Distiller(pair.student, teacher, losses, pair.schedule) for teacher in (plain, pair.teacher)]
        steps = [Step(module, pair.batch) for module in modules]
        views = [(step.student_view(), step.teacher_view()) for step in steps]
        expected, actual = (float(step.distilled(*view).detach()) for step, view in zip(steps, views, strict=True))
        # Proposals move by a rounding, too. A divergence near 0 is a difference of rounded logarithms.
        assert actual == pytest.approx(expected, rel=5e-5, abs=1e-7), option
