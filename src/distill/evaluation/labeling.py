"""A detector's boxes for images without labels, as a file in COCO's format.

The command ``label`` writes such a file, and a run with ``data.unlabeled.boxes=teacher`` keeps one in the cache.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from distill import __version__
from distill.data import rle
from distill.data.column_cache import cache_file, exclusive
from distill.data.datamodule import DetectionData
from distill.data.identity import digest_records
from distill.data.records import Records
from distill.data.unlabeled import FoundBoxes, read_boxes
from distill.detectors.prediction import Prediction
from distill.files import read_json, write_text
from distill.progress import track
from distill.teacher import Teacher
from distill.types import DistillError

MADE_BY = "distill label"
"""Value of ``info.made_by`` in the files."""
LEAST_SCORE = 0.05
"""Lowest score of the boxes in the cache. A run that uses another limit above it finds the same file."""


@dataclass(frozen=True)
class Labeler:
    """A detector, and what a file says about it.

    Args:
        detect: finds the objects in one image (3, H, W) uint8, from a score on.
        categories: label -> id of its category. Boxes of other labels are left out.
        classes: class names in label order.
        model: origin of the detector.
        sha256: hash of its weights.
        score: lowest score of a box.
    """

    detect: Callable[[Tensor, float], Prediction]
    categories: Mapping[int, int]
    classes: Sequence[str]
    model: str
    sha256: str
    score: float


@dataclass
class LabeledImages:
    """The images that were read, and what was found in them."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an image -> its height and width, and the boxes that were found in it."""
    failures: dict[str, str] = field(default_factory=dict)
    """Name of an image that cannot be read -> message."""

    @property
    def boxes(self) -> int:
        """Number of boxes in all images."""
        return sum(len(entry["boxes"]) for entry in self.entries.values())


def label_images(
    labeler: Labeler, images: Mapping[str, str], load: Callable[[str], Tensor], out: Path
) -> LabeledImages:
    """Write the boxes that a detector finds to a file in COCO's format.

    The file is written when all images are done. Until then a journal beside it holds the images that are done: the
    same call continues there. An image that cannot be read is reported and left out.

    Args:
        labeler: the detector.
        images: name of an image in the file -> what `load` takes.
        load: reads an image (3, H, W) uint8.
        out: the file.

    Raises:
        DistillError: `out` cannot be written, or is a file that `label_images` has not written; or no image can be
            read.
    """
    require_replaceable(out)
    journal = out.with_name(f".{out.name}.journal")
    head = {"model": labeler.model, "sha256": labeler.sha256, "score": labeler.score}
    done = LabeledImages(_read_journal(journal, head, images))
    if done.entries:
        print(f"distill: {len(done.entries)} of {len(images)} images were labeled before", file=sys.stderr)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("w", encoding="utf-8") as file:
            for line in (head, *done.entries.values()):
                file.write(json.dumps(line) + "\n")
            for name in track([name for name in images if name not in done.entries], "label"):
                try:
                    image = load(images[name])
                except DistillError as error:
                    done.failures[name] = str(error)
                    print(f"left out: {error}", file=sys.stderr)
                    continue
                done.entries[name] = _entry(name, image, labeler)
                file.write(json.dumps(done.entries[name]) + "\n")
                file.flush()
        if not done.entries:
            raise DistillError(
                f"none of the {len(images)} images can be read, the first: {next(iter(done.failures.values()))}"
            )
        write_text(out, json.dumps(_coco_content(labeler, images, done)))
    except OSError as error:
        raise DistillError(f"{out}: cannot be written ({error}). Choose another place") from error
    finally:
        if out.is_file() and done.entries.keys() | done.failures.keys() >= images.keys():
            journal.unlink(missing_ok=True)
        elif not done.entries:
            _remove(journal)
    return done


def require_replaceable(out: Path) -> None:
    """Refuse a place where a folder is, or a file that `label_images` has not written.

    Raises:
        DistillError: see above.
    """
    if out.is_dir():
        raise DistillError(f"{out} is a folder: expected the name of a file to write, such as {out / 'labels.json'}")
    if not out.exists():
        return
    try:
        made_by = read_json(out).get("info", {}).get("made_by")
    except (DistillError, AttributeError):
        made_by = None
    if made_by != MADE_BY:
        raise DistillError(f"{out} exists and is no file of 'distill label': choose another name")


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:  # the folder is read-only, so the file is not there
        return


def _read_journal(file: Path, head: Mapping[str, Any], images: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The entries of a journal with this head; none if there is no such journal. An unfinished line is left out."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        if not lines or json.loads(lines[0]) != head:
            return {}
        entries = [json.loads(line) for line in lines[1:]]
        return {entry["file_name"]: entry for entry in entries if entry["file_name"] in images}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _entry(name: str, image: Tensor, labeler: Labeler) -> dict[str, Any]:
    size = (image.shape[-2], image.shape[-1])
    found = labeler.detect(image, labeler.score)
    codes = [] if found.masks is None else [rle.to_coco(code, size) for code in rle.encode_masks(found.masks)]
    boxes = []
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    for index, ((x1, y1, x2, y2), score, label) in enumerate(rows):
        if label not in labeler.categories:
            continue
        row = {"category_id": labeler.categories[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        row |= {"area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "score": score}
        boxes.append(row | {"segmentation": codes[index]} if codes else row)
    return {"file_name": name, "height": size[0], "width": size[1], "boxes": boxes}


def _coco_content(labeler: Labeler, images: Mapping[str, str], done: LabeledImages) -> dict[str, Any]:
    info = {
        "description": "boxes that a detector found, not checked by people",
        "made_by": MADE_BY,
        "distill_version": __version__,
        "model": labeler.model,
        "sha256": labeler.sha256,
        "score": labeler.score,
        "failed": [{"file_name": name, "error": message} for name, message in done.failures.items()],
    }
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, name in enumerate((name for name in images if name in done.entries), start=1):
        entry = done.entries[name]
        listed.append({"id": number, **{key: entry[key] for key in ("file_name", "height", "width")}})
        for box in entry["boxes"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **box})
    categories = [{"id": number, "name": labeler.classes[label - 1]} for label, number in labeler.categories.items()]
    return {"info": info, "images": listed, "annotations": annotations, "categories": categories}


# -- the teacher of a run


def label_by_teacher(data: DetectionData, teacher: Teacher) -> list[str]:
    """Give the images of ``data.unlabeled`` the teacher's boxes, unless the data has boxes for them or needs none.

    The boxes are found once, and kept in the cache (see `data.column_cache`) for all later runs with this teacher and
    these images.

    Returns:
        A line about the boxes that were added, or nothing.

    Raises:
        DistillError: no image can be read, or the teacher knows no class of the data.
    """
    if not data.needs_boxes:
        return []
    return [data.label_unlabeled(partial(_find_boxes, data, teacher), teacher.spec.bridge)]


def _find_boxes(data: DetectionData, teacher: Teacher, records: Records) -> FoundBoxes:
    names = records.files.texts()
    labeler = teacher_labeler(teacher, min(LEAST_SCORE, data.unlabeled.score))
    detector = teacher.detector
    # The records of drawn images have neither file sizes nor boxes, so two images stand for all.
    samples = [
        hashlib.sha256(data.load_unlabeled(name).numpy().tobytes()).hexdigest() for name in (names[0], names[-1])
    ]
    facts = [labeler.sha256, labeler.score, detector.options, repr(detector.resize)]
    facts += [names, digest_records(records, masks=False), samples]
    identity = hashlib.sha256(json.dumps(facts, default=str).encode("utf-8", "surrogateescape")).hexdigest()
    out = cache_file("labels", identity, ".json")
    if out is None:
        raise DistillError(
            "data.unlabeled.boxes=teacher keeps the boxes in the cache, which DISTILL_CACHE= switches off. Set "
            "DISTILL_CACHE to a folder, or write the boxes once with 'python -m distill label' and set "
            "data.unlabeled.boxes=FILE"
        )
    with exclusive(out, timeout=-1):
        if not out.is_file():
            label_images(labeler, {name: name for name in names}, data.load_unlabeled, out)
    return read_boxes(out)


def teacher_labeler(teacher: Teacher, score: float) -> Labeler:
    """The teacher as a labeler, with its own class names."""
    classes = teacher.spec.classes
    return Labeler(
        lambda image, least: teacher.detector([image], least)[0],
        named_categories(classes),
        classes,
        teacher.source,
        teacher.fingerprint,
        score,
    )


def named_categories(classes: Sequence[str], ids: Mapping[int, int] | None = None) -> dict[int, int]:
    """Label -> category id of the classes that have a name; without `ids`, the label itself."""
    return {label: (ids or {}).get(label, label) for label, name in enumerate(classes, start=1) if name != "N/A"}
