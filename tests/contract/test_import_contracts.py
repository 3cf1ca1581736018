"""The import contracts count lazy and TYPE_CHECKING imports: both kinds break the contracts in a changed copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = "data/sampler.py"
"""The module that is given one import more. ``data/datamodule.py`` imports it."""
KINDS = {
    "lazy": "\n\ndef planted() -> None:\n    import {0}\n\n    print({0})\n",
    "type checking": "\n\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import {0}\n",
}
UPWARD = "distill.training.schedule"
CIRCLE = "distill.data.datamodule"


def broken_contracts(folder: Path, planted: str = "") -> list[str]:
    """First words of the names of contracts that break when `planted` is appended to a module of a package copy."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    with (folder / "src" / "distill" / HOST).open("a") as module:
        module.write(planted)
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    verdicts = [line for line in done.stdout.splitlines() if line.endswith((" KEPT", " BROKEN"))]
    assert len(verdicts) >= 3, done.stdout + done.stderr
    assert done.returncode == any(line.endswith(" BROKEN") for line in verdicts), done.stdout
    return [line for line in verdicts if line.endswith(" BROKEN")]


def test_the_package_as_it_is_keeps_all_contracts(tmp_path: Path) -> None:
    assert broken_contracts(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_from_a_higher_layer_breaks_the_layers(kind: str, tmp_path: Path) -> None:
    assert any(line.startswith("Layers: ") for line in broken_contracts(tmp_path, KINDS[kind].format(UPWARD)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_in_both_directions_breaks_the_contract_on_circles(kind: str, tmp_path: Path) -> None:
    (line,) = broken_contracts(tmp_path, KINDS[kind].format(CIRCLE))
    assert line.startswith("No circles ")
