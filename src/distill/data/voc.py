"""The source of data sets in Pascal VOC's format: one XML file per image, and splits as lists of image names.

Two folders, one of images and one of XML files, are enough; so are XML files beside the images.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from distill.data.class_names import ClassChoice, Renames
from distill.data.file_index import XML_SUFFIXES, FileIndex, spellings
from distill.data.layouts import ANNOTATION_FOLDERS, IMAGE_FOLDERS
from distill.data.records import (
    Annotation,
    Record,
    Records,
    make_record,
    make_unusable_record,
    pack_records,
)
from distill.data.voc_file import MISSING_XML, XmlAnnotation, parse_xml
from distill.files import read_text
from distill.imaging.decoding import IMAGE_SUFFIXES
from distill.types import DistillError

SPLIT_FOLDERS = {"val": ("valid", "validation")}
"""Other names of a folder that holds the XML files and images of a split. Roboflow calls it `valid`."""
SPLIT_BOUNDS = (("train", 80), ("val", 90), ("test", 100))


class Voc:
    """The source `data=voc` reads XML annotations in the format of Pascal VOC.

    If `ImageSets/Main` does not exist, the folders of images and XML files are enough. A hash of its name then assigns
    each image with an XML file to train (80 %), val (10 %) or test (10 %). New images do not move old ones to another
    split. With two or more images, train and val get at least one image each. `train=mine/` uses all images of the
    folder `mine` instead.

    XML files may lie beside the images, in one folder or, as Roboflow writes them, in the folders `train`, `valid` and
    `test`. Folders may have subfolders. File extensions may be in upper or lower case; the list may give them, and a
    path. Names are compared in Unicode's composed form, and `%20` stands for a space if no file has `%20` in its name.
    If several images have the XML file's name, its `<filename>` decides. Tags are matched without case and namespace.

    Args:
        root: folder of the data set, with `Annotations`, `JPEGImages` and `ImageSets/Main`, or a folder of several data
            sets.
        train, val, test: one or several names of lists in `ImageSets/Main`. `VOC2007/trainval` is the list `trainval`
            in the folder `VOC2007` below `root`, so several years can be joined. None if the data set has no such
            split.
        classes, rename: see `ClassChoice`. Without `classes`, the classes are all names that occur in any split,
            sorted. A name of `classes` that occurs in no split gives a warning.
        one_based: whether corners count pixels from 1 and include the last pixel, as in VOC's own files. If so, 1 is
            subtracted from `xmin` and `ymin`. By default corners are not changed, because most tools count from 0.
        images, annotations: names of the two folders; None: the first of the usual names that exists.

    Raises:
        DistillError: `classes` is not a list of different names, or `rename` has another form.
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
        rename: Renames | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.lists = {
            split: [names] if isinstance(names, str) else list(names)
            for split, names in (("train", train), ("val", val), ("test", test))
            if names
        }
        self.choice = ClassChoice(classes, rename)
        self.one_based, self.image_folder, self.xml_folder = one_based, images, annotations
        self._pages: dict[str, list[XmlAnnotation]] = {}
        self._folders: dict[Path, VocFolder] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits whose lists exist, and train always. Reading a split with a missing list raises."""
        return tuple(split for split in self.lists if split == "train" or all(map(self._exists, self.lists[split])))

    def read_split(self, split: str) -> tuple[tuple[str, ...], Records]:
        """Read the class names and records of a split.

        Invalid objects are left out. The record of their image lists them as faults.

        Raises:
            DistillError: the split is not configured, a list or folder is missing, or no image of a list has an XML
                file (as in VOC2012's test).
        """
        if split not in self.lists:
            raise DistillError(f"data=voc has no split '{split}': set data.source.{split} to a list in ImageSets/Main")
        pages = self._read(split)
        own = {name for page in pages for name, _, _ in page.things if name}
        self.choice.require_known(own, self._discover, self.root, with_classes=False)
        if self.choice.classes is None:
            own = set(self._discover())
        absent = set(self.choice.classes or ()) - set(self.choice.rename_all(own))
        if absent and own and (absent := absent - set(self.choice.rename_all(self._discover()))):
            warnings.warn(f"data.source.classes: no XML names an object {', '.join(sorted(absent))}", stacklevel=2)
        names = sorted(own, key=lambda name: (self.choice.rename(name), name))
        labels = {name: label for label, name in enumerate(names, start=1)}
        records = pack_records([self._record(number, page, labels) for number, page in enumerate(pages, start=1)])
        return self.choice.select(names, records)

    def _discover(self) -> tuple[str, ...]:
        names: set[str] = set()
        faults: list[str] = []
        for split in self.splits:
            # A split without labels, such as VOC2012's test, must not stop training. Reading that split raises.
            with suppress(DistillError):
                pages = self._read(split)
                names.update(name for page in pages for name, _, _ in page.things if name)
                faults += [f"{page.xml}: {page.fault}" for page in pages if page.fault]
        if not names:
            unread = f" {len(faults)} of them cannot be used, such as {faults[0]}." if faults else ""
            raise DistillError(
                f"{self.root}: no XML names an object, so there are no classes.{unread} Correct the files, or give "
                "data.source.classes"
            )
        return tuple(sorted(names))

    def _read(self, split: str) -> list[XmlAnnotation]:
        if split not in self._pages:
            self._pages[split] = [page for name in self.lists[split] for page in self._read_list(split, name)]
        return self._pages[split]

    def _read_list(self, split: str, name: str) -> list[XmlAnnotation]:
        folder, members = self._members(split, name)
        if members and not any(xmls for _, xmls in members):
            raise DistillError(
                f"{folder.path}: none of the {len(members)} images of {split} has an XML: a split without labels can "
                f"neither be learned from nor measured by. Choose another list for data.source.{split}, or null"
            )
        return [folder.read_xml(member, xmls) for member, xmls in members]

    def _members(self, split: str, name: str) -> tuple[VocFolder, list[tuple[str, list[Path]]]]:
        """Return the folder of a list, and its members: the name and the XML files of each image."""
        year, _, members = name.rpartition("/")
        path = self.root / year
        if not path.is_dir():
            raise DistillError(
                f"{path}: no such folder; set data.source.root to the folder with the annotations and images"
            )
        lists = path / "ImageSets" / "Main"
        if not lists.is_dir() and (own := self._split_folder(path, members or split)):
            folder = self._open_folder(own, recursive=True)
            return folder, list(folder.xmls.by_path.items())
        folder = self._open_folder(path)
        if lists.is_dir():
            return folder, [folder.find_xmls(line) for line in _read_lines(lists / f"{members}.txt", split)]
        shares = _assign_splits(folder.xmls.by_path)
        chosen = [item for item in folder.xmls.by_path.items() if not members or shares[item[0]] == split]
        if not chosen:
            raise DistillError(
                f"{path}: of its {len(folder.xmls.by_path)} XMLs none is for {split}, as their names are hashed to "
                f"splits (train and val need two images, test more); add images, write the names "
                f"of its images into {lists / f'{members or split}.txt'}, or set data.source.{split}=null"
            )
        return folder, chosen

    def _exists(self, name: str) -> bool:
        year, _, members = name.rpartition("/")
        path = self.root / year
        lists = path / "ImageSets" / "Main"
        if lists.is_dir():
            return (lists / f"{members}.txt").is_file()
        has_split_folders = any(self._split_folder(path, split) for split, _ in SPLIT_BOUNDS)
        return not has_split_folders or self._split_folder(path, members) is not None

    def _split_folder(self, path: Path, split: str) -> Path | None:
        """Return the folder of a split whose XML files lie below it, such as `valid`; None if there is none."""
        if self._annotation_folder(path):
            return None
        folders = [path / name for name in (split, *SPLIT_FOLDERS.get(split, ()))]
        return next((folder for folder in folders if split and any(folder.rglob("*.[xX][mM][lL]"))), None)

    def _annotation_folder(self, path: Path) -> Path | None:
        """Return the folder of the XML files. It is a folder of images if the XML files lie beside them."""
        if self.xml_folder:
            return path / self.xml_folder if (path / self.xml_folder).is_dir() else None
        usual = (path / name for name in ANNOTATION_FOLDERS)
        beside = (path / name for name in (*filter(None, [self.image_folder]), *IMAGE_FOLDERS, "."))
        return next((folder for folder in usual if folder.is_dir()), None) or next(
            (folder for folder in beside if _holds(folder, XML_SUFFIXES)), None
        )

    def _open_folder(self, path: Path, recursive: bool = False) -> VocFolder:
        """Find the XML files and images of a folder. Only with ``recursive`` its own subfolders are searched."""
        if path not in self._folders:
            annotations = self._annotation_folder(path) or (path if recursive and not self.xml_folder else None)
            if annotations is None:
                wanted = " or ".join([self.xml_folder] if self.xml_folder else ANNOTATION_FOLDERS)
                raise DistillError(
                    f"{path}: expected a folder {wanted} in it, or XML files beside the images; set "
                    "data.source.annotations"
                )
            names = [self.image_folder] if self.image_folder else IMAGE_FOLDERS
            images = next((path / name for name in names if (path / name).is_dir()), None)
            if images is None and not self.image_folder and (recursive or _holds(annotations, IMAGE_SUFFIXES)):
                images = annotations
            if images is None:
                raise DistillError(f"{path}: expected a folder {' or '.join(names)} in it; set data.source.images")
            self._folders[path] = VocFolder(
                path,
                FileIndex(annotations, XML_SUFFIXES, recursive or annotations != path),
                FileIndex(images, IMAGE_SUFFIXES, recursive or images != path),
            )
        return self._folders[path]

    def _record(self, number: int, page: XmlAnnotation, labels: Mapping[str, int]) -> Record:
        where = str(page.xml)
        if page.image is None or page.fault:
            return make_unusable_record(where, [f"{where}: {page.fault}"], str(page.image or page.xml.stem))
        notes, faults = [], []
        for place, (name, corners, difficult) in enumerate(page.things):
            if not name:
                faults.append(f"{where}: object {place} has no name; write it, or remove the object")
            elif not corners:
                faults.append(f"{where}: object {place} ({name}) needs a bndbox of four numbers; fix or remove it")
            else:
                x1, y1, x2, y2 = corners
                if self.one_based:
                    x1, y1 = x1 - 1, y1 - 1
                area = (x2 - x1) * (y2 - y1)
                notes.append(Annotation((x1, y1, x2, y2), labels[name], area, False, difficult, place, None))
        record = make_record(number, str(page.image), page.size, notes, where)
        record.faults = faults
        return record


@dataclass(frozen=True)
class VocFolder:
    """The XML files and images of one data set, or of one split of it."""

    path: Path
    xmls: FileIndex
    images: FileIndex

    def find_xmls(self, line: str) -> tuple[str, list[Path]]:
        """Return the image name of a line of a list, and its XML files.

        A mark may follow the name, as in VOC's lists of one class, or the path of the XML file.
        """
        for name in (line, line.rsplit(maxsplit=1)[0], line.split()[0]):  # a name may have spaces
            if xmls := self.xmls.find(name):
                return name, xmls
        name, _, mark = line.rpartition(" ")
        return (name.rstrip() if mark in ("-1", "0", "1") and name else line), []

    def read_xml(self, name: str, xmls: Sequence[Path]) -> XmlAnnotation:
        """Read the XML file of an image name, and find its image. ``xmls`` are the files of this name."""
        if len(xmls) != 1:
            *_, stem = spellings(name)
            others = ", ".join(str(xml) for xml in xmls)
            fault = f"several XMLs have this name: {others}; keep one of them" if xmls else MISSING_XML
            return XmlAnnotation(self.xmls.folder / f"{stem}.xml", None, fault=fault)
        (xml,) = xmls
        path = normalize("NFC", xml.relative_to(self.xmls.folder).with_suffix("").as_posix())
        return parse_xml(xml, self.images.find(path))


def _holds(folder: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file with one of the extensions lies in the folder itself."""
    return folder.is_dir() and any(
        file.suffix.lower() in suffixes and not file.name.startswith(".") for file in folder.iterdir()
    )


def _read_lines(path: Path, split: str) -> list[str]:
    """Read the lines of a list."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except FileNotFoundError:
        known = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise DistillError(
            f"{path}: no such list; there are {', '.join(known[:12]) or 'none'}: set data.source.{split}"
        ) from None
    except (OSError, ValueError) as error:
        raise DistillError(f"{path}: cannot be read as a list of names ({error}); write it again") from error
    return [line for line in lines if line]


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
