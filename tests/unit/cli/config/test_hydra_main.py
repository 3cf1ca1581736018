"""The flags of Hydra's command line that train answers, and those that it refuses."""

from __future__ import annotations

import pytest

from distill.cli.config import hydra_main
from distill.types import DistillError


def test_overrides_and_flags_in_any_order() -> None:
    flags, others = hydra_main.parse_words(["seed=1", "-m", "distill=none,defeat", "-r"])
    assert (flags.overrides, others) == (["seed=1", "distill=none,defeat"], ["-m", "-r"])
    assert flags.runs
    assert flags.multirun


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["--info"], ["--hydra-help"], ["-sc", "query=bash"]])
def test_a_flag_that_asks_starts_no_run(words: list[str]) -> None:
    assert not hydra_main.parse_words(words)[0].runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1", "--epochs=3"], "there is no flag --epochs=3"),
        (["seed=1", "--resolve"], "go with --cfg"),
        (["seed=1", "--package", "data"], "go with --cfg"),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        hydra_main.parse_words(words)


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    names = [f"frcnn_r{number}" for number in range(20)]
    text = f"Groups:\n\nmodel: base, {', '.join(names)}\nteacher/of: {', '.join(names)}\n\nOther verbs: one\n"
    wrapped = hydra_main.wrapped_help(text)
    assert max(map(len, wrapped.splitlines())) <= 40
    assert [wrapped.count(f"{name},") + wrapped.count(f"{name}\n") for name in names] == [1] * 20
    assert "teacher/of" not in wrapped
    assert "base" not in wrapped
    assert wrapped.endswith("\n\nOther verbs: one\n")
