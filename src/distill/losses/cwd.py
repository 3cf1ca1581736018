"""CWD: imitate where each channel of the teacher's maps is active, but not how strong the activation is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap, kl_divergence
from distill.losses.imitation import NeckPairs
from distill.types import DetectorSpec, View

NECK = {"all": 5.0, "levels": 4}
LOGITS = {"classes": 0.0}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(p_T || p_S) of each channel, p the softmax over the cells of F / tau; (B, C, H, W) twice -> (B, C)."""
    return kl_divergence(student.flatten(2), teacher.flatten(2), temperature)


def _share(student: Tensor, teacher: Tensor, temperature: float) -> SumAndCount:
    divergence = channel_divergence(student, teacher, temperature)
    return base.sum_and_size(divergence.sum(), divergence.numel())


class CWD(DistillLoss):
    """Imitate the distribution of each channel over the cells of a map, of the neck or of the class logits.

    ::

        neck.all       = sum_l tau^2 / (B C) sum_{n, c} KL(p(T_l) || p(A_l(S_l)))
        logits.classes = the same over the class logits (B, A K, H, W) of dense heads
        p(F)           = softmax over H W of F / tau, for each image and channel

    Source: Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv
    2011.13256, as in MMRazor. The code for detectors in mmdetection-distiller has the cross-entropy instead of
    the divergence: its value differs, its gradient is the same.

    Where we differ: the logits of a teacher with more classes are reduced to the student's. B is counted per process,
    as published. With ``normalizer="global"`` B is counted over all processes; the results differ only if the batch
    sizes of the processes differ.

    Shapes: maps (B, C, H, W). Published for tau = 1: weight 5 on the four finest levels (RetinaNet, ResNeXt-101 teaches
    ResNet-50; 40.5 AP), 10 on all levels (MMRazor, Faster R-CNN and RetinaNet), 5 on the class logits (GFL, 41.9 AP).

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, or a number of the finest shared levels, None for all.
        logits: weight of its term, for one-stage detectors of one family with equal anchors.
        temperature: tau.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`, for ``neck``.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        logits: Mapping[str, float] = LOGITS,
        temperature: float = 1.0,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "process",
        seed: int = 0,
    ) -> None:
        neck, logits = base.merge_options("neck", neck, NECK), base.merge_options("logits", logits, LOGITS)
        super().__init__({"neck.all": neck["all"], "logits.classes": logits["classes"]}, ramp, normalizer, seed)
        self.temperature = base.check_temperature("temperature", temperature)
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.neck: NeckPairs | None = None
        if self.terms("neck"):
            self.neck = NeckPairs(student, teacher, neck["levels"], adapter, seed)
        if self.terms("logits"):
            self.classes = heads.dense_class_map("logits", student, teacher)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. Stages that no term needs are not read."""
        pairs = {}
        if self.neck is not None:
            pairs["neck.all"] = self.neck(student, teacher)
        if self.terms("logits"):
            pairs["logits.classes"] = heads.class_maps("logits", student, teacher, self.classes)
        shares = {term: [_share(x, y, self.temperature) for x, y in levels] for term, levels in pairs.items()}
        return self.average({term: base.summed(parts) for term, parts in shares.items()})
