"""Convert a detector of another project to a folder that distill can evaluate or use as a teacher."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from distill.cli.startup import uncollected_imports
from distill.types import DistillError


def main(argv: Sequence[str]) -> int:
    """``distill import FILE [--out DIR] [--config FILE] [--classes NAME,…|FILE]``."""
    parser = argparse.ArgumentParser(prog="distill import", description=__doc__)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a checkpoint of Detectron2 (.pkl, .pth) or MMDetection (.pth)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: outputs/imported/NAME")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the training configuration: Detectron2's YAML or MMDetection's Python; default: the configuration inside "
        "the checkpoint, or Detectron2's config.yaml in its folder",
    )
    parser.add_argument(
        "--classes", metavar="NAMES", help="class names in label order: a,b,c, or a text file with one name per line"
    )
    own = ("trust=", "config_dirs=")  # every command accepts these; they were read before
    args = parser.parse_args([word for word in argv if not word.lstrip("+").startswith(own)])
    out: Path = args.out or Path("outputs/imported", args.file.stem)
    with uncollected_imports():
        from distill.detectors.imported import import_detector

    report = import_detector(args.file, out, args.config, read_names(args.classes))
    print(f"a {report['family']} of {report['project']}; its options and their origins:")
    for path, entry in report["options"].items():
        print(f"  {path}={_shortened(str(entry['value']))}  ({entry['from']})")
    used, unused, missing = (len(report[part]) for part in ("used", "unused", "missing"))
    print(f"tensors: {used} used, {unused} unused, {missing} missing; all names are in {out / 'import.json'}")
    for line in report["warnings"]:
        print(f"warning: {line}")
    print(f"\nmeasure it:      python -m distill evaluate {shlex.quote(str(out))} data=…")
    print(f"as a teacher:    python train.py teacher.weights={shlex.quote(str(out))} …")
    return 0


def _shortened(text: str, longest: int = 70) -> str:
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def read_names(text: str | None) -> list[str] | None:
    """Class names of the option ``--classes``: in the text, or in the file that it names.

    Raises:
        DistillError: the file cannot be read, or there is no name.
    """
    if text is None:
        return None
    path = Path(text)
    if path.is_file():
        from distill.files import read_text

        try:
            names = read_text(path).splitlines()
        except (OSError, ValueError) as error:
            raise DistillError(f"--classes {path}: not a text file ({error}); write one name per line") from error
    else:
        names = text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise DistillError(
            f"--classes {text}: expected names, as in --classes cat,dog, or a text file with one name per line"
        )
    return names
