"""The formats of an export: how the files of a format are written, and how they are opened again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_safetensors
from distill.diagnostics.cost import folded_copy
from distill.export.dense import DenseProgram
from distill.export.exported import ExportedDetector
from distill.export.graphs import Canvas, FullGraph, dense_graph
from distill.export.int8 import quantize
from distill.export.metadata import describe_file
from distill.export.onnx_file import DEFAULT_OPSET, OnnxProgram, check_opset, export_onnx
from distill.export.onnx_file import EXTRA as ONNX
from distill.export.openvino_file import EXTRA as OPENVINO
from distill.export.openvino_file import convert_to_openvino
from distill.export.proof import Detect, ValidationImages, detect_by
from distill.export.torchscript_file import export_torchscript
from distill.export.torchvision_code import detect_with_torchvision, torchvision_code, torchvision_state
from distill.extras import import_extra
from distill.files import write_text
from distill.imaging.resizing import padded_size, resized_size
from distill.progress import track
from distill.types import DistillError

TEMPLATES = Path(__file__).with_name("templates")
EXAMPLE = (120, 150)
"""Height and width of the image with which a graph is traced. The sides differ, and no side equals another size."""


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how.

    Args:
        to: the format, a name in `ROUTES`.
        parts: ``full``: from pixels to detections; ``dense``: what runs on every cell, in batches of a fixed size.
        batch: for ``dense``: ``dynamic``, or ``1``.
        top: for ``dense``: number of decoded candidates per image; None: raw outputs.
        canvas: for ``dense``: (height, width) of the images; None: the smallest that holds all validation images.
        opset: ONNX's operator set.
        int8: whether convolutions and linear layers are quantized, see `int8.quantize`.
        license: license of the weights.
    """

    to: str = "onnx"
    parts: str = "full"
    batch: str = "1"
    top: int | None = None
    canvas: tuple[int, int] | None = None
    opset: int = DEFAULT_OPSET
    int8: bool = False
    license: str = "not stated"

    def check(self) -> None:
        """Refuse options that do not fit together.

        Raises:
            DistillError: the message names the option.
        """
        if self.to not in ROUTES:
            raise DistillError(f"--to {self.to}: expected {', '.join(ROUTES)}")
        if self.parts not in ("full", "dense"):
            raise DistillError(f"--parts {self.parts}: expected full or dense")
        if self.parts == "full" and (self.batch != "1" or self.top is not None or self.canvas is not None):
            raise DistillError(
                "--parts full takes one image of any size per call, so --batch dynamic, --top and --canvas do not "
                "apply; use --parts dense for batches"
            )
        if self.parts == "dense" and "dense" not in ROUTES[self.to].parts:
            raise DistillError(f"--to {self.to} has no dense part; use --to onnx or --to openvino")
        if self.top is not None and self.top < 1:
            raise DistillError(f"--top {self.top}: expected at least 1 candidate")
        if self.int8 and (self.to, self.parts) != ("onnx", "full"):
            raise DistillError(
                "--int8 quantizes files of --to onnx --parts full only; leave out --int8, or export such a file"
            )
        check_opset(self.opset)
        for module, extra in ROUTES[self.to].needs.items():
            import_extra(module, extra, f"--to {self.to}")


@dataclass
class Written:
    """The files of an export."""

    main: Path
    """The file that is opened."""
    files: list[Path] = field(default_factory=list)
    """Files that a deployed program needs."""


@dataclass(frozen=True)
class Route:
    """How a format is written and opened."""

    write: Callable[[Detector, ExportOptions, Canvas | None, Mapping[str, Any], Path], Written]
    """Writes the files of a detector into a folder."""
    open: Callable[[Path, Detector], Callable[[int], Detect]] = field(default_factory=lambda: _open_exported)
    """Opens the main file with a number of threads; the result detects objects in an image."""
    parts: Sequence[str] = ("full", "dense")
    needs: Mapping[str, str] = field(default_factory=dict)
    """Module -> the extra that installs it."""
    folded: bool = True
    """Whether batch norms are folded into convolutions before the export."""


def write_export(
    detector: Detector, options: ExportOptions, data: DetectionData, extra: Mapping[str, Any], folder: Path
) -> Written:
    """Write a detector in a format.

    Args:
        detector: the detector; it does not change.
        options: checked options.
        data: its validation images determine the canvas of a dense graph.
        extra: the further facts of the student's description, such as category ids.
        folder: an existing folder.

    Raises:
        DistillError: the format cannot express the detector. The message names the part.
    """
    route = ROUTES[options.to]
    canvas = None if options.parts == "full" else choose_canvas(detector, options, data)
    if route.folded:
        detector = folded_copy(detector, data.load_batch("val", [0]), torch.device("cpu")).eval()
    return route.write(detector, options, canvas, extra, folder)


def choose_canvas(detector: Detector, options: ExportOptions, data: DetectionData) -> Canvas:
    """The size of a dense graph's images: the given one, or the smallest that holds all validation images."""
    if options.canvas is not None:
        return Canvas(*options.canvas)
    images = data.dataset("val", training=False)
    limits = detector.options["min_size"], detector.options["max_size"]
    sizes = [resized_size(images.size(index), *limits, detector.resize.shape) for index in range(len(images))]
    return Canvas(*padded_size(sizes, detector.resize.pad_to))


def _write_onnx(
    detector: Detector, options: ExportOptions, canvas: Canvas | None, extra: Mapping[str, Any], folder: Path
) -> Written:
    path = folder / "student.onnx"
    if canvas is None:
        graph = FullGraph(detector).eval()
        facts = describe_file(detector, "full", graph.outputs, extra, options.license, {"opset": options.opset})
        axes: dict[str, dict[int, str]] = {"image": {0: "height", 1: "width"}}
        axes |= {name: {0: "detections"} for name in graph.outputs}
        if graph.has_masks:
            axes["masks"] |= {1: "height", 2: "width"}
        export_onnx(graph, (_example_image(),), path, axes, graph.outputs, facts, options.opset)
        write_text(folder / "infer.py", (TEMPLATES / "infer.py").read_text(encoding="utf-8"))
        return Written(path, [path])
    dense = dense_graph(detector, canvas, options.top).eval()
    if options.batch == "dynamic" and dense.one_image:
        raise DistillError(
            f"--batch dynamic: the library's {detector.spec.family} takes a fixed number of images. Use --batch 1"
        )
    further = {
        "opset": options.opset,
        "canvas": list(canvas),
        "top": options.top,
        "detects": "class_logits" in detector.spec.outputs,
    }
    facts = describe_file(detector, "dense", dense.outputs, extra, options.license, further)
    count = 2 if options.batch == "dynamic" else 1
    images = torch.zeros(count, 3, *canvas, dtype=torch.uint8)
    sizes = torch.tensor([list(canvas)] * count, dtype=torch.int32)
    axes = {"images": {}, "sizes": {}}
    if options.batch == "dynamic":
        axes = {name: {0: "batch"} for name in ("images", "sizes", *dense.outputs) if name != "anchors"}
    export_onnx(dense, (images, sizes), path, axes, dense.outputs, facts, options.opset)
    return Written(path, [path])


def _write_openvino(
    detector: Detector, options: ExportOptions, canvas: Canvas | None, extra: Mapping[str, Any], folder: Path
) -> Written:
    source = _write_onnx(detector, options, canvas, extra, folder).main
    path = folder / "student.xml"
    convert_to_openvino(source, path, OnnxProgram(source, 1).facts)
    source.unlink()
    (folder / "infer.py").unlink(missing_ok=True)
    return Written(path, [path, path.with_suffix(".bin")])


def _write_torchscript(
    detector: Detector, options: ExportOptions, canvas: Canvas | None, extra: Mapping[str, Any], folder: Path
) -> Written:
    path, graph = folder / "student.torchscript", FullGraph(detector).eval()
    facts = describe_file(detector, "full", graph.outputs, extra, options.license, {})
    export_torchscript(graph, _example_image(), path, facts)
    return Written(path, [path])


def _write_safetensors(
    detector: Detector, options: ExportOptions, canvas: Canvas | None, extra: Mapping[str, Any], folder: Path
) -> Written:
    path = save_safetensors(
        detector, folder, {**extra, "resize": detector.resize._asdict(), "license": options.license}
    )
    return Written(path, [path])


def _write_torchvision(
    detector: Detector, options: ExportOptions, canvas: Canvas | None, extra: Mapping[str, Any], folder: Path
) -> Written:
    path = folder / "student_torchvision.pt"
    code = torchvision_code(detector, path.name)
    torch.save(torchvision_state(detector), path)
    facts = describe_file(detector, "full", ["boxes", "scores", "labels"], extra, options.license, {})
    write_text(folder / "metadata.json", json.dumps(facts, indent=1))
    write_text(folder / "load.py", code)
    return Written(path, [path])


def _open_torchvision(path: Path, detector: Detector) -> Callable[[int], Detect]:
    """Run the three lines of `load.py`, which this program has just written, and use their network."""
    names: dict[str, Any] = {}
    code = torchvision_code(detector, path.as_posix())
    exec(compile(code, "load.py", "exec"), names)
    return lambda threads: detect_with_torchvision(names["net"])


def _example_image() -> torch.Tensor:
    return torch.randint(0, 256, (*EXAMPLE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _open_exported(path: Path, detector: Detector) -> Callable[[int], Detect]:
    def open_file(threads: int) -> Detect:
        exported = ExportedDetector(path, threads)
        return exported.detect if exported.facts["parts"] == "full" else DenseProgram(exported, detector).detect

    return open_file


def _open_detector(path: Path, detector: Detector) -> Callable[[int], Detect]:
    loaded = load_detector(path)
    return lambda threads: detect_by(loaded)


ROUTES: dict[str, Route] = {
    "onnx": Route(_write_onnx, needs={"onnx": ONNX, "onnxruntime": ONNX}),
    "openvino": Route(_write_openvino, needs={"onnx": OPENVINO, "onnxruntime": OPENVINO, "openvino": OPENVINO}),
    "torchscript": Route(_write_torchscript, parts=("full",)),
    "safetensors": Route(_write_safetensors, _open_detector, ("full",), {"safetensors": "hub"}, folded=False),
    "torchvision": Route(_write_torchvision, _open_torchvision, ("full",), folded=False),
}
"""Format -> how it is written."""


def open_program(to: str, path: Path, detector: Detector) -> Callable[[int], Detect]:
    """A function that opens an exported file with a number of threads; the result detects objects in an image.

    For a dense file, the detector computes the missing parts: the decoding of raw outputs, and the stages after the
    proposals of a two-stage detector.

    Args:
        to: the format.
        path: the file.
        detector: the exported detector.
    """
    return ROUTES[to].open(path, detector)


def quantize_export(written: Written, options: ExportOptions, data: DetectionData, count: int) -> Written:
    """Replace a full ONNX file by its int8 form.

    Args:
        written: the export in float32.
        options: its options.
        data: the training images calibrate the ranges.
        count: number of calibration images.

    Raises:
        DistillError: the export cannot be quantized, or there are no training images.
    """
    images = ValidationImages(data, "train", count, "--calibration")
    path = written.main
    full = path.with_name("float32.onnx")
    path.rename(full)
    facts = {**OnnxProgram(full, 1).facts, "int8": f"static, calibrated on {len(images)} training images"}
    quantize(full, path, (pixels for _, pixels in track(images, "calibration")), facts)
    full.unlink()
    return written
