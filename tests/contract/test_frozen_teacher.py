"""A teacher that something writes into is noticed at the end of the epoch, whatever was written and however."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from distill.frozen import FrozenModel, bit_sums
from distill.losses.defeat import DeFeat
from distill.teacher import Teacher
from distill.types import DistillError
from helpers.training import copy_weights, distiller, fit, shapes_data, small_detector, small_teacher


def nudge(net: Any) -> None:
    weight = net.backbone.fpn.layer_blocks[1][0].weight.data  # .data: no version counter sees it
    weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))


def move_statistics(net: Any) -> None:
    net.backbone.body.bn1.running_mean.add_(1e-3)


def replace(net: Any) -> None:
    net.backbone.body.conv1.weight = torch.nn.Parameter(torch.zeros_like(net.backbone.body.conv1.weight))


def wake(net: Any) -> None:
    net.train()


class Meddler(L.Callback):
    def __init__(self, change: Callable[[Any], None], epoch: int) -> None:
        self.change, self.epoch = change, epoch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.current_epoch == self.epoch and index == 0:
            self.change(module.teacher.detector.net)


CHANGES = {
    nudge: "fpn.layer_blocks.1.0.weight",
    move_statistics: "bn1.running_mean",
    replace: "body.conv1.weight",
    wake: "running_mean",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_teacher_that_changes_stops_the_run(change: Callable[[Any], None], tmp_path: Path) -> None:
    plain = Teacher(small_teacher(norm="batch").detector, fold=False, channels_last=False)
    module = distiller(teacher=plain, losses={"defeat": DeFeat})
    with pytest.raises(DistillError, match=r"the teacher \(memory\) must not change") as caught:
        fit(module, tmp_path, callbacks=[Meddler(change, epoch=1)], max_epochs=3)
    assert CHANGES[change] in str(caught.value)
    assert module.trainer.current_epoch == 1


def test_the_network_that_teaches_in_the_detectors_place_is_watched_too(tmp_path: Path) -> None:
    class Nudge(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.current_epoch == 1 and index == 0:
                nudge(module.teacher.optimized(torch.device("cpu")).net)

    module = distiller(teacher=small_teacher(norm="batch"), losses={"defeat": DeFeat})
    with pytest.raises(DistillError, match=r"layer_blocks.1.0.weight of the optimized teacher"):
        fit(module, tmp_path, callbacks=[Nudge()], max_epochs=3)


def test_a_frozen_model_of_a_loss_is_watched_too(tmp_path: Path) -> None:
    class Own(DeFeat):
        def __init__(self, student: Any, teacher: Any) -> None:
            super().__init__(student, teacher)
            self.classifier = FrozenModel(torch.nn.Linear(2, 3), "a file")

    module = distiller(losses={"own": Own})

    class Write(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            module.losses.own.classifier._module.bias.data[1] += 1

    with pytest.raises(DistillError, match=r"the teacher \(a file\) must not change, .* 1 of its 2 .* bias"):
        fit(module, tmp_path, callbacks=[Write()])


def test_a_teacher_that_is_left_alone_goes_on(tmp_path: Path) -> None:
    module = distiller(teacher=small_teacher(norm="batch"), losses={"defeat": partial(DeFeat)})
    before = copy_weights(module.teacher.detector) if module.teacher else {}
    fit(module, tmp_path, max_epochs=3, limit_val_batches=1.0)
    assert module.teacher is not None
    assert bit_sums(before) == bit_sums(module.teacher.detector.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_any_kind_of_tensor_has_bits(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 4, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = x.clone()
    y[1, 2, 3, 4] = 1
    assert bit_sums({"x": x}) != bit_sums({"x": y})
    assert bit_sums({"x": x}) == bit_sums({"x": x.clone()})
    assert bit_sums({}) == {}


def test_a_teacher_may_be_asked_first_while_lightning_evaluates(tmp_path: Path) -> None:
    """Inference mode must not leave its mark on what a later step reads."""
    teacher = small_teacher(norm="batch")
    data = shapes_data()
    data.setup("fit")
    batch = next(iter(data.eval_dataloader("val")))
    with torch.inference_mode():
        assert teacher.view(batch).neck
    fit(distiller(teacher=teacher, losses={"defeat": DeFeat}), tmp_path, max_epochs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_two_devices_is_watched() -> None:
    teacher = small_teacher(norm="batch")
    teacher.check_unchanged()
    teacher.optimized(torch.device("cuda"))
    teacher.check_unchanged()
    teacher.check_unchanged()


def test_a_student_may_change(tmp_path: Path) -> None:
    module = distiller(small_detector(), losses=None)
    fit(module, tmp_path, max_epochs=1)
