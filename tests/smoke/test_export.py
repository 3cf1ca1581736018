"""The command export on a run, and its files in evaluate, predict and a program without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.cli.main import main
from distill.data.shapes import Shapes
from distill.export.exported import ExportedDetector
from helpers.runs import TINY, TINY_DATA, TINY_QUERIES, TINY_RUN, Cli

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FEW = ["--images", "4", "--timed", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a file `student.onnx`, which tests only read."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    assert main(["train", "distill=none", *TINY, "data.source.val=6", f"hydra.run.dir={folder}"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        assert main(["export", str(folder), "--to", "onnx", "--images", "4", "--timed", "1"]) == 0
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    source = Shapes(train=1, val=1, test=0, size=64)
    pixels = source.load_image(source.read_split("val")[1][0].file)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((100, 80)).save(path)
    return path


def test_export_writes_the_file_its_script_and_its_proof(run: Path) -> None:
    folder = run / "export" / "onnx"
    assert {file.name for file in folder.iterdir()} == {"student.onnx", "infer.py", "proof.json"}
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["images"] == 4
    assert proof["parity"]["images"] == 4
    assert proof["student"]["results"].keys() == proof["exported"]["results"].keys() >= {"AP", "AP50"}
    assert proof["exported"]["megabytes"] == (folder / "student.onnx").stat().st_size / 1e6
    for row in (proof["student"], proof["exported"]):
        assert [spread["threads"] for spread in row["latency"]] == [1]
        assert all(0 < spread["median"] <= spread["p95"] for spread in row["latency"])


def without_torch(
    folder: Path, picture: Path, blocked: Sequence[str] = ("torch", "torchvision", "distill")
) -> list[dict[str, Any]]:
    """The rows that the script beside a file prints in a process that cannot import some modules."""
    site = picture.parent / "blocked"
    site.mkdir()
    text = f"import sys\nfor name in {tuple(blocked)!r}:\n    sys.modules[name] = None\n"
    (site / "sitecustomize.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    kind = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, env=environment)
    assert kind.returncode != 0  # the block works
    command = [sys.executable, str(folder / "infer.py"), str(folder / "student.onnx"), str(picture), "0.0"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_script_needs_no_torch(run: Path, picture: Path, cli: Cli) -> None:
    folder = run / "export" / "onnx"
    rows = without_torch(folder, picture)
    assert cli(["predict", str(run), str(picture), "--out", "found"]) == 0
    expected = json.loads(Path("found/detections.json").read_text())
    assert len(rows) == len(expected) > 0
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    assert len((folder / "infer.py").read_text().splitlines()) < 40


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["rtdetr_mini", "dfine_mini"])
def test_the_file_of_a_set_prediction_detector_needs_neither_torch_nor_its_library(
    model: str, picture: Path, cli: Cli
) -> None:
    """Through the command, with its proof and a quantized file, and the script in a process without torch."""
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    lines = [*TINY_DATA, *TINY_QUERIES, *TINY_RUN, "test=false", "hydra.run.dir=run"]
    assert cli(["train", "distill=none", f"model={model}", *lines]) == 0
    assert cli(["export", "run", "--to", "onnx", *FEW]) == 0
    folder = Path("run/export/onnx")
    parity = json.loads((folder / "proof.json").read_text())["parity"]
    assert (parity["missing"], parity["surplus"]) == (0, 0)
    assert parity["detections"] == 4 * 10 * 6  # images, queries, classes
    rows = without_torch(folder, picture, blocked=("torch", "torchvision", "distill", "transformers"))
    assert cli(["predict", "run", str(picture), "--out", "found"]) == 0
    expected = json.loads(Path("found/detections.json").read_text())
    assert len(rows) == len(expected) == 60
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    assert cli(["export", "run", "--to", "onnx", "--int8", "--calibration", "4", *FEW, "--out", "int8"]) == 0
    assert "int8" in ExportedDetector("int8/student.onnx").facts
    assert cli(["export", "run", "--to", "onnx", "--parts", "dense", "--top", "30", *FEW, "--out", "dense"]) == 0
    assert cli(["evaluate", "dense/student.onnx", "--json", "dense.json", "data=shapes", *TINY_DATA]) == 0
    assert cli(["export", "run", "--to", "torchvision", *FEW, "--out", "torchvision"]) == 1


def test_evaluate_and_predict_take_the_file(run: Path, picture: Path, cli: Cli) -> None:
    file = str(run / "export" / "onnx" / "student.onnx")
    assert cli(["evaluate", file, "--json", "file.json"]) == 0
    assert cli(["evaluate", str(run), "--json", "run.json"]) == 0
    found, expected = (json.loads(Path(name).read_text()) for name in ("file.json", "run.json"))
    assert found == pytest.approx(expected, abs=1e-3)
    bad = picture.with_name("bad.png")
    bad.write_bytes(b"no image")
    assert cli(["predict", file, str(picture), str(bad), "--out", "found"]) == 0
    listing = json.loads(Path("found/images.json").read_text())
    assert [Path(row["file_name"]).name for row in listing["images"]] == ["picture.png"]
    assert [Path(row["file_name"]).name for row in listing["failed"]] == ["bad.png"]
    assert json.loads(Path("found/detections.json").read_text())


def test_evaluate_takes_a_file_outside_of_a_run(
    run: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "moved.onnx"
    file.write_bytes((run / "export" / "onnx" / "student.onnx").read_bytes())
    assert cli(["evaluate", str(file)]) == 1
    assert "add data=" in capsys.readouterr().err
    data = ["data=shapes", "data.source.val=4", "data.source.size=64", "data.source.train=4", "data.source.test=0"]
    assert cli(["evaluate", str(file), *data, "--json", "file.json"]) == 0
    assert "AP" in json.loads(Path("file.json").read_text())


@pytest.mark.parametrize("route", ["torchscript", "safetensors"])
def test_other_formats_find_what_the_student_finds(route: str, run: Path, cli: Cli) -> None:
    if route == "safetensors":
        pytest.importorskip("safetensors")
    assert cli(["export", str(run), "--to", route, *FEW, "--out", route]) == 0
    proof = json.loads(Path(route, "proof.json").read_text())
    parity = proof["parity"]
    assert (parity["missing"], parity["surplus"]) == (0, 0)
    assert parity["detections"] > 0
    assert parity["pixels"] < 1e-3


def test_int8_is_calibrated_on_training_images(run: Path, cli: Cli) -> None:
    options = ["--int8", "--calibration", "4", "--max-loss", "100", "--out", "int8"]
    assert cli(["export", str(run), "--to", "onnx", *FEW, *options]) == 0
    import onnx

    kinds = [node.op_type for node in onnx.load("int8/student.onnx").graph.node]
    assert kinds.count("QuantizeLinear") > 10
    assert not Path("int8/float32.onnx").exists()
    from distill.export.exported import ExportedDetector

    assert ExportedDetector("int8/student.onnx").facts["int8"] == "static, calibrated on 4 training images"


def test_openvino_finds_what_the_student_finds(run: Path, cli: Cli) -> None:
    pytest.importorskip("openvino", reason="left out: the extra openvino (60 MB) is not installed")
    assert cli(["export", str(run), "--to", "openvino", *FEW, "--out", "openvino"]) == 0
    parity = json.loads(Path("openvino/proof.json").read_text())["parity"]
    assert (parity["missing"], parity["surplus"]) == (0, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "tensorrt"], "expected onnx, openvino"),
        (["--to", "onnx", "--opset", "11"], "--opset 11: expected 16 to 20"),
        (["--to", "onnx", "--parts", "full", "--batch", "dynamic"], "use --parts dense"),
        (["--to", "onnx", "--parts", "dense", "--canvas", "64"], "expected HEIGHTxWIDTH"),
        (["--to", "onnx", "--parts", "dense", "--canvas", "60x64"], "multiples of 32"),
        (["--to", "onnx", "--parts", "dense", "--top", "0"], "--top 0"),
        (["--to", "torchscript", "--parts", "dense"], "has no dense part"),
        (["--to", "openvino", "--int8"], "--int8 quantizes"),
        (["--to", "onnx", "--images", "0"], "--images 0"),
        (["--to", "onnx", "--int8", "--calibration", "0"], "--calibration 0: expected at least one image of train"),
        (["--to", "torchvision"], "backbone.width=0.25"),
    ],
)
def test_refusals_write_nothing(
    words: list[str], message: str, run: Path, cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli(["export", str(run), *words, "--timed", "0", "--out", "out"]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_loss_writes_nothing(
    run: Path, cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--to", "onnx", *FEW, "--timed", "0", "--max-loss", "-1", "--out", "out"]
    assert cli(["export", str(run), *words]) == 1
    assert "more than --max-loss -1. Nothing was written" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(
    run: Path, cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli(["export", str(run), "--to", "onnx"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'distill[onnx]'" in error
    assert "uv pip install 'distill[onnx]'" in error


def test_a_file_of_another_origin_is_refused(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"no model")
    (tmp_path / "image.png").write_bytes(b"")
    assert cli(["predict", "damaged.onnx", "image.png"]) == 1
    assert "not an ONNX file" in capsys.readouterr().err
    assert cli(["predict", "missing.onnx", "image.png"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_ctrl_c_leaves_the_previous_export(
    run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distill.export import routes

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "proof.json").write_text("kept")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(routes, "export_onnx", stop)
    assert cli(["export", str(run), "--to", "onnx", "--out", "out"]) == 130
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "proof.json"]


def test_a_folder_that_cannot_be_written_is_refused(run: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert cli(["export", str(run), "--to", "onnx", "--out", "file/out"]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_exported_weights_load_into_plain_torchvision(tmp_path: Path) -> None:
    """The three lines of `load.py`, for a student whose options torchvision has, in a program without distill."""
    from distill.detectors.faster_rcnn import FasterRCNN
    from distill.export.torchvision_code import torchvision_code, torchvision_state

    torch.manual_seed(0)
    student = FasterRCNN(["cat"], backbone={"depth": 18, "norm_eps": 1e-3}, neck_channels=16, head_channels=8)
    torch.save(torchvision_state(student), tmp_path / "student_torchvision.pt")
    (tmp_path / "load.py").write_text(torchvision_code(student, "student_torchvision.pt"))
    program = (
        "import sys; sys.modules['distill'] = None; from load import net; print(net.eval().roi_heads.score_thresh)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("0.05", "")


def test_card_has_results_recipe_and_weights(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    from distill.detectors.registry import load_detector
    from distill.export import hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Client:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(hub, "hub_client", Client)
    words = ["--license", "CC-BY-4.0", "--out", "card", "--push-to-hub", "me/cells"]
    assert cli(["card", str(run), *words]) == 0
    names = {"README.md", "student.safetensors", "student.json", "student.onnx", "infer.py"}
    assert {file.name for file in Path("card").iterdir()} == names
    assert [call[0] for call in calls] == ["me/cells", "upload"]
    assert Path(calls[1][1]["folder_path"]) == Path("card")
    text = Path("card/README.md").read_text()
    assert "license: cc-by-4.0" in text
    assert "| this student | CC-BY-4.0 |" in text
    assert "| onnx (val, 4 images) |" in text
    assert "distill=none" in text
    ours, loaded = load_detector(run).state_dict(), load_detector("card").state_dict()
    assert ours.keys() == loaded.keys()
    assert all(torch.equal(ours[name], loaded[name]) for name in ours)


def test_a_student_continues_on_data_with_other_classes(run: Path, cli: Cli) -> None:
    """From a folder of safetensors. The rows of known classes are kept: after 0 steps of a learning rate of 0."""
    pytest.importorskip("safetensors")
    from distill.detectors.registry import load_detector
    from distill.detectors.student_files import save_safetensors

    before = load_detector(run)
    save_safetensors(before, "weights")
    words = ["model.weights=weights", "model.head=match", "schedule.optimizer.lr=0", "data.source.classes=[ring,star]"]
    assert cli(["train", "distill=none", *TINY, *words, "hydra.run.dir=more", "schedule.optimizer.weight_decay=0"]) == 0
    after = load_detector("more")
    assert set(after.classes) == {"ring", "star"}
    layer = "roi_heads.box_predictor.cls_score"
    for name in after.classes:
        rows = [detector.classes.index(name) + 1 for detector in (before, after)]
        kept = [
            detector.net.get_submodule(layer).weight[row] for detector, row in zip((before, after), rows, strict=True)
        ]
        assert torch.equal(*kept)


def test_card_of_an_unfinished_run_is_refused(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert cli(["card", "run"]) == 1
    assert "expected a finished run" in capsys.readouterr().err
