"""Images without labels, for distillation alone: where they come from, and the teacher's boxes for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from distill.data.coco import Coco
from distill.data.copies import find_shared_files
from distill.data.file_index import path_ends
from distill.data.images import ImageDataset
from distill.data.inspection import read_states
from distill.data.records import Record, Records, make_record, pack_records
from distill.data.sampler import SampleKey
from distill.data.transforms import Sample
from distill.files import read_json
from distill.imaging.decoding import find_image_files
from distill.types import DistillError, Size

TEACHER = "teacher"
"""Value of ``data.unlabeled.boxes``: the boxes that the run's teacher finds."""


@dataclass(frozen=True)
class Unlabeled:
    """Options of ``data.unlabeled``.

    Args:
        images: a folder of images, searched with its subfolders; a JSON file in COCO's format, whose boxes are not
            used; or, for a source that draws its images, the number of images to draw. None: no such images.
        ratio: images without labels per labeled image in a training step.
        boxes: None; ``teacher``: the detections of the run's teacher; or a JSON file that ``distill label`` wrote.
        score: the lowest score of a box in `boxes`.

    Raises:
        DistillError: a number is out of range, or there are options, but no images.
    """

    images: str | int | None = None
    ratio: float = 1.0
    boxes: str | None = None
    score: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.ratio < math.inf and 0 <= self.score <= 1):
            raise DistillError(
                f"data.unlabeled: expected a ratio above 0 and a score from 0 to 1, got ratio={self.ratio} and "
                f"score={self.score}"
            )
        if isinstance(self.images, int) and self.images < 1:
            raise DistillError(f"data.unlabeled: expected at least 1 image to draw, got {self.images}")
        if self.boxes is not None and self.images is None:
            raise DistillError(
                f"data.unlabeled.boxes={self.boxes}: there are no images for these boxes. Add data.unlabeled=FOLDER"
            )

    def per_batch(self, batch_size: int) -> int:
        """The number of images without labels beside a batch of labeled images."""
        return max(1, round(self.ratio * batch_size))


NO_UNLABELED = Unlabeled()


def read_unlabeled(images: str | int, source: Any) -> Records:
    """The images that ``data.unlabeled`` names, without boxes, not yet checked.

    Args:
        images: see `Unlabeled`.
        source: the source of the labeled images, which draws images if it can.

    Raises:
        DistillError: there are no such images.
    """
    if isinstance(images, int):
        draw = getattr(source, "draw_unlabeled", None)
        if draw is None:
            raise DistillError(
                f"data.unlabeled={images}: only data=shapes draws images. Name a folder of images; a folder of this "
                f"name is ./{images}"
            )
        return pack_records(draw(images))
    path = Path(images).expanduser()
    if path.is_file() and path.suffix.lower() == ".json":
        file = path.absolute()
        root = file.parent.parent if file.parent.name == "annotations" else file.parent
        coco = Coco(str(root), train={"annotations": str(file), "images": None})
        records = pack_records(coco.read_split("train")[1])
        records.keep_rows(np.zeros(len(records.labels), dtype=np.bool_))
        return records
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise DistillError(
            f"data.unlabeled={images}: expected a folder of images, or a JSON file in COCO's format; this {state}"
        )
    files, _ = find_image_files(path)
    if not files:
        raise DistillError(f"data.unlabeled={images}: there is no image in this folder or below it")
    return pack_records([make_record(number, str(file), None) for number, file in enumerate(files, start=1)])


def leave_out_labeled(records: Records, splits: Mapping[str, Records]) -> tuple[Records, dict[str, int]]:
    """The images that no split has, under any name.

    Returns:
        The remaining images, and the number of left-out images by split.
    """
    unknown = records.file_sizes < 0
    records.file_sizes[unknown] = read_states([records.files.text(row) for row in np.flatnonzero(unknown).tolist()])[
        :, 0
    ]
    files, counts = records.files.texts(), {}
    keep = np.ones(len(records), dtype=np.bool_)
    for name, labeled in splits.items():
        shared = find_shared_files(records, labeled)
        found = np.array([file in shared for file in files], dtype=np.bool_) & keep
        counts[name] = int(found.sum())
        keep &= ~found
    return records.select(keep), {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class FoundBoxes:
    """The content of a file that ``distill label`` wrote."""

    source: str
    """The file."""
    rows: Mapping[str, Sequence[tuple[list[float], str, float]]]
    """File name of an image -> its boxes: xyxy in pixels, class name, score."""


def read_boxes(file: Path) -> FoundBoxes:
    """Read a file in COCO's format. A box without ``score`` has the score 1.

    Raises:
        DistillError: the file is not in COCO's format.
    """
    content = read_json(file)
    try:
        names = {row["id"]: str(row["name"]) for row in content["categories"]}
        files = {row["id"]: str(row["file_name"]) for row in content["images"]}
        rows: dict[str, list[tuple[list[float], str, float]]] = {name: [] for name in files.values()}
        for row in content["annotations"]:
            x, y, width, height = (float(value) for value in row["bbox"])
            box = [x, y, x + width, y + height]
            rows[files[row["image_id"]]].append((box, names[row["category_id"]], float(row.get("score", 1.0))))
    except (KeyError, TypeError, ValueError) as error:
        raise DistillError(
            f"{file}: expected COCO's format with images, annotations and categories, as 'distill label' writes it; "
            f"cannot read {error}"
        ) from error
    return FoundBoxes(str(file), rows)


def add_boxes(
    records: Records, found: FoundBoxes, score: float, classes: Sequence[str], bridge: Mapping[str, str] | None = None
) -> tuple[Records, str]:
    """The images of `records` that `found` lists, with their boxes, and a line about them.

    Args:
        records: checked images.
        found: the boxes. A name is the path of an image, or an end of it.
        score: the lowest score of a box.
        classes: class names of the data.
        bridge: class name of the boxes -> class name of the data; None: by exact name.

    Raises:
        DistillError: no image is listed, or no class is known.
    """
    labels = {name: label for label, name in enumerate(classes, start=1)}
    if bridge is not None:
        labels = {own: labels[name] for own, name in bridge.items()}
    kept: list[Record] = []
    unknown = boxes = 0
    for name, index in sorted(_match_names(found.rows, records.files.texts()).items(), key=lambda pair: pair[1]):
        record = records[index]
        rows = [(box, labels.get(own), value) for box, own, value in found.rows[name] if value >= score]
        unknown += sum(label is None for _, label, _ in rows)
        known = [(_clipped(box, record.size), label) for box, label, _ in rows if label is not None]
        known = [(box, label) for box, label in known if box[2] > box[0] and box[3] > box[1]]
        boxes += len(known)
        kept.append(_with_boxes(record, known))
    if not kept:
        raise DistillError(
            f"{found.source}: none of the {len(records)} images of data.unlabeled is listed there, the first: "
            f"{records[0].file}. Label these images: python -m distill label RUN FOLDER --out FILE.json"
        )
    if unknown and not boxes:
        raise DistillError(
            f"{found.source}: none of its classes is a class of the data {list(classes)}. Label the images with a "
            "detector of these classes"
        )
    missing = len(records) - len(kept)
    line = f"{boxes} boxes with scores from {score:g} in {len(kept)} images, from {found.source}"
    line += f"; {missing} images are not listed there and are left out" if missing else ""
    return pack_records(kept), line + (f"; {unknown} boxes are of other classes" if unknown else "")


def _match_names(names: Iterable[str], files: Sequence[str]) -> dict[str, int]:
    """Listed name -> index of its file: the file whose path ends with the name, and has the fewest other parts."""
    listed = {name.replace("\\", "/"): name for name in names}
    places: dict[str, tuple[int, int]] = {}
    for index, file in enumerate(files):
        ends = path_ends(file)
        for depth, end in enumerate(ends):
            if end in listed:
                places[listed[end]] = min(places.get(listed[end], (depth, index)), (depth, index))
                break
    return {name: index for name, (_, index) in places.items()}


def _clipped(box: Sequence[float], size: Size | None) -> list[float]:
    height, width = size or (math.inf, math.inf)
    return [min(max(0.0, corner), side) for corner, side in zip(box, (width, height) * 2, strict=True)]


def _with_boxes(record: Record, rows: Sequence[tuple[Sequence[float], int]]) -> Record:
    boxes: NDArray[np.float64] = np.array([box for box, _ in rows], dtype=np.float64).reshape(-1, 4)
    flags = np.zeros(len(rows), dtype=np.bool_)
    return Record(
        id=record.id,
        file=record.file,
        size=record.size,
        boxes=boxes,
        labels=np.array([label for _, label in rows], dtype=np.int64),
        crowd=flags,
        difficult=flags,
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        file_size=record.file_size,
    )


class JointImages(Dataset[Sample]):
    """Labeled images, and after them images of ``data.unlabeled``, as one data set.

    Args:
        labeled: the labeled images.
        unlabeled: the other images.
        has_boxes: whether the boxes of `unlabeled` are known.
    """

    def __init__(self, labeled: ImageDataset, unlabeled: ImageDataset, has_boxes: bool) -> None:
        self.labeled, self.unlabeled, self.has_boxes = labeled, unlabeled, has_boxes

    def __len__(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        if index < len(self.labeled):
            return self.labeled[key]
        sample = self.unlabeled[epoch, index - len(self.labeled)]
        return sample._replace(labeled=False, target=sample.target if self.has_boxes else None)


FindBoxes = Callable[[Records], FoundBoxes]
"""Finds the boxes of images, by a teacher."""
