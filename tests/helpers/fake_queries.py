"""Fake Views of set-prediction detectors: queries, their matches and points, and a neck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.types import Batch, DetectorSpec, QueryLayer, QueryPoints
from helpers.fake_view import FakeView

OUTPUTS = frozenset({"body", "neck", "queries", "query_targets", "query_points", "decode", "class_logits"})
BINS = {"count": 9, "limit": 0.5, "scale": 4.0}


def query_spec(
    classes: Sequence[str] = ("cat", "dog", "cow", "hen"),
    neck: int = 6,
    strides: Sequence[int] = (8, 16, 32),
    bins: Mapping[str, float] = BINS,
) -> DetectorSpec:
    return DetectorSpec(
        family="dfine" if bins else "rtdetr",
        outputs=OUTPUTS,
        classes=tuple(classes),
        body={4: 3, 8: 4, 16: 5, 32: 6},
        neck=dict.fromkeys(strides, neck),
        anchors={},
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        norm="batch",
        corner_bins=bins,
    )


def moved(boxes: Tensor, like: Tensor) -> Tensor:
    """A copy, in float32 beside half precision, that needs a gradient if `like` does."""
    copy = boxes.detach().clone()
    return (copy if like.dtype == torch.float64 else copy.float()).requires_grad_(like.requires_grad)


class QueryView(FakeView):
    """A `FakeView` with the stages ``queries``, ``decoded`` (the result of `decode`), ``query_targets`` and
    ``query_points``."""

    def decode(self, points: QueryPoints) -> list[QueryLayer]:
        self.reads.add("decode")
        assert len(points.cells) == len(self.batch)
        return self.stages["decoded"]

    def mapped(self, change: Any) -> QueryView:
        """Boxes keep their values: they are float32 at least, whatever the precision of the network."""
        view = super().mapped(change)
        for stage in ("queries", "decoded"):
            view.stages[stage] = [
                QueryLayer(
                    change(layer.logits),
                    moved(layer.boxes, change(layer.logits)),
                    change(layer.hidden),
                    None if layer.corners is None else change(layer.corners),
                )
                for layer in self.stages[stage]
            ]
        return view

    def part(self, rows: slice) -> QueryView:
        """The view of some of the images."""

        def cut(layers: list[QueryLayer]) -> list[QueryLayer]:
            return [QueryLayer(*(x if x is None else x[rows] for x in layer)) for layer in layers]

        images, stages = self.batch, dict(self.stages)
        images = replace(images, targets=images.targets[rows], ids=images.ids[rows], sizes=images.sizes[rows])
        stages["neck"] = {stride: x[rows] for stride, x in stages["neck"].items()}
        stages |= {name: cut(stages[name]) for name in ("queries", "decoded")}
        stages["query_targets"] = [matches[rows] for matches in stages["query_targets"]]
        stages["query_points"] = QueryPoints(*(x[rows] for x in stages["query_points"]))
        return QueryView(replace(images, images=self.batch.images[rows]), self.spec, **stages)

    def leaves(self) -> list[Tensor]:
        layers = [*self.stages["queries"], *self.stages["decoded"]]
        return [*super().leaves(), *(x for layer in layers for x in layer if x is not None)]


def random_query_view(
    batch: Batch, spec: DetectorSpec, seed: int, regions: int = 6, dtype: torch.dtype = torch.float64, layers: int = 2
) -> QueryView:
    """Every stage drawn at random, image by image, with `regions` queries, at least one. Query 2k is matched to object
    k."""
    height, width = batch.sizes[0]
    count = max(1, regions)
    generators = [torch.Generator().manual_seed(1000 * seed + image) for image in batch.ids]

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator, dtype=dtype) for generator in generators])

    def layer() -> QueryLayer:
        boxes = draw(count, 4).sigmoid() * 0.5 + 0.2
        corners = draw(count, 4, int(spec.corner_bins["count"])) if spec.corner_bins else None
        channels = next(iter(spec.neck.values()))
        return QueryLayer(draw(count, len(spec.classes)), boxes, draw(count, channels), corners)

    matched = []
    for target in batch.targets:
        number = min(len(target.labels), (count + 1) // 2)
        matched.append((2 * torch.arange(number), torch.arange(number)))
    return QueryView(
        batch,
        spec,
        neck={stride: draw(spec.neck[stride], -(-height // stride), -(-width // stride)) for stride in spec.neck},
        queries=[layer() for _ in range(layers)],
        decoded=[layer() for _ in range(layers)],
        query_targets=[matched] * layers,
        query_points=QueryPoints(torch.arange(count).expand(len(batch), -1), draw(count, 4).sigmoid().float()),
    )


class QueryGrid:
    """For a `LossGrid`: two Views with queries."""

    student = query_spec()
    teacher = query_spec()

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        return random_query_view(images, self.student, 1, **options), random_query_view(
            images, self.teacher, 2, **options
        )
