"""Import of optional packages, which extras of distill install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distill.types import DistillError


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: the module's name.
        extra: the extra of distill that installs it.
        purpose: what needs it, for the message.

    Raises:
        DistillError: the package is not installed. The message names the commands that install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DistillError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed ({error}). Install the extra:\n"
            f"  pip install 'distill[{extra}]'\n"
            f"  uv pip install 'distill[{extra}]'"
        ) from error
