"""Hostile data: XML bombs, pixel bombs, file names that leave the folder, programs that look like images."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.data.checks import check_records
from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.voc import Voc
from distill.imaging.decoding import MAX_PIXELS, FileHeader, read_header, read_image
from distill.types import DistillError

CATEGORIES = [{"id": 1, "name": "a"}]


def coco(folder: Path, images: list[dict], annotations: list[dict], **options: object) -> DetectionData:
    (folder / "train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    return DetectionData(Coco(str(folder), {"annotations": "train.json"}), workers=0, **options)


def named(*names: str) -> tuple[list[dict], list[dict]]:
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"id": each["id"], "image_id": each["id"], "category_id": 1, "bbox": [1, 1, 9, 9]} for each in images]
    return images, notes


def picture(file: Path, side: int = 20) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((side, side), 90).convert("RGB").save(file)
    return file


def voc(folder: Path, xml: str, stem: str = "a") -> Voc:
    picture(folder / "JPEGImages" / "a.png")
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / "a.xml").write_text(xml)
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text(stem)
    return Voc(str(folder), classes=["a"])


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
BOMBS = {
    "billion laughs": f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>',
    "quadratic": f'<!DOCTYPE a [<!ENTITY l "{"x" * 50_000}">]><annotation>{"&l;" * 50_000}</annotation>',
    "a file": '<!DOCTYPE a [<!ENTITY l SYSTEM "file:///etc/passwd">]><annotation><name>&l;</name></annotation>',
    "parameters": '<!DOCTYPE a [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><annotation/>',
    "an outer definition": '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    "deep": "<a>" * 200_000 + "</a>" * 200_000,
}


@pytest.mark.parametrize("xml", BOMBS.values(), ids=BOMBS)
def test_xml_that_grows_is_named_and_not_expanded(xml: str, tmp_path: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DistillError) as caught:
        check_records(voc(tmp_path, xml).read_split("train")[1], "train")
    assert "!ENTITY" not in xml or "cannot be read as XML" in str(caught.value)
    assert "root:" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def bomb_png(file: Path, width: int = 50_000, height: int = 50_000) -> Path:
    """A whole PNG of one colour: 7.5 GB from a few megabytes; here from its first rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(3 * width + 1) * 10)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return file


def bomb_jpeg(file: Path, width: int = 65_000, height: int = 65_000) -> Path:
    """A small JPEG, whose header says that it is a large one."""
    content = bytearray(picture(file.with_suffix(".jpeg")).read_bytes())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    file.write_bytes(content)
    return file


def hidden_bomb_jpeg(file: Path) -> Path:
    """`bomb_jpeg` behind a fill byte and a segment with a small image's frame header, where a naive reader finds it."""
    content = bomb_jpeg(file).read_bytes()
    fake = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 30, 40, 1) + b"\x01\x11\x00"
    segment = bytearray(60_000)
    place = 2 + 2 + 0xE1EA - 7  # that reader takes the marker and half of the length, 0xEA62, for a length
    segment[place : place + len(fake)] = fake
    filled = b"\xff\xff\xe1" + struct.pack(">H", 60_002) + bytes(segment)
    file.write_bytes(content[:2] + filled + content[2:])
    return file


@pytest.mark.parametrize("make", [bomb_png, bomb_jpeg, hidden_bomb_jpeg])
def test_an_image_that_is_too_large_is_refused_by_its_header(make, tmp_path: Path) -> None:
    file = make(tmp_path / "b.img")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DistillError, match="pixels"):
        read_image(file)
    with pytest.raises(DistillError, match=r"b\.img: cannot be read as an image .*pixels"):
        coco(tmp_path, *named("b.img")).records("train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_the_limit_is_an_option_of_both_ways_to_decode(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "a.img", form)
    assert read_image(tmp_path / "a.img", max_pixels=1200).shape == (3, 30, 40)
    with pytest.raises(DistillError, match=r"40x30 are more pixels than data\.max_pixels=1199"):
        read_image(tmp_path / "a.img", max_pixels=1199)
    with pytest.raises(DistillError, match=r"data\.max_pixels=1199"):
        coco(tmp_path, *named("a.img"), max_pixels=1199).records("train")
    data = coco(tmp_path, *named("a.img"), max_pixels=1200, batch_size=1)
    assert data.dataset("train", training=False)[0, 0].original_size == (30, 40)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 999, "comment": b"ab"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_size_of_a_jpeg_is_pillows(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    Image.new(mode, (517, 30)).save(tmp_path / "a.jpg", **options)
    content = (tmp_path / "a.jpg").read_bytes()
    header = FileHeader("JPEG", (30, 517), 1, 8, is_complete=True)
    assert read_header(memoryview(content)) == header
    for end in range(len(content)):
        with suppress(ValueError):  # cut off
            assert read_header(memoryview(content[:end])) is None


def test_more_than_pillows_own_limit_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=10_000).shape == (3, 30, 40)


def test_the_usual_limit_does_not_touch_pillows() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS <= 2 * Image.MAX_IMAGE_PIXELS


def test_a_program_that_looks_like_an_image_is_not_run(tmp_path: Path) -> None:
    """Pillow would hand PostScript to an interpreter."""
    file = tmp_path / "a.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(mark) (w) file closefile\n")
    assert Image.open(file).format == "EPS"
    with pytest.raises(DistillError, match="cannot be read as an image"):
        read_image(file)
    with pytest.raises(DistillError, match=r"a\.jpg"):
        coco(tmp_path, *named("a.jpg")).records("train")


@pytest.mark.parametrize(
    "name", ["../../secret.png", "../../data/../secret.png", "sub/../../../secret.png", "{}/secret.png"]
)
def test_no_file_name_leads_out_of_the_data_set(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    picture(tmp_path / "data" / "images" / "a.png")
    (tmp_path / "data" / "sub").mkdir()
    images, notes = named("a.png", name.format(tmp_path))
    with pytest.raises(DistillError, match=r"secret\.png' leads out of .*data\.source\.root"):
        coco(tmp_path / "data", images, notes).records("train")
    left = coco(tmp_path / "data", images, notes, on_error="skip").records("train")
    assert [Path(each.file).name for each in left] == ["a.png"]


def test_names_inside_the_data_set_may_take_detours_and_links(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "b.png")
    picture(tmp_path / "data" / "annotations" / "x.png")
    picture(tmp_path / "data" / "images" / "a.png")
    (tmp_path / "data" / "images" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    whole = str(tmp_path / "data" / "images" / "a.png")
    for names in (("a.png", "b.png"), ("../annotations/x.png", "./a.png"), (whole, "b.png")):
        files = {"annotations": "train.json", "images": "images"}
        coco(tmp_path / "data", *named(*names))
        data = DetectionData(Coco(str(tmp_path / "data"), files), workers=0)
        assert len(data.records("train")) == 2


def test_images_may_lie_elsewhere_by_their_own_option(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data").mkdir()
    coco(tmp_path / "data", *named("b.png"))
    source = Coco(str(tmp_path / "data"), {"annotations": "train.json", "images": str(tmp_path / "elsewhere")})
    assert len(DetectionData(source, workers=0).records("train")) == 1


@pytest.mark.parametrize("stem", ["../secret", "../../secret", "{}/secret", "../Annotations/b", "a/../b"])
def test_no_list_names_what_is_not_in_its_folder(stem: str, tmp_path: Path) -> None:
    source = voc(tmp_path / "data", "<annotation/>", "a\n" + stem.format(tmp_path))
    for folder in (tmp_path, tmp_path / "data"):
        (folder / "secret.xml").write_text("<annotation><object><name>a</name></object></annotation>")
    records = source.read_split("train")[1]
    assert records[1].unusable
    assert "no such file" in records[1].faults[0]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "/dev/zero", "/proc/self/mem", ".", "..", "/"])
def test_names_that_no_file_has_are_faults(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for names in (("a.png", name), (name, "a.png")):
        with pytest.raises(DistillError, match=r"train: [12] problems"):
            coco(tmp_path, *named(*names)).records("train")
        assert len(coco(tmp_path, *named(*names), on_error="skip").records("train")) == 1


MILLION = """
import json, resource, sys, time
from pathlib import Path
from distill.data.checks import check_records
from distill.data.coco import Coco
from distill.types import DistillError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

folder = Path(sys.argv[1])
entries = {
    "categories": '{"id": 1, "name": "a"}',
    "images": '{"id": 1, "file_name": "a.png"}',
    "annotations": '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}',
}
for many in entries:
    count = 1_000_000 if many == "annotations" else 100_000
    lists = {key: ", ".join([entry] * (count if key == many else 1)) for key, entry in entries.items()}
    (folder / "train.json").write_text("{" + ", ".join(f'"{key}": [{each}]' for key, each in lists.items()) + "}")
    del lists
    json.loads((folder / "train.json").read_text())
    bare, start = peak(), time.process_time()
    try:
        said = str(check_records(Coco(folder, {"annotations": "train.json"}).read_split("train")[1], "train")[1])
    except DistillError as error:
        said = str(error)
    print(json.dumps([many, said, time.process_time() - start, peak() - bare]))
"""


@pytest.mark.exhaustive
def test_a_million_equal_ids_end_soon_in_a_short_message(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    done = subprocess.run([sys.executable, "-c", MILLION, str(tmp_path)], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [many for many, *_ in told] == ["categories", "images", "annotations"]
    for many, said, seconds, more in told:
        assert ("999999 annotation ids repeated" if many == "annotations" else "has id 1") in said
        assert len(said) < 5000
        assert seconds < 30
        assert more < 600  # MiB beyond what the bare JSON takes


def test_a_read_only_data_set_is_enough(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data / "a.png")
    coco(data, *named("a.png"))
    xmls = voc(tmp_path / "voc", "<annotation><object><name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>"
               "<ymax>9</ymax></bndbox></object></annotation>")  # fmt: skip
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for file in (*tmp_path.rglob("*"), tmp_path):
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        for source in (Coco(str(data), {"annotations": "train.json"}), xmls):
            for cache in ("none", "ram"):
                batch = next(iter(DetectionData(source, workers=0, batch_size=1, cache=cache).train_dataloader()))
                assert len(batch.targets[0].boxes) == 1
        assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before  # root may write anywhere
    finally:
        for file in (tmp_path, *tmp_path.rglob("*")):
            file.chmod(0o755)


@pytest.mark.parametrize(
    "folder", ["my data", "Bilder für später", "数据 集", "a'b", 'a"b', "a=b,c", "[x] {y}", "a#b%20"]
)
def test_a_folder_may_be_called_anything(folder: str, tmp_path: Path) -> None:
    home = tmp_path / folder
    picture(home / "bild é.png")
    assert len(coco(home, *named("bild é.png")).records("train")) == 1
    xml = (
        "<annotation><object><name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        "</object></annotation>"
    )
    source = voc(home / "voc", xml)
    for part, suffix in (("JPEGImages", ".png"), ("Annotations", ".xml")):
        shutil.move(home / "voc" / part / f"a{suffix}", home / "voc" / part / f"ein bild 中{suffix}")
    (home / "voc" / "ImageSets" / "Main" / "train.txt").write_text("ein bild 中\n", encoding="utf-8")
    data = DetectionData(source, workers=0, batch_size=1)
    assert torch.equal(data.dataset("train", training=False)[0, 0].target.labels, torch.tensor([1]))
