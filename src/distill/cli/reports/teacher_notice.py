"""Says before a run that a teacher is trained first, and how long this takes."""

from __future__ import annotations

import shlex

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng

from distill.cli.config import instantiate
from distill.cli.config.overrides import parse_overrides
from distill.cli.reports.run_estimate import estimate_seconds
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.teacher_cache import run_config, teacher_run, untrained
from distill.cli.tables import print_line
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.diagnostics.cost import device_name
from distill.training.distiller import Distiller
from distill.units import duration, time_of_day

LARGE = 10_000_000
"""Number of parameters from which the teacher's training is timed before it starts. A small one tells its duration
itself in its first minute."""
LONG = 15 * 60
"""Seconds from which a smaller pair of models is suggested."""
IMAGES = 2
"""Training images of a measured step on a CPU. A GPU is measured with the run's batch."""
MODEL_GROUPS = ("model", "teacher", "supervised", "start", "hydra")


@rank_zero_only
def announce_teacher(plan: RunPlan, trainer: L.Trainer, data: DetectionData) -> None:
    """Print that a teacher is trained first, if none is cached: its size, and the expected duration of a large one."""
    options = plan.teacher
    if not plan.needs_teacher or options is None or options.weights is not None or options.train == "never":
        return
    run = teacher_run(options)
    if run.finished:
        return
    other_data = bool(options.own.get("data"))  # which only the teacher's run reads
    with isolate_rng():
        detector = untrained(options, data.classes)
        size = f"a {detector.spec.family} of {detector.parameters_count / 1e6:.1f} M parameters"
        if detector.parameters_count < LARGE or other_data:
            print_line("teacher", f"none is cached: {size} is trained first")
            return
        device: torch.device = trainer.strategy.root_device
        print_line("teacher", f"none is cached: {size} is trained first, on {device_name(device)}")
        config = run_config(run.overrides)
        module = Distiller(detector, schedule=instantiate.build_node(config.schedule)).to(device)
        images = data.batch_size if device.type == "cuda" else min(IMAGES, data.batch_size)
        seconds = estimate_seconds(config.trainer, module, data, trainer, images)
    print_line("", f"This takes about {duration(seconds)} here, until {time_of_day(seconds)}. Later runs reuse it.")
    if seconds > LONG and (command := smaller_command(plan)):
        promise = "shows the same in minutes" if isinstance(data.source, Shapes) else "takes less time"
        print_line("", f"A pair of small models {promise}:\n{command}")


def smaller_command(plan: RunPlan) -> str | None:
    """This run with the default models, as a command for a shell; None if it has them already."""
    parsed = [
        (override.key_or_group.split(".")[0].split("@")[0], override) for override in parse_overrides(plan.overrides)
    ]
    kept = [str(override.input_line) for group, override in parsed if group not in MODEL_GROUPS]
    if not any(group == "model" for group, _ in parsed):
        return None
    return shlex.join(["python", "-m", "distill", "train", *kept])
