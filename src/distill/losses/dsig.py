"""DSIG: distil a graph whose nodes are regions and whose edges are their similarities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill.losses import adapters, base, heads
from distill.losses.base import DistillLoss, SumAndCount, check_temperature, is_number
from distill.losses.heads import ClassMap
from distill.losses.imitation import MapImitation, RegionErrors
from distill.losses.kernels.graph import graph_errors
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View, require

NODES = {"foreground": 0.5, "background": 0.5, "alpha": 7.5, "predicted": 0.0}
EDGES = {"all": 2.0, "mining": 0.6}
NECK = {"all": 0.5, "levels": None}
LOGITS = {"classes": 3.0, "boxes": 1.0, "temperature": 1.0}
PREDICTIONS = {"score": 0.0, "nms": 0.5, "top": 100}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}

IMAGES_PER_GPU = 2
"""The released code sums over the two images of a GPU, so its sum is twice the mean over images."""
OPTIONS = {True: "dsig, dsig_r50_r101 or dsig_r101_r152", False: "dsig_retinanet or dsig_retinanet_small"}
"""Options of the config group ``distill``, by whether the student is two-stage, for messages."""


def image_means(error: Tensor, member: Tensor) -> Tensor:
    """Mean over each image's regions where `member` is true, (B, R) both -> (B,); an attached 0 without members."""
    return (member * error).sum(1) / member.sum(1).clamp(min=1)


def background_nodes(error: Tensor, foreground: Tensor, background: Tensor, alpha: float | None) -> Tensor:
    """alpha F / B times the mean error of an image's B background nodes; three (B, R) -> (B,).

    With alpha None the factor is 1.
    """
    factor = 1.0 if alpha is None else alpha * foreground.sum(1) / background.sum(1).clamp(min=1)
    return factor * image_means(error, background)


def mined(logits: Tensor, threshold: float) -> Tensor:
    """Regions whose cross-entropy with background reaches the threshold; the teacher's logits (R, K+1) -> (R,)."""
    return -F.log_softmax(upcast(logits), dim=1)[:, 0] >= threshold


def l1_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of box deltas: (..., 4) -> (...)."""
    return (upcast(student) - upcast(teacher.detach())).abs().sum(-1)


def by_image(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Values of the regions of all images in order, (R, ...) -> (B, max(counts), ...), padded with zeros.

    The counts are integers of the host, so that nothing waits for the device. Equal counts need no copy.
    """
    most = max(1, *counts)
    if set(counts) == {most}:
        return x.view(len(counts), most, *x.shape[1:])
    padded = pad_sequence(list(torch.split(x, list(counts))), batch_first=True)
    return padded if padded.shape[1] else torch.cat([padded, x.new_zeros(len(counts), 1, *x.shape[1:])], dim=1)


def over_images(values: Tensor) -> SumAndCount:
    """`IMAGES_PER_GPU` times the mean over images (B,)."""
    total = IMAGES_PER_GPU * values.sum()
    return total, torch.full_like(total, len(values))


class DSIG(DistillLoss):
    """Imitate a graph per image: its nodes are the pooled features of regions, its edges the cosines between them.

    ::

        nodes.foreground = 2/N sum_i mean_{F_i, c, h, w} (s - t)^2
        nodes.background = 2/N sum_i alpha F_i / B_i mean_{B_i, c, h, w} (s - t)^2
        nodes.predicted  = 2/N sum_i mean_{P_i, c, h, w} (s - t)^2
        edges.all        = 2/N sum_i 1/2 mean_{m_i, m_i} (cos(t, t') - cos(s, s'))^2
        neck.all         = sum_l mean_{n, c, h, w} (A_l(S_l) - T_l)^2
        logits.classes   = tau^2 / (R (K+1)) sum_r KL(softmax(z_t / tau) || softmax(z_s / tau))
        logits.boxes     = 1/R sum_{r foreground} |d_s - d_t|_1         deltas of the region's label

    over images i = 1..N. Two-stage: nodes are the *student's* sampled regions, F_i foreground and B_i background ones;
    edges join the foreground and those background regions that the teacher's box head finds hard (cross-entropy of at
    least ``mining``). One-stage: nodes are the student's own P_i predictions, all of one kind and all joined; the
    classes are a softmax over K for each anchor that is not ignored (so 1/(anchors K)), and boxes are a mean over the
    foreground anchors. No gradient reaches the boxes of the regions, and regions are pooled once.

    Source: Chen et al., "Deep Structured Instance Graph for Distilling Object Detectors", ICCV 2021, arXiv 2109.12862,
    as in its released code (dvlab-research/Dsig). Beyond the abstract, the paper is known to us second-hand: its
    objective is described as nodes, edges and logits only. ``neck`` and the second 0.5 of the background come from the
    code.

    Where we differ: the code sums nodes and edges over the two images of a GPU; here the value is twice the mean over
    images, so that released weights hold at any batch size. An image without foreground or background adds 0 (in the
    code NaN or a division by zero). Counts are summed over all processes (``normalizer="process"`` for the original).
    Predictions are clipped to the image and pooled from the levels that the View pools from. Adapters for necks of
    unequal channels are ours: one per level of the neck and one for the nodes, 1x1 convolutions by default. The paper
    has none, and equal channels get none here. Where the teacher knows more classes, its softmax is over the student's
    classes and background.

    Shapes: maps (B, C, H, W), regions (R, C, 7, 7), logits (R, K+1) or (B, A*K, H, W). The released weights for a
    ResNet-18, MobileNetV2 or EfficientNet-B0 are the defaults; those for other students are config options. "classes"
    is a mean over elements, not regions: 3 corresponds to 3/81 of the divergence of a COCO region. An edge weight of 2
    is the paper's lambda of 1 on the mean error. alpha is not a settled constant: earlier versions have 0.025 and no
    adaptive factor.

    Args:
        student, teacher: specs of both detectors. The student's family decides what the regions are; weights of the
            other family's nodes are refused.
        nodes: weights of its terms; ``alpha`` of the background's factor, None for a factor of 1.
        edges: weight; ``mining``: threshold for background regions, None for foreground only. None for one-stage.
        neck: weight; ``levels``: strides, None for all that both models have.
        logits: weights of its terms; ``temperature`` of classes.
        predictions: thresholds of a one-stage student's regions: ``score``, ``nms``, and the ``top`` ones per image.
        mask: options of :class:`distill.losses.masks.Mask`, for ``neck``; kind ``none``, the original, is the whole
            neck.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

    classes: ClassMap

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
        nodes, edges = base.merge_options("nodes", nodes, NODES), base.merge_options("edges", edges, EDGES)
        neck, logits = base.merge_options("neck", neck, NECK), base.merge_options("logits", logits, LOGITS)
        weights = {f"nodes.{kind}": nodes[kind] for kind in ("foreground", "background", "predicted")}
        weights |= {"edges.all": edges["all"], "neck.all": neck["all"]}
        weights |= {f"logits.{kind}": logits[kind] for kind in ("classes", "boxes")}
        super().__init__(weights, ramp, normalizer, seed)

        self.mask = base.build_mask("neck", bool(self.terms("neck")), mask, MASK)
        self.two_stage = "rois" in student.outputs
        self.alpha, self.temperature = nodes["alpha"], logits["temperature"]
        self.mining = edges["mining"] if "edges.all" in self.weights else None
        self.predictions = base.merge_options("predictions", predictions, PREDICTIONS)
        self._validate_numbers()
        if self.terms("nodes") or self.terms("edges"):
            base.require_outputs("nodes and edges", student, teacher, "roi_features")
        self._validate_regions(student)
        self._match_heads(student, teacher)

        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.maps = self.regions = self.nodes = None
        if self.terms("neck"):
            self.maps = MapImitation(
                "neck",
                student.neck,
                teacher.neck,
                neck["levels"],
                adapter,
                normalization="mse",
                over_levels="sum",
                seed=seed,
            )
        if self.terms("nodes") or self.terms("edges"):
            student_channels, teacher_channels = (next(iter(spec.neck.values())) for spec in (student, teacher))
            own_seed = base.derive_seed(seed, "regions")
            self.regions = adapters.adapter(student_channels, teacher_channels, seed=own_seed, **adapter)
            self.nodes = RegionErrors("nodes", student_channels) if self.terms("nodes") else None

    def _validate_numbers(self) -> None:
        for name, value in (("nodes.alpha", self.alpha), ("edges.mining", self.mining)):
            if value is not None and not is_number(value):
                raise DistillError(f"{name}: expected a number, 0 or more, or null, got {value}")
        check_temperature("logits.temperature", self.temperature)
        score, nms, top = (self.predictions[name] for name in PREDICTIONS)
        if not (is_number(score, high=1) and is_number(nms, high=1) and isinstance(top, int) and top > 0):
            raise DistillError(
                f"predictions: expected score and nms from 0 to below 1 and top 1 or more, got {self.predictions}"
            )

    def _validate_regions(self, student: DetectorSpec) -> None:
        """Refuse settings for regions that this student does not have."""
        foreign = ["predicted"] if self.two_stage else ["foreground", "background"]
        wrong = [f"nodes.{kind}=0" for kind in foreign if f"nodes.{kind}" in self.weights]
        if self.mining is not None and not self.two_stage:
            wrong.append("edges.mining=null")
        if wrong:
            regions = ["predicted regions", "foreground and background regions"]
            options = OPTIONS[self.two_stage]
            if "queries" in student.outputs:
                options = "dsig_retinanet_small"  # without a term on logits, which needs anchors
            raise DistillError(
                f"DSIG: the student is a {student.family}, whose nodes are its {regions[self.two_stage]}, but the "
                f"settings are for {regions[not self.two_stage]}. Choose distill={options}, or set {', '.join(wrong)}"
            )

    def _match_heads(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Map the classes where a term reads the teacher's head, and refuse heads that cannot be compared."""
        settings = [f"logits.{kind}=0" for kind in self.terms("logits")]
        comparable = self.two_stage == ("rois" in teacher.outputs)
        if settings and not self.two_stage:
            comparable = (student.family, student.anchors) == (teacher.family, teacher.anchors)
        if self.mining is not None:
            settings.append("edges.mining=null")
        if settings and not comparable:
            raise DistillError(
                f"DSIG: to compare their heads, student and teacher must be of one kind, with equal anchors where they "
                f"are one-stage; the student is a {student.family} with anchors {student.anchors} (stride: per cell), "
                f"the teacher a {teacher.family} with {teacher.anchors}. Choose another teacher, or set "
                f"{', '.join(settings)}"
            )
        if self.terms("logits") and not self.two_stage:
            require(student, "anchor_targets", "logits", "student", "Set the weights of logits to 0")
            heads.require_equal_anchors("logits", student, teacher)
        if "logits.classes" in self.weights and not self.two_stage and len(student.classes) == 1:
            raise DistillError(
                "logits.classes: a softmax over the classes of a one-stage detector is constant with only one class, "
                f"{list(student.classes)}. Set logits.classes=0"
            )
        if settings:
            self.classes = ClassMap("logits and edges", student, teacher, partial=True)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        graph = ("nodes", "edges") if self.two_stage else ()
        masked = ("neck",) if self.mask.reads_boxes else ()
        return [term for term in self.weights if term.partition(".")[0] in (*graph, *masked, "logits")]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. Stages that no term needs are not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.maps is not None:
            seeds = self.seeds(student.batch.ids)
            shares |= self.maps.compare_necks(student, teacher, self.mask, seeds, self.terms("neck"))
        if self.regions is not None:
            shares |= {term: [over_images(values)] for term, values in self._compare_graphs(student, teacher).items()}
        if self.terms("logits"):
            compare = self._compare_regions if self.two_stage else self._compare_anchors
            shares |= {term: [share] for term, share in compare(student, teacher).items()}
        return self.average(shares)

    def _compare_graphs(self, student: View, teacher: View) -> dict[str, Tensor]:
        """Nodes and edges: one value per image (B,) for each term."""
        assert self.regions is not None
        boxes, is_foreground = self._nodes(student)
        counts = [len(image_boxes) for image_boxes in boxes]
        features, teacher_features = student.roi_features(boxes), teacher.roi_features(boxes)
        adapted, remedy = self.regions(features), "Give both necks equal levels, or set adapter"
        base.require_equal_shapes("nodes and edges (R, C, h, w)", adapted, teacher_features, remedy)
        foreground = by_image(is_foreground, counts)
        background = by_image(torch.ones_like(is_foreground), counts) & ~foreground
        joined = None
        if self.terms("edges"):
            joined = foreground if self.mining is None else foreground | self._mined(teacher, boxes, self.mining)
        errors, edges = graph_errors(
            by_image(adapted.flatten(1), counts), by_image(teacher_features.flatten(1), counts), joined
        )
        if self.nodes is not None and self.nodes.reweigh is not None:
            listed = torch.cat([row[:count] for row, count in zip(errors, counts, strict=True)])
            errors = by_image(self.nodes.reweighed(features, listed), counts)
        values = {
            f"nodes.{kind}": image_means(errors, foreground) for kind in self.terms("nodes") if kind != "background"
        }
        if "nodes.background" in self.weights:
            values["nodes.background"] = background_nodes(errors, foreground, background, self.alpha)
        if joined is not None:
            values["edges.all"] = edges
        return values

    def _nodes(self, student: View) -> tuple[list[Tensor], Tensor]:
        """Boxes per image, and which regions are foreground (R,): all predictions of a one-stage student."""
        if self.two_stage:
            return student.rois.boxes, torch.cat(student.rois.labels) > 0
        boxes = [predicted.boxes.detach() for predicted in student.predictions(**self.predictions)]
        return boxes, torch.cat([torch.ones_like(corners[:, 0], dtype=torch.bool) for corners in boxes])

    def _mined(self, teacher: View, boxes: Sequence[Tensor], threshold: float) -> Tensor:
        """Regions (B, R) that have edges even where they are background."""
        logits = self.classes.logits(teacher.roi_logits(boxes)[0])
        return by_image(mined(logits, threshold), [len(image_boxes) for image_boxes in boxes])

    def _compare_regions(self, student: View, teacher: View) -> dict[str, SumAndCount]:
        """The terms of ``logits``, on the student's regions."""
        outputs = heads.region_outputs("logits", student, teacher, student.rois, self.classes)
        labels, shares = outputs.labels, {}
        if "logits.classes" in self.weights:
            logits = outputs.student_logits, outputs.teacher_logits
            total = heads.kl_divergence(*logits, self.temperature).sum()
            shares["logits.classes"] = total, torch.full_like(total, logits[0].numel())
        if "logits.boxes" in self.weights:
            total = ((labels > 0) * l1_distance(*outputs.label_deltas())).sum()
            shares["logits.boxes"] = total, torch.full_like(total, len(labels))
        return shares

    def _compare_anchors(self, student: View, teacher: View) -> dict[str, SumAndCount]:
        """The terms of ``logits``, on all anchors. Outputs that no term needs are not read."""
        labels, shares = student.anchor_targets.labels, {}
        if "logits.classes" in self.weights:
            student_logits, teacher_logits = (
                heads.flatten_anchors(view.class_logits, len(view.spec.classes)) for view in (student, teacher)
            )
            teacher_logits, remedy = self.classes.dense_logits(teacher_logits), heads.REMEDY
            base.require_equal_shapes("logits.classes (B, anchors, K)", student_logits, teacher_logits, remedy)
            student_logits, teacher_logits = self.classes.compared(student_logits, teacher_logits, labels)
            divergence = heads.kl_divergence(student_logits, teacher_logits, self.temperature)
            total, count = base.sum_and_count(divergence, labels >= 0)
            shares["logits.classes"] = total, student_logits.shape[-1] * count
        if "logits.boxes" in self.weights:
            deltas = heads.anchor_outputs("logits.boxes", "deltas", student, teacher, 4)
            shares["logits.boxes"] = base.sum_and_count(l1_distance(*deltas), labels > 0)
        return shares
