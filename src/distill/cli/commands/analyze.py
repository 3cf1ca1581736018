"""The command analyze: the errors of a finished run's student, and its differences to its teacher and a baseline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli.config.overrides import parse_overrides, read_config
from distill.cli.devices import add_device_option, find_device
from distill.cli.runs.recorded_run import class_notes, find_run, load_student, recompose, trained_size
from distill.cli.tables import print_line, print_table
from distill.quoting import quote_value
from distill.types import DistillError
from distill.units import percent

if TYPE_CHECKING:
    from distill.analysis.model_report import Comparison
    from distill.analysis.thresholds import Curve
    from distill.cli.reports.analyzed_models import Models
    from distill.run_folder import RunFolder
    from distill.training.wandb_run import WandbRun

MOST_CLASSES = 20
"""Classes in the table of thresholds on the terminal."""


def main(argv: Sequence[str]) -> int:
    """``distill analyze RUN [--against RUN] [--split val] [--images 20] [--pictures 12] [--wandb] [overrides]``."""
    parser = argparse.ArgumentParser(
        prog="distill analyze",
        usage="distill analyze RUN [--against RUN] [--split SPLIT] [--images 20] [--pictures 12] [--wandb] [overrides]",
        description=__doc__,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="a finished run to compare with; default: the newest run of the student alone",
    )
    parser.add_argument(
        "--split", default="val", choices=("train", "val", "test"), help="split that is evaluated; default: val"
    )
    parser.add_argument(
        "--images", type=int, default=20, help="images on which the necks (FPN) are compared; default: 20"
    )
    parser.add_argument("--pictures", type=int, default=12, help="images with most errors to draw; default: 12")
    parser.add_argument(
        "--similar",
        action="append",
        default=[],
        metavar="CLASSES",
        help="similar classes for Hoiem's shares, as in cat,dog; may be repeated. Default: COCO's supercategories",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also add tables, figures and main numbers to the W&B run of the training"
    )
    add_device_option(parser, "that of the run (trainer.accelerator)")
    parser.add_argument("overrides", nargs="*", help="as for train, for example data.source.root=… if the data moved")
    args = parser.parse_intermixed_args(list(argv))
    if min(args.images, args.pictures) < 0:
        raise DistillError("analyze: --images and --pictures start at 0")
    from distill.cli.runs.results import read_finished

    device = None if args.device is None else find_device(args.device)
    run = find_run(args.run)
    summary = read_finished(run)
    against = find_run(args.against) if args.against else None
    other_summary = read_finished(against) if against else None
    overrides = [*args.overrides, f"paths.run={quote_value(str(run.path))}"]
    cfg = recompose(run, [*overrides, *trained_size(run.path, args.overrides)])

    from distill.analysis.run_analysis import FOLDER, analyze_models, draw_training, write_summary
    from distill.analysis.run_page import write_run_page
    from distill.cli.reports.analyzed_models import Models, add_other, add_teacher, find_baseline, recorded_detections
    from distill.cli.runs.preflight import plan_run

    plan = plan_run(cfg)
    data = plan.data
    if not data.has_split(args.split):
        raise DistillError(f"--split {args.split}: the data has {', '.join(data.splits)} only")
    groups = _similar_classes(args.similar, data.classes)
    logger = _wandb_run(run) if args.wandb else None
    models = Models()
    add_teacher(models, run, plan, summary, args.overrides)
    changed = {word.key_or_group for word in parse_overrides(args.overrides)}
    own_data = not any(key == "data" or key.startswith("data.source") for key in changed)
    student = load_student(run.path)
    if against is not None and other_summary is not None:
        fingerprint = data.fingerprint(args.split) if own_data else None
        add_other(models, run, against, other_summary, student, args.split, fingerprint)
    else:
        find_baseline(models, plan, summary)
    models.add("student", student, run.path)
    for note in class_notes(student.spec.classes, data.classes):
        models.notes.append(note)
    sources = models.sources.items()
    known = {
        name: recording for name, source in sources if (recording := recorded_detections(source, data, args.split))
    }
    folder = run.path / FOLDER
    result, necks = analyze_models(
        models.detectors, data, args.split, folder, groups, args.images, args.pictures, device or plan.device, known
    )
    necks.skipped |= draw_training(run, folder)
    write_summary(
        folder, result, necks, data, args.split, {"run": str(run.path), "models": models.sources, "notes": models.notes}
    )
    print_results(result, models, necks.skipped, folder, args.split)
    print_line("report", write_run_page(run, folder))
    if logger is not None:
        _log(logger, folder)
    return 0


def _wandb_run(run: RunFolder) -> WandbRun:
    """The W&B run of the training, not opened yet."""
    from distill.training.wandb_run import WandbRun

    options = dict(read_config(run).get("logger", {}).get("wandb") or {})
    if not options or not run.wandb_id.is_file():
        raise DistillError(f"--wandb: {run.path} was trained without logger=wandb, so it has no W&B run to add to")
    options.pop("_target_", None)
    try:
        logger = WandbRun(**{**options, "folder": run.path})
    except TypeError as error:
        raise DistillError(f"--wandb: logger.wandb of {run.config}: {error}") from error
    logger.choose_id(resumed=True)
    return logger


def _log(logger: WandbRun, folder: Path) -> None:
    try:
        logger.log_analysis(folder)
        logger.close(failed=False)
    except Exception as error:  # W&B raises errors of any class, for example without a login
        with suppress(Exception):  # a run that did not open cannot close
            logger.close(failed=True)
        raise DistillError(
            f"--wandb: {type(error).__name__}: {error}. The files of the analysis are in {folder}. If W&B refused the "
            "login, use `wandb login` or WANDB_MODE=offline"
        ) from error
    print_line("W&B", logger.experiment.url or f"offline: {logger.experiment.dir}")


def _similar_classes(given: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    groups = [[name.strip() for name in words.split(",")] for words in given]
    if unknown := [name for names in groups for name in names if name not in classes]:
        raise DistillError(f"--similar: expected classes of the data, {', '.join(classes)}, got {', '.join(unknown)}")
    return groups


def print_results(result: Comparison, models: Models, skipped: Mapping[str, str], folder: Path, split: str) -> None:
    """Print the table of errors, the best thresholds, what was left out, and where the files are."""
    from distill.analysis.run_analysis import PICTURES

    rows = [
        [name, percent(model.errors.ap50), *(percent(gain) for gain in model.errors.gain.values())]
        for name, model in result.models.items()
    ]
    kinds = list(next(iter(result.models.values())).errors.gain)
    title = f"{split}, percent: AP50, and the AP50 that errors of each kind cost"
    print_table(title, ("", "AP50", *kinds), rows, compact=True)
    student = result.models["student"]
    names = sorted(student.shares, key=lambda name: -student.curves[name].objects)[:MOST_CLASSES]
    thresholds = [[name, *_threshold_cells(student.curves[name])] for name in ("all classes", *names)]
    print_table(
        f"student, {split}: score at the best F1",
        ("class", "objects", "score", "F1", "precision", "recall"),
        thresholds,
    )
    if len(student.shares) > MOST_CLASSES:
        print_line("", f"{len(student.shares) - MOST_CLASSES} more classes are in thresholds.csv")
    for name, agreement in result.agreements.items():
        text = f"{name} finds {percent(agreement.found)} % of the teacher's {agreement.boxes} boxes"
        if not agreement.boxes:
            text = f"{name}: the teacher has no boxes above its thresholds"
        elif agreement.mistakes:
            text += f", and copies {percent(agreement.copied)} % of its {agreement.mistakes} mistakes"
        print_line("agreement", text)
    for name, model in result.models.items():
        errors = percent(model.calibration.d_ece), percent(model.calibration.la_ece)
        print_line("calibrated", f"{name}: D-ECE {errors[0]} %, LaECE {errors[1]} %")
    if result.to_do:
        first = folder / PICTURES
        print_line(
            "to do", f"{len(result.to_do)} images with errors of the student that the teacher does not make: {first}"
        )
    for note in models.notes:
        print_line("note", note, "yellow")
    reasons: dict[str, list[str]] = {}
    for analysis, reason in skipped.items():
        reasons.setdefault(reason, []).append(analysis)
    for reason, analyses in reasons.items():
        print_line("left out", f"{', '.join(analyses)}: {reason}", "yellow")
    print_line("files", folder)


def _threshold_cells(curve: Curve) -> list[str | None]:
    if curve.best is None:
        return [str(curve.objects), None, None, None, None]
    values = (curve.f1, curve.precision, curve.recall)
    return [str(curve.objects), f"{curve.threshold:.3f}", *(percent(float(column[curve.best])) for column in values)]
