"""MMDetection 2.x and 3.x: Faster R-CNN, Mask R-CNN, RetinaNet and FCOS with a ResNet or ResNeXt and FPN.

Most files hold the text of their configuration, which has the settings that shapes do not show. For a file without a
configuration, the input format comes from the table `RECIPES` of the model zoo, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from distill.convert import foreign
from distill.convert.foreign import ForeignDetector, State, unsupported
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


RESIZES = ("Resize", "MultiScaleFlipAug")
"""Steps of a pipeline that name a size."""


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
    found = ForeignDetector(PROJECT, _family(state, where))
    two_stage = found.family in ("faster_rcnn", "mask_rcnn")
    found.renamed, found.unused = foreign.rename(state, TABLES[found.family])
    parts = ("backbone.", "neck.", "rpn_head.", "roi_head.", "bbox_head.")
    foreign.check_unused(found.unused, IGNORED, parts, where)
    found.state = {new: state[name] for name, new in found.renamed.items()}
    shape = foreign.body_shape(state, lambda stage: f"backbone.layer{stage}.", where)
    found.set("shapes", **{f"backbone__{name}": value for name, value in shape.items()})
    found.set("shapes", neck_channels=len(foreign.rows_of(state, "neck.fpn_convs.0.conv.weight", where)))
    found.set(f"{PROJECT}'s code", **COMMON, **RULES["two_stage" if two_stage else found.family])
    rule = "mmdetection2" if version == "2" and not two_stage else "mmdetection"
    found.set("version" if version else "assumed", detection_rule=rule)
    if version is None and not two_stage:
        found.warnings.append(
            "The file names no version. Version 3.x is assumed; version 2.x keeps boxes without area in NMS"
        )
    config = _current_config(config, where)
    count, anchors = _read_shapes(found, state, where)
    named = classes or _class_names(meta)
    foreign.class_names(named, count, found, where)
    with foreign.reading_configuration(where):
        _read_input(found, shape, config, where)
        if config is not None and "model" in config:
            _read_model(found, config["model"], where)
            _read_resize(found, config)
    if config is None or "model" not in config:
        _warn_of_zoo(found)
    _shift_means(found, where)
    foreign.convert_rows(found.state, count, anchors, where)
    foreign.check_anchors(found, anchors, where)
    found.warnings.append(
        "MMDetection rounds the sides of a resized image, distill rounds them down: they differ by up to one pixel"
    )
    return found


def _warn_of_zoo(found: ForeignDetector) -> None:
    """Warn about settings that are assumed, because the file has no configuration."""
    found.warnings.append(
        "The file holds no readable configuration: anchors, thresholds and RoIAlign are assumed to be those of the "
        "model zoo. If the training used others, give its configuration with --config"
    )
    if found.family == "fcos":
        found.warnings.append(
            f"The towers' convolutions have {'a' if found.options['distances'] == 'relu' else 'no'} bias, so the "
            f"FCOS is taken to be the model zoo's {FCOS_KINDS[found.options['distances']]}"
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


def _current_config(config: Mapping[str, Any] | None, where: str) -> Mapping[str, Any] | None:
    """The configuration with thresholds below ``model``, where versions since 2.7 have them.

    Raises:
        DistillError: the configuration is incomplete: it includes other files.
    """
    if config is None:
        return None
    if "_base_" in config:
        raise DistillError(
            f"{where}: the configuration names other files (_base_ = {config['_base_']!r}), which hold the rest. "
            "Give the complete configuration: MMDetection writes it to the folder of the training, and its "
            "tools/misc/print_config.py prints it"
        )
    model = config.get("model")
    if not isinstance(model, Mapping):
        return config
    phases = {name: config[name] for name in ("train_cfg", "test_cfg") if _is_thresholds(config.get(name))}
    return {**config, "model": {**phases, **model}}


def _is_thresholds(node: Any) -> bool:
    """Whether a node has thresholds. 3.x has loops under the same names."""
    return isinstance(node, Mapping) and "type" not in node and "by_epoch" not in node


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


def _read_shapes(found: ForeignDetector, state: State, where: str) -> tuple[int, int]:
    """Number of classes and of anchors per cell."""
    if found.family in ("faster_rcnn", "mask_rcnn"):
        first = foreign.rows_of(state, "roi_head.bbox_head.shared_fcs.0.weight", where)
        foreign.check_pooled(first.shape[1], found.options["neck_channels"], where)
        found.set("shapes", head_channels=len(first))
        count = len(foreign.rows_of(state, "roi_head.bbox_head.fc_cls.weight", where)) - 1
        foreign.note_shared_boxes(found, foreign.rows_of(state, "roi_head.bbox_head.fc_reg.weight", where), count)
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
        found.set("shapes", p6_from="p5")
    elif top != found.options["neck_channels"]:
        found.set("shapes", p6_from="c5")
    grouped = "bbox_head.cls_convs.0.gn.weight" in state
    biased = "bbox_head.cls_convs.0.conv.bias" in state
    if found.family == "retinanet":
        found.set("shapes", head_norm=("group_bias" if biased else "group") if grouped else "none")
        boxes, scores = (foreign.rows_of(state, f"bbox_head.retina_{name}.weight", where) for name in ("reg", "cls"))
        return foreign.dense_counts(boxes, scores, where)
    found.set("shapes", head_norm="group" if grouped else "none")
    for name in [name for name in found.state if re.search(r"_head\.conv\.\d+\.weight$", name)]:
        if found.state[name].dim() == 4:  # torchvision's convolutions always have a bias
            bias = torch.zeros(len(found.state[name]), dtype=found.state[name].dtype)
            found.state.setdefault(f"{name.removesuffix('weight')}bias", bias)
    scales = [state.get(f"bbox_head.scales.{level}.scale") for level in range(5)]
    known = [scale.reshape(()) for scale in scales if scale is not None and scale.numel() == 1]
    if len(known) == 5:
        found.state["head.regression_head.scales"] = torch.stack(known)
        found.renamed |= {f"bbox_head.scales.{level}.scale": "head.regression_head.scales" for level in range(5)}
        found.unused = [name for name in found.unused if name not in found.renamed]
    else:
        raise unsupported(
            where, "head", f"{len(known)} scales bbox_head.scales, expected one number for each of 5 levels"
        )
    source, improved = "assumed", biased
    found.set(
        source,
        centerness_from="box" if improved else "class",
        distances="relu" if improved else "exp",
        nms_thresh=0.6 if improved else 0.5,
    )
    return len(foreign.rows_of(state, "bbox_head.conv_cls.weight", where)), 1


def _read_input(found: ForeignDetector, shape: Mapping[str, Any], config: Mapping[str, Any] | None, where: str) -> None:
    """Channel order, statistics and stride: of the configuration, or of a recipe of the model zoo."""
    given = _input(config or {})
    recipe = _recipe(found, shape, given.get("backbone__stride_in_1x1"), where)
    missing = {name: value for name, value in RECIPES[recipe].items() if name not in given}
    if "pixels__mean" in given:
        missing = {name: value for name, value in missing.items() if not name.startswith("pixels__")}
        given = {"pixels__channel_order": "bgr", "pixels__std": (1.0, 1.0, 1.0), **given}
    if missing:
        found.assume(
            f"The tensors do not show the input format. It is assumed to be that of the model zoo's recipe '{recipe}': "
            + ", ".join(f"{name.replace('__', '.')}={value}" for name, value in missing.items())
            + ". Give the configuration with --config, or a file name of the model zoo",
            **missing,
        )
    found.set("configuration", **given)
    for name in ("pixels.mean", "pixels.std"):
        found.options[name] = [float(value) / 255 for value in found.options[name]]


def _recipe(found: ForeignDetector, shape: Mapping[str, Any], stride_in_1x1: bool | None, where: str) -> str:
    if (shape.get("groups"), shape.get("group_width")) == (32, 8):
        return "32x8d"
    if shape.get("groups", 1) > 1 or shape["depth"] in (18, 34):
        return "pytorch"
    name = re.split(r"[/\\]", where)[-1].lower()
    guessed = "pytorch" not in name if found.family == "fcos" else "caffe" in name
    if not (guessed if stride_in_1x1 is None else stride_in_1x1):
        return "pytorch"
    return "caffe, plain FCOS" if found.family == "fcos" and found.options["distances"] == "exp" else "caffe"


def _input(config: Mapping[str, Any]) -> dict[str, Any]:
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    values: dict[str, Any] = {}
    preprocessor = model.get("data_preprocessor") or config.get("data_preprocessor")
    for node in (preprocessor, config.get("preprocess_cfg"), config.get("img_norm_cfg"), config):
        norm = node if isinstance(node, Mapping) and node.get("mean") is not None else _normalize(node)
        if norm is None:
            continue
        values["pixels__mean"] = tuple(norm["mean"])
        values["pixels__std"] = tuple(norm.get("std") or (1.0, 1.0, 1.0))
        to_rgb = norm.get("bgr_to_rgb", norm.get("to_rgb", norm is not preprocessor))
        values["pixels__channel_order"] = "rgb" if to_rgb else "bgr"
        break
    backbone = model.get("backbone")
    if isinstance(backbone, Mapping):
        values["backbone__stride_in_1x1"] = backbone.get("style", "pytorch") == "caffe"
    return values


def _normalize(node: Any) -> Mapping[str, Any] | None:
    """The first step ``Normalize`` of a pipeline anywhere below a node, which 2.x has instead of a preprocessor."""
    return next((part for part in _nodes(node) if part.get("type") == "Normalize" and part.get("mean")), None)


def _nodes(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)


class _Part:
    """A node of the configuration. Reading a key checks its type."""

    def __init__(self, node: Any, path: str, where: str) -> None:
        self.node = node if isinstance(node, Mapping) else {}
        self.path, self.where = path, where

    def __call__(self, key: str) -> _Part:
        return _Part(self.node.get(key), f"{self.path}.{key}", self.where)

    def get(self, key: str, default: Any = None) -> Any:
        return self.node.get(key, default)

    def expect(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Refuse a value that distill cannot express."""
        value = self.get(key, allowed[0] if default is None else default)
        name = value.rpartition(".")[2] if key == "type" and isinstance(value, str) else value  # mmdet.ResNet
        if name not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise unsupported(self.where, "configuration", f"{self.path}.{key} is {value!r}, expected {expected}")

    def numbers(self, key: str, default: Sequence[float]) -> list[float]:
        """A list of numbers."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(item, int | float) for item in value):
            raise DistillError(f"{self.where}: configuration: {self.path}.{key}: expected numbers, got {value!r}")
        return [float(item) for item in value]


def _read_model(found: ForeignDetector, node: Any, where: str) -> None:
    model = _Part(node, "model", where)
    model("backbone").expect("type", "ResNet", "ResNeXt")
    model("backbone").expect("num_stages", 4)
    model("backbone").expect("strides", [1, 2, 2, 2])
    model("backbone").expect("dilations", [1, 1, 1, 1])
    norm = model("backbone")("norm_cfg")
    norm.expect("type", "BN", "SyncBN", "naiveSyncBN", "MMSyncBN", "BatchNorm2d")
    if "eps" in norm.node:
        found.set("configuration", backbone__norm_eps=float(norm.get("eps")))
    frozen = model("backbone").get("frozen_stages", -1)
    found.set("configuration", backbone__trainable_stages=5 if frozen < 0 else max(0, 4 - frozen))
    neck = model("neck")
    neck.expect("type", "FPN")
    neck.expect("num_outs", 5)
    neck("upsample_cfg").expect("mode", "nearest")
    neck.expect("act_cfg", None)
    if found.family in ("faster_rcnn", "mask_rcnn"):
        neck.expect("add_extra_convs", False)
        _read_two_stage(found, model)
        return
    source = neck.get("add_extra_convs", False)
    if source is True and neck.get("extra_convs_on_inputs", True) is False:  # before version 2.7
        source = "on_output"
    sources = {"on_input": "c5", True: "c5", "on_lateral": "lateral", "on_output": "p5"}
    if neck.node and source not in sources:
        raise unsupported(where, "configuration", f"model.neck.add_extra_convs is {source!r}, expected {list(sources)}")
    if neck.node:
        relu = bool(neck.get("relu_before_extra_convs", False))
        found.set("configuration", p6_from=sources[source], p7_relu=relu)
    head = model("bbox_head")
    test = _Part(model.get("test_cfg", head.get("test_cfg")), "model.test_cfg", where)
    head.expect("stacked_convs", 4)
    norm = head.get("norm_cfg", {"type": "GN"} if found.family == "fcos" else None)
    if isinstance(norm, Mapping):
        _Part(norm, "model.bbox_head.norm_cfg", where).expect("num_groups", 32)
        _Part(norm, "model.bbox_head.norm_cfg", where).expect("type", "GN")
    sigmoid = head("loss_cls").get("use_sigmoid", head("loss_cls").get("type") != "CrossEntropyLoss")
    if not sigmoid:
        raise unsupported(where, "configuration", "model.bbox_head.loss_cls: a softmax, expected a sigmoid")
    _read_thresholds(found, test)
    if "nms_pre" in test.node:
        found.set("configuration", topk_candidates=_limit(test.get("nms_pre")))
    test.expect("min_bbox_size", 0, -1)
    if test.get("min_bbox_size", 0) < 0:
        found.set("configuration", detection_rule="mmdetection2")  # keeps boxes without area, as 2.x does
    if found.family == "retinanet":
        _read_anchors(found, head("anchor_generator"), (8, 16, 32, 64, 128))
        _read_coder(found, head("bbox_coder"), "anchor_delta_weights")
        return
    if head.node:
        found.set(
            "configuration",
            centerness_from="box" if head.get("centerness_on_reg", False) else "class",
            distances="relu" if head.get("norm_on_bbox", False) else "exp",
        )
    if head.numbers("strides", (8, 16, 32, 64, 128)) != [8, 16, 32, 64, 128]:
        raise unsupported(where, "configuration", f"model.bbox_head.strides is {head.get('strides')}")
    found.set("configuration", center_sampling_radius=float(head.get("center_sample_radius", 1.5)))


def _read_two_stage(found: ForeignDetector, model: _Part) -> None:
    where, rpn, roi = model.where, model("rpn_head"), model("roi_head")
    _read_anchors(found, rpn("anchor_generator"), (4, 8, 16, 32, 64))
    _read_coder(found, rpn("bbox_coder"), "anchor_delta_weights")
    _read_coder(found, roi("bbox_head")("bbox_coder"), "box_delta_weights")
    roi.expect("type", "StandardRoIHead")
    box = roi("bbox_roi_extractor")
    layer = box("roi_layer")
    layer.expect("type", "RoIAlign")
    layer.expect("pool_mode", "avg")
    for extractor, side in ((box, 7), (roi("mask_roi_extractor"), 14)):
        extractor.expect("type", "SingleRoIExtractor")
        extractor.expect("finest_scale", 56)
        extractor.expect("featmap_strides", [4, 8, 16, 32])
        extractor("roi_layer").expect("output_size", side, [side, side])
    box_head = roi("bbox_head")
    box_head("cls_predictor_cfg").expect("type", "Linear")
    box_head("reg_predictor_cfg").expect("type", "Linear")
    if box_head("loss_cls").get("type") == "SeesawLoss":
        raise unsupported(where, "configuration", "model.roi_head.bbox_head.loss_cls.type is 'SeesawLoss'")
    sampling, aligned = _roi_layer(layer)
    found.set("configuration", box_sampling_ratio=sampling, box_roi_aligned=aligned)
    if found.family == "mask_rcnn" and roi("mask_roi_extractor").node:
        other = _roi_layer(roi("mask_roi_extractor")("roi_layer"))
        if other != (sampling, aligned):
            raise unsupported(
                where, "configuration", f"RoIAlign of boxes {(sampling, aligned)} and masks {other} differ"
            )
    tests, trains = model("test_cfg"), model("train_cfg")
    proposals = tests("rpn") if tests("rpn").node else rpn("test_cfg")
    final = tests("rcnn") if tests("rcnn").node else roi("test_cfg")
    training = trains("rpn_proposal")
    for part, phase in ((proposals, "test"), (training, "train")):
        part.expect("nms_across_levels", False)
        if "nms_pre" in part.node:
            found.set("configuration", **{f"rpn_pre_nms_top_n_{phase}": _limit(part.get("nms_pre"))})
        limit = part.get("max_per_img", part.get("max_num", part.get("nms_post")))
        if limit is not None:
            found.set("configuration", **{f"rpn_post_nms_top_n_{phase}": _limit(limit)})
    threshold = proposals("nms").get("iou_threshold", proposals.get("nms_thr"))
    proposals("nms").expect("type", "nms")
    if threshold is not None:
        found.set("configuration", rpn_nms_thresh=float(threshold))
    if "min_bbox_size" in proposals.node:
        found.set("configuration", proposal_min_size=max(0.0, float(proposals.get("min_bbox_size"))))
    _read_thresholds(found, final)
    if found.family == "mask_rcnn":
        final.expect("mask_thr_binary", 0.5)


def _roi_layer(layer: _Part) -> tuple[int, bool]:
    """Sampling ratio and alignment."""
    return int(layer.get("sampling_ratio", layer.get("sample_num", 0))), bool(layer.get("aligned", True))


def _read_thresholds(found: ForeignDetector, test: _Part) -> None:
    nms = test("nms")
    nms.expect("type", "nms")
    nms.expect("class_agnostic", False)
    threshold = nms.get("iou_threshold", nms.get("iou_thr"))
    values = {
        "score_thresh": test.get("score_thr"),
        "nms_thresh": threshold,
        "detections_per_img": test.get("max_per_img"),
    }
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.set("configuration", **{name: _limit(value) if name == "detections_per_img" else float(value)})


def _limit(value: Any) -> int:
    """A number of boxes. MMDetection's -1 means all of them."""
    return int(value) if int(value) > 0 else foreign.ALL


def _read_resize(found: ForeignDetector, config: Mapping[str, Any]) -> None:
    """Side lengths of the resize in tests, and the multiple to which images are padded."""
    data = config.get("data")
    places = [config.get("test_pipeline"), data.get("test") if isinstance(data, Mapping) else None]
    steps = [step for step in _nodes([*places, config.get("test_dataloader")]) if isinstance(step.get("type"), str)]
    scales = [step.get("scale", step.get("img_scale")) for step in steps if step["type"] in RESIZES]
    scale = next((scale for scale in scales if scale is not None), None)
    if isinstance(scale, list) and len(scale) == 2 and all(isinstance(side, int) and side > 0 for side in scale):
        found.set("configuration", min_size=min(scale), max_size=max(scale))
    elif scale is not None:
        found.warnings.append(
            f"The resize in tests is {scale!r}, which distill cannot express: 800 and 1333 are assumed"
        )
    if any(step["type"] in RESIZES and step.get("keep_ratio") is False for step in steps):
        found.warnings.append("The training's resize changes the ratio of the sides, distill's keeps it")
    model = config["model"]
    preprocessor = model.get("data_preprocessor") or config.get("data_preprocessor")
    divisor = preprocessor.get("pad_size_divisor") if isinstance(preprocessor, Mapping) else None
    padded = [step.get("size_divisor") for step in steps if step["type"] == "Pad"]
    multiple = next((value for value in (divisor, *padded) if isinstance(value, int) and value > 0), 32)
    if multiple != 32:
        found.resize["pad_to"] = multiple


def _read_anchors(found: ForeignDetector, generator: _Part, strides: Sequence[int]) -> None:
    if not generator.node:
        return
    generator.expect("type", "AnchorGenerator")
    if generator.numbers("strides", strides) != list(strides):
        raise unsupported(
            generator.where,
            "configuration",
            f"{generator.path}.strides is {generator.get('strides')}, expected {strides}",
        )
    if generator.get("octave_base_scale") is not None:
        count = int(generator.get("scales_per_octave", 1))
        scales = [generator.get("octave_base_scale") * 2 ** (step / count) for step in range(count)]
    else:
        scales = generator.numbers("scales", (8,))
    bases = generator.numbers("base_sizes", strides) if generator.get("base_sizes") else list(strides)
    if generator.get("centers") is not None:
        raise unsupported(generator.where, "configuration", f"{generator.path}.centers is set")
    found.set(
        "configuration",
        anchors__sizes=[[float(base * scale) for scale in scales] for base in bases],
        anchors__ratios=generator.numbers("ratios", (0.5, 1.0, 2.0)),
        anchors__offset=float(generator.get("center_offset", 0.0)),
        anchors__order="ratio" if generator.get("scale_major", True) else "size",
    )


def _read_coder(found: ForeignDetector, coder: _Part, option: str) -> None:
    if not coder.node:
        return
    coder.expect("type", "DeltaXYWHBBoxCoder")
    coder.expect("add_ctr_clamp", False)
    coder.expect("clip_border", True)
    stds = coder.numbers("target_stds", (1.0, 1.0, 1.0, 1.0))
    means = coder.numbers("target_means", (0.0, 0.0, 0.0, 0.0))
    found.set("configuration", **{option: [_reciprocal(std) for std in stds]})
    if any(means):
        found.means[option] = [mean / std for mean, std in zip(means, stds, strict=True)]


def _reciprocal(std: float) -> float:
    """1 / std, without the last digit of rounding: 10 for 0.1."""
    return float(f"{1 / std:.12g}")


def _shift_means(found: ForeignDetector, where: str) -> None:
    """Add the means of the deltas to the biases, because no box coder of torchvision has means."""
    layers = {
        "box_delta_weights": "roi_heads.box_predictor.bbox_pred.bias",
        "anchor_delta_weights": "head.regression_head.bbox_reg.bias"
        if found.family == "retinanet"
        else "rpn.head.bbox_pred.bias",
    }
    for option, shift in found.means.items():
        bias = foreign.rows_of(found.state, layers[option], where)
        found.state[layers[option]] = bias + torch.tensor(shift, dtype=bias.dtype).repeat(len(bias) // 4)
        found.warnings.append(f"The means of the deltas ({option}) were added to the bias of their layer")
