"""The file extensions of exported detectors. This module imports nothing, for commands that have to start fast."""

SUFFIXES = (".onnx", ".xml", ".torchscript")


def is_exported(name: str) -> bool:
    """Whether a file's name has the extension of an exported detector."""
    return name.lower().endswith(SUFFIXES)
