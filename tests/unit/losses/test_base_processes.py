"""Losses that hold a count of their own, in two processes: all of them in one pair, for a new process costs seconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from distill.losses.at import AT
from distill.losses.base import DistillLoss
from distill.losses.cwd import CWD
from distill.losses.dist import DIST
from distill.losses.dsig import DSIG
from distill.losses.fbkd import FBKD
from distill.losses.fgd import FGD
from distill.losses.fgfi import FGFI
from distill.losses.frs import FRS
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.hint import Hint
from distill.losses.mgd import MGD
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD
from distill.losses.pkd import PKD
from distill.losses.ssim import SSIM
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS
from helpers.loss_states import (
    ALL_TERMS,
    SeveralLosses,
    randomize_variances,
    with_prototypes,
    with_related_cells,
    with_two_classes,
)
from helpers.two_processes import assert_two_equal_one


def make(normalizer: str) -> DistillLoss:
    known, how = (spec(), spec()), {"normalizer": normalizer}
    mask = {"kind": "ground_truth"}
    mimic = partial(Mimic, neck={"all": 1}, mask=mask, **how)
    global_knowledge = with_prototypes(GlobalKnowledge(*known, **ALL_TERMS, **how), *known)
    return SeveralLosses(
        ssim=SSIM(*known, neck={"foreground": 2, "background": 3}, mask=mask, **how),
        fgfi=FGFI(*known, **how),
        mimic=mimic(*known),
        global_knowledge=global_knowledge,
        pad_of_fgfi=randomize_variances(PAD(*known, partial(FGFI, **how))),
        pad_of_mimic=randomize_variances(PAD(*known, mimic)),
        pad_of_dsig=randomize_variances(PAD(*known, partial(DSIG, mask=mask, **how))),
    ).double()


def make_of_batches(normalizer: str) -> DistillLoss:
    """Losses with a sum over images or statistics of the batch. Batches of one size hide the counts, not statistics."""
    known, how = (spec(), spec()), {"normalizer": normalizer}
    context = {"foreground": 1.0, "background": 1.0, "attention": 1.0, "relation": 1.0}
    return SeveralLosses(
        at=AT(*known, **how),
        cwd=CWD(*known, **how),
        dist=DIST(*known, **how),
        fbkd=with_related_cells(FBKD(*known, **how)),
        frs=FRS(*known, **how),
        fgd=FGD(*known, neck=context, **how),
        hint=Hint(*known, **how),
        mgd=MGD(*known, **how),
        pkd=PKD(*known, adapter={"kernel": 1}, **how),
    ).double()


def scene() -> tuple[FakeView, FakeView]:
    """The second process has a box in one image only."""
    images = batch([OBJECTS[0], OBJECTS[1], NOTHING, OBJECTS[1]])
    student, teacher = (with_two_classes(random_view(images, spec(), seed)) for seed in (1, 2))
    return student, teacher


def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert_two_equal_one(make, scene, tmp_path, relative=1e-6)  # masks are float32


def test_two_processes_equal_one_in_their_statistics(tmp_path: Path) -> None:
    assert_two_equal_one(make_of_batches, scene, tmp_path, relative=1e-6, differ=("dist", "fbkd", "pkd"))
