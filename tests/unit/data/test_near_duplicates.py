"""Groups of images that look alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from distill.data import near_duplicates
from distill.data.near_duplicates import group_similar

LIMIT = 10**7


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Return a picture of soft blots (width, height)."""
    blots = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC)


def groups_of(folder: Path, images: dict[str, Image.Image]) -> list[set[str]]:
    """Save images, and return the names of each group of several."""
    for name, image in images.items():
        image.save(folder / name)
    labels = group_similar([str(folder / name) for name in images], LIMIT).tolist()
    groups = [{name for name, own in zip(images, labels, strict=True) if own == label} for label in sorted(set(labels))]
    return [group for group in groups if len(group) > 1]


def test_copies_of_a_picture_in_other_forms(tmp_path: Path) -> None:
    image = picture(0)
    copies = {
        "a.png": image,
        "b.jpg": image,
        "c.jpg": image.resize((80, 60)),
        "d.png": ImageEnhance.Brightness(image).enhance(0.7),
        "e.png": image.convert("L"),
        "f.bmp": image,
        "g.png": Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 16),
    }
    others = {f"other{seed}.png": picture(seed) for seed in range(1, 40)}
    assert groups_of(tmp_path, copies | others) == [set(copies)]


def test_frames_of_a_video_from_a_moving_camera(tmp_path: Path) -> None:
    """Neighbors in the order of their numbers may differ more than other pairs. The video is one group."""
    scene = picture(3, (640, 120))
    frames = {f"frame{number}.jpg": scene.crop((number * 6, 0, number * 6 + 160, 120)) for number in range(1, 40)}
    others = {f"other{seed}.jpg": picture(seed) for seed in range(4, 30)}
    assert groups_of(tmp_path, others | frames) == [set(frames)]


def test_plain_pages_with_few_marks_are_not_alike(tmp_path: Path) -> None:
    pages = {}
    for number in range(12):
        page = np.full((128, 128), 255, dtype=np.uint8)
        row, column = divmod(number, 4)
        page[20 + 40 * row : 30 + 40 * row, 10 + 30 * column : 20 + 30 * column] = 0
        pages[f"page{number}.png"] = Image.fromarray(page)
    blank = Image.new("L", (128, 128), 255)
    assert groups_of(tmp_path, pages | {"blank1.png": blank, "blank2.png": blank}) == [{"blank1.png", "blank2.png"}]


def test_files_that_cannot_be_read_look_like_no_other(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    files = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "missing.jpg", "large.png")]
    Image.new("L", (4000, 4000)).save(files[-1])
    assert group_similar([*files, files[-1]], LIMIT).tolist() == [0, 1, 2, 3, 4]
    assert group_similar([], LIMIT).tolist() == []


def test_a_second_start_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MIN_CACHED_FILES", 2)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    files = [str(tmp_path / f"{number}.png") for number in range(5)]
    for number, file in enumerate(files):
        picture(number // 2).save(file)
    assert group_similar(files, LIMIT).tolist() == [0, 0, 2, 2, 4]
    read = []
    own = near_duplicates._describe_image
    monkeypatch.setattr(near_duplicates, "_describe_image", lambda file, limit: read.append(file) or own(file, limit))
    assert group_similar(files, LIMIT).tolist() == [0, 0, 2, 2, 4]
    assert read == []
    picture(0, (161, 120)).save(files[4])
    assert group_similar(files, LIMIT).tolist() == [0, 0, 2, 2, 0]
    assert read == [files[4]]
