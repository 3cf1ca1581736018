"""RF-DETR: transformers' network and its View."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from distill.assignment import set_targets
from distill.detectors.backbones import freeze, resolved_options
from distill.detectors.base import Detector
from distill.detectors.norms import check_norm, convert_norms
from distill.detectors.options import PIXELS, BackboneOptions, PixelOptions, to_plain
from distill.detectors.query_view import LIBRARY_NAMES, Cells, QueryView
from distill.detectors.roi_align import region_pool
from distill.detectors.set_criterion import QueryGroup, SetCriterion, SetLosses
from distill.detectors.set_prediction import CRITERIA, transformers
from distill.detectors.torchvision_weights import NoWeights
from distill.detectors.transformers_bodies import initialize_convolutions
from distill.detectors.transformers_weights import published_classes, read_published
from distill.detectors.view import BODY, geometry, network
from distill.detectors.weights import class_names, initialize
from distill.imaging.resizing import ResizeOptions
from distill.precision import upcast
from distill.type_checks import parse_options
from distill.types import DetectorSpec, DistillError, Pyramid, QueryLayer

BACKBONE = BackboneOptions(name="dinov2")
"""The default backbone: a DINOv2 S whose attention is in windows."""
STRIDE = 16
"""Side of a patch, and stride of all maps."""
WINDOWS = 2
"""Windows along a side, by default."""
HEAD = 64
"""Channels of an attention head of the backbone."""
SMALL_HEADS = 6
"""Attention heads of a DINOv2 S."""
DROPOUT = 0
"""Number of the draw of the decoder's dropout for `LazyView.draw`."""
READ = 4
"""Number of the backbone's layers that the neck reads, at equal distances; the last one is the last layer."""


class RFDETRView(QueryView):
    """The View of an RF-DETR.

    In training, there are several groups of queries, which see nothing of each other. `queries` are those of the first
    group, the only one outside of training.
    """

    @property
    def _groups(self) -> int:
        """Number of groups of queries. Images without known boxes need one only."""
        many = self.training and self.net.training and not self.batch.targets_missing
        return int(self.detector.options["groups"]) if many else 1

    @network
    def _maps(self) -> list[Tensor]:
        """The backbone's maps that the neck reads, each (B, C, H, W)."""
        height, width = self.batch.images.shape[-2:]
        side = self.detector.side_multiple(self.detector.options)
        if height != width or height % side:
            raise DistillError(
                f"rfdetr: expected square images whose sides are multiples of {side} pixels ({STRIDE} of a patch × "
                f"model.windows), got a batch of {height} x {width}. Set data.resize=square, and equal data.min_size "
                "and data.max_size"
            )
        images = self.images
        with self.draw(BODY):
            return list(self.net.get_submodule(self.detector.body_path)(images).feature_maps)

    @network
    def body(self) -> Pyramid:
        """Stride -> the last map of the backbone."""
        return {STRIDE: self._maps[-1]}

    @network
    def neck(self) -> Pyramid:
        """Stride -> the map of the projector (B, C, H, W)."""
        return {STRIDE: self.net.model.backbone.projector(self._maps)}

    @network
    def cells(self) -> Cells:
        """The cells of the neck."""
        x = self.neck[STRIDE]
        return Cells(x.flatten(2).transpose(1, 2).to(self._dtype), ((x.shape[-2], x.shape[-1]),))

    @geometry
    def _proposals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all cells: the features (B, N, D), the start boxes (B, N, 4), and which are too near to the edge."""
        values, sizes = self.cells
        padding = torch.zeros(values.shape[:2], dtype=torch.bool, device=self.device)
        return cast(
            "tuple[Tensor, Tensor, Tensor]", self.net.model.gen_encoder_output_proposals(values, padding, list(sizes))
        )

    @geometry
    def cell_features(self) -> Tensor:
        """(B, N, D): the features of all cells for the first group."""
        return cast(Tensor, self.net.model.enc_output_norm[0](self.net.model.enc_output[0](self._proposals[0])))

    @geometry
    def cell_logits(self) -> Tensor:
        """(B, N, K): the class logits of all cells, of the first group."""
        return cast(Tensor, self.net.model.enc_out_class_embed[0](self.cell_features))

    @geometry
    def _best(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each group's best cells: features (B, Q, D), and boxes (B, Q, 4) without and with a gradient."""
        count, (values, boxes, invalid) = self.detector.options["queries"], self._proposals
        if values.shape[1] < count:
            raise DistillError(
                f"queries: the rfdetr has {count} queries, and an image of {self.batch.images.shape[-1]} pixels has "
                f"{values.shape[1]} cells of stride {STRIDE}. Set model.queries={values.shape[1]} or fewer (of a "
                "teacher: teacher.model.queries), or larger images with data.min_size"
            )
        choose = self.net.model.generate_topk_proposals
        return [choose(group, values, boxes, invalid, count) for group in range(self._groups)]

    @geometry
    def encoded(self) -> QueryLayer:
        """Outputs of the best cells of all groups."""
        features, _, boxes = (torch.cat(column, dim=1) for column in zip(*self._best, strict=True))
        parts = torch.split(features, self.detector.options["queries"], dim=1)
        logits = [head(part) for head, part in zip(self.net.model.enc_out_class_embed, parts, strict=False)]
        return QueryLayer(torch.cat(logits, dim=1), boxes, features)

    @geometry
    def decoded(self) -> tuple[Tensor, Tensor]:
        """Hidden states of all layers (L, B, G * Q, D), and the boxes from which all layers start (1, B, G * Q, 4)."""
        model, count, (memory, sizes) = self.net.model, self._groups * self.detector.options["queries"], self.cells
        starts = torch.cat([boxes for _, boxes, _ in self._best], dim=1)
        shifts, content = (
            _first_rows(x.weight, count).expand(len(starts), -1, -1)
            for x in (model.reference_point_embed, model.query_feat)
        )
        training = self.net.training and self._groups == self.detector.options["groups"]
        with _mode(model.decoder, training=training), self.draw(DROPOUT):
            outputs = model.decoder(
                inputs_embeds=content,
                reference_points=self._refine(starts, shifts),
                spatial_shapes=torch.tensor(sizes, device=self.device),
                spatial_shapes_list=list(sizes),
                level_start_index=torch.zeros(1, dtype=torch.int64, device=self.device),
                valid_ratios=memory.new_ones(len(memory), 1, 2),
                encoder_hidden_states=memory,
                encoder_attention_mask=torch.ones(memory.shape[:2], dtype=torch.bool, device=self.device),
            )
        return outputs.intermediate_hidden_states, outputs.intermediate_reference_points

    def _refine(self, boxes: Tensor, shifts: Tensor) -> Tensor:
        refined: Tensor = sys.modules[type(self.net).__module__].refine_bboxes(boxes, shifts)
        return refined

    @geometry
    def outputs_of_layers(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Logits and boxes: of the last layer, and of all layers (L first). The library computes the last one twice."""
        hidden, starts = self.decoded
        predict = self.net.predict_class_and_boxes
        return predict(hidden[-1], starts[-1]), predict(hidden, starts)

    @geometry
    def _layers(self) -> list[QueryLayer]:
        """Outputs of all layers for all groups."""
        last, every = self.outputs_of_layers
        hidden = upcast(self.decoded[0])
        outputs = [*zip(*(upcast(x[:-1]) for x in every), strict=True), tuple(map(upcast, last))]
        return [QueryLayer(logits, boxes, x) for (logits, boxes), x in zip(outputs, hidden, strict=True)]

    @geometry
    def queries(self) -> list[QueryLayer]:
        """Outputs of all decoder layers for the first group, first layer first."""
        count = self.detector.options["queries"]
        return [QueryLayer(x.logits[:, :count], x.boxes[:, :count], x.hidden[:, :count]) for x in self._layers]

    @geometry
    def query_targets(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each layer and image, the matched queries and their ground-truth boxes, each (N,) int64."""
        if "_set_losses" in vars(self):
            return [list(matches[:: self._groups]) for matches in self._set_losses.matches]
        return list(self.detector.set_criterion.match(self.queries, set_targets(self.batch)))

    @geometry
    def _set_losses(self) -> SetLosses:
        """The losses of the set criterion. Each group of queries counts as an image of its own."""
        count = self.detector.options["queries"]
        targets = [target for target in set_targets(self.batch) for _ in range(self._groups)]

        def split(layer: QueryLayer) -> QueryLayer:
            return QueryLayer(*(upcast(x).reshape(-1, count, x.shape[-1]) for x in layer[:3]))

        layers = QueryGroup([split(layer) for layer in self._layers])
        return cast(SetLosses, self.detector.set_criterion(layers, targets, split(self.encoded)))

    @geometry
    def library_terms(self) -> dict[str, Tensor]:
        """All terms of the library's loss that have a weight, with the weight. Their sum is the library's loss."""
        config, encoded, (last, every) = self.net.config, self.encoded, self.outputs_of_layers
        if self._groups != config.group_detr:  # the library's criterion always looks for all groups
            config = copy.copy(config)
            config.group_detr = self._groups
        outputs = (*map(upcast, every), upcast(encoded.logits), upcast(encoded.boxes))
        logits, boxes = map(upcast, last)
        _, terms, _ = self.net.loss_function(logits, self.labels, self.device, boxes, config, *outputs)
        weights = self.detector.loss_weights
        return {name: weights[_kind(name)] * value for name, value in terms.items() if _kind(name) in weights}

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """Each kind of loss, with its weight, summed over all layers and the encoder's scores."""
        weights = self.detector.loss_weights
        if self.detector.options["criterion"] == "own":
            return {name: weights[name] * value for name, value in self._set_losses.terms.items()}
        sums: dict[str, Any] = dict.fromkeys(weights, 0.0)
        for name, value in self.library_terms.items():
            sums[_kind(name)] = sums[_kind(name)] + value
        return sums


def _first_rows(weight: Tensor, count: int) -> Tensor:
    """The first rows of a weight.

    Where no gradients are recorded, a view of a weight may still claim to need one, and torch's counter of operations
    (`FlopCounterMode`) then fails.
    """
    return weight[:count] if torch.is_grad_enabled() else weight.detach()[:count]


def _kind(name: str) -> str:
    kind = name.removeprefix("loss_").partition("_")[0]
    return LIBRARY_NAMES.get(kind, kind)


@contextmanager
def _mode(module: Any, training: bool) -> Iterator[None]:
    """Set the mode of a module inside the context."""
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)


class RFDETR(Detector):
    """RF-DETR (Robinson et al. 2025, arXiv 2511.09554): a DINOv2 with windows, a projector, and a decoder of queries.

    The network is that of Hugging Face transformers. All maps have stride 16. Queries start from the best cells; in
    training there are several groups of them (Group DETR, Chen et al. 2023). The published sizes with patches of 14
    pixels (Base and the first Large) do not fit, because a stride is a power of two. Arguments that are not listed here
    are those of `RTDETR`.

    Args:
        backbone: options of the backbone: the name is ``dinov2``; `depth` is the number of layers, a multiple of 4
            (None is 12); `width` 1 has six heads of 64 channels (DINOv2 S), 2 twelve (B). The norms are layer norms:
            ``norm=batch`` changes nothing.
        windows: the image is divided into windows² windows. Only three layers, at one, two and three quarters of
            the depth, attend to the whole image.
        positions: side in cells of the trained grid of position embeddings, which is interpolated for other image
            sizes. Each published size has the side of its images / 16.
        neck_channels: channels of the projector's map and of the queries.
        neck_expansion: width of the projector's blocks, relative to `neck_channels`.
        neck_blocks: number of the projector's blocks.
        self_heads: attention heads between queries.
        cross_heads: attention heads on the map.
        decoder_points: sampled points per head.
        dropout: of the decoder, in training.
        queries: number of queries of a group.
        groups: number of groups in training.

    Raises:
        DistillError: an option has an invalid value, the weights do not fit, or transformers is not installed or older
            than 5.18.
    """

    family = "rfdetr"
    enum = NoWeights
    view_class = RFDETRView
    needs_squares = True
    paper_schedule = "detr"
    body_path = "model.backbone.backbone"
    loss_weights: ClassVar[Mapping[str, float]] = {"classification": 1.0, "l1": 5.0, "giou": 2.0}
    """Name of a loss of the View -> its weight."""
    set_criterion = SetCriterion("ia_bce")
    """The own losses, and the matching of queries to objects."""
    float32_parts = (
        *("model.decoder", "model.enc_output", "model.enc_output_norm", "model.enc_out_bbox_embed"),
        *("model.enc_out_class_embed", "model.reference_point_embed", "model.query_feat", "class_embed", "bbox_embed"),
    )

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        windows: int = WINDOWS,
        positions: int = 24,
        neck_channels: int = 256,
        neck_expansion: float = 0.5,
        neck_blocks: int = 3,
        decoder_layers: int = 2,
        decoder_ffn: int = 2048,
        self_heads: int = 8,
        cross_heads: int = 16,
        decoder_points: int = 2,
        dropout: float = 0.0,
        queries: int = 300,
        groups: int = 13,
        criterion: str = "own",
        score_thresh: float = 0.0,
        detections_per_img: int = 300,
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 384,
        max_size: int | None = None,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        given["max_size"] = min_size if max_size is None else max_size
        library = transformers()
        names = published_classes(library, weights) if classes is None else None
        names = names or class_names(classes, weights, self.enum)
        chosen, shown = parse_options("backbone", backbone, BACKBONE), parse_options("pixels", pixels, PIXELS)
        check_norm(chosen.norm)
        _check_values(given, chosen)
        options = to_plain({**given, "backbone": chosen, "pixels": shown, "classes": names})
        net = library.RfDetrForObjectDetection(_configuration(library, chosen, options))
        body, channels = net.get_submodule(self.body_path), HEAD * _heads(chosen)
        initialize_convolutions(net.model.backbone.projector, body)
        _start_heads_of_cells(net.model)
        convert_norms(body, chosen.norm, chosen.norm_eps)
        body.embeddings.mask_token.requires_grad_(False)  # nothing reads it
        body.ends = ("embeddings", *(f"encoder.layer.{layer - 1}" for layer in _read_layers(chosen)))
        options["backbone"]["norm_eps"] = resolved_options(body)["norm_eps"]
        spec = DetectorSpec(
            family=self.family,
            outputs=self.view_class.outputs,
            classes=names,
            body={STRIDE: channels},
            neck={STRIDE: neck_channels},
            anchors={},
            mean=tuple(shown.mean),
            std=tuple(shown.std),
            norm=chosen.norm,
        )
        super().__init__(net, spec, options, freeze(body, chosen.trainable_stages))
        self.resize = ResizeOptions(shape="square")
        self.probe_size = (2 * STRIDE * windows, 2 * STRIDE * windows)
        self.pool = region_pool((STRIDE,), 7, 2)
        """RoIAlign over the neck for losses that read regions. The library's network has none."""
        self.class_layers = {"class_embed": 1, **{f"model.enc_out_class_embed.{group}": 1 for group in range(groups)}}
        initialize(self, chosen.weights, weights, head)

    @classmethod
    def has_batch_norms(cls, backbone: Mapping[str, Any]) -> bool:
        """See the base class: a DINOv2 has layer norms."""
        return False

    @classmethod
    def side_multiple(cls, options: Mapping[str, Any]) -> int:
        """See the base class: the image is divided into windows of whole patches."""
        windows = options.get("windows", WINDOWS)
        return STRIDE * (windows if isinstance(windows, int) and windows > 0 else 1)

    def rows_around(self, layer: str) -> tuple[int, int]:
        """Rows before and behind those of the classes: none."""
        return 0, 0

    def read_published(self, source: str) -> Any:
        """Read weights of transformers' own format; None if `source` names none."""
        return read_published(transformers(), source, self.net)


def _start_heads_of_cells(model: Any) -> None:
    """Start the heads of the cells as those of the queries: every class has a score of 1 %, and boxes do not move.

    transformers 5.24 does so, too. 5.18 to 5.21 leave a score of 50 % and random boxes.
    """
    for scores, boxes in zip(model.enc_out_class_embed, model.enc_out_bbox_embed, strict=True):
        nn.init.constant_(scores.bias, -math.log(99))
        nn.init.zeros_(boxes.layers[-1].weight)
        nn.init.zeros_(boxes.layers[-1].bias)


def _heads(backbone: BackboneOptions) -> int:
    return max(1, round(SMALL_HEADS * backbone.width))


def _read_layers(backbone: BackboneOptions) -> list[int]:
    depth = 12 if backbone.depth is None else backbone.depth
    return [depth * (index + 1) // READ for index in range(READ)]


def _configuration(library: Any, backbone: BackboneOptions, options: Mapping[str, Any]) -> Any:
    if not hasattr(library, "RfDetrConfig"):
        raise DistillError(f"RFDETR needs transformers 5.18 or newer, got {library.__version__}")
    heads, read = _heads(backbone), _read_layers(backbone)
    body = library.RfDetrDinov2Config(
        hidden_size=HEAD * heads,
        num_attention_heads=heads,
        num_hidden_layers=read[-1],
        image_size=STRIDE * options["positions"],
        patch_size=STRIDE,
        num_windows=options["windows"],
        out_indices=read,
    )
    return library.RfDetrConfig(
        backbone_config=body,
        num_labels=len(options["classes"]),
        d_model=options["neck_channels"],
        hidden_expansion=options["neck_expansion"],
        c2f_num_blocks=options["neck_blocks"],
        decoder_layers=options["decoder_layers"],
        decoder_ffn_dim=options["decoder_ffn"],
        decoder_self_attention_heads=options["self_heads"],
        decoder_cross_attention_heads=options["cross_heads"],
        decoder_n_points=options["decoder_points"],
        dropout=options["dropout"],
        num_queries=options["queries"],
        group_detr=options["groups"],
    )


def _check_values(given: Mapping[str, Any], backbone: BackboneOptions) -> None:
    if backbone.name != "dinov2":
        raise DistillError(f"backbone.name: expected dinov2, the backbone of an RF-DETR, got {backbone.name!r}")
    if (backbone.groups, backbone.group_width, backbone.stride_in_1x1) != (1, 64, False):
        raise DistillError(
            "backbone.groups, backbone.group_width, backbone.stride_in_1x1: expected 1, 64 and false, as dinov2 has no "
            f"such convolutions, got {backbone.groups!r}, {backbone.group_width!r} and {backbone.stride_in_1x1!r}"
        )
    if (backbone.depth is not None and (backbone.depth < READ or backbone.depth % READ)) or not 0 < backbone.width <= 8:
        raise DistillError(
            f"backbone.depth, backbone.width: expected a multiple of {READ} or null, and a factor above 0 and up "
            f"to 8, got {backbone.depth!r} and {backbone.width!r}"
        )
    counts = (
        *("windows", "positions", "neck_blocks", "decoder_layers", "decoder_ffn", "self_heads", "cross_heads"),
        *("decoder_points", "queries", "groups", "detections_per_img"),
    )
    if low := [f"{name}={given[name]}" for name in counts if given[name] < 1]:
        raise DistillError(f"{', '.join(low)}: expected numbers from 1 on")
    side = RFDETR.side_multiple(given)
    if any(given[name] % side or given[name] < side for name in ("min_size", "max_size")):
        raise DistillError(
            f"min_size, max_size: expected multiples of {side} pixels ({STRIDE} of a patch × windows), got "
            f"{given['min_size']} and {given['max_size']}. Set data.min_size, data.max_size and, if given, "
            "data.eval_min_size to one such number"
        )
    smallest = min(given["min_size"], given["max_size"])
    cells = (smallest // STRIDE) ** 2
    if given["queries"] > cells:
        raise DistillError(
            f"queries={given['queries']}: an image of {smallest} pixels has {cells} cells of stride {STRIDE}. Set "
            f"model.queries={cells} or fewer (of a teacher: teacher.model.queries), or larger images with data.min_size"
        )
    width = given["neck_channels"]
    if width < 4 or width % 4 or width % given["self_heads"] or width % given["cross_heads"]:
        raise DistillError(
            f"neck_channels: expected a multiple of 4, of self_heads={given['self_heads']} and of "
            f"cross_heads={given['cross_heads']}, got {width}"
        )
    if int(width * given["neck_expansion"]) < 1:
        raise DistillError(f"neck_expansion: expected a factor that leaves a channel, got {given['neck_expansion']}")
    if not 0 <= given["dropout"] < 1:
        raise DistillError(f"dropout: expected a share from 0 and below 1, got {given['dropout']}")
    if given["criterion"] not in CRITERIA:
        raise DistillError(f"criterion: expected {' or '.join(CRITERIA)}, got {given['criterion']!r}")
