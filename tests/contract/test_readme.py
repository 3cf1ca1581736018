"""What the README says to type can be typed, and the method that it shows is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cli import compose
from distill.losses.base import DistillLoss
from distill.losses.imitation import squared_error
from distill.types import View

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python train\.py (.+?)(?:  +#.*)?$", README, re.MULTILINE)
INSIDE = re.findall(r"`python train\.py (.+?)`", README.replace("\n", " "))


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 6
    assert len(INSIDE) > 1


@pytest.mark.parametrize("words", [*COMMANDS, *INSIDE])
def test_every_command_composes(words: str) -> None:
    overrides = [word for word in shlex.split(words) if word != "-m"]
    compose.check([word for word in overrides if not word.startswith("hydra/sweeper=")])  # an extra


@pytest.mark.parametrize("option", sorted(set(compose.groups()["model"])))
def test_every_model_may_start_from_imagenet(option: str) -> None:
    cfg = compose.composed([f"model={option}", "start=imagenet", "paths.run=x", "name=x"])
    for node in (cfg.model, cfg.teacher.model):
        assert (node.backbone_weights, node.trainable_stages, node.norm) == ("IMAGENET1K_V1", 3, "batch_fixed_stats")


def test_the_method_that_is_shown_teaches() -> None:
    """The mean over levels of the mean of (S - T)^2, over all that the batch holds."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "DistillLoss" in block)
    shown: dict[str, Any] = {"DistillLoss": DistillLoss, "View": View, "Tensor": Tensor, "squared_error": squared_error}
    exec(code, shown)
    torch.manual_seed(0)
    student, teacher = ({8: torch.randn(2, 3, 8, 8), 16: torch.randn(2, 3, 4, 4)} for _ in range(2))
    found = shown["Mimic"]({"neck": 1.0})(SimpleNamespace(neck=student), SimpleNamespace(neck=teacher))["neck"]
    levels = [(student[stride].double() - x.double()) ** 2 for stride, x in teacher.items()]
    assert float(found) == pytest.approx(sum(float(each.mean()) for each in levels) / len(levels), rel=1e-5)
    large = [
        SimpleNamespace(neck={stride: (1000 * x).half() for stride, x in each.items()}) for each in (student, teacher)
    ]
    assert shown["Mimic"]({"neck": 1.0})(*large)["neck"].isfinite()
