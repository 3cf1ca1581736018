"""Quoting of values in overrides."""

from __future__ import annotations

import re


def quote_value(text: str, mark: str = "'") -> str:
    """Quote a value, so that an override may contain any characters, such as spaces and commas in paths.

    Backslashes are doubled before a quotation mark and at the end only, as Hydra reads them.

    Args:
        text: the value.
        mark: the quotation mark, single or double.
    """
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda match: match[1] * 2 + (f"\\{mark}" if match[2] else ""), text)
    return f"{mark}{escaped}{mark}"
