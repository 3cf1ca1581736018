"""Phrases that the style guide replaced must not come back into source and configuration."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHRASES = (
    "who reads",
    "hangs on",
    "by a seed of its own",
    "of which nobody",
    "nobody knows",
    "followed on one another",
    "is said now",
    "for good",
    "as it stands",
)


def test_source_and_configuration_use_none_of_the_replaced_phrases() -> None:
    pattern = re.compile(r"\b(" + "|".join(phrase.replace(" ", r"\s+") for phrase in PHRASES) + r")\b", re.IGNORECASE)
    files = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("conf/**/*.yaml")])
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): pattern.findall(file.read_text(encoding="utf-8")) for file in files}
    assert {file: phrases for file, phrases in found.items() if phrases} == {}
