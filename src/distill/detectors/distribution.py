"""Box heads that predict each side of a box as a distribution (Li et al., "Generalized Focal Loss", NeurIPS 2020)."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder

from distill.detectors.anchors import choose
from distill.precision import upcast
from distill.types import DistillError

BOX_HEADS = ("regression", "distribution")
"""Values of the option `box_head`."""
OVERLAP_LOSSES = ("giou", "diou", "ciou")
"""Box losses that compare boxes, not deltas."""
UNITS_PER_ANCHOR = 8
"""Units of distance in the side of an anchor. Anchors of GFL have a side of 8 strides, and its unit is a stride."""


class DistributionLayer(nn.Conv2d):
    """The last layer of a box branch: a distribution over distances for each side of each anchor.

    Called like torchvision's layer, it returns the expected distances (B, A*4, H, W). Channel (4 a + side) * bins + k
    of its convolution is the logit of the distance k of anchor a; sides are left, top, right, bottom.

    Args:
        channels: of the features.
        anchors: anchors per cell, A.
        bins: distances 0, 1, ..., bins - 1, in units.
    """

    def __init__(self, channels: int, anchors: int, bins: int) -> None:
        super().__init__(channels, anchors * 4 * bins, kernel_size=3, padding=1)
        self.bins = bins
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.bias))

    def logits(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) -> logits (B, A*4*bins, H, W)."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) -> expected distances (B, A*4, H, W), not negative."""
        return expected_distances(upcast(self.logits(x)), self.bins)


def expected_distances(logits: Tensor, bins: int) -> Tensor:
    """Sum over k of k softmax(logits)_k, (B, A*4*bins, H, W) -> (B, A*4, H, W)."""
    batch, channels, height, width = logits.shape
    probabilities = logits.view(batch, channels // bins, bins, height, width).softmax(2)
    distances = torch.arange(bins, dtype=logits.dtype, device=logits.device)
    return (probabilities * distances[:, None, None]).sum(2)


def distribution_focal(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss of each side: cross entropy with the two distances beside the true one (GFL, eq. 6).

    ``(r + 1 - y) CE(logits, r) + (y - r) CE(logits, r + 1)``, r = floor y. True distances y outside of the bins are
    clamped to the bins.

    Args:
        logits: (P, 4, bins).
        distances: (P, 4), in units.

    Returns:
        (P, 4).
    """
    log_p = F.log_softmax(logits, dim=-1)
    true = distances.to(log_p.dtype).clamp(0, logits.shape[-1] - 1)
    low = true.floor().clamp(max=logits.shape[-1] - 2)
    below = -log_p.gather(-1, low.long()[..., None])[..., 0]
    above = -log_p.gather(-1, low.long()[..., None] + 1)[..., 0]
    return (low + 1 - true) * below + (true - low) * above


class DistanceCoder(BoxLinearCoder):  # type: ignore[misc]
    """Deltas of a RetinaNet with distributions: distances from the center of the anchor to the sides of the box.

    The unit is an eighth of the anchor's side ``sqrt(w h)``. Methods are those of torchvision's BoxCoder.
    """

    def encode_single(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (N, 4) and anchors (N, 4) -> distances (N, 4)."""
        return cast(Tensor, self.encode(_units(anchors), boxes))

    def decode_single(self, distances: Tensor, anchors: Tensor) -> Tensor:
        """Distances (N, 4) and anchors (N, 4) -> boxes (N, 4)."""
        return cast(Tensor, self.decode(distances, _units(anchors)))


def _units(anchors: Tensor) -> Tensor:
    """Squares around the centers of anchors (N, 4), with one unit as their side."""
    centers, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    half = sides.prod(1, keepdim=True).sqrt() / (2 * UNITS_PER_ANCHOR)
    return torch.cat([centers - half, centers + half], dim=1)


def check_box_head(box_head: str, bins: int, weight: float) -> bool:
    """Whether the box head predicts distributions.

    Raises:
        DistillError: an option has an invalid value.
    """
    choose("box_head", box_head, BOX_HEADS)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise DistillError(f"box_bins: expected a whole number from 2, got {bins!r}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise DistillError(f"distribution_weight: expected a number from 0, got {weight!r}")
    return box_head == "distribution"
