"""Set-prediction detectors of Hugging Face transformers: the base class of RT-DETR, D-FINE and DEIMv2."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from distill.detectors.backbones import freeze, resolved_options
from distill.detectors.base import Detector
from distill.detectors.norms import check_norm, convert_norms
from distill.detectors.options import BackboneOptions, PixelOptions, to_plain
from distill.detectors.query_view import PointView, QueryView
from distill.detectors.roi_align import region_pool
from distill.detectors.set_criterion import SetCriterion
from distill.detectors.torchvision_weights import NoWeights
from distill.detectors.transformers_bodies import body_configuration, initialize_convolutions
from distill.detectors.transformers_weights import published_classes, read_published
from distill.detectors.weights import class_names, initialize
from distill.extras import import_extra
from distill.imaging.resizing import ResizeOptions
from distill.type_checks import parse_options
from distill.types import DetectorSpec, DistillError

BACKBONE = BackboneOptions(name="resnet_d")
"""The default backbone: a ResNet-D."""
PIXELS = PixelOptions(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""The library's pixel values: from 0 to 1, without mean and standard deviation."""
BODY_STRIDES = (4, 8, 16, 32)
"""Strides of C2 to C5."""
LARGEST_STRIDE = 32
CRITERIA = ("own", "library")
"""Values of the option `criterion`."""


def transformers(module: str = "transformers") -> Any:
    """Import a module of transformers.

    Raises:
        DistillError: transformers is not installed, or the scipy that its matcher needs.
    """
    import_extra("scipy", "detr", "the matcher of set-prediction detectors")
    return import_extra(module, "detr", "a detector of the families RTDETR, DFine, DEIMv2 and RFDETR")


class SetPredictionDetector(Detector):
    """A detector of transformers, built from a configuration. Each family implements `build`."""

    enum = NoWeights
    body_path = "model.backbone.model"
    view_class: type[QueryView] = PointView
    needs_squares = True
    paper_schedule = "detr"
    loss_weights: ClassVar[Mapping[str, float]] = {"classification": 1.0, "l1": 5.0, "giou": 2.0}
    """Name of a loss of the View -> its weight."""
    set_criterion: SetCriterion = SetCriterion()
    """The own losses, and the matching of queries to objects."""
    float32_parts = (
        *("model.decoder", "model.enc_output", "model.enc_score_head", "model.enc_bbox_head"),
        *("model.denoising_class_embed", "class_embed", "bbox_embed"),
    )

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Build the network and load its weights. `arguments` are the `locals()` of the family's constructor."""
        parameters = inspect.signature(type(self)).parameters
        given = {name: value for name, value in arguments.items() if name in parameters}
        given["max_size"] = given["min_size"] if given["max_size"] is None else given["max_size"]
        library = transformers()
        names = published_classes(library, given["weights"]) if given["classes"] is None else None
        names = names or class_names(given["classes"], given["weights"], self.enum)
        backbone = parse_options("backbone", given["backbone"], BACKBONE)
        pixels = parse_options("pixels", given["pixels"], PIXELS)
        check_norm(backbone.norm)
        _check_values(given)
        options = to_plain({**given, "backbone": backbone, "pixels": pixels, "classes": names})
        body_config, channels = body_configuration(library, backbone, self.encoder_strides(options))
        net = self.build(library, body_config, channels, options)
        body = net.get_submodule(self.body_path)
        initialize_convolutions(net, body)
        convert_norms(body, backbone.norm, backbone.norm_eps)
        ends = ["embedder", *(f"encoder.stages.{stage}" for stage in range(len(channels)))]
        # A backbone without C5 names its last stage twice, because `trainable_stages` counts from C5.
        body.ends = (*ends, *ends[-1:] * (1 + len(BODY_STRIDES) - len(ends)))
        options["backbone"]["norm_eps"] = resolved_options(body)["norm_eps"]
        spec = DetectorSpec(
            family=self.family,
            outputs=self.view_class.outputs,
            classes=names,
            body=dict(zip(BODY_STRIDES, channels, strict=False)),
            neck=dict.fromkeys(options["strides"], options["neck_channels"]),
            anchors={},
            mean=tuple(pixels.mean),
            std=tuple(pixels.std),
            norm=backbone.norm,
            query_channels=options["decoder_channels"],
            corner_bins=self.corner_bins(options),
        )
        super().__init__(net, spec, options, freeze(body, backbone.trainable_stages))
        self.resize = ResizeOptions(shape="square")
        self.pool = region_pool(tuple(options["strides"]), 7, 2)
        """RoIAlign over the encoder's maps for losses that read regions. The library's network has none."""
        self.class_layers = _class_layers(net)
        initialize(self, backbone.weights, given["weights"], given["head"])

    @classmethod
    def side_multiple(cls, options: Mapping[str, Any]) -> int:
        """See the base class."""
        return LARGEST_STRIDE

    @staticmethod
    def corner_bins(options: Mapping[str, Any]) -> dict[str, float]:
        """Return `DetectorSpec.corner_bins`: empty, because this family has no distributions."""
        return {}

    def encoder_strides(self, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the strides of the backbone's maps that the encoder reads: those of its own maps."""
        return tuple(options["strides"])

    @abstractmethod
    def build(self, library: Any, body: Any, channels: Sequence[int], options: Mapping[str, Any]) -> Any:
        """Build the library's network with random weights.

        Args:
            library: transformers.
            body: configuration of the backbone.
            channels: channels of the backbone's stages from C2 on.
            options: all options, in plain containers.
        """

    def shared_configuration(self, channels: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the library's configuration that all families share."""
        strides, neck = list(options["strides"]), options["neck_channels"]
        read = [size for stride, size in zip(BODY_STRIDES, channels, strict=False) if stride in strides]
        return {
            "num_labels": len(options["classes"]),
            "freeze_backbone_batch_norms": False,  # the norms of the body become those of `backbone.norm`
            "feat_strides": strides,
            "num_feature_levels": len(strides),
            "encode_proj_layers": [len(strides) - 1],
            "encoder_in_channels": read,
            "encoder_hidden_dim": neck,
            "encoder_ffn_dim": options["encoder_ffn"],
            "encoder_attention_heads": options["encoder_heads"],
            "hidden_expansion": options["encoder_expansion"],
            "decoder_in_channels": [neck] * len(strides),
            "d_model": options["decoder_channels"],
            "decoder_layers": options["decoder_layers"],
            "decoder_ffn_dim": options["decoder_ffn"],
            "decoder_attention_heads": options["decoder_heads"],
            "num_queries": options["queries"],
            "num_denoising": options["denoising"],
            "label_noise_ratio": options["label_noise"],
            "box_noise_scale": options["box_noise"],
        }

    def rows_around(self, layer: str) -> tuple[int, int]:
        """Rows before and behind those of the classes: only the embedding of noisy labels has one, for no class."""
        return (0, 1) if layer == "model.denoising_class_embed" else (0, 0)

    def read_published(self, source: str) -> Any:
        """Read weights of transformers' own format; None if `source` names none."""
        return read_published(transformers(), source, self.net)


def _class_layers(net: Any) -> dict[str, int]:
    """Layers of the network whose rows belong to classes -> rows per class. Tied layers have several names."""
    names = [name.removesuffix(".weight") for name in net.state_dict() if name.endswith(".weight")]
    known = ("model.enc_score_head", "model.denoising_class_embed")
    return {name: 1 for name in names if name in known or name.rpartition(".")[0].endswith("class_embed")}


def _check_values(given: Mapping[str, Any]) -> None:
    strides, sides = list(given["strides"]), (given["min_size"], given["max_size"])
    if strides not in ([8, 16, 32], [16, 32]):
        raise DistillError(f"strides: expected [8, 16, 32] or [16, 32], got {strides}")
    if any(side % LARGEST_STRIDE or side < 2 * LARGEST_STRIDE for side in sides):
        raise DistillError(
            f"min_size, max_size: expected multiples of {LARGEST_STRIDE} pixels from {2 * LARGEST_STRIDE} on, got "
            f"{sides[0]} and {sides[1]}. Set data.min_size, data.max_size and, if given, "
            "data.eval_min_size to one such number"
        )
    if given["criterion"] not in CRITERIA:
        raise DistillError(f"criterion: expected {' or '.join(CRITERIA)}, got {given['criterion']!r}")
    least = {
        **dict.fromkeys(("queries", "encoder_heads", "decoder_heads", "detections_per_img"), 1),
        "decoder_layers": 2,  # the library cannot tie the heads of a single layer
        **dict.fromkeys(("encoder_ffn", "decoder_ffn", "denoising", "label_noise", "box_noise"), 0),
    }
    low = {name: value for name, value in least.items() if given[name] < value}
    if low:
        bounds = ", ".join(f"{name} from {value} on" for name, value in low.items())
        raise DistillError(f"expected {bounds}, got {', '.join(f'{name}={given[name]}' for name in low)}")
    for width, heads in (("neck_channels", "encoder_heads"), ("decoder_channels", "decoder_heads")):
        if given[width] < 4 or given[width] % 4 or given[width] % given[heads]:
            raise DistillError(f"{width}: expected a multiple of 4 and of {heads}={given[heads]}, got {given[width]}")
