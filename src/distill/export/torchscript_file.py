"""TorchScript files: the traced graph, for torch programs without distill, in Python or C++."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.export.metadata import from_strings, to_strings
from distill.types import DistillError

METADATA = "metadata.json"
"""The extra file that holds the metadata inside a TorchScript file."""


def export_torchscript(graph: nn.Module, image: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Trace a `FullGraph` and save it with its metadata. Programs that load it also load torchvision's operators."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns about every shape that it records
        traced: Any = torch.jit.trace(graph, image, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path), {METADATA: json.dumps(to_strings(facts))})


class TorchScriptProgram:
    """A TorchScript file on the CPU.

    Args:
        path: the file.
        threads: number of torch's threads during a call; 0: unchanged.

    Raises:
        DistillError: torch cannot read the file.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import torchvision  # noqa: F401  its operators

        extra = {METADATA: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated
                self.network: Any = torch.jit.load(str(path), "cpu", extra)  # type: ignore[no-untyped-call]
        except Exception as error:  # damaged files raise errors of many types
            reason = str(error).strip().partition("\n")[0]
            raise DistillError(f"{path}: not a TorchScript file that torch can read ({reason})") from error
        self.facts = from_strings(json.loads(extra[METADATA] or "{}"), str(path))
        self.outputs = [text.partition(":")[0] for text in self.facts["outputs"]]
        self.threads = threads

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the file; outputs by name."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return dict(zip(self.outputs, self.network(*inputs), strict=True))
        finally:
            torch.set_num_threads(before)
