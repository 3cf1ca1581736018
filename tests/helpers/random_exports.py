"""Valid data sets in the forms that tools write, varied at random. The truth is known: classes, boxes and pixels."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

SPLITS = {"train": 3, "val": 2}
NAMES = ("cat", "dog", "traffic light", "Käse")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright image is stored under each EXIF orientation."""
FORMATS = {
    "PNG": ".png",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "PPM": ".ppm",
    "JPEG": ".jpg",
    "JPEG2000": ".jp2",
}
TURNABLE = ("PNG", "WEBP", "JPEG", "TIFF")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
TEXT_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le")


@dataclass
class Picture:
    """One image of the truth."""

    number: int
    """Place in its split. It is in the file's name, after `pic`."""
    pixels: NDArray[np.uint8]
    """(H, W, 3), upright."""
    boxes: list[tuple[str, tuple[int, int, int, int]]]
    """(class, xyxy)."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]


def draw_pictures(random: Random) -> dict[str, list[Picture]]:
    """Return the truth: pictures of soft color ramps, by split. Every class occurs in train."""
    truth: dict[str, list[Picture]] = {}
    for split, count in SPLITS.items():
        truth[split] = []
        for number in range(count):
            height, width = random.randint(24, 40), random.randint(41, 60)
            if random.random() < 0.5:
                height, width = width, height
            rows, columns = np.mgrid[:height, :width]
            gray = (
                rows // 4 * 6 + columns // 4 * 3 + 10 * number + (split == "val") * 50
            )  # at most 256 values, which a GIF can hold
            pixels = np.stack([gray, 255 - gray, gray // 2], axis=2).astype(np.uint8)
            names = list(NAMES) if (split, number) == ("train", 0) else random.choices(NAMES, k=random.randint(0, 3))
            if (split, number) == ("val", 0):
                names = names or ["dog"]
            boxes: dict[tuple[int, int, int, int], str] = {}
            for name in names:
                left, top = random.randint(0, width - 12), random.randint(0, height - 12)
                box = (left, top, random.randint(left + 4, width), random.randint(top + 4, height))
                boxes[box] = name
            truth[split].append(Picture(number, pixels, [(name, box) for box, name in boxes.items()]))
    return truth


class Export:
    """The choices of one data set, and the folder that it is written to."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder, self.random = folder, random
        self.choices: dict[str, Any] = {}
        """What was chosen, for the message of a failed test."""

    def choose(self, name: str, options: Any) -> Any:
        """Choose one of the options, and note it."""
        self.choices[name] = self.random.choice(list(options))
        return self.choices[name]

    def shuffled(self, values: Any) -> list[Any]:
        """Return values in random order."""
        values = list(values)
        return self.random.sample(values, len(values))

    def stem(self, picture: Picture, split: str = "") -> str:
        """Return the name of an image file, without extension. Splits that share a folder name their split."""
        kind = self.choose(
            "stem", ("pic{}", "pic{} b", "é pic{}", "pic{}.v1", "x_pic{}_jpg.rf.0a", "pic{}+ü", "IMG_pic{}")
        )
        return unicodedata.normalize(self.choose("disk form", ("NFC", "NFD")), split + kind.format(picture.number))

    def save(self, picture: Picture, place: Path) -> Path:
        """Save an image in some format, some orientation, under an extension in some case. Return its path."""
        kind = self.choose("format", FORMATS)
        suffix = self.choose("suffix case", (str.lower, str.upper, str.title))(FORMATS[kind])
        path = place.with_name(place.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture.pixels)
        options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}.get(kind, {})
        turn = self.choose("orientation", (None, 1, *TURNS)) if kind in TURNABLE else None
        if turn is not None:
            image = image.transpose(TURNS[turn]) if turn in TURNS else image
            exif = Image.Exif()
            exif[274] = turn
            options["exif"] = exif
        if kind == "GIF":
            image = image.quantize(256, dither=Image.Dither.NONE)
        image.save(path, kind, **options)
        return path

    def spell(self, path: str) -> str:
        """Return another spelling of a path that still names the file."""
        kind = self.choose(
            "spelling", ("plain", "backslash", "percent", "NFC", "NFD", "foreign", "windows", "dot", "case")
        )
        stem, _, suffix = path.rpartition(".")
        return {
            "plain": path,
            "backslash": path.replace("/", "\\"),
            "percent": quote(path),
            "NFC": unicodedata.normalize("NFC", path),
            "NFD": unicodedata.normalize("NFD", path),
            "foreign": f"/home/me/set/{path}",
            "windows": "D:\\my set\\" + path.replace("/", "\\"),
            "dot": f"./{path}",
            "case": f"{stem}.{suffix.swapcase()}",
        }[kind]

    def write(self, path: Path, text: str, encodings: Any) -> None:
        """Write a text in some encoding and with some line ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        newline = self.choose("line ends", ("\n", "\r\n"))
        path.write_bytes(text.replace("\n", newline).encode(self.choose("encoding", encodings)))


def write_coco(export: Export, truth: dict[str, list[Picture]]) -> dict[str, Any]:
    """Write a COCO data set, and return the options of its source."""
    choose = export.choose
    layout = choose("layout", ("flat", "annotations", "2017", "roboflow", "images", "deep"))
    options: dict[str, Any] = {"root": str(export.folder)}
    for split, pictures in truth.items():
        folder = {
            "flat": "",
            "annotations": "images",
            "2017": f"{split}2017",
            "roboflow": split if split == "train" else "valid",
            "images": f"images/{split}",
            "deep": f"photos/{split}/2024",
        }[layout]
        file = {
            "flat": f"{split}.json",
            "annotations": f"annotations/{split}.json",
            "2017": f"annotations/instances_{split}2017.json",
            "roboflow": f"{folder}/_annotations.coco.json",
            "images": f"annotations/{split}.json",
            "deep": f"labels/{split}.json",
        }[layout]
        shared = split if layout in ("flat", "annotations") else ""
        names = {
            picture.number: export.save(picture, export.folder / folder / export.stem(picture, shared))
            for picture in pictures
        }
        relative = layout == "deep" or (layout == "images" and choose("relative", (False, True)))
        listed = {
            number: path.relative_to(export.folder).as_posix() if relative else path.name
            for number, path in names.items()
        }
        parts = [pictures]
        if split == "train" and choose("joined", (False, False, True)):
            parts = [pictures[:1], pictures[1:]]
        files = [file.replace(".json", f"_{place}.json" if place else ".json") for place in range(len(parts))]
        for name, part in zip(files, parts, strict=True):
            content = coco_content(export, part, {number: export.spell(text) for number, text in listed.items()})
            text = json.dumps(content, ensure_ascii=choose("ascii", (False, True)), indent=choose("indent", (None, 1)))
            export.write(export.folder / name, text, ENCODINGS)
        options[split] = {"annotations": files if len(files) > 1 else files[0], "images": None}
    return options


def coco_content(export: Export, pictures: list[Picture], file_names: dict[int, str]) -> dict[str, Any]:
    """Return the content of a COCO file."""
    random, choose = export.random, export.choose
    id_form = choose("ids", (int, str, float))
    first, step = choose("first id", (0, 1, 7, 10**9)), choose("id step", (1, 3))
    names = export.shuffled(NAMES)
    categories = {name: choose("first category", (0, 1, 5)) + place * step for place, name in enumerate(names)}
    if len(set(categories.values())) < len(categories):
        categories = {name: place for place, name in enumerate(names, start=1)}

    def entry(**keys: Any) -> dict[str, Any]:
        extra = choose("extra keys", ({}, {"license": 1, "flickr_url": None}, {"tags": ["a", {"b": 1.5}], "score": 1}))
        return dict(export.shuffled((keys | extra).items()))

    images, annotations = [], []
    for picture in pictures:
        number = first + picture.number * step
        height, width = picture.size
        sizes = choose(
            "size", ({"height": height, "width": width}, {}, {"height": None, "width": None}, {"height": 0, "width": 0})
        )
        images.append(entry(id=id_form(number), file_name=file_names[picture.number], **sizes))
        for name, (x1, y1, x2, y2) in picture.boxes:
            bbox = [choose("numbers", (int, float))(value) for value in (x1, y1, x2 - x1, y2 - y1)]
            optional = {
                "id": choose("annotation id", (len(annotations), 1, str(len(annotations)), None)),
                "area": choose("area", ((x2 - x1) * (y2 - y1), float((x2 - x1) * (y2 - y1)), None)),
                "iscrowd": choose("iscrowd", (0, False, None, 0.0)),
                "segmentation": choose("segmentation", ([], [[x1, y1, x2, y1, x2, y2, x1, y2]], None)),
            }
            kept = {key: value for key, value in optional.items() if value is not None or random.random() < 0.5}
            annotations.append(
                entry(image_id=id_form(number), category_id=id_form(categories[name]), bbox=bbox, **kept)
            )
    listed = [
        entry(id=id_form(number), name=name, supercategory=choose("group", ("none", "", "things")))
        for name, number in categories.items()
    ]
    if choose("grouping category", (False, True)):
        listed.insert(0, entry(id=id_form(max(categories.values()) + 1), name=names[0]))
    content = {"images": export.shuffled(images), "annotations": export.shuffled(annotations), "categories": listed}
    content |= choose("head", ({}, {"info": {"year": "2024"}, "licenses": []}, {"type": "instances", "videos": None}))
    return dict(export.shuffled(content.items()))


def write_voc(export: Export, truth: dict[str, list[Picture]]) -> dict[str, Any]:
    """Write a VOC data set, and return the options of its source."""
    choose = export.choose
    layout = choose("layout", ("lists", "subfolders", "beside", "lists beside"))
    one_based = choose("one-based", (False, True))
    xml_folder, image_folder = choose(
        "folders", (("Annotations", "JPEGImages"), ("annotations", "images"), ("xmls", "imgs"))
    )
    for split, pictures in truth.items():
        lines = []
        for picture in pictures:
            stem = export.stem(picture, split if layout.startswith("lists") else "")
            below = f"{split}/" if layout == "subfolders" else ""
            if layout == "beside":
                image = export.save(picture, export.folder / (split if split == "train" else "valid") / stem)
                xml = image.with_name(stem + choose("xml suffix", (".xml", ".XML")))
            elif layout == "lists beside":
                image = export.save(picture, export.folder / image_folder / stem)
                xml = image.with_name(stem + ".xml")
            else:
                image = export.save(picture, export.folder / image_folder / below / stem)
                xml = export.folder / xml_folder / f"{below}{stem}{choose('xml suffix', ('.xml', '.XML'))}"
            listed = image.relative_to(export.folder).as_posix()
            form = choose("line", ("stem", "name", "path", "mark"))
            forms = {"stem": below + stem, "name": below + image.name, "path": listed, "mark": f"{below}{stem}  1"}
            lines.append(export.spell(forms[form]) if form in ("name", "path") else forms[form])
            _write_xml(export, xml, picture, image, one_based)
        if layout != "beside":
            ends = choose("end of list", ("", "\n", "\n\n"))
            export.write(export.folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(lines) + ends, TEXT_ENCODINGS)
    return {"root": str(export.folder), "one_based": one_based}


def _write_xml(export: Export, path: Path, picture: Picture, image: Path, one_based: bool) -> None:
    choose = export.choose
    case = choose("tag case", (str, str, str.upper, str.title))
    number = choose("numbers", (str, lambda value: f"{value}.0", lambda value: f" {value} "))

    def tag(name: str, content: str) -> str:
        return f"<{case(name)}>{content}</{case(name)}>"

    things = []
    for name, (x1, y1, x2, y2) in picture.boxes:
        first = 1 if one_based else 0
        corners = {"xmin": x1 + first, "ymin": y1 + first, "xmax": x2, "ymax": y2}
        box = "".join(tag(key, number(value)) for key, value in export.shuffled(corners.items()))
        parts = [tag("name", escape(name)), tag("bndbox", box)]
        parts += choose("extra tags", ([], [tag("pose", "Left"), tag("truncated", "1")], [tag("difficult", "0")]))
        things.append(tag("object", "".join(export.shuffled(parts))))
    height, width = picture.size
    named = choose("filename", (image.name, image.stem, f"C:\\set\\{image.name}", None))
    parts = [*things, choose("size", (tag("size", tag("width", str(width)) + tag("height", str(height))), ""))]
    parts += (
        [tag("filename", escape(named))] if named else [tag("source", tag("database", "mine")), tag("filename", "")]
    )
    space = choose("namespace", ("", ' xmlns="http://example.org/voc"'))
    name = case("annotation")
    encoding = choose("xml encoding", ("utf-8", "utf-8-sig", "utf-16", "iso-8859-1", None))
    declared = {"utf-8-sig": "utf-8", None: ""}.get(encoding, encoding)
    head = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    text = f"{head}<{name}{space}>{choose('space', ('', chr(10))).join(export.shuffled(parts))}</{name}>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding or "utf-8", "xmlcharrefreplace"))


def write_yolo(export: Export, truth: dict[str, list[Picture]]) -> dict[str, Any]:
    """Write a YOLO data set, and return the options of its source."""
    choose = export.choose
    layout = choose("layout", ("ultralytics", "roboflow", "list", "beside"))
    names = export.shuffled(NAMES)
    description: dict[str, Any] = {"names": choose("names", (list, lambda values: dict(enumerate(values))))(names)}
    description |= choose("extra keys", ({}, {"nc": len(NAMES)}, {"roboflow": {"license": "x"}, "download": None}))
    for split, pictures in truth.items():
        key = choose("val key", ("val", "valid", "validation")) if split == "val" else split
        below = choose("subfolder", ("", "a/b/"))
        folder = {"ultralytics": f"images/{split}", "list": "images", "beside": split}.get(layout, f"{split}/images")
        files = []
        for picture in pictures:
            file = export.save(
                picture, export.folder / folder / below / export.stem(picture, split if layout == "list" else "")
            )
            files.append(file)
            parts = file.relative_to(export.folder).as_posix()
            labels = parts if layout == "beside" else parts.replace("images/", "labels/", 1)
            lines = [_yolo_line(export, names.index(name), box, picture.size) for name, box in picture.boxes]
            if lines or choose("empty file", (False, True)):
                lines += choose("more lines", ([], [""], lines[:1]))
                path = export.folder / labels
                export.write(path.with_name(f"{Path(labels).stem}.txt"), "\n".join(lines), TEXT_ENCODINGS)
        place = folder
        if layout == "list":
            place = f"{split}.txt"
            form = choose("line", ("{}", "./{}", "/content/set/{}"))
            listed = [form.format(file.relative_to(export.folder).as_posix()) for file in files]
            export.write(export.folder / place, "\n".join(listed), TEXT_ENCODINGS)
        description[key] = choose("place", ("{}", "../{}", "/content/set/{}", "./{}")).format(place)
        if choose("backslashes", (False, False, True)):
            description[key] = description[key].replace("/", "\\")
    description |= choose("path", ({}, {"path": "."}, {"path": str(export.folder)}, {"path": ""}))
    text = yaml.safe_dump(dict(export.shuffled(description.items())), sort_keys=False, allow_unicode=True)
    name = choose("file", ("data.yaml", "data.yml", "dataset.yaml"))
    export.write(export.folder / name, text, TEXT_ENCODINGS)
    return {"root": str(export.folder / name if choose("root", (False, True)) else export.folder)}


def _yolo_line(export: Export, label: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> str:
    (x1, y1, x2, y2), (height, width) = box, size
    if export.choose("polygon", (False, False, True)):
        corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        values = [value for x, y in corners for value in (x / width, y / height)]
    else:
        values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    number = export.choose("number", ("{:.8f}", "{:.17g}", "{:.9e}"))
    words = [export.choose("class", ("{}", "{}.0")).format(label), *(number.format(value) for value in values)]
    return export.choose("separator", (" ", "  ", "\t")).join(words) + export.choose("line end", ("", " "))
