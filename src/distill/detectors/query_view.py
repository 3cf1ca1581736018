"""The Views of RT-DETR, D-FINE and DEIMv2 of Hugging Face transformers, and the base of RF-DETR's View.

A View calls the library's own parts in the library's own order: backbone, encoder, scores of the encoder's cells,
decoder. A contract test compares losses and detections with the library's own forward pass, bit for bit. All stages
behind the encoder compute in float32 under any autocast, because every decoder layer refines boxes.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from distill.assignment import Matches, set_targets
from distill.detectors.set_criterion import Denoising, QueryGroup, SetLosses
from distill.detectors.view import BODY, NeckView, geometry, network, temporarily
from distill.distributed import sum_over_ranks
from distill.precision import upcast
from distill.types import Detections, DistillError, Pyramid, QueryLayer, QueryPoints, Size

DENOISING = 0
"""Number of the draw of the denoising queries for `LazyView.draw`."""
LIBRARY_NAMES = {"vfl": "classification", "mal": "classification", "ce": "classification", "bbox": "l1"}
"""Kind of a term in the library -> our name, where it differs."""


class Cells(NamedTuple):
    """The cells of the encoder's maps, projected for the decoder."""

    values: Tensor
    """(B, N, D): the cells of all levels, finest level first, row by row."""
    sizes: tuple[Size, ...]
    """(height, width) of each level."""


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
        multiple = self.detector.side_multiple(self.detector.options)
        if height % multiple or width % multiple:
            raise DistillError(
                f"{self.spec.family}: expected images whose sides are multiples of {multiple} pixels, got a batch of "
                f"{height} x {width}. Set data.resize=square with such data.min_size and data.max_size, or "
                f"data.pad_to={multiple}"
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
