"""The option ``--device`` of the commands that run a trained detector."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from typing import TYPE_CHECKING

from distill.types import DistillError

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"cpu|mps|cuda(?::\d+)?|\d+")


def add_device_option(parser: ArgumentParser, default: str = "CUDA if available, else cpu") -> None:
    """Add ``--device`` to the options of a command.

    Args:
        parser: parser of the command.
        default: the device without this option, in words.
    """
    parser.add_argument("--device", help=f"cpu, cuda, cuda:1 or mps; default: {default}")


def find_device(name: str | None) -> torch.device:
    """The device of a name. A number is the index of a CUDA device; None is CUDA if available, otherwise the CPU.

    Raises:
        DistillError: the name is no device, or this machine does not have the device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if count else "cpu")
    if not _DEVICE.fullmatch(name):
        raise DistillError(f"--device {name}: expected cpu, cuda, cuda:1 or mps")
    device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DistillError(f"--device {name}: torch finds {count} CUDA devices here; --device cpu works everywhere")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DistillError("--device mps: torch finds no such device here; --device cpu works everywhere")
    return device
