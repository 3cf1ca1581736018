"""Find a run, compose its configuration again, and load its student and its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig

from distill.cli.config import compose, override_checks
from distill.cli.config.config_folders import with_copy_of_run
from distill.cli.config.overrides import parse_overrides, read_config, recorded_overrides
from distill.labels import unknown_classes
from distill.run_folder import OVERRIDES, STUDENT, SUMMARY, RunFolder
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.cli.runs.teacher_cache import TeacherOptions
    from distill.detectors.base import Detector

SIZE_KEYS = ("data.min_size", "data.max_size", "data.eval_min_size", "data.eval_max_size")
RESIZE_KEYS = ("data.antialias", "data.pad_to", "data.resize")
TRAINING_GROUPS = ("trainer", "callbacks", "logger")
"""Groups whose overrides concern a training. Evaluation and replay ignore them, except `MACHINE_KEYS`."""
MACHINE_KEYS = ("trainer", "trainer.accelerator", "trainer.precision")


def find_run(source: Path) -> RunFolder:
    """The run that a folder or a file inside it belongs to.

    Raises:
        DistillError: the path does not exist, or belongs to no run. The message names runs below it.
    """
    if not source.exists():
        raise DistillError(f"{source} does not exist: expected the folder of a run, or a file inside one")
    for folder in (source, *source.absolute().parents):
        if RunFolder(folder).overrides.is_file():
            return RunFolder(folder.absolute())
    if runs := sorted(file.parent for file in source.glob(f"*/{OVERRIDES}")):
        raise DistillError(f"{source} holds {len(runs)} runs; name one of them, for example {runs[-1]}")
    raise DistillError(
        f"{source} is not a run, nor a file inside one: expected a folder with {OVERRIDES}, as train leaves it"
    )


def recompose(run: RunFolder, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration, composed again with further overrides.

    `data.resize` is that of the run, unless the overrides give another: the teacher that decided it may
    have moved since.
    Recorded overrides of the training are left out: an older version may have accepted values that are refused now.
    """
    given = {override.key_or_group for override in parse_overrides(overrides)}
    chosen = given & set(compose.config_groups())
    recorded = [
        str(override.input_line)
        for override in recorded_overrides(run.path)
        # data=voc replaces all overrides of the run's data, but for those that decide what the detector sees
        if (override.key_or_group.split(".")[0] not in chosen or override.key_or_group in RESIZE_KEYS)
        and (override.key_or_group.split(".")[0] not in TRAINING_GROUPS or override.key_or_group in MACHINE_KEYS)
        # a second mapping, such as data.source.rename, would be merged into the first
        and not (override.key_or_group in given and override.type is OverrideType.CHANGE)
    ]
    from distill.cli.config import auto_values

    words = with_copy_of_run([*recorded, *overrides], run)
    cfg = override_checks.compose_without_run(words)
    if not run.config.is_file():
        return cfg
    config = read_config(run)
    if "data.resize" not in given and "resize" in config["data"]:
        cfg.data.resize = config["data"]["resize"]
    return auto_values.resolve_as_recorded(cfg, config, words) if auto_values.auto_keys(cfg) else cfg


def trained_size(source: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides that resize images of other data as in the student's training, unless `overrides` give a size."""
    keys = {override.key_or_group for override in parse_overrides(overrides)}
    if "data" not in keys or keys & set(SIZE_KEYS):
        return []
    options = load_student(source).options
    return [f"data.eval_min_size={options['min_size']}", f"data.eval_max_size={options['max_size']}"]


def load_student(source: Path) -> Detector:
    """The exported student of a run folder, or the student inside a checkpoint."""
    from distill.detectors.registry import load_detector

    run = RunFolder(source)
    if source.is_dir() and not run.student.is_file():
        raise DistillError(f"{source} has no {STUDENT}: the run did not finish; try {run.last}")
    if source.suffix == ".ckpt" and not source.is_file():
        raise DistillError(f"{source}: no such checkpoint")
    return load_detector(source)


def load_teacher_of(
    run: RunFolder, options: TeacherOptions | None, classes_of_given_weights: Sequence[str] | None = None
) -> Detector:
    """Load the teacher of a run.

    Args:
        run: the run. It has finished, unless the weights are given.
        options: the teacher's options of the run's configuration.
        classes_of_given_weights: the data's classes if the user gave ``teacher.weights`` to this command, for example
            because the teacher moved. None loads the weights that the run's summary names.

    Raises:
        DistillError: the run has no teacher, or its weights are gone.
    """
    from distill.cli.runs.teacher_cache import load_teacher
    from distill.files import read_json

    if classes_of_given_weights is not None and options is not None and options.weights is not None:
        return load_teacher(options, options.weights, classes_of_given_weights)
    identity = read_json(run.summary).get("teacher") if run.summary.is_file() else None
    if not identity:
        raise DistillError(
            f"{run.path} has no teacher: its {SUMMARY} names none (distill=none, or the run did not finish)"
        )
    source, classes = (identity.get(key) if isinstance(identity, dict) else None for key in ("source", "classes"))
    if not isinstance(source, str) or not isinstance(classes, list):
        raise DistillError(f"{run.summary}: expected the teacher's 'source' and 'classes', got {identity}")
    if Path(source).is_absolute() and not Path(source).exists():
        raise DistillError(f"the run's teacher is no longer at {source}: say where it is with teacher.weights=…")
    return load_teacher(options, source, [str(name) for name in classes])


def class_notes(model: Sequence[str], data: Sequence[str]) -> list[str]:
    """Sentences about classes that only the model or only the data has. They are matched by exact name."""
    unknown, surplus = unknown_classes(model, data), unknown_classes(data, model)
    notes = []
    if unknown:
        notes.append(
            f"the model does not know {', '.join(unknown)} of the data: AP counts 0 for them. The column 'shared "
            "classes' leaves them out"
        )
    if surplus:
        notes.append(f"the data has no {', '.join(surplus)}: detections of these classes do not count")
    return notes
