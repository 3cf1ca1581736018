"""The verb predict: detections of a run's student in images, as pictures and in COCO's result format."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.run_folder import DESCRIPTION, STUDENT
from distill.types import DistillError

LONGEST_NAME = 180
"""Maximum bytes of the image's name in the name of its picture. File systems allow 255, with number and suffix."""


def main(argv: Sequence[str]) -> int:
    """``distill predict RUN IMAGES… [--out DIR] [--score 0.5]``."""
    parser = argparse.ArgumentParser(prog="distill predict", description=__doc__)
    parser.add_argument("run", type=Path, help=f"a run folder, or its {STUDENT}")
    parser.add_argument("images", type=Path, nargs="+", help="image files or folders of them")
    parser.add_argument("--out", type=Path, default=Path("outputs/predictions"))
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score that is drawn; the JSON file holds all detections"
    )
    args = parser.parse_args(list(argv))
    files, ignored = find_images(args.images, args.out)
    count, failures = predict(args.run, files, args.out, args.score)
    read = len(files) - len(failures)
    print(f"{count} detections in {read} images: {args.out / 'detections.json'}, pictures beside it")
    if failures:
        print(f"{len(failures)} of {len(files)} images could not be read; images.json lists them under 'failed'")
    if ignored:
        kinds = ", ".join(f"{number} {suffix or 'without extension'}" for suffix, number in ignored.most_common())
        print(f"{ignored.total()} files were skipped, because their extension is not that of an image: {kinds}")
    return 0


def find_images(paths: Sequence[Path], out: Path) -> tuple[list[Path], Counter[str]]:
    """The image files of these paths, and the number of other files by extension.

    The files of a folder are sorted by name. Hidden files and the pictures of earlier predictions are left out.

    Args:
        paths: image files, and folders that are searched with their subfolders.
        out: folder of the predictions.

    Raises:
        DistillError: a path does not exist, no image is found, or `out` holds the images.
    """
    from distill.data.decoding import IMAGE_SUFFIXES

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
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if hidden or not file.is_file() or file.resolve().is_relative_to(out.resolve()):
                continue
            if file.suffix.lower() in IMAGE_SUFFIXES:
                files.append(file)
            else:
                ignored[file.suffix.lower()] += 1
    if not files:
        raise DistillError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {', '.join(map(str, paths))}")
    return files, ignored


def picture_name(number: int, file: Path) -> str:
    """File name of an image's picture. A long name is cut."""
    return f"{number:06d}-{file.stem.encode()[:LONGEST_NAME].decode(errors='ignore')}.png"


def predict(run: Path, files: Sequence[Path], out: Path, score: float) -> tuple[int, dict[Path, str]]:
    """Write pictures, ``detections.json`` and ``images.json``. An image that cannot be read is reported and left out.

    Returns:
        The number of detections, and the message for each image that cannot be read.

    Raises:
        DistillError: no image can be read.
    """
    import torch

    from distill.data import rle
    from distill.data.decoding import read_image
    from distill.data.transforms import Sample, Transform, collate
    from distill.detectors.registry import load_detector
    from distill.detectors.student_files import read_extra
    from distill.evaluation.pictures import panel, save_panel
    from distill.files import write_text
    from distill.progress import track
    from distill.types import Detections, Target

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = load_detector(run).eval().to(device)
    options = detector.options
    resize, category_ids = _export_options(read_extra(run), run)
    transform = Transform((options["min_size"],), options["max_size"], antialias=resize["antialias"])
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
        sample = Sample(
            transform.resize(image), Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), size, number
        )
        batch = collate([sample], resize["pad_to"]).to(device)
        on_device = detector.view(batch, training=False, frozen=True).detections[0]
        binary = None if on_device.masks is None else on_device.masks.cpu()
        detections = Detections(on_device.boxes.cpu(), on_device.scores.cpu(), on_device.labels.cpu(), binary)
        images.append({"id": number, "file_name": str(file), "height": size[0], "width": size[1]})
        masks = [] if binary is None else [rle.to_coco(code, size) for code in rle.encode_masks(binary)]
        rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
        for index, (box, value, label) in enumerate(rows):
            x1, y1, x2, y2 = box
            category = category_ids.get(label, label)
            row = {"image_id": number, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": value}
            results.append(row | {"segmentation": masks[index]} if masks else row)
        picture = panel(image, {"student": detections}, detector.classes, min_score=score)
        save_panel(out / picture_name(number, file), picture)
    if not images:
        raise DistillError(f"none of the {len(files)} images can be read, the first: {next(iter(failures.values()))}")
    failed = [{"file_name": str(file), "error": message} for file, message in failures.items()]
    write_text(out / "detections.json", json.dumps(results))
    write_text(out / "images.json", json.dumps({"images": images, "classes": list(detector.classes), "failed": failed}))
    return len(results), failures


def _export_options(extra: Mapping[str, Any], run: Path) -> tuple[dict[str, Any], dict[int, int]]:
    """Options of the resize, and category ids by label, from the description of the exported student."""
    try:
        resize = {"antialias": False, "pad_to": 32} | extra.get("resize", {})
        labels = {int(label): int(number) for label, number in extra.get("category_ids", {}).items()}
        if not (isinstance(resize["antialias"], bool) and isinstance(resize["pad_to"], int) and resize["pad_to"] > 0):
            raise ValueError("antialias is true or false, pad_to a number of pixels")
    except (AttributeError, TypeError, ValueError) as error:
        raise DistillError(f"{run}: expected 'resize' and 'category_ids' in its {DESCRIPTION}: {error}") from error
    return resize, labels
