"""MMDetection 2.x and 3.x: Faster R-CNN, Mask R-CNN, RetinaNet and FCOS with a ResNet or ResNeXt and FPN.

Most files hold the text of their configuration, which has the settings that shapes do not show. For a file without a
configuration, the input format comes from the table `RECIPES` of the model zoo, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from distill.convert import foreign
from distill.convert.foreign import ForeignDetector, State, unsupported
from distill.convert.mmdetection_config import current_config, input_format, read_model, read_resize
from distill.types import DistillError

PROJECT = "MMDetection"

BODY: tuple[tuple[str, str], ...] = (
    ("backbone.conv1.weight", "backbone.body.conv1.weight"),
    ("backbone.bn1.*", "backbone.body.bn1.*"),
    ("backbone.layer{k}.{i}.conv{j}.weight", "backbone.body.layer{k}.{i}.conv{j}.weight"),
    ("backbone.layer{k}.{i}.bn{j}.*", "backbone.body.layer{k}.{i}.bn{j}.*"),
    ("backbone.layer{k}.{i}.downsample.0.weight", "backbone.body.layer{k}.{i}.downsample.0.weight"),
    ("backbone.layer{k}.{i}.downsample.1.*", "backbone.body.layer{k}.{i}.downsample.1.*"),
    ("neck.lateral_convs.{i}.conv.*", "backbone.fpn.inner_blocks.{i}.0.*"),
)
"""Name in the file -> torchvision's name, for the table of `foreign.rename`."""
TWO_STAGE: tuple[tuple[str, str], ...] = (
    ("neck.fpn_convs.{i}.conv.*", "backbone.fpn.layer_blocks.{i}.0.*"),
    ("rpn_head.rpn_conv.*", "rpn.head.conv.0.0.*"),
    ("rpn_head.rpn_cls.*", "rpn.head.cls_logits.*"),
    ("rpn_head.rpn_reg.*", "rpn.head.bbox_pred.*"),
    ("roi_head.bbox_head.shared_fcs.{i}.*", "roi_heads.box_head.fc{i+6}.*"),
    ("roi_head.bbox_head.fc_cls.*", "roi_heads.box_predictor.cls_score.*"),
    ("roi_head.bbox_head.fc_reg.*", "roi_heads.box_predictor.bbox_pred.*"),
    ("roi_head.mask_head.convs.{i}.conv.*", "roi_heads.mask_head.{i}.0.*"),
    ("roi_head.mask_head.upsample.*", "roi_heads.mask_predictor.conv5_mask.*"),
    ("roi_head.mask_head.conv_logits.*", "roi_heads.mask_predictor.mask_fcn_logits.*"),
)
ONE_STAGE: tuple[tuple[str, str], ...] = (
    ("neck.fpn_convs.3.conv.*", "backbone.fpn.extra_blocks.p6.*"),
    ("neck.fpn_convs.4.conv.*", "backbone.fpn.extra_blocks.p7.*"),
    ("neck.fpn_convs.{i}.conv.*", "backbone.fpn.layer_blocks.{i}.0.*"),
)
RETINANET: tuple[tuple[str, str], ...] = (
    ("bbox_head.cls_convs.{i}.conv.*", "head.classification_head.conv.{i}.0.*"),
    ("bbox_head.reg_convs.{i}.conv.*", "head.regression_head.conv.{i}.0.*"),
    ("bbox_head.cls_convs.{i}.gn.*", "head.classification_head.conv.{i}.1.*"),
    ("bbox_head.reg_convs.{i}.gn.*", "head.regression_head.conv.{i}.1.*"),
    ("bbox_head.retina_cls.*", "head.classification_head.cls_logits.*"),
    ("bbox_head.retina_reg.*", "head.regression_head.bbox_reg.*"),
)
FCOS: tuple[tuple[str, str], ...] = (
    ("bbox_head.cls_convs.{i}.conv.*", "head.classification_head.conv.{i*3}.*"),
    ("bbox_head.reg_convs.{i}.conv.*", "head.regression_head.conv.{i*3}.*"),
    ("bbox_head.cls_convs.{i}.gn.*", "head.classification_head.conv.{i*3+1}.*"),
    ("bbox_head.reg_convs.{i}.gn.*", "head.regression_head.conv.{i*3+1}.*"),
    ("bbox_head.conv_cls.*", "head.classification_head.cls_logits.*"),
    ("bbox_head.conv_reg.*", "head.regression_head.bbox_reg.*"),
    ("bbox_head.conv_centerness.*", "head.regression_head.bbox_ctrness.*"),
)
TABLES = {
    "faster_rcnn": (*BODY, *TWO_STAGE),
    "mask_rcnn": (*BODY, *TWO_STAGE),
    "retinanet": (*BODY, *ONE_STAGE, *RETINANET),
    "fcos": (*BODY, *ONE_STAGE, *FCOS),
}
OLD_NAMES: tuple[tuple[str, str], ...] = (
    (r"^bbox_head\.fcos_(cls|reg|centerness)\.", r"bbox_head.conv_\1."),
    (r"^(bbox_head\.(?:cls|reg)_convs\.\d+)\.(weight|bias)$", r"\1.conv.\2"),
)
"""Tensor names of versions before 2.0 -> current names, for tensors whose values have not changed."""

IGNORED = r"num_batches_tracked$|^bbox_head\.scales\.\d+\.scale$"
"""Names that no line of a table needs: counters, and scales, which become one tensor."""
PARTS: tuple[tuple[str, str], ...] = (
    (r"conv_offset", "deformable convolutions"),
    (r"^backbone\.stem\.|downsample\.2\.", "backbone: a ResNet-V1c or V1d, with a stem of several convolutions"),
    (r"^backbone\..*\.gn\d?\.", "backbone: group norm"),
    (r"^backbone\..*(context_block|gen_attention|plugin|\.se\.)", "backbone: attention or context blocks"),
    (r"^backbone\.(?!conv1|bn1|layer)", "backbone: another network than a ResNet or ResNeXt"),
    (r"^neck\..*\.(gn|bn)\.", "neck: norms"),
    (r"^neck\.(?!lateral_convs|fpn_convs)", "neck: another one than FPN"),
    (r"^rpn_head\.rpn_conv\.\d", "RPN: several convolutions"),
    (r"^rpn_head\.(?!rpn_conv|rpn_cls|rpn_reg)", "RPN: another one than FPN's"),
    (r"^roi_head\.(bbox_head|mask_head)\.\d+\.", "box head: a cascade"),
    (r"^roi_head\.bbox_head\.shared_fcs\.([2-9]|\d\d)", "box head: other layers than two fully connected ones"),
    (r"^roi_head\.bbox_head\.(shared_convs|cls_convs|reg_convs|cls_fcs|reg_fcs)", "box head: convolutions"),
    (r"^roi_head\.mask_head\.convs\.([4-9]|\d\d)|^roi_head\.mask_head\.convs\.\d\.(gn|bn)", "mask head"),
    (r"^roi_head\.(?!bbox_head|mask_head)", "box head: further heads"),
    (r"^mask_head\.|^(query|encoder|decoder)", "a head of another family"),
)
"""Regular expression for names -> a part that no family of distill has."""

RGB = {
    "pixels__channel_order": "rgb",
    "pixels__mean": (123.675, 116.28, 103.53),
    "pixels__std": (58.395, 57.12, 57.375),
    "backbone__stride_in_1x1": False,
}
BGR = {"pixels__channel_order": "bgr", "pixels__mean": (103.53, 116.28, 123.675)}
RECIPES: dict[str, dict[str, Any]] = {
    "pytorch": RGB,
    "caffe": {**BGR, "pixels__std": (1.0, 1.0, 1.0), "backbone__stride_in_1x1": True},
    "caffe, plain FCOS": {
        "pixels__channel_order": "bgr",
        "pixels__mean": (102.9801, 115.9465, 122.7717),
        "pixels__std": (1.0, 1.0, 1.0),
        "backbone__stride_in_1x1": True,
    },
    "32x8d": {**BGR, "pixels__std": (57.375, 57.12, 58.395), "backbone__stride_in_1x1": False},
}
"""Name of a recipe of the model zoo -> its input. Pixels are from 0 to 255, in the channel order."""

FCOS_KINDS = {
    "relu": "center-normbbox-centeronreg-giou: centerness of the box tower, distances by ReLU, NMS at 0.6",
    "exp": "plain one: centerness of the class tower, distances by an exponential, NMS at 0.5",
}
"""Option `distances` -> the kind of FCOS in the model zoo."""

OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
COMMON: dict[str, Any] = {
    "backbone__norm": "batch_fixed_stats",
    "backbone__norm_eps": 1e-5,
    "backbone__trainable_stages": 3,
    "min_size": 800,
    "max_size": 1333,
    "detections_per_img": 100,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
}
ANCHORS = {"anchors__offset": 0.0, "anchors__rounded": False, "anchors__order": "ratio", "anchors__step": "nominal"}
RULES: dict[str, dict[str, Any]] = {
    "two_stage": {
        **ANCHORS,
        "anchors__sizes": [[32.0], [64.0], [128.0], [256.0], [512.0]],
        "anchors__ratios": [0.5, 1.0, 2.0],
        "delta_clamp": "both",
        "proposal_min_size": 0.0,
        "rpn_post_nms_top_n_train": 1000,
        "rpn_post_nms_top_n_test": 1000,
        "box_sampling_ratio": 0,
        "box_roi_aligned": True,
        "box_level_rule": "mmdetection",
    },
    "retinanet": {
        **ANCHORS,
        "anchors__sizes": [[4 * stride * part for part in OCTAVE] for stride in (8, 16, 32, 64, 128)],
        "anchors__ratios": [0.5, 1.0, 2.0],
        "delta_clamp": "both",
        "p6_from": "c5",
        "p7_relu": False,
    },
    "fcos": {"point_offset": 0.5, "point_step": "nominal", "level_scales": True, "p6_from": "p5", "p7_relu": True},
}
"""Kind of detector -> fixed behavior of MMDetection's code, and model zoo values that a configuration may override."""


def matches(state: State) -> bool:
    """Whether tensors have MMDetection's names."""
    return any(name.startswith(("neck.lateral_convs.", "rpn_head.", "roi_head.", "bbox_head.")) for name in state)


def convert(
    state: State, where: str, meta: Mapping[str, Any], config: Mapping[str, Any] | None, classes: Any
) -> ForeignDetector:
    """Convert a detector of MMDetection.

    Args:
        state: the tensors of the file.
        where: the file, for messages. Its name may hold the recipe, as in the model zoo.
        meta: the facts beside the tensors.
        config: the configuration, as `python_config.parse_config` returns it, or None.
        classes: class names, or None.

    Raises:
        DistillError: the file holds a part of a detector only, or a detector that no family can express.
    """
    state = _current_names(state)
    version = _version(meta)
    if version in ("0", "1") or "bbox_head.fc_cls.weight" in state:
        raise unsupported(
            where,
            "MMDetection 1.x",
            "its boxes are one pixel wider; convert it with MMDetection's upgrade_model_version",
        )
    foreign.check_parts(state, PARTS, where)
    detector = ForeignDetector(PROJECT, _family(state, where))
    two_stage = detector.family in ("faster_rcnn", "mask_rcnn")
    detector.renamed, detector.unused = foreign.rename(state, TABLES[detector.family])
    parts = ("backbone.", "neck.", "rpn_head.", "roi_head.", "bbox_head.")
    foreign.check_unused(detector.unused, IGNORED, parts, where)
    detector.state = {new: state[name] for name, new in detector.renamed.items()}
    shape = foreign.body_shape(state, lambda stage: f"backbone.layer{stage}.", where)
    detector.set("shapes", **{f"backbone__{name}": value for name, value in shape.items()})
    detector.set("shapes", neck_channels=len(foreign.rows_of(state, "neck.fpn_convs.0.conv.weight", where)))
    detector.set(f"{PROJECT}'s code", **COMMON, **RULES["two_stage" if two_stage else detector.family])
    rule = "mmdetection2" if version == "2" and not two_stage else "mmdetection"
    detector.set("version" if version else "assumed", detection_rule=rule)
    if version is None and not two_stage:
        detector.warnings.append(
            "The file names no version. Version 3.x is assumed; version 2.x keeps boxes without area in NMS"
        )
    config = current_config(config, where)
    count, anchors = _read_shapes(detector, state, where)
    named = classes or _class_names(meta)
    foreign.class_names(named, count, detector, where)
    with foreign.reading_configuration(where):
        _read_input(detector, shape, config, where)
        if config is not None and "model" in config:
            read_model(detector, config["model"], where)
            read_resize(detector, config)
    if config is None or "model" not in config:
        _warn_of_zoo(detector)
    _shift_means(detector, where)
    foreign.convert_rows(detector.state, count, anchors, where)
    foreign.check_anchors(detector, anchors, where)
    detector.warnings.append(
        "MMDetection rounds the sides of a resized image, distill rounds them down: they differ by up to one pixel"
    )
    return detector


def _warn_of_zoo(detector: ForeignDetector) -> None:
    """Warn about settings that are assumed, because the file has no configuration."""
    detector.warnings.append(
        "The file holds no readable configuration: anchors, thresholds and RoIAlign are assumed to be those of the "
        "model zoo. If the training used others, give its configuration with --config"
    )
    if detector.family == "fcos":
        detector.warnings.append(
            f"The towers' convolutions have {'a' if detector.options['distances'] == 'relu' else 'no'} bias, so the "
            f"FCOS is taken to be the model zoo's {FCOS_KINDS[detector.options['distances']]}"
        )


def _current_names(state: State) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in state.items():
        if name.startswith("ema_"):  # 2.x: the buffers of an average, whose values the plain names hold
            continue
        for pattern, replacement in OLD_NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def _version(meta: Mapping[str, Any]) -> str | None:
    """The first digit of MMDetection's version."""
    if isinstance(meta.get("mmdet_version"), str):
        return meta["mmdet_version"][:1] or None
    if "mmengine_version" in meta or "dataset_meta" in meta:
        return "3"
    return "2" if "mmcv_version" in meta or "CLASSES" in meta else None


def _class_names(meta: Mapping[str, Any]) -> Any:
    data = meta.get("dataset_meta")
    lowered = {str(key).lower(): value for key, value in data.items()} if isinstance(data, Mapping) else {}
    return lowered.get("classes") or meta.get("CLASSES")


def _family(state: State, where: str) -> str:
    for name, family in (
        ("bbox_head.conv_centerness.weight", "fcos"),
        ("bbox_head.retina_cls.weight", "retinanet"),
        ("roi_head.mask_head.conv_logits.weight", "mask_rcnn"),
        ("roi_head.bbox_head.fc_cls.weight", "faster_rcnn"),
    ):
        if name in state:
            return family
    raise DistillError(
        f"{where}: names of {PROJECT}, but no head of a Faster R-CNN, Mask R-CNN, RetinaNet or FCOS "
        "(roi_head.bbox_head.fc_cls, bbox_head.retina_cls, bbox_head.conv_centerness): the file holds another family, "
        "or only a part of a detector"
    )


def _read_shapes(detector: ForeignDetector, state: State, where: str) -> tuple[int, int]:
    """Number of classes and of anchors per cell."""
    if detector.family in ("faster_rcnn", "mask_rcnn"):
        first = foreign.rows_of(state, "roi_head.bbox_head.shared_fcs.0.weight", where)
        foreign.check_pooled(first.shape[1], detector.options["neck_channels"], where)
        detector.set("shapes", head_channels=len(first))
        count = len(foreign.rows_of(state, "roi_head.bbox_head.fc_cls.weight", where)) - 1
        foreign.note_shared_boxes(detector, foreign.rows_of(state, "roi_head.bbox_head.fc_reg.weight", where), count)
        objectness = len(foreign.rows_of(state, "rpn_head.rpn_cls.weight", where))
        anchors = len(foreign.rows_of(state, "rpn_head.rpn_reg.weight", where)) // 4
        if objectness != anchors:
            raise unsupported(where, "RPN", f"{objectness} logits for {anchors} anchors: a softmax, expected a sigmoid")
        return count, anchors
    inputs, top = (
        foreign.rows_of(state, f"neck.{name}.weight", where).shape[1]
        for name in ("fpn_convs.3.conv", "lateral_convs.2.conv")
    )
    if inputs != top:
        detector.set("shapes", p6_from="p5")
    elif top != detector.options["neck_channels"]:
        detector.set("shapes", p6_from="c5")
    grouped = "bbox_head.cls_convs.0.gn.weight" in state
    biased = "bbox_head.cls_convs.0.conv.bias" in state
    if detector.family == "retinanet":
        detector.set("shapes", head_norm=("group_bias" if biased else "group") if grouped else "none")
        boxes, scores = (foreign.rows_of(state, f"bbox_head.retina_{name}.weight", where) for name in ("reg", "cls"))
        return foreign.dense_counts(boxes, scores, where)
    detector.set("shapes", head_norm="group" if grouped else "none")
    for name in [name for name in detector.state if re.search(r"_head\.conv\.\d+\.weight$", name)]:
        if detector.state[name].dim() == 4:  # torchvision's convolutions always have a bias
            bias = torch.zeros(len(detector.state[name]), dtype=detector.state[name].dtype)
            detector.state.setdefault(f"{name.removesuffix('weight')}bias", bias)
    scales = [state.get(f"bbox_head.scales.{level}.scale") for level in range(5)]
    known = [scale.reshape(()) for scale in scales if scale is not None and scale.numel() == 1]
    if len(known) == 5:
        detector.state["head.regression_head.scales"] = torch.stack(known)
        detector.renamed |= {f"bbox_head.scales.{level}.scale": "head.regression_head.scales" for level in range(5)}
        detector.unused = [name for name in detector.unused if name not in detector.renamed]
    else:
        raise unsupported(
            where, "head", f"{len(known)} scales bbox_head.scales, expected one number for each of 5 levels"
        )
    source, improved = "assumed", biased
    detector.set(
        source,
        centerness_from="box" if improved else "class",
        distances="relu" if improved else "exp",
        nms_thresh=0.6 if improved else 0.5,
    )
    return len(foreign.rows_of(state, "bbox_head.conv_cls.weight", where)), 1


def _read_input(
    detector: ForeignDetector, shape: Mapping[str, Any], config: Mapping[str, Any] | None, where: str
) -> None:
    """Channel order, statistics and stride: of the configuration, or of a recipe of the model zoo."""
    given = input_format(config or {})
    recipe = _recipe(detector, shape, given.get("backbone__stride_in_1x1"), where)
    missing = {name: value for name, value in RECIPES[recipe].items() if name not in given}
    if "pixels__mean" in given:
        missing = {name: value for name, value in missing.items() if not name.startswith("pixels__")}
        given = {"pixels__channel_order": "bgr", "pixels__std": (1.0, 1.0, 1.0), **given}
    if missing:
        detector.assume(
            f"The tensors do not show the input format. It is assumed to be that of the model zoo's recipe '{recipe}': "
            + ", ".join(f"{name.replace('__', '.')}={value}" for name, value in missing.items())
            + ". Give the configuration with --config, or a file name of the model zoo",
            **missing,
        )
    detector.set("configuration", **given)
    for name in ("pixels.mean", "pixels.std"):
        detector.options[name] = [float(value) / 255 for value in detector.options[name]]


def _recipe(detector: ForeignDetector, shape: Mapping[str, Any], stride_in_1x1: bool | None, where: str) -> str:
    if (shape.get("groups"), shape.get("group_width")) == (32, 8):
        return "32x8d"
    if shape.get("groups", 1) > 1 or shape["depth"] in (18, 34):
        return "pytorch"
    name = re.split(r"[/\\]", where)[-1].lower()
    guessed = "pytorch" not in name if detector.family == "fcos" else "caffe" in name
    if not (guessed if stride_in_1x1 is None else stride_in_1x1):
        return "pytorch"
    return "caffe, plain FCOS" if detector.family == "fcos" and detector.options["distances"] == "exp" else "caffe"


def _shift_means(detector: ForeignDetector, where: str) -> None:
    """Add the means of the deltas to the biases, because no box coder of torchvision has means."""
    layers = {
        "box_delta_weights": "roi_heads.box_predictor.bbox_pred.bias",
        "anchor_delta_weights": "head.regression_head.bbox_reg.bias"
        if detector.family == "retinanet"
        else "rpn.head.bbox_pred.bias",
    }
    for option, shift in detector.means.items():
        bias = foreign.rows_of(detector.state, layers[option], where)
        detector.state[layers[option]] = bias + torch.tensor(shift, dtype=bias.dtype).repeat(len(bias) // 4)
        detector.warnings.append(f"The means of the deltas ({option}) were added to the bias of their layer")
