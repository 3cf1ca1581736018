"""RT-DETR, versions 1 and 2: transformers' network and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.detectors.options import BackboneOptions, PixelOptions
from distill.detectors.set_prediction import BACKBONE, PIXELS, SetPredictionDetector
from distill.types import DistillError

VERSIONS = {1: ("RTDetrConfig", "RTDetrForObjectDetection"), 2: ("RTDetrV2Config", "RTDetrV2ForObjectDetection")}
"""Version -> transformers' classes of the configuration and of the network."""


class RTDETR(SetPredictionDetector):
    """RT-DETR (Zhao et al. 2024): a hybrid encoder over C3 to C5, and a decoder of queries without NMS.

    The network is that of Hugging Face transformers. Arguments that are not listed here are those of `FasterRCNN`.

    Args:
        classes: class names in label order, without background. None means the classes of `weights`.
        backbone: options of the backbone: ``resnet_d`` (a ResNet-D, with a `depth`), or one of ``hgnet_b0``,
            ``hgnet_b2``, ``hgnet_b4``, ``hgnet_b5``. `weights` is a file with a state dict of transformers' backbone.
        version: 1 or 2 (Lv et al. 2024), which samples every level with a number of points of its own.
        strides: strides of the maps that the encoder reads.
        neck_channels: channels of the encoder's maps.
        encoder_ffn: width of the feed-forward layers of the encoder's transformer.
        encoder_heads: attention heads of the encoder's transformer.
        encoder_expansion: width of the encoder's convolution blocks, relative to `neck_channels`.
        decoder_channels: channels of the queries.
        decoder_layers: number of decoder layers.
        decoder_ffn: width of the feed-forward layers of the decoder.
        decoder_heads: attention heads of the decoder.
        decoder_points: sampled points per head and level.
        queries: number of queries. An image must have as many cells.
        denoising: number of denoising queries in training, shared among groups of the image's boxes; 0 for none.
        label_noise: part of the denoising labels that are changed, times two.
        box_noise: size of the noise of denoising boxes, relative to half the side of the box.
        criterion: ``own``: the losses of `set_criterion`, from the papers' equations, counted over all processes;
            ``library``: those of transformers, whose terms differ between its versions. On several processes they are
            scaled to the boxes of all processes. The terms of denoising queries are also
            divided by the number of denoising groups of each process, so they depend on the number of processes.
        score_thresh: lowest score of a detection.
        detections_per_img: largest number of detections of an image.
        pixels: by default values from 0 to 1, without mean and standard deviation.
        min_size: side of the image in pixels, a multiple of 32.
        max_size: upper limit of the side; None: `min_size`.
        weights: a folder in transformers' format, a name on Hugging Face's hub, a run's folder or a file.
        head: see `weights.load_weights`.

    Raises:
        DistillError: an option has an invalid value, the weights do not fit, or transformers is not installed.
    """

    family = "rtdetr"

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        version: int = 2,
        strides: Sequence[int] = (8, 16, 32),
        neck_channels: int = 256,
        encoder_ffn: int = 1024,
        encoder_heads: int = 8,
        encoder_expansion: float = 1.0,
        decoder_channels: int = 256,
        decoder_layers: int = 6,
        decoder_ffn: int = 1024,
        decoder_heads: int = 8,
        decoder_points: int = 4,
        queries: int = 300,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        criterion: str = "own",
        score_thresh: float = 0.0,
        detections_per_img: int = 300,
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 640,
        max_size: int | None = None,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        if version not in VERSIONS:
            raise DistillError(f"version: expected {' or '.join(map(str, VERSIONS))}, got {version!r}")
        super().__init__(locals())

    def build(self, library: Any, body: Any, channels: Sequence[int], options: Mapping[str, Any]) -> Any:
        """Build transformers' RT-DETR."""
        config, network = (getattr(library, name) for name in VERSIONS[options["version"]])
        levels = {"decoder_n_levels": len(options["strides"])} if options["version"] == 2 else {}
        return network(
            config(
                backbone_config=body,
                decoder_n_points=options["decoder_points"],
                **self.shared_configuration(channels, options),
                **levels,
            )
        )
