"""What all distillation losses share: named weights, the ramp, averages over all processes, and refusals.

A method is a subclass in a file of its own: its mathematics as pure functions, and below them the class that binds
them to Views.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import distributed
from distill.labels import match_classes
from distill.losses import masks
from distill.losses.ramps import Ramp
from distill.precision import upcast
from distill.types import ALTERNATIVES, DetectorSpec, DistillError, Pyramid, View, require

SumAndCount = tuple[Tensor, Tensor]
"""A sum over this process's batch, attached to the student, and the count that it is to be divided by. Both scalars."""

RAMP = {"shape": "constant", "warmup": 0.0, "stop": 0.0, "terms": None}
NORMALIZERS = ("global", "process")


class DistillLoss(nn.Module):
    """A distillation method: ``forward(student, teacher)`` gives **unweighted** scalar terms, keyed like `weights`.

    The Distiller multiplies each by ``weights[term] * factor(term, progress, epochs)`` and logs both forms.

    Args:
        weights: flat term name (``neck.foreground``) -> weight. Terms of weight 0 are left out: a subclass builds and
            computes what is in ``self.weights`` only.
        ramp: options of :class:`distill.losses.ramps.Ramp`, and ``terms``: the terms that it moves, by name or place
            (``neck`` means all of ``neck.*``), None for all; the others are constant.
        normalizer: what counts of :meth:`average` run over: ``global``, the batches of all processes, or ``process``.
        seed: of the loss's own draws and its adapters' start values.
    """

    needs_teacher: bool = True
    """Whether a detector teaches. If not, ``teacher`` may be None, at construction and in `forward`."""

    def __init__(
        self,
        weights: Mapping[str, float],
        ramp: Mapping[str, Any] = RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        super().__init__()
        wrong = {
            name: each
            for name, each in weights.items()
            if not (isinstance(each, (int, float)) and 0 <= each < math.inf)
        }
        if wrong:
            raise DistillError(f"{type(self).__name__}: expected weights that are numbers, 0 or more, got {wrong}")
        if normalizer not in NORMALIZERS:
            raise DistillError(
                f"{type(self).__name__}: expected normalizer to be {' or '.join(NORMALIZERS)}, got '{normalizer}'"
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.ramp, self.ramped = self._ramp(options("ramp", ramp, RAMP), list(weights))
        self.normalizer = normalizer
        self.seed = seed
        self.epoch = 0
        self.supervised: dict[str, float] = {}
        """Factors on the student's own loss terms, by torchvision's names, where a method asks for them."""

    def _ramp(self, chosen: dict[str, Any], known: Sequence[str]) -> tuple[Ramp, tuple[str, ...]]:
        asked = chosen.pop("terms")
        names = known if asked is None else asked
        moved = {name: [term for term in known if f"{term}.".startswith(f"{name}.")] for name in names}
        lost = [name for name, terms in moved.items() if not terms]
        if isinstance(names, str) or lost:
            raise DistillError(
                f"{type(self).__name__}: ramp.terms: expected a list of terms or places among {', '.join(known)}, got {asked}"
            )
        return Ramp(**chosen), tuple(term for terms in moved.values() for term in terms)

    def factor(self, term: str, progress: float, epochs: float) -> float:
        """What the ramp multiplies a term's weight with after the part `progress` of `epochs` epochs."""
        return self.ramp(progress, epochs) if term in self.ramped else 1.0

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """Unweighted scalar terms by name, all attached to the student, none to the teacher."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any] | None:
        """Source and sha256 of a guest of the loss's own, stored with a run so that a resume finds the same; None: it has none."""
        return None

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Called before each epoch with its number, the data module, the student and the teacher's holder.

        Draws change with the epoch. A method that keeps state over an epoch (prototypes, say) rebuilds it here.
        """
        self.epoch = epoch

    def terms(self, place: str) -> list[str]:
        """Last words of the terms ``place.*`` that have a weight."""
        return [name.removeprefix(f"{place}.") for name in self.weights if name.startswith(f"{place}.")]

    def seeds(self, ids: Sequence[int]) -> list[int]:
        """One seed per image, from the loss's seed, the epoch and the image's id: no matter in which batch or process."""
        return [derive(self.seed, self.epoch, image) for image in ids]

    def average(self, shares: Mapping[str, Sequence[SumAndCount]]) -> dict[str, Tensor]:
        """Term -> mean over its shares (levels, say) of total / max(1, count).

        With ``normalizer="global"`` the counts are summed over all processes, in one all-reduce for all terms, and the
        value is scaled by their number: so the mean gradient, which DDP takes, is that of one process with the whole
        batch. Every process must come here with the same terms.
        """
        counts = [count.detach().to(total.dtype) for each in shares.values() for total, count in each]
        if not counts:
            return {}
        summed, processes = torch.stack(counts), 1
        if self.normalizer == "global":
            summed, processes = distributed.summed(summed)
        factors = iter((processes / summed.clamp(min=1)).unbind())
        return {term: torch.stack([total * next(factors) for total, _ in each]).mean() for term, each in shares.items()}


def derive(*words: int | str) -> int:
    """A seed from a path of numbers and words, equal on every machine."""
    text = "/".join(map(str, words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def options(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` updated by `given`; an option that they do not name is refused."""
    if not isinstance(given, Mapping):
        first = next(iter(defaults))
        raise DistillError(
            f"{name}: expected options ({', '.join(defaults)}), got {given!r}; set one of them, as in {name}.{first}=…"
        )
    unknown = [key for key in given if key not in defaults]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), defaults, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DistillError(f"{name}: unknown option '{unknown[0]}', expected one of {', '.join(defaults)}{hint}")
    return {**defaults, **given}


def shared_levels(
    name: str, student: Mapping[int, int], teacher: Mapping[int, int], levels: Sequence[int] | None
) -> list[int]:
    """Strides, finest first, that both models have: all of them, or those of `levels`.

    Args:
        name: of the place, for the error.
        student, teacher: channels by stride.
        levels: the strides asked for; None for all that are shared.

    Raises:
        DistillError: a model without this place, no shared stride, or one asked for that is not shared.
    """
    for role, channels in (("student", student), ("teacher", teacher)):
        if not channels:
            raise DistillError(
                f"{name}: the {role} has no feature pyramid. Set the weights of {name} to 0, or {ALTERNATIVES['neck']}"
            )
    shared = sorted(set(student) & set(teacher))
    missing = [level for level in levels or () if level not in shared]
    if not missing and shared and (levels is None or len(levels) > 0):
        return shared if levels is None else sorted(set(levels))
    raise DistillError(
        f"{name}.levels: expected strides that both models have, got {levels if levels is None else list(levels)}; "
        f"the student has {list(student)}, the teacher {list(teacher)}, shared are {shared}. "
        f"Set {name}.levels to some of these, set the weights of {name} to 0, or choose another teacher"
    )


def check_shapes(where: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Refuse tensors of unequal shape, which would broadcast or fail far from their cause; adapters are behind them."""
    if student.shape != teacher.shape:
        raise DistillError(
            f"{where}: expected student and teacher of equal shape, got the student's {tuple(student.shape)} (after its "
            f"adapter, if any) and the teacher's {tuple(teacher.shape)}. {remedy}"
        )


def class_columns(name: str, student: DetectorSpec, teacher: DetectorSpec) -> Tensor | None:
    """Labels of the teacher, background first, that have the names of the student's labels; None where lists are equal.

    ``teacher_logits[:, columns]`` has the student's K+1 columns.

    Raises:
        DistillError: the teacher does not know a class of the student.
    """
    remedy = f"choose another teacher, or set the weights of {name} to 0"
    columns = match_classes(student.classes, teacher.classes, remedy)
    return None if student.classes == teacher.classes else torch.tensor(columns)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) over the last axis: (..., K) -> (...)."""
    log_p = F.log_softmax(upcast(student) / temperature, dim=-1)
    log_q = F.log_softmax(upcast(teacher.detach()) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def deltas_of(deltas: Tensor, labels: Tensor) -> Tensor:
    """Of (R, (K+1)*4) class-major box deltas those of each region's label (R,): (R, 4)."""
    return deltas.view(len(deltas), deltas.shape[1] // 4, 4)[torch.arange(len(labels), device=labels.device), labels]


def per_anchor(maps: Pyramid, columns: int) -> Tensor:
    """Dense outputs (B, A*columns, H, W) of all levels -> (B, N, columns), in the order of the View's anchors."""
    anchors = (x.view(len(x), x.shape[1] // columns, columns, *x.shape[2:]) for x in maps.values())
    return torch.cat([x.permute(0, 3, 4, 1, 2).flatten(1, 3) for x in anchors], dim=1)


def check_mask(place: str, weighted: bool, mask: Mapping[str, Any], default: Mapping[str, Any]) -> masks.Mask:
    """The mask of a place; refuses one that was asked for where no term of the place has a weight to read it."""
    chosen = masks.Mask(**options("mask", mask, default))
    if not weighted and chosen != masks.Mask(**default):
        raise DistillError(
            f"mask: it is for {place}, but no term of {place} has a weight. Give it one, or leave mask out"
        )
    return chosen


def check_anchors(name: str, student: View, teacher: View) -> None:
    """Refuse anchors of unequal sizes, which no fact tells: equal deltas would mean other boxes. Waits for the device."""
    for stride, ours in student.anchors.items():
        if not torch.equal(ours, teacher.anchors[stride]):
            raise DistillError(
                f"{name}: expected equal anchors, but those at stride {stride} differ: the student's first are "
                f"{ours[:3].tolist()}, the teacher's {teacher.anchors[stride][:3].tolist()}. Give both models the "
                f"same anchor_sizes and anchor_ratios, or set the weights of {name} to 0"
            )


def require_outputs(name: str, student: DetectorSpec, teacher: DetectorSpec, *outputs: str) -> None:
    """Refuse a student or teacher without the outputs that the terms ``name.*`` read."""
    for role, spec in (("student", student), ("teacher", teacher)):
        for output in outputs:
            require(spec, output, name, role, f"Set the weights of {name} to 0")
