"""The command evaluate: AP of a run's student, or of its teacher, on any split or data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from distill.cli.config.override_checks import compose_without_run
from distill.cli.config.overrides import parse_overrides
from distill.cli.devices import add_device_option, find_device
from distill.cli.runs.recorded_run import class_notes, find_run, load_student, load_teacher_of, recompose, trained_size
from distill.cli.startup import uncollected_imports
from distill.export.suffixes import is_exported
from distill.labels import unknown_classes
from distill.types import DistillError
from distill.units import percent


def main(argv: Sequence[str]) -> int:
    """``distill evaluate RUN|CKPT|FILE.onnx [--split test] [--teacher] [--device cpu] [--json FILE] [data=voc …]``."""
    parser = argparse.ArgumentParser(
        prog="distill evaluate",
        usage="distill evaluate RUN|CKPT|FILE [--split SPLIT] [--teacher] [--device DEVICE] [--json FILE] [overrides]",
        description=__doc__,
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN|CKPT|FILE", help="a run folder, one of its checkpoints, or an exported file"
    )
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="split; default: val")
    parser.add_argument("--teacher", action="store_true", help="evaluate the run's teacher instead of its student")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add_device_option(parser, "that of the run (trainer.accelerator)")
    parser.add_argument(
        "overrides", nargs="*", help="as for train: data=voc data.source.root=…, metrics.coco.per_class=true"
    )
    args = parser.parse_intermixed_args(list(argv))
    if is_exported(args.source.name):
        return evaluate_file(args)
    device = None if args.device is None else find_device(args.device)
    run = find_run(args.source)
    cfg = recompose(run, [*args.overrides, *trained_size(args.source, args.overrides)])

    with uncollected_imports():
        from distill.cli.runs.assembly import assemble
        from distill.cli.runs.preflight import plan_run
        from distill.cli.runs.teacher_cache import bridge_teacher
        from distill.evaluation.evaluate import evaluate

    plan = plan_run(cfg)
    data = plan.data
    data.records(args.split)  # reads no other split: this data may have one only
    if args.teacher:
        given = any(override.key_or_group == "teacher.weights" for override in parse_overrides(args.overrides))
        detector = load_teacher_of(run, plan.teacher, data.classes if given else None)
        bridge_teacher(plan.teacher, detector, data.classes)
    else:
        detector = load_student(args.source)
    trained = (detector.options["min_size"], detector.options["max_size"])
    if trained != data.input_size:
        print(f"distill: the detector is made for sizes {trained}, this data gives {data.input_size} (data.min_size)")
    module = assemble(replace(plan, losses={}, inherit=False), data, detector)
    title = f"{'teacher' if args.teacher else 'student'}, {args.split}"
    results = evaluate(module.student, data, args.split, module.metrics, device or plan.device, title)
    report(title, results, detector.spec.data_classes, data.classes, args.json)
    return 0


def evaluate_file(args: argparse.Namespace) -> int:
    """Measure an exported file on original images. It resizes them itself.

    Raises:
        DistillError: the file lies in no run and no data is given, or the file cannot be evaluated.
    """
    if args.teacher:
        raise DistillError(f"--teacher: {args.source} is an exported student, which has no teacher; name the run")
    try:
        cfg = recompose(find_run(args.source), args.overrides)
    except DistillError as error:
        if not any(override.key_or_group == "data" for override in parse_overrides(args.overrides)):
            raise DistillError(
                f"{args.source} does not lie in a run's folder, so its data is not known: add data=DIR, or data=voc …"
            ) from error
        cfg = compose_without_run(["distill=none", *args.overrides])

    with uncollected_imports():
        from distill.cli.runs.preflight import plan_run
        from distill.export.exported import ExportedDetector
        from distill.export.proof import ValidationImages, evaluate_program

    exported = ExportedDetector(args.source)
    plan = plan_run(cfg)
    images = ValidationImages(plan.data, args.split)
    title = f"{args.source.name}, {args.split}"
    results = evaluate_program(exported, exported.detect, images, list(plan.metrics), title)
    report(title, results, exported.classes, plan.data.classes, args.json)
    return 0


def report(
    title: str, results: Mapping[str, float], known: Sequence[str], classes: Sequence[str], file: Path | None
) -> None:
    """Print the metrics of a detector, and write them to a JSON file if wanted.

    Args:
        title: title of the table.
        results: metrics by name, from 0 to 1.
        known: class names of the detector.
        classes: class names of the data.
        file: the JSON file; None: not written.
    """
    from distill.cli.tables import print_table
    from distill.evaluation.metric import SHARED
    from distill.files import write_text

    for note in class_notes(known, classes):
        print(f"distill: {note}")
    unknown = unknown_classes(known, classes)
    shared = {name.removeprefix(SHARED): value for name, value in results.items() if name.startswith(SHARED)}
    rows = [
        (name, format_result(value), *([format_result(shared.get(name, value))] if unknown else ()))
        if name.partition("/")[2] not in unknown
        else (name, "unknown to the model", None)
        for name, value in results.items()
        if not name.startswith(SHARED)
    ]
    print_table(f"{title}, percent", ("metric", "value", *(["shared classes"] if unknown else ())), rows)
    if file:
        write_text(file, json.dumps(results, indent=1))


def format_result(value: float) -> str:
    """A metric in percent, or the reason why it does not exist."""
    return percent(value) if value >= 0 else "no ground truth"
