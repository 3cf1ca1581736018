"""The base class of all distillation losses: named weights, the ramp, averages over all processes, and shared checks.

A method is one subclass in one file: pure functions with the mathematics, and below them the class that applies the
functions to Views.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill import distributed
from distill.losses import masks
from distill.losses.ramps import Ramp
from distill.types import ALTERNATIVES, DetectorSpec, DistillError, View, require

SumAndCount = tuple[Tensor, Tensor]
"""A sum over this process's batch, attached to the student, and the count that divides it. Both are scalars."""

RAMP = {"shape": "constant", "warmup": 0.0, "stop": 0.0, "terms": None}
NORMALIZERS = ("global", "process")


class DistillLoss(nn.Module):
    """A distillation method: ``forward(student, teacher)`` returns **unweighted** terms with the keys of `weights`.

    The Distiller multiplies each term by ``weights[term] * factor(term, progress, epochs)`` and logs both forms.

    Args:
        weights: name of the term (``neck.foreground``) -> weight. Terms of weight 0 are left out: a subclass builds and
            computes only the terms of ``self.weights``.
        ramp: options of :class:`distill.losses.ramps.Ramp`, and ``terms``: the terms that the ramp scales, by name or
            place (``neck`` means all of ``neck.*``); None for all. The other terms keep their weight.
        normalizer: where the counts of :meth:`average` are summed: ``global``, over all processes, or ``process``.
        seed: of the loss's random draws and of the start values of its adapters.

    Raises:
        DistillError: a weight is not a number of at least 0; unknown normalizer or ramp option.
    """

    needs_teacher: bool = True
    """Whether the loss reads a teacher detector. If not, ``teacher`` may be None, at construction and in `forward`."""

    def __init__(
        self,
        weights: Mapping[str, float],
        ramp: Mapping[str, Any] = RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        super().__init__()
        wrong = {name: weight for name, weight in weights.items() if not is_number(weight)}
        if wrong:
            raise DistillError(f"{type(self).__name__}: expected weights that are numbers, 0 or more, got {wrong}")
        if normalizer not in NORMALIZERS:
            raise DistillError(
                f"{type(self).__name__}: expected normalizer to be {' or '.join(NORMALIZERS)}, got '{normalizer}'"
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.ramp, self.ramped = self._build_ramp(merge_options("ramp", ramp, RAMP), list(weights))
        self.normalizer = normalizer
        self.seed = seed
        self.epoch = 0
        self.supervised: dict[str, float] = {}
        """Factors on the student's own loss terms, by torchvision's names; empty unless a method sets them."""

    def _build_ramp(self, options: dict[str, Any], terms: Sequence[str]) -> tuple[Ramp, tuple[str, ...]]:
        """The ramp, and the terms that it scales."""
        requested = options.pop("terms")
        names = terms if requested is None else requested
        matches = {name: [term for term in terms if f"{term}.".startswith(f"{name}.")] for name in names}
        if isinstance(names, str) or not all(matches.values()):
            raise DistillError(
                f"{type(self).__name__}: ramp.terms: expected a list of terms or places among {', '.join(terms)}, got "
                f"{requested}"
            )
        return Ramp(**options), tuple(term for matching in matches.values() for term in matching)

    def factor(self, term: str, progress: float, epochs: float) -> float:
        """The ramp's factor on the weight of a term, at the fraction `progress` of `epochs` epochs."""
        return self.ramp(progress, epochs) if term in self.ramped else 1.0

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """Unweighted scalar terms by name. All are attached to the student, none to the teacher."""
        raise NotImplementedError

    @property
    def truth_terms(self) -> list[str]:
        """The terms with a weight that read ground truth, or targets made of it: ``rois``, ``anchor_targets``.

        They cannot train on images of ``data.unlabeled`` without boxes. A loss that lists too few is stopped in the
        first step.
        """
        return []

    def identity(self) -> dict[str, Any] | None:
        """Source and sha256 of a frozen model that the loss holds, None without one.

        The identity is stored with a run, so that a resume can check for the same model.
        """
        return None

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Called before each epoch with its number, the data module, the student and the teacher.

        Random draws change with the epoch. A method that keeps state over an epoch (prototypes) rebuilds it here.
        """
        self.epoch = epoch

    def terms(self, place: str) -> list[str]:
        """The terms of a place that have a weight, without the place: ``foreground`` for ``neck.foreground``."""
        return [name.removeprefix(f"{place}.") for name in self.weights if name.startswith(f"{place}.")]

    def seeds(self, ids: Sequence[int]) -> list[int]:
        """One seed per image, from the loss's seed, the epoch and the image's id, independent of batch and process."""
        return [derive_seed(self.seed, self.epoch, image) for image in ids]

    def average(
        self, shares: Mapping[str, Sequence[SumAndCount]], least: float = 1.0, empty: float | None = None
    ) -> dict[str, Tensor]:
        """Term -> mean over its shares (e.g. levels) of sum / max(least, count), or sum / empty for a count of 0.

        With ``normalizer="global"`` the counts are summed over all processes, with one all-reduce for all terms, and
        the value is multiplied by the number of processes: DDP's mean gradient is then the gradient of one process with
        the whole batch. Every process must call this with the same terms.
        """
        counts = [count.detach().to(total.dtype) for pairs in shares.values() for total, count in pairs]
        if not counts:
            return {}
        summed, processes = torch.stack(counts), 1
        if self.normalizer == "global":
            summed, processes = distributed.sum_over_ranks(summed)
        divisors = summed.clamp(min=least)
        divisors = divisors if empty is None else torch.where(summed > 0, divisors, empty)
        factors = iter((processes / divisors).unbind())
        return {
            term: torch.stack([total * next(factors) for total, _ in pairs]).mean() for term, pairs in shares.items()
        }


def require_no_truth(losses: Mapping[str, DistillLoss]) -> None:
    """Refuse losses that read ground truth, for training images whose boxes are not known.

    Raises:
        DistillError: a term reads ground truth. The message names the other terms.
    """
    named = [(name, loss, term) for name, loss in losses.items() for term in loss.weights]
    reading = [f"{name}/{term}" for name, loss, term in named if term in loss.truth_terms]
    if not reading:
        return
    others = [f"{name}/{term}" for name, _, term in named if f"{name}/{term}" not in reading]
    zeros = " ".join(f"distill.losses.{name.replace('/', '.', 1)}=0" for name in reading)
    remedy = f"set their weights to 0 ({zeros}); {', '.join(others)} can stay" if others else TRUTHLESS
    raise DistillError(
        f"data.unlabeled: {', '.join(reading)} read the ground truth, which images without labels lack: without boxes "
        f"all would count as background. Use the teacher's boxes (data.unlabeled.boxes=teacher), or {remedy}"
    )


TRUTHLESS = "choose a method that reads no ground truth: distill=pkd, mgd, cwd, ssim, hint, at, frs or fbkd"


def sum_and_count(values: Tensor, member: Tensor) -> SumAndCount:
    """Sum and number of the values where `member` is true; both tensors have one shape."""
    return (member * values).sum(), member.sum()


def summed(shares: Sequence[SumAndCount]) -> list[SumAndCount]:
    """Shares whose :meth:`DistillLoss.average` is the sum over them of sum / count, instead of the mean."""
    return [(len(shares) * total, count) for total, count in shares]


def sum_and_size(total: Tensor, size: int) -> SumAndCount:
    """A sum, and a count that is known on the host."""
    return total, torch.full((), float(size), dtype=total.dtype, device=total.device)


def is_number(value: Any, low: float = 0, high: float = math.inf) -> bool:
    """Whether the value is a number in [low, high)."""
    return isinstance(value, (int, float)) and low <= value < high


def check_temperature(name: str, value: Any) -> float:
    """A temperature of a softmax, as a float.

    Raises:
        DistillError: it is not a number above 0.
    """
    if not is_number(value) or value == 0:
        raise DistillError(f"{name}: expected a number above 0, got {value}")
    return float(value)


def derive_seed(*words: int | str) -> int:
    """A seed from a sequence of numbers and words, the same on every machine."""
    text = "/".join(map(str, words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def merge_options(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` updated by `given`.

    Raises:
        DistillError: `given` is not a mapping, or has a key that `defaults` lacks.
    """
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
    name: str, student: Mapping[int, int], teacher: Mapping[int, int], levels: Sequence[int] | int | None
) -> list[int]:
    """Strides that both models have, finest first: all of them, or those of `levels`.

    Args:
        name: of the place, for the message.
        student, teacher: channels by stride.
        levels: the requested strides; a number below 8 for so many of the finest shared ones, or all if there are
            fewer; None for all shared ones.

    Raises:
        DistillError: a model lacks this place, no stride is shared, or a requested one is not.
    """
    for role, channels in (("student", student), ("teacher", teacher)):
        if not channels:
            raise DistillError(
                f"{name}: the {role} has no feature pyramid. Set the weights of {name} to 0, or {ALTERNATIVES['neck']}"
            )
    shared = sorted(set(student) & set(teacher))
    if isinstance(levels, int) and levels >= 8:
        raise DistillError(
            f"{name}.levels: expected a number of levels, 1 to 7, or a list of strides, got {levels}. If this is a "
            f"stride, write {name}.levels=[{levels}]"
        )
    if isinstance(levels, int) and levels > 0 and shared:
        return shared[:levels]
    if isinstance(levels, int):
        levels = [levels]
    missing = [level for level in levels or () if level not in shared]
    if not missing and shared and (levels is None or len(levels) > 0):
        return shared if levels is None else sorted(set(levels))
    raise DistillError(
        f"{name}.levels: expected strides that both models have, got {levels if levels is None else list(levels)}; "
        f"the student has {list(student)}, the teacher {list(teacher)}, shared are {shared}. "
        f"Set {name}.levels to some of these, set the weights of {name} to 0, or choose another teacher"
    )


def require_equal_shapes(where: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Refuse tensors of unequal shape, which would broadcast, or fail far from their cause. Adapters run first."""
    if student.shape != teacher.shape:
        raise DistillError(
            f"{where}: expected student and teacher of equal shape, got the student's {tuple(student.shape)} (after "
            f"its adapter, if any) and the teacher's {tuple(teacher.shape)}. {remedy}"
        )


def require_outputs(name: str, student: DetectorSpec, teacher: DetectorSpec, *outputs: str) -> None:
    """Refuse a student or teacher without the outputs that the terms ``name.*`` read."""
    for role, spec in (("student", student), ("teacher", teacher)):
        for output in outputs:
            require(spec, output, name, role, f"Set the weights of {name} to 0")


def build_mask(place: str, weighted: bool, mask: Mapping[str, Any], default: Mapping[str, Any]) -> masks.Mask:
    """The mask of a place.

    Raises:
        DistillError: the mask differs from the default, but no term of the place has a weight.
    """
    chosen = masks.Mask(**merge_options("mask", mask, default))
    if not weighted and chosen != masks.Mask(**default):
        raise DistillError(
            f"mask: it is for {place}, but no term of {place} has a weight. Set a weight, or leave mask out"
        )
    return chosen
