"""The verb bench: what distillation costs on this machine, with this data and these models, and what is the bottleneck."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from distill.cli import compose, validate
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector
    from distill.diagnostics.bench.clock import Spread
    from distill.diagnostics.bench.report import Cost, OptionCost, Report
    from distill.diagnostics.memory import Memory
    from distill.losses.base import DistillLoss
    from distill.teacher import Teacher
    from distill.types import Batch


def main(argv: Sequence[str]) -> int:
    """``distill bench [--all] [--json FILE] [--repeats 10] [--clock cpu] [overrides]``."""
    parser = argparse.ArgumentParser(prog="distill bench", description=__doc__)
    parser.add_argument("--all", action="store_true", help="each distill option that fits, not only the chosen one")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--repeats", type=int, default=10, help="rounds that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--batches", type=int, default=20, help="batches that the loader is measured on")
    parser.add_argument("--images", type=int, default=50, help="images that evaluation is measured on")
    parser.add_argument(
        "--clock", default="wall", help="wall, or cpu: the processor's time, steadier on a busy machine"
    )
    parser.add_argument("overrides", nargs="*", help="as for train: model=frcnn_r18 distill=defeat data=coco …")
    args = parser.parse_intermixed_args(list(argv))
    if min(args.repeats, args.batches, args.images) < 1 or args.warmup < 0:
        raise DistillError("bench: --repeats, --batches and --images start at 1, --warmup at 0")
    report = bench(args)
    show(report)
    if args.json:
        from distill.files import write_text

        write_text(args.json, json.dumps(report.plain(), indent=1))
    return 0


def bench(args: argparse.Namespace) -> Report:
    """Build all, then measure: the student's step, that of each option, the loader, evaluation."""
    import torch
    from lightning import seed_everything

    from distill.cli.train import build_metrics, check_masks
    from distill.diagnostics.bench import measure
    from distill.diagnostics.bench.clock import Clock
    from distill.diagnostics.bench.report import Report, verdict
    from distill.diagnostics.bench.step import Step
    from distill.precision import autocast, chosen
    from distill.progress import track
    from distill.training.distiller import Distiller
    from distill.training.schedule import channels_last

    cfg = validate.checked(args.overrides)
    seed_everything(cfg.seed, workers=True, verbose=False)
    device = compose.device(cfg)
    clock = Clock(device, args.clock)
    data = compose.build(cfg.data)
    data.setup("fit")
    batch = next(iter(data.train_dataloader())).to(device)
    min_size, max_size = data.input_size
    student = untrained(cfg.model, data, min_size=min_size, max_size=max_size).to(device)
    check_masks(cfg, student, data)
    measure.settle(student, batch)
    student.train()
    if cfg.channels_last:
        channels_last(student)
    precision = chosen(str(cfg.trainer.precision), device.type == "cuda")
    schedule, supervised = compose.build(cfg.schedule), compose.plain(cfg.supervised)

    def make(teacher: Any, losses: Any) -> Step:
        module = Distiller(student, teacher, losses, schedule, supervised)
        return Step(module, batch, partial(autocast, precision, device))

    plain, nodes = make(None, {}), _nodes(cfg, args)
    teacher = _teacher(cfg, data, batch) if nodes else None
    own = measure.measure_student(plain, clock, args.repeats, args.warmup)
    costs: dict[str, OptionCost] = {}
    skipped: dict[str, str] = {}
    for name, node in track(nodes.items(), "options"):
        try:
            # One after another, so that each has the memory for itself.
            step = make(teacher, _losses(node, data, student, teacher))
            if cfg.channels_last:
                channels_last(step.losses)
            costs[name] = measure.measure_option(plain, step, clock, args.repeats, args.warmup)
        except DistillError as error:
            if not args.all:
                raise
            skipped[name] = str(error)
    report = Report(
        setting={
            "overrides": list(args.overrides),
            "batch": list(batch.images.shape),
            "student_parameters": student.parameters_count,
            "teacher_parameters": teacher.detector.parameters_count if teacher else 0,
            "teacher": teacher.source if teacher else None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "precision": precision,
            "clock": clock.kind,
            "repeats": args.repeats,
            "torch": str(torch.__version__),
        },
        student=own,
        options=costs,
        skipped=skipped,
        loader=measure.measure_loader(data, args.batches),
        evaluation=measure.measure_evaluation(student, data, build_metrics(cfg), device, images=args.images),
    )
    report.verdict = verdict(report, len(batch))
    return report


def untrained(node: Any, data: DetectionData, **given: Any) -> Detector:
    """A detector with random weights, which are as fast as any others."""
    detector: Detector = compose.build(node, classes=list(data.classes), weights=None, backbone_weights=None, **given)
    return detector


def _losses(cfg: DictConfig, data: DetectionData, student: Detector, teacher: Teacher | None) -> dict[str, DistillLoss]:
    """The losses of a configuration, ready for their first epoch."""
    from distill.cli.train import build_losses

    losses = build_losses(cfg, student.spec, teacher.spec if teacher else None)
    for loss in losses.values():
        loss.on_epoch_start(0, data, student, teacher)
    return losses


def _nodes(cfg: DictConfig, args: argparse.Namespace) -> dict[str, DictConfig]:
    """Configurations by the name of their distill option: the chosen one, or with ``--all`` every one."""
    if not args.all:
        return {"+".join(cfg.distill.losses): cfg} if cfg.distill.losses else {}
    kept = [
        str(line.input_line) for line in compose.parse(args.overrides) if line.key_or_group.split(".")[0] != "distill"
    ]
    options = [option for option in compose.groups()["distill"] if option != "none"]
    return {option: compose.composed([*kept, f"distill={option}"]) for option in options}


def _teacher(cfg: DictConfig, data: DetectionData, batch: Batch) -> Teacher | None:
    """The named teacher, or an untrained one as it is planned; None where the configuration has none."""
    from distill.cli import teacher
    from distill.diagnostics.bench.measure import settle

    if not teacher.described(cfg):
        return None
    if cfg.teacher.weights is not None:
        return teacher.find(cfg, data)
    detector = untrained(cfg.teacher.model, data).to(batch.images.device)
    settle(detector, batch)
    return teacher.guest(cfg, detector.cpu(), "untrained")


def show(report: Report) -> None:
    """The numbers as a table, and the verdict."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console, setting = Console(), report.setting
    size = "x".join(map(str, setting["batch"]))
    who = "student untrained" + (f", teacher {setting['teacher']}" if setting["teacher"] else "")
    lines = {
        "setting": f"batch {size}, {setting['device']}, {setting['threads']} threads, {setting['precision']}",
        "weights": f"{who}: what a model finds hangs on them, its speed hardly",
        "clock": f"{setting['clock']}; median of {setting['repeats']} rounds ± half the distance of the quartiles",
    }
    _say(console, lines.items())
    again = any(cost.student_recompute_ratio.median for cost in report.options.values())
    title = "a training step; beside it teacher, adapters" + (", layers of the student run again" if again else "")
    table = Table(title=f"{title}, by the student's own step", title_justify="left", box=SIMPLE, collapse_padding=True)
    names = (
        "",
        "ms",
        "x student",
        "teacher",
        "adapters",
        *(["again"] if again else []),
        "rest, %",
        "GFLOP",
        "peak MiB",
    )
    for name in names:
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    empty = [""] * (len(names) - 5)
    table.add_row("student alone", _spread(report.student.step, 1000, 0), "1", *empty, *_amounts(report.student))
    for name, cost in report.options.items():
        ratios = [cost.teacher_ratio, cost.adapters_ratio, *([cost.student_recompute_ratio] if again else [])]
        parts = [f"{each.median:.3f}" for each in ratios]
        whole = _spread(cost.step, 1000, 0), f"{cost.ratio.median:.2f}"
        table.add_row(name, *whole, *parts, _spread(cost.loss_overhead, 100, 1), *_amounts(cost))
    console.print(table)
    _say(console, [(f"{name} reads", "teacher's " + ", ".join(cost.stages)) for name, cost in report.options.items()])
    _say(console, [(f"{name} in memory", _sum(cost.bytes)) for name, cost in report.options.items()])
    _say(console, [(f"{name} left out", reason) for name, reason in report.skipped.items()])
    given, taken = report.loader, report.evaluation
    eats = setting["batch"][0] / report.student.step.median
    rate = f"{given['images_per_second']:.1f} images/s from {given['workers']:.0f} workers; the student alone eats {eats:.1f}"
    halves = f"{taken['detect']:.1f} to load and detect, {taken['metric']:.1f} to measure"
    both = taken["detect"] + taken["metric"]
    _say(console, [("loader", rate), ("evaluation", f"{both:.1f} s per 1,000 images ({halves})")])
    _say(console, [("verdict", line) for line in report.verdict])


def _say(console: Any, lines: Iterable[tuple[str, str]]) -> None:
    for name, text in lines:
        console.print(f"[bold]{name}[/]  {text}", highlight=False)


def _spread(spread: Spread, unit: float, digits: int) -> str:
    return f"{unit * spread.median:.{digits}f}±{unit * (spread.high - spread.low) / 2:.{digits}f}"


def _sum(memory: Memory) -> str:
    """The parts that a step's memory may have, their sum, and the peak."""
    parts = {
        "student alone": memory.student,
        "weights that teach": memory.teacher,
        "weights of the losses": memory.losses,
        "maps that the losses hold": memory.held,
    }
    words = " + ".join(f"{_mib(value)} {name}" for name, value in parts.items())
    return f"{words} = {_mib(memory.sum)} MiB; the step's peak is {_mib(memory.peak)} MiB, {memory.peak / memory.sum:.3f} of it"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _amounts(cost: Cost) -> tuple[str, str]:
    most = cost.memory.get("device", cost.memory.get("host"))
    return f"{cost.flops / 1e9:.1f}", "–" if most is None else f"{most / 2**20:.0f}"
