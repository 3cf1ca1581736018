"""Detectron2: Faster R-CNN, Mask R-CNN, RetinaNet and FCOS with a ResNet or ResNeXt and FPN.

A checkpoint of Detectron2 holds tensors only. Settings that shapes do not show come from the configuration, the YAML
file that the trainer writes to the checkpoint's folder. Without this file, they come from the tables `ZOO` and `RULES`,
and a warning lists the assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from distill.convert import foreign
from distill.convert.caffe2_names import is_caffe2, to_detectron2
from distill.convert.foreign import ForeignDetector, State, unsupported
from distill.types import DistillError

PROJECT = "Detectron2"

BODY: tuple[tuple[str, str], ...] = (
    ("backbone.bottom_up.stem.conv1.weight", "backbone.body.conv1.weight"),
    ("backbone.bottom_up.stem.conv1.norm.*", "backbone.body.bn1.*"),
    ("backbone.bottom_up.res{k}.{i}.conv{j}.weight", "backbone.body.layer{k-1}.{i}.conv{j}.weight"),
    ("backbone.bottom_up.res{k}.{i}.conv{j}.norm.*", "backbone.body.layer{k-1}.{i}.bn{j}.*"),
    ("backbone.bottom_up.res{k}.{i}.shortcut.weight", "backbone.body.layer{k-1}.{i}.downsample.0.weight"),
    ("backbone.bottom_up.res{k}.{i}.shortcut.norm.*", "backbone.body.layer{k-1}.{i}.downsample.1.*"),
)
"""Name in the file -> torchvision's name, for the table of `foreign.rename`."""
TWO_STAGE: tuple[tuple[str, str], ...] = (
    ("backbone.fpn_lateral{k}.*", "backbone.fpn.inner_blocks.{k-2}.0.*"),
    ("backbone.fpn_output{k}.*", "backbone.fpn.layer_blocks.{k-2}.0.*"),
    ("proposal_generator.rpn_head.conv.*", "rpn.head.conv.0.0.*"),
    ("proposal_generator.rpn_head.objectness_logits.*", "rpn.head.cls_logits.*"),
    ("proposal_generator.rpn_head.anchor_deltas.*", "rpn.head.bbox_pred.*"),
    ("roi_heads.box_head.fc1.*", "roi_heads.box_head.fc6.*"),
    ("roi_heads.box_head.fc2.*", "roi_heads.box_head.fc7.*"),
    ("roi_heads.box_predictor.cls_score.*", "roi_heads.box_predictor.cls_score.*"),
    ("roi_heads.box_predictor.bbox_pred.*", "roi_heads.box_predictor.bbox_pred.*"),
    ("roi_heads.mask_head.mask_fcn{i}.*", "roi_heads.mask_head.{i-1}.0.*"),
    ("roi_heads.mask_head.deconv.*", "roi_heads.mask_predictor.conv5_mask.*"),
    ("roi_heads.mask_head.predictor.*", "roi_heads.mask_predictor.mask_fcn_logits.*"),
)
ONE_STAGE: tuple[tuple[str, str], ...] = (
    ("backbone.fpn_lateral{k}.*", "backbone.fpn.inner_blocks.{k-3}.0.*"),
    ("backbone.fpn_output{k}.*", "backbone.fpn.layer_blocks.{k-3}.0.*"),
    ("backbone.top_block.p6.*", "backbone.fpn.extra_blocks.p6.*"),
    ("backbone.top_block.p7.*", "backbone.fpn.extra_blocks.p7.*"),
    ("head.cls_score.*", "head.classification_head.cls_logits.*"),
    ("head.bbox_pred.*", "head.regression_head.bbox_reg.*"),
    ("head.ctrness.*", "head.regression_head.bbox_ctrness.*"),
)
TOWERS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("retinanet", "none"): (
        ("head.cls_subnet.{i}.*", "head.classification_head.conv.{i/2}.0.*"),
        ("head.bbox_subnet.{i}.*", "head.regression_head.conv.{i/2}.0.*"),
    ),
    ("fcos", "none"): (
        ("head.cls_subnet.{i}.*", "head.classification_head.conv.{i/2*3}.*"),
        ("head.bbox_subnet.{i}.*", "head.regression_head.conv.{i/2*3}.*"),
    ),
    ("fcos", "group"): (
        ("head.cls_subnet.{i}.*", "head.classification_head.conv.{i}.*"),
        ("head.bbox_subnet.{i}.*", "head.regression_head.conv.{i}.*"),
    ),
    ("retinanet", "group_bias"): tuple(
        (f"head.{name}.{3 * layer + part}.*", f"head.{head}.conv.{layer}.{part}.*")
        for name, head in (("cls_subnet", "classification_head"), ("bbox_subnet", "regression_head"))
        for layer in range(4)
        for part in range(2)
    ),
}
"""(Family, norm in the heads) -> table of the towers. A tower is a sequence of convolutions, norms and ReLUs."""

IGNORED = r"(^|\.)(pixel_mean|pixel_std|num_batches_tracked)$|anchor_generator\.cell_anchors"
"""Names of tensors that a detector does not need: constants in older files, and counters."""
PARTS: tuple[tuple[str, str], ...] = (
    (r"conv2_offset|\.conv_offset", "backbone: deformable convolutions"),
    (r"^roi_heads\.(box_predictor|box_head)\.\d+\.", "box head: a cascade"),
    (r"^roi_heads\.res5\.", "box head: C4 or DC5, without FPN"),
    (r"^roi_heads\.box_head\.(conv\d|fc[3-9])", "box head: other layers than two fully connected ones"),
    (r"^roi_heads\.keypoint_head\.", "keypoint head"),
    (r"^roi_heads\.mask_head\.mask_fcn\d+\.norm\.", "mask head: norms"),
    (
        r"^roi_heads\.mask_head\.(mask_fcn([5-9]|\d\d)|fc|coarse|point)",
        "mask head: other layers than four convolutions",
    ),
    (r"^(roi_heads\.)?mask_(coarse|point)|point_head", "mask head: PointRend"),
    (r"^sem_seg_head\.", "semantic segmentation head"),
    (r"^backbone\.fpn_(lateral|output)\d\.norm\.", "neck: norms"),
    (r"^backbone\.bottom_up\.stem\.conv[23]", "backbone: a stem of several convolutions"),
    (r"^proposal_generator\.rpn_head\.conv\.(conv|\d)", "RPN: several convolutions"),
    (r"^proposal_generator\.(?!rpn_head|anchor_generator)", "proposals of another kind than an RPN"),
    (r"^detr\.|transformer", "transformer"),
)
"""Regular expression for names -> a part that no family of distill has."""

CAFFE_STD, TORCH_STD = (1.0, 1.0, 1.0), (57.375, 57.120, 58.395)
ZOO: dict[str, dict[str, Any]] = {
    "resnet": {
        "pixels__channel_order": "bgr",
        "pixels__mean": (103.530, 116.280, 123.675),
        "pixels__std": CAFFE_STD,
        "backbone__stride_in_1x1": True,
    },
    "resnext": {
        "pixels__channel_order": "bgr",
        "pixels__mean": (103.530, 116.280, 123.675),
        "pixels__std": TORCH_STD,
        "backbone__stride_in_1x1": False,
    },
}
"""Kind of backbone -> the input of the model zoo's weights. Pixels are from 0 to 255, in the channel order."""

OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
COMMON: dict[str, Any] = {
    "backbone__norm": "frozen",
    "backbone__norm_eps": 1e-5,
    "backbone__trainable_stages": 3,
    "detection_rule": "detectron2",
    "min_size": 800,
    "max_size": 1333,
}
RULES: dict[str, dict[str, Any]] = {
    "two_stage": {
        "anchors__sizes": [[32.0], [64.0], [128.0], [256.0], [512.0]],
        "anchors__ratios": [0.5, 1.0, 2.0],
        "anchors__offset": 0.0,
        "anchors__rounded": False,
        "anchors__order": "size",
        "anchors__step": "nominal",
        "delta_clamp": "upper",
        "proposal_min_size": 0.0,
        "rpn_post_nms_top_n_train": 1000,
        "rpn_post_nms_top_n_test": 1000,
        "box_sampling_ratio": 0,
        "box_roi_aligned": True,
        "box_level_rule": "detectron2",
    },
    "retinanet": {
        "anchors__sizes": [[size * part for part in OCTAVE] for size in (32, 64, 128, 256, 512)],
        "anchors__ratios": [0.5, 1.0, 2.0],
        "anchors__offset": 0.0,
        "anchors__rounded": False,
        "anchors__order": "size",
        "anchors__step": "nominal",
        "delta_clamp": "upper",
        "p7_relu": True,
        "detections_per_img": 100,
    },
    "fcos": {
        "point_offset": 0.5,
        "point_step": "nominal",
        "p7_relu": True,
        "centerness_from": "box",
        "distances": "relu",
        "level_scales": False,
        "score_thresh": 0.2,
        "nms_thresh": 0.6,
        "detections_per_img": 100,
    },
}
"""Kind of detector -> fixed behavior of Detectron2's code, and model zoo values that a configuration may override."""


def matches(state: State) -> bool:
    """Whether tensors have Detectron2's names."""
    return any(name.startswith("backbone.bottom_up.") for name in state) or is_caffe2(state)


def convert(state: State, where: str, config: Mapping[str, Any] | None, classes: Any) -> ForeignDetector:
    """Convert a detector of Detectron2.

    Args:
        state: the tensors of the file.
        where: the file, for messages.
        config: the configuration, as `read_config` returns it, or None.
        classes: class names, or None.

    Raises:
        DistillError: the file holds a part of a detector only, or a detector that no family can express.
    """
    if is_caffe2(state):
        state = to_detectron2(state)
    state = _with_statistics(state)
    foreign.check_parts(state, PARTS, where)
    detector = ForeignDetector(PROJECT, _family(state, where))
    two_stage, norm = detector.family in ("faster_rcnn", "mask_rcnn"), _tower_norm(state, detector.family)
    table = (*BODY, *(TWO_STAGE if two_stage else (*ONE_STAGE, *TOWERS[detector.family, norm])))
    detector.renamed, unused = foreign.rename(state, table)
    foreign.check_unused(unused, IGNORED, ("backbone.", "proposal_generator.", "roi_heads.", "head."), where)
    detector.unused = unused
    detector.state = {new: state[name] for name, new in detector.renamed.items()}
    shape = foreign.body_shape(state, lambda stage: f"backbone.bottom_up.res{stage + 1}.", where)
    detector.set("shapes", **{f"backbone__{name}": value for name, value in shape.items()})
    detector.set("shapes", neck_channels=len(foreign.rows_of(state, "backbone.fpn_output5.weight", where)))
    detector.set(f"{PROJECT}'s code", **COMMON, **RULES["two_stage" if two_stage else detector.family])
    count, anchors = (_two_stage if two_stage else _one_stage)(detector, state, where)
    if not two_stage:
        detector.set("shapes", head_norm=norm)
    foreign.class_names(classes, count, detector, where)
    foreign.convert_rows(detector.state, count, anchors, where)
    with foreign.reading_configuration(where):
        _read_input(detector, shape, config)
    if config is not None:
        _read_options(detector, config, where)
        if "_BASE_" in config:
            detector.warnings.append(
                f"The configuration names another file (_BASE_: {config['_BASE_']}), which was not read. Missing "
                "values are taken from the model zoo. Give Detectron2's config.yaml as its trainer writes it"
            )
    else:
        detector.warnings.append(
            "Without a configuration, anchors, thresholds and RoIAlign are assumed to be those of the model zoo. If "
            "the training used others, give its YAML file with --config"
        )
    foreign.check_anchors(detector, anchors, where)
    detector.resize = {"antialias": True}
    detector.warnings.append(
        "Detectron2 rounds the sides of a resized image, distill rounds them down: they differ by up to one pixel"
    )
    return detector


def _with_statistics(state: State) -> dict[str, Tensor]:
    """Add the running statistics of frozen norms, mean 0 and variance 1, which old files lack."""
    result = dict(state)
    for name in state:
        if name.startswith("backbone.bottom_up.") and name.endswith("norm.weight"):
            stem = name.removesuffix("weight")
            result.setdefault(f"{stem}running_mean", torch.zeros_like(state[name]))
            result.setdefault(f"{stem}running_var", torch.ones_like(state[name]))
    return result


def _family(state: State, where: str) -> str:
    for name, family in (
        ("head.ctrness.weight", "fcos"),
        ("head.cls_score.weight", "retinanet"),
        ("roi_heads.mask_head.predictor.weight", "mask_rcnn"),
        ("roi_heads.box_predictor.cls_score.weight", "faster_rcnn"),
    ):
        if name in state:
            return family
    raise DistillError(
        f"{where}: names of {PROJECT}, but neither a box head (roi_heads.box_predictor.cls_score) nor a dense head "
        "(head.cls_score): the file holds only a part of a detector; name the file of the whole detector"
    )


def _tower_norm(state: State, family: str) -> str:
    norm = state.get("head.cls_subnet.1.weight")
    if norm is None:
        return "none"
    return "group" if family == "fcos" else "group_bias"


def _two_stage(detector: ForeignDetector, state: State, where: str) -> tuple[int, int]:
    first = foreign.rows_of(state, "roi_heads.box_head.fc1.weight", where)
    foreign.check_pooled(first.shape[1], detector.options["neck_channels"], where)
    detector.set("shapes", head_channels=len(first))
    count = len(foreign.rows_of(state, "roi_heads.box_predictor.cls_score.weight", where)) - 1
    foreign.note_shared_boxes(
        detector, foreign.rows_of(state, "roi_heads.box_predictor.bbox_pred.weight", where), count
    )
    return count, len(foreign.rows_of(state, "proposal_generator.rpn_head.objectness_logits.weight", where))


def _one_stage(detector: ForeignDetector, state: State, where: str) -> tuple[int, int]:
    boxes, scores = (foreign.rows_of(state, f"head.{name}.weight", where) for name in ("bbox_pred", "cls_score"))
    inputs, top = (
        foreign.rows_of(state, f"backbone.{name}.weight", where).shape[1] for name in ("top_block.p6", "fpn_lateral5")
    )
    from_c5 = inputs == top and (detector.family == "retinanet" or inputs != detector.options["neck_channels"])
    detector.set("shapes", p6_from="c5" if from_c5 else "p5")
    return foreign.dense_counts(boxes, scores, where)


def _read_input(detector: ForeignDetector, shape: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    """Channel order, statistics and stride: of the configuration, or of the model zoo."""
    kind = "resnext" if shape.get("groups", 1) > 1 else "resnet"
    values = {name: value for name, value in ZOO[kind].items() if config is None or name not in _input(config)}
    if values:
        stride = "1x1" if ZOO[kind]["backbone__stride_in_1x1"] else "3x3"
        detector.assume(
            f"The tensors do not show the input format. It is assumed to be that of the model zoo's {kind}: BGR, mean "
            f"{list(ZOO[kind]['pixels__mean'])}, std {list(ZOO[kind]['pixels__std'])}, stride in the {stride} "
            "convolution. If the training started from torchvision's weights, give its configuration with --config",
            **values,
        )
    if config is not None:
        detector.set("configuration", **_input(config))
    for name in ("pixels.mean", "pixels.std"):
        detector.options[name] = [float(value) / 255 for value in detector.options[name]]


def _input(config: Mapping[str, Any]) -> dict[str, Any]:
    paths: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "INPUT.FORMAT": ("pixels__channel_order", lambda value: str(value).lower()),
        "MODEL.PIXEL_MEAN": ("pixels__mean", tuple),
        "MODEL.PIXEL_STD": ("pixels__std", tuple),
        "MODEL.RESNETS.STRIDE_IN_1X1": ("backbone__stride_in_1x1", bool),
    }
    return {name: read(_get(config, path)) for path, (name, read) in paths.items() if _get(config, path) is not None}


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


def _one_list(levels: Any) -> list[float]:
    if not all(list(level) == list(levels[0]) for level in levels):
        raise ValueError("expected equal ratios at all levels")
    return _floats(levels[0])


def _five_lists(levels: Any) -> list[list[float]]:
    if not levels:
        raise ValueError("expected sizes")
    return [_floats(level) for level in (levels if len(levels) > 1 else [*levels] * 5)]


def _side(value: Any) -> int:
    if int(value) < 1:
        raise ValueError("expected pixels, above 0; 0 would leave the size of images alone")
    return int(value)


def _limit(value: Any) -> int:
    """A number of detections. Detectron2's -1 means all of them."""
    return foreign.ALL if int(value) < 0 else int(value)


Reader = tuple[str, Callable[[Any], Any]]
SHARED: dict[str, Reader] = {
    "MODEL.ANCHOR_GENERATOR.SIZES": ("anchors__sizes", _five_lists),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ("anchors__ratios", _one_list),
    "MODEL.ANCHOR_GENERATOR.OFFSET": ("anchors__offset", float),
    "MODEL.BACKBONE.FREEZE_AT": ("backbone__trainable_stages", lambda stages: 5 - int(stages)),
    "TEST.DETECTIONS_PER_IMAGE": ("detections_per_img", _limit),
    "INPUT.MIN_SIZE_TEST": ("min_size", _side),
    "INPUT.MAX_SIZE_TEST": ("max_size", _side),
}
READERS: dict[str, dict[str, Reader]] = {
    "two_stage": {
        **SHARED,
        "MODEL.RPN.BBOX_REG_WEIGHTS": ("anchor_delta_weights", _floats),
        "MODEL.RPN.NMS_THRESH": ("rpn_nms_thresh", float),
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": ("rpn_pre_nms_top_n_train", int),
        "MODEL.RPN.PRE_NMS_TOPK_TEST": ("rpn_pre_nms_top_n_test", int),
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": ("rpn_post_nms_top_n_train", int),
        "MODEL.RPN.POST_NMS_TOPK_TEST": ("rpn_post_nms_top_n_test", int),
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": ("rpn_batch_size_per_image", int),
        "MODEL.RPN.POSITIVE_FRACTION": ("rpn_positive_fraction", float),
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": ("proposal_min_size", float),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": ("box_delta_weights", _floats),
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": ("box_sampling_ratio", int),
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("box_roi_aligned", lambda kind: kind == "ROIAlignV2"),
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": ("box_batch_size_per_image", int),
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": ("box_positive_fraction", float),
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": ("score_thresh", float),
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": ("nms_thresh", float),
    },
    "retinanet": {
        **SHARED,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": ("anchor_delta_weights", _floats),
        "MODEL.RETINANET.SCORE_THRESH_TEST": ("score_thresh", float),
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": ("topk_candidates", int),
        "MODEL.RETINANET.NMS_THRESH_TEST": ("nms_thresh", float),
    },
    "fcos": {path: SHARED[path] for path in ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")},
}
"""Kind of detector -> path in the configuration -> option, and the function that reads its value."""
EXPECTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN"),
        "MODEL.FPN.NORM": ("",),
        "MODEL.FPN.FUSE_TYPE": ("sum",),
        "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
        "MODEL.RESNETS.RES5_DILATION": (1,),
    },
    "two_stage": {
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
        "MODEL.ROI_BOX_HEAD.NUM_CONV": (0,),
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": (7,),
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
        "MODEL.ROI_HEADS.IN_FEATURES": (["p2", "p3", "p4", "p5"],),
        "MODEL.RPN.IN_FEATURES": (["p2", "p3", "p4", "p5", "p6"],),
        "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    },
    "retinanet": {"MODEL.RETINANET.IN_FEATURES": (["p3", "p4", "p5", "p6", "p7"],)},
    "fcos": {},
}
"""Kind of detector -> path in the configuration -> values that distill can express."""


def _read_options(detector: ForeignDetector, config: Mapping[str, Any], where: str) -> None:
    kind = "two_stage" if detector.family in ("faster_rcnn", "mask_rcnn") else detector.family
    for path, values in {**EXPECTED[""], **EXPECTED[kind]}.items():
        value = _get(config, path)
        if value is not None and value not in values:
            raise unsupported(where, "configuration", f"{path} is {value!r}, expected {' or '.join(map(repr, values))}")
    if detector.family == "mask_rcnn":
        if (side := _get(config, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION")) not in (None, 14):
            raise unsupported(where, "configuration", f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is {side!r}, expected 14")
        for name in ("POOLER_TYPE", "POOLER_SAMPLING_RATIO"):
            pair = [_get(config, f"MODEL.ROI_{head}_HEAD.{name}") for head in ("BOX", "MASK")]
            if None not in pair and pair[0] != pair[1]:
                raise unsupported(where, "configuration", f"{name} differs between box head and mask head: {pair}")
    for path, (name, read) in READERS[kind].items():
        value = _get(config, path)
        if value is None:
            continue
        try:
            detector.set(f"configuration, {path}", **{name: read(value)})
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise DistillError(
                f"{where}: configuration: {path} is {value!r}, which cannot be read ({error})"
            ) from error


def _get(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads Python tuples as lists, and the expressions of Detectron2's own files as missing values."""


def _skipped(loader: Any, suffix: str, node: Any) -> Any:
    return loader.construct_sequence(node, deep=True) if suffix == "tuple" else None


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _skipped)


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Read a configuration file of Detectron2. Its Python expressions are never run and count as missing.

    Raises:
        DistillError: the text is not such a file.
    """
    try:
        config = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DistillError(
            f"{where}: not YAML ({str(error).splitlines()[0]}); give Detectron2's config.yaml"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("MODEL"), dict):
        raise DistillError(
            f"{where}: expected Detectron2's configuration, with the key MODEL; give Detectron2's config.yaml"
        )
    return config
