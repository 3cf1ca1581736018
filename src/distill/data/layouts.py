"""Recognizes the format of a data set from its files, and names the options that read it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distill.quoting import quote_value
from distill.types import DistillError

DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
"""Names of YOLO's file of classes and splits, in the order in which they are looked up."""
SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Split -> its keys in a `data.yaml`, and names of its folder."""
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs")
ANNOTATION_FOLDERS = ("Annotations", "annotations", "xmls", "labels")
"""Usual folders of VOC's images and XML files."""
HEAD_BYTES = 65536
"""Bytes of a JSON file in which one of the keys of COCO's format is expected."""
COCO_KEYS = ('"images"', '"annotations"', '"categories"')
LOOKED_FOR = (
    "COCO (a JSON file for each split), VOC (folders Annotations and JPEGImages, or XML files beside the images in "
    "train/, valid/ and test/) or YOLO (data.yaml, or images/train and labels/train)"
)


@dataclass(frozen=True)
class Layout:
    """The format of a data set and the options that read it."""

    option: str
    """Option of the config group ``data``: ``coco``, ``voc`` or ``yolo``."""
    description: str
    """What was found, for a message."""
    settings: Mapping[str, str | None] = field(default_factory=dict)
    """Keys below ``data.source`` and their values. None stands for null."""


def recognize(path: Path, given: Collection[str] = ()) -> Layout:
    """Recognize the format of a data set.

    Args:
        path: its folder, an annotation file of COCO's format, or a ``data.yaml`` of YOLO's format.
        given: keys below ``data.source`` that are set already, such as ``val.annotations``. They need no file here.

    Raises:
        DistillError: the path does not exist, not exactly one format is recognized, or train has no file.
    """
    if not path.exists():
        raise DistillError(f"{path}: no such file or folder")
    if path.is_file():
        return _recognize_file(path, given)
    layouts = [layout for layout in (_find_yolo(path), _find_coco(path, given), _find_voc(path)) if layout is not None]
    if not layouts:
        raise DistillError(
            f"{path}: no data set recognized. Expected {LOOKED_FOR}; or name the format: data=voc "
            f"data.source.root={path}"
        )
    if len(layouts) > 1:
        formats = " and ".join(layout.description for layout in layouts)
        raise DistillError(
            f"{path}: holds {formats}. Name the one to use: data={layouts[0].option} data.source.root={path}"
        )
    return layouts[0]


def _recognize_file(path: Path, given: Collection[str]) -> Layout:
    if path.suffix.lower() in (".yaml", ".yml"):
        return Layout("yolo", f"YOLO, {path.name}", {"root": str(path)})
    if path.suffix.lower() == ".json" and _is_coco(path):
        folder = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        split = split_of(folder, path)
        if split in (None, "train"):
            return _coco(folder, _coco_splits(folder, given, train=path), given)
        raise DistillError(f"{path}: its name says {split}, not train. Give the training annotation file or its folder")
    raise DistillError(f"{path}: expected a folder, a JSON file of COCO's format, or a data.yaml of YOLO's format")


def find_description(folder: Path) -> Path | None:
    """Return the file of a YOLO folder that lists classes and splits, or None."""
    usual = [folder / name for name in DESCRIPTIONS]
    others = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if folder.is_dir() else []
    return next((file for file in [*usual, *(others if len(others) == 1 else ())] if file.is_file()), None)


def _find_yolo(folder: Path) -> Layout | None:
    description = find_description(folder)
    if description is not None and description.name in DESCRIPTIONS:
        return Layout("yolo", f"YOLO, {description.name}", {"root": str(folder)})
    if any((folder / "labels" / name).is_dir() or (folder / name / "labels").is_dir() for name in SPLIT_KEYS["train"]):
        return Layout("yolo", "YOLO, folders images and labels", {"root": str(folder)})
    return None


def _find_coco(folder: Path, given: Collection[str]) -> Layout | None:
    files = _coco_splits(folder, given)
    return _coco(folder, files, given) if files else None


def _coco_splits(folder: Path, given: Collection[str], train: Path | None = None) -> dict[str, Path]:
    """Split -> annotation file, by file and folder names; `train`, if given, is the file of that split."""
    candidates = [file for file in _json_files(folder) if _is_coco(file)]
    named: dict[str, list[Path]] = {}
    for file in candidates:
        named.setdefault(split_of(folder, file) or "", []).append(file)
    if train is not None:
        named["train"] = [train]
    elif len(candidates) == 1 and list(named) == [""]:
        return {"train": candidates[0]}
    splits = {split: named.get(split, []) for split in SPLIT_KEYS}
    for split, files in splits.items():
        if f"{split}.annotations" in given:
            splits[split] = files[:1]
            continue
        instances = [file for file in files if file.name.startswith("instances_")] or files
        if len(instances) > 1:
            names = ", ".join(str(file.relative_to(folder)) for file in instances)
            key = f"data.source.{split}.annotations"
            both = ",".join(quote_value(str(file.relative_to(folder)), mark='"') for file in instances)
            raise DistillError(
                f"{folder}: several annotation files are for {split}: {names}. Join them after data={folder}: "
                f"{shlex.quote(f'{key}=[{both}]')}, or name one: {key}={instances[0].relative_to(folder)}"
            )
        splits[split] = instances
    return {split: files[0] for split, files in splits.items() if files}


def _json_files(folder: Path) -> Iterator[Path]:
    """JSON files in the folder and two levels below, without hidden ones."""
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        for file in sorted(folder.glob(pattern)):
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                yield file


def _is_coco(file: Path) -> bool:
    """Whether a JSON file has the keys of COCO's format, as far as its beginning shows."""
    try:
        with file.open("rb") as stream:
            start = stream.read(HEAD_BYTES)
    except OSError:
        return False
    head = start.decode(json.detect_encoding(start), errors="replace")
    if len(start) < HEAD_BYTES:
        try:
            content = json.loads(head)
        except ValueError:
            return all(key in head for key in COCO_KEYS)  # the data source says what is wrong
        return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()
    return head.lstrip().startswith("{") and any(key in head for key in COCO_KEYS)


def split_of(folder: Path, file: Path) -> str | None:
    """Return the split named by the file name, or else by its folder names, the innermost first."""
    parts = [file.stem, *reversed(file.relative_to(folder).parts[:-1]), folder.name]
    for part in parts:
        words = "".join(letter if letter.isalpha() else " " for letter in part.lower()).split()
        for split, names in SPLIT_KEYS.items():
            if set(words) & {*names, f"{split}set", *(["minival", "dev"] if split == "val" else [])}:
                return split
    return None


def _coco(folder: Path, files: Mapping[str, Path], given: Collection[str]) -> Layout:
    if "train" not in files and "train.annotations" not in given:
        names = ", ".join(str(file.relative_to(folder)) for file in files.values())
        raise DistillError(
            f"{folder}: found annotation files of COCO's format ({names}), but none whose name or folder says train. "
            f"Add it after data={folder}: data.source.train.annotations=FILE"
        )
    settings: dict[str, str | None] = {"root": str(folder)}
    for split in SPLIT_KEYS:
        settings[f"{split}.annotations"] = str(files[split].relative_to(folder)) if split in files else None
    names = ", ".join(f"{split} {files[split].relative_to(folder)}" for split in SPLIT_KEYS if split in files)
    return Layout("coco", f"COCO, {names}", settings)


def _find_voc(folder: Path) -> Layout | None:
    if any(_holds_xml(folder / name) for name in (*ANNOTATION_FOLDERS, *IMAGE_FOLDERS)):
        lists = folder / "ImageSets" / "Main"
        if not lists.is_dir():
            return Layout("voc", "VOC, no lists of splits", {"root": str(folder)})
        chosen = {
            split: next((name for name in names if (lists / f"{name}.txt").is_file()), None)
            for split, names in SPLIT_KEYS.items()
        }
        if chosen["train"] is None and (lists / "trainval.txt").is_file():
            chosen["train"] = "trainval"
        if chosen["train"] is None:
            raise DistillError(f"{lists}: expected train.txt or trainval.txt; set data=voc data.source.train=LIST")
        if chosen["val"] is None and chosen["test"] is not None:
            chosen["val"], chosen["test"] = chosen["test"], None
        names = ", ".join(f"{split} {name}.txt" for split, name in chosen.items() if name)
        return Layout("voc", f"VOC, {names}", {"root": str(folder), **chosen})
    if any(_holds_xml(folder / name) for names in SPLIT_KEYS.values() for name in names):
        return Layout("voc", "VOC, a folder for each split", {"root": str(folder)})
    return (
        Layout("voc", "VOC, XML files beside the images", {"root": str(folder)})
        if _holds_xml(folder, below=False)
        else None
    )


def _holds_xml(folder: Path, below: bool = True) -> bool:
    """Whether an XML file lies in the folder or, with `below`, in its subfolders."""
    files = folder.rglob("*") if below else folder.iterdir()
    return folder.is_dir() and any(file.suffix.lower() == ".xml" for file in files)
