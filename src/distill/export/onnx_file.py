"""ONNX files: their export, their metadata, and their use through onnxruntime.

torch's exporter by tracing (``dynamo=False``) is used: the exporter by ``torch.export`` cannot yet export the NMS of
torchvision's detectors, because the number of detections depends on the image (torch 2.14).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.export.metadata import from_strings, to_strings
from distill.extras import import_extra
from distill.types import DistillError

OPSETS = range(16, 21)
"""Operator sets of ONNX that the exporter writes and that have all operators: RoIAlign is complete from 16 on."""
DEFAULT_OPSET = 18
EXTRA = "onnx"


def check_opset(opset: int) -> None:
    """Refuse an operator set.

    Raises:
        DistillError: it lacks an operator, or the exporter cannot write it.
    """
    if opset not in OPSETS:
        raise DistillError(
            f"--opset {opset}: expected {OPSETS[0]} to {OPSETS[-1]}. Older operator sets lack the RoIAlign that the "
            "detectors need; torch's exporter does not write newer ones"
        )


def export_onnx(
    graph: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    facts: Mapping[str, Any],
    opset: int = DEFAULT_OPSET,
) -> None:
    """Export a graph and add metadata.

    Args:
        graph: a `FullGraph` or `DenseGraph`.
        inputs: example inputs.
        path: the file to write.
        axes: name of an input or output -> its axes of any length, with their names.
        outputs: names of the outputs.
        facts: metadata, see `metadata.describe_file`.
        opset: the operator set.

    Raises:
        DistillError: onnx is not installed, or a part of the detector has no counterpart in ONNX.
    """
    onnx = import_extra("onnx", EXTRA, "--to onnx")
    names = [name for name in axes if name not in outputs]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns about every shape that it records
        try:
            torch.onnx.export(
                graph,
                inputs,
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=names,
                output_names=list(outputs),
                dynamic_axes={name: dict(lengths) for name, lengths in axes.items()},
            )
        except torch.onnx.errors.UnsupportedOperatorError as error:
            raise DistillError(
                f"--to onnx: a part of the detector has no counterpart in ONNX's operator set {opset}: {error}. "
                "Choose another backbone or a higher --opset"
            ) from error
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, to_strings(facts))
    model.producer_name, model.producer_version = "distill", facts["producer"].partition(" ")[2]
    model.doc_string = f"{facts['input']}\n" + "\n".join(facts["outputs"])
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


class OnnxProgram:
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        path: the file.
        threads: number of threads; 0: as many as the machine has cores.

    Raises:
        DistillError: onnxruntime is not installed, or cannot read the file.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        runtime = import_extra("onnxruntime", EXTRA, f"{path.name}")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise DistillError(f"{path}: not an ONNX file that onnxruntime can run ({_first_line(error)})") from error
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.facts = from_strings(self.session.get_modelmeta().custom_metadata_map, str(path))

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the file; outputs by name."""
        given = dict(zip(self.inputs, (value.numpy() for value in inputs), strict=True))
        found = self.session.run(None, given)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
