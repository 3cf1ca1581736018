"""Reading of pickles of unknown origin: tensors, NumPy arrays and plain containers. No code of a file runs.

A pickle names classes and functions, and its reader calls them. `torch.load(weights_only=True)` knows a few names and
refuses all others, also where a file holds objects of a training program beside its weights (MMDetection 3.x), and it
reads no pickle without torch's frame (Detectron2's model zoo). This reader knows the names in `PLAIN`, each with a
function of its own that accepts nothing else. A name of Python's standard library is refused: no checkpoint needs one,
and a hostile file does. Any other name becomes a `Placeholder`, which does nothing.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distill.types import DistillError

HARMLESS = {
    "builtins": ("getattr", "object", "set", "frozenset", "slice", "range", "complex", "bytearray"),
    "collections": ("defaultdict", "deque", "Counter", "ChainMap"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "logging": ("Logger", "getLogger", "_getLogger"),
    "copyreg": ("_reconstructor",),
    "enum": ("Enum",),
    "uuid": ("UUID",),
}
"""Names of the standard library that checkpoints hold beside their weights. They become placeholders; none runs."""


class Placeholder:
    """An object of a class that this program does not know. It takes every call and keeps nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> Placeholder:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> Placeholder:
        """Return another placeholder."""
        return Placeholder()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Take an item, as lists do."""

    def extend(self, items: Any) -> None:
        """Take items, as lists do."""

    def add(self, item: Any) -> None:
        """Take an item, as sets do."""

    def update(self, *arguments: Any) -> None:
        """Take items, as dictionaries do."""


def read_pickle(path: Path) -> Any:
    """Read a plain pickle, as Detectron2's model zoo has them. Texts of Python 2 are read as Latin-1.

    Raises:
        DistillError: the file names code of the standard library.
        Exception: the bytes are not a complete pickle.
    """
    return as_tensors(_unpickler()(io.BytesIO(path.read_bytes()), encoding="latin1").load())


def read_torch(path: Path) -> Any:
    """Read a file of `torch.save` that also holds objects of other programs. Those become placeholders.

    Raises:
        DistillError: the file names code of the standard library.
        Exception: the bytes are not a complete file of `torch.save`.
    """
    import torch

    kind = _unpickler()

    def load(file: Any, **options: Any) -> Any:
        return kind(file, **options).load()

    module = SimpleNamespace(Unpickler=kind, load=load, UnpicklingError=pickle.UnpicklingError, __name__=__name__)
    return as_tensors(torch.load(path, map_location="cpu", pickle_module=module, weights_only=False))


def is_torchscript(path: Path) -> bool:
    """Whether a zip file is a TorchScript program. `torch.load` would run the program's code.

    Raises:
        RuntimeError: the file is damaged.
    """
    import torch

    # torch.load's own reader and test, because two readers of one zip file may find different records.
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


def as_tensors(content: Any) -> Any:
    """Return the content with tensors in place of arrays. Containers are copied."""
    import numpy as np
    import torch

    if isinstance(content, np.ndarray | np.generic):
        if content.dtype.kind not in "biuf":
            return Placeholder()
        native = np.asarray(content).astype(content.dtype.newbyteorder("="))
        return torch.from_numpy(native.copy())
    if isinstance(content, dict):
        return {key: as_tensors(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(as_tensors(value) for value in content)
    return content


def _unpickler() -> type[pickle.Unpickler]:
    """A class of unpicklers with functions of its own, so that a file can change no function of the program."""
    known = _plain()

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
            if (module, name) in known:
                return known[module, name]
            first = module.partition(".")[0]
            if first in sys.stdlib_module_names or first in ("builtins", "distill"):
                if name in HARMLESS.get(module, ()):
                    return type("Placeholder", (Placeholder,), {})
                raise DistillError(
                    f"it asks to run {module}.{name}, which was not run. "
                    "Do not trust the file; get the weights from another source"
                )
            return type("Placeholder", (Placeholder,), {})

    return Restricted


def _plain() -> dict[tuple[str, str], Callable[..., Any]]:
    """(Module, name) -> what stands for it: containers, arrays and tensors."""
    import numpy as np
    import torch

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if not isinstance(text, str) or encoding.replace("-", "").lower() not in ("latin1", "utf8", "ascii"):
            raise pickle.UnpicklingError(f"unknown encoding {encoding!r}")
        return text.encode(encoding)

    def reconstruct(kind: Any, shape: Any, code: Any) -> Any:
        return np.ndarray.__new__(np.ndarray, (0,), "b")

    def array(*arguments: Any) -> Any:
        raise pickle.UnpicklingError("an array that NumPy did not pickle")

    def scalar(dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
            return Placeholder()
        return np.frombuffer(data, dtype, 1)[0]

    def dtype(code: Any, *arguments: Any) -> Any:
        if not isinstance(code, str):
            raise pickle.UnpicklingError("an array of objects")
        return np.dtype(code, copy=True)  # a copy: the file then sets its byte order

    def tensor(*arguments: Any) -> Any:
        return torch._utils._rebuild_tensor_v2(*arguments)  # type: ignore[no-untyped-call]

    def old_tensor(*arguments: Any) -> Any:
        return torch._utils._rebuild_tensor(*arguments)  # type: ignore[no-untyped-call]

    def parameter(data: Any, *arguments: Any) -> Any:
        return data

    def size(values: Any) -> Any:
        return torch.Size(values)

    def storage(data: Any) -> Any:
        """The values of a tensor in a plain pickle: a file of `torch.save` in the file."""
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def text(value: Any = "", *arguments: Any) -> Any:
        return value if isinstance(value, str) else ""

    def from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
        if not isinstance(kind, np.dtype) or kind.kind not in "biuf" or not isinstance(data, bytes | bytearray):
            return Placeholder()
        return np.frombuffer(data, kind).reshape(shape, order=order)

    numpy_core = ("numpy.core.multiarray", "numpy._core.multiarray")
    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): lambda *arguments: b"",  # protocol 2 writes empty bytes as a call
        ("builtins", "str"): text,
        ("builtins", "dict"): dict,
        ("builtins", "list"): list,
        ("builtins", "tuple"): tuple,
        ("numpy", "ndarray"): array,
        ("numpy", "dtype"): dtype,
        **{(module, "_reconstruct"): reconstruct for module in numpy_core},
        **{(module, "scalar"): scalar for module in numpy_core},
        # Protocol 5, the default of Python 3.14, writes arrays by this function.
        **{(module, "_frombuffer"): from_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor"): old_tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch", "Size"): size,
        ("torch", "device"): lambda *arguments: torch.device("cpu"),
        **{("torch", name): getattr(torch, name) for name in _DTYPES},
    }


_DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
