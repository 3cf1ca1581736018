"""A run that was stopped and went on ends with the bits of the run that was never stopped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from distill.losses.at import AT
from distill.losses.defeat import DeFeat
from distill.losses.detr_logits import DETRLogits
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD
from distill.teacher import Teacher
from distill.training.callbacks import checkpoints
from distill.training.callbacks.averaging import WeightAverage
from distill.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint, RestoreSignalHandlers, parse_interval
from distill.training.checkpoint_io import CheckpointFiles, read_checkpoint
from distill.types import DistillError, View
from helpers.detectors import query_detector
from helpers.grids import exhaustive
from helpers.training import (
    CLASSES,
    EVERYTHING,
    FormulaLoss,
    assert_same,
    copy_weights,
    distiller,
    half_precision,
    sgd,
    shapes_data,
    small_detector,
)
from helpers.two_processes import start_two_processes


class Archive(CheckpointFiles):
    """Keeps every ``last.ckpt`` that was ever written, in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.files: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        if Path(path).stem == "last":
            self.files.append(self.folder / f"{len(self.files)}.ckpt")
            self.folder.mkdir(exist_ok=True)
            shutil.copy(path, self.files[-1])


class Journal(L.Callback):
    """What happened: every batch of training, with the rate and the loss' scale, and every evaluation."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) if scaler else ()
        ids = (*batch.ids, *(batch.unlabeled.ids if batch.unlabeled else ()))
        self.lines.append((trainer.current_epoch, index, ids, rate, repr(float(outputs["loss"])), *scale))

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.lines.append("evaluation")


def drawn(student: View, teacher: View) -> Tensor:
    """A term that hangs on the global generators, as stochastic depth does."""
    factor = torch.rand(()) + random.random() + float(np.random.rand())
    return torch.stack([x.square().mean() for x in student.neck.values()]).mean() * factor


def poisoned(student: View, teacher: View) -> Tensor:
    """A term that is infinite in every batch that holds the image 0."""
    value = student.neck[8].mean().square()
    return value * torch.inf if 0 in student.batch.ids else value


LOSSES: dict[str, Any] = {
    "at": AT,
    "detr_logits": DETRLogits,
    "poisoned": partial(FormulaLoss, formula=poisoned),
    "defeat": partial(DeFeat, **EVERYTHING, mask={"kind": "random"}, ramp={"shape": "peak"}),
    "global_knowledge": partial(GlobalKnowledge, prototypes={"count": 2, "min_side": 6.0}),
    "drawn": partial(FormulaLoss, formula=drawn),
    "pad": partial(PAD, of=partial(Mimic, regions={"all": 0.0}, neck={"all": 3.0}), warmup=1),
}


class Ended:
    """A run of two epochs of three batches that came to its end, or was stopped."""

    def __init__(
        self,
        folder: Path,
        ckpt: Path | None = None,
        loss: str | None = None,
        accumulate: int = 1,
        workers: int = 0,
        every: str | None = "1 steps",
        callbacks: tuple[Any, ...] = (),
        images: int = 12,
        norm: str | None = None,
        plugins: tuple[Any, ...] = (),
        unlabeled: int = 0,
        queries: bool = False,
        **options: Any,
    ) -> None:
        schedule = sgd(epochs=2, shape="one_cycle", accumulate=accumulate)
        student = small_detector(norm=norm) if norm else None
        teacher = None
        if queries:  # with the optimizer of this family, and denoising queries, which are drawn in every step
            student, teacher = (query_detector("rtdetr", seed, CLASSES, min_size=64, max_size=64) for seed in (0, 1))
            teacher = Teacher(teacher)
            schedule = replace(schedule, optimizer=partial(torch.optim.AdamW, lr=1e-3), clip=0.1, backbone_rate=0.5)
        losses = {loss: LOSSES[loss]} if loss else {}
        self.module = distiller(student, teacher, losses=losses, schedule=schedule)
        journal, files = Journal(), Archive(folder / "history")
        self.best = BestCheckpoint(folder, "val/AP")
        keep = (
            [LastCheckpoint(folder, every)]
            if options.get("limit_val_batches") == 0
            else [self.best, LastCheckpoint(folder, every)]
        )
        settings: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "accumulate_grad_batches": accumulate,
            "default_root_dir": folder,
            **options,
        }
        settings["plugins"] = [files, *(make() for make in plugins)]
        trainer = L.Trainer(callbacks=[*(make() for make in callbacks), *keep, journal], **settings)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.stopped: bool | str = False
        try:
            others = {"unlabeled": unlabeled} if unlabeled else {}
            data = shapes_data(train=images, workers=workers, **others)
            trainer.fit(self.module, data, ckpt_path=ckpt, weights_only=True)
        except SystemExit as way_out:  # SIGTERM's; a bare one is Lightning's way out of an interrupt
            self.stopped = type(way_out) is not SystemExit or "interrupt"
        self.journal, self.files = journal.lines, files.files
        self.weights = copy_weights(self.module)


SETTINGS: dict[str, dict[str, Any]] = {
    "defeat": {"loss": "defeat"},
    "prototypes": {"loss": "global_knowledge"},
    "global generators": {"loss": "drawn"},
    "warm-up of variances": {"loss": "pad"},
    "average": {"callbacks": (partial(WeightAverage, decay=0.5),)},
    "accumulated": {"accumulate": 2},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "no evaluation": {"limit_val_batches": 0},
    "part of an epoch": {"limit_train_batches": 2},
    "steps": {"max_epochs": 3, "max_steps": 7},
    "workers": {"workers": 2},
    "images without labels": {"loss": "at", "unlabeled": 5},
    "queries": {"loss": "detr_logits", "queries": True},
    "loss scaler": {"loss": "defeat", "plugins": (partial(half_precision, 2.0**15, interval=2),)},
}


EACH, SOME = 1, 3
"""Every checkpoint of a run, and every third of them, the last one among them."""


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(((name, EACH) if name in ("defeat", "accumulated") else exhaustive((name, EACH))) for name in SETTINGS),
        *((name, SOME) for name in SETTINGS if name not in ("defeat", "accumulated", "queries")),
    ],
)
def test_every_checkpoint_leads_to_the_same_end(name: str, step: int, tmp_path: Path) -> None:
    """In an epoch, before and after an evaluation: equal images, rates, losses, evaluations, weights and best score."""
    if "queries" in SETTINGS[name]:
        pytest.importorskip("transformers", reason="the extra detr is not installed")
    whole = Ended(tmp_path / "whole", **SETTINGS[name])
    assert len(whole.files) >= 4
    files = list(enumerate(whole.files))[::-1][::step]
    lengths = set()
    for number, file in files:
        again = Ended(tmp_path / str(number), ckpt=file, **SETTINGS[name])
        assert again.journal == whole.journal[len(whole.journal) - len(again.journal) :], number
        assert_same(again.weights, whole.weights)
        assert again.best.best_model_score == whole.best.best_model_score
        lengths.add(len(again.journal))
    assert len(lengths) >= len(files) - 1  # of different moments, but for a last step that is no epoch's last
    assert min(lengths) == 0
    assert max(lengths) == len(whole.journal) - (2 if name == "accumulated" else 1) or step == SOME


class SignalAt(L.Callback):
    """Sends this process a signal in the middle of a step, or of an evaluation."""

    def __init__(
        self, epoch: int, index: int, evaluation: bool = False, number: signal.Signals = signal.SIGTERM
    ) -> None:
        self.at, self.evaluation, self.number = (epoch, index), evaluation, number

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.at and not self.evaluation:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if (trainer.current_epoch, index) == self.at and self.evaluation:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("at", "left"),
    [
        ((0, 0), 7),  # of the journal's lines
        ((1, 1), 2),
        ((0, 2), 5),  # the epoch's last batch: its evaluation is begun, and left
        ((0, 0, True), 5),
    ],
)
@pytest.mark.parametrize("name", ["average", "accumulated"])
def test_sigterm_saves_at_the_end_of_the_step(name: str, at: Any, left: int, tmp_path: Path) -> None:
    """Of the optimiser's step: of two accumulated batches the second is waited for."""
    left -= name == "accumulated" and at == (0, 0)
    setting = {**SETTINGS[name], "every": None}
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    whole = Ended(tmp_path / "whole", **setting)
    stopped = Ended(
        tmp_path / "run", **{**setting, "callbacks": (*setting.get("callbacks", ()), partial(SignalAt, *at))}
    )
    assert stopped.stopped is True
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    again = Ended(tmp_path / "run", ckpt=tmp_path / "run" / "last.ckpt", **setting)
    assert again.journal == whole.journal[-left:]
    assert_same(again.weights, whole.weights)


class Listeners(L.Callback):
    """Who hears of SIGTERM before the first step."""

    found: ClassVar[list[Any]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))


def test_lightning_hears_of_no_signal_before_the_first_step(tmp_path: Path) -> None:
    """Its handler would have the processes of a run wait for one another, wherever each of them is."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        Ended(tmp_path / "without", callbacks=(Listeners,))
        Ended(tmp_path / "with", callbacks=(RestoreSignalHandlers, Listeners))
        assert [each is mine for each in Listeners.found] == [False, True]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


class DiesAt(L.Callback):
    """As a kill would have it, ends the run in the middle of a batch, and nothing is written any more."""

    def __init__(self, epoch: int, index: int) -> None:
        self.at = (epoch, index)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.at:
            raise MemoryError


def test_a_scaler_comes_back_as_it_was(tmp_path: Path) -> None:
    """The run ends, killed or asked to stop, where the scale has changed and steps to the next change are counted."""
    setting = {**SETTINGS["loss scaler"], "images": 20}
    whole = Ended(tmp_path / "whole", **setting)
    steps = [line for line in whole.journal if line != "evaluation"]
    scales = [line[-2:] for line in steps]
    assert any(later < earlier for (earlier, _), (later, _) in pairwise(scales))  # by a step that was skipped
    for counted, asked in ((0, True), (1, False)):
        done = next(n for n, (scale, count) in enumerate(scales, 1) if scale != 2.0**15 and count == counted)
        ends = partial(SignalAt, *steps[done - 1][:2]) if asked else partial(DiesAt, *steps[done][:2])
        folder = tmp_path / f"{counted} {asked}"
        with suppress(MemoryError):
            assert Ended(folder, **setting, callbacks=(ends,)).stopped
        held = read_checkpoint(folder / "last.ckpt")
        assert held["global_step"] == done
        assert (held["MixedPrecision"]["scale"], held["MixedPrecision"]["_growth_tracker"]) == scales[done - 1]
        again = Ended(folder, ckpt=folder / "last.ckpt", **setting)
        assert [line for line in again.journal if line != "evaluation"] == steps[done:]
        assert_same(again.weights, whole.weights)


@pytest.mark.filterwarnings("ignore:step")
def test_a_step_of_several_batches_is_begun_anew_wherever_it_was_left(tmp_path: Path) -> None:
    """Five batches per epoch, in steps of three and two, one skipped; the run is killed or stopped in all batches.

    The state of half a step would be gradients, the running statistics before the step, and the guard's records of it.
    """
    setting: dict[str, Any] = {"loss": "poisoned", "accumulate": 3, "images": 20, "norm": "batch"}
    whole = Ended(tmp_path / "whole", **setting)
    assert whole.module.guard.skipped == 2  # of four, one an epoch
    for number, at in enumerate([(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3), (1, 4)]):
        folder = tmp_path / str(number)
        with pytest.raises(MemoryError):
            Ended(folder, callbacks=(partial(DiesAt, *at),), **setting)
        again = Ended(folder, ckpt=folder / "last.ckpt" if at > (0, 2) else None, **setting)
        steps = {(0, 3): 3, (1, 0): 6, (1, 1): 6, (1, 3): 9, (1, 4): 9}.get(at, 0)  # lines of the journal before
        assert again.journal == whole.journal[steps:], at
        assert_same(again.weights, whole.weights)
        assert again.module.guard.skipped == 2
    for at in [(0, 0), (0, 1), (1, 3)]:
        folder = tmp_path / f"asked {at}"
        assert Ended(folder, every=None, callbacks=(partial(SignalAt, *at),), **setting).stopped
        again = Ended(folder, ckpt=folder / "last.ckpt", **setting)
        assert again.journal == whole.journal[3 if at[0] == 0 else 11 :], at
        assert_same(again.weights, whole.weights)


def test_ctrl_c_saves_at_the_end_of_the_step_and_a_second_one_does_not_wait(tmp_path: Path) -> None:
    interrupt = partial(SignalAt, 1, 1, number=signal.SIGINT)
    stopped = Ended(tmp_path, every=None, callbacks=(interrupt,))
    assert stopped.stopped == "interrupt"
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5
    assert len(stopped.journal) == 3 + 1 + 2
    hasty = Ended(tmp_path / "hasty", every=None, callbacks=(interrupt, interrupt))
    assert hasty.stopped == "interrupt"
    assert len(hasty.journal) == 3 + 1 + 1
    assert read_checkpoint(tmp_path / "hasty" / "last.ckpt")["global_step"] == 3


def test_a_run_that_had_stopped_early_does_not_go_on(tmp_path: Path) -> None:
    stop = partial(EarlyStopping, "val/AP", patience=1, mode="max", min_delta=2.0)
    whole = Ended(tmp_path / "whole", max_epochs=4, callbacks=(stop,), every=None)
    assert whole.journal.count("evaluation") == 2
    again = Ended(tmp_path / "again", ckpt=whole.files[-1], max_epochs=4, callbacks=(stop,), every=None)
    assert again.journal == []
    assert_same(again.weights, whole.weights)


def test_an_evaluation_that_fails_costs_no_training(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        Ended(tmp_path, every=None, callbacks=(Fails,))
    whole = Ended(tmp_path / "whole", every=None)
    again = Ended(tmp_path, ckpt=tmp_path / "last.ckpt", every=None)
    assert again.journal == whole.journal[3:]
    assert_same(again.weights, whole.weights)


@pytest.mark.parametrize("moved", [True, False])
def test_the_best_score_goes_along(moved: bool, tmp_path: Path) -> None:
    """To another folder, and with a folder that was moved; a best that is gone counts no more."""
    whole = Ended(tmp_path / "run", every=None)
    first = torch.load(whole.files[1], weights_only=True)
    state = next(value for key, value in first["callbacks"].items() if key.startswith("Best"))
    assert state["best_model_path"] == str((tmp_path / "run" / "best.ckpt").resolve())
    folder = tmp_path / "other"
    if moved:
        (tmp_path / "run").rename(folder)
    best = BestCheckpoint(folder, "val/AP")
    best.load_state_dict(state)
    assert Path(best.best_model_path) == (folder if moved else tmp_path / "run").resolve() / "best.ckpt"
    assert best.best_model_score == state["best_model_score"]
    assert list(best.best_k_models) == [best.best_model_path]
    Path(best.best_model_path).unlink()
    lost = BestCheckpoint(folder, "val/AP")
    with pytest.warns(UserWarning, match="is gone"):
        lost.load_state_dict(state)
    assert (lost.best_model_path, lost.best_k_models) == ("", {})


@pytest.mark.parametrize(
    ("every", "expected"), [(None, (0, 0)), ("500 steps", (500, 0)), ("1 step", (1, 0)), ("1.5 minutes", (0, 90))]
)
def test_how_often_is_said_in_words(every: str | None, expected: Any) -> None:
    assert parse_interval(every) == expected


@pytest.mark.parametrize("every", ["500", 500, "0 steps", "1.5 steps", "ten minutes", "2 hours", "-3 steps"])
def test_other_words_are_refused(every: Any, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=rf"'500 steps', '10 minutes' or null, got '{every}'"):
        LastCheckpoint(tmp_path, every)


def test_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is 35 seconds later: every second batch is due, an epoch's end is saved in any case."""
    now = iter(range(0, 10**6, 35))
    monkeypatch.setattr("distill.training.callbacks.checkpoints.time", SimpleNamespace(monotonic=lambda: next(now)))
    ended = Ended(tmp_path, every="1 minutes", limit_val_batches=0)
    steps = [torch.load(file, weights_only=True)["global_step"] for file in ended.files]
    assert steps == [2, 3, 5, 6]


# -- two processes


class KilledAt(SignalAt):
    """SIGKILL, which nothing outlives."""

    def __init__(self, epoch: int, index: int) -> None:
        super().__init__(epoch, index, number=signal.SIGKILL)


def one_rank(rank: int, port: int, folder: Path, killed: bool) -> None:
    """What one of the processes does: the run that is killed, or all others."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2"}
    torch.set_num_threads(1)

    def run(name: str, ckpt: str | None = None, *callbacks: Any) -> Ended:
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False, broadcast_buffers=False)
        setting: dict[str, Any] = {"loss": "poisoned", "accumulate": 3, "images": 40, "norm": "batch"}
        setting |= {"devices": 2, "strategy": strategy, "every": None if "asked" in name else "1 steps"}
        setting["callbacks"] = (partial(WeightAverage, decay=0.5), *callbacks)
        return Ended(folder / name, ckpt=folder / ckpt / "last.ckpt" if ckpt else None, **setting)

    if killed:
        run("killed", None, partial(KilledAt, 1, 3))
        return
    asked = [partial(SignalAt, 0, 0)] if rank == 1 else []  # the other one hears of it when they talk
    runs = {"whole": run("whole"), "after the kill": run("again", "killed")}
    for name, steps in {"asked": 1, "asked late": checkpoints.EXCHANGE_STEPS}.items():
        checkpoints.EXCHANGE_STEPS = steps
        assert run(name, None, *asked).stopped
        runs[f"after it was {name}"] = run(f"{name}, again", name)
    found = {name: {"journal": each.journal, "weights": each.weights} for name, each in runs.items()}
    torch.save(found, folder / f"{rank}.pt")


def spawn(folder: Path, killed: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_two_processes(one_rank, port, folder, killed)


def test_two_processes_that_are_killed_or_asked_in_a_step_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """In an epoch, amid an accumulated step; of the images 0 is seen by one of the two alone.

    Asked in the first step, they leave with it where they talk after each one, else with the epoch's last.
    """
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(tmp_path, killed=True)
    spawn(tmp_path, killed=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        whole = found.pop("whole")
        assert len(whole["journal"]) == 12
        for (name, ended), done in zip(found.items(), (9, 3, 5), strict=True):
            assert ended["journal"] == whole["journal"][done:], (rank, name)
            assert_same(ended["weights"], whole["weights"])
