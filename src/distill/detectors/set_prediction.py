"""Set-prediction detectors of Hugging Face transformers: what RT-DETR, D-FINE and DEIMv2 share.

The View calls the library's own parts in the library's own order: backbone, encoder, scores of the encoder's cells,
decoder. A contract test compares losses and detections with the library's own forward pass, bit for bit. All stages
behind the encoder compute in float32 under any autocast, because every decoder layer refines boxes.
"""

from __future__ import annotations

import inspect
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from distill.assignment import Matches, set_targets
from distill.detectors.backbones import freeze, resolved_options
from distill.detectors.base import Detector
from distill.detectors.norms import check_norm, convert_norms
from distill.detectors.options import BackboneOptions, PixelOptions, to_plain
from distill.detectors.roi_align import region_pool
from distill.detectors.set_criterion import Denoising, QueryGroup, SetCriterion, SetLosses
from distill.detectors.torchvision_weights import NoWeights
from distill.detectors.transformers_bodies import body_configuration, initialize_convolutions
from distill.detectors.transformers_weights import published_classes, read_published
from distill.detectors.view import BODY, NeckView, geometry, network, temporarily
from distill.detectors.weights import class_names, initialize
from distill.distributed import sum_over_ranks
from distill.extras import import_extra
from distill.imaging.resizing import ResizeOptions
from distill.precision import upcast
from distill.type_checks import parse_options
from distill.types import Detections, DetectorSpec, DistillError, Pyramid, QueryLayer, QueryPoints, Size

BACKBONE = BackboneOptions(name="resnet_d")
"""The default backbone: a ResNet-D."""
PIXELS = PixelOptions(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""The library's pixel values: from 0 to 1, without mean and standard deviation."""
BODY_STRIDES = (4, 8, 16, 32)
"""Strides of C2 to C5."""
LARGEST_STRIDE = 32
DENOISING = 0
"""Number of the draw of the denoising queries for `LazyView.draw`."""
CRITERIA = ("own", "library")
"""Values of the option `criterion`."""


def transformers(module: str = "transformers") -> Any:
    """Import a module of transformers.

    Raises:
        DistillError: transformers is not installed, or the scipy that its matcher needs.
    """
    import_extra("scipy", "detr", "the matcher of set-prediction detectors")
    return import_extra(module, "detr", "a detector of the families RTDETR, DFine, DEIMv2 and RFDETR")


class Cells(NamedTuple):
    """The cells of the encoder's maps, projected for the decoder."""

    values: Tensor
    """(B, N, D): the cells of all levels, finest level first, row by row."""
    sizes: tuple[Size, ...]
    """(height, width) of each level."""


LIBRARY_NAMES = {"vfl": "classification", "mal": "classification", "ce": "classification", "bbox": "l1"}
"""Kind of a term in the library -> our name, where it differs."""


class NoisyQueries(NamedTuple):
    """Noisy copies of the ground truth that the decoder learns to repair, as the library makes them."""

    content: Tensor
    """(B, M, D)"""
    boxes: Tensor
    """(B, M, 4): before the sigmoid."""
    mask: Tensor
    """(M + Q, M + Q): added to the attention; -inf separates the groups from one another and from the Q queries."""
    facts: dict[str, Any]
    """The library's facts for its loss."""

    @property
    def size(self) -> int:
        """Number of these queries, which stand before the others."""
        return int(self.facts["dn_num_split"][0])

    def matches(self) -> Matches:
        """For each image the queries near an object, and these objects, of all groups."""
        groups = self.facts["dn_num_group"]
        return [
            (queries, torch.arange(len(queries) // groups).repeat(groups)) for queries in self.facts["dn_positive_idx"]
        ]


class QueryView(NeckView):
    """The View of a set-prediction detector. `class_logits` are the scores of the encoder's cells."""

    detector: Any
    outputs = NeckView.outputs | {"class_logits", "queries", "query_targets"}

    @property
    def pool(self) -> Any:
        """RoIAlign over the encoder's maps."""
        return self.detector.pool

    @network
    def body(self) -> Pyramid:
        """Stride -> map, for all stages from C2 on, also for those that the neck does not use."""
        height, width = self.batch.images.shape[-2:]
        if height % LARGEST_STRIDE or width % LARGEST_STRIDE:
            raise DistillError(
                f"{self.spec.family}: expected images whose sides are multiples of {LARGEST_STRIDE} pixels, got a "
                f"batch of {height} x {width}. Set data.resize=square with such data.min_size and data.max_size, or "
                "data.pad_to=32"
            )
        images = self.images
        with self.draw(BODY):
            body = self.net.get_submodule(self.detector.body_path)
            maps = body(images, output_hidden_states=True).hidden_states
        return dict(zip(self.spec.body, maps[-len(self.spec.body) :], strict=True))

    @network
    def neck(self) -> Pyramid:
        """Stride -> map of the hybrid encoder (B, C, H, W)."""
        stages = [self.body[stride] for stride in self.spec.neck]
        layers = self.net.model.encoder_input_proj
        maps = self.net.model.encoder([layer(x) for layer, x in zip(layers, stages, strict=True)]).last_hidden_state
        return dict(zip(self.spec.neck, maps, strict=True))

    @network
    def cells(self) -> Cells:
        """The cells of the neck, projected for the decoder."""
        layers = self.net.model.decoder_input_proj
        maps = [layer(x) for layer, x in zip(layers, self.neck.values(), strict=True)]
        values = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        return Cells(values.to(self._dtype), tuple((x.shape[-2], x.shape[-1]) for x in maps))

    @property
    def _dtype(self) -> torch.dtype:
        """The type in which the decoder computes: that of its weights."""
        return cast(torch.dtype, next(self.net.model.enc_output.parameters()).dtype)

    @geometry
    def _anchors(self) -> tuple[Tensor, Tensor]:
        """The library's start boxes of all cells (1, N, 4) before the sigmoid, and which are valid (1, N, 1)."""
        anchors, valid = self.net.model.generate_anchors(self.cells.sizes, device=self.device, dtype=torch.float32)
        return anchors, valid

    @geometry
    def cell_features(self) -> Tensor:
        """(B, N, D): the encoder's features of all cells, from which the queries get their content."""
        values = self.cells.values
        return cast(Tensor, self.net.model.enc_output(self._anchors[1].to(values.dtype) * values))

    @geometry
    def cell_logits(self) -> Tensor:
        """(B, N, K): the class logits of all cells."""
        return cast(Tensor, self.net.model.enc_score_head(self.cell_features))

    @geometry
    def cell_boxes(self) -> Tensor:
        """(B, N, 4) float32: the boxes of all cells, before the sigmoid."""
        return upcast(self.net.model.enc_bbox_head(self.cell_features)) + self._anchors[0]

    @geometry
    def class_logits(self) -> Pyramid:
        """Stride -> (B, K, H, W): the class logits of the encoder's cells. Channel i is the class with label i + 1."""
        sizes = self.cells.sizes
        levels = torch.split(upcast(self.cell_logits), [height * width for height, width in sizes], dim=1)
        return {
            stride: level.transpose(1, 2).reshape(len(level), -1, *size)
            for stride, level, size in zip(self.spec.neck, levels, sizes, strict=True)
        }

    @geometry
    def _chosen(self) -> Tensor:
        """(B, Q) int64: the cells from which the queries start: those with the highest scores."""
        count, scores = self.detector.options["queries"], self.cell_logits.max(dim=-1).values
        if scores.shape[1] < count:
            height, width = self.batch.images.shape[-2:]
            raise DistillError(
                f"queries: the {self.spec.family} has {count} queries, and an image of {height} x {width} pixels has "
                f"{scores.shape[1]} cells of strides {list(self.spec.neck)}. Set model.queries={scores.shape[1]} or "
                "fewer (of a teacher: teacher.model.queries), or larger images with data.min_size"
            )
        return torch.topk(scores, count, dim=1).indices

    @geometry
    def labels(self) -> list[dict[str, Tensor]]:
        """Ground truth in the library's form: labels from 0, and boxes as `QueryLayer.boxes`."""
        height, width = self.batch.images.shape[-2:]
        frame = torch.tensor([width, height, width, height], device=self.device)
        return [
            {"class_labels": target.labels - 1, "boxes": box_convert(target.boxes, "xyxy", "cxcywh") / frame}
            for target in self.batch.targets
        ]

    @geometry
    def denoising(self) -> NoisyQueries | None:
        """Denoising queries; None outside of training, without (known) boxes in the batch, and with ``denoising=0``."""
        model, options = self.net.model, self.detector.options
        if self.batch.targets_missing or not (self.training and self.net.training and options["denoising"]):
            return None
        make = sys.modules[type(self.net).__module__].get_contrastive_denoising_training_group
        with self.draw(DENOISING):
            content, boxes, mask, facts = make(
                targets=self.labels,
                num_classes=len(self.spec.classes),
                num_queries=options["queries"],
                class_embed=model.denoising_class_embed,
                num_denoising_queries=options["denoising"],
                label_noise_ratio=options["label_noise"],
                box_noise_scale=options["box_noise"],
            )
        return None if facts is None else NoisyQueries(content, boxes, mask, facts)

    @geometry
    def decoded(self) -> Any:
        """The library's outputs of the decoder, with denoising queries in front."""
        content = _rows(self.cell_features, self._chosen).detach()
        boxes, noisy = _rows(self.cell_boxes, self._chosen).detach(), self.denoising
        if noisy is None:
            return self._decode(content, boxes, None)
        return self._decode(torch.cat([noisy.content, content], 1), torch.cat([noisy.boxes, boxes], 1), noisy.mask)

    def _decode(self, content: Tensor, boxes: Tensor, mask: Tensor | None) -> Any:
        """Run the decoder.

        Args:
            content: (B, Q, D).
            boxes: (B, Q, 4), before the sigmoid.
            mask: (Q, Q), added to the attention between queries.
        """
        memory, sizes = self.cells
        shapes = torch.tensor(sizes, device=self.device)
        areas = shapes.prod(dim=1)
        # Outside of training, D-FINE's decoder computes its last layer alone. Nothing below it changes with its mode.
        with temporarily(self.net.model.decoder, training=True):
            return self.net.model.decoder(
                inputs_embeds=content,
                encoder_hidden_states=memory,
                encoder_attention_mask=mask,
                reference_points=boxes.to(memory.dtype),
                spatial_shapes=shapes,
                spatial_shapes_list=list(sizes),
                level_start_index=areas.cumsum(0) - areas,
            )

    @geometry
    def queries(self) -> list[QueryLayer]:
        """Outputs of all decoder layers, first layer first, without denoising queries."""
        return list(self._queries.layers)

    @geometry
    def _queries(self) -> QueryGroup:
        noisy = self.denoising
        return self.group(self.decoded, slice(0 if noisy is None else noisy.size, None))

    def group(self, decoded: Any, rows: slice) -> QueryGroup:
        """Read the layers of some queries from the decoder's outputs."""
        logits, boxes = decoded.intermediate_logits, decoded.intermediate_reference_points
        outputs = logits, boxes, decoded.intermediate_hidden_states
        columns = (upcast(x[:, :, rows]).unbind(1) for x in outputs)
        return QueryGroup([QueryLayer(*layer) for layer in zip(*columns, strict=True)])

    @geometry
    def query_targets(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each layer and image, the matched queries and their ground-truth boxes, each (N,) int64."""
        if "_set_losses" in vars(self):
            return self._set_losses.matches
        return list(self.detector.set_criterion.match(self.queries, set_targets(self.batch)))

    @geometry
    def _set_losses(self) -> SetLosses:
        """The losses of the set criterion."""
        chosen, noisy = self._chosen, self.denoising
        rows = (_rows(x, chosen) for x in (self.cell_logits, self.cell_boxes.sigmoid(), self.cell_features))
        repaired = None
        if noisy is not None:
            group = self.group(self.decoded, slice(noisy.size))
            repaired = Denoising(group.layers, noisy.matches(), group.first)
        encoder = QueryLayer(*map(upcast, rows))
        return cast(SetLosses, self.detector.set_criterion(self._queries, set_targets(self.batch), encoder, repaired))

    @geometry
    def library_terms(self) -> dict[str, Tensor]:
        """All terms of the library's loss, with its names and weights. Their sum is the library's loss."""
        decoded, noisy = self.decoded, self.denoising
        logits, boxes = upcast(decoded.intermediate_logits), upcast(decoded.intermediate_reference_points)
        _, terms, _ = self.net.loss_function(
            logits[:, -1],
            self.labels,
            self.device,
            boxes[:, -1],
            self.net.config,
            logits,
            boxes,
            enc_topk_logits=upcast(_rows(self.cell_logits, self._chosen)),
            enc_topk_bboxes=_rows(self.cell_boxes, self._chosen).sigmoid(),
            denoising_meta_values=None if noisy is None else noisy.facts,
            predicted_corners=_upcast(getattr(decoded, "intermediate_predicted_corners", None)),
            initial_reference_points=_upcast(getattr(decoded, "initial_reference_points", None)),
        )
        return dict(terms)

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """Each kind of loss, with its weight, summed over all layers, the encoder's scores and denoising queries."""
        weights = self.detector.loss_weights
        if self.detector.options["criterion"] == "library":
            losses = self._library_losses()
        else:
            losses = {name: weights[name] * value for name, value in self._set_losses.terms.items()}
        if self.detector.options["denoising"] and self.denoising is None:
            # Without a box in the batch, no denoising query reads this layer. DDP expects a gradient of every weight.
            unread = self.net.model.denoising_class_embed.weight
            losses["classification"] = losses["classification"] + 0 * unread.sum()
        return losses

    def _library_losses(self) -> dict[str, Tensor]:
        share = self._box_share()
        sums: dict[str, Any] = dict.fromkeys(self.detector.loss_weights, 0.0)
        for name, value in self.library_terms.items():
            kind = name.removeprefix("loss_").partition("_")[0]
            # The library divides by the boxes of its own process. DDF is a mean, which no count of boxes divides.
            scaled = value if share is None or kind == "ddf" else value * share
            sums[LIBRARY_NAMES.get(kind, kind)] += scaled
        return {name: torch.as_tensor(value, device=self.device) for name, value in sums.items()}

    def _box_share(self) -> Tensor | None:
        """Boxes of this process, divided by the mean over all processes; None for one process."""
        count = torch.tensor(sum(len(target.labels) for target in self.batch.targets), device=self.device)
        total, processes = sum_over_ranks(count.float())
        return None if processes == 1 else count.clamp(min=1) / (total / processes).clamp(min=1)

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Return the detections in pixels of the resized image. A threshold of None is the detector's own.

        The detector has no NMS. It takes the best of the scores of all queries and classes.
        """
        options = self.detector.options
        with self.scope(autocast=False):
            last, (height, width) = self.queries[-1], self.batch.images.shape[-2:]
            scores = last.logits.sigmoid().flatten(1)
            count = min(scores.shape[1], options["detections_per_img"] if top is None or nms is not None else top)
            scores, places = torch.topk(scores, count, dim=1)
            classes = len(self.spec.classes)
            frame = torch.tensor([width, height, width, height], device=self.device)
            boxes = _rows(box_convert(last.boxes, "cxcywh", "xyxy") * frame, places // classes)
            lowest = options["score_thresh"] if score is None else score
            images = [
                Detections(boxes[image][kept], scores[image][kept], places[image][kept] % classes + 1)
                for image, kept in enumerate(scores >= lowest)
            ]
        return images if nms is None else [_suppressed(image, nms, top) for image in images]


class PointView(QueryView):
    """The View of a set-prediction detector whose decoder can start from any points."""

    outputs = QueryView.outputs | {"query_points", "decode"}

    @geometry
    def query_points(self) -> QueryPoints:
        """The cells and boxes from which the decoder starts."""
        return QueryPoints(self._chosen, _rows(self.cell_boxes, self._chosen).detach().sigmoid())

    def decode(self, points: QueryPoints) -> list[QueryLayer]:
        """Run the decoder from any points of this image size. Gradients reach the decoder and the encoder."""
        with self.scope(autocast=False):
            content = _rows(self.cell_features, points.cells).detach()
            decoded = self._decode(content, torch.logit(points.boxes, eps=1e-5), None)
            return list(self.group(decoded, slice(None)).layers)


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, Q, C) of x (B, N, C) at indices (B, Q)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def _upcast(x: Tensor | None) -> Tensor | None:
    return None if x is None else upcast(x)


def _suppressed(image: Detections, nms: float, top: int | None) -> Detections:
    kept = batched_nms(image.boxes, image.scores, image.labels, nms)[:top]
    return Detections(image.boxes[kept], image.scores[kept], image.labels[kept])


class SetPredictionDetector(Detector):
    """A detector of transformers, built from a configuration. Each family implements `configuration`."""

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

    def corner_bins(self, options: Mapping[str, Any]) -> dict[str, float]:
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
            f"{sides[0]} and {sides[1]}. Set data.min_size and data.max_size to one such number"
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
