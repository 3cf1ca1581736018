"""The notebooks are run as a reader would run them, with smaller numbers."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL = {
    "quickstart": {
        **{"train_images": 8, "teacher_images": 8, "val_images": 4},
        **{"teacher_epochs": 1, "student_epochs": 1, "alone_epochs": 1},
    },
    "own_data_and_loss": {
        **{"student_images": 8, "teacher_images": 8, "val_images": 4},
        **{"teacher_epochs": 1, "student_epochs": 1},
    },
    "why_it_works": {
        **{"seeds": 1, "student_epochs": 1, "teacher_epochs": 1},
        "data": [
            "data=shapes_100",
            *(f"{part}.source.train=8" for part in ("data", "teacher.data")),
            *(f"data.source.{split}=4" for split in ("val", "test")),
        ],
    },
}


class ThisPython(KernelSpecManager):
    """The kernel of the Python that runs the tests, whichever kernels are registered on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
        )


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shrink(notebook: nbformat.NotebookNode, small: dict[str, object]) -> None:
    """Overrule the numbers of the cell tagged ``parameters``, which must be the first and hold exactly these."""
    first = code_cells(notebook)[0]
    assert "parameters" in first.metadata.tags
    names = {node.id for node in ast.walk(ast.parse(first.source)) if isinstance(node, ast.Name)}
    assert names == small.keys()
    first.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def count_pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """Run a notebook to its end, and return it with its outputs."""
    notebook = read(name)
    shrink(notebook, SMALL[name])
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(variable, str(folder))
    manager = AsyncKernelManager(kernel_spec_manager=ThisPython())
    NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def test_each_notebook_has_small_numbers() -> None:
    assert sorted(SMALL) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_stored(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs, f"run `make format`: this cell has outputs:\n{cell.source}"
        assert cell.execution_count is None, f"run `make format`: this cell has a count:\n{cell.source}"


def test_the_quickstart_measures_three_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = run("quickstart", tmp_path, monkeypatch)
    text = printed(code_cells(notebook)[-1])
    found = {who: float(ap) for who, ap in re.findall(r"^([\w ]+): AP (-?\d\.\d+),", text, re.MULTILINE)}
    assert found.keys() == {"student alone", "distilled", "teacher"}, text
    assert all(0 <= ap <= 1 for ap in found.values()), text
    assert count_pictures(notebook) == 2
    assert not (tmp_path / "lightning_logs").exists()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.exhaustive
def test_an_own_method_is_tried_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = run("own_data_and_loss", tmp_path, monkeypatch)
    tried = next(text for cell in code_cells(notebook) if (text := printed(cell)).startswith("with itself"))
    same, other, gradient = map(float, re.findall(r"-?\d+\.\d+", tried))
    assert abs(same) < 1e-4, tried
    assert 0 < other < 2, tried
    assert gradient > 0, tried
    training = printed(code_cells(notebook)[-2])
    assert "neck_cosine: {'neck.all': 20.0}" in training
    assert "distilled (neck_cosine)" in training.strip().splitlines()[-1], training[-500:]
    assert "'val/AP': " in printed(code_cells(notebook)[-1])


@pytest.mark.exhaustive
def test_two_students_are_compared_and_analyzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = run("why_it_works", tmp_path, monkeypatch)
    texts = [printed(cell) for cell in code_cells(notebook)]
    assert any("not decided" in text and "run more seeds" in text for text in texts)
    similarities = next(text for text in texts if text.startswith("baseline  stride"))
    assert similarities.count("student ") == 5
    # Detectors of one epoch may leave the list of images empty.
    assert count_pictures(notebook) == 3 + any("objects lost" in text for text in texts)
    assert int(texts[-1].split()[0]) < 5000
