"""The Distiller: student, teacher and named losses, summed. Lightning trains it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from distill.detectors.base import Detector
from distill.evaluation import Evaluation, MakeMetric
from distill.guest import Guest
from distill.losses.base import DistillLoss, over_processes
from distill.optimization import Schedule
from distill.types import Batch, DistillError, View


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
    """

    def __init__(
        self,
        student: Detector,
        teacher: Guest | None = None,
        losses: Mapping[str, DistillLoss] | None = None,
        schedule: Schedule | None = None,
        supervised: Mapping[str, float] | None = None,
        metrics: Sequence[MakeMetric] = (),
        seed: int = 0,
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
        self._pending: list[tuple[list[str], Tensor, Any, Batch]] = []
        needy = [name for name, loss in self.losses.items() if loss.needs_teacher]
        if needy and teacher is None:
            raise DistillError(f"losses {needy} need a teacher, but none was given; use distill=none")

    # -- training

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Sum of all weighted terms, a scalar."""
        draw = self._step_seed(index)
        student = self.student.view(batch, training=True, seed=draw)
        terms = {f"student/{name}": value for name, value in student.losses.items()}
        weights = {name: self._supervised_weight(name.removeprefix("student/")) for name in terms}
        if self.losses:
            teacher = self.teacher.view(batch, seed=draw + 1) if self.teacher else None
            self._distil(student, teacher, terms, weights)
        values = torch.stack([terms[name].float() for name in terms])
        loss = sum((weights[name] * terms[name] for name in terms), start=values.new_zeros(()))
        self._watch(list(terms), values.detach(), batch)
        self._log(terms, weights, loss)
        return loss

    def _supervised_weight(self, name: str) -> float:
        """The configured weight of one of the student's own terms, times what the distillation losses ask for."""
        return math.prod(
            [loss.supervised.get(name, 1.0) for loss in self.losses.values()], start=self.supervised.get(name, 1.0)
        )

    def _distil(self, student: View, teacher: View | None, terms: dict[str, Tensor], weights: dict[str, float]) -> None:
        for name, loss in self.losses.items():
            for term, value in loss(student, teacher).items():
                terms[f"{name}/{term}"] = value
                factor = loss.factor(term, self.progress, self.schedule.epochs)
                weights[f"{name}/{term}"] = loss.weights[term] * factor

    def _step_seed(self, index: int) -> int:
        """A number of its own for each step and rank, so that a step's draws depend on nothing that came before."""
        text = f"{self.seed}/{self.current_epoch}/{index}/{self.global_rank}"
        return 2 * int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    @property
    def progress(self) -> float:
        """How much of the training is done, from 0 to 1, counted in optimiser steps."""
        return min(1.0, self.global_step / max(1, int(self.trainer.estimated_stepping_batches)))

    def _log(self, terms: dict[str, Tensor], weights: dict[str, float], loss: Tensor) -> None:
        size = 1  # the value is not used for step-wise logging, but Lightning would search the batch for it
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=size)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            # One all-reduce for all terms; Lightning's sync_dist would take one each.
            shares = torch.stack([value.detach().float() for value in (*terms.values(), loss)])
            summed, processes = over_processes(shares)
            *means, total = (summed / processes).unbind()
            values = {f"term/{name}": mean for name, mean in zip(terms, means, strict=True)}
            values |= {f"loss/{name}": weights[name] * mean for name, mean in zip(terms, means, strict=True)}
            self.log_dict(values | {"loss/total": total}, batch_size=size)

    # -- finite numbers, without a sync in the forward pass

    def _watch(self, names: list[str], values: Tensor, batch: Batch) -> None:
        event = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)
            values = values.to("cpu", non_blocking=True)
            event = stream.record_event()
        self._pending.append((names, values, event, batch))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the flags of the forward pass now that the backward pass is queued, before any weight changes."""
        pending, self._pending = self._pending, []
        for names, values, event, batch in pending:
            if event is not None:
                event.synchronize()
            bad = [name for name, finite in zip(names, torch.isfinite(values).tolist(), strict=True) if not finite]
            if bad:
                raise DistillError(self._describe_non_finite(bad, batch))

    def _describe_non_finite(self, bad: list[str], batch: Batch) -> str:
        """Name terms, levels and images, by looking again with the weights that are still untouched."""
        with self.trainer.precision_plugin.forward_context():
            views = {"student": self.student.view(batch, frozen=True)}
            if self.teacher is not None and self.losses:
                views["teacher"] = self.teacher.view(batch)
            places = [place for who, view in views.items() for place in _not_finite(who, view)]
        where = "; ".join(places) or "all maps are finite, so the box head or the term's own formula produced it"
        return (
            f"step {self.global_step}: the loss is not finite in {', '.join(bad)} (images {list(batch.ids)}). "
            f"Levels: {where}. No weight was changed by this step. Lower the learning rate or the term's weight, "
            "lengthen the warm-up, or set schedule.clip"
        )

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
        if dist.is_available() and dist.is_initialized():
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    # -- epoch hooks, optimiser, checkpoints

    def on_train_epoch_start(self) -> None:
        """Let losses that keep state over an epoch (prototypes and the like) rebuild it."""
        for loss in self.losses.values():
            loss.on_epoch_start(self.current_epoch, self.trainer.datamodule, self.student, self.teacher)  # type: ignore[attr-defined]

    def on_train_epoch_end(self) -> None:
        """What is saved after this epoch is what every rank goes on with."""
        self._share_buffers()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and learning rate of the schedule, over the student and its adapters."""
        batch = self.trainer.datamodule.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        optimizer, scheduler = self.schedule.build(
            self.student, self.losses, int(self.trainer.estimated_stepping_batches), batch
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the student is, and the guests' identities, never their weights."""
        checkpoint["student"] = self.student.describe()
        checkpoint["teacher"] = self.teacher.identity() if self.teacher else None
        checkpoint["guests"] = {name: loss.identity() for name, loss in self.losses.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another student or teacher, or another guest of a loss."""
        for each in self.losses.modules():
            if isinstance(each, DistillLoss):
                each.epoch = checkpoint.get("epoch", 0)  # inside an epoch its start is not called again
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


def _name(teacher: Mapping[str, Any] | None) -> str:
    return f"{teacher['source']} (sha256 {teacher['sha256'][:12]})" if teacher else "none"


def _sha256(guest: Mapping[str, Any] | None) -> str | None:
    return guest["sha256"] if guest else None


def _not_finite(who: str, view: View) -> list[str]:
    """The first stage of a detector that has infinite or NaN values: each of its levels, with the images there."""
    heads: tuple[str, ...] = ("objectness", "deltas") if view.facts.two_stage else ("class_logits", "deltas")
    heads += ("centerness",) if view.facts.anchor_free else ()
    for stage in ("body", "neck", *heads):
        places = []
        for stride, values in getattr(view, stage).items():
            finite = torch.isfinite(values).flatten(1).all(1).tolist()
            images = [image for image, good in zip(view.batch.ids, finite, strict=True) if not good]
            if images:
                places.append(f"{who}'s {stage} at stride {stride}, images {images}")
        if places:
            return places
    return []
