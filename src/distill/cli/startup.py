"""A fast start of the command line, whose commands import torch and Lightning when they need them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import torch and Lightning without garbage collection, and keep their objects out of all later collections.

    More than a million objects of these libraries live until the process ends. If the collector examined them again and
    again, a short run would take about 2 seconds longer. If torchvision is imported already, this context does nothing:
    the process may have garbage, which would be kept for ever.
    """
    if "torchvision" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
