"""Overrides of the verbs that start no run."""

from __future__ import annotations

import pytest

from distill.cli.config import override_checks
from distill.types import DistillError


def test_a_verb_that_looks_at_one_run_refuses_a_sweep() -> None:
    with pytest.raises(DistillError, match=r"seed=1,2: expected one value"):
        override_checks.compose_without_run(["distill=none", "seed=1,2"])


def test_the_configuration_of_one_run_has_no_hydra_node() -> None:
    cfg = override_checks.compose_without_run(["distill=none", "seed=7"])
    assert cfg.seed == 7
    assert cfg.name == "none-frcnn_r10_mini-shapes"
    assert "hydra" not in cfg
