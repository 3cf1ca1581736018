import hashlib
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from distill.data.checks import check_overlap, check_records
from distill.data.datamodule import DetectionData
from distill.data.records import coco_ground_truth
from distill.data.voc import SPLIT_BOUNDS, Voc
from distill.types import DistillError


def thing(name="cat", box=(1, 2, 11, 12), extra="<truncated>1</truncated><difficult>0</difficult>") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def page(*things, size="<size><width>40</width><height>20</height><depth>3</depth></size>") -> str:
    return f"<annotation>{size}{''.join(things)}</annotation>"


def add(folder, stem, xml, image=".jpg", suffix=".xml", folders=("JPEGImages", "Annotations")) -> None:
    for name in folders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    if image:
        shade = int(hashlib.sha1(f"{folder}{stem}".encode()).hexdigest(), 16)
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(image.lower(), image[1:].upper())
        colour = shade % 251, shade // 251 % 251, shade // 251**2 % 251
        Image.new("RGB", (40, 20), colour).save(folder / folders[0] / f"{stem}{image}", kind)
    if xml is not None:
        (folder / folders[1] / f"{stem}{suffix}").write_text(xml)


def lists(folder, **members) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for name, text in members.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


@pytest.fixture
def plain(tmp_path):
    add(tmp_path, "a", page(thing(), thing("dog", extra="<difficult>1</difficult>")))
    add(tmp_path, "b", page(thing("ant", extra="")))
    add(tmp_path, "c", page(thing("dog"), thing("cat")))
    lists(tmp_path, train="a\nb\n", val="c\n")
    return tmp_path


def checked(source, split="train", on_error="raise"):
    classes, records = source.read_split(split)
    records, report = check_records(records, split, on_error)
    return classes, records, str(report)


def test_objects_arrive_with_their_marks(plain):
    source = Voc(str(plain))
    assert source.splits == ("train", "val")
    classes, records, line = checked(source)
    assert classes == ("ant", "cat", "dog")
    assert [record.labels.tolist() for record in records] == [[2, 3], [1]]
    assert [record.difficult.tolist() for record in records] == [[False, True], [False]]
    assert records[0].boxes.tolist() == [[1, 2, 11, 12]] * 2
    assert records[0].area.tolist() == [100, 100]
    assert line == "train: 2 images, 3 boxes, 3 usable, 1 difficult"
    truth = coco_ground_truth(records, classes)
    assert [note["difficult"] for note in truth["annotations"]] == [0, 1, 0]
    assert [note["iscrowd"] for note in truth["annotations"]] == [0, 0, 0]


def test_every_split_has_the_same_classes_discovered_or_given(plain):
    found = Voc(str(plain))
    assert found.read_split("val")[0] == found.read_split("train")[0] == Voc(str(plain)).read_split("val")[0]
    given = Voc(str(plain), classes=["dog", "cat", "ant"])
    classes, records, _ = checked(given)
    assert classes == ("dog", "cat", "ant")
    assert [record.labels.tolist() for record in records] == [[2, 1], [3]]


def test_objects_of_other_classes_are_dropped_and_counted(plain):
    _, records, line = checked(Voc(str(plain), classes=["cat", "ant"]))
    assert [record.labels.tolist() for record in records] == [[1], [2]]
    assert line == "train: 2 images, 2 boxes, 2 usable, 1 boxes of other classes dropped"


def test_classes_are_renamed_before_they_are_chosen(plain):
    classes, records, _ = checked(Voc(str(plain), rename={"dog": "animal", "cat": "animal"}))
    assert classes == ("animal", "ant")
    assert [record.labels.tolist() for record in records] == [[1, 1], [2]]
    with pytest.raises(DistillError, match=r"data\.source\.rename: .* has no class 'dgo'.*did you mean 'dog'"):
        Voc(str(plain), rename={"dgo": "animal"}).read_split("train")
    with pytest.warns(UserWarning, match=r"data\.source\.classes: no XML names an object dgo"):
        Voc(str(plain), classes=["dgo", "cat"]).read_split("train")


@pytest.mark.parametrize("classes", [[], ["a", "a"], "cat"])
def test_a_wrong_class_list_is_refused(classes):
    with pytest.raises(DistillError, match=r"data\.source\.classes"):
        Voc("x", classes=classes)


def test_one_based_corners_count_from_one_and_include_the_last_pixel(tmp_path):
    add(tmp_path, "a", page(thing(box=(1, 1, 40, 20))))
    lists(tmp_path, train="a")
    _, (record,), line = checked(Voc(str(tmp_path), one_based=True))
    assert record.boxes.tolist() == [[0, 0, 40, 20]]
    assert record.area.tolist() == [800]
    assert "clipped" not in line
    _, (record,), _ = checked(Voc(str(tmp_path)))
    assert record.boxes.tolist() == [[1, 1, 40, 20]]


def test_years_are_joined_with_ids_of_their_own(tmp_path):
    for year, name in (("VOC2007", "cat"), ("VOC2012", "dog")):
        add(tmp_path / year, "000001", page(thing(name)))
        lists(tmp_path / year, trainval="000001\n", test="000001\n")
    source = Voc(str(tmp_path), ["VOC2007/trainval", "VOC2012/trainval"], None, "VOC2007/test")
    assert source.splits == ("train", "test")
    classes, records, _ = checked(source)
    assert classes == ("cat", "dog")
    assert [record.labels.tolist() for record in records] == [[1], [2]]
    assert len({record.id for record in records}) == 2
    assert ["VOC2007" in record.file for record in records] == [True, False]
    with pytest.warns(UserWarning, match="1 images of test are in train"):
        check_overlap({"train": records, "test": checked(source, "test")[1]})


def test_an_image_in_two_of_the_joined_lists_counts_once(plain):
    lists(plain, more="b\nc\n")
    _, records, line = checked(Voc(str(plain), ["train", "more"]))
    assert [Path(record.file).stem for record in records] == ["a", "b", "c"]
    assert line.endswith("1 images listed twice with the same boxes")


def test_a_test_set_without_labels_is_refused(plain):
    add(plain, "d", None)
    lists(plain, test="d\n")
    source = Voc(str(plain), classes=["ant", "cat", "dog"])
    assert len(source.read_split("train")[1]) == 2
    with pytest.raises(DistillError, match=r"none of the 1 images of test has an XML.*data\.source\.test"):
        source.read_split("test")
    add(plain, "d", page())
    with pytest.raises(DistillError, match="test: of 1 images no usable box is left"):
        checked(Voc(str(plain)), "test")


def test_a_missing_list_is_named_with_those_that_there_are(plain):
    source = Voc(str(plain), "trainval", "val", "test")
    assert source.splits == ("train", "val")
    with pytest.raises(DistillError, match=r"trainval\.txt: no such list; there are train, val.*data\.source\.train"):
        source.read_split("train")
    with pytest.raises(DistillError, match="no split 'test'"):
        Voc(str(plain), test=None).read_split("test")


def test_an_empty_list_is_an_empty_split(plain):
    lists(plain, val="\n  \n")
    with pytest.raises(DistillError, match="val: the split is empty"):
        checked(Voc(str(plain)), "val")


def test_lists_of_one_class_and_names_with_spaces_are_read(plain):
    add(plain, "my photo 1", page(thing()))
    lists(plain, cat_train="\ufeffa  1\r\nb -1\r\nmy photo 1\r\n")
    found = Voc(str(plain), "cat_train").read_split("train")[1]
    assert [record.file.rsplit("/", 1)[1] for record in found] == ["a.jpg", "b.jpg", "my photo 1.jpg"]
    (plain / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(DistillError, match="cannot be read as a list"):
        Voc(str(plain)).read_split("train")


@pytest.mark.parametrize(
    ("images", "annotations"), [("images", "annotations"), ("imgs", "xmls"), ("Bilder", "Daten"), (".", ".")]
)
def test_two_plain_folders_are_enough(tmp_path, images, annotations):
    suffixes = [".jpg", ".JPG", ".Jpeg", ".PNG", ".png", ".BMP"]
    for number in range(60):
        xml = ".XML" if number % 2 else ".xml"
        add(tmp_path, f"n{number}", page(thing()), suffixes[number % 6], xml, (images, annotations))
    own = {} if images in ("images", "imgs") else {"images": images, "annotations": annotations}
    source = Voc(str(tmp_path), **own)
    assert source.splits == ("train", "val", "test")
    stems = {split: {record.file for record in checked(source, split)[1]} for split in source.splits}
    assert sum(map(len, stems.values())) == len(set.union(*stems.values())) == 60
    assert len(stems["train"]) > 40
    add(tmp_path, "another", page(thing()), folders=(images, annotations))
    again = Voc(str(tmp_path), **own)
    for split, known in stems.items():
        assert known <= {record.file for record in again.read_split(split)[1]}


def test_a_folder_with_a_slash_is_taken_whole(tmp_path):
    for folder, count in (("mine", 12), ("yours", 3)):
        for number in range(count):
            add(tmp_path / folder, f"{folder}{number}", page(thing()), folders=("images", "annotations"))
    source = Voc(str(tmp_path), "mine/", "yours/", None)
    assert [len(source.read_split(split)[1]) for split in source.splits] == [12, 3]


def test_two_plain_folders_that_leave_a_split_empty_say_how_to_fill_it(tmp_path):
    add(tmp_path, "a", page(thing()), folders=("images", "annotations"))
    source = Voc(str(tmp_path), classes=["cat"])
    home = next(split for split, end in SPLIT_BOUNDS if int(hashlib.sha1(b"a").hexdigest(), 16) % 100 < end)
    assert len(source.read_split(home)[1]) == 1
    for split in {"train", "val", "test"} - {home}:
        with pytest.raises(DistillError, match=rf"{split}\.txt, or set data\.source\.{split}=null"):
            source.read_split(split)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(DistillError, match=r"no such folder; set data\.source\.root"):
        Voc(str(tmp_path / "none")).read_split("train")
    with pytest.raises(DistillError, match=r"Annotations or annotations.*data\.source\.annotations"):
        Voc(str(tmp_path)).read_split("train")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(page(thing()))
    with pytest.raises(DistillError, match=r"JPEGImages or images.*data\.source\.images"):
        Voc(str(tmp_path), "/").read_split("train")


def test_two_images_of_one_name_are_refused_and_hidden_files_are_not_seen(plain):
    (plain / "JPEGImages" / "._a.jpg").write_bytes(b"x")
    (plain / "Annotations" / "._a.xml").write_bytes(b"x")
    assert len(checked(Voc(str(plain)))[1]) == 2
    Image.new("RGB", (40, 20)).save(plain / "JPEGImages" / "a.png")
    with pytest.raises(DistillError, match=r"a\.xml: several images have this name: .*a\.jpg, .*a\.png; name one"):
        checked(Voc(str(plain)))
    xml = plain / "Annotations" / "a.xml"
    xml.write_text(xml.read_text().replace("<annotation>", "<annotation><filename>A.png</filename>"))
    assert checked(Voc(str(plain)))[1][0].file == str(plain / "JPEGImages" / "a.png")


def test_a_missing_image_and_a_missing_xml_are_named(plain):
    lists(plain, train="a\nb\nnothing\n")
    (plain / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DistillError) as caught:
        checked(Voc(str(plain)))
    assert "b.xml: has no image of this name" in str(caught.value)
    assert "nothing.xml: no such file" in str(caught.value)
    _, records, line = checked(Voc(str(plain)), on_error="skip")
    assert len(records) == 1
    assert line.endswith("2 images skipped, 2 problems skipped")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    "text", ["", "no xml", "<annotation>", BOMB, '<?xml version="1.0" encoding="nope"?><a/>', "\x00"]
)
def test_what_is_no_xml_is_named(plain, text):
    (plain / "Annotations" / "b.xml").write_text(text)
    with pytest.raises(DistillError, match=r"b\.xml: cannot be read as XML"):
        checked(Voc(str(plain)))
    assert len(checked(Voc(str(plain)), on_error="skip")[1]) == 1


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (thing(box=("x", 1, 2, 3)), "object 1 (cat) needs a bndbox of four numbers"),
        (thing(box=("", 1, 2, 3)), "object 1 (cat) needs a bndbox of four numbers"),
        ("<object><name>cat</name></object>", "object 1 (cat) needs a bndbox of four numbers"),
        ("<object/>", "object 1 has no name; write it"),
        (thing(box=("nan", 1, 2, 3)), "annotation 1 of b.jpg, counted from 0: the box or area is not finite"),
        (thing(box=("1e999", 1, 2, 3)), "annotation 1 of b.jpg"),
        (thing(box=(9, 1, 2, 3)), "annotation 1 of b.jpg, counted from 0: the box ends before it begins"),
    ],
)
def test_a_wrong_object_is_named_and_its_neighbours_stay(plain, objects, words):
    (plain / "Annotations" / "b.xml").write_text(page(thing("ant"), objects, thing("ant")))
    with pytest.raises(DistillError) as caught:
        checked(Voc(str(plain)))
    assert str(plain / "Annotations" / "b.xml") in str(caught.value)
    assert words in str(caught.value)
    _, records, line = checked(Voc(str(plain)), on_error="skip")
    assert records[1].labels.tolist() == [1, 1]
    assert line.endswith("1 problems skipped")


def test_a_wrong_size_is_named_and_none_is_no_size(plain):
    sizes = ("", "<size/>", "<size><width>0</width><height>0</height></size>", "<size><width>inf</width></size>")
    for size in (*sizes, "<size><width>x</width><height>inf</height></size>"):
        (plain / "Annotations" / "b.xml").write_text(page(thing("ant"), size=size))
        assert [record.size for record in checked(Voc(str(plain)))[1]] == [(20, 40)] * 2
    for width, height in ((20, 40), (41, 20), (-40, 20)):
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (plain / "Annotations" / "b.xml").write_text(page(thing("ant"), size=size))
        with pytest.raises(DistillError, match=rf"b\.jpg: the image is 40x20, but .*b\.xml.* says {width}x{height}"):
            checked(Voc(str(plain)))


def test_difficult_objects_are_no_targets_by_default(plain):
    def targets(**options) -> int:
        data = DetectionData(Voc(str(plain)), 2, workers=0, min_size=20, max_size=40, drop_last=False, **options)
        return sum(len(target.labels) for batch in data.train_dataloader() for target in batch.targets)

    assert (targets(), targets(use_difficult=True)) == (2, 3)


def test_no_object_at_all_means_no_classes(tmp_path):
    add(tmp_path, "a", page())
    lists(tmp_path, train="a")
    with pytest.raises(
        DistillError, match=r"so there are no classes\. Correct the files, or give data\.source\.classes"
    ):
        Voc(str(tmp_path)).read_split("train")


def bccd() -> str:
    root = os.environ.get("DISTILL_TEST_DATA")
    if not root:
        pytest.skip("set DISTILL_TEST_DATA to the folder that holds bccd/BCCD")
    return f"{root}/bccd/BCCD"


def test_real_blood_cells():
    source = Voc(bccd())
    found = {split: checked(source, split) for split in source.splits}
    assert {split: len(records) for split, (_, records, _) in found.items()} == {"train": 205, "val": 87, "test": 72}
    lines = [line for _, _, line in found.values()]
    counts = [[int(part.split()[0]) for part in line.split(", ")[1:3]] for line in lines]
    assert [sum(column) for column in zip(*counts, strict=True)] == [4888, 4886]
    assert sum(int(part.split()[0]) for line in lines for part in line.split(", ") if "without area" in part) == 2
    assert not any("skipped" in line for line in lines)
    truth = [coco_ground_truth(records, classes) for classes, records, _ in found.values()]
    assert sum(len(each["annotations"]) for each in truth) == 4886
    check_overlap({split: records for split, (_, records, _) in found.items()}, "raise")


def test_real_blood_cells_as_two_plain_folders(tmp_path):
    for name, target in (("JPEGImages", "images"), ("Annotations", "annotations")):
        shutil.copytree(f"{bccd()}/{name}", tmp_path / target, copy_function=os.symlink)
    source = Voc(str(tmp_path))
    assert sum(len(source.read_split(split)[1]) for split in source.splits) == 364


def test_a_test_set_without_labels_does_not_stop_training(plain):
    add(plain, "d", None)
    lists(plain, test="d\n")
    source = Voc(str(plain))
    assert source.read_split("train")[0] == ("ant", "cat", "dog")
    with pytest.raises(DistillError, match="label"):
        source.read_split("test")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_images_in_plain_folders_are_enough_for_train_and_val(tmp_path, count):
    """Ten sets of names each, among them some whose hashes all fall into one split."""
    for trial in range(10):
        root = tmp_path / str(trial)
        for number in range(count):
            add(root, f"{trial}-{number}", page(thing()), folders=("images", "annotations"))
        stems = {}
        for split in ("train", "val"):
            stems[split] = {Path(each.file).stem for each in Voc(str(root)).read_split(split)[1]}
            assert stems[split]
            assert stems[split] == {Path(each.file).stem for each in Voc(str(root)).read_split(split)[1]}
        assert not stems["train"] & stems["val"]


@pytest.mark.parametrize("crowded", ["train", "val", "test"])
def test_two_names_of_one_split_by_their_hashes_are_parted(tmp_path, crowded):
    ranges = {"train": range(80), "val": range(80, 90), "test": range(90, 100)}
    names = [f"n{i}" for i in range(200)]
    fitting = [n for n in names if int(hashlib.sha1(n.encode()).hexdigest(), 16) % 100 in ranges[crowded]][:2]
    for name in fitting:
        add(tmp_path, name, page(thing()), folders=("images", "annotations"))
    found = [Path(each.file).stem for split in ("train", "val") for each in Voc(str(tmp_path)).read_split(split)[1]]
    assert sorted(found) == sorted(fitting)
