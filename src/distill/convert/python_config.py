"""Reading of MMDetection's configurations, which are Python source, without running them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

Value = Any

OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
"""Operations on numbers."""


class _Unknown(Exception):
    """The value needs Python to run."""


def parse_config(text: str) -> dict[str, Any]:
    """Return the top-level names of a configuration and their values.

    The parser supports literals, calls of ``dict``, arithmetic with numbers, and names that were assigned before. All
    other assignments are left out. A text that is not Python gives an empty dictionary.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = _value(node.value, values)
            except (_Unknown, RecursionError, ArithmeticError, TypeError):
                continue
    return values


def _value(node: ast.expr, names: dict[str, Any]) -> Value:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {
            _value(key, names): _value(value, names) for key, value in zip(node.keys, node.values, strict=True) if key
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _value(word.value, names) for word in node.keywords if word.arg}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_number(node.left, names), _number(node.right, names))
    raise _Unknown


def _number(node: ast.expr, names: dict[str, Any]) -> float:
    value = _value(node, names)
    if not isinstance(value, int | float):
        raise _Unknown
    return value
