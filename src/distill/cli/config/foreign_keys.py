"""Keys that other tools use, and the words that do the same here. Error messages suggest these words."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

SYNONYMS: dict[str, str] = {
    # length and rate
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "n_epochs", "epoch"), "schedule.epochs={}"),
    **dict.fromkeys(("steps", "max_steps", "max_iter", "iterations", "iters"), "schedule.steps={}"),
    **dict.fromkeys(("lr", "lr0", "learning_rate", "base_lr", "max_lr"), "schedule.optimizer.lr={}"),
    **dict.fromkeys(("weight_decay", "wd"), "schedule.optimizer.weight_decay={}"),
    "momentum": "schedule.optimizer.momentum={}",
    **dict.fromkeys(("warmup", "warmup_iters", "warmup_steps"), "schedule.warmup_steps={}"),
    **dict.fromkeys(("accumulate", "grad_accum", "gradient_accumulation_steps"), "schedule.accumulate={}"),
    **dict.fromkeys(("clip", "clip_grad", "grad_clip", "max_grad_norm", "gradient_clip_val"), "schedule.clip={}"),
    **dict.fromkeys(("eval_interval", "val_interval", "eval_every"), "schedule.evaluate_every={}"),
    **dict.fromkeys(("lr_scheduler", "scheduler"), "schedule.shape={}"),
    **dict.fromkeys(("opt", "optimizer", "optim"), "schedule={}"),
    # data
    **dict.fromkeys(("batch", "batch_size", "bs", "train_batch_size", "batchsize"), "data.batch_size={}"),
    **dict.fromkeys(("val_batch_size", "eval_batch_size", "test_batch_size"), "data.eval_batch_size={}"),
    **dict.fromkeys(("workers", "num_workers", "n_workers", "j"), "data.workers={}"),
    **dict.fromkeys(("imgsz", "img_size", "image_size", "img", "input_size"), "data.min_size={0} data.max_size={0}"),
    **dict.fromkeys(("dataset", "data_dir", "data_root", "data_path", "dataset_dir", "root", "source"), "data={}"),
    **dict.fromkeys(("fliplr", "hflip", "flip"), "data.flip={}"),
    "cache": "data.cache={}",
    "fraction": "data.fraction={}",
    **dict.fromkeys(("classes", "class_names", "names"), "data.source.classes={}"),
    # model and teacher
    **dict.fromkeys(("arch", "student", "net", "network", "detector"), "model={}"),
    **dict.fromkeys(("weights", "checkpoint_path", "load_from", "init_weights"), "model.weights={}"),
    **dict.fromkeys(("teacher_weights", "teacher_path", "teacher_checkpoint", "teacher_ckpt"), "teacher.weights={}"),
    **dict.fromkeys(("method", "loss", "distiller", "kd"), "distill={}"),
    # machine
    **dict.fromkeys(("device", "accelerator"), "trainer.accelerator={}"),
    **dict.fromkeys(("gpus", "num_gpus", "devices", "ngpu", "nproc"), "trainer=ddp trainer.devices={}"),
    **dict.fromkeys(("precision", "dtype"), "trainer.precision={}"),
    # the run
    **dict.fromkeys(("random_seed", "manual_seed"), "seed={}"),
    **dict.fromkeys(("output_dir", "out_dir", "out", "output", "save_dir", "work_dir", "exp_dir"), "hydra.run.dir={}"),
    "project": "paths.outputs={}",
    **dict.fromkeys(("resume_from", "resume_from_checkpoint", "ckpt", "checkpoint"), "ckpt_path={}"),
    **dict.fromkeys(("early_stopping", "patience"), "callbacks=early_stop"),
    "ema": "callbacks=ema",
    "wandb": "logger=wandb",
    "tensorboard": "logger=tensorboard",
}
"""Key of another tool -> the overrides to write here, with ``{}`` in place of the value."""
VALUES: dict[str, dict[str, str]] = {
    "pretrained": {
        r"true|1|yes|imagenet|": "start=imagenet",
        r"false|0|no|none": "start=scratch",
        r".+": "model.weights={}",
    },
    "weights": {r"imagenet\w*": "start=imagenet"},
    "device": {
        r"cuda|gpu": "trainer.accelerator=gpu",
        r"(?:cuda:)?(\d+)": "trainer.accelerator=gpu trainer.devices=[{}]",
        r"(\d+(?:,\d+)+)": "trainer=ddp trainer.devices=[{}]",
    },
    **dict.fromkeys(
        ("amp", "fp16", "half", "mixed_precision"),
        {r"false|0|no|none": "trainer.precision=32-true", r"bf16": "trainer.precision=bf16-mixed"}
        | {r".*": "trainer.precision=16-mixed"},
    ),
    "bf16": {r"false|0|no": "trainer.precision=32-true", r".*": "trainer.precision=bf16-mixed"},
    "optimizer": {r"(?i:adamw?)": "schedule=adamw", r"(?i:sgd)": "schedule=sgd"},
    "resume": {r".*": "ckpt_path=last"},
}
"""Key of another tool -> patterns of values, tried before `SYNONYMS`, and the overrides to write here."""
OTHER_NODES = ("teacher.", "callbacks.", "logger.", "trainer.", "hydra.")
"""Nodes whose keys are suggested after those of the student's run."""


def suggest_words(word: str, groups: Mapping[str, Sequence[str]], keys: Sequence[str]) -> list[str]:
    """Overrides that a word with an unknown key may stand for, the likeliest first; none where nothing is similar.

    Args:
        word: the word ``KEY=VALUE``. The key may be that of another tool, may have a spelling mistake, or may lack its
            path.
        groups: config groups and their options.
        keys: full keys of the configuration.
    """
    key, _, value = word.lstrip("+~").partition("=")
    if fitting := [group for group in difflib.get_close_matches(key, groups) if value in groups[group]]:
        return [f"{group}={value}" for group in fitting]
    name = key.rpartition(".")[2].lower().replace("-", "_")
    ordered = sorted(keys, key=lambda path: path.startswith(OTHER_NODES))
    paths = [path for path in ordered if path.rpartition(".")[2] == name]
    if "." in key:
        group = key.partition(".")[0]
        near = [path for path in paths if path.endswith(f".{key}") or path.startswith(f"{group}.")]
        suggested = _with_value(near, value) or _synonym(name, value) or _with_value(paths, value)
        return suggested or _with_value(difflib.get_close_matches(key, ordered, n=3, cutoff=0.5), value)
    if suggested := _synonym(name, value) or _with_value(paths, value):
        return suggested
    full = {path.rpartition(".")[2]: path for path in reversed(ordered)} | {group: group for group in groups}
    words: list[str] = []
    for close in difflib.get_close_matches(key, {*full, *SYNONYMS}, n=3, cutoff=0.65):
        words += _with_value([full[close]], value) if close in full else _synonym(close, value)
    return sorted(dict.fromkeys(words), key=lambda word: "." in word.partition("=")[0])


def suggestion(words: Iterable[str], otherwise: str = "") -> str:
    """'; did you mean …?' with words to paste, or the other text where there is none."""
    quoted = [" ".join(map(shlex.quote, word.split(" "))) for word in words]
    return f"; did you mean {' or '.join(quoted)}?" if quoted else otherwise


def _with_value(paths: Sequence[str], value: str) -> list[str]:
    return [f"{path}={value}" for path in paths[:3]]


def _synonym(name: str, value: str) -> list[str]:
    for pattern, words in VALUES.get(name, {}).items():
        if match := re.fullmatch(pattern, value):
            return [words.format(match[1] if match.groups() else value)]
    return [SYNONYMS[name].format(value)] if name in SYNONYMS else []
