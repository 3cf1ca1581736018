"""D-FINE: transformers' network and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from distill.detectors.options import BackboneOptions, PixelOptions
from distill.detectors.query_view import PointView
from distill.detectors.set_criterion import CornerBins, QueryGroup, SetCriterion
from distill.detectors.set_prediction import PIXELS, SetPredictionDetector
from distill.precision import upcast
from distill.types import DistillError, QueryLayer

CORNER_LIMIT = 0.5
"""Offset of the last but one bin, as a share of the start box: transformers' `up`, which is no option here."""
BACKBONE = BackboneOptions(name="hgnet_b4")
"""The backbone of D-FINE L."""


class DFineView(PointView):
    """The View of a D-FINE. Its queries have the distributions of the sides' offsets."""

    def group(self, decoded: Any, rows: slice) -> QueryGroup:
        """Read the layers from the decoder's outputs.

        The library puts the boxes from which the first layer refines, and their logits, before those of the layers.
        """
        outputs = (
            decoded.intermediate_logits[:, 1:],
            decoded.intermediate_reference_points[:, 1:],
            decoded.intermediate_hidden_states.transpose(0, 1),
            decoded.intermediate_predicted_corners.unflatten(-1, (4, -1)),
        )
        columns: list[tuple[Tensor, ...]] = [upcast(x[:, :, rows]).unbind(1) for x in outputs]
        # Outside of training, the library has the last layer alone, so its logits are contiguous. Others give scores
        # that differ in the last bit.
        columns[0] = tuple(x.contiguous() for x in columns[0])
        layers = [QueryLayer(*layer) for layer in zip(*columns, strict=True)]
        logits, boxes = (
            upcast(x[:, 0, rows]) for x in (decoded.intermediate_logits, decoded.intermediate_reference_points)
        )
        return QueryGroup(layers, QueryLayer(logits, boxes, layers[0].hidden))


class DFine(SetPredictionDetector):
    """D-FINE (Peng et al. 2025): an RT-DETR whose decoder refines distributions of the sides of a box.

    The network is that of Hugging Face transformers. Arguments that are not listed here are those of `RTDETR`.

    Args:
        backbone: D-FINE N and S have ``hgnet_b0``, M has ``hgnet_b2``, L ``hgnet_b4``, X ``hgnet_b5``.
        encoder_depth: number of blocks in the encoder's convolution layers, relative to 3.
        decoder_points: sampled points per head, a number for all levels or a list of one per level.
        bins: number of steps of a distribution, even.
        bin_curve: the curve of the weighting function of the bins: larger values give larger offsets (`reg_scale`).

    Raises:
        DistillError: an option has an invalid value, the weights do not fit, or transformers is not installed.
    """

    family = "dfine"
    view_class = DFineView
    loss_weights: ClassVar[Mapping[str, float]] = {**SetPredictionDetector.loss_weights, "fgl": 0.15, "ddf": 1.5}

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        strides: Sequence[int] = (8, 16, 32),
        neck_channels: int = 256,
        encoder_ffn: int = 1024,
        encoder_heads: int = 8,
        encoder_expansion: float = 1.0,
        encoder_depth: float = 1.0,
        decoder_channels: int = 256,
        decoder_layers: int = 6,
        decoder_ffn: int = 1024,
        decoder_heads: int = 8,
        decoder_points: int | Sequence[int] = (3, 6, 3),
        queries: int = 300,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        bins: int = 32,
        bin_curve: float = 4.0,
        criterion: str = "own",
        score_thresh: float = 0.0,
        detections_per_img: int = 300,
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 640,
        max_size: int | None = None,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        check_bins(bins, bin_curve)
        decoder_points = points_of_levels(decoder_points, strides)  # in the description in one form
        super().__init__(locals())
        self.set_criterion = SetCriterion(bins=CornerBins(bins + 1, CORNER_LIMIT, bin_curve), union=True)

    @staticmethod
    def corner_bins(options: Mapping[str, Any]) -> dict[str, float]:
        """Return the bins of the corner distributions."""
        return {"count": options["bins"] + 1, "limit": CORNER_LIMIT, "scale": float(options["bin_curve"])}

    def build(self, library: Any, body: Any, channels: Sequence[int], options: Mapping[str, Any]) -> Any:
        """Build transformers' D-FINE."""
        return library.DFineForObjectDetection(
            library.DFineConfig(
                backbone_config=body,
                decoder_n_points=options["decoder_points"],
                depth_mult=options["encoder_depth"],
                max_num_bins=options["bins"],
                reg_scale=float(options["bin_curve"]),
                **self.shared_configuration(channels, options),
            )
        )


def points_of_levels(points: int | Sequence[int], strides: Sequence[int]) -> list[int]:
    """The number of sampled points for each level.

    Raises:
        DistillError: there is not one number from 1 on for each of the strides.
    """
    each = [points] * len(strides) if isinstance(points, int) else list(points)
    if len(each) != len(strides) or min(each, default=0) < 1:
        raise DistillError(
            f"decoder_points: expected a number from 1 on, or one for each of the strides {list(strides)}, got "
            f"{points!r}"
        )
    return each


def check_bins(bins: int, bin_curve: float) -> None:
    """Check the options of the corner distributions.

    Raises:
        DistillError: the number of bins is odd or below 4, or the curve is not above 0.
    """
    if bins < 4 or bins % 2 or not bin_curve > 0:
        raise DistillError(f"bins, bin_curve: expected an even number from 4 and one above 0, got {bins}, {bin_curve}")
