"""The table of distillation methods, and of the losses that imitate features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from distill.losses.base import DistillLoss
from distill.losses.chen import Chen
from distill.losses.defeat import DeFeat
from distill.losses.dicod import DICOD
from distill.losses.dsig import DSIG
from distill.losses.fgfi import FGFI
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD
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


METHODS = {
    "chen": Method(Chen, "chen", replaces_hard_labels=True),
    "defeat": Method(DeFeat, "defeat_full", EVERYTHING),
    "dicod": Method(DICOD, "dicod"),
    "dsig": Method(DSIG, "dsig", {"adapter": {"kernel": 1}}),
    "fgfi": Method(FGFI, "fgfi"),
    "global_knowledge": Method(
        GlobalKnowledge, "global_knowledge", {"prototypes": {"count": 2, "images": 4, "min_side": 4.0}}
    ),
    "mimic": Method(Mimic, "mimic", {"neck": {"all": 1.0}}),
    "pad": Method(PAD, "pad_mimic", {"of": Mimic}),
    "ssim": Method(SSIM, "ssim"),
    "tadf": Method(TADF, "tadf"),
}


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
