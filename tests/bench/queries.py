"""A training step of an RT-DETR on one core, ours against transformers' own: seconds of processor time, and ratios.

    python tests/bench/queries.py                          # RT-DETRv2, ResNet-18 <- ResNet-50, random weights
    python tests/bench/queries.py --teacher-depth 101 --rounds 12
    python tests/bench/queries.py --alone --rounds 16      # without the distilled steps
    python tests/bench/queries.py --profile step.txt       # and the operators of one step of both, by their time

All parts take turns in one process on the same images, so that other load of the machine affects all of them. The
library's step is its network called with images and labels, backward, clipping and AdamW. Ours is the ``Distiller``
under Lightning's trainer; the distilled steps, with PKD on the neck or with ``detr_logits``, and the step alone with
which they are compared, are without the trainer. "teacher" is the teacher's forward pass up to what the method reads:
its neck, or its queries. Goals: library / alone at least 1, distilled / (alone + teacher) at most 1.1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

import distill
from distill.diagnostics.bench.step import Step
from distill.losses.detr_logits import DETRLogits
from distill.losses.pkd import PKD
from distill.types import Batch

RATE = {"lr": 1e-5, "weight_decay": 1e-4}
CLIP = 0.1


def detector(depth: int, size: int, classes: tuple[str, ...]) -> distill.RTDETR:
    """RT-DETRv2 as in ``conf/model/rtdetr_r18.yaml``, ``rtdetr_r50.yaml`` and ``rtdetr_r101.yaml``."""
    own = {"encoder_expansion": 0.5, "decoder_layers": 3} if depth == 18 else {}
    own |= {"neck_channels": 384, "encoder_ffn": 2048} if depth == 101 else {}
    torch.manual_seed(depth)
    return distill.RTDETR(classes, backbone={"name": "resnet_d", "depth": depth}, min_size=size, max_size=size, **own)


def distiller(student: Any, teacher: Any = None, **losses: Any) -> distill.Distiller:
    """Ours, with the optimizer of the library's step."""
    schedule = distill.Schedule(epochs=1, optimizer=partial(torch.optim.AdamW, **RATE), clip=CLIP, warmup_steps=0)
    built = {name: make(student.spec, teacher.detector.spec) for name, make in losses.items()}
    return distill.Distiller(student, teacher, built, schedule)


def library(net: Any) -> Callable[[Batch], None]:
    """The library's training step."""
    optimizer = torch.optim.AdamW(net.train().parameters(), **RATE)

    def step(batch: Batch) -> None:
        height, width = batch.images.shape[-2:]
        labels = []
        for target in batch.targets:
            x1, y1, x2, y2 = target.boxes.unbind(1)
            boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1)
            boxes = boxes / torch.tensor([width, height, width, height])
            labels.append({"class_labels": target.labels - 1, "boxes": boxes})
        optimizer.zero_grad()
        net(batch.images.float() / 255, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()

    return step


class Turns(L.Callback):
    """Times our step, and then every other part on the same batch."""

    def __init__(self, parts: dict[str, Callable[[Batch], Any]], profiled: Path | None) -> None:
        self.parts, self.profiled = parts, profiled
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *parts)}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seconds["trainer"].append(time.process_time() - self.started)
        for name, part in self.parts.items():
            started = time.process_time()
            part(batch)
            self.seconds[name].append(time.process_time() - started)
        if self.profiled and batch_idx == 1:
            texts = []
            for name in self.parts.keys() & {"library", "alone", "detr_logits"}:
                with profile(activities=[ProfilerActivity.CPU]) as recorded:
                    self.parts[name](batch)
                texts += [name, recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)]
            self.profiled.write_text("\n".join(texts))


def run(step: Step, batch: Batch) -> None:
    """A step of ours without the trainer."""
    step.batch = batch
    step.run()


def median_ratio(numerator: list[float], *denominator: list[float]) -> list[float]:
    """Median, lowest and highest of the ratios round by round; several denominators are added."""
    ratios = [top / sum(rest) for top, *rest in zip(numerator, *denominator, strict=True)]
    return [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def main() -> None:
    """Print seconds and ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--teacher-depth", type=int, choices=(50, 101), default=50)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="time the step alone and the library's, nothing else")
    parser.add_argument("--profile", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = distill.Shapes(train=(args.rounds + args.warmup) * args.batch, val=2, test=0, size=args.size)
    data = distill.DetectionData(source, args.batch, workers=0, min_size=args.size, max_size=args.size)
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    made = partial(detector, 18, args.size, data.classes)
    teacher = distill.Teacher(detector(args.teacher_depth, args.size, data.classes), source="untrained")
    ours = {
        "alone": distiller(made()),
        "pkd": distiller(made(), teacher, pkd=PKD),
        "detr_logits": distiller(made(), teacher, detr_logits=DETRLogits),
    }
    steps = {name: Step(module.train(), first) for name, module in ours.items()}
    teaching = ours["pkd"]
    parts: dict[str, Callable[[Batch], Any]] = {
        "library": library(made().net),
        **{name: partial(run, step) for name, step in steps.items()},
        "teacher's neck": lambda batch: teaching.teacher_view(batch, 0).neck,
        "teacher's queries": lambda batch: teaching.teacher_view(batch, 0).queries,
    }
    if args.alone:
        parts = {name: parts[name] for name in ("library", "alone")}
    turns = Turns(parts, args.profile)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distiller(made()), data)
    seconds = {name: values[args.warmup :] for name, values in turns.seconds.items()}
    answer: dict[str, Any] = {
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "library / alone, under the trainer": median_ratio(seconds["library"], seconds["trainer"]),
        "library / alone, without the trainer": median_ratio(seconds["library"], seconds["alone"]),
    }
    read = {} if args.alone else {"pkd": "teacher's neck", "detr_logits": "teacher's queries"}
    for method, stage in read.items():
        answer[f"{method} / (alone + teacher)"] = median_ratio(seconds[method], seconds["alone"], seconds[stage])
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
