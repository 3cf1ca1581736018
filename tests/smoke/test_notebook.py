"""The quickstart is run as a reader would run it, with smaller numbers."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
SMALL = {
    **{"train_images": 8, "teacher_images": 8, "val_images": 4},
    **{"teacher_epochs": 1, "student_epochs": 1, "alone_epochs": 1},
}


class ThisPython(KernelSpecManager):
    """The kernel of the Python that runs the tests, whichever kernels are registered on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
        )


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Overrule the numbers of the cell tagged ``parameters``, which must be the first and hold exactly these."""
    first = code_cells(notebook)[0]
    assert "parameters" in first.metadata.tags
    names = {node.id for node in ast.walk(ast.parse(first.source)) if isinstance(node, ast.Name)}
    assert names == SMALL.keys()
    first.source += "".join(f"\n{name} = {value}" for name, value in SMALL.items())


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_nothing_is_stored(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs, f"run `make format`: this cell has outputs:\n{cell.source}"
        assert cell.execution_count is None, f"run `make format`: this cell has a count:\n{cell.source}"


def test_runs_to_its_end(notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(notebook)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    manager = AsyncKernelManager(kernel_spec_manager=ThisPython())
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=manager, timeout=300, resources=folder).execute()

    text = printed(code_cells(notebook)[-1])
    found = {who: float(ap) for who, ap in re.findall(r"^([\w ]+): AP (-?\d\.\d+),", text, re.MULTILINE)}
    assert found.keys() == {"student alone", "distilled", "teacher"}, text
    assert all(0 <= ap <= 1 for ap in found.values()), text
    pictures = [
        output for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
    assert not (tmp_path / "lightning_logs").exists()
    assert not (tmp_path / "checkpoints").exists()
