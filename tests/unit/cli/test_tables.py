"""Tables and lines of the verbs on the terminal."""

from __future__ import annotations

import pytest

from distill.cli.tables import MISSING, print_line, print_table


def test_a_table_shows_its_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("a [title]", ("name", "[value]"), [("[red]", 1), ("b", None)])
    printed = capsys.readouterr().out
    for text in ("a [title]", "[value]", "[red]", "1", MISSING):
        assert text in printed


def test_a_table_without_rows_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ("name",), [])
    assert capsys.readouterr().out == ""


def test_a_narrow_terminal_cuts_no_cell_and_no_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    path = "/a/" + "very/long/" * 10
    print_line("run", path)
    print_table("t", ("name",), [("x" * 50,)])
    printed = capsys.readouterr().out
    assert path in printed
    assert printed.count("x") == 50
    assert "…" not in printed


def test_a_file_has_no_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/home/a user/" + "long-folder/" * 12
    print_table(f"sweep {path}", ("job", "a.very.long.key.of.the.configuration"), [("0", path), ("1", "x")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sweep {path}"
    assert any(path in line and line.count("│") == 3 for line in lines[1:])


def test_texts_start_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("", "run", "student"):
        print_line(label, "text")
    assert {line.index("text") for line in capsys.readouterr().out.splitlines()} == {10}
