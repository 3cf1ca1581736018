"""The command label: a detector's boxes for a folder of images without labels, as a file in COCO's format."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli.devices import add_device_option, find_device
from distill.cli.startup import uncollected_imports
from distill.export.suffixes import is_exported
from distill.types import DistillError

if TYPE_CHECKING:
    import torch

    from distill.evaluation.labeling import Labeler


def main(argv: Sequence[str]) -> int:
    """``distill label RUN FOLDER --out FILE.json [--score 0.3] [--device cuda:1] [trust=[…]]``."""
    parser = argparse.ArgumentParser(prog="distill label", description=__doc__)
    parser.add_argument(
        "run", type=Path, help="a run folder, a file of weights with its description, or an exported file"
    )
    parser.add_argument("folder", type=Path, help="folder of images, searched with its subfolders")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the file to write")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a box in the file; default: 0.3")
    add_device_option(parser)
    shared_keys = ("trust=", "config_dirs=")  # read already, for all commands
    args = parser.parse_args([word for word in argv if not word.lstrip("+").startswith(shared_keys)])
    if not 0 <= args.score <= 1:
        raise DistillError(f"--score {args.score:g}: expected a score from 0 to 1")
    device = find_device(args.device)
    images = find_named_images(args.folder)

    with uncollected_imports():
        from distill.evaluation.labeling import label_images, require_replaceable
        from distill.imaging.decoding import read_image

    require_replaceable(args.out)
    labeler = make_labeler(args.run, args.score, device)
    done = label_images(labeler, images, read_image, args.out)
    print(f"{done.boxes} boxes with scores from {args.score:g} in {len(done.entries)} images: {args.out}")
    if done.failures:
        print(f"{len(done.failures)} of {len(images)} images could not be read; the file lists them in info.failed")
    return 0


def find_named_images(folder: Path) -> dict[str, str]:
    """The images below a folder: path relative to the folder -> path.

    Raises:
        DistillError: this is no folder, or holds no image.
    """
    from distill.imaging.decoding import IMAGE_SUFFIXES, find_image_files

    if not folder.is_dir():
        raise DistillError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}: expected a folder of images"
        )
    files, _ = find_image_files(folder)
    if not files:
        raise DistillError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {folder}")
    return {file.relative_to(folder).as_posix(): str(file) for file in files}


def make_labeler(source: Path, score: float, device: torch.device) -> Labeler:
    """The detector of a run or of a file, with the ids of its categories.

    Raises:
        DistillError: the detector cannot be loaded.
    """
    from distill.detectors.registry import load_detector
    from distill.detectors.student_files import read_extra, trained_category_ids
    from distill.evaluation.labeling import Labeler, named_categories
    from distill.export.exported import ExportedDetector
    from distill.frozen import state_fingerprint

    if is_exported(source.name):
        exported = ExportedDetector(source)
        ids = named_categories(exported.classes, trained_category_ids(exported.facts, source))
        return Labeler(
            lambda image, least: exported([image], least)[0],
            ids,
            exported.classes,
            str(source),
            hashlib.sha256(source.read_bytes()).hexdigest(),
            score,
        )
    detector = load_detector(source).to(device)
    ids = named_categories(detector.classes, trained_category_ids(read_extra(source), source))
    sha256 = state_fingerprint(detector.state_dict)
    return Labeler(lambda image, least: detector([image], least)[0], ids, detector.classes, str(source), sha256, score)
