"""Single steps against numbers that the other projects' own code computed: box decoding, levels, anchors, containers.

The numbers are not part of this repository: DISTILL_TEST_FORMATS names their folder.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder

from distill.convert import detectron2, mmdetection
from distill.convert.caffe2_names import changed_rows, renamed
from distill.convert.foreign import coco_names
from distill.detectors.anchors import TwoSidedBoxCoder, anchor_generator
from distill.detectors.roi_align import LEVEL_RULES
from distill.files import load_tensors

FOLDER = os.environ.get("DISTILL_TEST_FORMATS")
pytestmark = pytest.mark.skipif(not FOLDER, reason="DISTILL_TEST_FORMATS is not set: it names the folder of numbers")
PROJECTS = {"detectron2": detectron2.RULES, "mmdetection": mmdetection.RULES}


def units(project: str) -> Any:
    return json.loads(Path(str(FOLDER), f"{project}_units.json").read_text())


@pytest.mark.parametrize(
    ("project", "key", "coder"),
    [
        ("detectron2", "decode_weights_1", BoxCoder((1.0, 1.0, 1.0, 1.0))),
        ("detectron2", "decode_weights_10_10_5_5", BoxCoder((10.0, 10.0, 5.0, 5.0))),
        ("mmdetection", "decode_stds_1", TwoSidedBoxCoder((1.0, 1.0, 1.0, 1.0))),
        ("mmdetection", "decode_stds_01_01_02_02", TwoSidedBoxCoder((10.0, 10.0, 5.0, 5.0))),
    ],
)
def test_boxes_are_decoded_as_there(project: str, key: str, coder: Any) -> None:
    case = units(project)[key]
    decoded = coder.decode_single(torch.tensor(case["deltas"]), torch.tensor(case["boxes"]))
    expected = torch.tensor(case.get("decoded", case.get("decoded_unclipped")))
    assert torch.allclose(decoded, expected, rtol=1e-5, atol=0.01)


def test_distances_are_decoded_as_there() -> None:
    case = units("detectron2")["fcos_decode"]
    coder = BoxLinearCoder(normalize_by_size=True)
    decoded = coder.decode(torch.tensor(case["ltrb"]).relu(), torch.tensor(case["anchor_boxes"]))
    assert decoded.tolist() == case["decoded"]


@pytest.mark.parametrize("project", PROJECTS)
def test_regions_have_their_level(project: str) -> None:
    case = units(project)["roi_level"]
    boxes = torch.tensor([[0.0, 0.0, w, h] for w, h in case["boxes_wh_at_origin"]])
    levels = LEVEL_RULES[project](2, 5)([boxes])
    assert [f"p{level + 2}" for level in levels.tolist()] == case["level"]


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("key", ["anchors_rpn", "anchors_retinanet"])
def test_anchors_are_those_of_the_project(project: str, key: str) -> None:
    case = units(project)[key]
    rules = PROJECTS[project]["two_stage" if key == "anchors_rpn" else "retinanet"]
    options = {name.removeprefix("anchors__"): value for name, value in rules.items() if name.startswith("anchors__")}
    strides = (4, 8, 16, 32, 64) if key == "anchors_rpn" else (8, 16, 32, 64, 128)
    generator = anchor_generator(strides=strides, **options)
    for level, expected in enumerate(case["cell_anchors"]):
        assert torch.allclose(generator.cell_anchors[level], torch.tensor(expected), atol=1e-4)
    grids = generator.grid_anchors([(2, 2)] * 5, [[torch.tensor(1)] * 2] * 5)
    per_cell = len(case["cell_anchors"][0])
    for level, boxes in enumerate(grids):
        second, below = case["second_cell_first_row_first_anchor"], case["first_cell_second_row_first_anchor"]
        assert torch.allclose(boxes[per_cell], torch.tensor(second[level]), atol=1e-4)
        assert torch.allclose(boxes[2 * per_cell], torch.tensor(below[level]), atol=1e-4)


def test_points_of_fcos_are_those_of_the_projects() -> None:
    strides = (8, 16, 32, 64, 128)
    generator = anchor_generator([(stride,) for stride in strides], (1.0,), strides, offset=0.5, step="nominal")
    grids = generator.grid_anchors([(2, 2)] * 5, [[torch.tensor(1)] * 2] * 5)
    points = units("mmdetection")["points_fcos"]["grid_2x2"]
    anchors = units("detectron2")["anchors_fcos"]
    for level, boxes in enumerate(grids):
        assert ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist() == points[level]
        assert boxes[1].tolist() == anchors["second_cell_first_row_first_anchor"][level]
        assert boxes[2].tolist() == anchors["first_cell_second_row_first_anchor"][level]


def test_names_of_caffe2_and_of_coco() -> None:
    case = units("detectron2")
    names = case["caffe2_names"]
    assert {name: renamed(name) for name in names["renamed"]} == names["renamed"]
    for name, rows in names["row_values_before"].items():
        assert (
            changed_rows(renamed(name).removeprefix("_"), torch.tensor(rows)).tolist()
            == names["row_values_after"][name]
        )
    assert list(coco_names()) == case["coco_classes"]["names"] == units("mmdetection")["coco_classes"]["names"]


@pytest.mark.parametrize("project", PROJECTS)
def test_containers_are_read(project: str, tmp_path: Path) -> None:
    for name, case in units(project)["containers"].items():
        path = tmp_path / name
        path.write_bytes(base64.b64decode(case["base64"]))
        content = load_tensors(path, foreign=True)
        for key in ("model", "state_dict"):
            if key in case:
                assert {entry: value.tolist() for entry, value in content[key].items()} == case[key], name
        if "top_keys" in case:
            assert list(content) == case["top_keys"]
