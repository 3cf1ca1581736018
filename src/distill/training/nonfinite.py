"""Skips steps whose loss or gradient is not finite, and saves such a step to a file so that it can be repeated.

A loss that is not finite makes its own gradient NaN (`poison_gradient`). The exchange of gradients between processes
carries the NaN to all of them. The gradient's norm is therefore finite on all processes or on none: all of them skip
the step together, without further communication. The norm is read before the weights change. Reading the norm is the
only synchronization with the device that this project adds to a step. On CUDA the host cannot queue the next step
during the backward pass, so the device idles until the optimizer's first kernels arrive (reasoned, not measured).
Reading the flag one step later would need a copy of all weights and optimizer states; a loss scaler synchronizes at the
same place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.distributed import gather_objects
from distill.files import atomic_write
from distill.run_folder import RunFolder
from distill.types import MAPS, Batch, DistillError, View

FILE_KIND = "distill step"
NAMED_PARAMETERS = 3
"""Maximum number of parameters in a message."""
ADVICE = "Lower the learning rate or the term's weight, lengthen the warm-up, or set schedule.clip"


@dataclass(frozen=True)
class StepRecord:
    """One batch of a step, with everything that determined its loss."""

    batch: Batch
    draw: int
    """Seed of the step's random draws."""
    progress: float
    terms: dict[str, Tensor]
    """Unweighted terms, detached, on their device."""
    weights: dict[str, float]


def poison_gradient(loss: Tensor) -> Tensor:
    """The same loss with the same gradient, bit for bit. If the loss is not finite, its gradient is NaN everywhere."""
    return loss * (1 + 0 * loss.detach())


class NonFiniteGuard:
    """Skips steps whose loss or gradient is not finite, and stops the run after too many consecutive ones.

    A skipped step does not change weights, optimizer state or running statistics. It counts as a step of the schedule.
    With a loss scaler (fp16), the scaler skips gradients that overflow under a finite loss, until its scale falls below
    a floor.

    Args:
        limit: consecutive steps that may be skipped; the next one stops the run. 0 stops at the first one.
        scale_floor: fp16: the run stops if the loss scale falls below this value. 0 for no floor.
        folder: folder for ``non_finite/``, where the step that stops the run is saved. None uses Lightning's default
            folder.

    Raises:
        DistillError: a limit or floor below 0.
    """

    def __init__(self, limit: int = 3, scale_floor: float = 1.0, folder: str | None = None) -> None:
        if limit < 0 or scale_floor < 0:
            raise DistillError(
                f"guard: expected limit and scale_floor of 0 or more, got {limit} and {scale_floor}; limit=0 stops at "
                "the first step that is not finite"
            )
        self.limit, self.scale_floor, self.folder = limit, scale_floor, folder
        self.skipped = 0
        """Number of skipped steps."""
        self.consecutive = 0
        """Number of consecutive skipped steps."""
        self.skipping = False
        """Whether the guard or the scaler skipped the last step; averages of weights ignore such a step."""
        self._records: list[StepRecord] = []
        self._norm_statistics: list[list[Tensor]] = []  # floating-point buffers, and integer buffers
        self._saved_statistics: list[Tensor] = []

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "row": self.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.skipped, self.consecutive = state["skipped"], state["row"]

    def save_norm_statistics(self, student: nn.Module) -> None:
        """Save the running statistics at the first batch of a step, because a forward pass changes them."""
        if self._records:
            return
        norms = [m for m in student.modules() if m.training and getattr(m, "track_running_stats", False)]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        kinds = [[b for b in buffers if b.is_floating_point() == floating] for floating in (True, False)]
        self._norm_statistics = [kind for kind in kinds if kind]
        # Few kernel launches for many small tensors.
        self._saved_statistics = [torch.cat([b.reshape(-1) for b in kind]) for kind in self._norm_statistics]

    def _restore_norm_statistics(self) -> None:
        for buffers, saved in zip(self._norm_statistics, self._saved_statistics, strict=True):
            for buffer, values in zip(buffers, saved.split_with_sizes([b.numel() for b in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def record(self, record: StepRecord) -> None:
        """Keep the record of a batch, to describe the batch if the step is skipped. Reads nothing from the device."""
        self._records.append(record)

    def skip_bad_step(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step of a `Distiller` that is not finite by clearing its gradients.

        The gradients are already reduced over processes.

        With a fused optimizer the fp16 scaler has not unscaled the gradients yet. The scaler raises if it finds no
        gradients, so they are unscaled before they are cleared.

        Raises:
            DistillError: too many consecutive skipped steps, or a loss scale below the floor.
        """
        records, self._records = self._records, []
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        self.skipping = bool(gradients) and not _finite(gradients)
        if not self.skipping:
            self.consecutive = 0
            return
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        bad = {number: terms for number, record in enumerate(records) if (terms := _bad_terms(record))}
        faulty_ranks = gather_objects(bool(bad))
        try:
            if scaler is not None and not any(faulty_ranks):
                self._require_scale(scaler, module.global_step)
            else:
                self._report_step(module, records, bad, faulty_ranks)
        finally:
            if scaler is not None and unscales_in_step(optimizer):
                scaler.unscale_(optimizer)
            for parameter in parameters:
                parameter.grad = None  # an optimizer ignores such parameters: no momentum, no decay
            self._restore_norm_statistics()

    def _require_scale(self, scaler: Any, step: int) -> None:
        scale = scaler.get_scale() * scaler.get_backoff_factor()
        if scale < self.scale_floor:
            raise DistillError(
                f"step {step}: the fp16 scaler collapsed: the gradient overflows at every scale, down to {scale:g}, "
                f"below guard.scale_floor={self.scale_floor:g}, and each such step is skipped. Set "
                "trainer.precision=bf16-mixed or 32-true, or lower the learning rate"
            )

    def _report_step(
        self, module: Any, records: Sequence[StepRecord], bad: Mapping[int, Sequence[str]], faulty_ranks: Sequence[bool]
    ) -> None:
        self.consecutive, self.skipped = self.consecutive + 1, self.skipped + 1
        blamed = faulty_ranks if any(faulty_ranks) else [True] * len(faulty_ranks)
        terms = list(dict.fromkeys(term for terms in bad.values() for term in terms))
        named_images = [
            image for number, record in enumerate(records) if number in bad or not bad for image in record.batch.ids
        ]
        descriptions = gather_objects((_describe(module, records, terms), named_images))
        ids: dict[tuple[str, str], list[int]] = {}
        for (words, images), to_blame in zip(descriptions, blamed, strict=True):
            if to_blame:
                ids[words] = [*ids.get(words, []), *images]
        cause = "; ".join(f"{fault} (images {images}){place}" for (fault, place), images in ids.items())
        message = f"step {module.global_step}: {cause}. No weight was changed by this step"
        if self.consecutive <= self.limit:
            count = f"{self.consecutive} skipped in a row, guard.limit={self.limit}"
            warnings.warn(f"{message}: it is skipped ({count})", stacklevel=2)
            return
        self._restore_norm_statistics()
        files = gather_objects(str(self._save(module, records, message)) if blamed[module.global_rank] else None)
        commands = "; ".join(f"python -m distill replay '{file}'" for file in files if file)
        before = f", nor by the {self.consecutive - 1} before it" if self.consecutive > 1 else ""
        raise DistillError(f"{message}{before}. {ADVICE}. Do the step again: {commands}")

    def _save(self, module: Any, records: Sequence[StepRecord], message: str) -> Path:
        run = RunFolder(self.folder or module.trainer.default_root_dir)
        kept = {
            "kind": FILE_KIND,
            "found": message,
            "step": module.global_step,
            "epoch": module.current_epoch,
            "rank": module.global_rank,
            "seed": module.seed,
            "precision": str(module.trainer.precision),
            "balance": module.balance.state_dict() if module.balance else None,
            "student": module.student.describe(),
            "teacher": module.teacher.identity() if module.teacher else None,
            "state_dict": {name: value.detach().cpu() for name, value in module.state_dict().items()},
            "batches": [_to_containers(record) for record in records],
        }
        name = f"step{module.global_step}-rank{module.global_rank}.pt"
        return atomic_write(run.non_finite / name, lambda file: torch.save(kept, file))


def unscales_in_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer unscales fp16 gradients in its own step. torch and Lightning test it too."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# -- description of a skipped step


def _bad_terms(record: StepRecord) -> list[str]:
    finite = torch.stack([value.isfinite() for value in record.terms.values()]).tolist()
    return [name for name, is_finite in zip(record.terms, finite, strict=True) if not is_finite]


def _describe(module: Any, records: Sequence[StepRecord], terms: Sequence[str]) -> tuple[str, str]:
    """Message parts: what is not finite, and where.

    A forward pass with the unchanged weights finds the levels of a loss that is not finite. If the loss is finite, the
    message names the parameters of the gradient.
    """
    # All batches on all processes: otherwise synchronized batch norms would wait forever.
    batches = [batch for record in records for batch in (record.batch, record.batch.unlabeled) if batch is not None]
    places = [place for batch in batches for place in _non_finite_levels(module, batch)]
    if terms:
        levels = "; ".join(places) or "all maps are finite, so the box head or the term's own formula produced it"
        return f"the loss is not finite in {', '.join(terms)}", f". Levels: {levels}"
    names = bad_gradients(module)
    more = f" and {len(names) - NAMED_PARAMETERS} more" if len(names) > NAMED_PARAMETERS else ""
    fault = f"the loss is finite, but its gradient is not, in {', '.join(names[:NAMED_PARAMETERS])}{more}"
    return fault, ": a term's formula has no finite derivative there, or overflows"


def _non_finite_levels(module: Any, batch: Batch) -> list[str]:
    with module.trainer.precision_plugin.forward_context():
        views = {"student": module.student.view(batch, frozen=True)}
        if module.teacher is not None and module.losses:
            views["teacher"] = module.teacher.view(batch)
        return [place for model, view in views.items() for place in non_finite_levels(model, view)]


def non_finite_levels(model: str, view: View) -> list[str]:
    """Levels with infinite or NaN values in the first stage of a detector that has any, with the images."""
    for stage in MAPS:
        if stage not in view.spec.outputs:
            continue
        places = []
        for stride, values in getattr(view, stage).items():
            finite = torch.isfinite(values).flatten(1).all(1).tolist()
            images = [image for image, is_finite in zip(view.batch.ids, finite, strict=True) if not is_finite]
            if images:
                places.append(f"{model}'s {stage} at stride {stride}, images {images}")
        if places:
            return places
    return []


def bad_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    return [name for name, gradient in named if not gradient.isfinite().all()]


def _finite(gradients: Sequence[Tensor]) -> bool:
    """Whether all values are finite. The 2-norm is fast; the maximum norm decides only if the 2-norm overflows."""
    return any(math.isfinite(nn.utils.get_total_norm(gradients, norm).item()) for norm in (2.0, math.inf))


# -- file format of a saved step


def _to_containers(record: StepRecord) -> dict[str, Any]:
    """Convert a record to tensors and plain containers."""
    return {
        **_batch_containers(record.batch.to("cpu")),
        "draw": record.draw,
        "progress": record.progress,
        "terms": {name: float(value) for name, value in record.terms.items()},
        "weights": record.weights,
    }


def _batch_containers(batch: Batch) -> dict[str, Any]:
    targets = None
    if not batch.targets_missing:
        targets = [{"boxes": t.boxes, "labels": t.labels, "masks": t.masks} for t in batch.targets]
    return {
        "images": batch.images,
        "sizes": batch.sizes,
        "original_sizes": batch.original_sizes,
        "targets": targets,
        "ids": batch.ids,
        "unlabeled": None if batch.unlabeled is None else _batch_containers(batch.unlabeled),
    }
