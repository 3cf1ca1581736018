"""The cache of annotations and of facts of images: what comes from it equals a fresh read, and it never has to work."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data import coco_file, inspection
from distill.data.coco import Coco
from distill.data.column_cache import cache_file, load_columns, save_columns
from distill.data.datamodule import DetectionData
from distill.types import DistillError

KEY = {"version": 1, "path": "a.json"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The cache, for files of any size."""
    place = tmp_path / "cache"
    monkeypatch.setenv("DISTILL_CACHE", str(place))
    monkeypatch.setattr(coco_file, "MIN_CACHED_SIZE", 0)
    monkeypatch.setattr(inspection, "MIN_CACHED_FILES", 0)
    return place


def columns() -> dict[str, np.ndarray]:
    return {"boxes": np.arange(8.0).reshape(2, 4), "empty": np.empty((0, 4)), "crowd": np.array([True, False])}


def write_split(root: Path, name: str, faulty: bool = False) -> None:
    """Three images with polygons, a crowd, a box over the edge and one without area."""
    rng = np.random.default_rng(len(name))
    images = [{"id": 10 + n, "file_name": f"{name}{n}.png", "height": 20, "width": 40} for n in range(3)]
    for image in images:
        Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(root / image["file_name"])
    boxes = [[1, 2, 10, 5], [0.1, 0.2, 50, 7], [3, 3, 0, 4], [5, 5, 20, 10], [2.25, 1, 8, 8]]
    annotations = [
        {"id": n, "image_id": 10 + n % 2, "category_id": 7 - n % 2, "bbox": box, "iscrowd": int(n == 3)}
        for n, box in enumerate(boxes)
    ]
    annotations[0] |= {"area": 17.5, "segmentation": [[1, 2, 11, 2, 11.5, 7]]}
    if faulty:
        annotations += [{"id": 9, "image_id": 99, "category_id": 7, "bbox": [0, 0, 1, 1]}]
        annotations += [{"id": 10, "image_id": 10, "category_id": 7, "bbox": [9, 9, -3, 1]}]
        images += [{"id": 20, "file_name": "none.png"}]
    categories = [{"id": 7, "name": "dog"}, {"id": 6, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{name}.json").write_text(json.dumps(content))


def load(root: Path, on_error: str = "raise") -> DetectionData:
    source = Coco(str(root), {"annotations": "train.json"}, {"annotations": "val.json"})
    data = DetectionData(source, 2, workers=0, min_size=20, max_size=40, on_error=on_error)
    data.setup("fit")
    return data


def seen(data: DetectionData) -> list:
    """All that a run and its evaluation see of the data."""
    batches = [
        (batch.ids, batch.images.tolist(), [t.boxes.tolist() for t in batch.targets]) for batch in data.val_dataloader()
    ]
    return [
        data.summary,
        data.classes,
        data.category_ids,
        data.state_dict(),
        [data.fingerprint(split) for split in ("train", "val")],
        [data.ground_truth(split) for split in ("train", "val")],
        batches,
    ]


@pytest.mark.parametrize("faulty", [False, True])
def test_a_second_start_sees_the_same_data_without_reading_the_file(tmp_path, folder, monkeypatch, faulty):
    for split in ("train", "val"):
        write_split(tmp_path, split, faulty)
    monkeypatch.setenv("DISTILL_CACHE", "")
    fresh = seen(load(tmp_path, "skip"))
    monkeypatch.setenv("DISTILL_CACHE", str(folder))
    assert seen(load(tmp_path, "skip")) == fresh
    assert len(list(folder.glob("coco-*.npy"))) == 2
    assert len(list(folder.glob("images-*.npy"))) == 2
    monkeypatch.setattr(coco_file, "_read_content", lambda *_: pytest.fail("the annotations were read again"))
    monkeypatch.setattr(inspection, "inspect_image", lambda file, _: pytest.fail(f"{file} was inspected again"))
    assert seen(load(tmp_path, "skip")) == fresh


def test_errors_are_the_same_with_and_without_the_cache(tmp_path, folder):
    for split in ("train", "val"):
        write_split(tmp_path, split, faulty=True)
    messages = []
    for _ in range(2):
        with pytest.raises(DistillError) as caught:
            load(tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    for words in ("annotations[5] is of image 99", "ends before it begins", "none.png: no such image"):
        assert words in messages[0]


def test_changed_annotations_are_read_again(tmp_path, folder):
    for split in ("train", "val"):
        write_split(tmp_path, split)
    before = load(tmp_path).state_dict()["train"]["boxes"]
    content = json.loads((tmp_path / "train.json").read_text())
    content["annotations"].append({"image_id": 12, "category_id": 6, "bbox": [1, 1, 2, 2]})
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert load(tmp_path).state_dict()["train"]["boxes"] == before + 1
    assert len(list(folder.glob("coco-*.npy"))) == 2


def test_changed_and_missing_images_are_noticed(tmp_path, folder):
    for split in ("train", "val"):
        write_split(tmp_path, split)
    load(tmp_path)
    Image.new("RGB", (41, 20)).save(tmp_path / "train0.png")
    with pytest.raises(DistillError, match=r"train0\.png: the image is 41x20"):
        load(tmp_path)
    (tmp_path / "train0.png").unlink()
    with pytest.raises(DistillError, match=r"train0\.png: no such image"):
        load(tmp_path)


def test_the_limit_of_pixels_holds_for_known_images(tmp_path, folder):
    for split in ("train", "val"):
        write_split(tmp_path, split)
    load(tmp_path)
    source = Coco(str(tmp_path), {"annotations": "train.json"})
    with pytest.raises(DistillError, match=r"data\.max_pixels=799"):
        DetectionData(source, workers=0, max_pixels=799).records("train")


def test_columns_come_back_and_may_be_changed(tmp_path):
    file = tmp_path / "new" / "a.npy"
    save_columns(file, KEY, columns())
    for _ in range(2):  # a change of the first round is not in the file
        loaded = load_columns(file, KEY)
        assert list(loaded) == list(columns())
        for name, column in columns().items():
            assert loaded[name].dtype == column.dtype
            assert np.array_equal(loaded[name], column)
        loaded["boxes"][:] = -1


@pytest.mark.parametrize("key", [{}, KEY | {"version": 2}, KEY | {"path": "b.json"}])
def test_columns_of_another_key_are_not_used(tmp_path, key):
    save_columns(tmp_path / "a.npy", KEY, columns())
    assert load_columns(tmp_path / "a.npy", key) is None


def test_a_damaged_file_is_not_used(tmp_path):
    file = tmp_path / "a.npy"
    save_columns(file, KEY, columns())
    content = file.read_bytes()
    data = bytearray(content)
    data[content.index(np.float64(7).tobytes()) + 3] ^= 1
    damaged = [b"", b"text", content[:50], content[:-1], content[: len(content) // 2], bytes(data)]
    for other in damaged:
        file.write_bytes(other)
        assert load_columns(file, KEY) is None
    file.write_bytes(content)
    assert load_columns(file, KEY) is not None


def test_pickled_objects_are_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "mark",))

    save_columns(tmp_path / "a.npy", KEY, {})
    with (tmp_path / "a.npy").open("ab") as file:
        np.lib.format.write_array(file, np.array([Trap()], dtype=object))
    header = {"version": 1, "key": KEY, "names": ["trap"], "checksum": 0}
    with (tmp_path / "b.npy").open("wb") as file:
        np.lib.format.write_array(file, np.frombuffer(json.dumps(header).encode(), np.uint8))
        np.lib.format.write_array(file, np.array([Trap()], dtype=object))
    assert load_columns(tmp_path / "b.npy", KEY) is None
    np.save(tmp_path / "c.npy", np.array([Trap()], dtype=object))
    assert load_columns(tmp_path / "c.npy", KEY) is None
    assert not (tmp_path / "mark").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a place that cannot be written")
@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache", "read-only"])
def test_a_place_that_cannot_be_written_is_no_error(tmp_path, folder, monkeypatch, place):
    if place == "read-only":
        place = str(tmp_path / place)
        os.mkdir(place)
        os.chmod(place, stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("DISTILL_CACHE", place)
    for split in ("train", "val"):
        write_split(tmp_path, split)
    assert load(tmp_path).state_dict()["train"]["boxes"] == 4


def test_the_place_can_be_chosen_and_the_cache_switched_off(tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file("coco", "a").parent == tmp_path / "xdg" / "distill"
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "own"))
    assert cache_file("coco", "a").parent == tmp_path / "own"
    assert cache_file("coco", "a") != cache_file("coco", "b")
    monkeypatch.setenv("DISTILL_CACHE", "")
    assert cache_file("coco", "a") is None
    save_columns(None, KEY, columns())
    assert load_columns(None, KEY) is None


@pytest.mark.parametrize("mark", [b"numbers", b"{'descr'", b"<i8"])
def test_a_damaged_description_of_the_columns_is_noticed(tmp_path, mark):
    file = tmp_path / "columns.npy"
    save_columns(file, KEY, {"numbers": np.arange(3)})
    content = file.read_bytes()
    for replacement in (b"c" + mark[1:], b"(" + mark[1:], b">" + mark[1:]):
        place = content.rindex(mark)
        file.write_bytes(content[:place] + replacement + content[place + len(mark) :])
        assert load_columns(file, KEY) is None
