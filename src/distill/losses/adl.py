"""ADL: imitate dense class scores, with a weight that grows with the divergence and the teacher's entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from distill.losses import base, heads
from distill.losses.base import DistillLoss
from distill.losses.heads import ClassMap
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View, require

LOGITS = {"classes": 0.5}
DIVISORS = ("scores", "positives")
ERRORS = ("divergence", "cross_entropy")


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the sigmoid of each logit: -q log q - (1 - q) log(1 - q)."""
    logits = upcast(logits)
    return F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")


def adaptive_divergence(
    student: Tensor, teacher: Tensor, beta: float, gamma: float, error: str = "divergence"
) -> Tensor:
    """(1 - exp(-(KL + beta T)))^gamma KL of each logit, T the teacher's entropy; any equal shapes -> the same shape.

    With ``error="cross_entropy"``, KL + T instead of the last KL.
    """
    divergence, uncertainty = heads.sigmoid_divergence(student, teacher, 1.0).clamp(min=0), entropy(teacher.detach())
    doubt = -(-(divergence + beta * uncertainty)).expm1()
    compared = divergence if error == "divergence" else divergence + uncertainty
    return doubt.clamp(min=0).pow(gamma) * compared


class ADL(DistillLoss):
    """Imitate the class scores of dense heads, with small weights where the teacher is sure and the student agrees.

    ::

        logits.classes = 1/N sum_{i, c} (1 - exp(-(KL_ic + beta T(q_ic))))^gamma KL_ic
        KL = KL(q || p) of two Bernoulli distributions,  q = sigmoid(z_t),  p = sigmoid(z_s)
        T(q) = -q log q - (1 - q) log(1 - q),            N = sum_{i, c} q_ic^theta

    over all anchors i and classes c. The gradient also flows through the weight, as in the focal loss.

    Source: Tang, Feng, Shao, Kuang, Zhang, Lu, "Learning Efficient Detector with Semi-supervised Adaptive
    Distillation", 2019, arXiv 1901.00366. The constants are those of its released settings of RetinaNet: gamma = 2,
    theta = 1.8, and beta = 1, because the released exponent is the cross-entropy KL + T(q). The equation above is from
    memory. The released kernel differs: it multiplies the weight by the cross-entropy (``error="cross_entropy"``) and
    leaves out ignored anchors (``ignored=False``). Its factor 1/2 is our default weight.
    With ``divide_by="positives"`` N is the number of positive anchors, as in the focal loss.

    Shapes: logits (B, A*K, H, W). N is summed over all processes, at least 1.

    Args:
        student, teacher: specs of two one-stage detectors with equal anchors.
        logits: weight of its term.
        beta, gamma: constants of the weight of each logit, see the equation.
        divide_by: ``scores`` (N) or ``positives``.
        theta: exponent of the scores in N.
        error: ``divergence`` or ``cross_entropy``.
        ignored: whether anchors take part that the student's assignment ignores. N has them in any case.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        logits: Mapping[str, float] = LOGITS,
        beta: float = 1.0,
        gamma: float = 2.0,
        divide_by: str = "scores",
        theta: float = 1.8,
        error: str = "divergence",
        ignored: bool = True,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        logits = base.merge_options("logits", logits, LOGITS)
        super().__init__({"logits.classes": logits["classes"]}, ramp, normalizer, seed)
        if not all(map(base.is_number, (beta, gamma, theta))) or divide_by not in DIVISORS or error not in ERRORS:
            raise DistillError(
                f"adl: expected beta, gamma and theta of at least 0, divide_by of {' or '.join(DIVISORS)} and error of "
                f"{' or '.join(ERRORS)}, got beta={beta}, gamma={gamma}, theta={theta}, divide_by={divide_by}, "
                f"error={error}"
            )
        if not isinstance(ignored, bool):
            raise DistillError(f"adl: expected ignored of true or false, got {ignored!r}")
        self.error, self.ignored = error, ignored
        self.beta, self.gamma, self.theta, self.by_scores = beta, gamma, theta, divide_by == "scores"
        if self.truth_terms:
            require(student, "anchor_targets", "logits", "student", "Set the weights of logits to 0")
        if self.weights:
            self.classes = heads.dense_class_map("logits", student, teacher)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [] if self.by_scores and self.ignored else list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The term of `weights`, a scalar."""
        if not self.weights:
            return {}
        student_logits, teacher_logits = heads.anchor_classes("logits", student, teacher, self.classes)
        error = adaptive_divergence(student_logits, teacher_logits, self.beta, self.gamma, self.error)
        if not self.ignored:
            error = (student.anchor_targets.labels >= 0)[..., None] * error
        if self.by_scores:
            count = upcast(teacher_logits).sigmoid().pow(self.theta).sum()
        else:
            count = (student.anchor_targets.labels > 0).sum()
        return self.average({"logits.classes": [(error.sum(), count)]})
