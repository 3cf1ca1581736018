"""Range checks for settings that no constructor validates.

These are the settings of the run and the teacher, and some settings of torch and Lightning that would otherwise fail
only after a teacher has been trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig

from distill.cli.config import instantiate
from distill.type_checks import leaves
from distill.types import DistillError

Rule = tuple[str, Callable[[Any], bool]]


def _integer_from(least: int, most: float = math.inf) -> Rule:
    expected = f"a whole number from {least}" + (f" to {most:.0f}" if most < math.inf else "")
    return expected, lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(expected: str, is_valid: Callable[[float], bool]) -> Rule:
    return expected, lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and is_valid(value)


def _if_number(rule: Rule) -> Rule:
    """Leaves other types, such as ``auto``, to the constructor that reads the setting."""
    return rule[0], lambda value: not isinstance(value, (int, float)) or isinstance(value, bool) or rule[1](value)


def _one_of(*known: Any) -> Rule:
    expected = ", ".join(str(option).lower() if isinstance(option, bool) else str(option) for option in known)
    return f"one of {expected}", lambda value: any(
        value is option or (isinstance(option, str) and value == option) for option in known
    )


def _or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda value: value is None or rule[1](value)


BOOLEAN = _one_of(True, False)
POSITIVE_OR_NULL = _or_null(_number("a number above 0", lambda value: 0 < value < math.inf))
RULES: dict[str, Rule] = {
    "seed": _integer_from(0, 2**32 - 1),  # numpy's range
    "init": _one_of("scratch", "inherit"),
    "test": BOOLEAN,
    "role": _one_of("student", "teacher", "baseline"),
    "baseline": (
        "train, the folder of a run with distill=none, or null",
        lambda value: value is None or (isinstance(value, str) and bool(value)),
    ),
    "baseline_epochs": _number("a factor above 0", lambda value: 0 < value < math.inf),
    "cost": _integer_from(0),
    "pictures": _integer_from(0),
    "channels_last": BOOLEAN,
    "deterministic": _one_of(True, False, "warn"),
    "distill.balance": _one_of("none", "gradient"),
    "distill.same_place": _one_of("warn", "allow"),
    "supervised.*": _number("a weight from 0", lambda value: 0 <= value < math.inf),
    "teacher.weights": (
        "a run folder, a file, a name of torchvision's, or null",
        lambda value: isinstance(value, (str, type(None))),
    ),
    "teacher.train": _one_of("auto", "never"),
    "teacher.seed": _integer_from(0, 2**32 - 1),
    "teacher.run": (
        "a list of overrides",
        lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
    ),
    "teacher.min_ap": _or_null(_number("an AP from 0 to 1", lambda value: 0 <= value <= 1)),
    "teacher.evaluate": BOOLEAN,
    "teacher.fold": BOOLEAN,
    "teacher.channels_last": BOOLEAN,
    "teacher.dtype": _one_of("auto", "float32", "bfloat16"),
    "schedule.epochs": _if_number(_integer_from(1)),
    "schedule.accumulate": _if_number(_integer_from(1)),
    "schedule.evaluate_every": _if_number(_integer_from(1)),
    "schedule.warmup_steps": _if_number(_integer_from(0)),
    "data.batch_size": _integer_from(1),
    "data.eval_batch_size": _or_null(_integer_from(1)),
    "data.workers": _integer_from(0),
    "data.prefetch": _integer_from(1),
    "data.pad_to": _integer_from(1),
    "trainer.accelerator": (
        "auto, cpu, gpu, cuda or mps; trainer.devices=[1] chooses the second GPU",
        lambda value: not isinstance(value, str) or ":" not in value,
    ),
    "trainer.num_nodes": _integer_from(1),
    "trainer.accumulate_grad_batches": _integer_from(1),
    "trainer.check_val_every_n_epoch": _integer_from(1),
    "trainer.val_check_interval*": (
        "1.0: a run is evaluated between epochs, where its resume is exact; schedule.evaluate_every says how often",
        lambda value: isinstance(value, float) and value == 1.0,
    ),
    "trainer.limit_test_batches": (
        "null, because a run does not call Lightning's test loop; data.limit_eval=N limits val and test to N images",
        lambda value: value is None,
    ),
    "trainer.overfit_batches": (
        "0, because every epoch shuffles the batches; data.limit=N trains on the same N images in every epoch, and "
        "data.limit_eval=N limits the evaluations",
        lambda value: value == 0,
    ),
    "trainer.fast_dev_run": (
        "false, because the folder of the run would count as finished; for a quick trial set schedule.steps=2 "
        "data.limit_eval=8, or call the command doctor",
        lambda value: value is False or value == 0,
    ),
    "trainer.use_distributed_sampler": (
        "false, because the loaders already split the images between the processes",
        lambda value: value is False,
    ),
    "trainer.log_every_n_steps": _integer_from(0),
    "trainer.gradient_clip_val": POSITIVE_OR_NULL,
    "logger.*.flush_logs_every_n_steps": _integer_from(1),
    "trainer.limit_train_batches": POSITIVE_OR_NULL,
}
"""Pattern of a key, with ``*`` for any text -> the rule for its value."""


def validate_values(cfg: DictConfig) -> None:
    """Refuse invalid values.

    Raises:
        DistillError: names the first invalid value, or an interpolation that cannot be resolved.
    """
    for key, value in leaves(instantiate.to_containers(cfg)):
        for pattern, (expected, is_valid) in RULES.items():
            if fnmatchcase(key, pattern) and not is_valid(value):
                raise DistillError(f"{key}={value}: expected {expected}")
