"""Run folders as version 0.1.0 wrote them, with weights from a formula, and the numbers that 0.1.0 computed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

RECORDS = Path(__file__).parent / "old_runs"
OLD_RUNS = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos", "distilled")
"""A run of each family, and ``distilled``, whose teacher is the run ``faster_rcnn``."""


def record(name: str) -> dict[str, Any]:
    """Files of a run, shapes of its weights, and under ``expected`` the numbers of version 0.1.0."""
    loaded: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return loaded


def write_old_run(name: str, folder: Path) -> Path:
    """Write the run ``name`` below ``folder`` as version 0.1.0 left it. Returns its path."""
    text = (RECORDS / f"{name}.json").read_text().replace("RUNS", str(folder))
    old, run = json.loads(text), folder / name
    (run / "checkpoints").mkdir(parents=True)
    state = {key: tensor_by_formula(key, shape, kind) for key, (kind, shape) in old["shapes"].items()}
    torch.save(state, run / "student.pt")
    (run / "student.json").write_text(json.dumps(old["student_json"]))
    (run / "config.yaml").write_text(old["config_yaml"])
    (run / "overrides.yaml").write_text(yaml.safe_dump(old["overrides"]))
    (run / "summary.json").write_text(json.dumps(old["summary"]))
    weights = {f"student.net.{key}": value for key, value in state.items()}
    torch.save({**old["checkpoint"], "state_dict": weights, "epoch": 0}, run / "checkpoints" / "last.ckpt")
    return run


def tensor_by_formula(name: str, shape: Sequence[int], kind: str) -> Tensor:
    """Sine wave whose phase depends on the name. ``expected`` was computed with this formula, so it must stay."""
    dtype: torch.dtype = getattr(torch, kind)
    if not dtype.is_floating_point:
        return torch.ones(tuple(shape), dtype=dtype)
    count = math.prod(shape)
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7390851 + zlib.crc32(name.encode()) % 1000)
    fan = max(1, count // shape[0]) if shape else 1
    gain = 0.5 if "head" in name else math.sqrt(2)
    value = gain * wave / math.sqrt(fan) if len(shape) > 1 else 0.1 * wave
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        value = 1 + 0.1 * wave
    return value.reshape(tuple(shape)).to(dtype)
