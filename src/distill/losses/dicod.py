"""DICOD: an image classifier teaches a detector, its classes and its boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.labels import match_classes
from distill.losses import base, heads
from distill.losses.base import DistillLoss
from distill.losses.crops import crops
from distill.losses.heads import Positives
from distill.precision import upcast
from distill.types import Batch, DetectorSpec, DistillError, View, require

WEIGHTS = {"classes": 0.4, "pixels": 0.15, "features": 0.15}
SIGMOID = ("kl-ce", "kl-bce")
EPSILON = 1e-10
"""Added to probabilities, as the released code does."""


class ImageClassifier(Protocol):
    """The interface of the classifier; :class:`distill.training.classifier.Classifier` has it.

    It is no `nn.Module`, so that the loss does not register it.
    """

    classes: tuple[str, ...]

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W), normalized for the classifier."""

    def logits(self, images: Tensor) -> Tensor:
        """(N, classes), without a gradient."""

    def stem(self, images: Tensor) -> Tensor:
        """(N, C, h, w), the output of the first layers, with a gradient to the images."""

    def identity(self) -> dict[str, Any]:
        """Source and sha256 of the weights."""


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """sum_c (p + eps) (log(p + eps) - log(q + eps)) of each row; probabilities (P, K) -> (P,)."""
    return ((p + EPSILON) * ((p + EPSILON).log() - (q + EPSILON).log())).sum(1)


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Softmax heads: the student's logits (P, K+1), background first, the classifier's (P, K) -> (P,)."""
    p = F.pad((upcast(teacher) / temperature).softmax(1), (1, 0))  # the classifier has no background
    return temperature**2 * divergence(p, (upcast(student) / temperature).softmax(1))


def sigmoid_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``kl-ce``: the sigmoids of each row, divided by their sum; logits (P, K) of both -> (P,)."""
    p, q = (F.logsigmoid(upcast(logits) / temperature).softmax(1) for logits in (teacher, student))
    return temperature**2 * divergence(p, q)


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``kl-bce``: mean over classes of the divergence of (sigmoid, 1 - sigmoid); logits (P, K) of both -> (P,)."""
    scaled = [(upcast(logits) / temperature).reshape(-1, 1) for logits in (teacher, student)]
    p, q = (torch.cat([logits.sigmoid(), (-logits).sigmoid()], dim=1) for logits in scaled)
    return temperature**2 * divergence(p, q).view(teacher.shape).mean(1)


def mean_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of |S - T| over channels and cells; (P, C, h, w) of both -> (P,)."""
    return (student - teacher).abs().mean((1, 2, 3))


def nearest(boxes: Tensor, image: Tensor, others: Tensor, owner: Tensor) -> Tensor:
    """Index (P,) of the nearest of the other boxes (G, 4) of an image, for boxes (P, 4); images are (P,) and (G,)."""
    distances = (boxes[:, None] - others).abs().sum(2)
    return distances.masked_fill(image[:, None] != owner, math.inf).argmin(1)


class DICOD(DistillLoss):
    """Imitate an image classifier: its logits of each object's crop, and its features of the crops at predicted boxes.

    The detector's class branch imitates the classifier's logits in all regions that are matched to the object. The crop
    at a predicted box is pulled towards the crop at the object's box, in pixels and in the classifier's first layers.

    ::

        classes   = tau^2 / N_pos sum_i sum_c (p_ic + eps) (log(p_ic + eps) - log(q_ic + eps))          eps = 1e-10
        pixels    = 1 / N_pos sum_i  mean |pool_4(x(b_i)) - pool_4(x(g_i))|          mean over channels and pooled cells
        features  = 1 / N_pos sum_i  mean |pool_8(f(x(b_i))) - pool_8(f(x(g_i)))|    a gradient through b_i only

    over the positive regions i: sampled regions (two-stage), anchors or points (one-stage). x(b) is the crop at a box,
    g_i the matched ground truth, b_i the predicted box, f the classifier up to its max-pool. With logits z over tau:
    two-stage, p = (0, softmax(z_t)), q = softmax(z_s) with background; one-stage, ``kl-ce``, the sigmoids of a row
    divided by their sum, or ``kl-bce``, the mean over classes of the divergences of (sigmoid, 1 - sigmoid).

    Source: Guo, Alvarez, Salzmann, "Distilling Image Classifiers in Object Detectors", NeurIPS 2021, arXiv 2106.05209.
    The sums, eps, pooling, crops and weights are those of its released code, which has SSD300 only: weights for other
    detectors are not known.

    Where we differ: crops have the pixels that the *classifier* was trained on (in the released code: those of the
    detector), and repeat the last pixel at the image's edge (in the released code: black); N_pos is counted over all
    processes (``normalizer="process"`` for the original); only the first feature layer is implemented, which is the
    released choice. The matched object of an anchor is the box nearest to its decoded target.

    Shapes: logits (P, K+1) or (P, K), boxes (P, 4), crops (P, 3, size, size). Released weights: 0.4 at T = 2, and 0.15
    on the sum of both localization terms. No detector teacher is needed. Selecting the positive regions waits for the
    device once per step.

    Args:
        student: spec of the student.
        teacher: not read.
        classifier: a :class:`distill.training.classifier.Classifier`, frozen and not part of this module. The command
            ``distill classifier FILE.pt data=…`` trains one.
        weights: of the terms.
        temperature: tau of the class term.
        sigmoid: the form of the class term for sigmoid heads, ``kl-ce`` or ``kl-bce``.
        size: side of the crops in pixels.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
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
        super().__init__(base.merge_options("weights", weights, WEIGHTS), ramp, normalizer, seed)
        if sigmoid not in SIGMOID:
            raise DistillError(f"sigmoid: expected {' or '.join(SIGMOID)}, got '{sigmoid}'")
        if "rois" not in student.outputs:
            require(student, "anchor_targets", "DICOD", "student")
        if sigmoid == "kl-ce" and "rois" not in student.outputs and len(student.classes) == 1:
            raise DistillError(
                "DICOD: sigmoid=kl-ce divides the sigmoids of a row by their sum, which is constant with only one "
                f"class, {list(student.classes)}. Set sigmoid=kl-bce"
            )
        if size < 8:
            raise DistillError(f"size: expected crops of at least 8 pixels, for the 8 x 8 pooled cells, got {size}")
        remedy = (
            "give classifier.classes the student's names, train a classifier on this data, or set weights.classes to 0"
        )
        columns = match_classes(student.classes, classifier.classes, remedy) if "classes" in self.weights else [0]
        self.register_buffer("columns", torch.tensor(columns[1:]) - 1, persistent=False)
        self.classifier, self.size = classifier, size
        self.temperature = base.check_temperature("temperature", temperature)
        sigmoids = {"kl-ce": sigmoid_divergence, "kl-bce": binary_divergence}
        self.divergence = softmax_divergence if "rois" in student.outputs else sigmoids[sigmoid]

    def identity(self) -> dict[str, Any]:
        """Source and sha256 of the classifier's weights."""
        return self.classifier.identity()

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View | None = None) -> dict[str, Tensor]:
        """The terms of `weights`, scalars; the teacher is not read."""
        with torch.autocast(student.batch.images.device.type, enabled=False):
            select = heads.positive_regions if "rois" in student.spec.outputs else heads.positive_anchors
            positives = select(student)
            zero = (
                upcast(positives.logits).sum() + upcast(positives.boxes).sum()
            )  # stays attached if there are no positives
            sums = (
                self._compare(student.batch, positives) if len(positives.image) else dict.fromkeys(self.weights, zero)
            )
        count = zero.new_tensor(float(len(positives.image)))
        return self.average({term: [(sums[term], count)] for term in self.weights})

    def _compare(self, batch: Batch, positives: Positives) -> dict[str, Tensor]:
        """Sums over positive regions. Each object is cropped and classified once, however many regions it has."""
        boxes = torch.cat([target.boxes for target in batch.targets])
        owner = torch.cat([torch.full_like(target.labels, index) for index, target in enumerate(batch.targets)])
        matched = nearest(positives.truth, positives.image, boxes, owner)
        images = self.classifier.images(batch)
        object_crops = crops(images, batch.sizes, boxes, owner, self.size)
        sums = {}
        if "classes" in self.weights:
            logits = self.classifier.logits(object_crops)[:, self.columns][matched]
            padded = F.pad(logits, (1, 0)) if self.divergence is softmax_divergence else logits
            base.require_equal_shapes("classes, logits of positive regions", positives.logits, padded, heads.REMEDY)
            sums["classes"] = self.divergence(positives.logits, logits, self.temperature).sum()
        if self.weights.keys() - {"classes"}:
            predicted_crops = crops(images, batch.sizes, positives.boxes, positives.image, self.size)
            sums |= self._compare_crops(predicted_crops, object_crops, matched)
        return sums

    def _compare_crops(self, predicted: Tensor, objects: Tensor, matched: Tensor) -> dict[str, Tensor]:
        """Sums of the localization terms, for the crop at each predicted box and its matched object's crop."""
        pool, sums = F.adaptive_avg_pool2d, {}
        if "pixels" in self.weights:
            sums["pixels"] = mean_distance(pool(predicted, 4), pool(objects, 4)[matched]).sum()
        if "features" in self.weights:
            stem = self.classifier.stem
            sums["features"] = mean_distance(pool(stem(predicted), 8), pool(stem(objects), 8)[matched]).sum()
        return sums
