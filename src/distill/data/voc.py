"""The source of data sets in Pascal VOC's format: one XML file per image, and splits as lists of image names.

Two folders, one of images and one of XML files, are enough.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defusedxml.ElementTree import ParseError, parse

from distill.data.records import Annotation, Record, make_record, make_unusable_record
from distill.types import DistillError, Size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs")
ANNOTATION_FOLDERS = ("Annotations", "annotations", "xmls", "labels")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MISSING_XML = "no such file; write it, or take the name from the list"
SPLIT_BOUNDS = (("train", 80), ("val", 90), ("test", 100))


@dataclass(frozen=True)
class XmlAnnotation:
    """The content of one XML file."""

    xml: Path
    image: Path | None
    size: Size | None = None
    things: Sequence[tuple[str, Sequence[float], bool]] = ()
    """Name, corners and `difficult` flag of each object. The corners are unchanged, or empty if one is not a number."""
    fault: str | None = None
    """Why the image and its annotations cannot be used; None if they can."""


class Voc:
    """The source `data=voc` reads XML annotations in the format of Pascal VOC.

    If `ImageSets/Main` does not exist, the folders of images and XML files are enough. A hash of its name then assigns
    each image with an XML file to train (80 %), val (10 %) or test (10 %). New images do not move old ones to another
    split. With two or more images, train and val get at least one image each. `train=mine/` uses all images of the
    folder `mine` instead. File extensions may be in upper or lower case.

    Args:
        root: folder of the data set, with `Annotations`, `JPEGImages` and `ImageSets/Main`, or a folder of several data
            sets.
        train, val, test: one or several names of lists in `ImageSets/Main`. `VOC2007/trainval` is the list `trainval`
            in the folder `VOC2007` below `root`, so several years can be joined. None if the data set has no such
            split.
        classes: class names in the order of their labels; None: all names that occur in any split, sorted.
        one_based: whether corners count pixels from 1 and include the last pixel, as in VOC's own files. If so, 1 is
            subtracted from `xmin` and `ymin`. By default corners are not changed, because most tools count from 0.
        images, annotations: names of the two folders; None: the first of the usual names that exists.

    Raises:
        DistillError: `classes` is not a list of different names.
    """

    def __init__(
        self,
        root: str,
        train: str | Sequence[str] | None = "train",
        val: str | Sequence[str] | None = "val",
        test: str | Sequence[str] | None = "test",
        classes: Sequence[str] | None = None,
        one_based: bool = False,
        images: str | None = None,
        annotations: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.lists = {
            split: [names] if isinstance(names, str) else list(names)
            for split, names in (("train", train), ("val", val), ("test", test))
            if names
        }
        if classes is not None and (isinstance(classes, str) or not classes or len(set(classes)) < len(classes)):
            raise DistillError(f"data.source.classes: expected a list of different names, got {classes}")
        self.names = None if classes is None else tuple(classes)
        self.one_based, self.image_folder, self.xml_folder = one_based, images, annotations
        self._pages: dict[str, list[XmlAnnotation]] = {}
        self._index: dict[Path, dict[str, Path]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits whose lists exist, and train always. Reading a split with a missing list raises."""
        return tuple(split for split in self.lists if split == "train" or all(map(self._exists, self.lists[split])))

    def read_split(self, split: str) -> tuple[tuple[str, ...], list[Record]]:
        """Read the class names and records of a split.

        Invalid objects are left out. The record of their image lists them as faults.

        Raises:
            DistillError: the split is not configured, a list or folder is missing, or no image of a list has an XML
                file (as in VOC2012's test).
        """
        if split not in self.lists:
            raise DistillError(f"data=voc has no split '{split}': set data.source.{split} to a list in ImageSets/Main")
        pages = self._read(split)
        classes = self.names or self._discover()
        labels = {name: label for label, name in enumerate(classes, start=1)}
        return classes, [self._record(number, page, labels) for number, page in enumerate(pages, start=1)]

    def _discover(self) -> tuple[str, ...]:
        names: set[str] = set()
        for split in self.splits:
            # A split without labels, such as VOC2012's test, must not stop training. Reading that split raises.
            with suppress(DistillError):
                names.update(name for page in self._read(split) for name, _, _ in page.things if name)
        if not names:
            raise DistillError(
                f"{self.root}: no XML names an object, so there are no classes; give data.source.classes"
            )
        return tuple(sorted(names))

    def _read(self, split: str) -> list[XmlAnnotation]:
        if split not in self._pages:
            self._pages[split] = [page for name in self.lists[split] for page in self._read_list(split, name)]
        return self._pages[split]

    def _read_list(self, split: str, name: str) -> list[XmlAnnotation]:
        folder, stems = self._members(split, name)
        xmls = self._files(folder, self.xml_folder, ANNOTATION_FOLDERS, (".xml",), "annotations")
        images = self._files(folder, self.image_folder, IMAGE_FOLDERS, IMAGE_SUFFIXES, "images")
        if stems and not any(stem in xmls for stem in stems):
            raise DistillError(
                f"{folder}: none of the {len(stems)} images of {split} has an XML: a split without labels can neither "
                f"be learned from nor measured by. Choose another list for data.source.{split}, or null"
            )
        place = next(iter(xmls.values())).parent if xmls else folder
        # Names are looked up among the existing files, so no name in a list can lead out of the folder.
        return [
            _parse_xml(xmls[stem], images.get(stem))
            if stem in xmls
            else XmlAnnotation(place / f"{stem}.xml", None, fault=MISSING_XML)
            for stem in stems
        ]

    def _members(self, split: str, name: str) -> tuple[Path, list[str]]:
        """Return the folder and the image names of a list."""
        year, _, members = name.rpartition("/")
        folder = self.root / year
        if not folder.is_dir():
            raise DistillError(
                f"{folder}: no such folder; set data.source.root to the one that holds annotations and images"
            )
        lists = folder / "ImageSets" / "Main"
        xmls = self._files(folder, self.xml_folder, ANNOTATION_FOLDERS, (".xml",), "annotations")
        if lists.is_dir():
            return folder, _read_names(lists / f"{members}.txt", split, xmls)
        shares = _assign_splits(xmls)
        stems = [stem for stem in xmls if not members or shares[stem] == split]
        if not stems:
            raise DistillError(
                f"{folder}: of its {len(xmls)} XMLs none is for {split}, as their names are hashed to splits (train "
                f"and val need two images, test more); add images, write the names "
                f"of its images into {lists / f'{members or split}.txt'}, or set data.source.{split}=null"
            )
        return folder, stems

    def _exists(self, name: str) -> bool:
        year, _, members = name.rpartition("/")
        lists = self.root / year / "ImageSets" / "Main"
        return not lists.is_dir() or (lists / f"{members}.txt").is_file()

    def _files(
        self, folder: Path, given: str | None, usual: Sequence[str], suffixes: Sequence[str], option: str
    ) -> dict[str, Path]:
        """Return a mapping of name without extension to file."""
        wanted = [given] if given else usual
        place = next((folder / name for name in wanted if (folder / name).is_dir()), None)
        if place is None:
            raise DistillError(f"{folder}: expected a folder {' or '.join(wanted)} in it; set data.source.{option}")
        key = place / suffixes[0]
        if key not in self._index:
            self._index[key] = _index_files(place, suffixes)
        return self._index[key]

    def _record(self, number: int, page: XmlAnnotation, labels: Mapping[str, int]) -> Record:
        where = str(page.xml)
        if page.image is None or page.fault:
            fault = page.fault or "has no image of this name; add it, or take the name from the list"
            return make_unusable_record(where, [f"{where}: {fault}"], str(page.image or page.xml.stem))
        notes, faults = [], []
        for place, (name, corners, difficult) in enumerate(page.things):
            if name not in labels:
                known = ", ".join(labels)
                faults.append(
                    f"{where}: object {place} is a '{name}', which is no class ({known}); see data.source.classes"
                )
            elif not corners:
                faults.append(f"{where}: object {place} ({name}) needs a bndbox of four numbers; fix or remove it")
            else:
                x1, y1, x2, y2 = corners
                if self.one_based:
                    x1, y1 = x1 - 1, y1 - 1
                area = (x2 - x1) * (y2 - y1)
                notes.append(Annotation((x1, y1, x2, y2), labels[name], area, False, difficult, place, None))
        found = make_record(number, str(page.image), page.size, notes, where)
        found.faults = faults
        return found


def _index_files(place: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(place.iterdir()):
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            if file.stem in found:
                raise DistillError(
                    f"{file}: {found[file.stem].name} has the same name; remove or rename one of the two"
                )
            found[file.stem] = file
    return found


def _read_names(path: Path, split: str, xmls: Mapping[str, Path]) -> list[str]:
    """Read the image names of a list. In VOC's lists of one class a mark follows each name; it is removed."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        known = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise DistillError(
            f"{path}: no such list; there are {', '.join(known[:12]) or 'none'}: set data.source.{split}"
        ) from None
    except (OSError, ValueError) as error:
        raise DistillError(f"{path}: cannot be read as a list of names ({error}); write it again") from error
    return [line if line in xmls else line.split()[0] for line in lines if line]


def _parse_xml(xml: Path, image: Path | None) -> XmlAnnotation:
    try:
        tree = parse(xml).getroot()
    except FileNotFoundError:
        return XmlAnnotation(xml, image, fault=MISSING_XML)
    except (ParseError, OSError, ValueError, LookupError) as error:
        return XmlAnnotation(xml, image, fault=f"cannot be read as XML ({error}); write it again")
    things = [
        (_find_text(thing, "name"), _parse_corners(thing), _find_text(thing, "difficult").lower() in ("1", "true"))
        for thing in tree.iter("object")
    ]
    return XmlAnnotation(xml, image, _parse_size(tree), things)


def _parse_corners(thing: Any) -> tuple[float, ...]:
    try:
        return tuple(float(_find_text(thing, f"bndbox/{corner}")) for corner in CORNERS)
    except ValueError:
        return ()


def _parse_size(tree: Any) -> Size | None:
    try:
        height, width = (int(float(_find_text(tree, f"size/{side}"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if height and width else None


def _find_text(node: Any, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _assign_splits(stems: Iterable[str]) -> dict[str, str]:
    """Return a mapping of name to split, by a hash of the name.

    If train or val is empty, it gets the name whose hash is nearest to the middle of its own range. Only test may
    become empty by this. So two names are enough for train and val.
    """
    places = {stem: int(hashlib.sha1(stem.encode()).hexdigest(), 16) % 100 for stem in stems}
    shares = {stem: next(split for split, end in SPLIT_BOUNDS if place < end) for stem, place in places.items()}
    for split, middle in (("train", 40), ("val", 85)):
        held = Counter(shares.values())
        spare = [stem for stem, share in shares.items() if share == "test" or held[share] > 1]
        if not held[split] and len(shares) > 1 and spare:
            shares[min(spare, key=lambda stem: (abs(places[stem] - middle), stem))] = split
    return shares
