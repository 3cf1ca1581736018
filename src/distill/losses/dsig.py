"""DSIG: distil a graph whose nodes are regions and whose edges are their similarities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from distill.losses import base
from distill.losses.adapters import adapter as one_adapter
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import MapImitation, RegionErrors
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

NODES = {"foreground": 0.5, "background": 0.5, "alpha": 7.5, "predicted": 0.0}
EDGES = {"all": 2.0, "mining": 0.6}
NECK = {"all": 0.5, "levels": None}
LOGITS = {"classes": 3.0, "boxes": 1.0, "temperature": 1.0}
PREDICTIONS = {"score": 0.0, "nms": 0.5, "top": 100}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}

IMAGES = 2
"""The released code sums over the images of a GPU, and had two on each: so many times the mean over images."""
OPTIONS = {True: "dsig, dsig_r50_r101 or dsig_r101_r152", False: "dsig_retinanet or dsig_retinanet_small"}
"""Options of the group distill, by whether the student is two-stage, for messages."""

REMEDY = "Build the loss with the specs of both detectors"


def mean(error: Tensor, member: Tensor) -> Tensor:
    """Mean over each image's regions where `member` is true, (B, R) both -> (B,); 0, still attached, where it is nowhere."""
    return (member * error).sum(1) / member.sum(1).clamp(min=1)


def background_nodes(error: Tensor, foreground: Tensor, background: Tensor, alpha: float | None) -> Tensor:
    """alpha F / B times the mean error of an image's B background nodes; three (B, R) -> (B,).

    With alpha None the factor is 1.
    """
    factor = 1.0 if alpha is None else alpha * foreground.sum(1) / background.sum(1).clamp(min=1)
    return factor * mean(error, background)


def graph(student: Tensor, teacher: Tensor, member: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How far the nodes of two graphs differ, and their edges: features (B, R, F) twice -> (B, R) and (B,).

    Nodes: the mean squared error of each. Edges: half the mean squared error of the cosines between an image's member
    nodes (B, R), the diagonal included; 0 without members, and where `member` is None.
    """
    with torch.autocast(student.device.type, enabled=False):
        nodes, edges = _Graph.apply(upcast(student), upcast(teacher.detach()), member)
    return nodes, edges


class _Graph(torch.autograd.Function):
    """All that autograd would keep or make as large as the features is left out: their gradient is one product."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, member: Tensor | None) -> tuple[Tensor, Tensor]:
        ours = [torch.linalg.vector_norm(s - t, dim=-1).square() for s, t in _blocks(student, teacher)]
        nodes, edges = torch.cat(ours).view(student.shape[:2]) / student.shape[2], student.new_zeros(len(student))
        if member is None:
            ctx.save_for_backward(student, teacher)
            return nodes, edges
        scale, cosines = _cosines(student)
        apart = (cosines - _cosines(teacher)[1]).mul_(member[:, :, None] & member[:, None])
        count = 2 * member.sum(1).square().clamp(min=1).to(student.dtype)
        edges = apart.square().sum((1, 2)) / count
        # d edges / d X = 4 / count (D - diag(rows of D * cosines)) N with N the unit vectors, and through their lengths.
        slopes = apart * (4 / count)[:, None, None]
        along = (slopes * cosines).sum(2)
        slopes = slopes.mul_(scale[:, :, None]).mul_(scale[:, None])
        slopes.diagonal(dim1=1, dim2=2).sub_(along * scale.square())
        ctx.save_for_backward(student, teacher, slopes)
        return nodes, edges

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nodes: Tensor, edges: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, *slopes = ctx.saved_tensors
        gradient = torch.sub(student, teacher).mul_((2 / student.shape[2] * nodes)[..., None])
        for each in slopes:
            gradient.baddbmm_(each * edges[:, None, None], student)
        return gradient, None, None


def _blocks(student: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some nodes of both at a time, for differences that stay near the core; elsewhere all at once."""
    ours, theirs = student.flatten(0, 1), teacher.flatten(0, 1)
    nodes = 16 if student.device.type == "cpu" else max(1, len(ours))
    return zip(torch.split(ours, nodes), torch.split(theirs, nodes), strict=True)


def _cosines(x: Tensor, blocks: int = 4) -> tuple[Tensor, Tensor]:
    """Of nodes (B, R, F): one by their lengths (B, R), and the cosines (B, R, R), of which each pair is computed once."""
    scale = 1 / torch.linalg.vector_norm(x, dim=2).clamp(min=1e-12)
    count = x.shape[1]
    cosines = x.new_empty(len(x), count, count)
    step = -(-count // blocks)
    for start in range(0, count, step):
        part = slice(start, start + step)
        cosines[:, part, start:] = x[:, part] @ x[:, start:].mT
        cosines[:, start + step :, part] = cosines[:, part, start + step :].mT
    return scale, cosines.mul_(scale[:, :, None]).mul_(scale[:, None])


def mined(logits: Tensor, threshold: float) -> Tensor:
    """Regions whose cross-entropy with background reaches the threshold, by the teacher; logits (R, K+1) -> (R,)."""
    return -F.log_softmax(upcast(logits), dim=1)[:, 0] >= threshold


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of box deltas: (..., 4) -> (...)."""
    return (upcast(student) - upcast(teacher.detach())).abs().sum(-1)


def by_image(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Values of the regions of all images in order, (R, ...), as (B, most, ...), with zeros behind an image's own.

    Counts come from the host, so that nothing waits for the device; where they are equal, nothing is copied.
    """
    most = max(1, *counts)
    if set(counts) == {most}:
        return x.view(len(counts), most, *x.shape[1:])
    padded = pad_sequence(list(torch.split(x, list(counts))), batch_first=True)
    return padded if padded.shape[1] else torch.cat([padded, x.new_zeros(len(counts), 1, *x.shape[1:])], dim=1)


def over_images(values: Tensor) -> SumAndCount:
    """`IMAGES` times the mean over images (B,)."""
    total = IMAGES * values.sum()
    return total, torch.full_like(total, len(values))


def _within(value: Any, low: float, high: float) -> bool:
    """Whether it is a number, in [low, high)."""
    return isinstance(value, (int, float)) and low <= value < high


class DSIG(DistillLoss):
    """Imitate a graph: its nodes are the pooled features of regions, its edges the cosines between them, image by image.

    ::

        nodes.foreground = 2/N sum_i mean_{F_i, c, h, w} (s - t)^2
        nodes.background = 2/N sum_i alpha F_i / B_i mean_{B_i, c, h, w} (s - t)^2
        nodes.predicted  = 2/N sum_i mean_{P_i, c, h, w} (s - t)^2
        edges.all        = 2/N sum_i 1/2 mean_{m_i, m_i} (cos(t, t') - cos(s, s'))^2
        neck.all         = sum_l mean_{n, c, h, w} (A_l(S_l) - T_l)^2
        logits.classes   = tau^2 / (R (K+1)) sum_r KL(softmax(z_t / tau) || softmax(z_s / tau))
        logits.boxes     = 1/R sum_{r foreground} |d_s - d_t|_1         deltas of the region's label

    over images i = 1..N. Two-stage: nodes are the *student's* sampled regions, F_i foreground and B_i background ones;
    edges join the foreground and the background that the teacher's box head finds hard (cross-entropy of at least
    ``mining``). One-stage: nodes are the student's own P_i predictions, of one kind and all joined; the classes are a
    softmax over K for each of the anchors that are not ignored (so 1/(anchors K)), and boxes count foreground anchors
    only, divided by their number. Regions pass no gradient to their boxes and are pooled once.

    Source: Chen et al., "Deep Structured Instance Graph for Distilling Object Detectors", ICCV 2021, arXiv 2109.12862,
    as its released code has it (dvlab-research/Dsig). What we know of the paper beyond its abstract is second-hand: its
    objective is told as nodes, edges and logits alone; ``neck`` is the code's, and so is the second 0.5 of background.

    Where we differ: the code sums nodes and edges over the images of a GPU, two of them; here it is twice the mean over
    images, so released weights hold at any batch size. An image without foreground or background adds 0 (there NaN or a
    division by zero). Counts run over all processes (``normalizer="process"`` for the original). Predictions are clipped
    to the image and pooled from the levels that the View pools from. Adapters, for necks of unequal channels, are ours:
    one per level of the neck and one for nodes, 1x1 convolutions by default. The paper has none, and here there is none
    where the channels are equal. Where the teacher knows more classes, its softmax is over the student's classes and
    background.

    Shapes: maps (B, C, H, W), regions (R, C, 7, 7), logits (R, K+1) or (B, A*K, H, W). The released weights, for a
    ResNet-18, MobileNetV2 or EfficientNet-B0: the defaults; others are options of their own. "classes" is a mean over
    elements, not regions: 3 stands for 3/81 of the divergence of a COCO region. A weight of edges of 2 is the paper's
    lambda of 1 on the mean error. alpha is no settled constant: 0.025 and no adaptive factor came before.

    Args:
        student, teacher: specs of both detectors. The student's family says what the regions are; weights of the other
            family's nodes are refused.
        nodes: weights of its terms; ``alpha`` of the background's factor, None for a factor of 1.
        edges: weight; ``mining``: threshold for background regions, None for foreground alone. None for one-stage.
        neck: weight; ``levels``: strides, None for all that both have.
        logits: weights of its terms; ``temperature`` of classes.
        predictions: thresholds of a one-stage student's regions: ``score``, ``nms``, and the ``top`` ones per image.
        mask: options of :class:`distill.losses.masks.Mask`, for ``neck``; kind ``none``, the original, is the whole neck.
        adapter: ``kernel`` 1, 3, ``auto`` or None, ``start`` values (see `distill.losses.adapters`), ``relu`` after it.
        ramp, normalizer, seed: see :class:`DistillLoss`. The draws are those of the mask ``random``.
    """

    columns: Tensor | None

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        nodes: Mapping[str, Any] = NODES,
        edges: Mapping[str, Any] = EDGES,
        neck: Mapping[str, Any] = NECK,
        logits: Mapping[str, Any] = LOGITS,
        predictions: Mapping[str, Any] = PREDICTIONS,
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        nodes, edges = base.options("nodes", nodes, NODES), base.options("edges", edges, EDGES)
        neck, logits = base.options("neck", neck, NECK), base.options("logits", logits, LOGITS)
        weights = {f"nodes.{kind}": nodes[kind] for kind in ("foreground", "background", "predicted")}
        weights |= {"edges.all": edges["all"], "neck.all": neck["all"]}
        weights |= {f"logits.{kind}": logits[kind] for kind in ("classes", "boxes")}
        super().__init__(weights, ramp, normalizer, seed)

        self.mask = base.check_mask("neck", bool(self.terms("neck")), mask, MASK)
        self.two_stage, self._anchors_are_equal = "rois" in student.outputs, False
        self.alpha, self.temperature = nodes["alpha"], logits["temperature"]
        self.mining = edges["mining"] if "edges.all" in self.weights else None
        self.predictions = base.options("predictions", predictions, PREDICTIONS)
        self._check_numbers()
        if self.terms("nodes") or self.terms("edges"):
            base.require_outputs("nodes and edges", student, teacher, "roi_features")
        self._check_regions(student)
        self.register_buffer("columns", self._check_heads(student, teacher), persistent=False)

        how = base.options("adapter", adapter, ADAPTER)
        self.maps = self.regions = self.nodes = None
        if self.terms("neck"):
            self.maps = MapImitation(
                "neck", student.neck, teacher.neck, neck["levels"], how, count="mse", over_levels="sum", seed=seed
            )
        if self.terms("nodes") or self.terms("edges"):
            ours, theirs = (next(iter(spec.neck.values())) for spec in (student, teacher))
            self.regions = one_adapter(ours, theirs, seed=base.derive(seed, "regions"), **how)
            self.nodes = RegionErrors("nodes", ours) if self.terms("nodes") else None

    def _check_numbers(self) -> None:
        for name, value in (("nodes.alpha", self.alpha), ("edges.mining", self.mining)):
            if value is not None and not _within(value, 0, math.inf):
                raise DistillError(f"{name}: expected a number, 0 or more, or null, got {value}")
        if not self.temperature or not _within(self.temperature, 0, math.inf):
            raise DistillError(f"logits.temperature: expected a number above 0, got {self.temperature}")
        score, nms, top = (self.predictions[name] for name in PREDICTIONS)
        if not (_within(score, 0, 1) and _within(nms, 0, 1) and isinstance(top, int) and top > 0):
            raise DistillError(
                f"predictions: expected score and nms from 0 to below 1 and top 1 or more, got {self.predictions}"
            )

    def _check_regions(self, student: DetectorSpec) -> None:
        """Refuse what is set for regions that this student does not have."""
        foreign = ["predicted"] if self.two_stage else ["foreground", "background"]
        wrong = [f"nodes.{kind}=0" for kind in foreign if f"nodes.{kind}" in self.weights]
        if self.mining is not None and not self.two_stage:
            wrong.append("edges.mining=null")
        if wrong:
            has = "foreground and background regions" if self.two_stage else "predicted regions, of one kind"
            raise DistillError(
                f"DSIG: the student is a {student.family}, whose nodes are its {has}, but the settings are for the other "
                f"kind. Choose distill={OPTIONS[self.two_stage]}, or set {', '.join(wrong)}"
            )

    def _check_heads(self, student: DetectorSpec, teacher: DetectorSpec) -> Tensor | None:
        """The teacher's columns of the student's classes, where its head is read; None where the lists are equal."""
        reading = [f"logits.{kind}=0" for kind in self.terms("logits")]
        alike = self.two_stage == ("rois" in teacher.outputs)
        if reading and not self.two_stage:
            alike = (student.family, student.anchors) == (teacher.family, teacher.anchors)
        if self.mining is not None:
            reading.append("edges.mining=null")
        if reading and not alike:
            raise DistillError(
                f"DSIG: to compare their heads, student and teacher must be of one kind, with equal anchors where they "
                f"are one-stage; the student is a {student.family} with anchors {student.anchors} (stride: per cell), the "
                f"teacher a {teacher.family} with {teacher.anchors}. Choose another teacher, or set {', '.join(reading)}"
            )
        if "logits.classes" in self.weights and not self.two_stage and len(student.classes) == 1:
            raise DistillError(
                "logits.classes: a softmax over the classes of a one-stage detector says nothing when there is only one, "
                f"{list(student.classes)}. Set logits.classes=0"
            )
        return base.class_columns("logits and edges", student, teacher) if reading else None

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. A stage that no term needs is not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.maps is not None:
            inside = self.mask(student, self.maps.sizes(student.neck), self.seeds(student.batch.ids))
            shares |= self.maps(student.neck, teacher.neck, {"all": inside})
        if self.regions is not None:
            shares |= {term: [over_images(values)] for term, values in self._graph(student, teacher).items()}
        if self.terms("logits"):
            compare = self._compare_regions if self.two_stage else self._compare_anchors
            shares |= {term: [share] for term, share in compare(student, teacher).items()}
        return self.average(shares)

    def _graph(self, student: View, teacher: View) -> dict[str, Tensor]:
        """Nodes and edges: one value per image (B,) for each term."""
        assert self.regions is not None
        boxes, of_object = self._nodes(student)
        counts = [len(each) for each in boxes]
        features, theirs = student.roi_features(boxes), teacher.roi_features(boxes)
        ours = self.regions(features)
        base.check_shapes("nodes and edges (R, C, h, w)", ours, theirs, "Give both necks equal levels, or set adapter")
        foreground = by_image(of_object, counts)
        background = by_image(torch.ones_like(of_object), counts) & ~foreground
        joined = None
        if self.terms("edges"):
            joined = foreground if self.mining is None else foreground | self._hard(teacher, boxes, self.mining)
        errors, edges = graph(by_image(ours.flatten(1), counts), by_image(theirs.flatten(1), counts), joined)
        if self.nodes is not None and self.nodes.reweigh is not None:
            listed = torch.cat([each[:count] for each, count in zip(errors, counts, strict=True)])
            errors = by_image(self.nodes.weighed(features, listed), counts)
        found = {f"nodes.{kind}": mean(errors, foreground) for kind in self.terms("nodes") if kind != "background"}
        if "nodes.background" in self.weights:
            found["nodes.background"] = background_nodes(errors, foreground, background, self.alpha)
        if joined is not None:
            found["edges.all"] = edges
        return found

    def _nodes(self, student: View) -> tuple[list[Tensor], Tensor]:
        """Boxes per image, and which regions are foreground (R,): all that a one-stage student predicts."""
        if self.two_stage:
            return student.rois.boxes, torch.cat(student.rois.labels) > 0
        boxes = [found.boxes.detach() for found in student.predictions(**self.predictions)]
        return boxes, torch.cat([torch.ones_like(each[:, 0], dtype=torch.bool) for each in boxes])

    def _hard(self, teacher: View, boxes: Sequence[Tensor], threshold: float) -> Tensor:
        """Regions (B, R) that have edges even where they are background."""
        logits = teacher.roi_logits(boxes)[0]
        hard = mined(logits if self.columns is None else logits[:, self.columns], threshold)
        return by_image(hard, [len(each) for each in boxes])

    def _compare_regions(self, student: View, teacher: View) -> dict[str, SumAndCount]:
        """The box heads' outputs for the student's regions."""
        regions, columns = student.rois, self.columns
        (ours, our_deltas), (theirs, their_deltas) = (view.roi_logits(regions.boxes) for view in (student, teacher))
        theirs = theirs if columns is None else theirs[:, columns]
        base.check_shapes("logits (R, K+1)", ours, theirs, REMEDY)
        labels, shares = torch.cat(regions.labels), {}
        if "logits.classes" in self.weights:
            total = base.divergence(ours, theirs, self.temperature).sum()
            shares["logits.classes"] = total, torch.full_like(total, ours.numel())
        if "logits.boxes" in self.weights:
            theirs = base.deltas_of(their_deltas, labels if columns is None else columns[labels])
            total = ((labels > 0) * distance(base.deltas_of(our_deltas, labels), theirs)).sum()
            shares["logits.boxes"] = total, torch.full_like(total, len(labels))
        return shares

    def _compare_anchors(self, student: View, teacher: View) -> dict[str, SumAndCount]:
        """The dense heads' outputs; one that no term needs is not read."""
        if not self._anchors_are_equal:
            base.check_anchors("logits", student, teacher)
            self._anchors_are_equal = True
        labels, shares = student.anchor_targets.labels, {}
        if "logits.classes" in self.weights:
            ours, theirs = (base.per_anchor(view.class_logits, len(view.spec.classes)) for view in (student, teacher))
            theirs = theirs if self.columns is None else theirs[..., self.columns[1:] - 1]  # no column of background
            base.check_shapes("logits.classes (B, anchors, K)", ours, theirs, REMEDY)
            valid = labels >= 0
            total = (valid * base.divergence(ours, theirs, self.temperature)).sum()
            shares["logits.classes"] = total, ours.shape[-1] * valid.sum()
        if "logits.boxes" in self.weights:
            ours, theirs = (base.per_anchor(view.deltas, 4) for view in (student, teacher))
            base.check_shapes("logits.boxes (B, anchors, 4)", ours, theirs, REMEDY)
            foreground = labels > 0
            shares["logits.boxes"] = (foreground * distance(ours, theirs)).sum(), foreground.sum()
        return shares
