"""MasKD: imitate maps inside masks that learned tokens find on the teacher's maps."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import distributed
from distill.losses import base
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.losses.imitation import NeckPairs
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Pyramid, Target, View

NECK = {"all": 1.0, "levels": None}
TOKENS = {"task": 1.0, "diversity": 1.0, "count": 6, "epochs": 1, "warmup": 1}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}
LARGEST_OVERLAP = 0.9
"""Mean overlap of the trained masks from which on a warning is given. Equal masks have 1."""


class MaskTokens(nn.Module):
    """Tokens that turn a map into masks, and a small network that weighs the masks of an image.

    ::

        m_t = sigmoid(sum_c token_tc F_c),      p = softmax(W_2 mean_hw(W_1 * F + b_1) + b_2)

    W_1 is a 3x3 convolution with zeros around the map, W_2 a linear layer, and nothing lies between them.

    Args:
        channels: of the maps (B, C, H, W).
        count: number of tokens T.
        seed: of the start values: tokens from N(0, 0.01^2), W_1 from N(0, 2 / (9 C)), W_2 from N(0, 2 / T), no biases.
    """

    def __init__(self, channels: int, count: int, seed: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)

        def normal(deviation: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(0, deviation, generator=source))

        self.tokens = normal(0.01, count, channels)
        self.filters = normal(math.sqrt(2 / (9 * channels)), channels, channels, 3, 3)
        self.weights = normal(math.sqrt(2 / count), count, channels)
        self.filters_bias, self.bias = (nn.Parameter(torch.zeros(size)) for size in (channels, count))

    def masks(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, H, W)."""
        return torch.einsum("tc,bchw->bthw", self.tokens, x).sigmoid()

    def probabilities(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T), with a sum of 1 for each image."""
        # The mean of the convolution over all cells is the filters times the means of the shifted maps: cheaper.
        hidden = torch.einsum("oiyx,biyx->bo", self.filters, shifted_means(x)) + self.filters_bias
        return F.softmax(hidden @ self.weights.T + self.bias, dim=1)


def shifted_means(x: Tensor) -> Tensor:
    """Mean over cells of a map moved by -1, 0 and 1 rows and columns, zeros moving in: (B, C, H, W) -> (B, C, 3, 3)."""
    rows = torch.stack([x[:, :, :-1].sum(2), x.sum(2), x[:, :, 1:].sum(2)], dim=2)  # (B, C, 3, W)
    both = torch.stack([rows[..., :-1].sum(3), rows.sum(3), rows[..., 1:].sum(3)], dim=3)
    return both / (x.shape[2] * x.shape[3])


def masked_error(student: Tensor, teacher: Tensor, masks: Tensor, probabilities: Tensor) -> Tensor:
    """sum_t p_t mean_c (sum_hw (m_t (T - S))^2 / sum_hw m_t); (B, C, H, W) twice, (B, T, H, W), (B, T) -> (B,)."""
    squares = (teacher - student).square().mean(1)
    errors = torch.einsum("bthw,bhw->bt", masks.square(), squares) / masks.sum((2, 3))
    return (probabilities * errors).sum(1)


def dice(masks: Tensor) -> Tensor:
    """Mean over pairs of different masks of 2 sum m m' / (sum m^2 + sum m'^2); (B, T, H, W) -> (B,)."""
    flat = masks.flatten(2)
    products, squares = flat @ flat.transpose(1, 2), flat.square().sum(2)
    overlaps = 2 * products / (squares[:, :, None] + squares[:, None, :])
    count = masks.shape[1]
    # Each mask has an overlap of 1 with itself.
    return (overlaps.sum((1, 2)) - count) / max(1, count * (count - 1))


class MasKD(DistillLoss):
    """Imitate the neck inside masks of learned tokens, which find what the teacher needs for its task.

    ::

        neck.all         = sum_l 1/B sum_n sum_t p_t mean_c (sum_hw (m_t (T_l - A_l(S_l)))^2 / sum_hw m_t)
        tokens.task      = the teacher's own losses with the neck sum_t p_t m_t T_l
        tokens.diversity = sum_l 1/B sum_n dice of the masks

    The tokens (`MaskTokens`, for each level) are trained with the teacher frozen in the first ``tokens.epochs`` epochs,
    by the terms ``tokens.*``, which do not reach the student; then they stay as they are, also under weight decay.
    After ``tokens.warmup`` epochs m_t is multiplied by the mask of the same token on the student's map. Masks pass no
    gradient to ``neck.all``. The teacher's own losses get the ground truth under the teacher's labels, without the
    boxes of classes that it does not know.

    Source: Huang, Zhang, You, Wang, Qian, Cao, Xu, "Masked Distillation with Receptive Tokens", ICLR 2023, arXiv
    2205.14589, and its released code.

    Where we differ: the original trains the tokens for 2000 steps in a run of its own, with Adam (learning rate 0.01,
    falling along a cosine); here it happens in the first epochs of the student's run, with the student's optimizer,
    while ``neck.all`` already uses the tokens. SGD with a rate of 0.02 needs about as many steps, with lower rates
    more: a warning says if the masks are still alike afterwards. The original applies the student's masks after a
    number of steps: 7330 (Faster R-CNN), 7000 and 8500 (RetinaNet), 5000 (FCOS), which is about one epoch of COCO at 16
    images. The settings for Faster R-CNN and RetinaNet also imitate the teacher's box head (L1 or smooth L1, weight 1),
    which is left out: add ``distill=[maskd,response]`` or another method for the head.

    Shapes: maps (B, C, H, W). B is counted over all processes. Published weights of ``neck.all``: 1 (Faster R-CNN), 7
    (RetinaNet, learning rate 0.02, gradients clipped at a norm of 35, neck and head inherited: ``init=inherit``), 10
    (FCOS, clipped, too); of ``tokens.*``: 1. The teacher's heads run once more per step while the tokens are trained.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, or a number of the finest shared levels, None for all.
        tokens: weights of ``task`` and ``diversity``; ``count`` per level; ``epochs`` of their training; ``warmup``:
            epochs without the student's masks.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.

    Raises:
        DistillError: with ``tokens.task``, no class or several classes of the teacher stand for one of the student's.
    """

    classes: ClassMap
    is_trained: Tensor
    """Whether `trained` holds the tokens after their training."""

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        tokens: Mapping[str, Any] = TOKENS,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck, tokens = base.merge_options("neck", neck, NECK), base.merge_options("tokens", tokens, TOKENS)
        weights = {"neck.all": neck["all"], **{f"tokens.{term}": tokens[term] for term in ("task", "diversity")}}
        super().__init__(weights, ramp, normalizer, seed)
        if not (isinstance(tokens["count"], int) and tokens["count"] > 0):
            raise DistillError(f"tokens.count: expected 1 or more, got {tokens['count']}")
        if not all(map(base.is_number, (tokens["epochs"], tokens["warmup"]))):
            raise DistillError(f"tokens: expected epochs and warmup of 0 or more, got {dict(tokens)}")
        self.token_epochs, self.warmup = tokens["epochs"], tokens["warmup"]
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.neck: NeckPairs | None = None
        self.tokens: Any = nn.ModuleDict()
        if self.weights:
            self.neck = NeckPairs(student, teacher, neck["levels"], adapter, seed)
            for level in self.neck.levels:
                own_seed = base.derive_seed(seed, "tokens", level)
                self.tokens[str(level)] = MaskTokens(teacher.neck[level], tokens["count"], own_seed)
            # Parameters without a gradient would make several processes wait for one another.
            self.tokens.requires_grad_(bool(self.terms("tokens")))
        # The optimizer decays all its parameters, so the masks come from copies after the training.
        self.trained: Any = copy.deepcopy(self.tokens).requires_grad_(False)
        self.register_buffer("is_trained", torch.tensor(False))
        self.overlap: Tensor | None = None
        """Mean overlap of the masks in the last batch of the tokens' training."""
        if "tokens.task" in self.weights:
            self.classes = ClassMap("tokens.task", student, teacher, partial=True)
            if self.classes.is_merged:
                raise DistillError(
                    "tokens.task: several classes of the teacher stand for one of the data's (classes.map), so the "
                    "labels for the teacher's own losses are not known. Set tokens.task=0, or choose another method"
                )

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Keep the tokens at the end of their training."""
        super().on_epoch_start(epoch, data, student, teacher)
        if epoch >= self.token_epochs and not self.is_trained:
            self.trained.load_state_dict(self.tokens.state_dict())
            self.is_trained.fill_(True)
            self._warn_of_similar_masks()

    def _warn_of_similar_masks(self) -> None:
        if self.overlap is None or distributed.rank() > 0 or float(self.overlap) < LARGEST_OVERLAP:
            return
        warnings.warn(
            f"maskd: the masks are still alike after tokens.epochs={self.token_epochs} (overlap "
            f"{float(self.overlap):.2f}, 1 for equal masks), so neck.all is close to a multiple of the mean squared "
            "error of whole maps. Train the tokens longer (tokens.epochs) or, with SGD, with larger weights "
            "(tokens.task=10 tokens.diversity=10)",
            stacklevel=2,
        )

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [term for term in ("tokens.task",) if term in self.weights]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if self.neck is None:
            return {}
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        changed: Pyramid = dict(teacher.neck)
        pairs = self.neck(student, teacher)
        training = self.epoch < self.token_epochs
        for level, (student_map, teacher_map) in zip(self.neck.levels, pairs, strict=True):
            tokens = (self.tokens if training else self.trained)[str(level)]
            with torch.autocast(teacher_map.device.type, enabled=False):
                masks, probabilities = tokens.masks(teacher_map), tokens.probabilities(teacher_map)
                if "neck.all" in shares:
                    total = self._imitate(tokens, student_map, teacher_map, masks, probabilities)
                    shares["neck.all"].append(base.sum_and_size(total, len(student_map)))
                if "tokens.diversity" in shares:
                    shares["tokens.diversity"].append(base.sum_and_size(dice(masks).sum(), len(student_map)))
                mixed = torch.einsum("bt,bthw->bhw", probabilities, masks)[:, None]
                changed[level] = (teacher_map * mixed).to(teacher.neck[level].dtype)
        terms = self.average({term: base.summed(levels) for term, levels in shares.items() if levels})
        if "tokens.diversity" in shares and training:
            self.overlap = terms["tokens.diversity"].detach() / len(pairs)
        if "tokens.task" in shares and training:
            losses = teacher.with_neck(changed, self._known(teacher.batch.targets)).losses.values()
            terms["tokens.task"] = torch.stack([upcast(value) for value in losses]).sum()
        # All parameters keep a gradient in every step, of 0 where no term trains them.
        idle = 0 * sum(x.sum() for x in (*self.tokens.parameters(), *(pair[0] for pair in pairs)))
        for term in self.weights:
            if term.startswith("tokens"):
                terms[term] = terms[term] + idle if training else torch.as_tensor(idle)
        return {term: terms[term] for term in self.weights}

    def _known(self, targets: Sequence[Target]) -> list[Target]:
        """The targets under the teacher's labels, without the boxes of classes that it does not know."""
        known = []
        for target in targets:
            parts = [target.boxes, self.classes.labels(target.labels), target.masks]
            if self.classes.is_partial:
                rows = self.classes.known[target.labels]
                parts = [None if part is None else part[rows] for part in parts]
            known.append(Target(*parts))  # type: ignore[arg-type]
        return known

    def _imitate(self, tokens: MaskTokens, student: Tensor, teacher: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
        """Sum over images of the error of one level."""
        masks, weights = masks.detach(), weights.detach()
        if self.epoch >= self.warmup:
            masks = masks * tokens.masks(student.detach()).detach()
        return masked_error(student, teacher, masks, weights).sum()
