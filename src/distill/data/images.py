"""The torch data set of one split. Its annotations and cached images lie in memory that worker processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distill.data.augment import LoadedImage
from distill.data.records import Record, Records, pack_records
from distill.data.sampler import SampleKey
from distill.data.transforms import Sample, Transform
from distill.types import Size, Target


class ImageDataset(Dataset[Sample]):
    """The images of one split. A key (epoch, index) gives a sample.

    Annotations are packed into a few tensors. Thousands of small Python objects would be copied into every worker as
    soon as the worker reads them, because reading changes their reference counts.

    Args:
        records: checked records, with their true sizes.
        load: reads an image file into (3, H, W) uint8.
        transform: makes the samples.
        use_difficult: whether objects marked difficult are training targets. Crowds never are.
        masks: whether targets have masks. The records must have been checked for masks.
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
        columns = pack_records(records)
        self.files = columns.files
        self.ids, self.sizes = torch.from_numpy(columns.ids), torch.from_numpy(columns.sizes)
        rows = training_rows(columns, use_difficult)
        self.ends = np.cumsum(np.bincount(columns.row_images()[rows], minlength=len(columns)))
        self.boxes = torch.from_numpy(columns.boxes[rows]).float()
        self.labels = torch.from_numpy(columns.labels[rows])
        self.codes = MaskCodes(_training_codes(columns, rows)) if masks else None
        self.cache: ImageCache | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Load, resize and augment an image. The key is (epoch, index)."""
        (epoch, index), image_id = key, int(self.ids[key[1]])
        image, target, size, codes = self._load_image(index)
        partners = [self._load_image(other) for other in self.transform.draw_partners(image_id, epoch, len(self))]
        return self.transform(image, target, size, image_id, epoch, codes, partners)

    def _load_image(self, index: int) -> LoadedImage:
        image = self.load(self.files.text(index)) if self.cache is None else self.cache[index]
        codes = None if self.codes is None else self.codes[self._rows(index)]
        return LoadedImage(image, self.target(index), self.size(index), codes)

    def size(self, index: int) -> Size:
        """Return (height, width) of an original image."""
        height, width = self.sizes[index].tolist()
        return height, width

    def target(self, index: int) -> Target:
        """Return the training target of an image, in pixels of the original image and without masks."""
        rows = self._rows(index)
        return Target(self.boxes[rows], self.labels[rows])

    def _rows(self, index: int) -> slice:
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def cache_in_memory(self, threads: int) -> int:
        """Decode and resize all images now, and keep them. Return the number of bytes of the cache."""
        transform, indices = self.transform, range(len(self))
        cache = ImageCache([transform.fit(self.size(index)) for index in indices])

        def fill(index: int) -> None:
            cache[index].copy_(transform.resize(self.load(self.files.text(index))))

        with ThreadPoolExecutor(max(1, threads)) as pool:
            list(pool.map(fill, indices))
        self.cache = cache
        return cache.pixels.numel()


class ImageCache:
    """Images of different sizes in one block of memory. Forked workers share the block, spawned workers map it."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = sizes
        self.ends = np.cumsum([3 * height * width for height, width in sizes])
        self.pixels = torch.zeros(int(self.ends[-1]) if sizes else 0, dtype=torch.uint8)

    def __getitem__(self, index: int) -> Tensor:
        """Return image (3, H, W), a view into the block in channels-last layout, like decoded images and batches."""
        height, width = self.sizes[index]
        end = int(self.ends[index])
        return self.pixels[end - 3 * height * width : end].view(height, width, 3).permute(2, 0, 1)


class MaskCodes:
    """Run-length codes of masks in one block of memory, which workers share."""

    def __init__(self, codes: Sequence[bytes]) -> None:
        self.ends = np.cumsum([0, *map(len, codes)])
        self.bytes = torch.from_numpy(np.frombuffer(b"".join(codes), np.uint8).copy())

    def __getitem__(self, rows: slice) -> list[bytes]:
        """Return the codes from ``rows.start`` to ``rows.stop``."""
        ends = self.ends[rows.start : rows.stop + 1].tolist()
        return [self.bytes[start:end].numpy().tobytes() for start, end in pairwise(ends)]


def _training_codes(records: Records, rows: NDArray[np.bool_]) -> list[bytes]:
    return [records.segmentation(row)["counts"].encode() for row in np.flatnonzero(rows).tolist()]


def training_rows(records: Record | Records, use_difficult: bool) -> NDArray[np.bool_]:
    """Return a mask (N,) of the annotations that are training targets."""
    rows: NDArray[np.bool_] = ~records.crowd
    return rows if use_difficult else rows & ~records.difficult
