"""Any annotation file gives good records or one DistillError. DISTILL_FUZZ=20000 tries that many files per test."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data.checks import check_records
from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.images import ImageDataset
from distill.data.records import Annotation, coco_ground_truth, make_record
from distill.data.transforms import Transform, collate
from distill.data.voc import Voc
from distill.losses import masks
from distill.types import DistillError

fuzz = settings(
    max_examples=int(os.environ.get("DISTILL_FUZZ", "350")),
    deadline=None,
    database=None,
    derandomize="DISTILL_FUZZ" not in os.environ,  # the same files on every machine, others by hand
    suppress_health_check=list(HealthCheck),
)

ODD_NUMBERS = st.sampled_from(
    [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -0.0, 2**63, -(2**63) - 1, 10**400, 0, -1, 0.5]
)
NUMBERS = st.one_of(st.integers(-5, 45), st.floats(-50, 90), ODD_NUMBERS)
TEXTS = st.one_of(
    st.text(max_size=5), st.sampled_from(["a.png", "b.png", "cat", "\ud800", "\0", "../a.png", "[/x]", "é\u202e"])
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nine times in ten what it should be."""
    return st.integers(0, 9).flatmap(lambda draw: JUNK if draw == 0 else right)


def entries(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with these fields, each of which may be missing or wrong; with others; or no objects."""
    good = st.fixed_dictionaries({}, optional={name: mostly(each) for name, each in fields.items()})
    whole = st.fixed_dictionaries({name: mostly(each) for name, each in fields.items()})
    return st.one_of(whole, whole, whole, good, JUNK)


IDS = st.one_of(st.integers(0, 3), st.sampled_from([2**63 - 1, -(2**63), 1.0]))
POLYGONS = st.lists(st.lists(NUMBERS, max_size=8), max_size=2)
RUNS = st.fixed_dictionaries(
    {"counts": st.one_of(st.text("0123bO;`n", max_size=8), st.lists(NUMBERS, max_size=4)), "size": st.just([20, 40])}
)
ANNOTATION = entries(
    id=st.integers(0, 30),
    image_id=IDS,
    category_id=st.integers(0, 3),
    bbox=st.lists(NUMBERS, min_size=4, max_size=4),
    area=NUMBERS,
    iscrowd=st.sampled_from([0, 1]),
    segmentation=st.one_of(POLYGONS, RUNS),
)
COCO = st.fixed_dictionaries(
    {
        "images": mostly(
            st.lists(
                entries(id=IDS, file_name=st.sampled_from(["a.png", "b.png"]), width=st.just(40), height=st.just(20)),
                max_size=4,
            )
        ),
        "annotations": mostly(st.lists(ANNOTATION, max_size=8)),
        "categories": mostly(
            st.lists(entries(id=st.integers(0, 3), name=TEXTS), min_size=1, max_size=3, unique_by=repr)
        ),
    }
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for place in (folder, folder / "JPEGImages"):
        for number, name in enumerate(("a.png", "b.png")):
            Image.new("RGB", (40, 20), (number, 9, 9)).save(place / name)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    return folder


def ends_well(source: Any, **options: Any) -> None:
    """A batch, and ground truth that JSON can hold; or our own error, in few lines."""
    try:
        data = DetectionData(source, workers=0, batch_size=1, min_size=32, max_size=64, **options)
        batch = next(iter(data.eval_dataloader("train")))
        assert torch.isfinite(batch.targets[0].boxes).all()
        truth = json.dumps(data.ground_truth("train"), allow_nan=False)
        assert all(str(name).encode() for name in data.classes)
        assert truth
    except DistillError as error:
        said = str(error)
        assert said
        assert len(said.splitlines()) <= 14
        assert len(said) < 6000


@fuzz
@given(
    content=st.one_of(COCO, COCO, COCO, COCO, JUNK),
    on_error=st.sampled_from(["raise", "skip", "skip"]),
    shapes=st.booleans(),
)
def test_any_coco_file(home: Path, content: Any, on_error: str, shapes: bool) -> None:
    (home / "train.json").write_text(json.dumps(content))
    ends_well(Coco(str(home), {"annotations": "train.json"}), on_error=on_error, masks=shapes)


@fuzz
@given(
    content=st.one_of(
        st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
)
def test_any_bytes_as_json_and_as_xml(home: Path, content: bytes) -> None:
    (home / "train.json").write_bytes(content)
    (home / "Annotations" / "a.xml").write_bytes(content)
    ends_well(Coco(str(home), {"annotations": "train.json"}))
    ends_well(Voc(str(home), val=None, test=None))


WORDS = st.one_of(
    NUMBERS.map(str),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=5),
    st.sampled_from(["cat", "dog", "1", "nan", "1e999", "0x1", "٣", "1_0", "True"]),
)
GOOD = st.integers(-3, 45).map(str)


def tag(name: str, inside: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """An element, which is at times missing, empty, twice there or of another name."""
    forms = [f"<{name}>{{}}</{name}>"] * 6 + [
        "",
        f"<{name}/>",
        f"<{name}>{{}}</{name}>" * 2,
        f"<x{name}>{{}}</x{name}>",
    ]
    return st.tuples(st.sampled_from(forms), inside).map(lambda pair: pair[0].replace("{}", pair[1]))


def text(right: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(right, right, right, WORDS).map(escape)


def joined(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map("".join)


BOX = tag("bndbox", joined(*(tag(corner, text(GOOD)) for corner in ("xmin", "ymin", "xmax", "ymax"))))
THING = tag(
    "object",
    joined(tag("name", text(st.sampled_from(["cat", "dog"]))), tag("difficult", text(st.sampled_from("01"))), BOX),
)
PAGE = tag(
    "annotation",
    joined(
        tag("size", joined(tag("width", text(st.just("40"))), tag("height", text(st.just("20"))))),
        st.lists(THING, max_size=4).map("".join),
    ),
)


@fuzz
@given(pages=st.tuples(PAGE, PAGE), on_error=st.sampled_from(["raise", "skip", "skip"]), one_based=st.booleans())
def test_any_voc_page(home: Path, pages: tuple[str, str], on_error: str, one_based: bool) -> None:
    for name, page in zip("ab", pages, strict=True):
        (home / "Annotations" / f"{name}.xml").write_text(page, encoding="utf-8")
    ends_well(Voc(str(home), val=None, test=None, one_based=one_based), on_error=on_error, use_difficult=True)


SIDES = st.integers(1, 300)
EDGES = st.one_of(
    st.floats(-400, 700), st.integers(-5, 305).map(float), ODD_NUMBERS.filter(lambda n: abs(n) < 10**309).map(float)
)
BOXES = st.lists(st.tuples(EDGES, EDGES, EDGES, EDGES), max_size=6)


@fuzz
@example(boxes=[(1.0, -1.0, 236.0, 0.0)], height=1, width=234, min_size=1, flip=False, kind="ground_truth")
@given(
    boxes=BOXES,
    height=SIDES,
    width=SIDES,
    min_size=st.integers(1, 200),
    flip=st.booleans(),
    kind=st.sampled_from(["ground_truth", "gaussian", "weighted"]),
)
def test_any_boxes(boxes: list[Any], height: int, width: int, min_size: int, flip: bool, kind: str) -> None:
    """From annotations through checks, resize, flip and padding to masks on maps: inside the image, and finite."""
    notes = [Annotation(box, 1, 1.0, False, False, place, None) for place, box in enumerate(boxes)]
    one = make_record(1, "a.png", (height, width), notes, "x.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "x.json: .* would fit as corners", UserWarning)
        try:
            (one,), _ = check_records([one], "train", "skip", files=False)
        except DistillError:
            return
        json.dumps(coco_ground_truth([one], ["a"]), allow_nan=False)
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
        assert (one.boxes >= 0).all()
        assert (one.boxes <= np.array([width, height, width, height])).all()
        transform = Transform((min_size,), 2 * min_size, flip=float(flip))
        images = ImageDataset(
            [one], lambda file: torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1), transform
        )
        batch = collate([images[0, 0]])
    (high, wide), target = batch.sizes[0], batch.targets[0].boxes
    assert torch.isfinite(target).all()
    assert (target[:, 2:] > target[:, :2]).all()
    assert (target >= -1e-3).all()
    assert (target <= torch.tensor([wide, high, wide, high]) + 1e-3).all()
    rows, columns = batch.images.shape[-2:]
    sizes = {stride: (math.ceil(rows / stride), math.ceil(columns / stride)) for stride in (4, 8, 16, 32, 64)}
    if kind == "weighted":
        found = masks.weighted([target], [torch.ones(len(target))], sizes)
    else:
        found = getattr(masks, kind)([target], sizes)
    assert {stride: tuple(each.shape[1:]) for stride, each in found.items()} == sizes
    assert all(((each >= 0) & (each <= 1)).all() for each in found.values())
    assert (sum(float(each.sum()) for each in found.values()) > 0) == (len(target) > 0)
