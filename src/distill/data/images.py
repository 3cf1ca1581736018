"""The images of one split, made ready one by one; what they need is kept so that worker processes share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.data.records import Record
from distill.data.sampler import SampleKey
from distill.data.transforms import Sample, Transform, resized_size
from distill.types import Size, Target


class ImageDataset(Dataset[Sample]):
    """The images of one split, one sample a key (epoch, index).

    Annotations are packed into a few tensors: thousands of small Python objects would be copied into every worker as
    soon as it touches them.

    Args:
        records: checked records, with their true sizes.
        load: file -> (3, H, W) uint8.
        transform: what makes the samples.
        use_difficult: whether objects marked difficult are training targets. Crowds never are.
        masks: whether targets have masks; the records have been checked for them.
    """

    def __init__(
        self,
        records: Sequence[Record],
        load: Callable[[str], Tensor],
        transform: Transform,
        use_difficult: bool = False,
        masks: bool = False,
    ) -> None:
        self.load, self.transform = load, transform
        self.files = [record.file for record in records]
        self.ids = torch.tensor([record.id for record in records], dtype=torch.int64)
        self.sizes = torch.tensor([record.size for record in records], dtype=torch.int64).reshape(-1, 2)
        chosen = [training_rows(record, use_difficult) for record in records]
        self.ends = np.cumsum([int(keep.sum()) for keep in chosen])
        boxes = [record.boxes[keep] for record, keep in zip(records, chosen, strict=True)]
        labels = [record.labels[keep] for record, keep in zip(records, chosen, strict=True)]
        self.boxes = torch.from_numpy(np.concatenate([np.empty((0, 4)), *boxes])).float()
        self.labels = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *labels]))
        self.codes = MaskCodes(_training_codes(records, chosen)) if masks else None
        self.cache: ImageCache | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Load, resize and augment image ``index`` as it looks in ``epoch``."""
        epoch, index = key
        image = self.load(self.files[index]) if self.cache is None else self.cache[index]
        codes = None if self.codes is None else self.codes[self._part(index)]
        return self.transform(image, self.target(index), self.size(index), int(self.ids[index]), epoch, codes)

    def size(self, index: int) -> Size:
        """(height, width) of an image before any resize."""
        height, width = self.sizes[index].tolist()
        return height, width

    def target(self, index: int) -> Target:
        """Training target of an image in pixels of the original, without its masks."""
        part = self._part(index)
        return Target(self.boxes[part], self.labels[part])

    def _part(self, index: int) -> slice:
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def keep_in_memory(self, threads: int) -> int:
        """Decode and resize all images now; returns the bytes that they take."""
        transform, indices = self.transform, range(len(self))
        cache = ImageCache(
            [resized_size(self.size(index), transform.min_sizes[-1], transform.max_size) for index in indices]
        )

        def fill(index: int) -> None:
            cache[index].copy_(transform.resize(self.load(self.files[index])))

        with ThreadPoolExecutor(max(1, threads)) as pool:
            list(pool.map(fill, indices))
        self.cache = cache
        return cache.pixels.numel()


class ImageCache:
    """Images of different sizes in one block of memory, which forked workers share and spawned ones map."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = sizes
        self.ends = np.cumsum([3 * height * width for height, width in sizes])
        self.pixels = torch.zeros(int(self.ends[-1]) if sizes else 0, dtype=torch.uint8)

    def __getitem__(self, index: int) -> Tensor:
        """Image (3, H, W), a view into the block, channels last as decoders give them and batches hold them."""
        height, width = self.sizes[index]
        end = int(self.ends[index])
        return self.pixels[end - 3 * height * width : end].view(height, width, 3).permute(2, 0, 1)


class MaskCodes:
    """Run-length codes of masks in one block of memory, which workers share as they do the boxes."""

    def __init__(self, codes: Sequence[bytes]) -> None:
        self.ends = np.cumsum([0, *map(len, codes)])
        self.bytes = torch.from_numpy(np.frombuffer(b"".join(codes), np.uint8).copy())

    def __getitem__(self, part: slice) -> list[bytes]:
        """The codes from ``part.start`` to ``part.stop``."""
        ends = self.ends[part.start : part.stop + 1].tolist()
        return [self.bytes[start:end].numpy().tobytes() for start, end in pairwise(ends)]


def _training_codes(records: Sequence[Record], chosen: Sequence[np.ndarray[Any, np.dtype[np.bool_]]]) -> list[bytes]:
    return [
        shape["counts"].encode()
        for record, keep in zip(records, chosen, strict=True)
        for shape, kept in zip(record.segmentation or [None] * len(keep), keep, strict=True)
        if kept
    ]


def training_rows(record: Record, use_difficult: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which annotations (N,) of an image are training targets."""
    keep: np.ndarray[Any, np.dtype[np.bool_]] = ~record.crowd
    return keep if use_difficult else keep & ~record.difficult
