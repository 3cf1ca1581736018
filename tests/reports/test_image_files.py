"""Image files as cameras, phones and disks leave them: the pixels that anybody sees, or a message naming the file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data.inspection import inspect_files
from distill.imaging.decoding import inspect_image, read_image
from distill.types import DistillError

HEIGHT, WIDTH = 24, 40
XMP = b"http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta xmlns:x='adobe:ns:meta/' tiff:Orientation='3'/>"
TURN = {  # EXIF 2.3: what shows the stored image upright, by numpy's own words
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


def stored() -> np.ndarray:
    """Blocks of eight pixels, which JPEG keeps nearly unchanged."""
    colors = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return colors.repeat(8, 0).repeat(8, 1)


def exif_block(orientation: int, kind: str = "SHORT") -> bytes:
    """A TIFF header with the orientation alone, of a type that some writers use."""
    number, size = {"BYTE": (1, "B3x"), "SHORT": (3, "H2x"), "LONG": (4, "I")}[kind]
    return b"II*\0" + struct.pack("<IHHHI" + size + "I", 8, 1, 0x0112, number, 1, orientation, 0)


def jpeg(exif: bytes, before: bytes = b"") -> bytes:
    """A JPEG with an EXIF segment, after another APP1 segment if there is one."""
    file = io.BytesIO()
    Image.fromarray(stored()).save(file, "JPEG", quality=95, subsampling=0)
    content = file.getvalue()
    segments = [before] if before else []
    segments.append(b"Exif\0\0" + exif)
    packed = b"".join(b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return content[:2] + packed + content[2:]


def assert_shows(file: Path, expected: np.ndarray, tolerance: float) -> None:
    pixels: Tensor = read_image(file)
    assert tuple(pixels.shape) == (3, *expected.shape[:2])
    assert inspect_image(file).size == expected.shape[:2]
    difference = (pixels.permute(1, 2, 0).float() - torch.from_numpy(expected.copy()).float()).abs()
    assert difference.mean() <= tolerance


@pytest.mark.parametrize("orientation", TURN)
@pytest.mark.parametrize("before", [b"", XMP], ids=["EXIF first", "XMP first"])
def test_a_phones_picture(orientation: int, before: bytes, tmp_path: Path) -> None:
    """Some phones write an XMP packet, with an orientation of its own, before EXIF."""
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg(exif_block(orientation), before))
    assert_shows(file, TURN[orientation](stored()), 6.0)


@pytest.mark.parametrize("kind", ["BYTE", "LONG"])
def test_an_orientation_of_another_type(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg(exif_block(6, kind)))
    assert_shows(file, TURN[6](stored()), 6.0)


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_a_turned_picture_in_another_format(suffix: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    image = Image.fromarray(stored())
    image.save(file, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert_shows(file, TURN[orientation](stored()), 0.0)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist(orientation: int, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg(exif_block(orientation)))
    assert_shows(file, stored(), 6.0)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_gray_image_of_a_camera_in_16_bits(bits: int, tmp_path: Path) -> None:
    """12 bits in a 16-bit file would be nearly black."""
    gray = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    file = tmp_path / "a.png"
    Image.fromarray(gray << (bits - 8)).save(file)
    assert_shows(file, np.repeat(gray[..., None], 3, 2).astype(np.uint8), 0.0)


def test_an_image_of_floats_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)).save(file)
    with pytest.raises(DistillError, match=r"a\.tif: .*got floats; convert the image to 8 bits"):
        read_image(file)


def test_a_png_with_a_damaged_inside_is_found_before_training(tmp_path: Path) -> None:
    """Its header and end are in place."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(stored()).save(good)
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0xFF
    bad.write_bytes(content)
    with pytest.raises(DistillError, match=r"bad\.png: .*damaged: the checksum of its part IDAT"):
        inspect_image(bad)
    facts = inspect_files([str(good), str(bad)], 10**6)
    assert list(facts.faults) == [1]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_file_that_is_cut_off_is_found_before_training(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(DistillError, match="cut off: its end is missing"):
        inspect_image(file)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_an_image_above_pillows_own_limit(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the option that counts here, not Pillow's."""
    file = tmp_path / f"a.{suffix}"
    Image.new("RGB", (60, 50)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DistillError, match=r"more pixels than data\.max_pixels=2000: shrink the image, or raise"):
        read_image(file, max_pixels=2000)
    assert read_image(file, max_pixels=3000).shape == (3, 50, 60)


def test_an_empty_file(tmp_path: Path) -> None:
    """A download that was cut off at once; torchvision's own message names a file of its source code."""
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DistillError, match=r"empty\.jpg: cannot be read as an image \(the file is empty\)"):
        read_image(tmp_path / "empty.jpg")
