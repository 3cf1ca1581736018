"""A whole training step on one core, ours against another's: images per second of processor time, and their ratio.

    python tests/bench/step.py torchvision                      # its plain loop, no teacher
    pip install torchdistill==1.1.5
    python tests/bench/step.py torchdistill                     # ResNet-101 teaches ResNet-18, the neck's maps imitated
    python tests/bench/step.py torchdistill --teacher-dtype bfloat16
    python tests/bench/step.py torchdistill --proposals default # torchvision's proposals, not a tenth to a fifth

Both train the same torchvision Faster R-CNN on the same images with the same counts of proposals. They take turns in
one process, so that other load of the machine affects both. Ours is the ``Distiller`` under Lightning's trainer. The
other is torchvision's model called with images and targets, or torchdistill's ``DistillationBox`` with forward hooks on
the neck, which runs its teacher as a whole detector.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck

import distill
from distill.losses.mimic import Mimic
from distill.types import Batch

STRIDES = (4, 8, 16, 32)
FEW: dict[str, int] = {
    "rpn_pre_nms_top_n_train": 1000,
    "rpn_post_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_test": 200,
    "box_batch_size_per_image": 128,
}
COUNTS: dict[str, dict[str, int]] = {"few": FEW, "default": {}}
RATE = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 1e-4}


def calm(net: Any) -> Any:
    """Frozen norms at their start let the maps of a random ResNet-101 explode: each block adds little instead."""
    for block in net.backbone.body.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            torch.nn.init.constant_(last.weight, 0.2)
    return net


def model(name: str, size: int, classes: int, stages: int, counts: dict[str, int]) -> Any:
    """torchvision's own Faster R-CNN, with frozen norms."""
    body = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=stages)
    return calm(TorchvisionFasterRCNN(body, classes + 1, min_size=size, max_size=size, **counts))


def asked(batch: Batch) -> tuple[list[Any], list[dict[str, Any]]]:
    """Images and targets of our batch as torchvision wants them."""
    targets = [{"boxes": target.boxes, "labels": target.labels} for target in batch.targets]
    return [image.float() / 255 for image in batch.images], targets


def torchvision(*setting: Any) -> Callable[[Batch], None]:
    """torchvision's plain training step."""
    student = model("resnet18", *setting).train()
    optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], **RATE)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        sum(student(*asked(batch)).values()).backward()
        optimizer.step()

    return step


def torchdistill(*setting: Any) -> Callable[[Batch], None]:
    """torchdistill's box around two torchvision detectors: squared error of four maps, and the student's losses."""
    from torchdistill.core.distillation import DistillationBox

    maps = [f"backbone.fpn.layer_blocks.{level}" for level in range(len(STRIDES))]
    terms = {
        path: {
            "criterion": {"key": "MSELoss", "kwargs": {"reduction": "mean"}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {
                    "input": {"is_from_teacher": False, "module_path": path, "io": "output"},
                    "target": {"is_from_teacher": True, "module_path": path, "io": "output"},
                },
            },
            "weight": 1.0,
        }
        for path in maps
    }
    side = {"forward_hook": {"input": [], "output": maps}}
    config = {
        "num_epochs": 1,
        "teacher": {**side, "forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {**side, "forward_proc": "forward_batch_target"},
        "optimizer": {"key": "SGD", "kwargs": dict(RATE)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"model_term": {"weight": 1.0}, "sub_terms": terms},
            "func2extract_model_loss": "extract_model_loss_dict",
        },
    }
    pair = model("resnet101", *setting).eval(), model("resnet18", *setting)
    box = DistillationBox(*pair, {}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step(batch: Batch) -> None:
        box.post_forward_process(loss=box.forward_process(*asked(batch)))

    return step


OTHERS = {"torchvision": torchvision, "torchdistill": torchdistill}


class Turns(L.Callback):
    """Times our step, then takes and times one of theirs on the same batch."""

    def __init__(self, other: Callable[[Batch], None]) -> None:
        self.other, self.ours, self.theirs = other, [], []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.ours.append(time.process_time() - self.started)
        started = time.process_time()
        self.other(batch)
        self.theirs.append(time.process_time() - started)


def distiller(args: argparse.Namespace, classes: tuple[str, ...]) -> distill.Distiller:
    """Our student, taught where the other's is."""
    sizes = {"min_size": args.size, "max_size": args.size}
    backbone, settings = {"norm": "frozen", "trainable_stages": args.stages}, {**sizes, **COUNTS[args.proposals]}
    student = distill.FasterRCNN(classes, backbone={**backbone, "depth": 18}, **settings)
    calm(student.net)
    schedule = distill.Schedule(epochs=1, optimizer=partial(torch.optim.SGD, **RATE))
    if args.other == "torchvision":
        return distill.Distiller(student, schedule=schedule)
    large = distill.FasterRCNN(classes, backbone={**backbone, "depth": 101}, **settings)
    calm(large.net)
    teacher = distill.Teacher(large, source="untrained", dtype=args.teacher_dtype)
    neck = {"all": 1.0, "levels": STRIDES, "normalization": "mse"}
    mimic = Mimic(student.spec, teacher.spec, regions={"all": 0.0}, neck=neck, adapter={"kernel": None})
    return distill.Distiller(student, teacher, {"mimic": mimic}, schedule)


def main() -> None:
    """Print images per second of both, and the ratio, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", choices=OTHERS)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--stages", type=int, default=5, help="of the body that are trained")
    parser.add_argument(
        "--proposals", choices=COUNTS, default="few", help="their numbers, in training and of the teacher"
    )
    parser.add_argument("--teacher-dtype", default="auto", help="of ours: auto, float32, bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    total = (args.steps + args.warmup) * args.batch
    data = distill.DetectionData(
        distill.Shapes(train=total, val=2, test=0, size=args.size),
        batch_size=args.batch, workers=0, min_size=args.size, max_size=args.size,
    )  # fmt: skip
    data.setup("fit")
    turns = Turns(OTHERS[args.other](args.size, len(data.classes), args.stages, COUNTS[args.proposals]))
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
    trainer.fit(distiller(args, data.classes), data)
    ours, others = turns.ours[args.warmup :], turns.theirs[args.warmup :]
    ratios = sorted(b / a for a, b in zip(ours, others, strict=True))
    answer = {
        "images_per_second": {
            "distill": round(args.batch / statistics.median(ours), 3),
            args.other: round(args.batch / statistics.median(others), 3),
        },
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
