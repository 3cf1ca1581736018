"""Global Knowledge: weigh the teacher on an object by how similarly both models relate it to prototypes of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import base, heads, masks
from distill.losses.base import DistillLoss, SumAndCount, check_temperature, is_number
from distill.losses.candidates import CandidateFeatures, pool_all_levels, select_candidates
from distill.losses.heads import ClassMap
from distill.losses.imitation import MapImitation
from distill.losses.kernels.graph import SHORTEST
from distill.losses.prototypes import choose_prototypes
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

NECK = {"foreground": 1.0, "background": 4.0, "levels": None}
LABELS = {"weight": 1.0, "temperature": 2.0}
RELATION = {"weight": 0.0}
PROTOTYPES = {"count": 10, "alpha": 10.0, "bandwidth": 0.1, "quantile": 0.4, "images": 800, "min_side": 30.0}
MASK = {"kind": "ground_truth", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 3, "start": "default", "relu": False}
RAMP = {**base.RAMP, "shape": "linear", "terms": ["neck", "relation"]}


def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """(R, C) and (R, P, C) or (P, C) -> (R, P).

    A feature shorter than a thousandth of the mean prototype is divided by that length instead of its own: the
    gradient of the cosine of a region without signal would be any number.
    """
    features, prototypes = upcast(features), upcast(prototypes)
    typical = torch.linalg.vector_norm(prototypes, dim=-1).mean()
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    shortest = (SHORTEST * typical).clamp(min=torch.finfo(features.dtype).tiny)
    directions = features / torch.maximum(lengths, shortest)
    return (directions[:, None] * F.normalize(prototypes, dim=-1)).sum(-1)


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """rho = max(0, 1 - ``|q_s - q_t|``), detached, with q the largest cosine (R, P) to a prototype of the class."""
    return (1 - (student.amax(1) - teacher.amax(1)).abs()).clamp(min=0).detach()


class GlobalKnowledge(DistillLoss):
    """DeFeat's frame on the student's positive proposals, each weighted by the agreement of both models on it.

    ::

        rho_i           = max(0, 1 - |q_s - q_t|)     q = max of cos(pooled feature, prototype), prototypes of the class
        neck.foreground = 1/L sum_l  sum m_l (A_l(S_l) - T_l)^2 / max(1, 2 sum m_l)     m: rho inside positive proposals
        neck.background = the same with 1 where m is 0
        labels          = T^2 / N_pos sum_i rho_i mean_classes KL(softmax(z_t / T) || softmax(z_s / T))
        relation        = mean_i,p smooth_L1(rho_i cos(f_s, P_s), rho_i cos(f_t, P_t))    all prototypes of the level

    Before each epoch, :mod:`distill.losses.prototypes` chooses the prototypes of each class and level again, from
    ground truth boxes of the training images. The teacher's features are computed once, the student's each time.

    Source: Tang et al., "Distilling Object Detectors with Global Knowledge", ECCV 2022, and its released code
    (hikvision-research/DAVAR-Lab-ML): weights 1 and 4 for the neck, 1 for labels at T = 2, 5 for the relation; neck and
    relation fall linearly to 0. The released configuration never switches the relation on, hence 0 here. Its student
    starts from a finished detector (``model.weights``), so its gain adds to that of a longer training.

    Where we differ: where proposals overlap, the largest rho counts (in the released code, the rho of the last one
    drawn); the density filter also keeps features at the quantile, and all features where none passes in both spaces;
    rho is never negative, which would teach the opposite; features are pooled in full precision. Boxes are pooled at
    the scale of the map over the padded image, for the prototypes and in training alike; in the released code the two
    scales differ where a padded side is not a multiple of 64.

    Shapes: maps (B, C, H, W), logits (R, K+1). For two-stage detectors. Before each epoch the student's neck runs over
    up to ``images`` images per class, before the first one also the teacher's: half of the training images of COCO.
    Sums over rectangles have no deterministic form on CUDA (``deterministic=true`` refuses them there).

    Args:
        student, teacher: specs of both detectors; for ``labels`` the teacher knows all of the student's classes.
        neck: weights of its terms; ``levels``: strides, None for all that both models have.
        labels, relation: ``weight``; ``temperature``.
        prototypes: ``count`` per class and level; ``alpha``, ``bandwidth`` and ``quantile`` of their choice;
            ``images``: upper bound per class; ``min_side`` of a box in pixels of the stored image.
        mask: options of :class:`distill.losses.masks.Mask`, around positive proposals instead of ground truth. Kind
            ``ground_truth`` is all of their cells; with ``none`` the whole neck is foreground, without rho, and there
            is no background term. ``scale`` also decides the level on which a proposal is pooled.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

    neck: MapImitation
    classes: ClassMap
    student_prototypes: Tensor
    """(classes, levels, prototypes, channels). Zeros, for a class without instances, make every rho 1."""
    teacher_prototypes: Tensor

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        labels: Mapping[str, Any] = LABELS,
        relation: Mapping[str, Any] = RELATION,
        prototypes: Mapping[str, Any] = PROTOTYPES,
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck, labels = base.merge_options("neck", neck, NECK), base.merge_options("labels", labels, LABELS)
        self.mask = masks.Mask(**base.merge_options("mask", mask, MASK))
        parts = ("foreground",) if self.mask.kind == "none" else ("foreground", "background")
        weights = {f"neck.{part}": neck[part] for part in parts}
        weights["labels"] = labels["weight"]
        weights["relation"] = base.merge_options("relation", relation, RELATION)["weight"]
        super().__init__(weights, base.merge_options("ramp", ramp, RAMP), normalizer, seed)
        self.temperature = float(labels["temperature"])
        if not self.terms("neck"):  # the other terms read only the scale
            base.build_mask("neck", False, {**mask, "scale": MASK["scale"]}, MASK)
        self.prototypes = base.merge_options("prototypes", prototypes, PROTOTYPES)
        _validate_numbers(self.temperature, self.prototypes)
        if not self.weights:
            return
        base.require_outputs("global_knowledge", student, teacher, "rois", "roi_logits")
        self.levels = base.shared_levels("neck", student.neck, teacher.neck, neck["levels"])
        if self.terms("neck"):
            adapter = base.merge_options("adapter", adapter, ADAPTER)
            self.neck = MapImitation("neck", student.neck, teacher.neck, self.levels, adapter, seed=seed)
        if "labels" in self.weights:
            self.classes = ClassMap("labels", student, teacher, partial=True)
        for name, spec in (("student", student), ("teacher", teacher)):
            shape = len(student.classes), len(self.levels), self.prototypes["count"], spec.neck[self.levels[0]]
            self.register_buffer(f"{name}_prototypes", torch.zeros(shape))
        self.candidates = CandidateFeatures(self.levels)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        labels = student.rois.labels
        boxes = [corners[names > 0] for corners, names in zip(student.rois.boxes, labels, strict=True)]
        counts = [len(corners) for corners in boxes]
        classes = torch.cat([names[names > 0] for names in labels]) - 1
        level = masks.assign_levels(torch.cat(boxes), len(self.levels), self.mask.scale)
        student_features = self._pool(student, boxes, level)
        teacher_features = self._pool(teacher, boxes, level).detach()
        rho = agreement(
            cosines(student_features, self.student_prototypes[classes, level]),
            cosines(teacher_features, self.teacher_prototypes[classes, level]),
        )
        shares: dict[str, list[SumAndCount]] = {}
        if self.terms("neck"):
            sizes, seeds = self.neck.sizes(student.neck), self.seeds(student.batch.ids)
            inside = self.mask.around_boxes(boxes, torch.split(rho, counts), student, sizes, seeds)
            outside = {stride: (mask == 0).float() for stride, mask in inside.items()}
            parts = {"foreground": inside, "background": outside}
            shares |= self.neck(student.neck, teacher.neck, {part: parts[part] for part in self.terms("neck")})
        if "labels" in self.weights:
            shares["labels"] = [self._compare_labels(student, teacher, rho)]
        if "relation" in self.weights:
            shares["relation"] = [self._compare_relations(student_features, teacher_features, rho, level)]
        return self.average(shares)

    def _pool(self, view: View, boxes: Sequence[Tensor], level: Tensor) -> Tensor:
        """(R, C): each box pooled on its level (R,)."""
        levels = pool_all_levels(view, self.levels, boxes)
        return levels[torch.arange(len(level), device=level.device), level]

    def _compare_labels(self, student: View, teacher: View, rho: Tensor) -> SumAndCount:
        """The share of ``labels``, on the student's positive proposals with their rho (R,)."""
        outputs = heads.region_outputs("labels", student, teacher, student.rois, self.classes)
        divergence = heads.kl_divergence(outputs.student_logits, outputs.teacher_logits, self.temperature)
        of_classes = divergence[outputs.labels > 0] / outputs.student_logits.shape[1]
        return (rho * of_classes).sum(), torch.tensor(float(len(rho)), device=rho.device)

    def _compare_relations(self, student: Tensor, teacher: Tensor, rho: Tensor, level: Tensor) -> SumAndCount:
        """The share of ``relation``, from features (R, C) on their levels (R,)."""
        known = (self.teacher_prototypes != 0).flatten(1).any(1)  # (K,): classes that have prototypes
        student_relation, teacher_relation = (
            rho[:, None] * cosines(features, prototypes.transpose(0, 1).flatten(1, 2)[level])  # (R, K*P)
            for features, prototypes in ((student, self.student_prototypes), (teacher, self.teacher_prototypes))
        )
        error = F.smooth_l1_loss(student_relation, teacher_relation, reduction="none")
        counted = known.repeat_interleave(self.prototypes["count"])
        return (error * counted).sum(), len(rho) * counted.sum()

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Choose the prototypes of every class and level again. The processes share the images."""
        super().on_epoch_start(epoch, data, student, teacher)
        if not self.weights:
            return
        limit, min_side = self.prototypes["images"], self.prototypes["min_side"]
        images = data.dataset("train", training=False)
        candidates = list(select_candidates(images, limit, min_side, self.seed))
        device = self.student_prototypes.device
        pairs = self.candidates.compute(candidates, data, student, teacher, device)
        if not pairs:
            return
        student_features, teacher_features = (torch.cat(features) for features in zip(*pairs, strict=True))
        labels = torch.cat([candidate.labels for candidate in candidates])
        options = {name: self.prototypes[name] for name in ("count", "alpha", "bandwidth", "quantile")}
        for label in sorted(set(labels.tolist())):
            of_class = labels == label
            student_class, teacher_class = student_features[of_class].to(device), teacher_features[of_class].to(device)
            for level in range(len(self.levels)):
                best = choose_prototypes(student_class[:, level], teacher_class[:, level], **options)
                self.student_prototypes[label - 1, level] = student_class[best, level]
                self.teacher_prototypes[label - 1, level] = teacher_class[best, level]


def _validate_numbers(temperature: float, prototypes: Mapping[str, Any]) -> None:
    """Refuse values that would fail in the middle of a run."""
    check_temperature("labels.temperature", temperature)
    integers = all(isinstance(prototypes[name], int) and prototypes[name] >= 1 for name in ("count", "images"))
    numbers = all(is_number(prototypes[name]) for name in ("alpha", "bandwidth", "quantile", "min_side"))
    if not (integers and numbers and prototypes["bandwidth"] > 0 and prototypes["quantile"] <= 1):
        raise DistillError(
            "prototypes: expected count and images of 1 or more, bandwidth above 0, quantile from 0 to 1, alpha and "
            f"min_side of 0 or more, got {dict(prototypes)}"
        )
