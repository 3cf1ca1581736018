"""Run folders: one module knows the names of their files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import distill
from distill.cli.config import compose
from distill.run_folder import RunFolder, previous_checkpoint

SOURCE = Path(distill.__file__).parent
FILES = (
    r"overrides\.yaml|(?<!conf/)(?<!Detectron2's )config\.yaml|summary\.json|student\.(pt|json)"
    r"|(last|last-1|best)\.ckpt|metrics\.csv|steps\.csv|curves\.png|error\.txt"
)
FOLDERS = {"checkpoints", "pictures", "non_finite", "slurm_job"}


def spelled(tree: ast.AST) -> Iterator[str]:
    """File names of a run folder in string literals, docstrings left out, and folder names after ``/``."""
    strings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            yield from FOLDERS & {node.right.value}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in strings:
            yield from re.findall(rf"(?:^|[\s/(])((?:{FILES})(?:$|[\s:;,)]))", node.value) and [node.value]


def test_only_run_folder_spells_the_file_names() -> None:
    found = {
        str(file.relative_to(SOURCE)): names
        for file in SOURCE.rglob("*.py")
        if (names := list(spelled(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert found.pop("run_folder.py")
    assert found.pop("detectors/foreign_files.py") == ["config.yaml"]  # Detectron2's
    assert found == {}


def test_spelled_names_are_found() -> None:
    code = 'run / "checkpoints"; f"{run} has no student.pt: gone"; open("overrides.yaml"); "conf/config.yaml"'
    assert list(spelled(ast.parse(f'"""Docstrings may name summary.json."""\n{code}'))) == [
        "checkpoints",
        " has no student.pt: gone",
        "overrides.yaml",
    ]


def test_the_configuration_puts_checkpoints_where_the_run_folder_expects_them() -> None:
    callbacks = compose.compose_config(["paths.run=run"]).callbacks
    assert callbacks.last.dirpath == callbacks.best.dirpath == str(RunFolder("run").checkpoints)


def test_a_run_is_finished_once_summary_description_and_weights_exist(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for file in (run.summary, run.description, run.student):
        assert not run.finished
        file.touch()
    assert run.finished
    run.student.unlink()  # lost in a copy: not a teacher, and a sweep makes the job again
    assert not run.finished


def test_a_run_is_resumable_from_the_previous_checkpoint_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.resumable == []
    run.checkpoints.mkdir()
    run.previous.touch()
    assert run.resumable == [run.previous] == [run.checkpoints / "last-1.ckpt"]
    run.last.touch()
    assert run.resumable == [run.last, run.previous]
    assert previous_checkpoint(Path("any.ckpt")) == Path("any-1.ckpt")
