"""The source of data sets in COCO's format: one JSON file of images, annotations and categories for each split."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shown
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from distill.data.coco_file import Content, load_content
from distill.data.records import PackedBytes, Records, paused_garbage_collection
from distill.types import DistillError

SplitFiles = Mapping[str, str | None]
"""The entries `annotations` (JSON file) and `images` (folder) of a split."""
SAMPLED_NAMES = 100
"""Number of names by which the image folder is chosen."""


class Coco:
    """The source `data=coco` reads any file in the format of COCO's `instances_*.json`.

    The categories are the classes, in ascending order of their ids. The ids may start at 0 and may have gaps. The
    attribute `category_ids` maps each label to its category id in the last file read. Crowds are no training targets.
    The records keep them because evaluation ignores detections on crowds.

    If `images` is None, the image folder is the one of these that contains most images of the JSON file: the folder of
    the JSON file, `root`, `root/images`, and the folder in `root` that is named like the last part of the JSON file's
    name (`train2017` for `instances_train2017.json`). If none of them contains any, the folder of the JSON file is
    used. A `file_name` must not lead out of both the image folder and `root`. If no file has the name, the forms of
    `name_forms` are tried.

    The classes are those of train. The other splits may list fewer categories, and other ids for them: their categories
    are matched by name. Boxes of a class that train lacks are refused if train is read, too. A category that has the
    name of another and no annotation is dropped. Ids may be texts of digits. The ids of annotations are not used.

    Args:
        root: folder that all paths of the splits are relative to.
        train, val, test: a mapping with `annotations` (the JSON file) and `images` (the folder of the image files, or
            None). None if the data set has no such split.

    Raises:
        DistillError: a split is not a mapping of these two keys.
    """

    masks = True

    def __init__(
        self, root: str, train: SplitFiles | None = None, val: SplitFiles | None = None, test: SplitFiles | None = None
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = {"train": train, "val": val, "test": test}
        self.category_ids: dict[int, int] = {}
        self._train_classes: tuple[tuple[str, ...], list[int]] | None = None
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
            DistillError: the split is not configured, its file is missing or is not JSON, one of the lists `images`,
                `annotations` and `categories` is missing, or a category is invalid.
        """
        files = self.files.get(split)
        if not files or not files.get("annotations"):
            raise DistillError(f"data=coco has no split '{split}': set data.source.{split}.annotations to its JSON")
        path = self.root / str(files["annotations"])
        content = load_content(path, split)
        if split == "train":
            self._train_classes, self._is_train_read = (content.classes, content.category_ids), True
        classes, labels, self.category_ids = self._match_classes(content, path)
        names = content.names.texts()
        folder = self.root / str(files["images"]) if files.get("images") else self._folder(path, names)
        corrected = _correct_names(folder, names)
        records = self._make_records(content, labels, [corrected.get(name, name) for name in names], folder, path)
        records.remarks.update(content.remarks)
        records.remarks["file names written in another form"] += len(corrected)
        return classes, records

    def _match_classes(self, content: Content, path: Path) -> tuple[tuple[str, ...], NDArray[np.int64], dict[int, int]]:
        """Return the classes of train, the labels of the annotations among them, and a mapping of label to id."""
        own_ids = dict(zip(content.classes, content.category_ids, strict=True))
        train = self._read_train_classes()
        if train is None or content.classes == train[0]:
            return content.classes, content.labels, dict(enumerate(content.category_ids, start=1))
        classes, train_ids = train
        places = {name: label for label, name in enumerate(classes, start=1)}
        used = {content.classes[label - 1] for label in np.unique(content.labels).tolist()}
        unknown = sorted(used - set(classes))
        if unknown and not self._is_train_read:  # evaluation alone compares the classes with those of the model
            return content.classes, content.labels, dict(enumerate(content.category_ids, start=1))
        if unknown:
            raise DistillError(
                f"{path}: has boxes of the classes {', '.join(unknown)}, which train lacks; its classes are "
                f"{', '.join(classes)}. Rename the categories, or remove their annotations"
            )
        labels = np.array([0, *(places.get(name, 0) for name in content.classes)], dtype=np.int64)[content.labels]
        ids: dict[int, int] = {places[name]: own_ids[name] for name in classes if name in own_ids}
        for name, number in zip(classes, train_ids, strict=True):
            taken = set(own_ids.values()) | set(ids.values())
            ids.setdefault(places[name], number if number not in taken else max(taken) + 1)
        return classes, labels, ids

    def _read_train_classes(self) -> tuple[tuple[str, ...], list[int]] | None:
        """Return the class names of train and their category ids, or None if there is no readable file of train."""
        files = self.files.get("train")
        if self._train_classes is None and files and files.get("annotations"):
            with suppress(DistillError):  # reading train itself raises
                content = load_content(self.root / str(files["annotations"]), "train")
                self._train_classes = content.classes, content.category_ids
        return self._train_classes

    def _make_records(
        self, content: Content, labels: NDArray[np.int64], names: Sequence[str], folder: Path, path: Path
    ) -> Records:
        count = len(names)
        outside = [index for index, name in enumerate(names) if not self._holds(folder, name)]
        files = [str(folder / name) for name in names]
        for index in outside:
            files[index] = names[index]
        records = Records(
            ids=content.ids,
            files=PackedBytes.pack_texts(files),
            sizes=content.sizes,
            annotation_files=PackedBytes.repeat(str(path).encode("utf-8", "surrogateescape"), count),
            file_sizes=np.full(count, -1, dtype=np.int64),
            unusable=np.zeros(count, dtype=np.bool_),
            ends=content.ends,
            boxes=content.boxes,
            labels=labels,
            crowd=content.crowd,
            difficult=np.zeros(len(labels), dtype=np.bool_),
            area=content.area,
            annotation_indices=content.annotation_indices,
            segmentations=content.segmentations,
        )
        for index in outside:
            message = f"'file_name' {shown(names[index])} leads out of {folder} and of data.source.root"
            records.add_fault(index, f"{path}: image {records.ids[index]}: {message}; name a file inside")
            records.unusable[index] = True
        return records.with_file_faults(str(path), content.faults) if content.faults else records

    def _folder(self, path: Path, names: Sequence[str]) -> Path:
        usual = (path.parent, self.root, self.root / "images", self.root / path.stem.rpartition("_")[2])
        sample = names[:: max(1, len(names) // SAMPLED_NAMES)]
        for some in (sample, names):
            counts = [sum(_find_form(folder, name) is not None for name in some) for folder in usual]
            if any(counts):
                return usual[counts.index(max(counts))]
        return path.parent

    def _holds(self, folder: Path, name: str) -> bool:
        """Whether the path of a file lies in the image folder or in `root`.

        Symbolic links are not resolved: the owner of the folder may link to files elsewhere.
        """
        if ".." not in name and ":" not in name and name[0] not in "/\\":
            return True
        place = Path(os.path.abspath(folder / name))
        return any(place.is_relative_to(os.path.abspath(home)) for home in (folder, self.root))


def name_forms(name: str) -> list[str]:
    """Return other forms of a file name that tools write: `/` for a backslash, decoded `%20`, other Unicode forms."""
    forms = []
    for decoded in (name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/")):
        forms += [decoded, *(unicodedata.normalize(form, decoded) for form in ("NFC", "NFD"))]
    return [form for form in dict.fromkeys(forms) if form and form != name and "\0" not in form]


def _find_form(folder: Path, name: str) -> str | None:
    """Return the form of a name that is a file in the folder, or None."""
    return next((form for form in (name, *name_forms(name)) if os.path.isfile(folder / form)), None)


def _correct_names(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return a mapping of the names that only have a file in another form to this form."""
    listings: dict[str, set[str]] = {}
    corrected = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent not in listings:
            try:
                listings[parent] = set(os.listdir(folder / parent))
            except (OSError, ValueError):
                listings[parent] = set()
        if last not in listings[parent] and name_forms(name):
            form = _find_form(folder, name)
            if form not in (None, name):
                corrected[name] = str(form)
    return corrected
