"""DEIMv2: transformers' network and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from distill.detectors.dfine import CORNER_LIMIT, DFineView, check_bins, points_of_levels
from distill.detectors.options import BackboneOptions, PixelOptions
from distill.detectors.set_criterion import CornerBins, SetCriterion
from distill.detectors.set_prediction import PIXELS, SetPredictionDetector
from distill.detectors.view import network
from distill.types import DistillError, Pyramid

BACKBONE = BackboneOptions(name="hgnet_b0")
"""The backbone of DEIMv2 N."""
ENCODERS = ("hybrid", "lite")
"""Values of the option `encoder`."""
LITE_STRIDE = 16
"""Stride of the only map that the lite encoder reads."""
LITE_STRIDES = (16, 32)
"""Strides of the lite encoder's own maps."""


class DEIMv2View(DFineView):
    """The View of a DEIMv2. The encoder differs from that of D-FINE, the decoder's outputs do not."""

    @network
    def neck(self) -> Pyramid:
        """Stride -> map of the encoder (B, C, H, W)."""
        stages = [self.body[stride] for stride in self.detector.encoder_strides(self.detector.options)]
        layers = self.net.model.conv_encoder.encoder_input_proj
        # The hybrid encoder changes the list that it gets.
        maps = self.net.model.encoder([layer(x) for layer, x in zip(layers, stages, strict=True)]).feature_maps
        return dict(zip(self.spec.neck, maps, strict=True))


class DEIMv2(SetPredictionDetector):
    """DEIMv2 (Huang et al. 2025, arXiv 2509.20787): a D-FINE with a leaner encoder and decoder, trained with MAL.

    The network is that of Hugging Face transformers. Arguments that are not listed here are those of `DFine`. The sizes
    N, Pico, Femto and Atto have HGNetV2 as their backbone. S, M, L and X have DINOv3, a vision transformer with an
    adapter. They are refused: the transformer has no maps of strides 4 to 32, and Meta's license restricts its weights.

    Args:
        backbone: N has ``hgnet_b0``, the lite sizes have ``hgnet_pico``, ``hgnet_femto`` and ``hgnet_atto``.
        encoder: ``hybrid`` (N); or ``lite`` (Pico, Femto, Atto), which makes maps of strides 16 and 32 from the
            backbone's map of stride 16, without attention. It does not read `encoder_ffn` and `encoder_heads`.
        gateway: whether a trained gate mixes the decoder's attention with its input (N); the lite sizes add both.
        share_box_head: whether all decoder layers share one box head (lite sizes).
        corner_losses: whether FGL and DDF train the corner distributions, and boxes are matched to the union of the
            matches of all layers (N). The lite sizes are trained with classification, L1 and GIoU only.

    Raises:
        DistillError: an option has an invalid value, the weights do not fit, or transformers is not installed or older
            than 5.18.
    """

    family = "deimv2"
    view_class = DEIMv2View
    body_path = "model.conv_encoder.model"
    loss_weights: ClassVar[Mapping[str, float]] = {**SetPredictionDetector.loss_weights, "fgl": 0.15, "ddf": 1.5}

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        encoder: str = "hybrid",
        strides: Sequence[int] = (16, 32),
        neck_channels: int = 128,
        encoder_ffn: int = 512,
        encoder_heads: int = 8,
        encoder_expansion: float = 0.34,
        encoder_depth: float = 0.5,
        decoder_channels: int = 128,
        decoder_layers: int = 3,
        decoder_ffn: int = 512,
        decoder_heads: int = 8,
        decoder_points: int | Sequence[int] = 6,
        gateway: bool = True,
        share_box_head: bool = False,
        queries: int = 300,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        bins: int = 32,
        bin_curve: float = 4.0,
        corner_losses: bool = True,
        criterion: str = "own",
        score_thresh: float = 0.0,
        detections_per_img: int = 300,
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 640,
        max_size: int | None = None,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        _check_encoder(encoder, strides)
        _refuse_dinov3(backbone)
        check_bins(bins, bin_curve)
        decoder_points = points_of_levels(decoder_points, strides)  # in the description in one form
        super().__init__(locals())
        corner_bins = CornerBins(bins + 1, CORNER_LIMIT, bin_curve) if corner_losses else None
        self.set_criterion = SetCriterion("mal", corner_bins, union=corner_losses)
        self.spec = replace(self.spec, trains_corners=corner_losses)

    @staticmethod
    def corner_bins(options: Mapping[str, Any]) -> dict[str, float]:
        """Return the bins of the corner distributions."""
        return {"count": options["bins"] + 1, "limit": CORNER_LIMIT, "scale": float(options["bin_curve"])}

    def encoder_strides(self, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the strides of the backbone's maps that the encoder reads."""
        return (LITE_STRIDE,) if options["encoder"] == "lite" else tuple(options["strides"])

    def build(self, library: Any, body: Any, channels: Sequence[int], options: Mapping[str, Any]) -> Any:
        """Build transformers' DEIMv2."""
        if not hasattr(library, "Deimv2Config"):
            raise DistillError(
                f"DEIMv2 needs transformers 5.18 or newer, got {library.__version__}. Update it:\n"
                "  pip install 'transformers>=5.18'"
            )
        lite = {"feat_strides": [LITE_STRIDE], "encoder_layers": 0} if options["encoder"] == "lite" else {}
        # The library's loss has all terms. Without corner losses, two of them have the weight 0.
        unused = {"weight_loss_fgl": 0.0, "weight_loss_ddf": 0.0, "use_dense_one_to_one": False}
        return library.Deimv2ForObjectDetection(
            library.Deimv2Config(
                backbone_config=body,
                encoder_type=options["encoder"],
                decoder_n_points=options["decoder_points"],
                decoder_activation_function="silu",
                use_gateway=options["gateway"],
                share_bbox_head=options["share_box_head"],
                depth_mult=options["encoder_depth"],
                max_num_bins=options["bins"],
                reg_scale=float(options["bin_curve"]),
                **{**self.shared_configuration(channels, options), **lite},
                **({} if options["corner_losses"] else unused),
            )
        )


def _check_encoder(encoder: str, strides: Sequence[int]) -> None:
    if encoder not in ENCODERS:
        raise DistillError(f"encoder: expected {' or '.join(ENCODERS)}, got {encoder!r}")
    if encoder == "lite" and tuple(strides) != LITE_STRIDES:
        raise DistillError(f"strides: expected {list(LITE_STRIDES)} with encoder=lite, got {list(strides)}")


def _refuse_dinov3(backbone: BackboneOptions | Mapping[str, Any]) -> None:
    name = str(backbone.get("name", "") if isinstance(backbone, Mapping) else backbone.name)
    if name.startswith(("dino", "vit")):
        raise DistillError(
            f"backbone.name: {name} is a vision transformer. distill has the sizes N, Pico, Femto and Atto of DEIMv2, "
            "whose backbone is HGNetV2. S, M, L and X have DINOv3 with an adapter, which has no maps of strides 4 to "
            "32, and whose weights have a license of their own. Choose model=deimv2_n"
        )
