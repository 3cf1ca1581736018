"""A step that is not finite changes nothing on any process; too many of them stop the run; a file repeats the step."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from distill.diagnostics.replay import read_step, replay
from distill.losses.defeat import DeFeat
from distill.training.callbacks.averaging import WeightAverage
from distill.training.callbacks.consistency import ConsistencyCheck
from distill.training.nonfinite import NonFiniteGuard, poison_gradient
from distill.types import DistillError, View
from helpers.training import (
    FormulaLoss,
    copy_weights,
    distiller,
    fit,
    half_precision,
    shapes_data,
    small_detector,
    small_teacher,
)
from helpers.two_processes import start_two_processes

ONE_EPOCH: dict[str, Any] = {"max_epochs": 1}


def at(bad: set[int], wrong: Callable[[View], Tensor]) -> Callable[[View, View], Tensor]:
    """A harmless term, but what `wrong` gives at the batches that are counted in `bad`."""
    calls = [-1]

    def term(student: View, teacher: View) -> Tensor:
        calls[0] += 1
        return wrong(student) if calls[0] in bad else student.neck[8].mean().square()

    return term


WRONG: dict[str, Callable[[View], Tensor]] = {
    "infinite": lambda view: view.neck[8].sum() * math.inf,
    "nan": lambda view: view.neck[8].sum() * math.nan,
    "a finite loss": lambda view: (view.neck[8] - view.neck[8].detach()).sum().sqrt(),  # 0, with slope 0/0
    "without a way back": lambda view: torch.tensor(math.inf),
}


class States(L.Callback):
    """What there is to change, after each step; the first entry is before all."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def look(self, trainer: Any, module: Any) -> None:
        state = copy_weights(module)
        for number, each in enumerate(trainer.optimizers[0].state.values()):
            state |= {f"{number}/{name}": torch.as_tensor(value).clone() for name, value in each.items()}
        self.found.append(state)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.look(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.found):
            self.look(trainer, module)

    def on_exception(self, trainer: Any, module: Any, error: BaseException) -> None:
        self.look(trainer, module)


def changed(states: States, step: int) -> list[str]:
    before, after = states.found[step], states.found[step + 1]
    return [name for name, value in after.items() if name not in before or not torch.equal(before[name], value)]


def test_a_poisoned_loss_is_the_same_loss() -> None:
    for value in (0.1, -3.7e-30, 1.5e38, 0.0):
        x = torch.tensor(value, requires_grad=True)
        loss = poison_gradient(x * 1.7)
        loss.backward()
        assert loss.item() == (x * 1.7).item()
        assert x.grad is not None
        assert x.grad.item() == torch.tensor(1.7).item()
    x = torch.ones(3, requires_grad=True)
    poison_gradient(x.sum() + torch.tensor(math.inf)).backward()
    assert x.grad is not None
    assert x.grad.isnan().all()


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.01, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("case", WRONG)
def test_a_bad_step_changes_nothing_and_the_next_one_goes_on(case: str, optimizer: Any, tmp_path: Path) -> None:
    module = distiller(
        small_detector(norm="batch"), losses={"mine": partial(FormulaLoss, formula=at({1}, WRONG[case]))}
    )
    module.schedule = type(module.schedule)(optimizer=optimizer, shape="constant", warmup_steps=0)
    states = States()
    with pytest.warns(UserWarning, match=r"step 1: .*it is skipped \(1 skipped in a row, guard.limit=3\)"):
        trainer = fit(module, tmp_path, shapes_data(train=16), callbacks=[states], **ONE_EPOCH)
    assert trainer.global_step == 4
    assert changed(states, 0)
    assert changed(states, 1) == []
    assert any("running_mean" in name for name in changed(states, 2))
    assert any("conv1" in name for name in changed(states, 2))
    assert (module.guard.skipped, module.guard.consecutive) == (1, 0)
    assert all(value.isfinite().all() for value in states.found[-1].values())


def test_statistics_that_a_bad_forward_pass_moved_are_put_back(tmp_path: Path) -> None:
    module, states = distiller(small_detector(norm="batch")), States()

    def overflow(layer: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * (math.inf if module.global_step == 1 else 1.0)

    module.student.net.backbone.body.conv1.register_forward_hook(overflow)
    with pytest.warns(UserWarning, match="student's body at stride 4"):
        fit(module, tmp_path, shapes_data(train=12), callbacks=[states], **ONE_EPOCH)
    assert changed(states, 1) == []
    assert changed(states, 2)
    assert all(value.isfinite().all() for value in states.found[-1].values())


def test_one_bad_batch_of_several_takes_the_whole_step(tmp_path: Path) -> None:
    formula = at({2}, WRONG["infinite"])  # the first of the second step's two batches
    module, states = distiller(losses={"mine": partial(FormulaLoss, formula=formula)}), States()
    with pytest.warns(UserWarning, match="step 1"):
        fit(module, tmp_path, shapes_data(train=24), callbacks=[states], accumulate_grad_batches=2, **ONE_EPOCH)
    assert [bool(changed(states, step)) for step in range(3)] == [True, False, True]


class Averages(L.Callback):
    """The average, how often it was moved, and the weights, after each batch."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average
        self.found: list[tuple[dict[str, Tensor], int, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        model: Any = self.average._average_model
        self.found.append((copy_weights(model.module), int(model.n_averaged), copy_weights(module)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_is_no_part_of_an_average(accumulate: int, tmp_path: Path) -> None:
    """Not of its value, nor of its count: steps 0 and 2 of four are bad, and the first good one is copied."""
    bad = {0, 2 * accumulate}
    module = distiller(
        small_detector(norm="batch"), losses={"mine": partial(FormulaLoss, formula=at(bad, WRONG["infinite"]))}
    )
    average = WeightAverage(decay=0.75)
    seen = Averages(average)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "callbacks": [average, seen], **ONE_EPOCH}
    with pytest.warns(UserWarning, match="it is skipped"):
        fit(module, tmp_path, shapes_data(train=16 * accumulate), **options)
    ends = seen.found[accumulate - 1 :: accumulate]
    assert [count for _, count, _ in ends] == [0, 1, 1, 2]
    assert [count for _, count, _ in seen.found] == sorted(count for _, count, _ in seen.found)
    name = "student.net.backbone.body.conv1.weight"
    first, second = ends[1][2][name], ends[3][2][name]
    assert not torch.equal(first, second)
    assert torch.equal(ends[2][0][name], first)
    assert torch.allclose(ends[3][0][name], 0.75 * first + 0.25 * second, rtol=1e-6, atol=1e-7)
    for before, *_ in seen.found[: 2 * accumulate - 1]:
        assert torch.equal(before[name], ends[0][2][name])  # as it was built


@pytest.mark.parametrize(("limit", "bad", "stops_at"), [(0, {2}, 2), (2, {1, 2, 3}, 3), (2, {0, 1, 3, 4}, None)])
def test_the_run_stops_after_so_many_in_a_row(limit: int, bad: set[int], stops_at: int | None, tmp_path: Path) -> None:
    module = distiller(losses={"mine": partial(FormulaLoss, formula=at(bad, WRONG["nan"]))})
    module.guard = NonFiniteGuard(limit=limit, folder=str(tmp_path))
    if stops_at is None:
        with pytest.warns(UserWarning, match="skipped"):
            fit(module, tmp_path, shapes_data(train=24), **ONE_EPOCH)
        assert module.guard.skipped == len(bad)
        return
    with pytest.raises(DistillError, match=rf"step {stops_at}: the loss is not finite in mine/term \(images") as caught:
        fit(module, tmp_path, shapes_data(train=24), **ONE_EPOCH)
    assert f"distill replay '{tmp_path / 'non_finite' / f'step{stops_at}-rank0.pt'}'" in str(caught.value)


def test_a_gradient_that_is_not_finite_names_its_parameters(tmp_path: Path) -> None:
    module = distiller(
        losses={"mine": partial(FormulaLoss, formula=at({0}, WRONG["a finite loss"]))}, guard=NonFiniteGuard(limit=0)
    )
    with pytest.raises(DistillError, match=r"the loss is finite, but its gradient is not, in student\.net") as caught:
        fit(module, tmp_path, **ONE_EPOCH)
    assert "box_predictor" not in str(caught.value)  # the term reads the neck alone


def test_the_file_does_the_step_again_to_the_bit(tmp_path: Path) -> None:
    losses: dict[str, Any] = {"defeat": partial(DeFeat, mask={"kind": "random"}, ramp={"shape": "linear"})}
    losses["mine"] = partial(FormulaLoss, formula=at({3, 5}, WRONG["nan"]))
    module = distiller(small_detector("retinanet", norm="batch"), losses=losses, teacher=small_teacher())
    module.guard = NonFiniteGuard(limit=0, folder=str(tmp_path))
    with pytest.raises(DistillError):
        fit(module, tmp_path, shapes_data(train=16), accumulate_grad_batches=2, **ONE_EPOCH)
    step = read_step(tmp_path / "non_finite" / "step1-rank0.pt")
    other = distiller(small_detector("retinanet", seed=5, norm="batch"), losses=losses, teacher=small_teacher())
    other.losses.mine.formula = module.losses.mine.formula
    untouched = copy_weights(module.student)
    found = replay(other, step)
    assert [name for name, value in other.student.named_parameters() if not torch.equal(value, untouched[name])] == []
    assert len(found) == len(step["batches"]) == 2
    for before, now in zip(step["batches"], found, strict=True):
        assert before["terms"].keys() == now.keys()
        for name, value in now.items():
            assert value == before["terms"][name] or (math.isnan(value) and math.isnan(before["terms"][name])), name
    finite = [all(map(math.isfinite, terms.values())) for terms in found]
    assert finite == [True, False]
    assert found[0]["defeat/neck.foreground"] > 0
    with pytest.raises(DistillError, match="another student"):
        replay(distiller(small_detector("retinanet", norm="frozen"), losses=losses), step)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="there is no such file"):
        read_step(tmp_path / "none.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DistillError, match="not a file of tensors"):
        read_step(tmp_path / "torn.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(DistillError, match="holds no step"):
        read_step(tmp_path / "other.pt")


def test_a_gradient_whose_square_overflows_is_no_reason_to_skip(tmp_path: Path) -> None:
    def steep(student: View, teacher: View) -> Tensor:
        return 1e25 * student.neck[8].mean()

    module = distiller(losses={"mine": partial(FormulaLoss, formula=steep)})
    module.schedule = type(module.schedule)(
        optimizer=partial(torch.optim.SGD, lr=0.0), shape="constant", warmup_steps=0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*skipped.*")
        fit(module, tmp_path, shapes_data(train=8), **ONE_EPOCH)
    assert module.guard.skipped == 0
    assert max(p.grad.abs().max() for p in module.student.parameters() if p.grad is not None) > 1e20


@pytest.mark.parametrize("options", [{"limit": -1}, {"scale_floor": -1.0}])
def test_limits_below_zero_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match="0 or more"):
        NonFiniteGuard(**options)


# -- fp16


def steep(slope: float) -> Callable[[View, View], Tensor]:
    return lambda student, teacher: ((student.neck[8] - student.neck[8].detach()).float() * slope).sum()


def test_a_scaler_that_collapses_is_called_by_name(tmp_path: Path) -> None:
    module = distiller(small_detector("retinanet"), losses={"mine": partial(FormulaLoss, formula=steep(math.inf))})
    module.guard = NonFiniteGuard(scale_floor=64.0)
    module.losses.mine.formula = steep(1e38)  # finite; times any scale above 3 it is not
    states = States()
    with pytest.raises(
        DistillError, match=r"step 2: the fp16 scaler collapsed: .* down to 32, below guard.scale_floor"
    ):
        fit(module, tmp_path, shapes_data(train=40), plugins=[half_precision(256.0)], callbacks=[states], **ONE_EPOCH)
    assert module.guard.skipped == 0  # an overflow is the scaler's to skip
    assert [changed(states, step) for step in range(len(states.found) - 1)] == [[], [], []]


def test_a_scaler_that_finds_its_scale_goes_on(tmp_path: Path) -> None:
    module = distiller(small_detector("retinanet"), losses={"mine": partial(FormulaLoss, formula=steep(1e37))})
    module.losses.mine.weights["term"] = 1e-30
    fit(module, tmp_path, shapes_data(train=8), plugins=[half_precision(2.0**110)], limit_train_batches=2, **ONE_EPOCH)
    assert module.guard.consecutive == 0


FUSED = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-4, fused=True),
    "SGD": partial(torch.optim.SGD, lr=1e-4, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("case", ["infinite", "a finite loss"])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimiser_and_a_scaler_skip_the_first_step_and_a_later_one(
    name: str, case: str, tmp_path: Path
) -> None:
    """For a bad loss or an overflowing gradient, the scale is halved, nothing else changes, and the run continues."""
    module = distiller(
        small_detector("retinanet"), losses={"mine": partial(FormulaLoss, formula=at({0, 2}, WRONG[case]))}
    )
    module.schedule = type(module.schedule)(optimizer=FUSED[name], shape="constant", warmup_steps=0)
    states, plugin = States(), half_precision(256.0)
    assert plugin.scaler is not None
    fit(module, tmp_path, shapes_data(train=16), plugins=[plugin], callbacks=[states], **ONE_EPOCH)
    assert [bool(changed(states, step)) for step in range(4)] == [False, True, False, True]
    assert plugin.scaler.get_scale() == 256.0 / 4
    assert all(value.isfinite().all() for value in states.found[-1].values())


def test_clipping_what_a_fused_optimiser_unscales_is_refused_at_the_start(tmp_path: Path) -> None:
    module = distiller(small_detector("retinanet"))
    module.schedule = type(module.schedule)(optimizer=FUSED["AdamW"], clip=1.0)
    with pytest.raises(DistillError, match=r"schedule\.clip=1 .* fused AdamW.*fused=false"):
        fit(module, tmp_path, plugins=[half_precision(256.0)], gradient_clip_val=1.0, **ONE_EPOCH)


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(tmp_path: Path) -> None:
    formula = at({0, 1}, WRONG["infinite"])
    module = distiller(
        small_detector("retinanet"),
        losses={"mine": partial(FormulaLoss, formula=formula)},
        guard=NonFiniteGuard(limit=1),
    )
    with (
        pytest.warns(UserWarning, match="step 0"),
        pytest.raises(DistillError, match="step 1: the loss is not finite in mine/term"),
    ):
        fit(module, tmp_path, plugins=[half_precision(256.0)], **ONE_EPOCH)


# -- two processes


def one_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for case in ("infinite", "without a way back", "a finite loss"):
        bad = {1, 3, 4} if rank == 1 else set()
        module = distiller(
            small_detector(norm="batch"), losses={"mine": partial(FormulaLoss, formula=at(bad, WRONG[case]))}
        )
        module.guard = NonFiniteGuard(limit=1, folder=f"{folder}/{case}")
        states = States()
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False, broadcast_buffers=False)
        try:
            fit(
                module,
                Path(folder),
                shapes_data(train=24, batch_size=2),
                callbacks=[states],
                devices=2,
                strategy=strategy,
                **ONE_EPOCH,
            )
        except DistillError as error:
            found[case] = {
                "message": str(error),
                "changed": [changed(states, step) for step in range(len(states.found) - 1)],
                "weights": {name: value.clone() for name, value in module.named_parameters()},
                "skipped": module.guard.skipped,
            }
    different = ConsistencyCheck(lambda _: {"seed": str(rank), "data": "equal"})
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False, broadcast_buffers=False)
    try:
        fit(distiller(), Path(folder), callbacks=[different], devices=2, strategy=strategy, **ONE_EPOCH)
    except DistillError as error:
        found["disagreement"] = {"message": str(error)}
    torch.save(found, f"{folder}/{rank}.pt")


def test_all_processes_skip_and_stop_together(tmp_path: Path) -> None:
    """And before that, none starts where they were not given the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_two_processes(one_rank, port, str(tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    refused = [found.pop("disagreement")["message"] for found in both]
    assert refused[0] == refused[1]
    assert "  seed: 0 on rank 0, 1 on rank 1\nStart" in refused[0]
    assert both[0].keys() == both[1].keys() == {"infinite", "without a way back", "a finite loss"}
    for case in both[0]:
        first, second = both[0][case], both[1][case]
        assert first["message"] == second["message"]
        assert first["message"].startswith("step 4: ")
        for found in (first, second):
            assert [bool(each) for each in found["changed"]] == [True, False, True, False, False]
            assert found["skipped"] == 3
        assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
        files = sorted(file.name for file in (tmp_path / case / "non_finite").iterdir())
        if case == "a finite loss":  # the gradient is the mean of all, so nobody knows whose it was
            assert files == ["step4-rank0.pt", "step4-rank1.pt"]
        else:
            assert files == ["step4-rank1.pt"]
            ids = list(read_step(tmp_path / case / "non_finite" / files[0])["batches"][0]["ids"])
            assert f"mine/term (images {ids})" in first["message"]


def test_the_counts_survive_a_resume() -> None:
    """Else a run that is stopped again and again would never reach its limit."""
    before, after = distiller(), distiller()
    before.guard.consecutive, before.guard.skipped = 2, 5
    checkpoint: dict[str, Any] = {}
    before.on_save_checkpoint(checkpoint)
    after.on_load_checkpoint(checkpoint)
    assert (after.guard.consecutive, after.guard.skipped) == (2, 5)
