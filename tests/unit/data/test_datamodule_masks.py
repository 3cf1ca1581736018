"""Masks go wherever their boxes go: through flips, resizes, caches, workers and the dropping of boxes."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from distill.data import rle
from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.data.transforms import Transform
from distill.data.voc import Voc
from distill.imaging.resizing import resized_size
from distill.types import Batch, DistillError, Target

SIZE = (24, 40)
SQUARE = [4, 6, 14, 6, 14, 16, 4, 16]
"""A polygon on pixel edges: the box 4, 6, 14, 16 filled."""


def runs(x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    mask = torch.zeros(1, *SIZE, dtype=torch.uint8)
    mask[0, y1:y2, x1:x2] = 1
    return rle.to_coco(rle.encode_masks(mask)[0], SIZE)


def uncompressed(x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    lead, run, gap, height = x1 * SIZE[0] + y1, y2 - y1, SIZE[0] - (y2 - y1), SIZE[0]
    counts = [lead] + [run, gap] * (x2 - x1)
    return {"size": list(SIZE), "counts": [*counts[:-1], height * SIZE[1] - sum(counts[:-1])]}


def note(segmentation: Any, box: tuple[int, int, int, int] = (4, 6, 10, 10), **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": list(box), "segmentation": segmentation, **more}


def write(folder: Path, notes: list[dict[str, Any]], images: int = 1) -> Coco:
    rng = np.random.default_rng(0)
    for number in range(1, images + 1):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    listed = [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 40} for n in range(1, images + 1)]
    content = {"images": listed, "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return Coco(str(folder), {"annotations": "train.json"})


def data(source: Any, **options: Any) -> DetectionData:
    options = {"masks": True, "workers": 0, "min_size": 24, "max_size": 40, "flip": 0.0, "drop_last": False} | options
    return DetectionData(source, **options)


def first(loaded: DetectionData) -> Target:
    return next(iter(loaded.train_dataloader())).targets[0]


def tight(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_polygons_and_both_run_length_codes_give_the_same_mask(tmp_path: Path) -> None:
    forms = [[SQUARE], runs(4, 6, 14, 16), uncompressed(4, 6, 14, 16)]
    target = first(data(write(tmp_path, [note(form) for form in forms])))
    assert target.masks is not None
    assert target.masks.dtype == torch.uint8
    assert target.masks.shape == (3, *SIZE)
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    expected[6:16, 4:14] = 1
    assert all(torch.equal(mask, expected) for mask in target.masks)


def test_without_being_asked_for_there_are_none_and_nothing_is_checked(tmp_path: Path) -> None:
    target = first(data(write(tmp_path, [note("nonsense")]), masks=False))
    assert target.masks is None
    assert target.to("cpu").masks is None
    assert DetectionData(Shapes(train=2, val=1, test=0)).load_batch("val", [0]).targets[0].masks is None


def test_crowds_are_kept_for_the_truth_only_and_dropped_boxes_take_their_masks_along(tmp_path: Path) -> None:
    notes = [
        note(uncompressed(0, 0, 40, 24), (0, 0, 40, 24), iscrowd=1),
        note(runs(1, 1, 3, 3), (50, 50, 5, 5)),  # outside the image
        note([SQUARE]),
        note(runs(30, 2, 40, 20), (30, 2, 30, 18)),  # over the edge: clipped
        note(runs(1, 1, 3, 3), (1, 1, 0, 2)),  # of no area
    ]
    loaded = data(write(tmp_path, notes))
    target = first(loaded)
    assert target.masks is not None
    assert target.boxes.tolist() == [[4, 6, 14, 16], [30, 2, 40, 20]]
    assert [tight(mask) for mask in target.masks] == [[4, 6, 14, 16], [30, 2, 40, 20]]
    truth = loaded.ground_truth("train")["annotations"]
    assert [each["iscrowd"] for each in truth] == [1, 0, 0]
    assert [rle.mask_area(each["segmentation"]["counts"].encode(), SIZE) for each in truth] == [960, 100, 180]


def test_a_box_too_thin_to_train_on_takes_its_mask_along() -> None:
    codes = rle.encode_masks(torch.ones(2, *SIZE))
    boxes = torch.tensor([[3.0, 3.0, 3.001, 9.0], [4, 6, 14, 16]])
    sample = Transform((24,), 40)(
        torch.zeros(3, *SIZE, dtype=torch.uint8), Target(boxes, torch.tensor([1, 2])), SIZE, 1, 0, codes
    )
    assert sample.target.labels.tolist() == [2]
    assert sample.target.masks is not None
    assert sample.target.masks.shape == (1, *SIZE)


def slow_resize(mask: torch.Tensor, new: tuple[int, int], mirrored: bool) -> torch.Tensor:
    (height, width), (h, w) = mask.shape, new
    out = torch.zeros(new, dtype=torch.uint8)
    for y in range(h):
        for x in range(w):
            out[y, w - 1 - x if mirrored else x] = mask[y * height // h, x * width // w]
    return out


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("side", [12, 36, 48, 30])
def test_flip_and_resize_agree_with_a_loop_over_pixels(mirrored: bool, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(4, *SIZE, generator=generator) < 0.5).to(torch.uint8)
    transform = Transform((side,), 400, flip=float(mirrored))
    target = Target(torch.tensor([[1.0, 1.0, 9.0, 9.0]] * 4), torch.arange(1, 5))
    sample = transform(torch.zeros(3, *SIZE, dtype=torch.uint8), target, SIZE, 1, 0, rle.encode_masks(masks))
    new = resized_size(SIZE, side, 400)
    assert sample.target.masks is not None
    for mask, found in zip(masks, sample.target.masks, strict=True):
        assert torch.equal(found, slow_resize(mask, new, mirrored))


def test_sizes_and_pixels_are_torchvisions_for_many_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = tuple(rng.integers(20, 200, 2).tolist())
        low, high = int(rng.integers(20, 200)), int(rng.integers(200, 300))
        masks = torch.from_numpy(rng.integers(0, 2, (2, *size), dtype=np.uint8))
        target = {"boxes": torch.tensor([[0.0, 0, 9, 9]] * 2), "masks": masks}
        theirs = GeneralizedRCNNTransform(low, high, [0], [1]).resize(torch.rand(3, *size), target)[1]
        ours = rle.resize_masks(rle.encode_masks(masks), size, resized_size(size, low, high))
        assert torch.equal(ours, theirs["masks"])


def test_drawn_masks_are_what_their_boxes_are_tight_around() -> None:
    loaded = DetectionData(Shapes(train=20, val=4, test=0), masks=True, min_size=128, max_size=128, workers=0)
    batch = loaded.load_batch("train", range(20))
    assert sum(len(target.boxes) for target in batch.targets) > 60
    for target in batch.targets:
        assert target.masks is not None
        assert [tight(mask) for mask in target.masks] == target.boxes.tolist()


def fills(batch: Batch) -> list[float]:
    """How much of its box each mask fills, counted where the two lie."""
    found = []
    for target in batch.targets:
        assert target.masks is not None
        for box, mask in zip(target.boxes.round().long().tolist(), target.masks, strict=True):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert inside.sum() >= 0.9 * mask.sum()
            found.append(float(inside.float().mean()))
    return found


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("workers", [0, 2])
def test_masks_stay_with_their_boxes_through_caches_workers_flips_and_epochs(cache: str, workers: int) -> None:
    options = {"min_size": 96, "max_size": 120, "flip": 0.5, "workers": workers, "cache": cache, "batch_size": 4}
    loaded = data(Shapes(train=12, val=1, test=0, classes=["square", "circle"]), **options)
    for _ in range(2):
        for batch in loaded.train_dataloader():
            assert min(fills(batch), default=1) > 0.5


def test_the_cache_and_workers_change_no_pixel() -> None:
    def masks(**options: Any) -> list[torch.Tensor]:
        loaded = data(Shapes(train=8, val=1, test=0, size=64), flip=0.5, **options)
        return [t.masks for batch in loaded.train_dataloader() for t in batch.targets if t.masks is not None]

    plain = masks()
    assert len(plain) == 8
    for other in (masks(cache="ram"), masks(workers=2), masks(workers=1, cache="ram")):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain, other, strict=True))


def test_an_image_without_objects_has_no_masks_but_their_size(tmp_path: Path) -> None:
    loaded = data(write(tmp_path, [note([SQUARE])], images=2), keep_empty=True)
    targets = [target for batch in loaded.train_dataloader() for target in batch.targets]
    assert sorted(tuple(target.masks.shape) for target in targets if target.masks is not None) == [
        (0, *SIZE),
        (1, *SIZE),
    ]


def test_bad_segmentations_are_named_with_file_entry_and_remedy(tmp_path: Path) -> None:
    notes = [note([SQUARE]), note(None), note([SQUARE]), note([[1, 2, 3, 4]])]
    del notes[1]["segmentation"]
    with pytest.raises(DistillError) as caught:
        data(write(tmp_path, notes)).records("train")
    said = str(caught.value)
    assert "2 problems" in said
    assert f"{tmp_path / 'train.json'}: annotation 1 of 1.png, counted from 0: its segmentation needs polygons" in said
    assert "annotation 3 of 1.png" in said
    assert "data.masks=false" in said
    assert "data.on_error=skip" in said
    loaded = data(write(tmp_path, notes), on_error="skip")
    assert len(first(loaded).boxes) == 2
    assert "2 problems skipped" in loaded.summary[0]


def test_a_mask_that_covers_no_pixel_is_counted(tmp_path: Path) -> None:
    small = [0.1, 0.2, 0.3, 0.2, 0.3, 0.4]  # corners as parts of the image, a common mistake
    loaded = data(write(tmp_path, [note([SQUARE]), note([small])]))
    assert len(first(loaded).boxes) == 2
    assert "1 with an empty mask" in loaded.summary[0]


def test_a_source_without_masks_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"data.masks=true.*Voc.*data=coco"):
        data(Voc(str(tmp_path)))


def test_a_target_takes_its_masks_along() -> None:
    target = Target(torch.zeros(1, 4), torch.ones(1).long(), torch.ones(1, 5, 6, dtype=torch.uint8))
    moved = target.to("meta")
    assert moved.masks is not None
    assert moved.masks.device.type == moved.boxes.device.type == "meta"


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_masks_are_pycocotools_own(split: str) -> None:
    if "DISTILL_TEST_DATA" not in os.environ:
        pytest.skip("set DISTILL_TEST_DATA to the folder that holds tiny_coco")
    root = Path(os.environ["DISTILL_TEST_DATA"], "tiny_coco")
    file = root / "annotations" / f"instances_{split}2017.json"
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(file))
    loaded = DetectionData(Coco(str(root), **{split: {"annotations": str(file)}}), masks=True, workers=0)
    truth = loaded.ground_truth(split)["annotations"]
    notes = [note for image in reference.imgs for note in reference.imgToAnns[image]]
    assert len(truth) == len(notes) > 200
    assert any(note["iscrowd"] for note in truth) == any(note["iscrowd"] for note in notes)
    for mine, theirs in zip(truth, notes, strict=True):
        size = tuple(mine["segmentation"]["size"])
        mask = rle.decode_mask(mine["segmentation"]["counts"].encode(), size)
        assert np.array_equal(mask.numpy(), reference.annToMask(theirs))
    first = next(iter(reference.imgs))
    target = loaded.load_batch(split, [0]).targets[0]
    things = [note for note in reference.imgToAnns[first] if not note["iscrowd"]]
    assert target.masks is not None
    assert target.masks.shape[0] == len(things)
    shares = [reference.annToMask(note).mean() for note in things]
    assert target.masks.float().mean((1, 2)).tolist() == pytest.approx(shares, rel=0.1, abs=1e-3)
