"""The Distiller: a Lightning module that trains a student with its own losses and the distillation losses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from distill import __version__, distributed
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.detectors.description import FORMAT
from distill.detectors.registry import load_detector
from distill.evaluation.evaluate import Evaluation, MetricFactory
from distill.evaluation.labeling import label_by_teacher
from distill.frozen import frozen_models
from distill.losses.base import DistillLoss, require_no_truth
from distill.precision import resolve_precision
from distill.teacher import DEFAULT_PREFETCH, Teacher
from distill.training.balance import GradientBalance
from distill.training.lightning_compat import (
    apply_schedule,
    end_after_this_step,
    evaluate_last_epoch,
    evaluates_part,
    step_completed,
)
from distill.training.nonfinite import NonFiniteGuard, StepRecord, poison_gradient, unscales_in_step
from distill.training.schedule import Schedule
from distill.types import Batch, Detections, DistillError, View

UNLABELED_SEED = 2**58
"""Added to a step's seed for the draws in images without labels. A step's seed is smaller."""


class Terms(NamedTuple):
    """Loss terms by name."""

    values: dict[str, Tensor]
    """Unweighted scalars."""
    weights: dict[str, float]
    """Factor with which each term enters the loss."""


class StepResult(NamedTuple):
    """The numbers of one training step, attached to the autograd graph."""

    terms: dict[str, Tensor]
    """Unweighted scalars by name, ``student/...`` and those of the distillation losses."""
    weights: dict[str, float]
    """Factor with which each term enters the loss."""
    losses: dict[str, Tensor]
    """Weighted scalars by name: weight times term."""
    loss: Tensor
    """Sum of all weighted terms, a scalar."""
    student: View
    teacher: View | None
    labeled: dict[str, Tensor]
    """The terms of the images with labels alone, which are those of `student`: measure gradients at `student` with
    these. They equal `terms` in a batch without ``data.unlabeled``."""


class BatchLosses(NamedTuple):
    """The numbers of the last training batch on this process, detached."""

    terms: dict[str, Tensor]
    """Unweighted scalars by name."""
    losses: dict[str, Tensor]
    """Weighted scalars by the same names."""
    total: Tensor
    weights: dict[str, float]

    def named(self) -> dict[str, Tensor]:
        """All values by the names under which they are logged."""
        terms = {f"term/{name}": value for name, value in self.terms.items()}
        return terms | {f"loss/{name}": value for name, value in self.losses.items()} | {"loss/total": self.total}


class Distiller(L.LightningModule):
    """Trains a student with its own losses and the named distillation losses.

    The loss of a step is ``sum(weight * term)`` over the student's supervised terms plus
    ``sum(weight * factor * ramp(progress) * term)`` over the distillation terms, with the factor of `balance`, if any.
    Each term is logged twice: ``term/...`` unweighted, ``loss/...`` weighted. With several processes the mean is
    logged.

    Args:
        student: the detector that is trained and saved.
        teacher: the frozen detector, required if a loss reads a teacher. It is not saved.
        losses: distillation losses by name; empty for the baseline student.
        schedule: optimizer, learning rate and length of the training.
        supervised: weights of the student's own loss terms by torchvision's names; 1 for names that are missing.
        metrics: constructors of the evaluation metrics. Their values are logged as ``val/<name>``.
        seed: determines, together with epoch, step and rank, all random draws of a step.
        guard: skips steps that are not finite; None: a guard with default options.
        balance: scales the weights of each distillation loss by measured gradients; None: the weights stay as they are.

    Raises:
        DistillError: a loss needs a teacher, and there is none; shares of `balance` do not fit the losses.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Teacher | None = None,
        losses: Mapping[str, DistillLoss] | None = None,
        schedule: Schedule | None = None,
        supervised: Mapping[str, float] | None = None,
        metrics: Sequence[MetricFactory] = (),
        seed: int = 0,
        guard: NonFiniteGuard | None = None,
        balance: GradientBalance | None = None,
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
        self.last_batch = BatchLosses({}, {}, torch.zeros(()), {})
        """Losses of the last training batch."""
        self._step_values: dict[str, Tensor] | None = None
        self._reset_stop = False
        """Whether the next evaluation resets the trainer's `should_stop`, see `end_after_this_step`."""
        self.guard = guard or NonFiniteGuard()
        self.balance = balance if self.losses else None
        if self.balance:
            self.balance.require_methods(list(self.losses))
        self.observers: list[Callable[[View, dict[str, Tensor], dict[str, float]], None]] = []
        """Functions that every step calls with the student's View of the images with labels, the terms of these images
        with their graph, and their weights."""
        self.step_measurements: dict[str, Tensor] = {}
        """Scalars on this process that an observer adds to the values of the current optimizer step."""
        needy = [name for name, loss in self.losses.items() if loss.needs_teacher]
        if needy and teacher is None:
            raise DistillError(f"losses {needy} need a teacher, but none was given; use distill=none")
        self._prefetch: Sequence[str] = DEFAULT_PREFETCH if needy else ()
        """Stages of the teacher that the losses read in the last step."""

    # -- training

    def setup(self, stage: str) -> None:
        """Refuse a precision that keeps the weights in another type than float32, apply the schedule, and warn of a
        teacher that is smaller than its student.

        Raises:
            DistillError: the trainer's options contradict the precision or the schedule.
        """
        resolve_precision(str(self.trainer.precision), cuda=False)
        if stage == "fit":
            apply_schedule(
                self.trainer,
                gradient_clip_val=self.schedule.clip,
                accumulate_grad_batches=self.schedule.accumulate,
                check_val_every_n_epoch=self.schedule.evaluate_every,
            )
            self._check_unlabeled(self.trainer.datamodule)  # type: ignore[attr-defined]
            self._warn_of_small_teacher()

    def _check_unlabeled(self, data: DetectionData) -> None:
        if not data.has_unlabeled:
            return
        if not self.losses:
            raise DistillError(
                "data.unlabeled: without distillation losses, nothing is learned from images without labels. Add "
                "losses, or leave data.unlabeled out"
            )
        if data.unlabeled.boxes is None:
            require_no_truth(self.losses)
        if self.teacher is not None:
            label_by_teacher(data, self.teacher)

    def _warn_of_small_teacher(self) -> None:
        if self.teacher is None:
            return
        teacher, student = self.teacher.detector.parameters_count, self.student.parameters_count
        if teacher < student:
            rank_zero_warn(
                f"the teacher has fewer parameters ({teacher:,}) than its student ({student:,}); "
                "choose a larger teacher"
            )

    def on_train_start(self) -> None:
        """Warn of a balance that is never fixed, and of a limit on validation batches."""
        if self.balance:
            self.balance.warn_of_short_training(int(self.trainer.estimated_stepping_batches))
        limit = self.trainer.limit_val_batches
        if limit and evaluates_part(self.trainer):
            rank_zero_warn(
                f"trainer.limit_val_batches={limit}: each evaluation during training measures only the images of these "
                "batches. The teacher and the final student are measured on the whole split. data.limit_eval=N limits "
                "all evaluations to the same N images"
            )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Sum of all weighted terms, a scalar."""
        seed = self.step_seed(index)
        self.guard.save_norm_statistics(self.student)
        measures = self.balance is not None and not self.balance.is_fixed
        step = self.compute_step(batch, seed, self.progress, self.loss_scale if measures else None)
        for observe in self.observers:
            observe(step.student, step.labeled, step.weights)
        detached = {name: value.detach() for name, value in step.terms.items()}
        self.guard.record(StepRecord(batch, seed, self.progress, detached, step.weights))
        losses = {name: value.detach() for name, value in step.losses.items()}
        self.last_batch = BatchLosses(detached, losses, step.loss.detach(), step.weights)
        self._step_values = None
        # Without a batch size, which values of steps do not use, Lightning would search the batch for one.
        self.log("loss", step.loss.detach(), prog_bar=True, logger=False, batch_size=1)
        return poison_gradient(step.loss)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the terms of an optimizer step every `log_every_n_steps` steps, and at the end of the run."""
        if self.logs_this_step:
            self.log_dict(self.step_values(), batch_size=1)
        if step_completed(self.trainer):
            self.step_measurements = {}
            if self._is_last_step:
                self._reset_stop = end_after_this_step(self.trainer)

    @property
    def logs_this_step(self) -> bool:
        """Whether the last batch completed an optimizer step that is logged."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every and (self._is_last_step or self.global_step % every == 0)
        return bool(due and step_completed(self.trainer))

    @property
    def _is_last_step(self) -> bool:
        return bool(self.trainer.should_stop or self.global_step >= int(self.trainer.estimated_stepping_batches))

    @property
    def loss_scale(self) -> float:
        """The loss scale of fp16, 1 for other precisions. Waits for the GPU."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def compute_step(self, batch: Batch, seed: int, progress: float, loss_scale: float | None = None) -> StepResult:
        """Compute the Views, terms and loss of a training step. Training, doctor, bench and replay call this method.

        Args:
            batch: on the device of the student.
            seed: seed of all random draws in the step.
            progress: finished part of the training, from 0 to 1, by which ramps scale the weights.
            loss_scale: `balance`, if any, measures this batch with this loss scale (1 without fp16) before it weights
                the terms. None: it weights them by the batches that it has measured so far.
        """
        teacher = self.teacher_view(batch, seed, self._prefetch)
        student = self.student.view(batch, training=True, seed=seed)
        supervised, distilled = self.supervised_terms(student), self.distillation_terms(student, teacher, progress)
        labeled = supervised.values | distilled.values
        values = distilled.values
        if batch.unlabeled is not None and values:
            values = self._with_unlabeled(values, batch, seed, progress)
        # After all forward passes, because losses may count a forward pass as a new step. On the images with labels, as
        # the detection loss.
        if self.balance and loss_scale is not None:
            self.balance.measure(student, weighted(*supervised), self._full_losses(distilled.values), loss_scale)
        distilled = Terms(values, self._distillation_weights(values, progress))
        self._prefetch = teacher.stages if teacher else ()
        terms, weights = supervised.values | distilled.values, supervised.weights | distilled.weights
        losses = {name: weights[name] * value for name, value in terms.items()}
        return StepResult(terms, weights, losses, total(losses), student, teacher, labeled)

    def _with_unlabeled(
        self, labeled: Mapping[str, Tensor], batch: Batch, seed: int, progress: float
    ) -> dict[str, Tensor]:
        """The distillation terms as means over the images with and without labels.

        A term keeps its scale beside the student's own losses, so its weight keeps its meaning.
        """
        assert batch.unlabeled is not None
        own_seed = seed + UNLABELED_SEED
        teacher = self.teacher_view(batch.unlabeled, own_seed, self._prefetch)
        student = self.student.view(batch.unlabeled, training=True, seed=own_seed)
        other = self.distillation_terms(student, teacher, progress)
        part = len(batch.unlabeled) / (len(batch) + len(batch.unlabeled))
        return {name: (1 - part) * value + part * other.values[name] for name, value in labeled.items()}

    def teacher_view(self, batch: Batch, seed: int, prefetch: Sequence[str] = ()) -> View | None:
        """The teacher's View in the step with this seed; None without a teacher or without distillation losses."""
        if self.teacher is None or not self.losses:
            return None
        return self.teacher.view(batch, seed=seed + 1, prefetch=prefetch)

    def supervised_terms(self, student: View) -> Terms:
        """The student's own loss terms."""
        values = {f"student/{name}": value for name, value in student.losses.items()}
        return Terms(values, {name: self._supervised_weight(name.removeprefix("student/")) for name in values})

    def distillation_terms(self, student: View, teacher: View | None, progress: float) -> Terms:
        """The terms of all distillation losses."""
        values = {
            f"{name}/{term}": value
            for name, loss in self.losses.items()
            for term, value in loss(student, teacher).items()
        }
        return Terms(values, self._distillation_weights(values, progress))

    def _distillation_weights(self, terms: Iterable[str], progress: float) -> dict[str, float]:
        """Term -> weight times ramp, times the factor of `balance`."""
        weights = {}
        for name in terms:
            method, _, term = name.partition("/")
            loss = self.losses[method]
            weights[name] = loss.weights[term] * loss.factor(term, progress, self.schedule.epochs)
            if self.balance:
                weights[name] *= self.balance.factor(method)
        return weights

    def _full_losses(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Method -> sum of its terms times their weights, without ramp and balance, for methods with terms."""
        losses: dict[str, dict[str, Tensor]] = {}
        for name, value in terms.items():
            method, _, term = name.partition("/")
            losses.setdefault(method, {})[name] = self.losses[method].weights[term] * value
        return {method: total(values) for method, values in losses.items()}

    def _supervised_weight(self, name: str) -> float:
        """Weight of a supervised term: the configured weight times the factors that the distillation losses set."""
        return math.prod(
            [loss.supervised.get(name, 1.0) for loss in self.losses.values()], start=self.supervised.get(name, 1.0)
        )

    def step_seed(self, index: int) -> int:
        """Seed of a step on this rank. It does not depend on earlier steps."""
        text = f"{self.seed}/{self.current_epoch}/{index}/{self.global_rank}"
        return 2 * int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    @property
    def progress(self) -> float:
        """Finished part of the training, from 0 to 1, counted in optimizer steps."""
        return min(1.0, self.global_step / max(1, int(self.trainer.estimated_stepping_batches)))

    def step_values(self) -> dict[str, Tensor]:
        """``term/...``, ``loss/...`` and ``loss/total`` of the last batch, and the measurements of the step.

        They are averaged over the processes.

        Every process must call this method. The values are computed once per batch.
        """
        if self._step_values is None:
            batch = self.last_batch
            # One all-reduce for all terms; Lightning's sync_dist would need one per term.
            measured = self.step_measurements
            values = (*batch.terms.values(), batch.total, *measured.values())
            summed, processes = distributed.sum_over_ranks(torch.stack([value.float() for value in values]))
            means = (summed / processes).unbind()
            terms = dict(zip(batch.terms, means, strict=False))
            loss, *measurements = means[len(terms) :]
            losses = {f"loss/{name}": batch.weights[name] * mean for name, mean in terms.items()}
            self._step_values = {f"term/{name}": mean for name, mean in terms.items()} | losses
            self._step_values |= {"loss/total": loss, **dict(zip(measured, measurements, strict=True))}
            if self.balance:
                factors = self.balance.factors(list(self.losses))
                self._step_values |= {f"balance/{name}": torch.tensor(factor) for name, factor in factors.items()}
        return self._step_values

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step that is not finite, before any weight changes."""
        self.guard.skip_bad_step(self, optimizer)
        if self.balance and not self.balance.is_fixed:  # here, because checkpoints are written before the batch's end
            self.balance.end_step(list(self.losses))

    # -- evaluation

    def on_validation_epoch_start(self) -> None:
        """Create the metrics of the validation split. All ranks evaluate the same detector."""
        if self._reset_stop:
            self.trainer.should_stop = self._reset_stop = False
        self._start_evaluation("val", partial=evaluates_part(self.trainer))

    def _start_evaluation(self, split: str, partial: bool) -> None:
        self._share_buffers()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._evaluation = Evaluation(
            self.student, data.ground_truth(split), data.classes, self.metrics, self.device, seen_only=partial
        )

    def validation_step(self, batch: Batch, index: int) -> None:
        """Collect the student's detections."""
        assert self._evaluation is not None
        self._evaluation.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/AP`` and the other results, which are equal on all ranks."""
        self._log_evaluation("val")

    def _log_evaluation(self, split: str) -> None:
        assert self._evaluation is not None
        values, self._evaluation = self._evaluation.compute(), None
        self.log_dict({f"{split}/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()})

    def on_test_epoch_start(self) -> None:
        """Create the metrics of the test split, for `Trainer.test`."""
        self._start_evaluation("test", partial=self.trainer.limit_test_batches != 1.0)

    def test_step(self, batch: Batch, index: int) -> None:
        """Collect the student's detections."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Log ``test/AP`` and the other results, which are equal on all ranks."""
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, index: int) -> list[Detections]:
        """The student's detections in each image of a batch, for `Trainer.predict`. Boxes are in original pixels."""
        return self.student.view(batch, training=False, frozen=True).detections

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: torch.device | str | None = None, **options: Any
    ) -> Distiller:
        """A Distiller with the student of a run's checkpoint.

        Args:
            checkpoint_path: the checkpoint, or a run folder.
            map_location: device of the student; None: the CPU.
            options: further arguments of the constructor. A checkpoint holds neither teacher nor losses: to go on with
                a training, pass them, and give the checkpoint to `Trainer.fit`.

        Raises:
            DistillError: the file is missing or invalid.
        """
        return cls(load_detector(checkpoint_path).to(map_location), **options)

    def _share_buffers(self) -> None:
        """Copy the buffers of rank 0, which writes the checkpoint, to all ranks.

        Batch norm statistics differ between ranks. DDP's own ``broadcast_buffers`` copies them in every forward pass.
        During evaluation a rank with fewer batches would then block the others forever.
        """
        if distributed.world_size() > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    # -- epoch hooks, optimizer, checkpoints

    def on_train_epoch_start(self) -> None:
        """Let losses rebuild their state for the epoch, and check that no frozen model has changed.

        The last epoch is always evaluated: the best checkpoint is chosen among evaluated weights.
        """
        evaluate_last_epoch(self.trainer)
        self.start_epoch(self.current_epoch, self.trainer.datamodule)  # type: ignore[attr-defined]
        self._check_frozen_models()

    def start_epoch(self, epoch: int, data: DetectionData) -> None:
        """Let losses rebuild the state that they keep for an epoch, such as prototypes."""
        for loss in self.losses.values():
            loss.on_epoch_start(epoch, data, self.student, self.teacher)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of all losses, including nested ones. The epoch is part of the seed of their draws."""
        for loss in self.losses.modules():
            if isinstance(loss, DistillLoss):
                loss.epoch = epoch

    def on_train_epoch_end(self) -> None:
        """Copy rank 0's buffers, which the checkpoint holds, to all ranks, and check the frozen models."""
        self._share_buffers()
        self._check_frozen_models()

    def _check_frozen_models(self) -> None:
        models = [self.teacher, *frozen_models(self.losses)]
        for model in {id(model): model for model in models if model}.values():
            model.check_unchanged()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the schedule's optimizer and learning rate for the student and the layers of the losses."""
        batch = self.trainer.datamodule.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        optimizer, scheduler = self.schedule.build_optimizer(
            self.student, self.losses, int(self.trainer.estimated_stepping_batches), batch
        )
        if (
            self.schedule.clip
            and getattr(self.trainer.precision_plugin, "scaler", None)
            and unscales_in_step(optimizer)
        ):
            raise DistillError(
                f"schedule.clip={self.schedule.clip:g} with trainer.precision=16-mixed and a fused "
                f"{type(optimizer).__name__}, which unscales the gradients in its own step: there is no moment to clip "
                "them. Set schedule.optimizer.fused=false, schedule.clip=null or trainer.precision=bf16-mixed"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the version, the student's description, and the identities of teacher and frozen models.

        The weights of teacher and frozen models are never stored.
        """
        checkpoint["distill_version"] = __version__
        checkpoint["student_format"] = FORMAT
        checkpoint["student"] = self.student.describe()
        checkpoint["teacher"] = self.teacher.identity() if self.teacher else None
        checkpoint["guests"] = {name: loss.identity() for name, loss in self.losses.items()}
        checkpoint["guard"] = self.guard.state_dict()
        if self.balance:
            checkpoint["balance"] = self.balance.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another student, another teacher, or another frozen model of a loss."""
        self.set_epoch(checkpoint.get("epoch", 0))  # Lightning does not repeat the hook of an epoch that has begun
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])
        if self.balance and "balance" in checkpoint:
            self.balance.load_state_dict(checkpoint["balance"])
        if "student" not in checkpoint:
            return
        saved, here = checkpoint["student"], self.student.describe()
        other = [
            f"{name}={here.get(name)!r} (there {value!r})" for name, value in saved.items() if here.get(name) != value
        ]
        if other:
            raise DistillError(
                f"resume: the checkpoint holds another student: {', '.join(other)}. Set model as it was in that run, "
                "or start a new run without ckpt_path"
            )
        for name, before in checkpoint.get("guests", {}).items():
            now = self.losses[name].identity() if name in self.losses else before
            _require_same(f"the frozen model of the loss {name}", before, now, f"distill.losses.{name}")
        if "teacher" in checkpoint:  # resume=anyway leaves it out
            now = self.teacher.identity() if self.teacher else None
            _require_same("the teacher", checkpoint["teacher"], now, "teacher.weights and distill")
        self._require_own_layers(checkpoint.get("state_dict", {}))

    def _require_own_layers(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint whose losses have other trained layers, such as one of another version of the method."""
        prefix = "losses."
        saved_shapes = {name: value.shape for name, value in saved.items() if name.startswith(prefix)}
        own_shapes = {name: value.shape for name, value in self.state_dict().items() if name.startswith(prefix)}
        names = saved_shapes.keys() | own_shapes.keys()
        differing = sorted(name for name in names if saved_shapes.get(name) != own_shapes.get(name))
        if saved and differing:
            losses = dict.fromkeys(name.split(".")[1] for name in differing)
            raise DistillError(
                f"resume: the trained layers of {', '.join(losses)} in the checkpoint differ from those of this run "
                f"({len(differing)} tensors, such as {differing[0]}). It was written with other settings or by another "
                "version of distill. Start a new run without ckpt_path"
            )


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of weight times term, a scalar."""
    return total({name: weights[name] * value for name, value in terms.items()})


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of scalars, a scalar."""
    device = next((value.device for value in losses.values()), None)
    return sum(losses.values(), start=torch.zeros((), device=device))


def _require_same(model: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, keys: str) -> None:
    """Refuse a frozen model whose weights differ from those in the checkpoint's run."""
    if (before or {}).get("sha256") != (now or {}).get("sha256"):
        there, here = (f"{x['source']} (sha256 {x['sha256'][:12]})" if x else "none" for x in (before, now))
        raise DistillError(
            f"resume: the checkpoint was made with {model} {there}, but this run has {here}. Set {keys} as in that "
            "run, or start a new run without ckpt_path"
        )
