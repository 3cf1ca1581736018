"""The table of distillation methods, and of the losses that imitate features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from distill.losses.adl import ADL
from distill.losses.at import AT
from distill.losses.base import DistillLoss
from distill.losses.bckd import BCKD
from distill.losses.chen import Chen
from distill.losses.crosskd import CrossKD
from distill.losses.cwd import CWD
from distill.losses.defeat import DeFeat
from distill.losses.detr_corners import DETRCorners
from distill.losses.detr_features import DETRFeatures
from distill.losses.detr_logits import DETRLogits
from distill.losses.detr_points import DETRPoints
from distill.losses.dicod import DICOD
from distill.losses.dist import DIST
from distill.losses.dsig import DSIG
from distill.losses.fbkd import FBKD
from distill.losses.fgd import FGD
from distill.losses.fgfi import FGFI
from distill.losses.foundation import Foundation
from distill.losses.frs import FRS
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.hint import Hint
from distill.losses.ld import LD
from distill.losses.maskd import MasKD
from distill.losses.mgd import MGD
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD
from distill.losses.pkd import PKD
from distill.losses.response import Response
from distill.losses.ssim import SSIM
from distill.losses.tadf import TADF
from helpers.training import EVERYTHING


class Method(NamedTuple):
    """One row of the table: what tests have to know of a method. Whoever adds a method adds a row."""

    loss: type[DistillLoss]
    option: str
    """The option of the group ``distill`` that stands for the method where all its options would take too long."""
    small: Mapping[str, Any] = {}
    """Constructor arguments that suit small detectors, and switch on what the defaults leave out."""
    replaces_hard_labels: bool = False
    """It changes the student's own losses even where its own terms have no weight."""
    family: str = "faster_rcnn"
    """The family of a student and teacher that it fits."""
    detectors: Mapping[str, Any] = {}
    """Options of both detectors that it needs."""
    needs_model: bool = False
    """It takes a frozen model of its own, such as an image classifier."""
    trained_alone: bool = True
    """Whether daily tests train its option in a run of its own, or in one run with those of other methods."""


DISTRIBUTIONS = {"box_head": "distribution", "box_loss": "giou"}
METHODS = {
    "adl": Method(ADL, "adl", family="retinanet", trained_alone=False),
    "at": Method(AT, "at", trained_alone=False),
    "bckd": Method(BCKD, "bckd", family="retinanet", trained_alone=False),
    "chen": Method(Chen, "chen", replaces_hard_labels=True),
    "crosskd": Method(CrossKD, "crosskd", family="retinanet", trained_alone=False),
    "cwd": Method(CWD, "cwd", trained_alone=False),
    "defeat": Method(DeFeat, "defeat_full", EVERYTHING),
    "detr_corners": Method(DETRCorners, "detr_corners", family="dfine", trained_alone=False),
    "detr_features": Method(DETRFeatures, "detr_features", family="rtdetr", trained_alone=False),
    "detr_logits": Method(DETRLogits, "detr_logits", family="rtdetr", trained_alone=False),
    "detr_points": Method(DETRPoints, "detr_points", family="rtdetr", trained_alone=False),
    "dicod": Method(DICOD, "dicod", needs_model=True),
    "dist": Method(DIST, "dist", trained_alone=False),
    "dsig": Method(DSIG, "dsig", {"adapter": {"kernel": 1}}),
    "fbkd": Method(FBKD, "fbkd", trained_alone=False),
    "fgd": Method(FGD, "fgd", trained_alone=False),
    "fgfi": Method(FGFI, "fgfi"),
    "foundation": Method(Foundation, "foundation", needs_model=True, trained_alone=False),
    "global_knowledge": Method(
        GlobalKnowledge, "global_knowledge", {"prototypes": {"count": 2, "images": 4, "min_side": 4.0}}
    ),
    "frs": Method(FRS, "frs_two_stage", trained_alone=False),
    "hint": Method(Hint, "hint", trained_alone=False),
    "ld": Method(LD, "ld", family="retinanet", trained_alone=False, detectors=DISTRIBUTIONS),
    "maskd": Method(MasKD, "maskd", trained_alone=False),
    "mgd": Method(MGD, "mgd", trained_alone=False),
    "mimic": Method(Mimic, "mimic", {"neck": {"all": 1.0}}),
    "pad": Method(PAD, "pad_mimic", {"of": Mimic}),
    "pkd": Method(PKD, "pkd", trained_alone=False),
    "response": Method(Response, "response", trained_alone=False),
    "ssim": Method(SSIM, "ssim"),
    "tadf": Method(TADF, "tadf"),
}


QUERY_METHODS = {name for name, method in METHODS.items() if method.family in ("rtdetr", "dfine")}
"""Methods of detectors with queries, which tests/contract/test_query_losses.py tries."""


class Imitation(NamedTuple):
    """A loss that imitates features, and the pairs of detectors that it fits."""

    build: Callable[..., DistillLoss]
    """From the specs ``student`` and ``teacher``."""
    needs_proposals: bool = False
    """It reads proposals or sampled regions of the student."""


_WHOLE_NECK = {"neck": {"all": 1}}
_PREDICTED_REGIONS = {"kind": "predictions", "top": 20}
IMITATIONS = {
    "mimic": Imitation(partial(Mimic, **_WHOLE_NECK), needs_proposals=True),
    "mimic of the neck": Imitation(partial(Mimic, regions={"all": 0}, **_WHOLE_NECK)),
    "mimic of proposals": Imitation(partial(Mimic, regions={"kind": "proposals", "top": 20}), needs_proposals=True),
    "mimic of predictions": Imitation(partial(Mimic, regions=_PREDICTED_REGIONS, **_WHOLE_NECK)),
    "fgfi": Imitation(FGFI),
    "fgfi on all levels": Imitation(partial(FGFI, mask={"kind": "fine_grained_all_levels"}, normalization="half_l2")),
    "defeat": Imitation(DeFeat),
    "pad of mimic": Imitation(partial(PAD, of=partial(Mimic, regions=_PREDICTED_REGIONS, **_WHOLE_NECK))),
    "pad of fgfi": Imitation(partial(PAD, of=FGFI)),
    "tadf of the neck": Imitation(partial(TADF, head={"classification": 0, "regression": 0})),
}


def small_loss(name: str, **options: Any) -> Callable[..., DistillLoss]:
    """The constructor of a loss for small detectors; a wrapper hands the options on to the loss that it wraps."""
    method = METHODS[name]
    if "of" in method.small:
        return partial(method.loss, **{**method.small, "of": partial(method.small["of"], **options)})
    return partial(method.loss, **method.small, **options)
