"""Pascal VOC's format: one XML per image, splits as lists of names, or two plain folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, parse

from distill.data.records import Record, record
from distill.types import DistillError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGES = ("JPEGImages", "images", "Images", "imgs")
ANNOTATIONS = ("Annotations", "annotations", "xmls", "labels")
SHARES = (("train", 80), ("val", 90), ("test", 100))


class Voc:
    """The source ``data=voc``.

    Args:
        root: folder of the data set, with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``; or of several such.
        train, val, test: names of lists in ``ImageSets/Main``, one or several; ``VOC2007/trainval`` is list trainval in
            the folder VOC2007 below root, so that years can be joined. None for a split that there is not.
        classes: class names in the order of their labels; None: all names that occur in any split, sorted.
        one_based: whether corners count pixels from 1 and include the last one, as in VOC's own files: 1 is then
            subtracted from xmin and ymin. By default they are taken as they stand, as most tools write them.
        images, annotations: names of the two folders; None: the first of the usual ones that exists.

    Without ``ImageSets/Main`` the two folders alone are enough: each image with an XML goes, by a hash of its name, to
    train (80 %), val or test (10 % each), so that new images do not move old ones. Extensions may be in any case.
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
        self.names = None if classes is None else tuple(classes)
        self.one_based, self.image_folder, self.xml_folder = one_based, images, annotations
        self._trees: dict[str, list[tuple[Path, Path | None, Any]]] = {}
        self._index: dict[Path, dict[str, Path]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose lists exist; the missing list of a split is only an error when it is read."""
        return tuple(split for split in self.lists if split == "train" or all(map(self._exists, self.lists[split])))

    def read(self, split: str) -> tuple[tuple[str, ...], list[Record]]:
        """Class names and records of a split.

        Raises:
            DistillError: missing lists or folders, or a split without any label (VOC2012's test, say).
        """
        if split not in self.lists:
            raise DistillError(f"data=voc has no split '{split}': set data.source.{split} to a list in ImageSets/Main")
        classes = self.names or self._discover()
        labels = {name: label for label, name in enumerate(classes, start=1)}
        rows = self._parsed(split)
        return classes, [self._record(number, *row, labels) for number, row in enumerate(rows, start=1)]

    def _discover(self) -> tuple[str, ...]:
        found = {
            _text(thing, "name")
            for split in self.splits
            for _, _, tree in self._parsed(split)
            if tree is not None and not isinstance(tree, str)
            for thing in tree.iter("object")
        }
        if not found - {""}:
            raise DistillError(
                f"{self.root}: no XML names an object, so there are no classes; give data.source.classes"
            )
        return tuple(sorted(found - {""}))

    def _parsed(self, split: str) -> list[tuple[Path, Path | None, Any]]:
        """(XML, image or None, tree or what is wrong with it) of every image of a split."""
        if split not in self._trees:
            found = []
            for folder, stems in map(self._members, self.lists[split], [split] * len(self.lists[split])):
                xmls = self._files(folder, self.xml_folder, ANNOTATIONS, (".xml",))
                images = self._files(folder, self.image_folder, IMAGES, SUFFIXES)
                if stems and not any(stem in xmls for stem in stems):
                    raise DistillError(
                        f"{folder}: none of the {len(stems)} images of {split} has an XML: a test set without labels can "
                        f"neither be learned from nor measured by. Choose another list for data.source.{split}, or null"
                    )
                found += [(xmls.get(s, folder / f"{s}.xml"), images.get(s), _tree(xmls.get(s))) for s in stems]
            self._trees[split] = found
        return self._trees[split]

    def _home(self, name: str) -> tuple[Path, str]:
        year, _, members = name.rpartition("/")
        return self.root / year, members

    def _exists(self, name: str) -> bool:
        folder, members = self._home(name)
        return (
            not (folder / "ImageSets" / "Main").is_dir() or (folder / "ImageSets" / "Main" / f"{members}.txt").is_file()
        )

    def _members(self, name: str, split: str) -> tuple[Path, list[str]]:
        folder, members = self._home(name)
        lists = folder / "ImageSets" / "Main"
        if not folder.is_dir():
            raise DistillError(
                f"{folder}: no such folder; set data.source.root to the one that holds Annotations and images"
            )
        if not lists.is_dir():
            stems = sorted(self._files(folder, self.xml_folder, ANNOTATIONS, (".xml",)))
            return folder, [stem for stem in stems if _share(stem) == split]
        path = lists / f"{members}.txt"
        if not path.is_file():
            known = sorted(file.stem for file in lists.glob("*.txt"))
            raise DistillError(f"{path}: no such list; there are {', '.join(known[:12])}: set data.source.{split}")
        return folder, [line.split()[0] for line in path.read_text().splitlines() if line.strip()]

    def _files(self, folder: Path, given: str | None, usual: Sequence[str], suffixes: Sequence[str]) -> dict[str, Path]:
        wanted = [given] if given else usual
        place = next((folder / name for name in wanted if (folder / name).is_dir()), None)
        if place is None:
            raise DistillError(
                f"{folder}: expected a folder {' or '.join(wanted)} in it; set data.source.images and .annotations"
            )
        key = place / suffixes[0]
        if key not in self._index:
            self._index[key] = {file.stem: file for file in sorted(place.iterdir()) if file.suffix.lower() in suffixes}
        return self._index[key]

    def _record(self, number: int, xml: Path, image: Path | None, tree: Any, labels: dict[str, int]) -> Record:
        if image is None or tree is None or isinstance(tree, str):
            fault = f"{xml}: {tree or 'no such file'}" if image else f"{xml}: no image of this name ({xml.stem}.*)"
            found = record(number, str(image or xml.with_suffix("")), None, [])
            found.faults, found.broken = [fault], True
            return found
        notes, faults = [], []
        for place, thing in enumerate(tree.iter("object")):
            name = _text(thing, "name")
            try:
                box = [float(_text(thing, f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
            except ValueError:
                faults.append(f"{xml}: object {place} ({name}) needs a bndbox with four numbers")
                continue
            if name not in labels:
                faults.append(f"{xml}: object {place} is a '{name}', which is no class; known: {', '.join(labels)}")
                continue
            x1, y1, x2, y2 = box
            if self.one_based:
                x1, y1 = x1 - 1, y1 - 1
            difficult = _text(thing, "difficult") in ("1", "true", "True")
            notes.append(([x1, y1, x2, y2], labels[name], False, difficult, (x2 - x1) * (y2 - y1)))
        found = record(number, str(image), _stated_size(tree), notes)
        found.faults = faults
        return found


def _tree(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return parse(path).getroot()
    except (ParseError, DefusedXmlException, OSError, ValueError) as error:
        return f"cannot be read as XML ({error})"


def _text(node: Any, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _stated_size(tree: Any) -> tuple[int, int] | None:
    try:
        height, width = int(float(_text(tree, "size/height"))), int(float(_text(tree, "size/width")))
    except ValueError:
        return None
    return (height, width) if height and width else None


def _share(stem: str) -> str:
    place = int(hashlib.sha1(stem.encode()).hexdigest(), 16) % 100
    return next(split for split, end in SHARES if place < end)
