"""Sizes of resized images and batches that are chosen from the images and their objects."""

from __future__ import annotations

import numpy as np
import pytest

from distill.data.auto_size import choose_batch, choose_size, choose_square
from distill.data.records import Record, Records, pack_records


def records(sizes: list[tuple[int, int]], side: float) -> Records:
    """Images of these heights and widths, each with four square objects of this side."""
    return pack_records(
        [
            Record(
                id=index,
                file=f"{index}.jpg",
                size=size,
                boxes=np.tile([0.0, 0.0, side, side], (4, 1)),
                labels=np.ones(4, np.int64),
                crowd=np.zeros(4, np.bool_),
                difficult=np.zeros(4, np.bool_),
                area=np.full(4, side * side),
            )
            for index, size in enumerate(sizes)
        ]
    )


@pytest.mark.parametrize(
    ("sizes", "side", "expected"),
    [
        ([(240, 320)] * 5, 40, (240, 320)),  # not 800x1067, as for every size before
        ([(320, 240)] * 5, 40, (240, 320)),  # upright
        ([(480, 640)] * 5, 40, (480, 640)),
        ([(3000, 4000)] * 5, 400, (800, 1333)),
        ([(1080, 1920)] * 5, 100, (800, 1333)),
        ([(640, 640)] * 5, 40, (640, 853)),  # room for 4:3, as another image may be
        ([(240, 320)] * 4 + [(3000, 4000)], 60, (240, 320)),  # one large image among small ones
        ([(100, 900)] * 5, 40, (100, 200)),  # a panorama would be 9 times as long as high
        ([(240, 320)] * 5, 8, (480, 640)),  # objects of 8 px become 16 px
        ([(240, 320)] * 5, 12, (320, 427)),
        ([(240, 320)] * 5, 2, (480, 640)),  # not more than twice as large
        ([(500, 500)] * 5, 4, (800, 1333)),
        ([(3000, 4000)] * 5, 10, (800, 1333)),
    ],
)
def test_the_size_of_the_images_within_limits(
    sizes: list[tuple[int, int]], side: float, expected: tuple[int, int]
) -> None:
    assert choose_size(records(sizes, side))[:2] == expected


def test_objects_are_measured_after_the_resize_of_their_own_image() -> None:
    """Objects of 40 px in images that are shrunk to a fifth count as 8 px."""
    mixed = [(200, 200)] * 3 + [(1000, 1000)] * 2
    assert choose_size(records(mixed, 40)).min_size == 400


@pytest.mark.parametrize(
    ("sizes", "side", "expected"),
    [
        ([(427, 640)] * 5, 40, 512),  # 523 px: not 427x640
        ([(480, 640)] * 5, 40, 544),
        ([(640, 480), (480, 640)], 40, 544),
        ([(3000, 4000)] * 5, 400, 640),
        ([(100, 100)] * 5, 40, 288),  # cells for 300 queries
        ([(320, 320)] * 5, 16, 320),
        ([(320, 320)] * 5, 12, 416),  # 427 px
        ([(320, 320)] * 5, 2, 640),
        ([(480, 640)] * 5, 8, 640),
        ([(300, 300)] * 4 + [(3000, 4000)], 60, 288),  # one large image among small ones
    ],
)
def test_squares_have_the_pixels_of_the_images(sizes: list[tuple[int, int]], side: float, expected: int) -> None:
    choice = choose_square(records(sizes, side))
    assert choice[:2] == (expected, expected)
    assert ("enlarged" in choice.reason) == (side < 16)


def test_objects_are_measured_in_the_squares() -> None:
    """Objects of 24 px in images that are shrunk to a third count as 8 px."""
    mixed = [(300, 300)] * 3 + [(900, 900)] * 2
    assert choose_square(records(mixed, 24)).min_size == 608  # 600 px, twice as large


def test_images_without_objects() -> None:
    empty = records([(240, 320)], 40)
    empty = pack_records([Record(**{**vars(empty[0]), "boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64),
                                    "crowd": np.zeros(0, np.bool_), "difficult": np.zeros(0, np.bool_),
                                    "area": np.zeros(0), "annotation_indices": None, "segmentation": None,
                                    "annotated_boxes": None})])  # fmt: skip
    assert choose_size(empty)[:2] == (240, 320)
    assert choose_square(empty)[:2] == (288, 288)  # 277 px


@pytest.mark.parametrize(
    ("size", "batch"), [((128, 128), 8), ((240, 320), 8), ((480, 640), 4), ((600, 1000), 2), ((800, 1333), 2)]
)
def test_the_batch_by_the_pixels(size: tuple[int, int], batch: int) -> None:
    assert choose_batch(*size) == batch
