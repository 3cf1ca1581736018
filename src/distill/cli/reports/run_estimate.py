"""Time and memory of a run, estimated from a few batches before the run starts."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch

from distill.data.datamodule import DetectionData
from distill.diagnostics import doctor
from distill.diagnostics.sampled_evaluation import evaluate_sample
from distill.training.distiller import Distiller

PATIENCE = 15.0
"""Maximum duration of one measurement, in seconds."""
BATCHES = 3
"""Batches whose forward and backward passes are timed."""


def estimate_run(limits: Any, module: Distiller, data: DetectionData, trainer: L.Trainer) -> dict[str, Any]:
    """Time and memory of a run on this machine, measured on a few batches.

    Args:
        limits: a trainer, or a configuration node ``trainer``, with the limits that end the run.
        module: module of the run.
        data: the data, already read.
        trainer: provides device, precision and number of processes.
    """
    device: torch.device = trainer.strategy.root_device
    processes = trainer.num_devices * trainer.num_nodes
    loader = data.train_dataloader()
    pace = doctor.measure_pace(module, str(trainer.precision), loader, device, BATCHES, PATIENCE)
    evaluated = evaluate_sample(module.student, data, (), device, 2 * data.eval_batch_size, PATIENCE)
    batches, evaluations = planned_batches(limits, max(1, len(loader) // processes))
    training = batches * pace["seconds_per_batch"]
    evaluating = evaluations * evaluated["detect"] * len(data.records("val")) / processes
    return {
        "device": str(device),
        "processes": processes,
        "precision": str(trainer.precision),
        "batches": batches,
        "evaluations": evaluations,
        "seconds_per_batch": pace["seconds_per_batch"],
        "seconds": {"training": training, "evaluation": evaluating, "total": training + evaluating},
        "bytes": pace["peak_bytes"],
        "device_bytes": doctor.device_bytes(device),
    }


def estimate_seconds(limits: Any, module: Distiller, data: DetectionData, trainer: L.Trainer, images: int) -> float:
    """Rough seconds of a run, from two steps and one detection with a small batch. Takes far less than `estimate_run`.

    Args:
        limits, module, data, trainer: as for `estimate_run`.
        images: number of training images of a measured step; on a CPU, the time of a step is proportional to it.
    """
    device, processes = trainer.strategy.root_device, trainer.num_devices * trainer.num_nodes
    batch = data.load_batch("train", range(min(images, len(data.records("train")))))
    pace = doctor.measure_pace(module, str(trainer.precision), [batch, batch], device, 1, PATIENCE)
    evaluated = evaluate_sample(module.student, data, (), device, 1, PATIENCE)
    steps = len(data.dataset("train", training=True)) // (data.batch_size * processes)
    batches, evaluations = planned_batches(limits, max(1, steps))
    training = batches * data.batch_size * pace["seconds_per_batch"] / len(batch)
    return float(training + evaluations * len(data.records("val")) * evaluated["detect"] / processes)


def planned_batches(limits: Any, batches: int) -> tuple[int, int]:
    """Number of training batches per process, with `batches` per epoch, and of evaluations, with the final one."""
    part = 1.0 if limits.limit_train_batches is None else limits.limit_train_batches
    an_epoch = min(batches, part) if isinstance(part, int) else max(1, int(batches * part))
    total = an_epoch * limits.max_epochs
    if limits.max_steps >= 0:
        total = min(total, limits.max_steps * limits.accumulate_grad_batches)
    every = limits.check_val_every_n_epoch
    # The weights at the end of the training are evaluated too, unless it ends inside its first epoch.
    return total, (math.ceil(total / (an_epoch * every)) if every and total >= an_epoch else 0) + 1
