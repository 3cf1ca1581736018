"""Two processes on the CPU do what one does: the same numbers, the same gradients, and nobody waits for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from distill.cli.config import instantiate
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.evaluation.coco import CocoMetric
from distill.losses.defeat import DeFeat
from distill.losses.detr_logits import DETRLogits
from distill.teacher import Teacher
from distill.training.balance import GradientBalance
from distill.training.distiller import Distiller
from distill.training.schedule import Schedule
from distill.types import Batch, Target
from helpers.detectors import BOX_FAMILIES, FAMILIES, QUERY_FAMILIES, query_detector, small_options
from helpers.two_processes import start_two_processes

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
CONF = Path(__file__).parents[2] / "conf" / "trainer" / "ddp_cpu.yaml"
BOXES = torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 26.0, 60.0, 62.0], [40.0, 2.0, 54.0, 14.0]])
FEW = {
    "anchor_sizes": [[8], [16], [32], [64], [128]],
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 100,
    "head_channels": 32,
}
EXHAUSTIVE = {  # every anchor and every region is sampled, and each image has as many of them
    "rpn_batch_size_per_image": 10**5,
    "rpn_bg_iou_thresh": 0.7,
    "rpn_nms_thresh": 0.95,
    "box_batch_size_per_image": 10**4,
}
MAPS = {"backbone": {"foreground": 1.0, "background": 1.0}}
ALL = {**MAPS, "proposals": {"positive": 1.0, "negative": 1.0, "all": 1.0}}


def small_detector(family: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = small_options(family, FEW, score_thresh=0.0, **options)
    detector: Any = FAMILIES[family].detector(CLASSES, **settings)
    for layer in detector.class_layers:
        nn.init.normal_(detector.net.get_submodule(layer).weight, std=0.01)
    return detector


def distiller(family: str, lr: float = 0.02, **options: Any) -> Distiller:
    extra = EXHAUSTIVE if family == "faster_rcnn" else {}
    channels = 96 if family == "fcos" else 24
    student = small_detector(family, **{**extra, **options})
    teacher = Teacher(small_detector(family, 1, **{**extra, "neck_channels": channels}))
    losses = {"defeat": DeFeat(student.spec, teacher.spec, **(ALL if family == "faster_rcnn" else MAPS))}
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    schedule = Schedule(optimizer=optimizer, shape="constant", warmup_steps=0)
    return Telling(student, teacher, losses, schedule=schedule, metrics=[Counting])


class Telling(Distiller):
    """Keeps what this process alone computes in a step, and what is logged after it."""

    look: Look
    shares: dict[str, float]

    def step_values(self) -> dict[str, Tensor]:
        self.shares = {name: value.item() for name, value in self.last_batch.named().items()}
        return super().step_values()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        logged = self.trainer.logged_metrics
        self.look.shares.append(self.shares)
        self.look.logged.append({n: v.item() for n, v in logged.items() if n.startswith(("term/", "loss/"))})


class Counting(CocoMetric):
    """A metric that keeps the ids of the images that this process gave it."""

    given: list[int]

    def update(self, ids: Any, detections: Any) -> None:
        Counting.given += ids
        super().update(ids, detections)


class Equal(DetectionData):
    """Training batches of which every image has three objects, or none on the processes in `bare`."""

    bare: tuple[int, ...] = ()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        assert self.trainer is not None
        if not self.trainer.training:
            return batch
        count = 0 if self.trainer.global_rank in self.bare else len(BOXES)
        targets = [Target(BOXES[:count], 1 + (torch.arange(count) + image) % len(CLASSES)) for image in batch.ids]
        return replace(batch, targets=tuple(targets))


def data(batch_size: int, train: int = 4, bare: tuple[int, ...] = ()) -> DetectionData:
    made = Equal(
        Shapes(train=train, val=5, test=0, size=64), batch_size, 2, workers=0, min_size=64, max_size=64, flip=0
    )
    made.bare = bare
    return made


class Look(L.Callback):
    """Keeps gradients (after the exchange between processes) and, at each evaluation, the buffers it is made with."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor | None] = {}
        self.buffers: dict[str, Tensor] = {}
        self.shares: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []
        self.reduced: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.reduced.append(0)
        module.shares = {}

    def on_validation_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}


def fit(module: Distiller, source: DetectionData, processes: int, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    strategy: Any = "auto"
    if processes > 1:
        strategy = instantiate.build_node(OmegaConf.load(CONF).strategy)
        assert type(strategy) is L.pytorch.strategies.DDPStrategy
    look, Counting.given = Look(), []
    module.look = look
    reduce = dist.all_reduce

    def counted(*args: Any, **named: Any) -> Any:
        if look.reduced and module.trainer.training:
            look.reduced[-1] += 1
        return reduce(*args, **named)

    dist.all_reduce = counted
    settings = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        **options,
    }
    trainer = L.Trainer(accelerator="cpu", devices=processes, strategy=strategy, callbacks=[look], **settings)
    try:
        trainer.fit(module, source)
    finally:
        dist.all_reduce = reduce
    return {
        "shares": look.shares,
        "logged": look.logged,
        "reduced": look.reduced,
        "steps": trainer.global_step,
        "gradients": look.gradients,
        "buffers": look.buffers,
        "given": Counting.given,
        "values": {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val/")},
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "balance": module.balance and module.balance.state_dict(),
    }


def fit_balanced(processes: int) -> dict[str, Any]:
    module = distiller("retinanet", norm="frozen", lr=1e-4)
    module.balance = GradientBalance(steps=1)
    return fit(module, data(2, train=8), processes)


RUNS: dict[str, Any] = {  # each a function of the number of processes
    "faster_rcnn": lambda n: fit(distiller("faster_rcnn", norm="frozen"), data(4 // n), n),
    "retinanet": lambda n: fit(distiller("retinanet", norm="frozen"), data(4 // n), n),
    "fcos": lambda n: fit(distiller("fcos", norm="frozen"), data(4 // n), n),
    "unmoved": lambda n: fit(distiller("retinanet", norm="frozen", lr=0.0), data(4 // n), n),
    "live": lambda n: fit(distiller("faster_rcnn", norm="batch"), data(2, train=8), n),
    "logged": lambda n: fit(distiller("retinanet", norm="frozen", lr=1e-4), data(2, train=16), n, log_every_n_steps=2),
    "balanced": fit_balanced,
    "bare": lambda n: fit(distiller("faster_rcnn", norm="batch"), data(2, train=8, bare=(1,)), n),
    "bare one-stage": lambda n: fit(distiller("retinanet", norm="batch"), data(2, train=8, bare=(1,)), n),
    "bare anchor-free": lambda n: fit(distiller("fcos", norm="batch"), data(2, train=8, bare=(1,)), n),
}


def set_prediction(family: str, processes: int, bare: tuple[int, ...]) -> dict[str, Any]:
    """A set-prediction student with the own criterion, taught by matched queries, which read no labels."""
    student, teacher = (query_detector(family, seed, classes=CLASSES, **SQUARES) for seed in (0, 1))
    losses = {"detr_logits": DETRLogits(student.spec, teacher.spec)}
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    schedule = Schedule(optimizer=optimizer, shape="constant", warmup_steps=0, clip=0.1)
    module = Telling(student, Teacher(teacher), losses, schedule=schedule, metrics=[Counting])
    return fit(module, data(2, train=8, bare=bare), processes, log_every_n_steps=1)


SQUARES = {"min_size": 64, "max_size": 64, "queries": 16, "score_thresh": 0.0}
QUERY_RUNS: dict[str, Any] = {
    f"{family}, {name}": partial(set_prediction, family, bare=bare)
    for family in QUERY_FAMILIES
    for name, bare in {"no process with boxes": (0, 1), "one process with boxes": (1,)}.items()
}


def work(rank: int, port: int, folder: str, queries: bool = False) -> None:
    """What one of the processes does; Lightning sees from LOCAL_RANK that somebody else has started it."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, run in (QUERY_RUNS if queries else RUNS).items():
        os.environ |= {"WORLD_SIZE": "2"}
        torch.save(run(processes=2) if queries else run(2), Path(folder) / f"{name}-{rank}.pt")


def found_by_two(folder: Path, queries: bool = False) -> dict[str, list[Any]]:
    """Run -> what each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_two_processes(work, port, str(folder), queries)
    runs = QUERY_RUNS if queries else RUNS
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in runs}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return found_by_two(tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def both_with_queries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    return found_by_two(tmp_path_factory.mktemp("ddp_queries"), queries=True)


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_two_processes_with_half_the_batch_give_the_gradients_of_one(family: str, both: dict[str, list[Any]]) -> None:
    """To 1e-5 of each gradient's largest entry: sums in float32 are taken in another order, nothing else differs."""
    alone = RUNS[family](1)
    for found in both[family]:
        assert found["steps"] == alone["steps"] == 1
        for name, whole in alone["gradients"].items():
            assert whole.any(), name
            assert float((found["gradients"][name] - whole).abs().max()) <= 1e-5 * float(whole.abs().max()), name


def test_evaluation_gives_exactly_the_numbers_of_one_process(both: dict[str, list[Any]]) -> None:
    alone = RUNS["unmoved"](1)
    assert len(alone["values"]) == 12
    assert 0 < alone["values"]["val/AR100"] < 1
    for found in both["unmoved"]:
        assert found["values"] == alone["values"]


@pytest.mark.parametrize("name", ["unmoved", "live"])
def test_no_image_is_counted_twice(name: str, both: dict[str, list[Any]]) -> None:
    first, second = (found["given"] for found in both[name])
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert len(first) != len(second)


def test_live_norms_are_evaluated_and_go_on_as_rank_0_has_them(both: dict[str, list[Any]]) -> None:
    first, second = both["live"]
    assert any("running_mean" in name for name in first["buffers"])
    assert_same(first["buffers"], second["buffers"])
    assert first["values"] == second["values"]
    assert_same(first["weights"], second["weights"])


@pytest.mark.parametrize("name", ["bare", "bare one-stage", "bare anchor-free"])
def test_a_process_that_sees_only_empty_images_keeps_up(name: str, both: dict[str, list[Any]]) -> None:
    for found in both[name]:
        assert found["steps"] == 2
        assert [parameter for parameter, gradient in found["gradients"].items() if gradient is None] == []
        assert all(gradient.isfinite().all() for gradient in found["gradients"].values())
    assert_same(both[name][0]["weights"], both[name][1]["weights"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", QUERY_RUNS)
def test_set_prediction_detectors_stay_equal_without_boxes(name: str, both_with_queries: dict[str, list[Any]]) -> None:
    """Both steps have finite losses and gradients of every weight; boxes are counted over both processes."""
    first, second = both_with_queries[name]
    for found in (first, second):
        assert found["steps"] == len(found["shares"]) == 2
        for shares in found["shares"]:
            values = torch.tensor(list(shares.values()))
            assert len(values) > 3
            assert values.isfinite().all(), shares
            assert shares["term/detr_logits/queries.classes"] > 0
        missing = [weight for weight, gradient in found["gradients"].items() if gradient is None]
        assert missing == []
        assert all(gradient.isfinite().all() for gradient in found["gradients"].values())
    start = query_detector(name.partition(",")[0], classes=CLASSES, **SQUARES)
    moved = [
        key for key, value in start.named_parameters() if not torch.equal(value, first["weights"][f"student.{key}"])
    ]
    assert len(moved) > 50
    assert_same(first["gradients"], second["gradients"])
    parameters = first["gradients"].keys()
    assert_same(*({key: found["weights"][key] for key in parameters} for found in (first, second)))


def test_logged_values_are_the_mean_over_the_processes(both: dict[str, list[Any]]) -> None:
    first, second = both["logged"]
    assert first["steps"] == 4
    for step in (1, 3):
        assert first["logged"][step] == second["logged"][step]
        assert first["logged"][step].keys() == first["shares"][step].keys()
        for name, value in first["logged"][step].items():
            shares = first["shares"][step][name], second["shares"][step][name]
            assert value == pytest.approx(sum(shares) / 2, rel=1e-6), name
        assert first["shares"][step]["loss/total"] != second["shares"][step]["loss/total"]


def test_what_is_not_logged_is_not_exchanged(both: dict[str, list[Any]]) -> None:
    """One all-reduce for the loss's own counts in every step, and one for all that is logged in every second."""
    assert [found["reduced"] for found in both["logged"]] == [[1, 2, 1, 2]] * 2


def test_one_process_logs_its_own_values() -> None:
    alone = RUNS["logged"](1)
    assert alone["reduced"] == [0] * alone["steps"]
    assert alone["logged"][1] == pytest.approx(alone["shares"][1], rel=1e-6)


def test_measured_weights_are_those_of_all_processes(both: dict[str, list[Any]]) -> None:
    first, second = both["balanced"]
    assert first["balance"] == second["balance"]
    assert first["balance"]["norms"]["defeat"] > 0
    assert_same(first["weights"], second["weights"])
