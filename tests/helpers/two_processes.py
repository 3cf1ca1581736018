"""What ``normalizer="global"`` promises: two processes with half a batch each do what one does with the whole of it."""

from __future__ import annotations

import functools
import gc
import multiprocessing
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from distill.losses.base import DistillLoss
from distill.types import AnchorTargets, Regions
from helpers.fake_queries import QueryView
from helpers.fake_view import PYRAMIDS, FakeView

Make = Callable[[str], DistillLoss]
"""Normalizer -> the loss, in float64. Like `Scene` a function of a test module, so that a new process finds it."""
Scene = Callable[[], tuple[FakeView, FakeView]]
"""Student's and teacher's view of four images, six regions each."""
Found = tuple[dict[str, float], list[torch.Tensor], list[torch.Tensor]]


@functools.cache
def fork_server() -> ForkServerContext:
    """Processes of a server that has imported what takes seconds, once for all of them, and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "torchvision", "distill.cli.runs.preflight", "pytest"])
    return context


@functools.cache
def process_pair() -> ProcessPoolExecutor:
    """Two processes for all tests of this one that leave nothing behind in them."""
    return ProcessPoolExecutor(2, fork_server(), initializer=gc.freeze)


def start_two_processes(work: Callable[..., object], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in two new processes, as ``torch.multiprocessing.spawn`` does.

    `work` is a module-level function, which may change the environment and end its process.
    """
    fork_server()
    torch.multiprocessing.start_processes(_work_frozen, (work, *arguments), nprocs=2, start_method="forkserver")


def _work_frozen(rank: int, work: Callable[..., object], *arguments: Any) -> None:
    gc.freeze()  # what the server imported
    work(rank, *arguments)


def run_in_two_processes(work: Callable[..., object], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in two processes. `work` is a module-level function and sets up the group."""
    results = [process_pair().submit(work, rank, *arguments) for rank in (0, 1)]
    try:
        for result in results:
            result.result(timeout=300)
    except BaseException:  # the other one may wait for ever
        for process in list(process_pair()._processes.values()):
            process.kill()
        process_pair.cache_clear()
        raise


def part_of(view: FakeView, rows: slice, regions: int = 6) -> FakeView:
    """The view of some of the images."""
    if isinstance(view, QueryView):
        return view.part(rows).mapped(lambda x: x.clone().requires_grad_())
    cut = slice(rows.start * regions, rows.stop * regions)
    stages: dict[str, Any] = dict(view.stages)
    for name in PYRAMIDS & stages.keys():
        stages[name] = {stride: x[rows] for stride, x in stages[name].items()}
    stages["roi_logits"] = tuple(x[cut] for x in stages["roi_logits"])
    stages |= {name: stages[name][cut] for name in ("roi_features", "roi_boxes")}
    stages |= {name: stages[name][rows] for name in ("proposals", "predictions")}
    stages["rois"] = Regions(*(each[rows] for each in stages["rois"]))
    stages["anchor_targets"] = AnchorTargets(*(each[rows] for each in stages["anchor_targets"]))
    images = view.batch
    images = replace(images, targets=images.targets[rows], ids=images.ids[rows], sizes=images.sizes[rows])
    return FakeView(images, view.spec, **stages).mapped(lambda x: x.clone().requires_grad_())


def found(make: Make, scene: Scene, normalizer: str, rows: slice) -> Found:
    """Unweighted terms, and their sum's gradients on the student's leaves and on the adapters."""
    student, teacher = (part_of(view, rows) for view in scene())
    loss = make(normalizer)
    values = loss(student, teacher)
    torch.stack(list(values.values())).sum().backward()
    leaves = [leaf.grad for leaf in student.leaves() if leaf.grad is not None]
    adapters = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    return {name: value.item() for name, value in values.items()}, leaves, adapters


def one_rank(rank: int, folder: str, make: Make, scene: Scene) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for normalizer in ("global", "process"):
        torch.save(found(make, scene, normalizer, slice(2 * rank, 2 * rank + 2)), f"{folder}/{normalizer}{rank}.pt")
    dist.destroy_process_group()


def assert_two_equal_one(
    make: Make, scene: Scene, folder: Path, relative: float = 1e-9, differ: Collection[str] | None = None
) -> None:
    """Terms and gradients, averaged over processes as DDP does; with counts of each process alone, they must differ.

    Of several losses together, whose terms are called ``name/term``, each must differ in some term, or, if `differ` is
    given, those: the others count images only, of which both processes have equally many.
    """
    run_in_two_processes(one_rank, str(folder), make, scene)
    values, leaves, adapters = found(make, scene, "global", slice(0, 4))
    first, second = (torch.load(folder / f"global{rank}.pt") for rank in (0, 1))
    assert values.keys() == first[0].keys()
    for name, value in values.items():
        assert value != 0, name
        assert abs((first[0][name] + second[0][name]) / 2 - value) < relative * abs(value), name
    assert leaves
    for one, other, whole in zip(first[1], second[1], leaves, strict=True):
        torch.testing.assert_close(torch.cat([one, other]) / 2, whole, rtol=relative, atol=1e-14)
    for one, other, whole in zip(first[2], second[2], adapters, strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=relative, atol=1e-14)
    alone = [torch.load(folder / f"process{rank}.pt")[0] for rank in (0, 1)]
    apart = {
        name for name, value in values.items() if abs((alone[0][name] + alone[1][name]) / 2 - value) > 1e-3 * abs(value)
    }
    losses = {name.rpartition("/")[0] for name in values}
    assert (losses if differ is None else set(differ)) - {name.rpartition("/")[0] for name in apart} == set()
