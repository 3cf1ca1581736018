"""The set criterion: the own losses of set-prediction detectors, from the matching of queries to objects.

Axis letters: B images, Q queries, K classes, T objects of an image, N matched pairs of all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import boxes as geometry
from distill import distributed
from distill.assignment import COST_FOCAL, COSTS, Matches, SetTarget, match_objects
from distill.precision import upcast
from distill.query_losses import balanced_mean, corner_divergence, varifocal_loss
from distill.types import DistillError, QueryLayer


class QueryGroup(NamedTuple):
    """Outputs of all decoder layers for one group of queries."""

    layers: Sequence[QueryLayer]
    """One per decoder layer, first layer first."""
    first: QueryLayer | None = None
    """D-FINE: the boxes and logits of the first layer's input ("pre" outputs). Its boxes, detached, are the boxes from
    which the corner distributions of all layers are offsets."""


class Denoising(NamedTuple):
    """A group of queries that start from noisy ground truth; see `QueryGroup`."""

    layers: Sequence[QueryLayer]
    matches: Matches
    """For each image the positive queries and their objects, of all denoising groups. Fixed, not matched."""
    first: QueryLayer | None = None


class SetLosses(NamedTuple):
    """Unweighted losses of a set-prediction detector."""

    terms: dict[str, Tensor]
    """``classification``, ``l1``, ``giou``; with distributions also ``fgl`` and ``ddf``: the sums over `parts`."""
    parts: dict[str, dict[str, Tensor]]
    """The same by part: ``layer_0`` and so on, ``first``, ``encoder``, ``denoising_0`` and so on,
    ``denoising_first``."""
    matches: list[Matches]
    """Matches of the decoder layers, before a union; value of `View.query_targets`."""


@dataclass(frozen=True)
class CornerBins:
    """The offsets that the bins of D-FINE's corner distributions stand for.

    ::

        W(0) = -2a,  W(N) = 2a
        W(n) = c - c (a/c + 1)^((N - 2n) / (N - 2))       for 1 <= n < N/2
        W(n) = -c + c (a/c + 1)^((2n - N) / (N - 2))      for N/2 <= n <= N - 1

    A side lies at ``d = d_0 + s * sum_n W(n) Pr(n)``, where d is the distance from the center of the start box, d_0
    that of the start box itself, and s the height or the width of the start box.

    Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", 2024,
    arXiv 2410.13842, equations of d and W(n). Written from memory and compared with transformers 5.24.0, which holds
    values in units of c.

    Args:
        count: number of bins, N + 1, an odd number from 5.
        limit: a, the offset of the last but one bin. ``up`` in the released code.
        scale: 1 / c. A larger scale has finer bins around 0. ``reg_scale`` in the released code.
    """

    count: int = 33
    limit: float = 0.5
    scale: float = 4.0

    def offsets(self) -> list[float]:
        """W(n) of all bins, as shares of the start box's height or width."""
        n, c = self.count - 1, 1 / self.scale
        step = self.limit / c + 1
        inner = [c * (step ** ((2 * i - n) / (n - 2)) - 1) for i in range(n // 2, n)]
        right = [*inner, 2 * self.limit]
        return [-offset for offset in reversed(right[1:])] + right

    def targets(self, start: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """The two bins around each side's true offset.

        Args:
            start: (N, 4) start boxes, in the form of `QueryLayer.boxes`.
            truth: (N, 4) true boxes, in the same form.

        Returns:
            (N, 4) int64, the left bin of the sides left, top, right, bottom; and (N, 4), the share of the right bin:
            0 or 1 for an offset outside of all bins.
        """
        true_corners, center = geometry.corners(truth), start[:, :2]
        size = start[:, 2:] + torch.finfo(start.dtype).tiny
        low, high = (center - true_corners[:, :2]) / size, (true_corners[:, 2:] - center) / size
        wanted = torch.cat([low, high], dim=1) - 0.5
        offsets = wanted.new_tensor(self.offsets())
        left = (torch.searchsorted(offsets, wanted.contiguous(), right=True) - 1).clamp(0, self.count - 2)
        share = (wanted - offsets[left]) / (offsets[left + 1] - offsets[left])
        return left, share.clamp(0, 1)


def matchability_loss(logits: Tensor, quality: Tensor, positive: Tensor, gamma: float) -> Tensor:
    """MAL: as VFL, with the target q^gamma, and without the factors that make poor matches cheap.

    ::

        MAL(p, q) = -q^gamma log p - (1 - q^gamma) log(1 - p)    matched class
        MAL(p)    = -p^gamma log(1 - p)                          all others

    Source: Huang et al., "DEIM: DETR with Improved Matching for Fast Convergence", 2024, arXiv 2412.04234; gamma = 1.5.
    Written from memory. No gradient flows through q and the factor p^gamma.

    Args, returns: as `query_losses.varifocal_loss`.
    """
    weight = torch.where(positive, torch.ones_like(quality), logits.detach().sigmoid() ** gamma)
    return F.binary_cross_entropy_with_logits(logits, quality**gamma, weight, reduction="sum")


def aligned_loss(logits: Tensor, quality: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """IA-BCE: the target of a matched class follows from both the score and the IoU.

    ::

        t = max(p^alpha q^(1 - alpha), 0.01)
        L = -t log p - (1 - t) log(1 - p)    matched class
        L = -p^gamma log(1 - p)              all others

    Source: Chen et al., "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection", 2024, arXiv 2406.03459,
    after Cai et al., "Align-DETR", 2023, arXiv 2304.07527; alpha = 0.25, gamma = 2. No gradient flows through t; it
    flows through the factor p^gamma.

    Args, returns: as `query_losses.varifocal_loss`.
    """
    p = logits.sigmoid()
    target = (p.detach() ** alpha * quality ** (1 - alpha)).clamp(min=0.01)
    log_yes, log_no = F.logsigmoid(logits), F.logsigmoid(-logits)
    return -torch.where(positive, target * log_yes + (1 - target) * log_no, p**gamma * log_no).sum()


def fine_grained_loss(corners: Tensor, left: Tensor, share: Tensor, quality: Tensor) -> Tensor:
    """FGL: a cross-entropy with the two bins around each side's true offset.

    ::

        FGL = sum_k IoU_k sum over sides of  (1 - w) CE(Pr, left bin) + w CE(Pr, right bin)

    w is the place of the true offset between both bins, from 0 at the left one.

    Source: D-FINE (2410.13842), equation of L_FGL. IoU_k is that of the layer's own box with the object, detached.

    Args:
        corners: (N, 4, bins) logits.
        left, share: see `CornerBins.targets`.
        quality: (N,) IoU.

    Returns:
        the sum over all pairs and sides.
    """
    logs = corners.log_softmax(-1)
    near, far = (logs.gather(2, (left + step)[..., None])[..., 0] for step in (0, 1))
    return -(quality[:, None] * ((1 - share) * near + share * far)).sum()


def union_matches(matches: Sequence[Matches]) -> Matches:
    """ "GO", the union of matches of several layers: each query takes the object to which most layers match it.

    An object may have several queries. Among equal counts the object with the lower index is taken.

    Source: D-FINE (2410.13842), "Global Optimal" set of its released code, which leaves ties to an unstable sort.
    """
    union = []
    for image in zip(*matches, strict=True):
        pairs = torch.stack([torch.cat(column) for column in zip(*image, strict=True)])
        unique, counts = torch.unique(pairs, dim=1, return_counts=True)  # sorted by query, then by object
        kept: dict[int, tuple[int, int]] = {}
        for query, target, count in zip(*unique.tolist(), counts.tolist(), strict=True):
            if count > kept.get(query, (0, 0))[0]:
                kept[query] = count, target
        union.append(
            (torch.tensor(list(kept), dtype=torch.int64), pairs.new_tensor([pair[1] for pair in kept.values()]))
        )
    return union


class _Pairs(NamedTuple):
    """Matched pairs of all images, on the device."""

    queries: Tensor
    """(N,) int64, into the flat (B * Q) queries."""
    boxes: Tensor
    """(N, 4) the objects' boxes."""
    labels: Tensor
    """(N,) the objects' labels, from 0."""


class _Counts(NamedTuple):
    """Numbers over all processes, as scalars, and the number of processes."""

    objects: Tensor
    matched: Tensor
    united: Tensor
    queries: Tensor
    denoised: Tensor
    denoising: Tensor
    processes: int


class SetCriterion:
    """Own losses of RT-DETR, D-FINE, DEIM and RF-DETR, from the equations of their papers.

    Every part (each decoder layer, the encoder's selected queries, D-FINE's first boxes) is matched to the objects on
    its own, at the least total cost ``2 focal + 5 L1 - 2 GIoU``. Denoising queries have fixed objects. The losses are

    * ``classification``: VFL, MAL or IA-BCE over all queries, :func:`distill.query_losses.varifocal_loss`,
      :func:`matchability_loss` or :func:`aligned_loss`,
    * ``l1``: ``sum |b - g|`` over matched pairs, ``giou``: ``sum 1 - GIoU(b, g)``,
    * ``fgl``: :func:`fine_grained_loss` of each decoder layer,
    * ``ddf``: each decoder layer but the last imitates the corner distributions of the last one (D-FINE, equation of
      L_DDF): :func:`distill.query_losses.corner_divergence` at T = 5, weighted by the IoU of the layer's box with the
      object on matched queries and by the last layer's highest score elsewhere, combined by
      :func:`distill.query_losses.balanced_mean`. No gradient reaches the last layer. As in the released code the
      layers' values are added, while the paper divides by their number, and the means of denoising queries are weighted
      by the numbers of matched and other ordinary queries.

    They are divided by the number of objects (with a union: of united pairs, for ``l1``, ``giou`` and ``fgl``; of
    denoising pairs, for the denoising queries), counted over all processes with one all-reduce, and multiplied by the
    number of processes, so that the mean gradient of all processes is that of one process with the whole batch. All
    losses are float32 under autocast, and attached zeros in a batch without objects.

    Published weights: RT-DETR 1, 5, 2; D-FINE also 0.15 of fgl and 1.5 of ddf. The terms are unweighted.

    Args:
        classification: ``vfl``, ``mal`` or ``ia_bce``.
        bins: of the corner distributions; None for a detector without them.
        union: match boxes and distributions of all parts to the union of their matches, see :func:`union_matches`.
        vfl: alpha and gamma of VFL.
        mal_gamma: gamma of MAL.
        ia_bce: alpha and gamma of IA-BCE.
        costs: weights of the matching: ``classification``, ``l1``, ``giou``.
        cost_focal: alpha and gamma of the classification cost.
    """

    def __init__(
        self,
        classification: str = "vfl",
        bins: CornerBins | None = None,
        union: bool = False,
        vfl: tuple[float, float] = (0.75, 2.0),
        mal_gamma: float = 1.5,
        ia_bce: tuple[float, float] = (0.25, 2.0),
        costs: Mapping[str, float] | None = None,
        cost_focal: tuple[float, float] = COST_FOCAL,
    ) -> None:
        if classification not in ("vfl", "mal", "ia_bce"):
            raise DistillError(f"classification: expected vfl, mal or ia_bce, got '{classification}'")
        self.classification, self.bins, self.union = classification, bins, union
        self.vfl, self.mal_gamma, self.ia_bce, self.cost_focal = vfl, mal_gamma, ia_bce, cost_focal
        self.costs = {**COSTS, **(costs or {})}

    @property
    def names(self) -> list[str]:
        """Names of the terms."""
        return ["classification", "l1", "giou", *(["fgl", "ddf"] if self.bins else [])]

    def match(self, layers: Sequence[QueryLayer], targets: Sequence[SetTarget]) -> list[Matches]:
        """Match each layer's queries to the objects; see :func:`distill.assignment.match_objects`."""
        return match_objects(layers, targets, self.costs, self.cost_focal)

    def __call__(
        self,
        queries: QueryGroup,
        targets: Sequence[SetTarget],
        encoder: QueryLayer | None = None,
        denoising: Denoising | None = None,
    ) -> SetLosses:
        """Compute all losses of a batch. Every process must call this.

        Args:
            queries: outputs of the decoder for the Q ordinary queries.
            targets: ground truth of each image, see `set_targets`.
            encoder: logits and boxes of the encoder's selected cells. Its `hidden` is not read.
            denoising: outputs for the denoising queries. None if the batch has none.
        """
        layers = {f"layer_{index}": layer for index, layer in enumerate(queries.layers)}
        extra = {"first": queries.first, "encoder": encoder}
        parts = layers | {name: layer for name, layer in extra.items() if layer is not None}
        matches = self.match(list(parts.values()), targets)
        united = union_matches(matches) if self.union else None
        counts = self._counts(queries.layers[0], targets, matches[0], united, denoising)
        with torch.autocast(queries.layers[0].boxes.device.type, enabled=False):
            values = dict(self._group(queries, parts, targets, matches, united, counts))
            if denoising is not None:
                values |= self._denoising(denoising, targets, united is not None, counts)
        terms = {
            name: torch.stack([part[name] for part in values.values() if name in part]).sum() for name in self.names
        }
        return SetLosses(terms, values, matches[: len(layers)])

    def _counts(
        self,
        layer: QueryLayer,
        targets: Sequence[SetTarget],
        matches: Matches,
        united: Matches | None,
        denoising: Denoising | None,
    ) -> _Counts:
        local = [
            sum(len(target.labels) for target in targets),
            sum(len(rows) for rows, _ in matches),
            sum(len(rows) for rows, _ in united or matches),
            math.prod(layer.logits.shape[:2]),
            sum(len(rows) for rows, _ in denoising.matches) if denoising else 0,
            math.prod(denoising.layers[0].logits.shape[:2]) if denoising else 0,
        ]
        values = torch.tensor(local, dtype=torch.float32).to(layer.boxes.device, non_blocking=True)
        total, processes = distributed.sum_over_ranks(values)
        objects, matched, pairs, every, denoised, denoising_queries = total.unbind()
        return _Counts(objects, matched, pairs, every, denoised, denoising_queries, processes)

    def _group(
        self,
        queries: QueryGroup,
        parts: Mapping[str, QueryLayer],
        targets: Sequence[SetTarget],
        matches: Sequence[Matches],
        united: Matches | None,
        counts: _Counts,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The parts of the ordinary queries."""
        shared = None if united is None else _pairs(united, targets, queries.layers[0])
        located = counts.objects if united is None else counts.united
        positives = counts.matched if united is None else counts.united
        for (name, layer), found in zip(parts.items(), matches, strict=True):
            pairs = _pairs(found, targets, layer)
            values = {"classification": self._classes(layer, pairs) * _share(counts.objects, counts.processes)}
            pairs = shared or pairs
            values |= self._boxes(layer, pairs, _share(located, counts.processes))
            if self.bins and name.startswith("layer"):
                ordinary = positives, counts.queries - positives
                scale = _share(located, counts.processes), counts.processes, ordinary, ordinary
                values |= self._corners(layer, queries, pairs, *scale)
            yield name, values

    def _denoising(
        self, group: Denoising, targets: Sequence[SetTarget], united: bool, counts: _Counts
    ) -> dict[str, dict[str, Tensor]]:
        """The parts of the denoising queries."""
        positives = counts.united if united else counts.matched
        pairs, share = _pairs(group.matches, targets, group.layers[0]), _share(counts.denoised, counts.processes)
        parts = {f"denoising_{index}": layer for index, layer in enumerate(group.layers)}
        parts |= {"denoising_first": group.first} if group.first is not None else {}
        values = {}
        for name, layer in parts.items():
            values[name] = {"classification": self._classes(layer, pairs) * share, **self._boxes(layer, pairs, share)}
            if self.bins and name != "denoising_first":
                own = counts.denoised, counts.denoising - counts.denoised
                scale = share, counts.processes, own, (positives, counts.queries - positives)
                values[name] |= self._corners(layer, QueryGroup(group.layers, group.first), pairs, *scale)
        return values

    def _classes(self, layer: QueryLayer, pairs: _Pairs) -> Tensor:
        """Sum over queries and classes."""
        logits = upcast(layer.logits)
        given = upcast(layer.boxes).detach().flatten(0, 1)[pairs.queries]
        quality = geometry.paired_iou(geometry.corners(given), geometry.corners(pairs.boxes))
        flat = logits.flatten(0, 1)
        places = pairs.queries, pairs.labels
        target = torch.zeros_like(flat).index_put(places, quality.to(flat))
        positive = torch.zeros_like(flat, dtype=torch.bool).index_put(places, torch.ones_like(quality).bool())
        if self.classification == "vfl":
            return varifocal_loss(flat, target, positive, *self.vfl)
        if self.classification == "ia_bce":
            return aligned_loss(flat, target, positive, *self.ia_bce)
        return matchability_loss(flat, target, positive, self.mal_gamma)

    def _boxes(self, layer: QueryLayer, pairs: _Pairs, share: Tensor) -> dict[str, Tensor]:
        given = upcast(layer.boxes).flatten(0, 1)[pairs.queries]
        giou = geometry.paired_giou(geometry.corners(given), geometry.corners(pairs.boxes))
        return {"l1": (given - pairs.boxes).abs().sum() * share, "giou": (1 - giou).sum() * share}

    def _corners(
        self,
        layer: QueryLayer,
        group: QueryGroup,
        pairs: _Pairs,
        share: Tensor,
        processes: int,
        counts: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """FGL and DDF of one decoder layer; counts and weights as in `balanced_mean`."""
        last = group.layers[-1]
        if self.bins is None or group.first is None or layer.corners is None or last.corners is None:
            raise DistillError(
                "SetCriterion: expected corner distributions of every decoder layer and the boxes before the first "
                "one, got none. Build the criterion with bins=None for a detector without distributions"
            )
        corners = upcast(layer.corners).flatten(0, 1)
        start, given = (upcast(x.boxes).detach().flatten(0, 1)[pairs.queries] for x in (group.first, layer))
        quality = geometry.paired_iou(geometry.corners(given), geometry.corners(pairs.boxes))
        left, position = self.bins.targets(start, pairs.boxes)
        fgl = fine_grained_loss(corners[pairs.queries], left, position, quality) * share
        if layer is last:
            return {"fgl": fgl, "ddf": corners.sum() * 0}
        confidence = upcast(last.logits).detach().flatten(0, 1).sigmoid().amax(1)
        weight = confidence.index_put((pairs.queries,), quality.to(confidence))
        positive = torch.zeros_like(weight, dtype=torch.bool).index_put(
            (pairs.queries,), torch.ones_like(quality).bool()
        )
        values = weight * corner_divergence(corners, upcast(last.corners).detach().flatten(0, 1))
        return {"fgl": fgl, "ddf": balanced_mean(values, positive, counts, weights) * processes}


def _share(count: Tensor, processes: int) -> Tensor:
    """The factor on this process's sums."""
    return processes / count.clamp(min=1)


def _pairs(matches: Matches, targets: Sequence[SetTarget], layer: QueryLayer) -> _Pairs:
    """Bring the matches of all images to the device, with one copy."""
    count, rows, columns, start = layer.logits.shape[1], [], [], 0
    for image, ((queries, objects), target) in enumerate(zip(matches, targets, strict=True)):
        rows.append(queries.cpu() + image * count)
        columns.append(objects.cpu() + start)
        start += len(target.labels)
    indices = torch.stack([torch.cat(rows), torch.cat(columns)]).to(layer.boxes.device, non_blocking=True)
    truth = torch.cat([target.boxes for target in targets]).to(upcast(layer.boxes))
    labels = torch.cat([target.labels for target in targets])
    return _Pairs(indices[0], truth[indices[1]], labels[indices[1]])
