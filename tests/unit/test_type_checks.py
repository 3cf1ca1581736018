"""Options from files against the parameters of a constructor."""

from __future__ import annotations

from distill.type_checks import unknown_options


def test_unknown_options_are_all_named_except_those_of_hydra() -> None:
    def build(known: int) -> None:
        """A constructor."""

    def build_from_any(**options: int) -> None:
        """A constructor that takes every name."""

    assert unknown_options(build, {"_target_": "x", "known": 1, "a": 1, "b": 2}) == ["a", "b"]
    assert unknown_options(build_from_any, {"a": 1}) == []
