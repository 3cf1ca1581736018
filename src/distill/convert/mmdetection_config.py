"""Reads the configuration in a file of MMDetection: settings that the shapes of the tensors do not show.

A value that distill's detectors cannot express is refused by its path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.convert import foreign
from distill.convert.foreign import ForeignDetector, unsupported
from distill.types import DistillError

RESIZES = ("Resize", "MultiScaleFlipAug")
"""Steps of a pipeline that name a size."""


def current_config(config: Mapping[str, Any] | None, where: str) -> Mapping[str, Any] | None:
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


def input_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the input that the configuration names: channel order, mean, std (0 to 255), and the stride in 1x1."""
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


class ConfigNode:
    """A node of the configuration. Reading a key checks its type."""

    def __init__(self, node: Any, path: str, where: str) -> None:
        self.node = node if isinstance(node, Mapping) else {}
        self.path, self.where = path, where

    def child(self, key: str) -> ConfigNode:
        """The node below a key; an empty one if there is none."""
        return ConfigNode(self.node.get(key), f"{self.path}.{key}", self.where)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, of any type."""
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


def read_model(detector: ForeignDetector, node: Any, where: str) -> None:
    """Set the options that ``model`` names.

    Raises:
        DistillError: a value that distill's detectors cannot express.
    """
    model = ConfigNode(node, "model", where)
    model.child("backbone").expect("type", "ResNet", "ResNeXt")
    model.child("backbone").expect("num_stages", 4)
    model.child("backbone").expect("strides", [1, 2, 2, 2])
    model.child("backbone").expect("dilations", [1, 1, 1, 1])
    norm = model.child("backbone").child("norm_cfg")
    norm.expect("type", "BN", "SyncBN", "naiveSyncBN", "MMSyncBN", "BatchNorm2d")
    if "eps" in norm.node:
        detector.set("configuration", backbone__norm_eps=float(norm.get("eps")))
    frozen = model.child("backbone").get("frozen_stages", -1)
    detector.set("configuration", backbone__trainable_stages=5 if frozen < 0 else max(0, 4 - frozen))
    neck = model.child("neck")
    neck.expect("type", "FPN")
    neck.expect("num_outs", 5)
    neck.child("upsample_cfg").expect("mode", "nearest")
    neck.expect("act_cfg", None)
    if detector.family in ("faster_rcnn", "mask_rcnn"):
        neck.expect("add_extra_convs", False)
        _read_two_stage(detector, model)
        return
    source = neck.get("add_extra_convs", False)
    if source is True and neck.get("extra_convs_on_inputs", True) is False:  # before version 2.7
        source = "on_output"
    sources = {"on_input": "c5", True: "c5", "on_lateral": "lateral", "on_output": "p5"}
    if neck.node and source not in sources:
        raise unsupported(where, "configuration", f"model.neck.add_extra_convs is {source!r}, expected {list(sources)}")
    if neck.node:
        relu = bool(neck.get("relu_before_extra_convs", False))
        detector.set("configuration", p6_from=sources[source], p7_relu=relu)
    head = model.child("bbox_head")
    test = ConfigNode(model.get("test_cfg", head.get("test_cfg")), "model.test_cfg", where)
    head.expect("stacked_convs", 4)
    norm = head.get("norm_cfg", {"type": "GN"} if detector.family == "fcos" else None)
    if isinstance(norm, Mapping):
        ConfigNode(norm, "model.bbox_head.norm_cfg", where).expect("num_groups", 32)
        ConfigNode(norm, "model.bbox_head.norm_cfg", where).expect("type", "GN")
    sigmoid = head.child("loss_cls").get("use_sigmoid", head.child("loss_cls").get("type") != "CrossEntropyLoss")
    if not sigmoid:
        raise unsupported(where, "configuration", "model.bbox_head.loss_cls: a softmax, expected a sigmoid")
    _read_thresholds(detector, test)
    if "nms_pre" in test.node:
        detector.set("configuration", topk_candidates=_limit(test.get("nms_pre")))
    test.expect("min_bbox_size", 0, -1)
    if test.get("min_bbox_size", 0) < 0:
        detector.set("configuration", detection_rule="mmdetection2")  # keeps boxes without area, as 2.x does
    if detector.family == "retinanet":
        _read_anchors(detector, head.child("anchor_generator"), (8, 16, 32, 64, 128))
        _read_coder(detector, head.child("bbox_coder"), "anchor_delta_weights")
        return
    if head.node:
        detector.set(
            "configuration",
            centerness_from="box" if head.get("centerness_on_reg", False) else "class",
            distances="relu" if head.get("norm_on_bbox", False) else "exp",
        )
    if head.numbers("strides", (8, 16, 32, 64, 128)) != [8, 16, 32, 64, 128]:
        raise unsupported(where, "configuration", f"model.bbox_head.strides is {head.get('strides')}")
    detector.set("configuration", center_sampling_radius=float(head.get("center_sample_radius", 1.5)))


def _read_two_stage(detector: ForeignDetector, model: ConfigNode) -> None:
    where, rpn, roi = model.where, model.child("rpn_head"), model.child("roi_head")
    _read_anchors(detector, rpn.child("anchor_generator"), (4, 8, 16, 32, 64))
    _read_coder(detector, rpn.child("bbox_coder"), "anchor_delta_weights")
    _read_coder(detector, roi.child("bbox_head").child("bbox_coder"), "box_delta_weights")
    roi.expect("type", "StandardRoIHead")
    box = roi.child("bbox_roi_extractor")
    layer = box.child("roi_layer")
    layer.expect("type", "RoIAlign")
    layer.expect("pool_mode", "avg")
    for extractor, side in ((box, 7), (roi.child("mask_roi_extractor"), 14)):
        extractor.expect("type", "SingleRoIExtractor")
        extractor.expect("finest_scale", 56)
        extractor.expect("featmap_strides", [4, 8, 16, 32])
        extractor.child("roi_layer").expect("output_size", side, [side, side])
    box_head = roi.child("bbox_head")
    box_head.child("cls_predictor_cfg").expect("type", "Linear")
    box_head.child("reg_predictor_cfg").expect("type", "Linear")
    if box_head.child("loss_cls").get("type") == "SeesawLoss":
        raise unsupported(where, "configuration", "model.roi_head.bbox_head.loss_cls.type is 'SeesawLoss'")
    sampling, aligned = _roi_layer(layer)
    detector.set("configuration", box_sampling_ratio=sampling, box_roi_aligned=aligned)
    if detector.family == "mask_rcnn" and roi.child("mask_roi_extractor").node:
        other = _roi_layer(roi.child("mask_roi_extractor").child("roi_layer"))
        if other != (sampling, aligned):
            raise unsupported(
                where, "configuration", f"RoIAlign of boxes {(sampling, aligned)} and masks {other} differ"
            )
    tests, trains = model.child("test_cfg"), model.child("train_cfg")
    proposals = tests.child("rpn") if tests.child("rpn").node else rpn.child("test_cfg")
    final = tests.child("rcnn") if tests.child("rcnn").node else roi.child("test_cfg")
    training = trains.child("rpn_proposal")
    for part, phase in ((proposals, "test"), (training, "train")):
        part.expect("nms_across_levels", False)
        if "nms_pre" in part.node:
            detector.set("configuration", **{f"rpn_pre_nms_top_n_{phase}": _limit(part.get("nms_pre"))})
        limit = part.get("max_per_img", part.get("max_num", part.get("nms_post")))
        if limit is not None:
            detector.set("configuration", **{f"rpn_post_nms_top_n_{phase}": _limit(limit)})
    threshold = proposals.child("nms").get("iou_threshold", proposals.get("nms_thr"))
    proposals.child("nms").expect("type", "nms")
    if threshold is not None:
        detector.set("configuration", rpn_nms_thresh=float(threshold))
    if "min_bbox_size" in proposals.node:
        detector.set("configuration", proposal_min_size=max(0.0, float(proposals.get("min_bbox_size"))))
    _read_thresholds(detector, final)
    if detector.family == "mask_rcnn":
        final.expect("mask_thr_binary", 0.5)


def _roi_layer(layer: ConfigNode) -> tuple[int, bool]:
    """Sampling ratio and alignment."""
    return int(layer.get("sampling_ratio", layer.get("sample_num", 0))), bool(layer.get("aligned", True))


def _read_thresholds(detector: ForeignDetector, test: ConfigNode) -> None:
    nms = test.child("nms")
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
            detector.set("configuration", **{name: _limit(value) if name == "detections_per_img" else float(value)})


def _limit(value: Any) -> int:
    """A number of boxes. MMDetection's -1 means all of them."""
    return int(value) if int(value) > 0 else foreign.ALL


def read_resize(detector: ForeignDetector, config: Mapping[str, Any]) -> None:
    """Side lengths of the resize in tests, and the multiple to which images are padded."""
    data = config.get("data")
    places = [config.get("test_pipeline"), data.get("test") if isinstance(data, Mapping) else None]
    steps = [step for step in _nodes([*places, config.get("test_dataloader")]) if isinstance(step.get("type"), str)]
    scales = [step.get("scale", step.get("img_scale")) for step in steps if step["type"] in RESIZES]
    scale = next((scale for scale in scales if scale is not None), None)
    if isinstance(scale, list) and len(scale) == 2 and all(isinstance(side, int) and side > 0 for side in scale):
        detector.set("configuration", min_size=min(scale), max_size=max(scale))
    elif scale is not None:
        detector.warnings.append(
            f"The resize in tests is {scale!r}, which distill cannot express: 800 and 1333 are assumed"
        )
    if any(step["type"] in RESIZES and step.get("keep_ratio") is False for step in steps):
        detector.warnings.append("The training's resize changes the ratio of the sides, distill's keeps it")
    model = config["model"]
    preprocessor = model.get("data_preprocessor") or config.get("data_preprocessor")
    divisor = preprocessor.get("pad_size_divisor") if isinstance(preprocessor, Mapping) else None
    padded = [step.get("size_divisor") for step in steps if step["type"] == "Pad"]
    multiple = next((value for value in (divisor, *padded) if isinstance(value, int) and value > 0), 32)
    if multiple != 32:
        detector.resize["pad_to"] = multiple


def _read_anchors(detector: ForeignDetector, generator: ConfigNode, strides: Sequence[int]) -> None:
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
    detector.set(
        "configuration",
        anchors__sizes=[[float(base * scale) for scale in scales] for base in bases],
        anchors__ratios=generator.numbers("ratios", (0.5, 1.0, 2.0)),
        anchors__offset=float(generator.get("center_offset", 0.0)),
        anchors__order="ratio" if generator.get("scale_major", True) else "size",
    )


def _read_coder(detector: ForeignDetector, coder: ConfigNode, option: str) -> None:
    if not coder.node:
        return
    coder.expect("type", "DeltaXYWHBBoxCoder")
    coder.expect("add_ctr_clamp", False)
    coder.expect("clip_border", True)
    stds = coder.numbers("target_stds", (1.0, 1.0, 1.0, 1.0))
    means = coder.numbers("target_means", (0.0, 0.0, 0.0, 0.0))
    detector.set("configuration", **{option: [_reciprocal(std) for std in stds]})
    if any(means):
        detector.means[option] = [mean / std for mean, std in zip(means, stds, strict=True)]


def _reciprocal(std: float) -> float:
    """1 / std, without the last digit of rounding: 10 for 0.1."""
    return float(f"{1 / std:.12g}")
