"""The command classifier: trains an image classifier on the objects of a data set, as the teacher of distill=dicod."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from distill.cli.config import instantiate, override_checks, value_checks
from distill.cli.startup import uncollected_imports
from distill.cli.tables import print_line
from distill.types import DistillError


def main(argv: Sequence[str]) -> int:
    """``distill classifier FILE.pt [--arch resnet50] [--start IMAGENET1K_V1] [--epochs 12] [data=voc …]``."""
    parser = argparse.ArgumentParser(prog="distill classifier", description=__doc__)
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE.pt",
        help="file of the weights; a JSON file with the classes is written beside it",
    )
    parser.add_argument("--arch", default="resnet50", help="torchvision's name of a ResNet")
    parser.add_argument("--start", help="start weights: a file, or a name of torchvision's; without it from scratch")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.02, help="highest learning rate")
    parser.add_argument("--size", type=int, default=112, help="side of a crop in pixels")
    parser.add_argument("overrides", nargs="*", help="as for train: data=voc data.source.root=…, seed=1")
    args = parser.parse_intermixed_args(list(argv))
    if args.epochs < 1 or args.size < 1 or not 0 < args.rate < math.inf:
        raise DistillError("classifier: --epochs and --size start at 1, --rate is a number above 0")
    cfg = override_checks.compose_without_run(args.overrides)
    with uncollected_imports():
        from distill.cli.config import auto_values
        from distill.training.classifier import train_classifier

    if auto_values.auto_keys(cfg):
        cfg, choices = auto_values.resolve(cfg, auto_values.facts_of(cfg, args.overrides), args.overrides)
        for line in choices:
            if line.startswith("data."):  # the classifier has its own schedule
                print_line("auto", line)
    value_checks.validate_values(cfg)

    data, device = instantiate.build_node(cfg.data), instantiate.trainer_device(cfg)
    accuracy = train_classifier(
        data, args.file, args.arch, args.start, args.epochs, args.rate, args.size, device, cfg.seed
    )
    print(f"{args.file}: {100 * accuracy:.1f} % of the validation objects are classified correctly; use it with")
    print(
        f"  distill=dicod distill.losses.dicod.classifier.arch={args.arch} "
        f"distill.losses.dicod.classifier.weights={args.file}"
    )
    return 0
