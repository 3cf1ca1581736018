"""OpenVINO files, converted from ONNX: a graph (``.xml``) with its weights (``.bin``) beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.export.metadata import from_strings, to_strings
from distill.extras import import_extra
from distill.types import DistillError

EXTRA = "openvino"


def convert_to_openvino(source: Path, path: Path, facts: dict[str, Any]) -> None:
    """Convert an ONNX file, with float32 weights, and add metadata below ``rt_info/distill``."""
    openvino = import_extra("openvino", EXTRA, "--to openvino")
    model = openvino.convert_model(str(source))
    for name, text in to_strings(facts).items():
        model.set_rt_info(text, ["distill", name])
    openvino.save_model(model, str(path), compress_to_fp16=False)


class OpenVinoProgram:
    """An OpenVINO file on the CPU, in float32.

    Args:
        path: the ``.xml``; its ``.bin`` lies beside it.
        threads: number of threads; 0: as many as the machine has cores.

    Raises:
        DistillError: openvino is not installed, or cannot read the file.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        openvino = import_extra("openvino", EXTRA, path.name)
        options = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        try:
            model = openvino.Core().read_model(str(path))
            self.network = openvino.compile_model(model, "CPU", options)
            found: Any = model.get_rt_info(["distill"]) if model.has_rt_info(["distill"]) else {}
            stored = getattr(found, "value", found)
        except Exception as error:  # openvino's errors have no common class
            reason = str(error).strip().partition("\n")[0]
            raise DistillError(f"{path}: not an OpenVINO file that openvino can run ({reason})") from error
        self.facts = from_strings({name: str(getattr(text, "value", text)) for name, text in stored.items()}, str(path))
        self.outputs = [text.partition(":")[0] for text in self.facts["outputs"]]

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the file; outputs by name."""
        found = self.network([value.numpy() for value in inputs])
        return {name: torch.from_numpy(found[place].copy()) for place, name in enumerate(self.outputs)}
