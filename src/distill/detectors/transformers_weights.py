"""Weights in the format of transformers: a folder with config.json and model.safetensors, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distill.detectors.weights import Source
from distill.types import DistillError

CONFIG = "config.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
OPTIONS = {
    "encoder_heads": "encoder_attention_heads",
    "encoder_expansion": "hidden_expansion",
    "decoder_heads": "decoder_attention_heads",
    "decoder_points": "decoder_n_points",
    "encoder_depth": "depth_mult",
    "bins": "max_num_bins",
    "bin_curve": "reg_scale",
    "encoder": "encoder_type",
    "gateway": "use_gateway",
    "share_box_head": "share_bbox_head",
    "self_heads": "decoder_self_attention_heads",
    "cross_heads": "decoder_cross_attention_heads",
}
"""Option -> key of the library's configuration that changes results, but no shape of a tensor."""
SAME = (
    *("activation_function", "encoder_activation_function", "decoder_activation_function", "normalize_before"),
    *("layer_norm_eps", "batch_norm_eps", "positional_encoding_temperature", "eval_size", "anchor_image_size"),
    *("learn_initial_query", "with_box_refine", "decoder_offset_scale", "decoder_method", "eval_idx", "layer_scale"),
    *("up", "top_prob_values", "encoder_fuse_op", "encoder_has_trailing_conv"),
)
"""Keys of transformers' configuration for which distill has no option. Weights must have been made with our values."""
WITHOUT_EFFECT = {"deimv2": ("eval_size",)}
"""Type of a network -> keys of `SAME` that its weights do not depend on.

The `eval_size` of published DEIMv2s is the size of their evaluation. With it, transformers leaves out the encoder's
position codes in evaluation, which the weights were trained with; here they are always there.
"""


def is_published(source: str) -> bool:
    """Whether a source names weights of transformers: a folder of its format, or an owner and a name on the hub."""
    path = Path(source).expanduser()
    return (path / CONFIG).is_file() or (not path.exists() and bool(HUB_NAME.fullmatch(source)) and not path.suffix)


def published_classes(library: Any, source: str | None) -> tuple[str, ...] | None:
    """Class names of published weights in label order; None if `source` names none.

    Raises:
        DistillError: the configuration cannot be read.
    """
    if source is None or not is_published(source):
        return None
    labels = _call(source, library.AutoConfig.from_pretrained).id2label
    return tuple(labels[index] for index in sorted(labels))


def read_published(library: Any, source: str, net: Any) -> Source | None:
    """Read published weights for a network; None if `source` names none.

    Args:
        library: transformers.
        source: a folder or a name on the hub.
        net: the network that will load them.

    Raises:
        DistillError: the weights cannot be read or fetched, or belong to another kind of network.
    """
    if not is_published(source):
        return None
    config, own = _call(source, library.AutoConfig.from_pretrained), net.config
    if config.model_type != own.model_type:
        raise DistillError(f"{source}: expected weights of the type {own.model_type}, got {config.model_type}")
    body, own_body = config.backbone_config.model_type, own.backbone_config.model_type
    if body != own_body:
        raise DistillError(
            f"{source}: expected weights with a backbone of the type {own_body}, got {body}. distill builds RT-DETR, "
            "D-FINE and DEIMv2 on ResNet-D (rt_detr_resnet) and HGNetV2 (hgnet_v2), not on vision transformers"
        )
    compared = [key for key in SAME if key not in WITHOUT_EFFECT.get(own.model_type, ())]
    differing = [key for key in compared if getattr(config, key, None) != getattr(own, key, None)]
    if differing:
        values = "; ".join(f"{key}={getattr(config, key)} (here {getattr(own, key)})" for key in differing)
        raise DistillError(f"{source}: these weights were made for {values}, for which distill has no option")
    state = _call(source, type(net).from_pretrained).state_dict()
    labels = config.id2label
    return Source(source, state, tuple(labels[index] for index in sorted(labels)), _options(config, own))


def _options(config: Any, own: Any) -> dict[str, Any]:
    """Dotted path of an option -> its value for the weights."""
    known = {name: getattr(config, key) for name, key in OPTIONS.items() if hasattr(own, key)}
    body = config.backbone_config
    if not hasattr(own, "feat_strides"):  # RF-DETR: one stride, and layer norms
        return {**known, "windows": body.num_windows}
    frozen = "frozen" if config.freeze_backbone_batch_norms else "batch"
    facts = {"backbone.stride_in_1x1": getattr(body, "downsample_in_bottleneck", False), "backbone.norm": frozen}
    # The feat_strides of a DEIMv2's lite encoder are those that it reads. It makes one more map.
    strides, last = list(config.feat_strides), config.feat_strides[-1]
    strides += [last * 2] if getattr(config, "encoder_type", None) == "lite" else []
    return {**known, **facts, "strides": strides}


def _call(source: str, read: Any) -> Any:
    try:
        return read(source)
    except Exception as error:  # the library's errors are of many kinds, and some come from the network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DistillError(
            f"weights: transformers cannot read {source} ({reason}). Give a folder with {CONFIG} and "
            "model.safetensors, or a name on Hugging Face's hub. Without a network, download the folder elsewhere:\n"
            f"  hf download {source} --local-dir FOLDER"
        ) from error
