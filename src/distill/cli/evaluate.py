"""The verb evaluate: AP of a finished or interrupted run's student, or of its teacher, on any split or data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.cli import compose, validate
from distill.run_folder import OVERRIDES, STUDENT, SUMMARY, RunFolder
from distill.types import DistillError


def main(argv: Sequence[str]) -> int:
    """``distill evaluate RUN|CKPT [--split test] [--teacher] [--json FILE] [data=voc …]``."""
    parser = argparse.ArgumentParser(prog="distill evaluate", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN|CKPT", help="a run folder, or one of its checkpoints")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--teacher", action="store_true", help="measure the run's teacher instead of its student")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument(
        "overrides", nargs="*", help="as for train: data=voc data.source.root=…, metrics.coco.per_class=true"
    )
    args = parser.parse_intermixed_args(list(argv))
    run = run_folder(args.source)
    cfg = recompose(run, args.overrides)
    measured = evaluate(cfg, run, args.source, args.split, args.teacher)
    show(measured, args.split, "teacher" if args.teacher else "student")
    if args.json:
        from distill.files import write_text

        write_text(args.json, json.dumps(measured, indent=1))
    return 0


def run_folder(source: Path) -> Path:
    """The run that a folder or a checkpoint belongs to."""
    for folder in (source, *source.absolute().parents):
        if RunFolder(folder).overrides.is_file():
            return folder.absolute()
    raise DistillError(
        f"{source} is not a run, nor a file inside one: expected a folder with {OVERRIDES}, as train leaves it"
    )


def recompose(run: Path, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration, composed again with further overrides."""
    chosen = {override.key_or_group for override in compose.parse(overrides)} & set(compose.groups())
    before = [
        str(override.input_line)
        for override in compose.recorded(run)
        if override.key_or_group.split(".")[0] not in chosen  # data=voc does away with what was said of the run's data
    ]
    return validate.checked([*before, *overrides])


def evaluate(cfg: DictConfig, run: Path, source: Path, split: str, teacher: bool) -> dict[str, float]:
    """Numbers by name, as validation inside training measures them."""

    from distill.cli.train import build_metrics
    from distill.evaluation.evaluate import evaluate as measure

    data = compose.build(cfg.data)
    data.setup("test" if split == "test" else "fit")
    detector = _teacher(run, cfg) if teacher else load_student(source)
    trained = (detector.options["min_size"], detector.options["max_size"])
    if trained != data.input_size:
        print(f"distill: the detector is made for sizes {trained}, this data gives {data.input_size} (data.min_size)")
    metrics = build_metrics(cfg)
    return measure(
        detector, data, split, metrics, compose.device(cfg), f"{'teacher' if teacher else 'student'}, {split}"
    )


def load_student(source: Path) -> Any:
    """The exported student of a run folder, or the student inside a checkpoint."""
    import torch

    from distill.detectors.description import checkpoint_model
    from distill.detectors.registry import described, load_detector
    from distill.detectors.weights import fit, fit_sizes
    from distill.files import load_tensors

    if source.suffix != ".ckpt":
        run = RunFolder(source)
        if source.is_dir() and not run.student.is_file():
            raise DistillError(f"{source} has no {STUDENT}: the run did not finish; try {run.last}")
        return load_detector(source)
    if not source.is_file():
        raise DistillError(f"{source}: no such checkpoint")
    content = load_tensors(source)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise DistillError(f"{source}: expected a checkpoint of a run, with the student's weights in it")
    state = {
        name.removeprefix("student.net."): value
        for name, value in weights.items()
        if str(name).startswith("student.net.") and isinstance(value, torch.Tensor)
    }
    model = checkpoint_model(content, str(source))
    with torch.device("meta"):
        fit_sizes(described(model, str(source)).net, state, str(source))
    student = described(model, str(source))
    fit(student.net, state, str(source))
    return student


def _teacher(run: Path, cfg: DictConfig) -> Any:
    from distill.cli.teacher import load
    from distill.files import read_json

    summary = RunFolder(run).summary
    identity = read_json(summary).get("teacher") if summary.is_file() else None
    if not identity:
        raise DistillError(f"{run} has no teacher: its {SUMMARY} names none (distill=none, or the run did not finish)")
    source, classes = (identity.get(key) if isinstance(identity, dict) else None for key in ("source", "classes"))
    if not isinstance(source, str) or not isinstance(classes, list):
        raise DistillError(f"{summary}: expected the teacher's 'source' and 'classes', got {identity}")
    return load(cfg, source, [str(name) for name in classes])


def show(measured: dict[str, float], split: str, who: str) -> None:
    """The numbers as a table, in percent."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{who}, {split}, percent", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in measured.items():
        table.add_row(escape(name), f"{100 * value:.2f}" if value >= 0 else "no ground truth")
    Console().print(table)
