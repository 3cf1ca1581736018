"""What lightning_compat.py relies on in Lightning: the bound on its version, names, and behavior in a small run."""

from __future__ import annotations

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from packaging.specifiers import SpecifierSet
from torch.utils.data import DataLoader

from distill.training import lightning_compat as compat

EVENTS: list[str] = []


class Model(L.LightningModule):
    """One weight, three batches an epoch; notes what Lightning calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        EVENTS.append(f"train {self.current_epoch}.{index}")
        return (self.weight * batch).sum()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        EVENTS.append(f"evaluate {self.current_epoch}.{index}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(L.Callback):
    """Saves in one hook of the first epoch, and notes the progress there."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.file = folder / "x.ckpt"
        self.found: list[tuple[int, int, bool, bool]] = []
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, *_: Any) -> None:
        progress = compat.batch_progress(trainer)
        count = progress.current
        self.found.append(
            (count.processed, count.completed, bool(progress.is_last_batch), compat.between_epochs(trainer))
        )
        if progress.is_last_batch and not self.file.exists():
            trainer.save_checkpoint(self.file)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        compat.correct_loop_state(trainer, checkpoint)


def fit(folder: Path, callback: L.Callback | None, resume: Path | None = None, **options: Any) -> L.Trainer:
    EVENTS.clear()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[callback] if callback else [], **options,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(torch.ones(3, 1)), DataLoader(torch.ones(2, 1)), ckpt_path=resume)
    return trainer


WHOLE = ["train 0.0", "train 0.1", "train 0.2", "evaluate 0.0", "evaluate 0.1"]
SECOND = [event.replace(" 0.", " 1.") for event in WHOLE]


def test_the_version_is_bounded() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (bounds,) = re.findall(r'^  "lightning([^"]*)",$', text, re.MULTILINE)
    assert any(each.operator == "<" for each in SpecifierSet(bounds))
    assert version("lightning") in SpecifierSet(bounds)


def test_progress_in_the_hooks_of_a_run(tmp_path: Path) -> None:
    batches = Save("on_train_batch_end", tmp_path)
    fit(tmp_path, batches)
    assert EVENTS == WHOLE + SECOND
    epoch = [(1, 0, False, False), (2, 1, False, False), (3, 2, True, False)]
    assert batches.found == epoch * 2
    epochs = Save("on_train_epoch_end", tmp_path / "epochs")
    fit(tmp_path, epochs)
    assert epochs.found == [(3, 3, True, True)] * 2


def test_a_checkpoint_before_the_evaluation_resumes_with_the_evaluation(tmp_path: Path) -> None:
    save = Save("on_train_batch_end", tmp_path)
    fit(tmp_path, save)
    fit(tmp_path, None, save.file)
    assert WHOLE[3:] + SECOND == EVENTS


@pytest.mark.parametrize("options", [{}, {"max_steps": 6}], ids=str)
def test_a_checkpoint_at_the_end_of_an_epoch_resumes_with_the_next_one(options: dict[str, int], tmp_path: Path) -> None:
    save = Save("on_train_epoch_end", tmp_path)
    fit(tmp_path, save, **options)

    class Anew(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            assert compat.between_epochs(trainer)
            compat.start_epoch_anew(trainer)

    fit(tmp_path, Anew(), save.file, **options)
    assert EVENTS == SECOND


def test_an_accumulated_step_is_completed_by_its_last_batch(tmp_path: Path) -> None:
    completed = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            completed.append((compat.step_completed(trainer), trainer.global_step))

    fit(tmp_path, Note(), accumulate_grad_batches=2)
    assert completed == [(False, 0), (True, 1), (True, 2), (False, 2), (True, 3), (True, 4)]


@pytest.mark.parametrize(("every", "expected"), [(1, [True, True]), (2, [False, True])])
def test_whether_an_evaluation_follows(every: int, expected: list[bool], tmp_path: Path) -> None:
    told = []

    class Note(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            told.append(compat.evaluation_follows(trainer))

    fit(tmp_path, Note(), check_val_every_n_epoch=every)
    assert told == expected
    assert len([event for event in EVENTS if event.startswith("evaluate")]) == 2 * sum(expected)


def test_a_step_is_left_out_of_the_average(tmp_path: Path) -> None:
    """The weight falls by 0.1 a step, so that an average with decay 0 is the weight after the last step that counts."""

    class Leave(EMAWeightAveraging):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step > 4:
                compat.leave_out_of_average(self, trainer.global_step)
            super().on_train_batch_end(trainer, *args)

    averages = []
    for kind in (EMAWeightAveraging, Leave):
        callback = kind(decay=0.0)
        trainer = fit(tmp_path, callback)
        averages.append(copy.deepcopy(trainer.lightning_module.weight).item())  # swapped in at the end
        assert callback in compat.callbacks(trainer)
    assert averages == pytest.approx([1 - 0.6, 1 - 0.4])
