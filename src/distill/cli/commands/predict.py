"""The command predict: detections of a run's student in images, as pictures and in COCO's result format."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cli.devices import add_device_option, find_device
from distill.cli.startup import uncollected_imports
from distill.cli.tables import print_table
from distill.export.suffixes import is_exported
from distill.run_folder import STUDENT
from distill.types import DistillError

if TYPE_CHECKING:
    import torch

LONGEST_NAME = 180
"""Maximum bytes of the image's name in the name of its picture. File systems allow 255, with number and suffix."""


def main(argv: Sequence[str]) -> int:
    """``distill predict RUN IMAGES… [--out DIR] [--score 0.5] [--annotations FILE] [--device cuda:1] [trust=[…]]``."""
    parser = argparse.ArgumentParser(prog="distill predict", description=__doc__)
    parser.add_argument("run", type=Path, help=f"a run folder, its {STUDENT}, or an exported file")
    parser.add_argument("images", type=Path, nargs="+", help="image files or folders of them")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/predictions"), help="folder; default: outputs/predictions"
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score that is drawn; the JSON file holds all detections"
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="a JSON file in COCO's format: the detections get its ids of images and classes, so that they can be "
        "scored against this file",
    )
    add_device_option(parser)
    shared_keys = ("trust=", "config_dirs=")  # read already, for all commands
    args = parser.parse_args([word for word in argv if not word.lstrip("+").startswith(shared_keys)])
    if not 0 <= args.score <= 1:
        raise DistillError(f"--score {args.score:g}: expected a score from 0 to 1")
    device = find_device(args.device)
    reference = read_reference(args.annotations) if args.annotations else None
    files, ignored = find_images(args.images, args.out)
    unlisted: list[Path] = []
    if reference is not None:
        files, unlisted = reference.split(files)
        if not files:
            raise DistillError(
                f"--annotations {args.annotations}: none of the {len(unlisted)} images is listed there, the first: "
                f"{unlisted[0]}. Expected the file names of its 'images'"
            )
    count, failures = predict(args.run, files, args.out, args.score, device, reference)
    read = len(files) - len(failures)
    print(f"{count} detections in {read} images: {args.out / 'detections.json'}, pictures beside it")
    if failures:
        print(f"{len(failures)} of {len(files)} images could not be read; images.json lists them under 'failed'")
    if unlisted:
        print(
            f"{len(unlisted)} images are not listed in {args.annotations} and were left out, the first: {unlisted[0]}"
        )
    if ignored:
        kinds = ", ".join(f"{number} {suffix or 'without extension'}" for suffix, number in ignored.most_common())
        print(f"{ignored.total()} files were skipped, because their extension is not that of an image: {kinds}")
    return 0


@dataclass(frozen=True)
class Reference:
    """Ids of images and classes in a file of COCO's format."""

    source: Path
    image_ids: Mapping[str, Any]
    """File name -> id of the image."""
    category_ids: Mapping[str, Any]
    """Class name -> id of the category."""

    def find(self, file: Path) -> str | None:
        """The listed name of an image file: the longest end of its path that is listed, or None."""
        parts = file.absolute().parts
        ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
        return next((end for end in ends if end in self.image_ids), None)

    def split(self, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """The files that are listed, and the others.

        Raises:
            DistillError: two files have the same listed name.
        """
        listed: dict[str, Path] = {}
        others: list[Path] = []
        for file in files:
            name = self.find(file)
            if name is None:
                others.append(file)
            elif name in listed and listed[name].resolve() != file.resolve():
                raise DistillError(f"{self.source}: '{name}' is both {listed[name]} and {file}. Name one folder")
            else:
                listed[name] = file
        return list(listed.values()), others


def read_reference(file: Path) -> Reference:
    """Read the ids of a file in COCO's format.

    Raises:
        DistillError: the file is not in COCO's format.
    """
    from distill.files import read_json

    content = read_json(file)
    try:
        images = {str(image["file_name"]).replace("\\", "/"): image["id"] for image in content["images"]}
        categories = {str(row["name"]): row["id"] for row in content["categories"]}
    except (KeyError, TypeError) as error:
        raise DistillError(
            f"--annotations {file}: expected COCO's format, with 'images' (id, file_name) and 'categories' (id, name); "
            f"cannot read {error}"
        ) from error
    return Reference(file, images, categories)


def find_images(paths: Sequence[Path], out: Path) -> tuple[list[Path], Counter[str]]:
    """The image files of these paths, and the number of other files by extension.

    The files of a folder are sorted by name. Hidden files and the pictures of earlier predictions are left out.

    Args:
        paths: image files, and folders that are searched with their subfolders.
        out: folder of the predictions.

    Raises:
        DistillError: a path does not exist, no image is found, or `out` holds the images.
    """
    from distill.imaging.decoding import IMAGE_SUFFIXES, find_image_files

    files: list[Path] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        if not path.exists():
            raise DistillError(f"{path} does not exist: expected an image or a folder of images")
        if not path.is_dir():
            files.append(path)
            continue
        if path.resolve().is_relative_to(out.resolve()):
            raise DistillError(
                f"--out {out} holds the images of {path}, so a second run would read the written pictures as images. "
                "Choose another folder for --out"
            )
        below, others = find_image_files(path, without=out)
        files += below
        ignored += others
    if not files:
        raise DistillError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {', '.join(map(str, paths))}")
    return files, ignored


def picture_name(number: int, file: Path) -> str:
    """File name of an image's picture. A long name is cut."""
    return f"{number:06d}-{file.stem.encode()[:LONGEST_NAME].decode(errors='ignore')}.png"


def predict(
    run: Path,
    files: Sequence[Path],
    out: Path,
    score: float,
    device: torch.device,
    reference: Reference | None = None,
) -> tuple[int, dict[Path, str]]:
    """Write pictures, ``detections.json`` and ``images.json``. An image that cannot be read is reported and left out.

    Args:
        run: a run folder, the student in this folder, or an exported file.
        files: the images.
        out: folder of the written files.
        score: lowest score that is drawn.
        device: device of the detector.
        reference: gives the ids of images and classes, and lists all `files`. Detections of classes that it does not
            have are left out. None: images are numbered from 0, and classes have the ids of the training data.

    Returns:
        The number of detections, and the message for each image that cannot be read.

    Raises:
        DistillError: no image can be read.
    """
    with uncollected_imports():
        from distill.data import rle
        from distill.detectors.base import Detector
        from distill.detectors.registry import load_detector
        from distill.detectors.student_files import read_extra, trained_category_ids
        from distill.evaluation.pictures import panel, save_panel
        from distill.export.exported import ExportedDetector
        from distill.files import write_text
        from distill.imaging.decoding import read_image
        from distill.progress import track
    from distill.types import Detections

    detector: Detector | ExportedDetector
    if is_exported(run.name):
        detector = ExportedDetector(run)
        extra: Mapping[str, Any] = detector.facts
    else:
        detector, extra = load_detector(run).to(device), read_extra(run)
    trained_ids = trained_category_ids(extra, run)
    category_ids = {label: trained_ids.get(label, label) for label in range(1, len(detector.classes) + 1)}
    if reference is not None:
        category_ids = {
            label: reference.category_ids[name]
            for label, name in enumerate(detector.classes, 1)
            if name in reference.category_ids
        }
        if unknown := [name for name in detector.classes if name not in reference.category_ids]:
            print(
                f"{reference.source} has no class {', '.join(unknown)}: detections of it are left out", file=sys.stderr
            )
    results, images = [], []
    failures: dict[Path, str] = {}
    for number, file in enumerate(track(files, "predict")):
        try:
            image = read_image(file)
        except DistillError as error:
            failures[file] = str(error)
            print(f"left out: {error}", file=sys.stderr)
            continue
        size = (image.shape[-2], image.shape[-1])
        (found,) = detector([image])
        detections = Detections(found.boxes, found.scores, found.labels, found.masks)
        image_id = number if reference is None else reference.image_ids[reference.find(file) or ""]
        images.append({"id": image_id, "file_name": str(file), "height": size[0], "width": size[1]})
        codes = [] if detections.masks is None else rle.encode_masks(detections.masks)
        masks = [rle.to_coco(code, size) for code in codes]
        rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
        for index, (box, value, label) in enumerate(rows):
            x1, y1, x2, y2 = box
            if label not in category_ids:
                continue
            row = {
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": value,
            }
            results.append(row | {"segmentation": masks[index]} if masks else row)
        picture = panel(image, {"student": detections}, detector.classes, min_score=score)
        save_panel(out / picture_name(number, file), picture)
    if not images:
        raise DistillError(f"none of the {len(files)} images can be read, the first: {next(iter(failures.values()))}")
    failed = [{"file_name": str(file), "error": message} for file, message in failures.items()]
    write_text(out / "detections.json", json.dumps(results))
    names = dict(enumerate(detector.classes, 1))
    categories = [{"id": number, "name": names[label]} for label, number in category_ids.items()]
    listing = {"images": images, "categories": categories, "classes": list(detector.classes), "failed": failed}
    write_text(out / "images.json", json.dumps(listing))
    found = Counter(row["category_id"] for row in results)
    sure = Counter(row["category_id"] for row in results if row["score"] >= score)
    print_table(
        "detections by class",
        ("class", "id", "all", f"score from {score:g}"),
        [(row["name"], row["id"], found[row["id"]], sure[row["id"]]) for row in categories],
    )
    return len(results), failures
