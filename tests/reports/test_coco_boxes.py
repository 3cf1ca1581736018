"""Boxes and polygons of COCO files in other units and forms."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from distill.data import rle
from distill.types import DistillError
from helpers.coco_files import SIZE, coco_content, coco_data, write_coco


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_boxes_as_fractions_of_the_image(tmp_path: Path, on_error: str) -> None:
    content = coco_content()
    height, width = SIZE
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / width, y / height, w / width, h / height]
    write_coco(tmp_path, train=content)
    with pytest.raises(DistillError, match=r"train\.json: 6 of 6 boxes of train .* probably fractions of the image"):
        coco_data(tmp_path, "train", on_error=on_error).records("train")


def test_one_small_box_among_others_is_no_fraction(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["bbox"] = [0.25, 0.5, 0.5, 0.25]
    write_coco(tmp_path, train=content)
    assert coco_data(tmp_path, "train").records("train").boxes[0].tolist() == [0.25, 0.5, 0.75, 0.75]


def test_boxes_as_two_corners(tmp_path: Path) -> None:
    content = coco_content()
    for number, annotation in enumerate(content["annotations"]):
        annotation["bbox"] = [20 + number, 10 + number, 50 + number, 30 + number]
    write_coco(tmp_path, train=content)
    with pytest.warns(UserWarning, match=r"6 of 6 boxes of train end outside .* \[x1, y1, x2, y2\]"):
        coco_data(tmp_path, "train").records("train")


def test_boxes_that_cross_the_edge_are_no_corners(tmp_path: Path) -> None:
    content = coco_content()
    for number, annotation in enumerate(content["annotations"]):
        annotation["bbox"] = [45 + number, 10, 20, 15]  # as corners the box would end before it begins
    write_coco(tmp_path, train=content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coco_data(tmp_path, "train").records("train")


@pytest.mark.parametrize("part", [[3, 3, 9, 9], [3, 3], []])
def test_a_polygon_of_two_points_among_good_parts(tmp_path: Path, part: list[int]) -> None:
    content = coco_content()
    square = [2, 2, 12, 2, 12, 10, 2, 10]
    for annotation in content["annotations"]:
        annotation["segmentation"] = [square]
    content["annotations"][0]["segmentation"] = [part, square, part]
    write_coco(tmp_path, train=content)
    data = coco_data(tmp_path, "train", masks=True)
    assert "2 polygons of less than three corners dropped" in data.summary[0] if data.records("train") else False
    masks = data.load_batch("train", [0]).targets[0].masks
    assert masks is not None
    assert torch.equal(rle.decode_mask(rle.encode_segmentation([part, square], SIZE), SIZE), masks[0].to(torch.uint8))
    assert int(masks[0].sum()) == 80


def test_an_object_of_degenerate_polygons_alone(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[2, 2, 12, 2, 12, 10]]
    content["annotations"][3]["segmentation"] = [[3, 3, 9, 9], []]
    write_coco(tmp_path, train=content)
    with pytest.raises(DistillError, match=r"annotation 3 of train1\.png.*three or more corners"):
        coco_data(tmp_path, "train", masks=True).records("train")
