"""DICOD: an image classifier teaches a detector, its classes and the places of its boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.labels import match_classes
from distill.losses import base
from distill.losses.base import DistillLoss
from distill.losses.crops import crops
from distill.precision import upcast
from distill.types import Batch, DetectorSpec, DistillError, View

WEIGHTS = {"classes": 0.4, "pixels": 0.15, "features": 0.15}
SIGMOID = ("kl-ce", "kl-bce")
EPSILON = 1e-10
"""Added to probabilities, as the released code does."""


class ImageClassifier(Protocol):
    """What is read of a classifier; `distill.training.classifier.Classifier` is one. A plain object, so that it is no part of the loss."""

    classes: tuple[str, ...]

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W), normalised for the classifier."""

    def logits(self, images: Tensor) -> Tensor:
        """(N, classes), without a gradient."""

    def stem(self, images: Tensor) -> Tensor:
        """(N, C, h, w) of the first layers; a gradient flows to the images."""

    def identity(self) -> dict[str, Any]:
        """Source and sha256 of its weights."""


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """sum_c (p + eps) (log(p + eps) - log(q + eps)) of each row; probabilities (P, K) -> (P,)."""
    return ((p + EPSILON) * ((p + EPSILON).log() - (q + EPSILON).log())).sum(1)


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Softmax heads: the student's logits (P, K+1), background first, the classifier's (P, K) -> (P,)."""
    p = F.pad((upcast(teacher) / temperature).softmax(1), (1, 0))  # no classifier sees background
    return temperature**2 * divergence(p, (upcast(student) / temperature).softmax(1))


def sigmoid_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``kl-ce``: the sigmoids of each row, divided by their sum; logits (P, K) of both -> (P,)."""
    p, q = (F.logsigmoid(upcast(each) / temperature).softmax(1) for each in (teacher, student))
    return temperature**2 * divergence(p, q)


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``kl-bce``: mean over the classes of the divergence of yes and no; logits (P, K) of both -> (P,)."""
    scaled = [(upcast(each) / temperature).reshape(-1, 1) for each in (teacher, student)]
    p, q = (torch.cat([each.sigmoid(), (-each).sigmoid()], dim=1) for each in scaled)
    return temperature**2 * divergence(p, q).view(teacher.shape).mean(1)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of |S - T| over channels and cells; (P, C, h, w) of both -> (P,)."""
    return (student - teacher).abs().mean((1, 2, 3))


def nearest(boxes: Tensor, image: Tensor, others: Tensor, owner: Tensor) -> Tensor:
    """For each box (P, 4) of an image (P,) the index (P,) of the nearest of the other boxes (G, 4) in the same image (G,)."""
    apart = (boxes[:, None] - others).abs().sum(2)
    return apart.masked_fill(image[:, None] != owner, math.inf).argmin(1)


class Positives(NamedTuple):
    """What a student says of its P positive regions, of all images."""

    image: Tensor
    """(P,) index of the image."""
    logits: Tensor
    """(P, K+1), background first, of a softmax head, (P, K) of a sigmoid head."""
    boxes: Tensor
    """(P, 4), as the student predicts them."""
    truth: Tensor
    """(P, 4), the matched ground truth, up to rounding."""


def positive_regions(view: View) -> Positives:
    """Sampled regions that are an object, each box as its label's deltas move it."""
    rois = view.rois
    labels = torch.cat(rois.labels)
    image = torch.cat([torch.full_like(each, index) for index, each in enumerate(rois.labels)])
    rows = labels.nonzero()[:, 0]
    logits, boxes = view.roi_logits(rois.boxes)[0], view.roi_boxes(rois.boxes)
    return Positives(image[rows], logits[rows], boxes[rows, labels[rows]], torch.cat(rois.truth)[rows])


def positive_anchors(view: View) -> Positives:
    """Anchors or points that are an object, of all levels."""
    targets = view.anchor_targets
    image, rows = (targets.labels > 0).nonzero(as_tuple=True)
    logits, deltas = base.per_anchor(view.class_logits, len(view.spec.classes)), base.per_anchor(view.deltas, 4)
    boxes, truth = view.anchor_boxes(deltas), view.anchor_boxes(targets.deltas)
    return Positives(image, logits[image, rows], boxes[image, rows], truth[image, rows])


class DICOD(DistillLoss):
    """What a classifier says of the crop of an object, the detector's class branch should say of each region matched to it;
    and the crop at a predicted box should look, to the classifier's first layers, like the crop at the object's box.

    ::

        classes   = tau^2 / N_pos sum_i sum_c (p_ic + eps) (log(p_ic + eps) - log(q_ic + eps))          eps = 1e-10
        pixels    = 1 / N_pos sum_i  mean |pool_4(x(b_i)) - pool_4(x(g_i))|          mean over channels and pooled cells
        features  = 1 / N_pos sum_i  mean |pool_8(f(x(b_i))) - pool_8(f(x(g_i)))|    a gradient through b_i only

    over the positive regions i: sampled regions (two-stage), anchors or points (one-stage). x(b) is the crop at a box, g_i the
    matched ground truth, b_i the predicted box, f the classifier up to its max-pool. With logits z over tau: two-stage,
    p = (0, softmax(z_t)), q = softmax(z_s) with background; one-stage, ``kl-ce``, the sigmoids of a row divided by their sum,
    or ``kl-bce``, the mean over classes of the divergences of (sigmoid, 1 - sigmoid).

    Source: Guo, Alvarez, Salzmann, "Distilling Image Classifiers in Object Detectors", NeurIPS 2021, arXiv 2106.05209; sums,
    eps, pooling, crops and weights as in the facts of its released code, which has SSD300 alone: weights for other detectors
    are not known.

    Where we differ: crops take the pixels as the *classifier* was trained to see them (there: as the detector sees them),
    and of the image's edge its last pixel instead of black; N_pos is counted over all processes (``normalizer="process"`` for
    the original); of the feature layers only the first one is here, which is the released choice. The matched object of an
    anchor is the box nearest to its decoded target.

    Shapes: logits (P, K+1) or (P, K), boxes (P, 4), crops (P, 3, size, size). Released weights: 0.4 at T = 2 and 0.15, the
    latter on the sum of both terms of localisation. No detector teaches, so none is needed. Finding the positive regions costs
    one wait for the device a step.

    Args:
        student: specs of the student.
        classifier: the teacher, see :class:`distill.training.classifier.Classifier`; it is frozen and no part of this module. One is
            made by ``distill classifier FILE.pt data=…``.
        teacher: not read.
        weights: of the terms.
        temperature: tau of the class term.
        sigmoid: the form of the class term for sigmoid heads, ``kl-ce`` or ``kl-bce``.
        size: side of the crops in pixels.
        ramp, normalizer, seed: see :class:`DistillLoss`. Nothing is drawn.
    """

    needs_teacher = False
    columns: Tensor

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec | None,
        classifier: ImageClassifier,
        weights: Mapping[str, float] = WEIGHTS,
        temperature: float = 2.0,
        sigmoid: str = "kl-ce",
        size: int = 112,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        super().__init__(base.options("weights", weights, WEIGHTS), ramp, normalizer, seed)
        if not 0 < temperature < math.inf:
            raise DistillError(f"temperature: expected a number above 0, got {temperature}")
        if sigmoid not in SIGMOID:
            raise DistillError(f"sigmoid: expected {' or '.join(SIGMOID)}, got '{sigmoid}'")
        if sigmoid == "kl-ce" and "rois" not in student.outputs and len(student.classes) == 1:
            raise DistillError(
                "DICOD: sigmoid=kl-ce divides the sigmoids of a row by their sum, which says nothing where there is only one "
                f"class, {list(student.classes)}. Set sigmoid=kl-bce"
            )
        if size < 8:
            raise DistillError(f"size: expected crops of at least 8 pixels, for the 8 x 8 pooled cells, got {size}")
        remedy = (
            "give classifier.classes the student's names, train a classifier on this data, or set weights.classes to 0"
        )
        columns = match_classes(student.classes, classifier.classes, remedy) if "classes" in self.weights else [0]
        self.register_buffer("columns", torch.tensor(columns[1:]) - 1, persistent=False)
        self.classifier, self.temperature, self.size = classifier, float(temperature), size
        sigmoids = {"kl-ce": sigmoid_divergence, "kl-bce": binary_divergence}
        self.divergence = softmax_divergence if "rois" in student.outputs else sigmoids[sigmoid]

    def identity(self) -> dict[str, Any]:
        """The classifier's."""
        return self.classifier.identity()

    def forward(self, student: View, teacher: View | None = None) -> dict[str, Tensor]:
        """The terms of `weights`, scalars; the teacher is not read."""
        with torch.autocast(student.batch.images.device.type, enabled=False):
            found = (positive_regions if "rois" in student.spec.outputs else positive_anchors)(student)
            nothing = upcast(found.logits).sum() + upcast(found.boxes).sum()
            totals = self._compare(student.batch, found) if len(found.image) else dict.fromkeys(self.weights, nothing)
        count = nothing.new_tensor(float(len(found.image)))
        return self.average({term: [(totals[term], count)] for term in self.weights})

    def _compare(self, batch: Batch, found: Positives) -> dict[str, Tensor]:
        """Sums over positive regions. Each object is cropped and classified once, however many regions it has."""
        boxes = torch.cat([target.boxes for target in batch.targets])
        owner = torch.cat([torch.full_like(target.labels, index) for index, target in enumerate(batch.targets)])
        mine = nearest(found.truth, found.image, boxes, owner)
        images = self.classifier.images(batch)
        objects = crops(images, batch.sizes, boxes, owner, self.size)
        totals = {}
        if "classes" in self.weights:
            theirs = self.classifier.logits(objects)[:, self.columns][mine]
            check_columns(found.logits, theirs, softmax=self.divergence is softmax_divergence)
            totals["classes"] = self.divergence(found.logits, theirs, self.temperature).sum()
        if self.weights.keys() - {"classes"}:
            totals |= self._localise(crops(images, batch.sizes, found.boxes, found.image, self.size), objects, mine)
        return totals

    def _localise(self, ours: Tensor, objects: Tensor, mine: Tensor) -> dict[str, Tensor]:
        pool, totals = F.adaptive_avg_pool2d, {}
        if "pixels" in self.weights:
            totals["pixels"] = distance(pool(ours, 4), pool(objects, 4)[mine]).sum()
        if "features" in self.weights:
            stem = self.classifier.stem
            totals["features"] = distance(pool(stem(ours), 8), pool(stem(objects), 8)[mine]).sum()
        return totals


def check_columns(student: Tensor, teacher: Tensor, softmax: bool) -> None:
    """Refuse logits of another number of classes than the loss was built for."""
    theirs = F.pad(teacher, (1, 0)) if softmax else teacher
    base.check_shapes(
        "classes, logits of positive regions", student, theirs, "Build the loss with the student's own spec"
    )
