"""The Distiller: student, teacher and named losses, summed. Lightning trains it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from distill import __version__, distributed
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.detectors.description import FORMAT
from distill.evaluation.evaluate import Evaluation, MakeMetric
from distill.frozen import frozen_models
from distill.losses.base import DistillLoss
from distill.teacher import DEFAULT_PREFETCH, Teacher
from distill.training.nonfinite import NonFiniteGuard, StepRecord, poison_gradient, unscales_in_step
from distill.training.schedule import Schedule
from distill.types import Batch, DistillError, View


class Terms(NamedTuple):
    """Loss terms by name."""

    values: dict[str, Tensor]
    """Unweighted scalars."""
    weights: dict[str, float]
    """Factor with which each term enters the loss."""


class StepResult(NamedTuple):
    """The numbers of one training step, attached to the autograd graph."""

    terms: dict[str, Tensor]
    """Unweighted scalars by name: ``student/...`` and those of the distillation losses."""
    weights: dict[str, float]
    """Factor with which each term enters the loss."""
    loss: Tensor
    """Sum of all weighted terms, a scalar."""
    student: View
    teacher: View | None


class Distiller(L.LightningModule):
    """Trains a student with its own losses and the named distillation losses.

    The loss of a step is ``sum(weight * term)`` over the student's supervised terms plus
    ``sum(weight * ramp(progress) * term)`` over the distillation terms. Each term is logged twice: ``term/...`` as the
    method defines it, ``loss/...`` as it enters the sum; of several processes their mean.

    Args:
        student: the detector that is trained, and the only one that is saved.
        teacher: the guest; needed as soon as there is a loss that a detector teaches.
        losses: distillation losses by name; empty is the baseline student.
        schedule: optimiser, learning rate and length.
        supervised: weights of the student's own loss terms by torchvision's names; 1 where not named.
        metrics: builders of the evaluation metrics; their values are logged as ``val/<name>``.
        seed: with the step and the rank, decides every random draw inside a step.
        guard: what happens to steps that are not finite; None: the default one.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Teacher | None = None,
        losses: Mapping[str, DistillLoss] | None = None,
        schedule: Schedule | None = None,
        supervised: Mapping[str, float] | None = None,
        metrics: Sequence[MakeMetric] = (),
        seed: int = 0,
        guard: NonFiniteGuard | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.losses: Any = nn.ModuleDict(losses)  # of DistillLoss
        self.teacher = teacher
        self.schedule = schedule or Schedule()
        self.supervised = dict(supervised or {})
        self.metrics = tuple(metrics)
        self.seed = seed
        self._evaluation: Evaluation | None = None
        self.guard = guard or NonFiniteGuard()
        self.observers: list[Callable[[View, dict[str, Tensor], dict[str, float]], None]] = []
        """Called in each step with the student's View, the unweighted terms, still attached, and their weights."""
        needy = [name for name, loss in self.losses.items() if loss.needs_teacher]
        if needy and teacher is None:
            raise DistillError(f"losses {needy} need a teacher, but none was given; use distill=none")
        self._prefetch: Sequence[str] = DEFAULT_PREFETCH if needy else ()
        """Stages of the teacher that the losses read in the last step."""

    # -- training

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Sum of all weighted terms, a scalar."""
        seed = self.step_seed(index)
        self.guard.save_norm_statistics(self.student)
        step = self.compute_step(batch, seed, self.progress)
        for observe in self.observers:
            observe(step.student, step.terms, step.weights)
        detached = {name: value.detach() for name, value in step.terms.items()}
        self.guard.record(StepRecord(batch, seed, self.progress, detached, step.weights))
        self._log(step)
        return poison_gradient(step.loss)

    def compute_step(self, batch: Batch, seed: int, progress: float) -> StepResult:
        """Views, terms and loss of a training step. Training, doctor, bench and replay take a step's numbers from here.

        Args:
            batch: on the device of the student.
            seed: of all random draws in the step.
            progress: finished part of the training, from 0 to 1, by which ramps scale the weights.
        """
        teacher = self.teacher_view(batch, seed, self._prefetch)
        student = self.student.view(batch, training=True, seed=seed)
        supervised, distilled = self.supervised_terms(student), self.distillation_terms(student, teacher, progress)
        self._prefetch = teacher.stages if teacher else ()
        terms, weights = supervised.values | distilled.values, supervised.weights | distilled.weights
        return StepResult(terms, weights, weighted(terms, weights), student, teacher)

    def teacher_view(self, batch: Batch, seed: int, prefetch: Sequence[str] = ()) -> View | None:
        """The teacher's View in a step of this seed; None where no loss could read the View."""
        if self.teacher is None or not self.losses:
            return None
        return self.teacher.view(batch, seed=seed + 1, prefetch=prefetch)

    def supervised_terms(self, student: View) -> Terms:
        """The student's own loss terms."""
        values = {f"student/{name}": value for name, value in student.losses.items()}
        return Terms(values, {name: self._supervised_weight(name.removeprefix("student/")) for name in values})

    def distillation_terms(self, student: View, teacher: View | None, progress: float) -> Terms:
        """The terms of all distillation losses."""
        terms = Terms({}, {})
        for name, loss in self.losses.items():
            for term, value in loss(student, teacher).items():
                terms.values[f"{name}/{term}"] = value
                terms.weights[f"{name}/{term}"] = loss.weights[term] * loss.factor(term, progress, self.schedule.epochs)
        return terms

    def _supervised_weight(self, name: str) -> float:
        """The configured weight of one of the student's own terms, times what the distillation losses ask for."""
        return math.prod(
            [loss.supervised.get(name, 1.0) for loss in self.losses.values()], start=self.supervised.get(name, 1.0)
        )

    def step_seed(self, index: int) -> int:
        """A number of its own for each step and rank, so that a step's draws depend on nothing that came before."""
        text = f"{self.seed}/{self.current_epoch}/{index}/{self.global_rank}"
        return 2 * int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    @property
    def progress(self) -> float:
        """How much of the training is done, from 0 to 1, counted in optimiser steps."""
        return min(1.0, self.global_step / max(1, int(self.trainer.estimated_stepping_batches)))

    def _log(self, step: StepResult) -> None:
        terms, weights, loss = step.terms, step.weights, step.loss
        size = 1  # the value is not used for step-wise logging, but Lightning would search the batch for it
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=size)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            # One all-reduce for all terms; Lightning's sync_dist would take one each.
            shares = torch.stack([value.detach().float() for value in (*terms.values(), loss)])
            summed, processes = distributed.summed(shares)
            *means, total = (summed / processes).unbind()
            values = {f"term/{name}": mean for name, mean in zip(terms, means, strict=True)}
            values |= {f"loss/{name}": weights[name] * mean for name, mean in zip(terms, means, strict=True)}
            self.log_dict(values | {"loss/total": total}, batch_size=size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Pass over a step that is not finite, before any weight changes."""
        self.guard.skip_bad_step(self, optimizer)

    # -- evaluation

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics over the validation split, for the same detector on all ranks."""
        self._share_buffers()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._evaluation = Evaluation(self.student, data.ground_truth("val"), data.classes, self.metrics, self.device)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Collect the student's detections."""
        assert self._evaluation is not None
        self._evaluation.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/AP`` and the rest; equal on all ranks."""
        assert self._evaluation is not None
        values, self._evaluation = self._evaluation.compute(), None
        self.log_dict({f"val/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()})

    def _share_buffers(self) -> None:
        """Give every rank the buffers of rank 0, whose checkpoint is kept: live batch norm lets them drift apart.

        DDP's own ``broadcast_buffers`` would do it in every forward pass, evaluation's too, where a rank that has fewer
        batches than the others makes them wait for ever.
        """
        if distributed.world_size() > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    # -- epoch hooks, optimiser, checkpoints

    def on_train_epoch_start(self) -> None:
        """Let losses that keep state over an epoch (prototypes and the like) rebuild it."""
        self.start_epoch(self.current_epoch, self.trainer.datamodule)  # type: ignore[attr-defined]
        self._check_guests()

    def start_epoch(self, epoch: int, data: DetectionData) -> None:
        """Let each loss build its state of an epoch, such as prototypes."""
        for loss in self.losses.values():
            loss.on_epoch_start(epoch, data, self.student, self.teacher)

    def set_epoch(self, epoch: int) -> None:
        """Tell all losses, those inside others too, which epoch it is: they draw by it."""
        for each in self.losses.modules():
            if isinstance(each, DistillLoss):
                each.epoch = epoch

    def on_train_epoch_end(self) -> None:
        """What is saved after this epoch is what every rank goes on with; the guests are as they came."""
        self._share_buffers()
        self._check_guests()

    def _check_guests(self) -> None:
        for guest in {id(each): each for each in (self.teacher, *frozen_models(self.losses)) if each}.values():
            guest.check()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and learning rate of the schedule, over the student and its adapters."""
        batch = self.trainer.datamodule.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        optimizer, scheduler = self.schedule.build(
            self.student, self.losses, int(self.trainer.estimated_stepping_batches), batch
        )
        if (
            self.schedule.clip
            and getattr(self.trainer.precision_plugin, "scaler", None)
            and unscales_in_step(optimizer)
        ):
            raise DistillError(
                f"schedule.clip={self.schedule.clip:g} with trainer.precision=16-mixed and a fused {type(optimizer).__name__}, "
                "which unscales the gradients in its own step: there is no moment to clip them. Set "
                "schedule.optimizer.fused=false, schedule.clip=null or trainer.precision=bf16-mixed"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The version, the student's description, and the identities of teacher and frozen models, never their weights."""
        checkpoint["distill_version"] = __version__
        checkpoint["student_format"] = FORMAT
        checkpoint["student"] = self.student.describe()
        checkpoint["teacher"] = self.teacher.identity() if self.teacher else None
        checkpoint["guests"] = {name: loss.identity() for name, loss in self.losses.items()}
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another student or teacher, or another guest of a loss."""
        self.set_epoch(checkpoint.get("epoch", 0))  # inside an epoch its start is not called again
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])
        if "student" not in checkpoint:
            return
        held, here = checkpoint["student"], self.student.describe()
        other = [
            f"{name}={here.get(name)!r} (there {value!r})" for name, value in held.items() if here.get(name) != value
        ]
        if other:
            raise DistillError(
                f"resume: the checkpoint holds another student: {', '.join(other)}. Set model as it was in that run, or start "
                "a new run without ckpt_path"
            )
        for name, before in checkpoint.get("guests", {}).items():
            now = self.losses[name].identity() if name in self.losses else before
            if _sha256(before) != _sha256(now):
                raise DistillError(
                    f"resume: the checkpoint was made with the guest {_name(before)} of the loss {name}, but this run has "
                    f"{_name(now)}. Set distill.losses.{name} as it was in that run, or start a new run without ckpt_path"
                )
        if "teacher" not in checkpoint:  # whoever reads it said that it may be another
            return
        before, now = checkpoint["teacher"], self.teacher.identity() if self.teacher else None
        if _sha256(before) != _sha256(now):
            raise DistillError(
                f"resume: the checkpoint was made with the teacher {_name(before)}, but this run has {_name(now)}. "
                "Set teacher.weights and distill as they were in that run, or start a new run without ckpt_path"
            )


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum that is descended: weight times term, a scalar."""
    device = next((value.device for value in terms.values()), None)
    return sum((weights[name] * terms[name] for name in terms), start=torch.zeros((), device=device))


def _name(teacher: Mapping[str, Any] | None) -> str:
    return f"{teacher['source']} (sha256 {teacher['sha256'][:12]})" if teacher else "none"


def _sha256(guest: Mapping[str, Any] | None) -> str | None:
    return guest["sha256"] if guest else None
