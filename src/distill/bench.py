"""What distillation costs, part by part: everything in one process, measured in turn, so that ratios can be trusted.

A round takes each part once; a ratio is the median of the rounds' own ratios. So a machine that slows down for a while
slows all parts of a round alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation import Evaluation, MakeMetric
from distill.guest import Frozen, Guest, guests
from distill.losses.base import DistillLoss
from distill.memory import Memory, Saved, live, peak, stored
from distill.optimization import Schedule
from distill.types import Batch, DistillError, View

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GLUE = {"neck": 0.03, "regions": 0.10}
"""What losses, masks and the rest may cost at most beside student, teacher and adapters: of maps, and of regions."""
MOST = 1.05
"""What a step's peak of memory may be of the sum of its parts."""
REGIONS = {"roi_features", "roi_logits", "roi_boxes", "rois", "proposals", "predictions"}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])


class Clock:
    """Seconds between two marks: of the device's own time on CUDA, of the wall clock or the process elsewhere.

    Args:
        device: where the work is done.
        kind: ``wall``, or ``cpu``: the processor's time of all threads, which a busy machine disturbs less.

    Raises:
        DistillError: an unknown kind.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        if kind not in CLOCKS:
            raise DistillError(f"clock: expected one of {', '.join(CLOCKS)}, got {kind!r}")
        self.cuda = device.type == "cuda"
        self.kind = "cuda events" if self.cuda else kind
        self._now = CLOCKS[kind]

    def mark(self) -> Any:
        """This moment, in the order of the device's work."""
        if not self.cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, *spans: tuple[Any, Any]) -> float:
        """The sum over pairs of marks; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(float(start.elapsed_time(end)) / 1000 for start, end in spans)
        return float(sum(end - start for start, end in spans))

    def time(self, run: Callable[[], object]) -> float:
        """What a call takes."""
        if self.cuda:
            torch.cuda.synchronize()  # what was queued before is not its own
        start = self.mark()
        run()
        return self.seconds((start, self.mark()))


@dataclass
class Read:
    """What losses read of their teachers: each stage by name, once, and the marks before and after each reading."""

    stages: list[str] = field(default_factory=list)
    spans: list[tuple[Any, Any]] = field(default_factory=list)


class Watched:
    """A View, or a loss's own guest, that notes in `read` what is read of it, with a `mark` before and after."""

    def __init__(self, view: View | Frozen, mark: Callable[[], Any], read: Read) -> None:
        self._view, self._mark, self._read = view, mark, read

    def __getattr__(self, name: str) -> Any:
        with self._clocked(name):
            value = getattr(self._view, name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            with self._clocked(name):
                return value(*args, **options)

        return call

    @contextmanager
    def _clocked(self, name: str) -> Iterator[None]:
        if name not in self._read.stages:
            self._read.stages.append(name)
        start = self._mark()
        yield
        self._read.spans.append((start, self._mark()))


@contextmanager
def _watched_guests(losses: nn.Module, mark: Callable[[], Any], read: Read) -> Iterator[None]:
    """While open, the guests that losses keep for themselves are watched."""
    found = [
        (vars(module), name, each)
        for module in losses.modules()
        for name, each in vars(module).items()
        if isinstance(each, Frozen)
    ]
    try:
        for holder, name, guest in found:
            holder[name] = Watched(guest, mark, read)
        yield
    finally:
        for holder, name, guest in found:
            holder[name] = guest


@dataclass
class Cost:
    """What one step costs: the student's own, or that of an option of distillation."""

    step: Spread
    flops: float
    """Of convolutions and matrix products, forward and backward."""
    memory: dict[str, float]
    """Peak bytes of ``host`` (resident) and ``device`` (allocated), where they can be known."""


@dataclass
class OptionCost(Cost):
    """What an option costs. The ratios are to the student-only step, or to what ``glue`` compares with."""

    student: Spread
    """The student-only step in the same rounds."""
    teacher: Spread
    """Forward, as deep as the losses read it."""
    adapters: Spread
    """Forward and backward of all that the losses train."""
    ratio: Spread
    """To the student-only step."""
    teacher_ratio: Spread
    adapters_ratio: Spread
    glue: Spread
    """step / (student + teacher + adapters) - 1: losses, masks, and the student's stages that only they read."""
    teacher_flops: float
    stages: list[str]
    """Of the teacher, as the losses read them."""
    allowed: float
    """What glue should stay below: see `GLUE`."""
    bytes: Memory
    """Of the step, part by part."""


@dataclass
class Report:
    """All numbers of a run of the bench, seconds unless a name says otherwise."""

    setting: dict[str, Any]
    student: Cost
    options: dict[str, OptionCost]
    skipped: dict[str, str]
    loader: dict[str, float]
    evaluation: dict[str, float]
    verdict: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return asdict(self)


class Step:
    """A student's training step on one batch, with some losses or none. The weights stay: the learning rate is 0.

    Args:
        student: the detector.
        teacher: the guest, where losses need one.
        losses: by name.
        batch: on its device.
        schedule: of the optimiser.
        autocast: opens the precision of the run.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Guest | None,
        losses: Mapping[str, DistillLoss],
        batch: Batch,
        schedule: Schedule,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.student, self.teacher, self.batch, self.autocast = student, teacher, batch, autocast
        self.losses: Any = nn.ModuleDict(losses).to(batch.images.device)
        self.optimizer, _ = schedule.build(student, self.losses, 1, len(batch))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, between: Callable[[], object] = float) -> None:
        """Forward, backward, optimiser; `between` is called between forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            student = self.student.view(self.batch, seed=0)
            total = self.supervised(student) + self.distilled(student, self.teacher_view())
            del student
        between()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def supervised(self, student: View) -> Tensor:
        """The sum of the student's own terms."""
        return sum(student.losses.values(), start=torch.zeros((), device=self.batch.images.device))

    def distilled(self, student: Any, teacher: Any) -> Tensor:
        """The weighted sum of all terms of the losses."""
        terms = [
            loss.weights[name] * value
            for loss in self.losses.values()
            for name, value in loss(student, teacher).items()
        ]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.batch.images.device)

    def teacher_view(self) -> View | None:
        """A fresh View of the teacher."""
        return None if self.teacher is None or not self.losses else self.teacher.view(self.batch, seed=1)

    def teach(self, mark: Callable[[], Any] = float) -> tuple[Read, Read]:
        """Let the losses read, for the marks alone, nothing is trained: what they read of all that teaches, and of the student."""
        theirs, ours = Read(), Read()
        if self.losses:
            with torch.no_grad(), self.autocast(), _watched_guests(self.losses, mark, theirs):
                teacher: Any = self.teacher_view()
                watched = None if teacher is None else Watched(teacher, mark, theirs)
                self.distilled(Watched(self.student.view(self.batch, seed=0), float, ours), watched)
        return theirs, ours

    def adapters(self) -> Callable[[], None]:
        """Forward and backward of each layer that the losses train, on the inputs that it has in a step."""
        calls: list[tuple[nn.Module, tuple[Any, ...]]] = []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls.append((module, tuple(_leaf(each) for each in inputs)))

        layers = [layer for layer in self.losses.modules() if any(p.requires_grad for p in layer.parameters(False))]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        with self.autocast():
            self.distilled(self.student.view(self.batch, seed=0), self.teacher_view())
        for hook in hooks:
            hook.remove()

        def replay() -> None:
            with self.autocast():
                outputs = [layer(*inputs) for layer, inputs in calls]
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
            for layer, inputs in calls:
                layer.zero_grad(set_to_none=True)
                for each in inputs:
                    each.grad = None

        return replay if calls else _nothing

    def trained(self) -> list[Tensor]:
        """Weights and buffers of the student and the losses, and the optimiser's state of them."""
        states = [each for state in self.optimizer.state.values() for each in state.values()]
        return [*_tensors(self.student, self.losses), *(each for each in states if isinstance(each, Tensor))]

    def taught(self) -> list[Tensor]:
        """Weights and buffers of all that teaches, in all forms in which they lie in memory."""
        teachers = [*guests(self.losses), *([self.teacher] if self.teacher and self.losses else [])]
        return [tensor for teacher in teachers for tensor in teacher.tensors().values()]

    def held(self) -> float:
        """Bytes that the losses keep for the backward pass and that the student's own terms do not."""
        own = Saved()
        with self.autocast(), own:
            student = self.student.view(self.batch, seed=0)
            total = self.supervised(student)
        weights = [each.untyped_storage() for each in _tensors(self.student, self.losses)]
        more = Saved([*own.pieces, *weights])
        with self.autocast(), more:
            total = total + self.distilled(student, self.teacher_view())
        return more.bytes


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [each for module in modules for each in (*module.parameters(), *module.buffers())]


def _leaf(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _nothing() -> None:
    pass


def measure_student(plain: Step, clock: Clock, repeats: int = 10, warmup: int = 2) -> Cost:
    """The student-only step."""
    (seconds,) = _rounds([partial(clock.time, plain.run)], repeats, warmup)
    return Cost(Spread.of(seconds), _flops(plain.run), peak(plain.run, plain.batch.images.device))


def measure_option(plain: Step, step: Step, clock: Clock, repeats: int = 10, warmup: int = 2) -> OptionCost:
    """A step with losses: each round takes the student-only step, this one, its teacher and its adapters."""
    theirs, ours = step.teach()
    parts = (partial(clock.time, plain.run), partial(clock.time, step.run), partial(_reading, step, clock))
    times = _rounds([*parts, partial(clock.time, step.adapters())], repeats, warmup)
    return _option_cost(plain, step, (theirs.stages, ours.stages), *times)


def _rounds(parts: Sequence[Callable[[], float]], repeats: int, warmup: int) -> list[list[float]]:
    """Seconds of each part in each round that counts."""
    rounds = [[part() for part in parts] for _ in range(warmup + repeats)]
    return [list(seconds) for seconds in zip(*rounds[warmup:], strict=True)]


def _option_cost(
    plain: Step,
    step: Step,
    stages: tuple[list[str], list[str]],
    student: Sequence[float],
    whole: Sequence[float],
    teacher: Sequence[float],
    adapters: Sequence[float],
) -> OptionCost:
    rounds = list(zip(student, whole, teacher, adapters, strict=True))
    return OptionCost(
        *(Spread.of(whole), _flops(step.run), peak(step.run, step.batch.images.device)),
        student=Spread.of(student),
        teacher=Spread.of(teacher),
        adapters=Spread.of(adapters),
        ratio=Spread.of([all_ / own for own, all_, _, _ in rounds]),
        teacher_ratio=Spread.of([theirs / own for own, _, theirs, _ in rounds]),
        adapters_ratio=Spread.of([layers / own for own, _, _, layers in rounds]),
        glue=Spread.of([all_ / (own + theirs + layers) - 1 for own, all_, theirs, layers in rounds]),
        teacher_flops=_teacher_flops(step),
        stages=stages[0],
        allowed=GLUE["regions" if REGIONS & {*stages[0], *stages[1]} else "neck"],
        bytes=measure_memory(plain, step),
    )


def _reading(step: Step, clock: Clock) -> float:
    """Seconds that the losses wait for the stages of the teacher, and for guests of their own."""
    return clock.seconds(*step.teach(clock.mark)[0].spans)


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _teacher_flops(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        theirs, _ = step.teach(counter.get_total_flops)
    return float(sum(end - start for start, end in theirs.spans))


def measure_memory(plain: Step, step: Step) -> Memory:
    """The parts of a step's memory, and its peak. Both steps have run before, so that the optimisers have their states."""
    device = step.batch.images.device
    taught, ours, student = (stored(each, device) for each in (step.taught(), step.trained(), plain.trained()))
    (most_alone, kept_alone), (most, kept) = _allocated(plain), _allocated(step)
    return Memory(
        student=student + most_alone,
        teacher=taught,
        losses=ours - student + stored(step.losses.parameters(), device),  # and the gradients of these
        held=step.held(),
        peak=ours + taught + most,
        kept=kept - kept_alone,
    )


def _allocated(step: Step) -> tuple[float, float]:
    """Bytes that a step takes beyond what is there before it: at its peak, and between forward and backward pass."""
    kept: list[float] = []
    step.optimizer.zero_grad(set_to_none=True)
    with live(step.batch.images.device) as count:
        step.run(lambda: kept.append(count.now))
        return count.most, kept[0]


def measure_loader(data: DetectionData, batches: int = 20) -> dict[str, float]:
    """``images_per_second`` of the training loader once its workers are warm, by the wall clock, and ``workers``."""
    loader = data.train_dataloader()
    stream = iter(_endless(loader))
    for _ in range(2 + data.workers * data.prefetch):  # what lay ready before anybody asked
        next(stream)
    start, images = time.perf_counter(), 0
    for batch in islice(stream, batches):
        images += len(batch)
    return {"images_per_second": images / (time.perf_counter() - start), "workers": float(data.workers)}


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def measure_evaluation(
    detector: Detector,
    data: DetectionData,
    metrics: Sequence[MakeMetric],
    device: torch.device,
    split: str = "val",
    images: int = 50,
) -> dict[str, float]:
    """Wall-clock seconds per 1,000 images: ``detect``, loading included, and ``metric``; measured on ``images``."""
    batches, seen = [], 0
    training = detector.training
    detector.train(False)
    try:
        for batch in data.loader(split):
            batches.append(batch)
            seen += len(batch)
            if seen >= images:
                break
        evaluation = Evaluation(detector, _part(data.ground_truth(split), batches), data.classes, metrics, device)
        evaluation.update(batches[0].to(device))  # warms up; the same image given twice counts once
        start = time.perf_counter()
        for batch in batches:
            evaluation.update(batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        evaluation.compute()
    finally:
        detector.train(training)
    scale = 1000 / seen
    return {
        "images": float(seen),
        "detect": scale * (middle - start),
        "metric": scale * (time.perf_counter() - middle),
    }


def _part(truth: Mapping[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    """Ground truth of the images of these batches."""
    ids = {image for batch in batches for image in batch.ids}
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in ids],
        "annotations": [each for each in truth["annotations"] if each["image_id"] in ids],
    }


def settle(detector: Detector, batch: Batch) -> None:
    """Give an untrained detector's live norms the statistics of a batch: else its maps grow from block to block."""
    norms = [layer for layer in detector.modules() if type(layer) is nn.BatchNorm2d and layer.track_running_stats]
    before = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    detector.train(True)
    _ = detector.view(batch, training=False, frozen=True).neck
    detector.train(False)
    for layer, momentum in zip(norms, before, strict=True):
        layer.momentum = momentum


def verdict(report: Report, batch_size: int) -> list[str]:
    """The bottleneck of each option, and what to change."""
    lines = []
    for name, cost in {"student alone": report.student, **report.options}.items():
        eats, gives = batch_size / cost.step.median, report.loader["images_per_second"]
        if gives < eats:
            lines.append(
                f"{name}: the loader is the bottleneck, with {gives:.1f} images/s where the step could take {eats:.1f}. "
                "Raise data.workers, set data.cache=ram, or keep smaller images on disk"
            )
        elif isinstance(cost, OptionCost):
            lines.append(f"{name}: {_largest(cost)}")
    for name, cost in report.options.items():
        if cost.glue.median > cost.allowed:
            lines.append(
                f"{name}: losses and masks take {100 * cost.glue.median:.1f} % beside student, teacher and adapters; up to "
                f"{100 * cost.allowed:.0f} % is expected"
            )
        if cost.bytes.peak > MOST * cost.bytes.sum:
            lines.append(
                f"{name}: the step's peak of memory is {cost.bytes.peak / cost.bytes.sum:.2f} times the sum of its parts: the "
                "teacher's own maps, while it runs, are large beside what the student keeps for its backward pass"
                if cost.bytes.spared < (MOST - 1) * cost.bytes.sum
                else f"{name}: {cost.bytes.spared / 2**20:.1f} MiB that no backward pass asks for stay until it: does a loss keep "
                "a View, or maps of one?"
            )
    return lines or [
        "student alone: the step is the bottleneck: a smaller data.min_size or model, or trainer.precision"
    ]


def _largest(cost: OptionCost) -> str:
    parts = {
        "the student's own step": (1.0, "a smaller data.min_size or model, or trainer.precision"),
        "the teacher's forward pass": (
            cost.teacher_ratio.median,
            "teacher.fold and teacher.channels_last make it cheap, teacher.dtype=bfloat16 more than halves it (on a CPU: one "
            "with AVX512-BF16 or AMX), a smaller teacher is cheaper still",
        ),
        "the forward and backward pass of the adapters": (
            cost.adapters_ratio.median,
            "fewer levels, or adapter.kernel=1",
        ),
    }
    part, (share, remedy) = max(parts.items(), key=lambda item: item[1][0])
    return (
        f"{part} is the bottleneck, {100 * share / cost.ratio.median:.0f} % of a step that costs {cost.ratio.median:.2f} times "
        f"the student's: {remedy}"
    )
