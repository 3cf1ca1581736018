"""Global Knowledge: trust the teacher on an object as far as both models place it alike among the data set's prototypes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import resize_boxes

from distill import distributed
from distill.losses import base, masks
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import ADAPTER as MAP_ADAPTER
from distill.losses.imitation import MapImitation
from distill.losses.prototypes import box_means, choose
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Pyramid, Size, View

NECK = {"foreground": 1.0, "background": 4.0, "levels": None}
LABELS = {"weight": 1.0, "temperature": 2.0}
RELATION = {"weight": 0.0}
PROTOTYPES = {"count": 10, "alpha": 10.0, "bandwidth": 0.1, "quantile": 0.4, "images": 800, "min_side": 30.0}
MASK = {"kind": "ground_truth", "scale": 56.0, "threshold": 0.5}
ADAPTER = {**MAP_ADAPTER, "start": "default"}
RAMP = {**base.RAMP, "shape": "linear", "terms": ["neck", "relation"]}


def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """(R, C) and (R, P, C) or (P, C) -> (R, P)."""
    ours, theirs = F.normalize(upcast(features), dim=-1), F.normalize(upcast(prototypes), dim=-1)
    return (ours[:, None] * theirs).sum(-1)


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """rho = max(0, 1 - |q_s - q_t|), detached, with q the largest of the cosines (R, P) to the prototypes of the own class."""
    return (1 - (student.amax(1) - teacher.amax(1)).abs()).clamp(min=0).detach()


class GlobalKnowledge(DistillLoss):
    """DeFeat's frame on the student's positive proposals, each weighted by how alike both models see it.

    ::

        rho_i           = max(0, 1 - |q_s - q_t|),   q = max over prototypes of the own class of cos(pooled feature, prototype)
        neck.foreground = 1/L sum_l  sum m_l (A_l(S_l) - T_l)^2 / max(1, 2 sum m_l)       m: rho inside positive proposals
        neck.background = the same with 1 where m is 0
        labels          = T^2 / N_pos sum_i rho_i mean_classes KL(softmax(z_t / T) || softmax(z_s / T))
        relation        = mean_i,p smooth_L1(rho_i cos(f_s, P_s), rho_i cos(f_t, P_t))    all prototypes of the level

    Before each epoch, :mod:`distill.losses.prototypes` chooses the prototypes of each class and level anew from ground
    truth boxes of the training images: the teacher's features are kept from the first time on, the student's change.

    Source: Tang et al., "Distilling Object Detectors with Global Knowledge", ECCV 2022, and its released code
    (hikvision-research/DAVAR-Lab-ML): weights 1 and 4 for the neck, 1 for labels at T = 2, 5 for the relation; neck and
    relation fall linearly to 0. The released configuration never switches the relation on, hence 0 here. Its student
    starts from a finished detector (``model.weights``), so its gain is on top of a longer training.

    Where we differ: where proposals overlap, the largest rho counts (there the last one drawn); the density filter keeps
    what is at the quantile too, and all where nothing passes in both spaces; rho is never negative, which would teach the
    opposite; features are pooled in full precision.

    Shapes: maps (B, C, H, W), logits (R, K+1). For two-stage detectors. Before each epoch the student's neck runs over up to
    ``images`` images a class, before the first one the teacher's too: of COCO half of the training images. Sums over
    rectangles have no deterministic form on CUDA (``deterministic=true`` refuses them there).

    Args:
        student, teacher: specs of both detectors; for ``labels`` the teacher knows all of the student's classes.
        neck: weights of its terms; ``levels``: strides, None for all that both have.
        labels, relation: ``weight``; ``temperature``.
        prototypes: ``count`` per class and level; ``alpha``, ``bandwidth``, ``quantile`` of their choice; ``images``, at most,
            per class; ``min_side`` of a box in pixels of the stored image.
        mask: options of :class:`distill.losses.masks.Mask`, around positive proposals in the place of ground truth; ``ground_truth``
            is all of their cells, and with ``none`` the whole neck is foreground, without rho. ``scale`` is also that of
            the level on which a proposal is pooled.
        adapter: see :class:`distill.losses.imitation.MapImitation`.
        ramp, normalizer, seed: see :class:`DistillLoss`. The draws are those of the mask ``random``.
    """

    ours: Tensor
    theirs: Tensor
    columns: Tensor | None

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
        maps, label = base.options("neck", neck, NECK), base.options("labels", labels, LABELS)
        weights = {f"neck.{part}": maps[part] for part in ("foreground", "background")}
        weights |= {"labels": label["weight"], "relation": base.options("relation", relation, RELATION)["weight"]}
        super().__init__(weights, base.options("ramp", ramp, RAMP), normalizer, seed)
        self.temperature, self.mask = float(label["temperature"]), masks.Mask(**base.options("mask", mask, MASK))
        if not self.terms("neck"):  # the scale is for the other terms too
            base.check_mask("neck", False, {**mask, "scale": MASK["scale"]}, MASK)
        self.prototypes = base.options("prototypes", prototypes, PROTOTYPES)
        _check_numbers(self.temperature, self.prototypes)
        if not self.weights:
            return
        base.require_outputs("global_knowledge", student, teacher, "rois", "roi_logits")
        levels = base.shared_levels("neck", student.neck, teacher.neck, maps["levels"])
        self.levels = levels
        if self.terms("neck"):
            self.neck = MapImitation(
                "neck", student.neck, teacher.neck, levels, base.options("adapter", adapter, ADAPTER), seed=seed
            )
        columns = base.class_columns("labels", student, teacher) if "labels" in self.weights else None
        self.register_buffer("columns", columns, persistent=False)
        # (classes, levels, prototypes, channels); zeros, for a class without instances, make every rho 1.
        room = len(student.classes), len(levels), self.prototypes["count"]
        self.register_buffer("ours", torch.zeros(*room, student.neck[levels[0]]))
        self.register_buffer("theirs", torch.zeros(*room, teacher.neck[levels[0]]))
        self._kept: dict[int, Tensor] = {}
        """Index of an image -> (n, L, C), the teacher's features of its boxes."""

    # -- the step

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        labels = student.rois.labels
        boxes = [each[names > 0] for each, names in zip(student.rois.boxes, labels, strict=True)]
        names = torch.cat([each[each > 0] for each in labels])
        level = masks.assign(torch.cat(boxes), len(self.levels), self.mask.scale)
        ours, theirs = self._pooled(student, boxes, level), self._pooled(teacher, boxes, level).detach()
        rho = agreement(cosines(ours, self.ours[names - 1, level]), cosines(theirs, self.theirs[names - 1, level]))
        shares: dict[str, list[SumAndCount]] = {}
        if self.terms("neck"):
            sizes, seeds = self.neck.sizes(student.neck), self.seeds(student.batch.ids)
            inside = self.mask.around(boxes, torch.split(rho, [len(each) for each in boxes]), student, sizes, seeds)
            outside = {stride: (mask == 0).float() for stride, mask in inside.items()}
            parts = {"foreground": inside, "background": outside}
            shares |= self.neck(student.neck, teacher.neck, {part: parts[part] for part in self.terms("neck")})
        if "labels" in self.weights:
            shares["labels"] = [self._soft_labels(student, teacher, rho, torch.cat(labels) > 0)]
        if "relation" in self.weights:
            shares["relation"] = [self._relate(ours, theirs, rho, level)]
        return self.average(shares)

    def _pooled(self, view: View, boxes: Sequence[Tensor], level: Tensor) -> Tensor:
        """(R, C): each box pooled on its level."""
        levels = _all_levels(
            {stride: view.neck[stride] for stride in self.levels}, boxes, masks.size(view.batch.images)
        )
        return levels[torch.arange(len(level), device=level.device), level]

    def _soft_labels(self, student: View, teacher: View, rho: Tensor, positive: Tensor) -> SumAndCount:
        ours, theirs = (view.roi_logits(student.rois.boxes)[0] for view in (student, teacher))
        theirs = theirs if self.columns is None else theirs[:, self.columns]
        base.check_shapes("labels, logits (R, K+1)", ours, theirs, "Build the loss with the specs of both detectors")
        each = base.divergence(ours, theirs, self.temperature)[positive] / ours.shape[1]
        return (rho * each).sum(), torch.tensor(float(len(rho)), device=rho.device)

    def _relate(self, ours: Tensor, theirs: Tensor, rho: Tensor, level: Tensor) -> SumAndCount:
        known = (self.theirs != 0).flatten(1).any(1)  # (K,): classes that have prototypes
        places = []
        for features, prototypes in ((ours, self.ours), (theirs, self.theirs)):
            of_level = prototypes.transpose(0, 1).flatten(1, 2)  # (L, K*P, C)
            places.append(rho[:, None] * cosines(features, of_level[level]))
        error = F.smooth_l1_loss(places[0], places[1], reduction="none")
        counts = known.repeat_interleave(self.prototypes["count"])
        return (error * counts).sum(), len(rho) * counts.sum()

    # -- before each epoch

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Choose the prototypes of every class and level anew; each process looks at its share of the images."""
        super().on_epoch_start(epoch, data, student, teacher)
        if not self.weights:
            return
        chosen = list(self._candidates(data.images("train", training=False)))
        features = self._features(chosen, data, student, teacher)
        labels = torch.cat([names for _, _, names in chosen]) if chosen else torch.zeros(0).long()
        for label in sorted(set(labels.tolist())):
            of_class = [each[labels == label].to(self.ours.device) for each in features]
            for level in range(len(self.levels)):
                ours, theirs = (each[:, level] for each in of_class)
                best = choose(
                    ours,
                    theirs,
                    **{name: self.prototypes[name] for name in ("count", "alpha", "bandwidth", "quantile")},
                )
                self.ours[label - 1, level], self.theirs[label - 1, level] = ours[best], theirs[best]

    def _candidates(self, images: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Index of an image, which of its boxes (n,) are candidates, and their labels; up to so many images a class."""
        left: dict[int, int] = {}
        for index in sorted(range(len(images)), key=lambda index: base.derive(self.seed, int(images.ids[index]))):
            target = images.target(index)
            large = ((target.boxes[:, 2:] - target.boxes[:, :2]) > self.prototypes["min_side"]).all(1)
            wanted = {
                label
                for label in target.labels[large].unique().tolist()
                if left.setdefault(label, self.prototypes["images"])
            }
            if wanted:
                keep = large & torch.tensor([label in wanted for label in target.labels.tolist()])
                for label in wanted:
                    left[label] -= 1
                yield index, keep, target.labels[keep]

    @torch.no_grad()
    def _features(
        self, chosen: Sequence[tuple[int, Tensor, Tensor]], data: Any, student: Any, teacher: Any
    ) -> tuple[Tensor, Tensor]:
        """(N, L, C) of all candidates, in order, from the student and from the teacher; on the host, for they are many."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        training = student.training
        student.eval()  # live statistics must not see these images
        for part in _batches(chosen, data)[distributed.rank() :: distributed.world_size()]:
            images = [chosen[place][0] for place in part]
            batch = data.batch("train", images).to(self.ours.device)
            # The batch's own targets lack boxes that became too thin; these are counted here.
            stored = [data.images("train", training=False).target(index).boxes for index in images]
            boxes = [
                resize_boxes(each[chosen[place][1]].to(self.ours.device), before, after)
                for each, place, before, after in zip(stored, part, batch.original_sizes, batch.sizes, strict=True)
            ]
            ours = self._of_boxes(student.view(batch, training=False, frozen=True), boxes)
            if any(index not in self._kept for index in images):
                theirs = self._of_boxes(teacher.view(batch, training=False), boxes)
                self._kept |= dict(zip(images, theirs, strict=True))
            found |= {place: (each, self._kept[index]) for place, each, index in zip(part, ours, images, strict=True)}
        student.train(training)
        found = {place: pair for each in distributed.gather(found) for place, pair in each.items()}
        pairs = [found[place] for place in range(len(chosen))]
        if not pairs:
            return torch.zeros(0, *self.ours.shape[1::2]), torch.zeros(0, *self.theirs.shape[1::2])
        return torch.cat([ours for ours, _ in pairs]), torch.cat([theirs for _, theirs in pairs])

    def _of_boxes(self, view: View, boxes: Sequence[Tensor]) -> list[Tensor]:
        """(n, L, C) for each image, on the host."""
        neck = {stride: view.neck[stride] for stride in self.levels}
        features = _all_levels(neck, boxes, masks.size(view.batch.images))
        # Each of its own memory: a view would be sent to the other processes with all that it is a view of.
        return [part.clone() for part in torch.split(features.cpu(), [len(each) for each in boxes])]


def _batches(chosen: Sequence[tuple[int, Tensor, Tensor]], data: Any) -> list[list[int]]:
    """Places in `chosen`, batch by batch: images of one padded size, whose features then depend on no neighbour."""
    sizes = data.padded_sizes("train")
    groups: dict[Size, list[int]] = {}
    for place, (index, _, _) in enumerate(chosen):
        groups.setdefault(sizes[index], []).append(place)
    step = data.eval_batch_size
    return [group[start : start + step] for group in groups.values() for start in range(0, len(group), step)]


def _check_numbers(temperature: float, prototypes: Mapping[str, Any]) -> None:
    """Refuse what would end in the middle of a run."""
    if not 0 < temperature < math.inf:
        raise DistillError(f"labels.temperature: expected a number above 0, got {temperature}")
    whole = all(isinstance(prototypes[name], int) and prototypes[name] >= 1 for name in ("count", "images"))
    numbers = {name: prototypes[name] for name in ("alpha", "bandwidth", "quantile", "min_side")}
    sound = all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in numbers.values())
    if not (whole and sound and numbers["bandwidth"] > 0 and numbers["quantile"] <= 1):
        raise DistillError(
            "prototypes: expected count and images of 1 or more, bandwidth above 0, quantile from 0 to 1, alpha and "
            f"min_side of 0 or more, got {dict(prototypes)}"
        )


def _all_levels(neck: Pyramid, boxes: Sequence[Tensor], image: Size) -> Tensor:
    """(R, L, C): every box pooled on every level."""
    return torch.stack([box_means(upcast(x), boxes, image) for x in neck.values()], dim=1)
