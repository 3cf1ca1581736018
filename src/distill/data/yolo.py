"""The source of data sets in YOLO's format: a text file of labels for each image, and a file ``data.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from distill.data.class_names import ClassChoice, Renames
from distill.data.file_index import path_ends
from distill.data.layouts import DESCRIPTIONS, SPLIT_KEYS, find_description
from distill.data.records import Annotation, Record, Records, make_record, make_unusable_record, pack_records
from distill.files import read_text
from distill.imaging.decoding import IMAGE_SUFFIXES, MAX_PIXELS, inspect_image
from distill.types import DistillError, Size

TOLERANCE = 1e-3
"""How far a coordinate may lie outside 0 to 1. Exporters round; the checks of the data clip such boxes."""


class Yolo:
    """The source `data=yolo` reads the format of YOLOv5 and its successors, as Ultralytics and Roboflow write it.

    The file `data.yaml` holds the class names (`names`, a list or a mapping of numbers) and, for each split, a folder
    of images, a list file of images, or several of them. Paths are relative to the key `path` of that file or to its
    folder. Roboflow writes `../train/images` for the folder `train/images` beside the file; both work. An absolute
    path of another machine is found by its end. A split that the file does not name is looked for in `images/SPLIT` and
    `SPLIT/images`.

    The labels of `…/images/…/a.jpg` are in `…/labels/…/a.txt`; if the path has no folder `images`, they lie beside the
    image. A line is `class x y w h`, the center and size of a box, or `class x1 y1 x2 y2 …`, a polygon, whose bounding
    box is used; all coordinates are fractions of the upright image. A line that occurs twice counts once. An image
    without a label file has no objects.

    Args:
        root: folder of the data set, or its `data.yaml`.
        train, val, test: folder or list file of images in `root`, or a list of them, in place of that of `data.yaml`;
            None: as in `data.yaml`.
        classes, rename: see `ClassChoice`. If no `data.yaml` lists class names, `classes` are the names in the order of
            their numbers.

    The attribute `max_pixels` is the largest number of pixels of an image whose size is read.

    Raises:
        DistillError: there is no such folder, `data.yaml` cannot be read, or no class names are known.
    """

    masks = False

    def __init__(
        self,
        root: str,
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        rename: Renames | None = None,
    ) -> None:
        path = Path(root).expanduser()
        self.given = {"train": train, "val": val, "test": test}
        self.choice = ClassChoice(classes, rename)
        self.max_pixels = MAX_PIXELS
        self.root = path.parent if path.suffix.lower() in (".yaml", ".yml") else path
        self.file = path if self.root != path else find_description(path)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are given, named in ``data.yaml``, or found as folders."""
        description = self._read_description()
        return tuple(split for split in SPLIT_KEYS if self._has(split, description))

    def read_split(self, split: str) -> tuple[tuple[str, ...], Records]:
        """Read the class names and records of a split. Each invalid line becomes a fault of its image's record.

        Raises:
            DistillError: the split, its images or its class names are missing.
        """
        description = self._read_description()
        places = self._places(split, description)
        if not places:
            raise DistillError(
                f"{self.root}: no images of the split '{split}'. Expected the key '{split}' in "
                f"{self.file or DESCRIPTIONS[0]}, or the folder images/{split} or {split}/images; or set "
                f"data.source.{split}"
            )
        names = self._class_names(description)
        files = sorted({file for place in places for file in self._images(place, split)})
        if not files:
            raise DistillError(f"{places[0]}: no image ({', '.join(IMAGE_SUFFIXES)}) in it; set data.source.{split}")
        records = pack_records(
            [_read_image_labels(number, file, names, self.max_pixels) for number, file in enumerate(files, start=1)]
        )
        self.choice.require_known(names, lambda: names, self.file or self.root)
        return self.choice.select(names, records)

    def _has(self, split: str, description: dict[str, Any]) -> bool:
        try:
            return bool(self._places(split, description))
        except DistillError:
            if split == "test" and self.given[split] is None:
                return False  # Roboflow names a folder of test images even if it exports none
            raise

    def _read_description(self) -> dict[str, Any]:
        if self.file is None:
            if not self.root.is_dir():
                raise DistillError(f"{self.root}: no such folder; set data.source.root to the data set's folder")
            return {}
        try:
            content = yaml.safe_load(read_text(self.file))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DistillError(f"{self.file}: cannot be read ({str(error).splitlines()[0]})") from error
        if not isinstance(content, dict):
            raise DistillError(f"{self.file}: expected the keys names, train and val, got {type(content).__name__}")
        return content

    def _class_names(self, description: dict[str, Any]) -> tuple[str, ...]:
        names = description.get("names") or self.choice.classes
        if isinstance(names, dict):
            if set(names) != set(range(len(names))):
                raise DistillError(f"{self.file}: 'names' needs the numbers 0 to {len(names) - 1}, got {list(names)}")
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, (list, tuple)) or not names:
            raise DistillError(
                f"{self.file or self.root / DESCRIPTIONS[0]}: expected class names under 'names'; write them there, or "
                "set data.source.classes=[…]"
            )
        texts = tuple(str(name) for name in names)
        if repeated := sorted({name for name in texts if texts.count(name) > 1}):
            raise DistillError(f"{self.file or self.root}: the class names {repeated} occur twice; rename one of each")
        if (count := description.get("nc")) is not None and description.get("names") and count != len(texts):
            raise DistillError(f"{self.file}: 'nc' is {count}, but 'names' lists {len(texts)} classes; correct one")
        return texts

    def _places(self, split: str, description: dict[str, Any]) -> list[Path]:
        """Folders and list files of a split."""
        given = self.given[split]
        if given is None:
            given = next((description[key] for key in SPLIT_KEYS[split] if description.get(key)), None)
        if given is None:
            folders = [self.root / path for key in SPLIT_KEYS[split] for path in (f"images/{key}", f"{key}/images")]
            return [folder for folder in folders if folder.is_dir()][:1]
        names = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        return [self._find_place(str(name), str(description.get("path") or ""), split) for name in names]

    def _find_place(self, name: str, base: str, split: str) -> Path:
        plain = name.replace("\\", "/")
        stripped = plain
        while stripped.startswith("../"):
            stripped = stripped.removeprefix("../")
        places = [self.root / base / plain, self.root / plain, self.root / stripped, self.root / base / stripped]
        for place in (*places, *self._ends_in_root(plain)):
            if place.exists():
                return place
        source = f"data.source.{split}" if self.given[split] is not None else f"'{split}' in {self.file}"
        raise DistillError(
            f"{source} is {name}, but neither {places[0]} nor {places[2]} exists. Correct the path, or set "
            f"data.source.{split}"
        )

    def _ends_in_root(self, path: str) -> list[Path]:
        """Return the places in `root` that an absolute path of another machine may stand for, the longest end first."""
        is_absolute = path.startswith("/") or PureWindowsPath(path).is_absolute()
        return [self.root / end for end in path_ends(path)[1:] if ".." not in end] if is_absolute else []

    def _images(self, place: Path, split: str) -> list[Path]:
        if place.is_dir():
            return [
                file
                for file in place.rglob("*")
                if file.suffix.lower() in IMAGE_SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(place).parts)
            ]
        if place.suffix.lower() in IMAGE_SUFFIXES:
            return [place]
        try:
            lines = read_text(place).splitlines()
        except (OSError, ValueError) as error:
            raise DistillError(
                f"{place}: cannot be read as a list of images ({error}); set data.source.{split}"
            ) from error
        names = [line.strip().replace("\\", "/") for line in lines if line.strip()]
        choices = [(place.parent / name, self.root / name, *self._ends_in_root(name)) for name in names]
        return [next((path for path in paths if path.is_file()), paths[0]) for paths in choices]


def label_file(image: Path) -> Path:
    """Return the file of an image's labels: the last folder ``images`` of its path becomes ``labels``.

    Labels beside the image are used if only they exist.
    """
    beside, parts = image.with_suffix(".txt"), list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    usual = Path(*parts).with_suffix(".txt")
    return beside if beside.is_file() and not usual.is_file() else usual


def _read_image_labels(number: int, image: Path, classes: Sequence[str], max_pixels: int) -> Record:
    labels = label_file(image)
    where = str(labels)
    try:
        lines = read_text(labels).splitlines() if labels.is_file() else []
    except (OSError, ValueError) as error:
        return make_unusable_record(where, [f"{where}: cannot be read as text ({error})"], str(image))
    size: Size | None = None
    try:
        size = inspect_image(image, max_pixels).size if lines else None
    except DistillError:
        lines = []  # the checks of the data report the image
    annotations, faults = [], []
    seen: set[str] = {""}
    for position, line in enumerate(map(str.strip, lines)):
        if line in seen:
            continue
        seen.add(line)
        try:
            assert size is not None
            label, box = parse_line(line, size, len(classes))
        except ValueError as error:
            faults.append(f"{where}: line {position + 1} {error}")
            continue
        area = (box[2] - box[0]) * (box[3] - box[1])
        annotations.append(Annotation(box, label, area, False, False, position, None))
    record = make_record(number, str(image), size, annotations, where)
    record.faults = faults
    return record


def parse_line(line: str, size: Size, classes: int) -> tuple[int, tuple[float, float, float, float]]:
    """Return the label from 1 and the box, xyxy in pixels, of a line of labels.

    Raises:
        ValueError: the line is not of the format, its class does not exist, or its numbers are not fractions.
    """
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        raise ValueError(f"expected numbers, got '{line[:60]}'; correct it") from None
    if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
        raise ValueError(
            f"expected 'class x y w h' or 'class x1 y1 x2 y2 …' with three points or more, got {len(numbers)} numbers"
        )
    number, *values = numbers
    if not (number.is_integer() and 0 <= number < classes):
        raise ValueError(
            f"has class {number:g}, but the data set has the classes 0 to {classes - 1}; correct the line or data.yaml"
        )
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
        raise ValueError(f"expected fractions of the image from 0 to 1, got {' '.join(map(str, values[:4]))}")
    height, width = size
    if len(values) == 4:
        x, y, w, h = values
        left, top, right, bottom = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    else:
        left, right = min(values[::2]), max(values[::2])
        top, bottom = min(values[1::2]), max(values[1::2])
    return int(number) + 1, (left * width, top * height, right * width, bottom * height)
