"""VOC folders as tools and hands write them: the boxes of the plain folder, wherever the files lie."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.data.checks import check_records
from distill.data.voc import Voc
from distill.types import DistillError

BOX = [3.0, 2.0, 13.0, 12.0]
XML = (
    "<annotation><filename>{name}</filename><size><width>40</width><height>20</height><depth>3</depth></size>"
    "<object><name>{thing}</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>13</xmax><ymax>12</ymax></bndbox></object>"
    "</annotation>"
)


def write(
    folder: Path,
    images: str = "JPEGImages/{}.jpg",
    xmls: str = "Annotations/{}.xml",
    names: tuple[str, ...] = ("a", "b"),
    change: Callable[[str], str] = str,
    encoding: str = "utf-8",
) -> Path:
    for shade, name in enumerate(names):
        image, xml = folder / images.format(name), folder / xmls.format(name)
        for file in (image, xml):
            file.parent.mkdir(parents=True, exist_ok=True)
        form = {".jfif": "JPEG"}.get(image.suffix)
        Image.new("RGB", (40, 20), (shade * 90, 9, 9)).save(image, form)
        xml.write_bytes(change(XML.format(name=image.name, thing="cat")).encode(encoding))
    return folder


def list_train(folder: Path, *lines: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("\r\n".join(lines), encoding="utf-8")


def read(folder: Path, split: str = "train", **options: Any) -> dict[str, list[list[float]]]:
    """Name of each image -> its boxes, after the checks."""
    records, _ = check_records(Voc(str(folder), **options).read_split(split)[1], split)
    return {unicodedata.normalize("NFC", Path(record.file).stem): record.boxes.tolist() for record in records}


@pytest.mark.parametrize(
    "lines",
    [
        ("a", "b"),
        ("a.jpg", "b.JPG"),
        ("JPEGImages/a.jpg", "./JPEGImages/b.jpg"),
        ("/home/me/data/JPEGImages/a.jpg", "C:\\data\\JPEGImages\\b.jpg"),
        ("Annotations/a.xml", "b.xml"),
        ("a  1", "b -1"),
    ],
)
def test_a_list_with_extensions_or_paths(lines: tuple[str, ...], tmp_path: Path) -> None:
    list_train(write(tmp_path), *lines)
    assert read(tmp_path) == {"a": [BOX], "b": [BOX]}


def test_images_in_subfolders(tmp_path: Path) -> None:
    write(tmp_path, "JPEGImages/cam1/{}.jpg", "Annotations/cam1/{}.xml")
    list_train(tmp_path, "cam1/a", "cam1/b")
    assert read(tmp_path) == {"a": [BOX], "b": [BOX]}


@pytest.mark.parametrize("suffix", ["jfif", "gif", "JPG", "webp"])
def test_images_in_any_format_that_is_read(suffix: str, tmp_path: Path) -> None:
    list_train(write(tmp_path, f"JPEGImages/{{}}.{suffix}"), "a", "b")
    assert read(tmp_path) == {"a": [BOX], "b": [BOX]}


def test_xml_files_beside_the_images_of_each_split(tmp_path: Path) -> None:
    """As Roboflow writes them."""
    write(tmp_path, "train/{}_jpg.rf.1.jpg", "train/{}_jpg.rf.1.xml")
    write(tmp_path, "valid/{}_jpg.rf.2.jpg", "valid/{}_jpg.rf.2.xml", ("c",))
    assert Voc(str(tmp_path)).splits == ("train", "val")
    assert read(tmp_path) == {"a_jpg.rf.1": [BOX], "b_jpg.rf.1": [BOX]}
    assert read(tmp_path, "val") == {"c_jpg.rf.2": [BOX]}


def test_tags_in_upper_case(tmp_path: Path) -> None:
    def upper(text: str) -> str:
        for tag in ("annotation", "object", "bndbox", "name", "xmin"):
            text = text.replace(f"<{tag}>", f"<{tag.capitalize()}>").replace(f"</{tag}>", f"</{tag.capitalize()}>")
        return text

    list_train(write(tmp_path, change=upper), "a", "b")
    assert read(tmp_path) == {"a": [BOX], "b": [BOX]}


def test_tags_in_a_namespace(tmp_path: Path) -> None:
    def qualified(text: str) -> str:
        return text.replace("<annotation>", '<annotation xmlns="http://example.org/voc">')

    list_train(write(tmp_path, change=qualified), "a", "b")
    assert read(tmp_path) == {"a": [BOX], "b": [BOX]}


def test_an_xml_file_of_another_kind_is_named(tmp_path: Path) -> None:
    list_train(write(tmp_path), "a", "b")
    (tmp_path / "Annotations" / "b.xml").write_text("<svg><rect/></svg>")
    with pytest.raises(
        DistillError, match=r"b\.xml: no known tag occurs in it: expected object, size or filename, got"
    ):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "latin-1", "utf-16"])
def test_an_encoding_that_the_file_declares(encoding: str, tmp_path: Path) -> None:
    thing = {"latin-1": "Bär"}.get(encoding, "猫")

    def declared(text: str) -> str:
        return f'<?xml version="1.0" encoding="{encoding}"?>' + text.replace(">cat<", f">{thing}<")

    list_train(write(tmp_path, change=declared, encoding=encoding), "a", "b")
    assert read(tmp_path) == {"a": [BOX], "b": [BOX]}
    assert Voc(str(tmp_path)).read_split("train")[0] == (thing,)


def test_an_encoding_that_the_file_does_not_declare_is_named(tmp_path: Path) -> None:
    list_train(write(tmp_path, change=lambda text: text.replace(">cat<", ">狗<"), encoding="gbk"), "a", "b")
    with pytest.raises(DistillError, match=r"a\.xml cannot be used|a\.xml: cannot be read as XML .*encoding utf-8"):
        read(tmp_path)


def test_two_images_of_one_name(tmp_path: Path) -> None:
    """The XML's `<filename>` decides."""
    list_train(write(tmp_path), "a", "b")
    Image.new("RGB", (40, 20), (5, 200, 5)).save(tmp_path / "JPEGImages" / "a.png")
    records, _ = check_records(Voc(str(tmp_path)).read_split("train")[1], "train")
    assert Path(records[0].file).name == "a.jpg"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_composed_or_not(form: Any, tmp_path: Path) -> None:
    """macOS writes é as two code points, other systems as one."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    name = unicodedata.normalize(form, "café")
    list_train(write(tmp_path, names=(name, "b")), unicodedata.normalize(other, "café"), "b")
    assert read(tmp_path) == {"café": [BOX], "b": [BOX]}


def test_spaces_written_as_percent_20(tmp_path: Path) -> None:
    list_train(write(tmp_path, names=("my a", "b")), "my%20a", "b")
    assert read(tmp_path) == {"my a": [BOX], "b": [BOX]}
