"""The source of data sets in COCO's format: one JSON file of images, annotations and categories for each split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from reprlib import repr as shown
from urllib.parse import unquote

import numpy as np

from distill.data.class_names import ClassChoice, Renames, relabel
from distill.data.coco_file import Content, load_content
from distill.data.copies import unify_copies
from distill.data.file_index import FileIndex, spellings
from distill.data.packed_bytes import PackedBytes
from distill.data.records import (
    Records,
    join_records,
    make_unusable_record,
    pack_records,
    paused_garbage_collection,
)
from distill.imaging.decoding import IMAGE_SUFFIXES
from distill.types import DistillError

SplitFiles = Mapping[str, str | Sequence[str] | None]
"""The entries `annotations` (one or several JSON files) and `images` (folders) of a split."""
SAMPLED_NAMES = 100
"""Number of names by which the image folder is chosen."""


class Coco:
    """The source `data=coco` reads any file in the format of COCO's `instances_*.json`.

    The categories are the classes, in ascending order of their ids. The ids may start at 0 and may have gaps. The
    attribute `category_ids` maps each label to its category id in the last file read. Crowds are no training targets.
    The records keep them because evaluation ignores detections on crowds.

    If `images` is None, the image folder is the one of these that contains most images of the JSON file: the folder of
    the JSON file, `root`, `root/images`, and the folder in one of these two that is named like a part of the JSON
    file's name (`train2017` for `instances_train2017.json`). If none of them contains any, the folder of the JSON file
    and `root` are searched, with their subfolders. A `file_name` must not lead out of both the image folder and `root`.
    If no file has the name, it is looked up as by `FileIndex`: in other spellings, by its end, with an extension in
    another case.

    The classes are those of train. The other splits may list fewer categories, and other ids for them: their categories
    are matched by name. Boxes of a class that train lacks are refused if train is read, too, unless `classes` is given.
    A category that has the name of another and no annotation is dropped. Ids may be texts of digits. The ids of
    annotations are not used.

    Several annotation files of a split are joined. Their categories are matched by name. If they share image ids, the
    images are numbered anew. An image that occurs in two files with the same boxes counts once; with other boxes, it is
    a fault.

    Args:
        root: folder that all paths of the splits are relative to.
        train, val, test: a mapping with `annotations` (the JSON file, or a list of them) and `images` (the folder of
            the image files, a list with a folder for each JSON file, or None). None if the data set has no such split.
        classes, rename: see `ClassChoice`.

    Raises:
        DistillError: a split is not a mapping of these two keys, or `classes` or `rename` has another form.
    """

    masks = True

    def __init__(
        self,
        root: str,
        train: SplitFiles | None = None,
        val: SplitFiles | None = None,
        test: SplitFiles | None = None,
        classes: Sequence[str] | None = None,
        rename: Renames | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = {"train": train, "val": val, "test": test}
        self.choice = ClassChoice(classes, rename)
        self.category_ids: dict[int, int] = {}
        self._train_categories: dict[str, int] | None = None
        self._is_train_read = False
        for split, files in self.files.items():
            if files is not None and not (isinstance(files, Mapping) and set(files) <= {"annotations", "images"}):
                raise DistillError(
                    f"data.source.{split}: expected 'annotations' and 'images', got {shown(files)}; "
                    f"set data.source.{split}.annotations to the JSON"
                )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have an annotation file."""
        return tuple(split for split, files in self.files.items() if files and files.get("annotations"))

    @paused_garbage_collection()
    def read_split(self, split: str) -> tuple[tuple[str, ...], Records]:
        """Read the class names and records of a split.

        Invalid images and annotations are left out. An unusable record lists them as faults.

        Raises:
            DistillError: the split is not configured, a file is missing or is not JSON, one of the lists `images`,
                `annotations` and `categories` is missing, a category is invalid, or a name of `classes` or `rename` is
                unknown.
        """
        if split not in self.splits:
            raise DistillError(f"data=coco has no split '{split}': set data.source.{split}.annotations to its JSON")
        contents = self._load(split)
        if split == "train":
            self._is_train_read = True
        classes, self.category_ids = self._match_classes(split, contents)
        parts = []
        for (path, content), images in zip(contents, self._image_folders(split), strict=True):
            records = self._locate_images(content, path, images)
            relabel(records, [self.choice.rename(name) for name in content.classes], classes)
            parts.append(records)
        if len(parts) > 1:
            _make_ids_unique(parts)
            unify_copies(parts)
        faults = [
            pack_records([make_unusable_record(str(path), content.faults)])
            for path, content in contents
            if content.faults
        ]
        return classes, join_records([*parts, *faults])

    def _load(self, split: str) -> list[tuple[Path, Content]]:
        """Return the annotation files of a split and their content."""
        paths = [self.root / name for name in _as_list((self.files[split] or {}).get("annotations"))]
        return [(path, load_content(path, split)) for path in paths]

    def _image_folders(self, split: str) -> list[Path | None]:
        """Return the given image folder of each annotation file."""
        files = self.files[split] or {}
        count, folders = len(_as_list(files.get("annotations"))), _as_list(files.get("images"))
        if len(folders) not in (0, 1, count):
            raise DistillError(
                f"data.source.{split}.images: expected one folder, or one for each of the {count} annotation files, "
                f"got {len(folders)}"
            )
        places: list[Path | None] = [self.root / folder for folder in folders] or [None]
        return places * count if len(places) == 1 else places

    def _match_classes(
        self, split: str, contents: Sequence[tuple[Path, Content]]
    ) -> tuple[tuple[str, ...], dict[int, int]]:
        """Return the classes, and a mapping of label to the id of the category in the files of a split."""
        own_ids, where = self._name_categories(contents), ", ".join(str(path) for path, _ in contents)
        self.choice.require_known(
            [name for _, content in contents for name in content.classes],
            self._all_names,
            where,
        )
        train_ids = own_ids if split == "train" else self._read_train_categories() or own_ids
        classes = self.choice.classes or tuple(train_ids)
        unknown = () if self.choice.classes else self._find_unknown_classes(contents, classes)
        if unknown and self._is_train_read:
            raise DistillError(
                f"{where}: has boxes of the classes {', '.join(unknown)}, which train lacks; its "
                f"classes are {', '.join(classes)}. Rename them with data.source.rename, or choose the classes to use "
                "with data.source.classes"
            )
        if unknown:  # evaluation alone compares the classes with those of the model
            classes = tuple(own_ids)
        ids: dict[int, int] = {label: own_ids[name] for label, name in enumerate(classes, start=1) if name in own_ids}
        for label, name in enumerate(classes, start=1):
            taken = set(own_ids.values()) | set(ids.values())
            number = train_ids.get(name, 1)
            ids.setdefault(label, number if number not in taken else max(taken) + 1)
        return classes, ids

    def _name_categories(self, contents: Sequence[tuple[Path, Content]]) -> dict[str, int]:
        """Return the classes of joined files after the renames, each with the id of its category.

        The first file that has the class gives the id, and in this file a category that is not renamed. A class whose
        id is taken by another class gets the next free id.
        """
        ids: dict[str, int] = {}
        for _, content in contents:
            own = dict(zip(content.classes, content.category_ids, strict=True))
            for name in self.choice.rename_all(own):
                old = next(
                    old for old in sorted(own, key=lambda other: other != name) if self.choice.rename(old) == name
                )
                if name not in ids:
                    ids[name] = own[old] if own[old] not in ids.values() else max(ids.values()) + 1
        return ids

    def _find_unknown_classes(self, contents: Sequence[tuple[Path, Content]], classes: Sequence[str]) -> list[str]:
        """Return the classes that have boxes and are not in the list."""
        used = {
            self.choice.rename(content.classes[label - 1])
            for _, content in contents
            for label in np.unique(content.records.labels).tolist()
        }
        return sorted(used - set(classes))

    def _read_train_categories(self) -> dict[str, int] | None:
        """Return the classes of train and their category ids, or None if there is no readable file of train."""
        if self._train_categories is None and "train" in self.splits:
            with suppress(DistillError):  # reading train itself raises
                self._train_categories = self._name_categories(self._load("train"))
        return self._train_categories

    def _all_names(self) -> list[str]:
        """Return the names of the categories of all splits that can be read, as the files write them."""
        names: dict[str, None] = {}
        for split in self.splits:
            with suppress(DistillError):
                names |= dict.fromkeys(name for _, content in self._load(split) for name in content.classes)
        return list(names)

    def _locate_images(self, content: Content, path: Path, given: Path | None) -> Records:
        """Return the records of an annotation file, with the paths of their images."""
        names = content.records.files.texts()
        chosen = given or self._choose_folder(path, names)
        folder, searched = chosen or path.parent, [chosen] if chosen else [path.parent, self.root]
        listings: dict[str, set[str]] = {}
        indexes: dict[Path, FileIndex] = {}
        files: list[str] = []
        corrected = 0
        outside = []
        for place, name in enumerate(names):
            parent, _, last = name.rpartition("/")
            if parent not in listings:
                try:
                    listings[parent] = set(os.listdir(folder / parent))
                except (OSError, ValueError):
                    listings[parent] = set()
            file = str(folder / name)
            if last not in listings[parent] or not self._holds(folder, name):
                for home in searched:
                    if home not in indexes:
                        indexes[home] = FileIndex(home, IMAGE_SUFFIXES, recursive=True)
                found = next(filter(None, (indexes[home].find_file(name) for home in searched)), None)
                if found is not None:
                    file, corrected = str(found), corrected + 1
                elif not all(self._holds(folder, spelling) for spelling in (name, *spellings(name))):
                    outside.append(place)
                    file = name
            files.append(file)
        records = replace(
            content.records,
            files=PackedBytes.pack_texts(files),
            annotation_files=PackedBytes.repeat(str(path).encode("utf-8", "surrogateescape"), len(names)),
            unusable=np.zeros(len(names), dtype=np.bool_),
            faults={},
            remarks=Counter(content.remarks),
        )
        records.remarks["file names written in another form"] += corrected
        for place in outside:
            message = f"'file_name' {shown(names[place])} leads out of {folder} and of data.source.root"
            records.add_fault(place, f"{path}: image {records.ids[place]}: {message}; name a file inside")
            records.unusable[place] = True
        return records

    def _choose_folder(self, path: Path, names: Sequence[str]) -> Path | None:
        """Return the usual folder that holds most of the images, or None if no such folder holds any."""
        parts = reversed(path.stem.split("_"))  # train2017 of instances_train2017
        usual = [path.parent, self.root, self.root / "images"]
        usual += [home / part for part in parts for home in (self.root, self.root / "images")]
        sample = names[:: max(1, len(names) // SAMPLED_NAMES)]
        for some in (sample, names):
            counts = [sum(_is_file(folder, name) for name in some) for folder in usual]
            if any(counts):
                return usual[counts.index(max(counts))]
        return None

    def _holds(self, folder: Path, name: str) -> bool:
        """Whether the path of a file lies in the image folder or in `root`.

        Symbolic links are not resolved: the owner of the folder may link to files elsewhere.
        """
        if ".." not in name and ":" not in name and name[:1] not in ("/", "\\"):
            return True
        place = Path(os.path.abspath(folder / name))
        return any(place.is_relative_to(os.path.abspath(home)) for home in (folder, self.root))


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    """Return one or several names as a list."""
    return [str(value)] if isinstance(value, str) else [str(name) for name in value or ()]


def _is_file(folder: Path, name: str) -> bool:
    """Whether a name, or the last part of an absolute path, is a file in a folder."""
    slashes = name.replace("\\", "/")
    forms = {name: None, slashes: None, unquote(slashes): None}
    if PureWindowsPath(slashes).root:
        forms[PurePosixPath(unquote(slashes)).name] = None
    return any(os.path.isfile(folder / form) for form in forms)


def _make_ids_unique(parts: Sequence[Records]) -> None:
    """Number the images of joined files anew, from 1, if an id occurs in more than one of them."""
    ids = np.concatenate([np.unique(part.ids) for part in parts])
    if len(np.unique(ids)) == len(ids):
        return
    first = 1
    for part in parts:
        own, places = np.unique(part.ids, return_inverse=True)  # ids that repeat in one file stay equal, for the checks
        part.ids = places.reshape(-1) + first
        first += len(own)
    parts[0].remarks["image ids numbered anew, as the joined files share some"] += first - 1
