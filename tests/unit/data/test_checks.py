import os
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from distill.data.checks import check_overlap, check_records
from distill.data.records import Annotation, Record, coco_ground_truth, make_record
from distill.imaging.decoding import read_image
from distill.types import DistillError


@pytest.fixture
def picture() -> Image.Image:
    """30 wide, 20 high, all quarters different, smooth enough for JPEG."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :15], pixels[:10, 15:], pixels[10:, :15], pixels[10:, 15:] = (200, 0, 0), (0, 200, 0), (0, 0, 200), 90
    return Image.fromarray(pixels)


def noise(width=300, height=200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def of(file, boxes=((1, 1, 9, 9),), size=None, number=1) -> Record:
    notes = [Annotation(box, 1, 64.0, False, False, place, None) for place, box in enumerate(boxes)]
    return make_record(number, str(file), size, notes, "notes.json")


def fault(file, **options) -> str | None:
    """What the check says of an image, which must be what the loader will meet."""
    try:
        check_records([of(file, **options)], "train")
    except DistillError as error:
        return str(error)
    return None


def summary(*records) -> str:
    return str(check_records(list(records), "train", "skip")[1])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_every_mode_and_format_named_jpg_decodes_to_rgb(tmp_path, picture, mode, form):
    file = tmp_path / "a.jpg"
    try:
        picture.convert(mode).save(file, form)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"there is no {mode} {form}")
    assert fault(file) is None
    image = read_image(file)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 30)
    assert image.permute(1, 2, 0).is_contiguous()
    wanted = torch.from_numpy(np.array(picture.convert("L" if mode in ("L", "LA", "1") else "RGB").convert("RGB")))
    if mode != "1":
        assert (image[:, 3:7, 3:7].float().mean((1, 2)) - wanted[3:7, 3:7].float().mean((0, 1))).abs().max() < 12


def test_transparent_palettes_keep_their_colours(tmp_path, picture):
    picture.convert("P").save(tmp_path / "a.jpg", "PNG", transparency=0)
    assert read_image(tmp_path / "a.jpg")[:, 2, 2].tolist() == pytest.approx([200, 0, 0], abs=6)


def test_16_bit_greys_keep_their_upper_byte_and_floats_are_refused(tmp_path):
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    Image.fromarray(grey).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy((grey // 256).astype(np.uint8)).expand(3, -1, -1))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "b.tif")
    assert "floats" in fault(tmp_path / "b.tif")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_the_image_and_the_checked_size(tmp_path, picture, form, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / "a.jpg"
    picture.save(file, form, exif=exif, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}))
    (one,), report = check_records([of(file)], "train")
    line = str(report)
    assert one.size == ((30, 20) if turn > 4 else (20, 30))
    assert ("1 turned by EXIF" in line) == (turn > 1)
    # EXIF 2.3: where the stored first row and first column are to be seen.
    shown = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[:, ::-1].transpose(1, 0, 2),
    }[turn](np.array(picture)).astype(int)
    image = read_image(file)
    assert tuple(image.shape[1:]) == one.size
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - shown).mean() < 14


def test_a_size_that_was_annotated_before_the_turn_is_named(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert fault(tmp_path / "a.jpg", size=(30, 20)) is None
    assert "EXIF tag turns it to 20x30, but notes.json" in fault(tmp_path / "a.jpg", size=(20, 30))
    assert "the image is 20x30, but notes.json, the annotation, says 31x20" in fault(tmp_path / "a.jpg", size=(20, 31))


@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"])
def test_a_damaged_exif_tag_is_no_tag(tmp_path, picture, exif):
    picture.save(tmp_path / "a.jpg", exif=exif)
    (one,), _ = check_records([of(tmp_path / "a.jpg")], "train")
    assert one.size == tuple(read_image(one.file).shape[1:]) == (20, 30)


def test_xmps_orientation_counts_neither_for_the_size_nor_for_the_pixels(tmp_path, picture):
    text = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text)
    picture.save(tmp_path / "a.png", pnginfo=info)
    picture.save(tmp_path / "a.jpg", xmp=text.encode())
    for name in ("a.png", "a.jpg"):
        (one,), _ = check_records([of(tmp_path / name)], "train")
        assert one.size == tuple(read_image(one.file).shape[1:]) == (20, 30)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.995])
def test_an_image_that_was_cut_off_is_named_before_the_first_step(tmp_path, form, kept):
    noise().save(tmp_path / "whole.jpg", form)
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: int(len(whole) * kept)])
    assert str(tmp_path / "a.jpg") in fault(tmp_path / "a.jpg")
    with pytest.raises(DistillError, match=r"a\.jpg: cannot be read as an image"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("missing", [1, 2, 3, 50])
def test_a_jpeg_that_lacks_its_last_bytes_is_fine_only_if_it_decodes(tmp_path, missing):
    noise().save(tmp_path / "whole.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-missing])
    try:
        read_image(tmp_path / "a.jpg")
        decodes = True
    except DistillError:
        decodes = False
    assert (fault(tmp_path / "a.jpg") is None) == decodes


def test_a_whole_jpeg_with_a_tail_is_no_fault(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"\x00" * 500)
    assert fault(tmp_path / "a.jpg") is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF" * 9]
)
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert "a.jpg" in fault(tmp_path / "a.jpg")
    with pytest.raises(DistillError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg")


def test_missing_images_and_folders_are_named(tmp_path):
    for file in (tmp_path / "none.jpg", tmp_path, "a\0b.jpg"):
        assert "no such image, but notes.json names it" in fault(file)
        with pytest.raises(DistillError):
            read_image(file)


def test_the_check_leaves_the_warning_filters_as_they_were(tmp_path, picture, monkeypatch):
    picture.save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 600 pixels: Pillow warns of a decompression bomb
    files = []
    for number in range(64):
        files.append(tmp_path / f"{number}.jpg")
        os.link(tmp_path / "a.jpg", files[-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        threads = threading.active_count()
        check_records([of(file, number=number) for number, file in enumerate(files)], "train")
        assert warnings.filters == before
        assert not caught
        assert threading.active_count() == threads
        warnings.warn("still heard", stacklevel=1)
    assert len(caught) == 1


def test_boxes_are_mended_counted_and_remembered(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    boxes = [
        (1, 1, 9, 9),
        (-4, 2, 9, 40),  # clipped
        (5, 5, 5, 9),  # no width
        (5, 5, 9, 5),  # no height
        (31, 2, 50, 9),  # outside
        (30, 2, 50, 9),  # touches the edge from outside
        (-5, -5, 0, 0),
        (0, 0, 30, 20),
    ]
    records, report = check_records([of(tmp_path / "a.jpg", boxes)], "val")
    (one,) = records
    assert (report.split, report.images, report.boxes, report.usable) == ("val", 1, 8, 3)
    assert report.corrected == {"without area": 2, "outside the image": 3, "clipped": 1}
    assert str(report) == "val: 1 images, 8 boxes, 3 usable, 2 without area, 3 outside the image, 1 clipped"
    assert one.boxes.tolist() == [[1, 1, 9, 9], [0, 2, 9, 20], [0, 0, 30, 20]]
    assert one.annotation_indices.tolist() == [0, 1, 7]
    truth = coco_ground_truth(records, ["thing"])
    assert [note["bbox"] for note in truth["annotations"]] == [[1, 1, 8, 8], [-4, 2, 13, 38], [0, 0, 30, 20]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("corner", range(4))
def test_boxes_that_are_not_finite_are_named_or_skipped(tmp_path, picture, corner, value):
    picture.save(tmp_path / "a.jpg")
    wrong = [1.0, 1.0, 9.0, 9.0]
    wrong[corner] = value
    boxes = [(0, 0, 4, 4), wrong, (2, 2, 5, 5)]
    assert "notes.json: annotation 1 of a.jpg" in fault(tmp_path / "a.jpg", boxes=boxes)
    (one,), line = check_records([of(tmp_path / "a.jpg", boxes)], "train", "skip")
    assert one.boxes.tolist() == [[0, 0, 4, 4], [2, 2, 5, 5]]
    assert str(line) == "train: 1 images, 3 boxes, 2 usable, 1 problems skipped"


def test_inverted_boxes_are_not_turned_round_silently(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    for box in ((9, 1, 2, 9), (1, 9, 9, 2), (9, 9, 1, 1)):
        assert "ends before it begins" in fault(tmp_path / "a.jpg", boxes=[(0, 0, 4, 4), box])


def test_ids_and_files_that_stand_twice_are_named(tmp_path, picture):
    for name in "ab":
        picture.save(tmp_path / f"{name}.jpg")
    a, b = tmp_path / "a.jpg", tmp_path / "b.jpg"
    with pytest.raises(DistillError, match="image id 1 is used twice"):
        check_records([of(a), of(b, number=1)], "train")
    assert "1 images listed twice with the same boxes" in summary(of(a), of(a, number=2))


def test_all_problems_are_counted_and_the_first_listed(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    records = [of(tmp_path / "a.jpg")] + [of(tmp_path / f"none{n}.jpg", number=n + 2) for n in range(25)]
    with pytest.raises(DistillError) as caught:
        check_records(records, "train")
    text = str(caught.value)
    assert text.startswith("train: 25 problems in the data:")
    assert text.count("no such image") == 10
    assert "and 15 more" in text
    assert "data.on_error=skip" in text


def test_skipping_everything_is_an_error_that_lists_why(tmp_path):
    with pytest.raises(DistillError, match=r"no usable image is left(?s:.)*none\.jpg: no such image") as caught:
        check_records([of(tmp_path / "none.jpg")], "train", "skip")
    assert "on_error=skip" not in str(caught.value)


def test_empty_splits_and_splits_without_boxes_are_refused(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    with pytest.raises(DistillError, match=r"val: the split is empty; check data\.source\.val"):
        check_records([], "val")
    with pytest.raises(DistillError, match="no usable box"):
        check_records([of(tmp_path / "a.jpg", [(3, 3, 3, 3)])], "val")


def test_sources_that_draw_have_no_files_to_look_into():
    records = [of("drawn", size=(20, 30), number=number) for number in range(2)]
    assert len(check_records(records, "train", files=False)[0]) == 2


def test_overlap_is_found_by_content_whatever_the_name(tmp_path, picture):
    (tmp_path / "val").mkdir()
    for file in ("a.jpg", "b.jpg", "val/x.jpg", "val/y.jpg"):
        noise(40, 30).rotate(len(file) * (ord(file[-5]) - 90)).save(tmp_path / file)
    (tmp_path / "val" / "copy.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    train = [of(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    val = [of(tmp_path / "val" / name) for name in ("x.jpg", "y.jpg")]
    copy = [*val, of(tmp_path / "val" / "copy.jpg")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_overlap({"train": train, "val": val})
        check_overlap({"train": train})
    for splits in ({"train": train, "val": copy}, {"val": copy, "train": train}):
        with pytest.raises(DistillError, match=r"1 images of val are in train.*copy\.jpg.*on_overlap=warn"):
            check_overlap(splits, "raise")
    with pytest.warns(UserWarning, match="1 images of test are in val"):
        check_overlap({"test": val[:1], "val": val})


def test_files_of_one_size_but_other_content_do_not_overlap(tmp_path):
    for name, value in (("a", 0), ("b", 9)):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{name}.bmp")
    check_overlap({"train": [of(tmp_path / "a.bmp")], "val": [of(tmp_path / "b.bmp")]}, "raise")


def test_a_jpeg_filled_up_with_zeros_is_named(tmp_path):
    file = tmp_path / "a.jpg"
    noise().save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    assert "cut off" in str(fault(file))
