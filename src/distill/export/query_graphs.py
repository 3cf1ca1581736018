"""Set-prediction detectors (RT-DETR, D-FINE, DEIMv2, RF-DETR) as traceable modules, without GridSample.

Their decoders sample maps at learned points with `grid_sample`, which TensorRT (10.13 to 11.1) translates into wrong
results without an error. An exported graph computes the same bilinear interpolation from rows that it gathers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from distill.detectors.base import Detector
from distill.detectors.view import temporarily
from distill.imaging.resizing import resized_size
from distill.types import Batch, DistillError, Size, Target

NO_TARGET = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def sample_by_gathers(
    input: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = False
) -> Tensor:
    """Interpolate maps at points: `torch.nn.functional.grid_sample` with its values for bilinear and zeros.

    Args:
        input: maps (N, C, H, W).
        grid: points (N, Q, P, 2): x and y from -1 to 1, the outer edges of the map.
        mode: ``bilinear``.
        padding_mode: ``zeros``: the value outside of the map.
        align_corners: False.

    Returns:
        (N, C, Q, P).
    """
    assert (mode, padding_mode, align_corners) == ("bilinear", "zeros", False), "the library samples in another way"
    height, width = int(input.shape[2]), int(input.shape[3])
    rows = input.flatten(2).transpose(1, 2).flatten(0, 1)  # (N * H * W, C)
    first = torch.arange(input.shape[0]).view(-1, 1, 1) * (height * width)
    x, y = (((grid[..., 0] + 1) * width - 1) / 2, ((grid[..., 1] + 1) * height - 1) / 2)
    left, top = x.floor(), y.floor()
    total = rows.new_zeros(())
    for down in (0, 1):
        for right in (0, 1):
            column, row = left + right, top + down
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
            cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            values = rows[(cell.to(torch.int64) + first).flatten()].view(*grid.shape[:3], -1)
            total = total + values * (weight * inside)[..., None]
    return total.permute(0, 3, 1, 2)


@contextmanager
def without_grid_sample() -> Iterator[None]:
    """Inside the context, the library samples by `sample_by_gathers`."""
    with temporarily(F, grid_sample=sample_by_gathers):
        yield


class FixedPositions:
    """The position embeddings of a vision transformer for images of one size, as constants of a graph.

    The library resizes its trained embeddings in every forward pass, with an interpolation that ONNX does not have.

    Args:
        detector: in evaluation mode. Without a vision transformer nothing is replaced.
        size: (height, width) of the images.
    """

    def __init__(self, detector: Detector, size: Size) -> None:
        embeddings: Any = getattr(detector.body, "embeddings", None)
        self.embeddings = embeddings if hasattr(embeddings, "interpolate_pos_encoding") else None
        if self.embeddings is None:
            return
        (height, width), trained = size, embeddings.position_embeddings
        cells = height // embeddings.patch_size * (width // embeddings.patch_size)
        with torch.no_grad():
            blank = trained.new_zeros(1, 1 + cells, trained.shape[2])
            self.codes = embeddings.interpolate_pos_encoding(blank, height, width).clone()

    def applied(self) -> AbstractContextManager[None]:
        """Inside the context, the detector uses the constants."""
        if self.embeddings is None:
            return nullcontext()
        return temporarily(self.embeddings, interpolate_pos_encoding=lambda *_: self.codes)


class TracedQueryView:
    """Mixin for the View of a set-prediction detector, before the family's View in the list of base classes.

    All sizes are numbers in the graph, because such a detector reads images of one size.
    """

    @functools.cached_property
    def cells(self) -> Any:
        """The cells of the neck, with sizes that are numbers."""
        cells = super().cells  # type: ignore[misc]
        return cells._replace(sizes=tuple((int(height), int(width)) for height, width in cells.sizes))

    @functools.cached_property
    def decoded(self) -> Any:
        """The decoder's outputs."""
        with without_grid_sample():
            return super().decoded  # type: ignore[misc]


def image_size(detector: Detector) -> Size:
    """The (height, width) of the images that an exported set-prediction detector reads.

    Raises:
        DistillError: its images are not resized to squares.
    """
    if detector.resize.shape != "square":
        raise DistillError(
            f"export: a {detector.spec.family} is exported for images of one size, but this one was trained with "
            f"data.resize={detector.resize.shape}. Train it with data.resize=square"
        )
    return resized_size((1, 1), detector.options["min_size"], detector.options["max_size"], "square")


class DenseQueryGraph(nn.Module):
    """A set-prediction detector from resized images to its queries, in batches.

    Inputs: images (B, 3, H, W) uint8 RGB, which are resized to the detector's square, and sizes (B, 2) int32, the
    height and width to which boxes are scaled: those of the square, or of the original images.

    Outputs without `top`: ``logits`` (B, Q, K) and ``query_boxes`` (B, Q, 4), xyxy in pixels of `sizes`, of all queries
    of the last decoder layer. Outputs with `top`: the `top` best pairs of a query and a class, which are the final
    detections, because there is no NMS: boxes (B, top, 4), scores (B, top), and labels (B, top) from 1.

    Args:
        detector: in evaluation mode, on the CPU.
        canvas: (height, width) of the images.
        top: number of detections; None: all queries.
        view_class: the detector's traced View.

    Raises:
        DistillError: the canvas is not the detector's square.
    """

    def __init__(self, detector: Detector, canvas: Size, top: int | None, view_class: Any) -> None:
        super().__init__()
        size = image_size(detector)
        if tuple(canvas) != size:
            raise DistillError(
                f"--canvas {canvas[0]}x{canvas[1]}: a {detector.spec.family} reads images that fill the canvas, "
                f"without padding; expected {size[0]}x{size[1]}"
            )
        self.detector, self.canvas, self.top, self.view_class = detector, size, top, view_class
        self.positions = FixedPositions(detector, size)
        self.one_image = self.positions.embeddings is not None
        """The library divides a batch into windows with numbers that a graph holds as constants."""

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["logits", "query_boxes"] if self.top is None else ["boxes", "scores", "labels"]

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of a batch of images."""
        batch = Batch(images, (self.canvas,), (self.canvas,), (NO_TARGET,), (0,))
        with self.positions.applied():
            last = self.view_class(self.detector, batch, False, True, None).queries[-1]
        frame = sizes.flip(1).repeat(1, 2)[:, None].to(last.boxes.dtype)
        boxes = box_convert(last.boxes, "cxcywh", "xyxy") * frame
        if self.top is None:
            return last.logits, boxes
        queries, classes = int(last.logits.shape[1]), int(last.logits.shape[2])
        scores, places = last.logits.sigmoid().flatten(1).topk(min(self.top, queries * classes))
        query = torch.div(places, classes, rounding_mode="floor")
        return boxes.gather(1, query[..., None].expand(-1, -1, 4)), scores, places - query * classes + 1
